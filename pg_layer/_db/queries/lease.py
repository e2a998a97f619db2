"""Clients: renewing the lease, closing, flushing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import Connection

from pg_layer._db.queries.common import LAZY, Executor, one
from pg_layer._messages.rows import Key
from pg_layer._state.snapshot import Moment, Position, Snapshot
from pg_layer.session import Session
from pg_layer.statement import FLOAT8, INT4, INT8, INT8S, TEXT, Statement

CLOSE_PATIENCE = 2.0  # seconds

RENEW = Statement(
    LAZY + "f.* FROM pg_layer_renew($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9, $10, $11) AS f",
    *(TEXT, TEXT, TEXT, INT4, FLOAT8, INT8, TEXT, TEXT, INT8, FLOAT8, INT8),
)
CLOSE = Statement(LAZY + "pg_layer_close($1, $2, $3, $4)", TEXT, TEXT, INT8S, INT8S)
FLUSH = Statement(LAZY + "f.* FROM pg_layer_flush($1, $2) AS f", TEXT, TEXT)


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
) -> Renewal:
    """Renew the lease, report counters, and ring a ping if there is a token."""
    _, clock, is_new, was_over, boot, last_id, next_xid, snapshot, has_expired, has_marked = await one(
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
    )
    moment = Moment(boot, Snapshot(snapshot))
    return Renewal(clock, is_new, was_over, moment, Position(last_id, next_xid), has_expired, has_marked)


class Closing(NamedTuple):
    """A client's end: ``done`` was received, its other jobs are released, all else goes."""

    prefix: str
    address: str
    done: Sequence[Key]

    @property
    def values(self) -> tuple[object, ...]:
        """The parameters of the statement."""
        ids, xids = [key.id for key in self.done], [key.xid for key in self.done]
        return self.prefix, self.address, ids, xids


async def close(session: Executor, closing: Closing) -> None:
    """End a client."""
    await session.execute(CLOSE, *closing.values)


def close_now(conn: Connection[Any], closing: Closing) -> None:
    """End a client, where no event loop runs any more."""
    Session(conn).execute_now(CLOSE, *closing.values, patience=CLOSE_PATIENCE)


async def flush(session: Executor, prefix: str, address: str) -> Key | None:
    """Remove all of a prefix, and tell its clients. Return the key of the control message to this one."""
    _, boot, xid, id = await one(session, FLUSH, prefix, address)
    return None if id is None else Key(boot, xid, id)
