"""The statements that write operations: the same for batches, and for `layer.sync`.

``own``: the statement is alone in its transaction. ``quiet``: it does not announce its rows, and returns
them for an announcement later.
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
    """Send messages to channels."""
    channels, payloads, expiries, capacities = zip(*sends, strict=True)
    if len(sends) == 1:
        address = channel_address(prefix, channels[0])
        low_id = known.low_id(address, channels[0])
        sent = await queries.send_one(
            session, prefix, *sends[0], address, low_id, own=own, quiet=quiet
        )
    else:
        low_ids = known.low_ids(channels)
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
    """Ask the owners of channels for changes of memberships. The last one of a pair counts."""
    last = {(change.group, change.channel): change for change in changes}
    rows = await group_queries.request(
        session, prefix, list(last.values()), expiry, own=own, quiet=quiet, numbered=numbered
    )
    return rows if quiet else []
