"""Clients: renewing the lease, closing, flushing."""

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
PART = 5000  # messages or memberships in a statement
DELETE_PART = 1000  # received rows in a statement

RENEW = Statement(
    LAZY
    + "f.* FROM pg_layer_renew($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9, $10, $11, $12, $13) AS f",
    *(TEXT, TEXT, TEXT, INT4, FLOAT8, INT8, TEXT, TEXT, INT8, FLOAT8, INT8, TEXTS, INT8),
)
CLOSE = Statement(LAZY + "pg_layer_close($1, $2, $3, $4)", TEXT, TEXT, INT4, BOOL)
FLUSH = Statement(LAZY + "f.* FROM pg_layer_flush($1, $2, $3, $4) AS f", TEXT, TEXT, INT4, BOOL)


class Renewal(NamedTuple):
    """What a renewal tells.

    ``clock``: the database's, seconds since 1970. ``is_new``: rows of memberships may be missing, because
    the lease begins or had been over. ``was_over``: it had been over. ``position``: from before ``moment``.
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
    """Renew the lease, report counters, and ring a ping if there is a token.

    ``addresses``: of which the server keeps where what waits begins; ``low_id``: the cursor's.
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


class Closing(NamedTuple):
    """A client's end: ``done`` was received, jobs first, its other jobs are released, all else goes."""

    prefix: str
    address: str
    done: Sequence[Key]

    def parts(self) -> list[tuple[list[int], list[int], list[int]]]:
        """The keys of ``done``, for as many statements as it takes."""
        return [
            columns_of(self.done[start : start + DELETE_PART])
            for start in range(0, len(self.done), DELETE_PART)
        ]


async def close(session: Executor, closing: Closing, *, quiet: bool = False) -> None:
    """End a client. What cannot be removed in time expires, or the sweeper removes it."""
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
    """End a client, where no event loop runs any more."""
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


async def flush_part(
    session: Executor, prefix: str, address: str, *, quiet: bool = False
) -> tuple[bool, Key | None, list[Unannounced]]:
    """Remove a part of a prefix. The last one tells its clients.

    Return whether it was the last one, the key of the control message to this client, and the control
    messages that must be announced.
    """
    _, is_done, boot, xid, id, ids, addresses = await one(
        session, FLUSH, prefix, address, PART, quiet
    )
    rows = [
        Unannounced(boot, xid, each, to, None, "flush", None, b"")
        for each, to in zip(ids or (), addresses or (), strict=True)
    ]
    return is_done, None if id is None else Key(boot, xid, id), rows if quiet else []
