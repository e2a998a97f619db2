"""The statements: one typed function each, and the only module with SQL.

They run on a connection in autocommit mode, one statement a transaction, so that each holds what it says or
nothing. The functions they call are defined, and explained, in the migrations' SQL.

The layer's own writes commit with ``synchronous_commit = off``: a crash of the server may undo the last
moments, and no NOTIFY's commit waits for the disk. The setting is made within the statement's transaction,
so that it works through a pooler and leaves the session as it was. Taking jobs is the exception: undone, it
would hand them out twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from psycopg import AsyncConnection, AsyncCursor, Connection

from pg_layer import arrays
from pg_layer.arrays import BigInts, Blobs, Floats, Ints, Texts
from pg_layer.client import Farewell
from pg_layer.inbox import LAST_ID, Key, Row, Span

AnyConnection = AsyncConnection[Any]

READ_ROWS = 1000
READ_BYTES = 4 * 1024 * 1024

_LAZY_CALL = "SELECT set_config('synchronous_commit', 'off', true), "
_LAZILY = "SELECT set_config('synchronous_commit', 'off', true), f.* FROM "

_SEND_ONE = _LAZY_CALL + "pg_layer_send_one(%t, %t, %b::bytea, %b::float8, %b::int4, %b::int8)"
_SEND_BATCH = _LAZILY + "pg_layer_send_batch(%t::text, %b, %b, %b, %b, %b, %b) AS f"
_GROUP_SEND_ONE = _LAZY_CALL + "pg_layer_group_send_one(%t, %t, %b::bytea, %b::float8)"
_GROUP_SEND_BATCH = _LAZILY + "pg_layer_group_send_batch(%t::text, %b, %b, %b) AS f"
_REGROUP = _LAZILY + "pg_layer_regroup(%t::text, %t::text, %b::float8, %b::float8, %b, %b, %b, %b, %b) AS f"
_REASSERT = _LAZILY + "pg_layer_reassert(%t::text, %b, %b, %b::float8[]) AS f"
_RENEW = _LAZILY + "pg_layer_renew(%t::text, %t::text, %b::int4, %b::float8, %t::text) AS f"
_BACKEND_PID = "SELECT pg_backend_pid()"
_LISTEN = "SELECT pg_layer_listen(pg_layer_inbox(%t::text, %t::text))"
_UNLISTEN = "SELECT pg_layer_unlisten(pg_layer_inbox(%t::text, %t::text))"
_READ = """
    SELECT id, nonce, kind, channel, group_name, payload, ends
    FROM (
        SELECT m.*, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS bytes_before
        FROM (
            SELECT id, nonce, kind, channel, group_name, payload,
                extract(epoch FROM expires_at)::float8 AS ends
            FROM pg_layer_message
            WHERE inbox = %t::text AND id BETWEEN %b::int8 AND %b::int8 AND expires_at > clock_timestamp()
            ORDER BY id LIMIT %b::int4
        ) AS m
    ) AS m
    WHERE bytes_before < %b::int8
    ORDER BY id
"""
_ONE_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
_DELETE = """
    WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    DELETE FROM pg_layer_message
    WHERE inbox = %t::text AND id = ANY (%b) AND nonce = ANY (%b) AND (SELECT true FROM lazily)
