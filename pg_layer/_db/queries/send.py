"""Sending messages, and announcing marked rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pg_layer._db.queries.common import Executor, lazily, one
from pg_layer._db.statement import (
    BOOL,
    BYTEA,
    BYTEAS,
    FLOAT8,
    FLOAT8S,
    INT4,
    INT4S,
    INT8,
    INT8S,
    TEXT,
    TEXTS,
    Statement,
)
from pg_layer._state.capacity import LowIds

SEND_ONE = Statement(
    lazily("$7") + "pg_layer_send_one($1, $2, $3, $4, $5, $6, $7, $8)",
    *(TEXT, TEXT, BYTEA, FLOAT8, INT4, INT8, BOOL, BOOL),
)
SEND_BATCH = Statement(
    lazily("$8") + "f.* FROM pg_layer_send_batch($1, $2, $3, $4, $5, $6, $7, $8, $9) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, INT4S, TEXTS, INT8S, BOOL, BOOL),
)
GROUP_SEND_ONE = Statement(
    lazily("$6") + "f.* FROM pg_layer_group_send_one($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXT, BYTEA, FLOAT8, TEXT, BOOL, BOOL),
)
GROUP_SEND_BATCH = Statement(
    lazily("$6") + "f.* FROM pg_layer_group_send_batch($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, TEXTS, BOOL, BOOL),
)
ANNOUNCE = Statement(
    lazily("true") + "pg_layer_announce_marked($1, $2, $3, $4, $5, $6, $7, $8)",
    *(INT8S, INT8S, INT8S, TEXTS, TEXTS, TEXTS, TEXTS, BYTEAS),
)


class Unannounced(NamedTuple):
    """A marked row that its sender must announce."""

    boot: int
    xid: int
    id: int
    address: str
    channel: str | None
    kind: str
    excluded: str | None
    payload: bytes


class Sent(NamedTuple):
    """What a statement wrote to channels.

    ``full``: the indexes of messages that were refused. ``ids``: of the rows, in the order of the others.
    ``waiting``: how many messages wait, at most, at each address; ``low_ids``: for the next call. Both
    None if the statement did not look.
    """

    full: set[int]
    ids: Sequence[int]
    xid: int | None
    boot: int | None
    waiting: int | None
    low_ids: LowIds | None


class GroupSent(NamedTuple):
    """What a statement wrote to groups.

    ``missed``: the index of each message that a full normal channel in its group missed, with the channel.
    The others describe the rows: id, address, channel (None: the group's own row), index of the message.
    """

    missed: list[tuple[int, str]]
    ids: Sequence[int]
    addresses: Sequence[str]
    channels: Sequence[str | None]
    indexes: Sequence[int]
    xid: int | None
    boot: int | None


async def send_one(
    session: Executor,
    prefix: str,
    channel: str,
    payload: bytes,
    expiry: float,
    capacity: int,
    address: str,
    low_id: int | None,
    *,
    own: bool,
    quiet: bool,
) -> Sent:
    """Send a message to a channel. ``low_id``: None, to send without a look at what waits."""
    _, row = await one(
        session, SEND_ONE, prefix, channel, payload, expiry, capacity, low_id, own, quiet
    )
    if row is None:
        return Sent({0}, (), None, None, None, None)
    id, xid, boot, waiting, low = row
    seen = None if low_id is None else LowIds((address,), (low,))
    return Sent(set(), (id,), xid, boot, waiting, seen)


async def send_batch(
    session: Executor,
    prefix: str,
    channels: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
    capacities: Sequence[int],
    low_ids: LowIds | None,
    *,
    own: bool,
    quiet: bool,
) -> Sent:
    """Send messages to channels, in their order. ``low_ids``: None, to send without a look."""
    addresses, ids_at = (None, None) if low_ids is None else low_ids
    _, full, low_addresses, lows, waiting, ids, xid, boot = await one(
        session,
        SEND_BATCH,
        prefix,
        channels,
        payloads,
        expiries,
        capacities,
        addresses,
        ids_at,
        own,
        quiet,
    )
    seen = None if low_ids is None else LowIds(low_addresses, lows)
    return Sent({position - 1 for position in full or ()}, ids or (), xid, boot, waiting, seen)


async def group_send_one(
    session: Executor,
    prefix: str,
    group: str,
    payload: bytes,
    expiry: float,
    excluded: str | None,
    *,
    own: bool,
    quiet: bool,
) -> GroupSent:
    """Send a message to a group. Its rows are returned if they are ``quiet``."""
    _, missed, ids, addresses, channels, xid, boot = await one(
        session, GROUP_SEND_ONE, prefix, group, payload, expiry, excluded, own, quiet
    )
    missing, ids = [(0, channel) for channel in missed or ()], ids or ()
    return GroupSent(missing, ids, addresses or (), channels or (), [0] * len(ids), xid, boot)


async def group_send_batch(
    session: Executor,
    prefix: str,
    groups: Sequence[str],
    payloads: Sequence[bytes],
    expiries: Sequence[float],
    excluded: Sequence[str | None],
    *,
    own: bool,
    quiet: bool,
) -> GroupSent:
    """Send messages to groups, in their order."""
    _, positions, missing, ids, addresses, channels, sent, xid, boot = await one(
        session, GROUP_SEND_BATCH, prefix, groups, payloads, expiries, excluded, own, quiet
    )
    missed = [
        (position - 1, channel)
        for position, channel in zip(positions or (), missing or (), strict=True)
    ]
    indexes = [position - 1 for position in sent or ()]
    return GroupSent(missed, ids or (), addresses or (), channels or (), indexes, xid, boot)


async def announce(session: Executor, rows: Sequence[Unannounced]) -> None:
    """Announce marked rows that exist. In the order in which they stand."""
    await session.execute(ANNOUNCE, *zip(*rows, strict=True))
