"""The statements as typed functions, one each.

They run on a connection in autocommit mode, one statement a transaction, so that each holds what it says or
nothing; those for an `Executor` also in somebody's transaction.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from psycopg import Connection, errors, pq

from pg_layer import sql
from pg_layer.client import Farewell
from pg_layer.inbox import LAST_ID, Key, Row, Span
from pg_layer.room import Floors
from pg_layer.session import Session
from pg_layer.statement import Statement
from pg_layer.status import DROPS, ChannelStatus, ClientStatus, GroupStatus, Status, TableStatus

T = TypeVar("T")

CLOSE_PATIENCE = 2.0  # seconds
SWEEP_PATIENCE = 60.0  # seconds for a batch
LOOK_PATIENCE = 10.0  # seconds for each statement of one who only looks
TABLES = ("pg_layer_message", "pg_layer_membership", "pg_layer_client", "pg_layer_last_sweep")
READ_ROWS = 1000
READ_BYTES = 4 * 1024 * 1024


class Swept(NamedTuple):
    """What a sweep removed."""

    messages: int
    memberships: int
    clients: int

    def __bool__(self) -> bool:
        return any(self)


class Executor(Protocol):
    """What runs a single statement: a `Session`, or Django's connection."""

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """The rows that the statement returns."""
        ...


async def _one(session: Executor, statement: Statement, *values: object) -> tuple[Any, ...]:
    (row,) = await session.execute(statement, *values)
    return row


async def is_direct(session: Session) -> bool:
    """Whether one server process answers for good: a pooler makes up the id it tells at first."""
    (pid,) = await _one(session, sql.BACKEND_PID)
    return bool(pid == session.conn.info.backend_pid)


async def avoid_scans(session: Session) -> None:
    """Have statements that are prepared from now on walk along the index, however small the tables are then.

    They stay as they are when the tables have grown, or are full of dead rows.
    """
    await session.execute(sql.NO_SCANS)


async def probe(session: Session) -> None:
    """See whether the database answers, and knows the layer's functions."""
    await session.execute(sql.NONCE)


class Look(NamedTuple):
    """What a send saw: how many messages wait in the channel, and the floor of its inbox."""

    waiting: int
    floor: int


class Looks(NamedTuple):
    """What a batch saw: how many messages wait, at most, in each of its inboxes, and their floors.

    ``waiting``: None, if the lease of one of them is over.
    """

    waiting: int | None
    floors: Floors


async def look_at_queue(session: Session) -> None:
    """See to it that NOTIFY's queue, if it was full, is found empty: nothing else moves its end then."""
    await session.execute(sql.QUEUE_USAGE)


async def silently(session: Session, work: Callable[[Session], Awaitable[T]]) -> T:
    """Do it without ringing any doorbell."""
    await look_at_queue(session)
    await session.execute(sql.BEGIN)
    result = await without_ringing(session, work)
    await session.execute(sql.COMMIT)
    return result


async def without_ringing(session: Executor, work: Callable[[Any], Awaitable[T]]) -> T:
    """The same within a transaction."""
    await session.execute(sql.SILENCE)
    return await work(session)


async def send_one(
    session: Executor,
    prefix: str,
    channel: str,
    payload: bytes,
    expiry: float,
    capacity: int,
    floor: int | None,
) -> tuple[bool, Look | None]:
    """Returns whether the channel was full; and what was seen, where a floor was given to look from."""
    ((_, seen),) = await session.execute(sql.SEND_ONE, prefix, channel, payload, expiry, capacity, floor)
    return seen is None, Look(*seen) if seen else None


async def send_batch(
    session: Executor,
    prefix: str,
    channels: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
    capacities: Sequence[int],
    floors: Floors | None,
) -> tuple[set[int], Looks | None]:
    """Returns the indexes of those whose channel was full; and what was seen, where floors were given."""
    inboxes, ids = (None, None) if floors is None else floors
    _, full, *seen, waiting = await _one(
        session, sql.SEND_BATCH, prefix, channels, payloads, expiries, capacities, inboxes, ids
    )
    looks = None if floors is None else Looks(waiting, Floors(*seen))
    return {position - 1 for position in full or ()}, looks


