"""Writes of operations in one statement. Shared by the batchers and by `layer.sync`.

Arguments of all functions:

``own``: the statement is the layer's own, alone in its transaction.
``quiet``: the statement marks its rows and does not announce them. The function returns the rows,
and the caller must announce them. If false, the list of rows is empty.

On Django's connection no function awaits anything, so that `layer.sync` runs each in one step.
"""

from __future__ import annotations

from collections.abc import Sequence

from pg_layer._db.queries import groups as group_queries
from pg_layer._db.queries import send as queries
from pg_layer._db.queries.common import Executor
from pg_layer._db.queries.send import GroupSent, Sent, Unannounced
from pg_layer._messages.addresses import channel_address
from pg_layer._send.operations import Change, GroupSend, Send
from pg_layer._state.capacity import KnownCapacity


async def write_sends(
    session: Executor,
    prefix: str,
    sends: Sequence[Send],
    known: KnownCapacity,
    *,
    own: bool,
    quiet: bool,
) -> tuple[Sent, list[Unannounced]]:
    """Send messages to channels.

    ``known``: the known capacity of the channels; it is updated.
    """
    channels, payloads, expiries, capacities = zip(*sends, strict=True)
    if len(sends) == 1:
        address = channel_address(prefix, channels[0])
        low_id = known.low_id(address, channels[0], capacities[0])
        sent = await queries.send_one(
            session, prefix, *sends[0], address, low_id, own=own, quiet=quiet
        )
    else:
        low_ids = known.low_ids(channels, capacities)
        sent = await queries.send_batch(
            session, prefix, channels, payloads, expiries, capacities, low_ids, own=own, quiet=quiet
        )
    if sent.low_ids is not None and sent.boot is not None:
        known.observe(channels, capacities, sent.waiting, sent.low_ids, sent.boot)
    if not quiet or sent.boot is None or sent.xid is None:
        return sent, []
    accepted = [send for index, send in enumerate(sends) if index not in sent.full]
    rows = [
        Unannounced(
            sent.boot,
            sent.xid,
            id,
            channel_address(prefix, send.channel),
            send.channel,
            "message",
            None,
            send.payload,
        )
        for id, send in zip(sent.ids, accepted, strict=True)
    ]
    return sent, rows


async def write_group_sends(
    session: Executor, prefix: str, sends: Sequence[GroupSend], *, own: bool, quiet: bool
) -> tuple[GroupSent, list[Unannounced]]:
    """Send messages to groups."""
    if len(sends) == 1:
        sent = await queries.group_send_one(session, prefix, *sends[0], own=own, quiet=quiet)
    else:
        groups, payloads, expiries, excluded = zip(*sends, strict=True)
        sent = await queries.group_send_batch(
            session, prefix, groups, payloads, expiries, excluded, own=own, quiet=quiet
        )
    if not quiet or sent.boot is None or sent.xid is None:
        return sent, []
    rows = [
        Unannounced(
            sent.boot,
            sent.xid,
            id,
            address,
            channel,
            "message",
            sends[index].excluded,
            sends[index].payload,
        )
        for id, address, channel, index in zip(
            sent.ids, sent.addresses, sent.channels, sent.indexes, strict=True
        )
    ]
    return sent, rows


async def write_changes(
    session: Executor,
    prefix: str,
    expiry: float | None,
    changes: Sequence[Change],
    *,
    own: bool,
    quiet: bool,
    numbered: tuple[str, int] | None,
) -> list[Unannounced]:
    """Request changes of memberships from the owners of the channels.

    Of several changes of one pair of group and channel, only the last one is written.
    ``expiry``: seconds that a membership lasts, None for the life of the lease.
    ``numbered``: the client and the number of the request, None in a transaction of the
    application.
    """
    last = {(change.group, change.channel): change for change in changes}
    rows = await group_queries.request(
        session, prefix, list(last.values()), expiry, own=own, quiet=quiet, numbered=numbered
    )
    return rows if quiet else []
