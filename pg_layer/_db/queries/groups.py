"""Memberships and membership requests: ``migrations/0001_4_groups.sql``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from pg_layer._db.queries.common import LAZY, Executor, lazily, one
from pg_layer._db.queries.send import Unannounced
from pg_layer._db.statement import (
    BOOL,
    BOOLS,
    FLOAT8,
    FLOAT8S_OR_NULL,
    INT4,
    INT4S,
    INT8,
    INT8S,
    TEXT,
    TEXTS,
    Statement,
)
from pg_layer._state.memberships import Pair
from pg_layer._state.snapshot import Moment, Snapshot

# Seconds for which a request counts if the owner of the channel does not apply it.
REQUEST_SECONDS = 10.0

# ---------------------------------------------------------------------- rows of an owner


class OwnRows(NamedTuple):
    """The rows that an owner writes about its memberships. A pair of group and channel occurs once.

    ``present``: group, channel, and the seconds until the membership ends, None for the life of the
    lease.
    ``gone``: the pairs of memberships that have ended.
    ``requests``: group, channel, and the largest id of the requests that have been applied.
    """

    present: Sequence[tuple[str, str, float | None]]
    gone: Sequence[tuple[str, str]]
    requests: Sequence[tuple[str, str, int]]


WRITE = Statement(
    LAZY + "f.* FROM pg_layer_write_memberships($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) AS f",
    *(TEXT, INT8, TEXTS, TEXTS, FLOAT8S_OR_NULL, TEXTS, TEXTS, TEXTS, TEXTS, INT8S),
)


async def write(session: Executor, address: str, fence: int, rows: OwnRows) -> Moment:
    """Write rows of the owner at ``address``. Return the moment in which new memberships begin."""
    _, boot, snapshot = await one(
        session,
        WRITE,
        address,
        fence,
        *_columns(rows.present, 3),
        *_columns(rows.gone, 2),
        *_columns(rows.requests, 3),
    )
    return Moment(boot, Snapshot(snapshot))


def _columns(rows: Sequence[tuple[object, ...]], width: int) -> list[Sequence[object]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width


BEGIN = Statement("BEGIN READ ONLY")
OPEN_OWN = Statement(
    "DECLARE pg_layer_own CURSOR FOR SELECT m.group_name, m.channel"
    " FROM pg_layer_membership AS m WHERE m.address = $1 AND m.id = 0",
    TEXT,
)
FETCH_OWN = Statement("FETCH 2000 FROM pg_layer_own")
COMMIT = Statement("COMMIT")


async def own_rows(session: Executor, address: str) -> AsyncIterator[list[Pair]]:
    """Read the pairs of group and channel in the rows of an owner, in parts of 2,000."""
    await session.execute(BEGIN)
    await session.execute(OPEN_OWN, address)
    while rows := await session.execute(FETCH_OWN):
        yield [(group, channel) for group, channel in rows]
    await session.execute(COMMIT)


# ---------------------------------------------------------------------- requests

REQUEST = Statement(
    lazily("$8")
    + "f.* FROM pg_layer_request_memberships($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) AS f",
    *(TEXT, TEXTS, TEXTS, BOOLS, FLOAT8, INT4S, FLOAT8, BOOL, BOOL, TEXT, INT8),
)


async def request(
    session: Executor,
    prefix: str,
    changes: Sequence[tuple[str, str, bool, int]],
    expiry: float | None,
    *,
    own: bool,
    quiet: bool,
    numbered: tuple[str, int] | None = None,
) -> list[Unannounced]:
    """Request changes of memberships from the owners of the channels.

    Memberships of normal channels, which have no owner, change at once.

    ``changes``: group, channel, whether it is added, capacity; no pair of group and channel twice.
    ``expiry``: seconds that a membership lasts, None for the life of the lease.
    ``numbered``: the id of the requesting client, and a larger number than its earlier statements
    had. Owners ignore a statement that arrives after one with a larger number.

    Return the control messages. If ``quiet``, the caller must announce them.
    """
    groups, channels, adds, capacities = zip(*changes, strict=True)
    _, ids, addresses, names, kinds, payloads, xid, boot = await one(
        session,
        REQUEST,
        prefix,
        groups,
        channels,
        adds,
        expiry,
        capacities,
        REQUEST_SECONDS,
        own,
        quiet,
        *(numbered or (None, None)),
    )
    return [
        Unannounced(boot, xid, id, address, channel, kind, None, bytes(payload))
        for id, address, channel, kind, payload in zip(
            ids or (), addresses or (), names or (), kinds or (), payloads or (), strict=True
        )
    ]


# ---------------------------------------------------------------------- members

GROUP_CHANNELS = Statement("SELECT pg_layer_group_channels($1, $2)", TEXT, TEXT)


async def group_channels(session: Executor, prefix: str, group: str) -> list[str]:
    """Return the channels in a group, except the channels of clients whose lease is over."""
    return [channel for (channel,) in await session.execute(GROUP_CHANNELS, prefix, group)]


FIRST_CHANNELS = Statement("SELECT pg_layer_group_channels($1, $2) LIMIT $3", TEXT, TEXT, INT4)


async def first_channels(session: Executor, prefix: str, group: str, limit: int) -> list[str]:
    """Return the first of the channels that `group_channels` returns."""
    return [name for (name,) in await session.execute(FIRST_CHANNELS, prefix, group, limit)]


GROUP_COUNT = Statement("SELECT count(*) FROM pg_layer_group_channels($1, $2)", TEXT, TEXT)


async def group_count(session: Executor, prefix: str, group: str) -> int:
    """Return the number of channels that `group_channels` returns."""
    (count,) = await one(session, GROUP_COUNT, prefix, group)
    return int(count)
