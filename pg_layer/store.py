"""The statements: one typed function each, and the only module with SQL.

They run on a connection in autocommit mode, one statement a transaction, so that each holds what it says or
nothing. The functions they call are defined, and explained, in the migrations' SQL.

The layer's own writes commit with ``synchronous_commit = off``: a crash of the server may undo the last
moments, and no NOTIFY's commit waits for the disk. The setting is made within the statement's transaction,
so that it works through a pooler and leaves the session as it was. Taking jobs is the exception: undone, it
would hand them out twice.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from psycopg import Connection

from pg_layer.client import Farewell
from pg_layer.inbox import LAST_ID, Key, Row, Span
from pg_layer.session import Session, execute_now
from pg_layer.statement import (
    BOOL,
    BYTEA,
    BYTEAS,
    FLOAT8,
    FLOAT8S,
    FLOAT8S_OR_NULL,
    INT4,
    INT4S,
    INT8,
    INT8S,
    TEXT,
    TEXTS,
    Statement,
)

T = TypeVar("T")

CLOSE_PATIENCE = 2.0  # seconds
SWEEP_PATIENCE = 60.0  # seconds for a batch
READ_ROWS = 1000
READ_BYTES = 4 * 1024 * 1024


_LAZY_CALL = "SELECT set_config('synchronous_commit', 'off', true), "
_LAZILY = "SELECT set_config('synchronous_commit', 'off', true), f.* FROM "

_SEND_ONE = Statement(
    _LAZY_CALL + "pg_layer_send_one($1, $2, $3, $4, $5, $6)", TEXT, TEXT, BYTEA, FLOAT8, INT4, INT8
)
_SEND_BATCH = Statement(
    _LAZILY + "pg_layer_send_batch($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, INT4S, TEXTS, INT8S),
)
_GROUP_SEND_ONE = Statement(_LAZY_CALL + "pg_layer_group_send_one($1, $2, $3, $4)", TEXT, TEXT, BYTEA, FLOAT8)
_GROUP_SEND_BATCH = Statement(
    _LAZILY + "pg_layer_group_send_batch($1, $2, $3, $4) AS f", TEXT, TEXTS, BYTEAS, FLOAT8S
)
_REGROUP = Statement(
    _LAZILY + "pg_layer_regroup($1, $2, $3, $4, $5, $6, $7, $8, $9) AS f",
    *(TEXT, TEXT, FLOAT8, FLOAT8, TEXTS, TEXTS, INT4S, TEXTS, TEXTS),
)
_REASSERT = Statement(_LAZILY + "pg_layer_reassert($1, $2, $3, $4) AS f", TEXT, TEXTS, TEXTS, FLOAT8S_OR_NULL)
_RENEW = Statement(_LAZILY + "pg_layer_renew($1, $2, $3, $4, $5) AS f", TEXT, TEXT, INT4, FLOAT8, TEXT)
_BACKEND_PID = Statement("SELECT pg_backend_pid()")
_NONCE = Statement("SELECT pg_layer_nonce()")
_LISTEN = Statement("SELECT pg_layer_listen(pg_layer_inbox($1, $2))", TEXT, TEXT)
_UNLISTEN = Statement("SELECT pg_layer_unlisten(pg_layer_inbox($1, $2))", TEXT, TEXT)
_READ = Statement(
    """
    SELECT id, nonce, kind, channel, group_name, payload, ends
    FROM (
        SELECT m.*, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS bytes_before
        FROM (
            SELECT id, nonce, kind, channel, group_name, payload,
                extract(epoch FROM expires_at)::float8 AS ends
            FROM pg_layer_message
            WHERE inbox = $1 AND id BETWEEN $2 AND $3 AND expires_at > clock_timestamp()
            ORDER BY id LIMIT $4
        ) AS m
    ) AS m
    WHERE bytes_before < $5
    ORDER BY id
    """,
    *(TEXT, INT8, INT8, INT4, INT8),
)
_QUEUE_USAGE = Statement("SELECT pg_notification_queue_usage()")
_BEGIN = Statement("BEGIN")
_SILENCE = Statement("SELECT set_config('pg_layer.silent', 'on', true)")
_BEGIN_SNAPSHOT = Statement("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
_COMMIT = Statement("COMMIT")
_DELETE = Statement(
    """
    WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    DELETE FROM pg_layer_message
    WHERE inbox = $1 AND id = ANY ($2) AND nonce = ANY ($3) AND (SELECT true FROM lazily)
    """,
    *(TEXT, INT8S, INT8S),
)
_TAKE = Statement("SELECT * FROM pg_layer_take($1, $2, $3, $4, $5)", TEXT, TEXT, TEXT, INT8, INT4)
_PUT_BACK = Statement(_LAZY_CALL + "pg_layer_put_back($1, $2, $3, $4)", TEXT, TEXT, INT8S, INT8S)
_CLOSE = Statement(
    _LAZY_CALL + "pg_layer_close($1, $2, $3, $4, $5, $6)", TEXT, TEXT, INT8S, INT8S, TEXTS, TEXTS
)
_FLUSH = Statement(_LAZY_CALL + "pg_layer_flush($1)", TEXT)
_SWEEP = Statement(_LAZILY + "pg_layer_sweep($1, $2, $3, $4, $5) AS f", TEXT, INT4, BOOL, TEXT, INT8)
_SWEEPABLE = Statement("SELECT * FROM pg_layer_sweepable($1)", TEXT)


class Floors(NamedTuple):
    """Per inbox, the id below which nothing was seen waiting: where a count of what waits may begin."""

    inboxes: Sequence[str]
    ids: Sequence[int]


class Swept(NamedTuple):
    """What a sweep removed."""

    messages: int
    memberships: int
    clients: int

    def __bool__(self) -> bool:
        return any(self)


async def _one(session: Session, statement: Statement, *values: object) -> tuple[Any, ...]:
    (row,) = await session.execute(statement, *values)
    return row


async def is_direct(session: Session) -> bool:
    """Whether one server process answers for good: a pooler makes up the id it tells at first."""
    (pid,) = await _one(session, _BACKEND_PID)
    return bool(pid == session.conn.info.backend_pid)


async def probe(session: Session) -> None:
    """See whether the database answers, and knows the layer's functions."""
    await session.execute(_NONCE)