async def group_send_one(
    session: Executor, prefix: str, group: str, payload: bytes, expiry: float, excluded: str | None
) -> list[tuple[int, str]]:
    """As `group_send_batch` for one message."""
    ((_, missed),) = await session.execute(sql.GROUP_SEND_ONE, prefix, group, payload, expiry, excluded)
    return [(0, channel) for channel in missed or ()]


async def group_send_batch(
    session: Executor,
    prefix: str,
    groups: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
    excluded: Sequence[str | None],
) -> list[tuple[int, str]]:
    """Returns the index of each message that a full normal channel in its group missed, with the channel."""
    _, positions, channels = await _one(
        session, sql.GROUP_SEND_BATCH, prefix, groups, payloads, expiries, excluded
    )
    return [
        (position - 1, channel) for position, channel in zip(positions or (), channels or (), strict=True)
    ]


class Renewal(NamedTuple):
    """The database's clock and the server's start (seconds since 1970), and the next message's least id.

    ``is_new``: there was no lease.
    """

    clock: float
    is_new: bool
    server: float
    next_id: int


async def renew(
    session: Session,
    inbox: str,
    host: str,
    pid: int,
    lease: float,
    fence: int,
    counters: Mapping[str, int],
    token: str | None,
) -> Renewal:
    """Renew the lease, say what was counted, and ring a ping."""
    _, *renewal = await _one(session, sql.RENEW, inbox, host, pid, lease, fence, json.dumps(counters), token)
    return Renewal(*renewal)


async def listen(session: Session, prefix: str, channel: str) -> str:
    """LISTEN to the doorbell of the inbox that a channel is read from; returns its NOTIFY channel."""
    (doorbell,) = await _one(session, sql.LISTEN, prefix, channel)
    return str(doorbell)


async def unlisten(session: Session, prefix: str, channel: str) -> None:
    """Stop listening to that doorbell."""
    await _one(session, sql.UNLISTEN, prefix, channel)


async def read(session: Session, inbox: str, span: Span) -> tuple[list[Row], int]:
    """Rows of a span in the order of ids, as many as a limit allows; and up to which id that is all."""
    rows = list(
        map(Row._make, await session.execute(sql.READ, inbox, span.first, span.last, READ_ROWS, READ_BYTES))
    )
    if len(rows) == READ_ROWS or sum(len(row.payload) for row in rows) >= READ_BYTES:
        return rows, rows[-1].id
    return rows, LAST_ID


async def read_everything(session: Session, inbox: str, on_rows: Callable[[list[Row]], None]) -> None:
    """All rows of an inbox as they are at one moment, part by part in the order of ids."""
    await session.execute(sql.BEGIN_SNAPSHOT)
    up_to = -1
    while up_to < LAST_ID:
        rows, up_to = await read(session, inbox, Span(up_to + 1, LAST_ID))
        on_rows(rows)
    await session.execute(sql.COMMIT)


async def delete(session: Session, inbox: str, keys: Sequence[Key]) -> None:
    """Delete rows that were dispatched."""
    await session.execute(sql.DELETE, inbox, *_ids_and_nonces(keys))


def _ids_and_nonces(keys: Sequence[Key]) -> tuple[list[int], list[int]]:
    # What a doorbell announced has one nonce: each once, as the server looks through the list for each row.
    return [id for id, _ in keys], list({nonce for _, nonce in keys})


async def raise_fence(session: Session, inbox: str, fence: int) -> None:
    """See to it that what was begun with a smaller number has taken effect by now, or never will."""
    await session.execute(sql.RAISE_FENCE, inbox, fence)


async def take(
    session: Session, prefix: str, channel: str, inbox: str, fence: int, floor: int, limit: int
) -> list[Row]:
    """Move the oldest messages of a normal channel into the own inbox."""
    return list(map(Row._make, await session.execute(sql.TAKE, prefix, channel, inbox, fence, floor, limit)))


async def put_back(session: Session, prefix: str, inbox: str, fence: int, keys: Sequence[Key]) -> None:
    """Give taken messages back to their channels."""
    await session.execute(sql.PUT_BACK, prefix, inbox, fence, *_ids_and_nonces(keys))


def _close_values(farewell: Farewell) -> tuple[object, ...]:
    prefix, inbox, done, memberships = farewell
    return (
        prefix,
        inbox,
        [id for id, _ in done],
        [nonce for _, nonce in done],
        [group for group, _ in memberships],
        [channel for _, channel in memberships],
    )


