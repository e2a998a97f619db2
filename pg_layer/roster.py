"""Groups and their members: the statements as typed functions, as in `pg_layer.store`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import errors

from pg_layer import sql
from pg_layer.exceptions import Held
from pg_layer.session import Session
from pg_layer.statement import Statement
from pg_layer.store import Executor


async def group_channels(session: Executor, prefix: str, group: str) -> list[str]:
    """The live members of a group."""
    return [channel for (channel,) in await session.execute(sql.GROUP_CHANNELS, prefix, group)]


async def group_count(session: Executor, prefix: str, group: str) -> int:
    """How many they are."""
    ((count,),) = await session.execute(sql.GROUP_COUNT, prefix, group)
    return int(count)


async def regroup(
    session: Executor,
    prefix: str,
    own_inbox: str | None,
    lease: float,
    expiry: float | None,
    joins: Sequence[tuple[str, str]],
    capacities: Sequence[int],
    leaves: Sequence[tuple[str, str]],
    unless_since: Sequence[int | None] | None = None,
) -> tuple[int, float, set[int]]:
    """Join (each channel with its capacity) and leave (group, channel) pairs, none twice.

    ``unless_since``: for each that is to leave the id after which it must not have joined, or None.
    Returns the id at which, and the time until which they have joined; and the indexes of those that stayed.
    With an ``own_inbox`` it waits for nobody's transaction, and raises `Held`.
    """
    _, since, expires_at, stayed = await _unheld(
        session,
        sql.REGROUP,
        prefix,
        own_inbox,
        lease,
        expiry,
        [group for group, _ in joins],
        [channel for _, channel in joins],
        capacities,
        [group for group, _ in leaves],
        [channel for _, channel in leaves],
        unless_since,
    )
    return since, expires_at, {position - 1 for position in stayed or ()}


async def reassert(
    session: Session, inbox: str, memberships: Sequence[tuple[str, str, float | None]]
) -> list[tuple[str, str]]:
    """Put back (group, channel, seconds left or None for the life of the lease).

    Returns which (group, channel) pairs the tables had lost, if nobody has joined them since; raises `Held`.
    """
    _, groups, channels = await _unheld(session, sql.REASSERT, inbox, *zip(*memberships, strict=True))
    return list(zip(groups or (), channels or (), strict=True))


async def withdraw(session: Session, inbox: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Remove (group, channel) pairs that were put back and have not joined since; raises `Held`."""
    await _unheld(session, sql.WITHDRAW, inbox, *zip(*pairs, strict=True))


async def _unheld(session: Executor, statement: Statement, *values: object) -> tuple[Any, ...]:
    """The statement's row; raises `Held` where that does not wait for somebody's transaction."""
    try:
        (row,) = await session.execute(statement, *values)
    except errors.LockNotAvailable as error:
        raise Held from error
    return row
