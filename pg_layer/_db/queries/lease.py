"""The heartbeat and the end of a client, and flush: ``migrations/0001_6_leases.sql``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import Connection

from pg_layer._db.queries.common import LAZY, Executor, one
from pg_layer._db.queries.receive import DELETE
from pg_layer._db.queries.send import Unannounced
from pg_layer._db.session import Session
from pg_layer._db.statement import BOOL, FLOAT8, INT4, INT8, TEXT, TEXTS, Statement
from pg_layer._messages.rows import Key, columns_of
from pg_layer._state.snapshot import Moment, Position, Snapshot

CLOSE_TIMEOUT = 2.0  # seconds
PART = 5000  # messages, and memberships, that one statement removes
DELETE_PART = 1000  # received rows that one statement deletes

# ---------------------------------------------------------------------- the heartbeat

RENEW = Statement(
    LAZY
    + "f.* FROM pg_layer_renew($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9, $10, $11, $12, $13) AS f",
    *(TEXT, TEXT, TEXT, INT4, FLOAT8, INT8, TEXT, TEXT, INT8, FLOAT8, INT8, TEXTS, INT8),
)


class Renewal(NamedTuple):
    """The result of a renewal.

    ``clock``: the time of the database, seconds since 1970.
    ``is_new``: membership rows may be missing, because the lease begins or had been over.
    ``was_over``: the lease had been over.
    ``position``: read before ``moment``.
    ``has_expired``, ``has_marked``: there are expired messages to delete, or marked rows.
    """

    clock: float
    is_new: bool
    was_over: bool
    moment: Moment
    position: Position
    has_expired: bool
    has_marked: bool


async def renew(
    session: Executor,
    prefix: str,
    address: str,
    host: str,
    pid: int,
    lease: float,
    fence: int,
    counters: Mapping[str, int],
    token: str | None,
    known_boot: int,
    swept_to: float,
    marked_from: int,
    addresses: Sequence[str],
    low_id: int,
) -> Renewal:
    """Renew the lease of a client, or begin it; report its counters, and send a ping.

    ``lease``: its length in seconds.
    ``token``: of the ping; None: send none.
    ``known_boot``: the boot of the cursor, or 0.
    ``swept_to``: messages that expired before this time (seconds since 1970) have been deleted.
    ``marked_from``: marked rows up to this id are of no interest.
    ``addresses``: the addresses whose low-water ids this client keeps.
    ``low_id``: the low-water id of the cursor.
    """
    (
        _,
        clock,
        is_new,
        was_over,
        boot,
        last_id,
        next_xid,
        snapshot,
        has_expired,
        has_marked,
    ) = await one(
        session,
        RENEW,
        prefix,
        address,
        host,
        pid,
        lease,
        fence,
        json.dumps(counters),
        token,
        known_boot,
        swept_to,
        marked_from,
        addresses,
        low_id,
    )
    moment = Moment(boot, Snapshot(snapshot))
    return Renewal(
        clock, is_new, was_over, moment, Position(last_id, next_xid), has_expired, has_marked
    )


# ---------------------------------------------------------------------- the end of a client


class Closing(NamedTuple):
    """The end of a client.

    ``done``: the keys of received rows, which are deleted first, jobs before others. Other jobs
    are released. All other messages and memberships are deleted.
    """

    prefix: str
    address: str
    done: Sequence[Key]

    def parts(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Return the keys of ``done`` as columns, in parts of `DELETE_PART`."""
        return [
            columns_of(self.done[start : start + DELETE_PART])
            for start in range(0, len(self.done), DELETE_PART)
        ]


CLOSE = Statement(LAZY + "pg_layer_close($1, $2, $3, $4)", TEXT, TEXT, INT4, BOOL)


async def close(session: Executor, closing: Closing, *, quiet: bool = False) -> None:
    """Close a client.

    Rows that are left after `CLOSE_TIMEOUT` expire, or the sweeper removes them. ``quiet``: do not
    announce the released jobs.
    """
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for part in closing.parts():
        await session.execute(DELETE, closing.address, *part)
        if time.monotonic() > deadline:
            break
    while True:
        _, is_done = await one(session, CLOSE, closing.prefix, closing.address, PART, quiet)
        if is_done or time.monotonic() > deadline:
            return


def close_now(conn: Connection[Any], closing: Closing, *, quiet: bool = False) -> None:
    """Close a client on a synchronous connection, when no event loop runs any longer."""
    session = Session(conn)
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for part in closing.parts():
        session.execute_now(DELETE, closing.address, *part, timeout=CLOSE_TIMEOUT)
        if time.monotonic() > deadline:
            break
    while True:
        ((_, is_done),) = session.execute_now(
            CLOSE, closing.prefix, closing.address, PART, quiet, timeout=CLOSE_TIMEOUT
        )
        if is_done or time.monotonic() > deadline:
            return


# ---------------------------------------------------------------------- flush


class Flushed(NamedTuple):
    """The control messages of a flush: their smallest id, and the addresses of their clients."""

    first_id: int
    addresses: Sequence[str]


class Unconfirmed(NamedTuple):
    """A live client that has not confirmed a flush. ``age``: seconds since the first such flush."""

    address: str
    host: str
    pid: int
    age: float


FLUSH = Statement(LAZY + "f.* FROM pg_layer_flush($1, $2, $3, $4) AS f", TEXT, TEXT, INT4, BOOL)


async def flush_part(
    session: Executor, prefix: str, address: str | None, *, quiet: bool = False
) -> tuple[bool, Flushed, list[Unannounced]]:
    """Remove a part of the messages and memberships of a prefix.

    The call that removes the last part also writes a control message to each client.

    ``address``: the calling client, if it receives. Return whether it was the last part, the
    control messages, and those that the caller must announce.
    """
    _, is_done, boot, xid, ids, addresses = await one(session, FLUSH, prefix, address, PART, quiet)
    rows = [
        Unannounced(boot, xid, id, to, None, "flush", None, b"")
        for id, to in zip(ids or (), addresses or (), strict=True)
    ]
    return is_done, Flushed(min(ids or (0,)), addresses or ()), rows if quiet else []


# OFFSET 0: client by client, see `READ` in receive.py. The calling client may have no row.
UNCONFIRMED = Statement(
    """
    SELECT a.address, coalesce(c.host, ''), coalesce(c.pid, 0),
        extract(epoch FROM clock_timestamp() - m.sent_at)::float8
    FROM unnest($1) AS a (address)
    CROSS JOIN LATERAL (
        SELECT m.sent_at FROM pg_layer_message AS m
        WHERE m.address = a.address AND m.id >= $2 AND m.kind = 'flush' ORDER BY m.id LIMIT 1
    ) AS m
    LEFT JOIN LATERAL (
        SELECT * FROM pg_layer_client AS c WHERE c.address = a.address OFFSET 0
    ) AS c ON true
    WHERE c.address IS NULL OR (c.ended_at IS NULL AND c.expires_at > clock_timestamp())
    """,
    *(TEXTS, INT8),
)


async def unconfirmed(session: Executor, flushed: Flushed) -> list[Unconfirmed]:
    """Return the live clients that have not confirmed a flush, or a later one."""
    found = await session.execute(UNCONFIRMED, flushed.addresses, flushed.first_id)
    return list(map(Unconfirmed._make, found))