class Look(NamedTuple):
    """What a send saw: how many messages wait in the channel, and the floor of its inbox."""

    waiting: int
    floor: int


class Looks(NamedTuple):
    """What a batch saw: how many messages wait, at most, in each of its inboxes, and their floors."""

    waiting: int
    floors: Floors


async def look_at_queue(session: Session) -> None:
    """See to it that NOTIFY's queue, if it was full, is found empty: nothing else moves its end then."""
    await session.execute(_QUEUE_USAGE)


async def silently(session: Session, work: Callable[[Session], Awaitable[T]]) -> T:
    """Do it without ringing any doorbell."""
    await look_at_queue(session)
    await session.execute(_BEGIN)
    await session.execute(_SILENCE)
    result = await work(session)
    await session.execute(_COMMIT)
    return result


async def send_one(
    session: Session,
    prefix: str,
    channel: str,
    payload: bytes,
    expiry: float,
    capacity: int,
    floor: int | None,
) -> tuple[bool, Look | None]:
    """Returns whether the channel was full; and what was seen, where a floor was given to look from."""
    ((_, seen),) = await session.execute(_SEND_ONE, prefix, channel, payload, expiry, capacity, floor)
    return seen is None, Look(*seen) if seen else None


async def send_batch(
    session: Session,
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
        session, _SEND_BATCH, prefix, channels, payloads, expiries, capacities, inboxes, ids
    )
    looks = None if floors is None else Looks(waiting, Floors(*seen))
    return {position - 1 for position in full or ()}, looks


async def group_send_one(
    session: Session, prefix: str, group: str, payload: bytes, expiry: float
) -> list[str]:
    """Returns the normal channels in the group that were full and missed the message."""
    ((_, missed),) = await session.execute(_GROUP_SEND_ONE, prefix, group, payload, expiry)
    return missed or []


async def group_send_batch(
    session: Session,
    prefix: str,
    groups: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
) -> list[tuple[str, str]]:
    """Returns (group, channel) of each message that a full normal channel missed."""
    _, missed_groups, channels = await _one(session, _GROUP_SEND_BATCH, prefix, groups, payloads, expiries)
    return [
        (group, channel)
        for group, channel in zip(missed_groups or (), channels or (), strict=True)
        if group is not None
    ]


async def regroup(
    session: Session,
    prefix: str,
    own_inbox: str,
    lease: float,
    expiry: float | None,
    joins: Sequence[tuple[str, str]],
    capacities: Sequence[int],
    leaves: Sequence[tuple[str, str]],
) -> tuple[int, float]:
    """Join (each channel with its capacity) and leave (group, channel) pairs, none twice.

    Returns the id at which, and the time until which they have joined.
    """
    _, since, expires_at = await _one(
        session,
        _REGROUP,
        prefix,
        own_inbox,
        lease,
        expiry,
        [group for group, _ in joins],
        [channel for _, channel in joins],
        capacities,
        [group for group, _ in leaves],
        [channel for _, channel in leaves],
    )
    return since, expires_at