async def close(session: Session, farewell: Farewell) -> None:
    """End a client."""
    await session.execute(sql.CLOSE, *_close_values(farewell))


def close_now(conn: Connection[Any], farewell: Farewell) -> None:
    """End a client, where no loop runs any more."""
    Session(conn).execute_now(sql.CLOSE, *_close_values(farewell), patience=CLOSE_PATIENCE)


async def flush(session: Session, prefix: str) -> int:
    """Remove every message and membership of a prefix, and tell its clients; returns up to which id."""
    _, id = await _one(session, sql.FLUSH, prefix)
    return int(id)


Place = tuple[str | None, int | None]  # in a sweep: the inbox and the id where a batch ended
START: Place = (None, None)


async def sweep(session: Session, prefix: str, limit: int, after: Place) -> tuple[Swept, Place] | None:
    """Sweep one batch from there on, unless somebody else is sweeping: then None."""
    _, *counts, inbox, id = await _one(session, sql.SWEEP, prefix, limit, True, *after)
    return None if None in counts else (Swept(*counts), (inbox, id))


def sweep_now(
    conn: Connection[Any], prefix: str, limit: int, after: Place, bell: socket.socket
) -> tuple[Swept, Place]:
    """Sweep one batch from there on, beside whoever else does; returns where it ended.

    Does not wait much longer for the server once ``bell`` can be read.
    """
    ((_, *counts, inbox, id),) = Session(conn).execute_now(
        sql.SWEEP, prefix, limit, False, *after, patience=SWEEP_PATIENCE, bell=bell
    )
    return Swept(*counts), (inbox, id)


def sweepable(conn: Connection[Any], prefix: str) -> Swept:
    """What sweeping would remove."""
    (counts,) = Session(conn).execute_now(sql.SWEEPABLE, prefix)
    return Swept(*counts)


def status(conn: Connection[Any], prefix: str, lease: float, top: int, *, are_named: bool) -> Status:
    """How the layer of a prefix fares at one moment, with the first ``top`` of clients, groups and channels.

    ``are_named``: connections tell whose they are.
    """
    run = partial(Session(conn).execute_now, patience=LOOK_PATIENCE)
    run(sql.BEGIN_SNAPSHOT)
    clients = [
        ClientStatus(
            id=id,
            host=host if host or pid else None,
            pid=pid if host or pid else None,
            lease_age=None if math.isinf(left) else lease - left,
            lease_left=None if math.isinf(left) else left,
            connections=connections if are_named else None,
        )
        for id, host, pid, left, connections in run(sql.CLIENTS, prefix, top)
    ]
    ((live, overdue, ended),) = run(sql.CLIENT_COUNTS, prefix)
    groups = run(sql.GROUPS, prefix, top)
    channels = run(sql.CHANNELS, prefix, top)
    drops = run(sql.DROPS, prefix, DROPS)
    tables = run(sql.TABLES, TABLES)
    ((notify_queue,),) = run(sql.QUEUE_USAGE)
    sweeps = run(sql.LAST_SWEEP, prefix)
    run(sql.COMMIT)
    return Status(
        clients=clients,
        live_clients=live,
        overdue_clients=overdue,
        ended_clients=ended,
        groups=[GroupStatus(*group[:3]) for group in groups],
        all_groups=groups[0][3] if groups else 0,
        all_members=groups[0][4] if groups else 0,
        channels=[ChannelStatus(*channel[:3]) for channel in channels],
        all_channels=channels[0][3] if channels else 0,
        all_waiting=channels[0][4] if channels else 0,
        drops=dict(drops),
        tables=[TableStatus(*table) for table in tables],
        notify_queue=notify_queue,
        last_sweep=sweeps[0][0] if sweeps else None,
    )


def prove_tables(conn: Connection[Any]) -> None:
    """Raise what psycopg raises if a table or function is missing that a statement needs; runs none."""
    for statement in sql.all_statements():
        result = conn.pgconn.prepare(b"", statement.sql, statement.oids)
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise errors.error_from_result(result)


def unswept_for(conn: Connection[Any], prefix: str) -> float | None:
    """For how many seconds nobody has swept; None, if nobody has used the layer yet."""
    run = partial(Session(conn).execute_now, patience=LOOK_PATIENCE)
    sweeps = run(sql.LAST_SWEEP, prefix)
    ((since,),) = sweeps or run(sql.FIRST_USE, prefix)
    return None if since is None else float(since)