"""
_TAKE = "SELECT * FROM pg_layer_take(%t::text, %t::text, %t::text, %b::int8, %b::int4)"
_PUT_BACK = "SELECT pg_layer_put_back(%t::text, %t::text, %b, %b)"
_CLOSE = "SELECT pg_layer_close(%t::text, %t::text, %b, %b, %b, %b)"
_FLUSH = "SELECT pg_layer_flush(%t::text)"
_SWEEP = _LAZILY + "pg_layer_sweep(%t::text, %b::int4, %b::bool) AS f"
_SWEEPABLE = "SELECT * FROM pg_layer_sweepable(%t::text)"


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


async def _one(conn: AnyConnection, query: str, params: Sequence[object]) -> tuple[Any, ...]:
    cursor = await _execute(conn, query, params)
    row = await cursor.fetchone()
    assert row is not None
    return tuple(row)


async def _execute(conn: AnyConnection, query: str, params: Sequence[object]) -> AsyncCursor[Any]:
    return await conn.cursor(binary=True).execute(query, params)


async def is_direct(conn: AnyConnection) -> bool:
    """Whether one server process answers for good: a pooler makes up the id it tells at first."""
    (pid,) = await _one(conn, _BACKEND_PID, ())
    return bool(pid == conn.info.backend_pid)


class Look(NamedTuple):
    """What a send saw: how many messages wait in the channel, and the floor of its inbox."""

    waiting: int
    floor: int


async def send_one(
    conn: AnyConnection,
    prefix: str,
    channel: str,
    payload: bytes,
    expiry: float,
    capacity: int,
    floor: int | None,
) -> tuple[bool, Look | None]:
    """Returns whether the channel was full; and what was seen, where a floor was given to look from."""
    _, seen = await _one(conn, _SEND_ONE, (prefix, channel, payload, expiry, capacity, floor))
    return seen is None, Look(*seen) if seen else None


async def send_batch(
    conn: AnyConnection,
    prefix: str,
    channels: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
    capacities: Sequence[int],
    floors: Floors,
) -> tuple[set[int], Floors]:
    """Returns the indexes of the messages whose channel was full, and the new floors."""
    _, full, inboxes, ids = await _one(
        conn,
        _SEND_BATCH,
        (
            prefix,
            Texts(channels),
            Blobs(payloads),
            Floats(expiries),
            Ints(capacities),
            Texts(floors.inboxes),
            BigInts(floors.ids),
        ),
    )
    return {position - 1 for position in full or ()}, Floors(inboxes, ids)


async def group_send_one(
    conn: AnyConnection, prefix: str, group: str, payload: bytes, expiry: float
) -> list[str]:
    """Returns the normal channels in the group that were full and missed the message."""
    _, missed = await _one(conn, _GROUP_SEND_ONE, (prefix, group, payload, expiry))
    return missed or []


async def group_send_batch(
    conn: AnyConnection,
    prefix: str,
    groups: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
) -> list[tuple[str, str]]:
    """Returns (group, channel) of each message that a full normal channel missed."""
    _, missed_groups, channels = await _one(
        conn, _GROUP_SEND_BATCH, (prefix, Texts(groups), Blobs(payloads), Floats(expiries))
    )
    return [
        (group, channel)
        for group, channel in zip(missed_groups or (), channels or (), strict=True)
        if group is not None
    ]


async def regroup(
    conn: AnyConnection,
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
        conn,
        _REGROUP,
        (
            prefix,
            own_inbox,
            lease,
            expiry,
            Texts([group for group, _ in joins]),
            Texts([channel for _, channel in joins]),
            Ints(capacities),
            Texts([group for group, _ in leaves]),
            Texts([channel for _, channel in leaves]),
        ),
    )
    return since, expires_at


async def reassert(
    conn: AnyConnection, inbox: str, memberships: Sequence[tuple[str, str, float | None]]
) -> None:
    """Put back (group, channel, seconds left or None for the life of the lease)."""
    groups, channels, ttls = zip(*memberships, strict=True)
    await _one(conn, _REASSERT, (inbox, Texts(groups), Texts(channels), list(ttls)))


async def renew(
    conn: AnyConnection, inbox: str, host: str, pid: int, lease: float, token: str | None
) -> tuple[float, bool]:
    """Renew the lease and ring a ping; returns the database's clock, and whether there was no lease."""
    _, clock, is_new = await _one(conn, _RENEW, (inbox, host, pid, lease, token))
    return clock, is_new


async def listen(conn: AnyConnection, prefix: str, channel: str) -> str:
    """LISTEN to the doorbell of the inbox that a channel is read from; returns its NOTIFY channel."""
    (doorbell,) = await _one(conn, _LISTEN, (prefix, channel))
    return str(doorbell)