async def reassert(
    session: Session, inbox: str, memberships: Sequence[tuple[str, str, float | None]]
) -> None:
    """Put back (group, channel, seconds left or None for the life of the lease)."""
    await _one(session, _REASSERT, inbox, *zip(*memberships, strict=True))


class Renewal(NamedTuple):
    """The database's clock and the server's start (seconds since 1970), and the next message's least id.

    ``is_new``: there was no lease.
    """

    clock: float
    is_new: bool
    server: float
    next_id: int


async def renew(
    session: Session, inbox: str, host: str, pid: int, lease: float, token: str | None
) -> Renewal:
    """Renew the lease, and ring a ping."""
    _, *renewal = await _one(session, _RENEW, inbox, host, pid, lease, token)
    return Renewal(*renewal)


async def listen(session: Session, prefix: str, channel: str) -> str:
    """LISTEN to the doorbell of the inbox that a channel is read from; returns its NOTIFY channel."""
    (doorbell,) = await _one(session, _LISTEN, prefix, channel)
    return str(doorbell)


async def unlisten(session: Session, prefix: str, channel: str) -> None:
    """Stop listening to that doorbell."""
    await _one(session, _UNLISTEN, prefix, channel)


async def read(session: Session, inbox: str, span: Span) -> tuple[list[Row], int]:
    """Rows of a span in the order of ids, as many as a limit allows; and up to which id that is all."""
    rows = list(
        map(Row._make, await session.execute(_READ, inbox, span.first, span.last, READ_ROWS, READ_BYTES))
    )
    if len(rows) == READ_ROWS or sum(len(row.payload) for row in rows) >= READ_BYTES:
        return rows, rows[-1].id
    return rows, LAST_ID


async def read_everything(session: Session, inbox: str, on_rows: Callable[[list[Row]], None]) -> None:
    """All rows of an inbox as they are at one moment, part by part in the order of ids."""
    await session.execute(_BEGIN_SNAPSHOT)
    up_to = -1
    while up_to < LAST_ID:
        rows, up_to = await read(session, inbox, Span(up_to + 1, LAST_ID))
        on_rows(rows)
    await session.execute(_COMMIT)


async def delete(session: Session, inbox: str, keys: Sequence[Key]) -> None:
    """Delete rows that were dispatched."""
    await session.execute(_DELETE, inbox, [id for id, _ in keys], [nonce for _, nonce in keys])


async def take(session: Session, prefix: str, channel: str, inbox: str, floor: int, limit: int) -> list[Row]:
    """Move the oldest messages of a normal channel into the own inbox."""
    return list(map(Row._make, await session.execute(_TAKE, prefix, channel, inbox, floor, limit)))


async def put_back(session: Session, prefix: str, inbox: str, keys: Sequence[Key]) -> None:
    """Give taken messages back to their channels."""
    await session.execute(_PUT_BACK, prefix, inbox, [id for id, _ in keys], [nonce for _, nonce in keys])


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
    await session.execute(_CLOSE, *_close_values(farewell))


def close_now(conn: Connection[Any], farewell: Farewell) -> None:
    """End a client, where no loop runs any more."""
    execute_now(conn, _CLOSE, *_close_values(farewell), patience=CLOSE_PATIENCE)


async def flush(session: Session, prefix: str) -> int:
    """Remove every message and membership of a prefix, and tell its clients; returns up to which id."""
    _, id = await _one(session, _FLUSH, prefix)
    return int(id)


Place = tuple[str | None, int | None]  # in a sweep: the inbox and the id where a batch ended
START: Place = (None, None)


async def sweep(session: Session, prefix: str, limit: int, after: Place) -> tuple[Swept, Place] | None:
    """Sweep one batch from there on, unless somebody else is sweeping: then None."""
    _, *counts, inbox, id = await _one(session, _SWEEP, prefix, limit, True, *after)
    return None if None in counts else (Swept(*counts), (inbox, id))


def sweep_now(
    conn: Connection[Any], prefix: str, limit: int, after: Place, bell: socket.socket
) -> tuple[Swept, Place]:
    """Sweep one batch from there on, beside whoever else does; returns where it ended.

    Does not wait much longer for the server once ``bell`` can be read.
    """
    ((_, *counts, inbox, id),) = execute_now(
        conn, _SWEEP, prefix, limit, False, *after, patience=SWEEP_PATIENCE, bell=bell
    )
    return Swept(*counts), (inbox, id)


def sweepable(conn: Connection[Any], prefix: str) -> Swept:
    """What sweeping would remove."""
    (counts,) = execute_now(conn, _SWEEPABLE, prefix)
    return Swept(*counts)
