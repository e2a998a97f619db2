"""Sending messages, and announcing marked rows: ``migrations/0001_3_sending.sql``."""

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

# ---------------------------------------------------------------------- to channels


class Sent(NamedTuple):
    """The result of a statement that writes to channels.

    ``full``: the indexes of messages that were refused because their channel is full.
    ``ids``: the ids of the rows, in the order of the other messages.
    ``waiting``: the number of messages that now wait at the fullest address. None: the statement
    did not count.
    ``low_ids``: for the next call. None: the statement did not count.
    """

    full: set[int]
    ids: Sequence[int]
    xid: int | None
    boot: int | None
    waiting: int | None
    low_ids: LowIds | None


SEND_ONE = Statement(
    lazily("$7") + "pg_layer_send_one($1, $2, $3, $4, $5, $6, $7, $8)",
    *(TEXT, TEXT, BYTEA, FLOAT8, INT4, INT8, BOOL, BOOL),
)


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
    """Send a message to a channel.

    ``expiry``: seconds. ``address``: of the channel. ``low_id``: the low-water id of the address, 0
    if it is unknown, None to send without a count.
    """
    _, row = await one(
        session, SEND_ONE, prefix, channel, payload, expiry, capacity, low_id, own, quiet
    )
    if row is None:
        return Sent({0}, (), None, None, None, None)
    id, xid, boot, waiting, low = row
    next_low_ids = None if low_id is None else LowIds((address,), (low,))
    return Sent(set(), (id,), xid, boot, waiting, next_low_ids)


SEND_BATCH = Statement(
    lazily("$8") + "f.* FROM pg_layer_send_batch($1, $2, $3, $4, $5, $6, $7, $8, $9) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, INT4S, TEXTS, INT8S, BOOL, BOOL),
)


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
    """Send messages to channels, in their order.

    The sequences have one element per message; ``expiries`` in seconds. ``low_ids``: the low-water
    ids that are known, None to send without a count.
    """
    addresses, address_low_ids = (None, None) if low_ids is None else low_ids
    _, full, low_addresses, lows, waiting, ids, xid, boot = await one(
        session,
        SEND_BATCH,
        prefix,
        channels,
        payloads,
        expiries,
        capacities,
        addresses,
        address_low_ids,
        own,
        quiet,
    )
    next_low_ids = None if low_ids is None else LowIds(low_addresses, lows)
    full_indexes = {position - 1 for position in full or ()}
    return Sent(full_indexes, ids or (), xid, boot, waiting, next_low_ids)


# ---------------------------------------------------------------------- to groups


class GroupSent(NamedTuple):
    """The result of a statement that writes to groups.

    ``missed``: the index of each message that a full normal channel in its group missed, and the
    channel.
    ``ids``, ``addresses``, ``channels``, ``indexes``: one element per row; the channel is None for
    the row of the group, the index is that of the message.
    """

    missed: list[tuple[int, str]]
    ids: Sequence[int]
    addresses: Sequence[str]
    channels: Sequence[str | None]
    indexes: Sequence[int]
    xid: int | None
    boot: int | None


GROUP_SEND_ONE = Statement(
    lazily("$6") + "f.* FROM pg_layer_group_send_one($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXT, BYTEA, FLOAT8, TEXT, BOOL, BOOL),
)


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
    """Send a message to a group. The result has the rows only if ``quiet``.

    ``expiry``: seconds. ``excluded``: a member that does not receive the message.
    """
    _, missed, ids, addresses, channels, xid, boot = await one(
        session, GROUP_SEND_ONE, prefix, group, payload, expiry, excluded, own, quiet
    )
    missed_channels, ids = [(0, channel) for channel in missed or ()], ids or ()
    indexes = [0] * len(ids)
    return GroupSent(missed_channels, ids, addresses or (), channels or (), indexes, xid, boot)


GROUP_SEND_BATCH = Statement(
    lazily("$6") + "f.* FROM pg_layer_group_send_batch($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, TEXTS, BOOL, BOOL),
)


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
    """Send messages to groups, in their order.

    The sequences have one element per message; ``expiries`` in seconds.
    """
    _, positions, missing, ids, addresses, channels, sent, xid, boot = await one(
        session, GROUP_SEND_BATCH, prefix, groups, payloads, expiries, excluded, own, quiet
    )
    missed = [
        (position - 1, channel)
        for position, channel in zip(positions or (), missing or (), strict=True)
    ]
    indexes = [position - 1 for position in sent or ()]
    return GroupSent(missed, ids or (), addresses or (), channels or (), indexes, xid, boot)


# ---------------------------------------------------------------------- announcements


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


ANNOUNCE = Statement(
    lazily("true") + "pg_layer_announce_marked($1, $2, $3, $4, $5, $6, $7, $8)",
    *(INT8S, INT8S, INT8S, TEXTS, TEXTS, TEXTS, TEXTS, BYTEAS),
)


async def announce(session: Executor, rows: Sequence[Unannounced]) -> None:
    """Announce marked rows in the order of ``rows``. Rows that do not exist are left out."""
    await session.execute(ANNOUNCE, *zip(*rows, strict=True))