async def unlisten(conn: AnyConnection, prefix: str, channel: str) -> None:
    """Stop listening to that doorbell."""
    await _one(conn, _UNLISTEN, (prefix, channel))


async def read(conn: AnyConnection, inbox: str, span: Span) -> tuple[list[Row], int]:
    """Rows of a span in the order of ids, as many as a limit allows; and up to which id that is all."""
    cursor = await _execute(conn, _READ, (inbox, span.first, span.last, READ_ROWS, READ_BYTES))
    rows = [Row._make(row) for row in await cursor.fetchall()]
    if len(rows) == READ_ROWS or sum(len(row.payload) for row in rows) >= READ_BYTES:
        return rows, rows[-1].id
    return rows, LAST_ID


async def read_everything(conn: AnyConnection, inbox: str, on_rows: Callable[[list[Row]], None]) -> None:
    """All rows of an inbox as they are at one moment, part by part in the order of ids."""
    async with conn.transaction():
        await conn.execute(_ONE_SNAPSHOT)
        up_to = -1
        while up_to < LAST_ID:
            rows, up_to = await read(conn, inbox, Span(up_to + 1, LAST_ID))
            on_rows(rows)


async def delete(conn: AnyConnection, inbox: str, keys: Sequence[Key]) -> None:
    """Delete rows that were dispatched."""
    await _execute(
        conn, _DELETE, (inbox, BigInts([id for id, _ in keys]), BigInts([nonce for _, nonce in keys]))
    )


async def take(
    conn: AnyConnection, prefix: str, channel: str, inbox: str, floor: int, limit: int
) -> list[Row]:
    """Move the oldest messages of a normal channel into the own inbox."""
    cursor = await _execute(conn, _TAKE, (prefix, channel, inbox, floor, limit))
    return [Row._make(row) for row in await cursor.fetchall()]


async def put_back(conn: AnyConnection, prefix: str, inbox: str, keys: Sequence[Key]) -> None:
    """Give taken messages back to their channels."""
    await _one(
        conn,
        _PUT_BACK,
        (prefix, inbox, BigInts([id for id, _ in keys]), BigInts([nonce for _, nonce in keys])),
    )


def _close_parameters(farewell: Farewell) -> tuple[object, ...]:
    prefix, inbox, done, memberships = farewell
    return (
        prefix,
        inbox,
        BigInts([id for id, _ in done]),
        BigInts([nonce for _, nonce in done]),
        Texts([group for group, _ in memberships]),
        Texts([channel for _, channel in memberships]),
    )


async def close(conn: AnyConnection, farewell: Farewell) -> None:
    """End a client."""
    await _one(conn, _CLOSE, _close_parameters(farewell))


def close_now(conn: Connection[Any], farewell: Farewell) -> None:
    """End a client, where no loop runs any more."""
    arrays.register(conn)
    conn.execute(_CLOSE, _close_parameters(farewell))


async def flush(conn: AnyConnection, prefix: str) -> int:
    """Remove every message and membership of a prefix, and tell its clients; returns up to which id."""
    (id,) = await _one(conn, _FLUSH, (prefix,))
    return int(id)


async def sweep(conn: AnyConnection, prefix: str, limit: int) -> Swept | None:
    """Sweep one batch, unless somebody else is sweeping: then None."""
    _, *counts = await _one(conn, _SWEEP, (prefix, limit, True))
    return None if None in counts else Swept(*counts)


def sweep_now(conn: Connection[Any], prefix: str, limit: int) -> Swept:
    """Sweep one batch, beside whoever else does."""
    row = conn.execute(_SWEEP, (prefix, limit, False)).fetchone()
    assert row is not None
    return Swept(*row[1:])


def sweepable(conn: Connection[Any], prefix: str) -> Swept:
    """What sweeping would remove."""
    row = conn.execute(_SWEEPABLE, (prefix,)).fetchone()
    assert row is not None
    return Swept(*row)
