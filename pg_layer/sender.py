"""The sending side of a client on one loop: a lane each for sends, group sends and changes of membership."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from pg_layer import store
from pg_layer.client import Client, inbox_of
from pg_layer.connections import Connections
from pg_layer.exceptions import ChannelFull, LayerUnavailable
from pg_layer.lane import Lane, Outcome

FLOORS_MOST = 64
CREDIT_PART = 16
CREDIT_AGE = 0.1  # seconds
FLOOR_AGE = 0.1  # seconds: a floor is used when it is at least so old, as ids commit out of order


class Send(NamedTuple):
    """A message for a channel."""

    channel: str
    payload: bytes
    expiry: float
    capacity: int


class GroupSend(NamedTuple):
    """A message for a group."""

    group: str
    payload: bytes
    expiry: float


class Regroup(NamedTuple):
    """A channel that joins a group or leaves it."""

    group: str
    channel: str
    joins: bool


Op = Send | GroupSend | Regroup


class FloorBook:
    """Remembers per inbox where counts of what waits may begin.

    A floor is used only when it is a moment old: a message with a smaller id may still be about to commit.
    """

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._ripe: dict[str, int] = {}  # of the time before: one more keeps all used ones old enough
        self._ripening: dict[str, int] = {}
        self._since = time.monotonic()

    def learn(self, floors: store.Floors) -> None:
        """Take the floors that a statement returned."""
        now = time.monotonic()
        if now - self._since >= FLOOR_AGE:
            self._used, self._ripe = self._ripe, self._ripening
            self._ripening, self._since = {}, now
        for inbox, id in zip(floors.inboxes, floors.ids, strict=True):
            self._ripening.setdefault(inbox, id)

    def tell(self) -> store.Floors:
        """The floors to count from."""
        if len(self._used) > FLOORS_MOST:
            self._used = dict(list(self._used.items())[-FLOORS_MOST:])
        return store.Floors(list(self._used), list(self._used.values()))

    def of(self, inbox: str) -> int:
        """The floor of one inbox."""
        return self._used.get(inbox, 0)


class Credits:
    """How many messages may go to a channel before it is looked at again whether it is full.

    A small part of the room that was seen, for a moment: one sender alone never sends too many, and several
    at once hardly more than they would by looking at the same time. Near the limit every message looks.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._since = time.monotonic()

    def grant(self, channel: str, room: int) -> None:
        """That much room was seen in a channel."""
        self._left[channel] = room // CREDIT_PART

    def spend(self, channels: Sequence[str]) -> bool:
        """Whether the next messages, one for each of these channels, may go without a look."""
        now = time.monotonic()
        if now - self._since > CREDIT_AGE:
            self._left.clear()
            self._since = now
            return False
        for channel in channels:
            left = self._left.get(channel, 0)
            if left <= 0:
                return False
            self._left[channel] = left - 1
        return True


class Sender:
    """Writes in batches. Bound to a loop; its coroutines may be called on any."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_lease: Callable[[], None],
    ) -> None:
        self.client = client
        self.connections = connections
        self._on_lease = on_lease
        self._reset_counts()
        loop = asyncio.get_running_loop()
        timeout = client.config.send_timeout
        self._sends = Lane[Send](loop, self._send, spawn, _payload_size, timeout)
        self._group_sends = Lane[GroupSend](loop, self._group_send, spawn, _payload_size, timeout)
        self._regroups = Lane[Regroup](loop, self._regroup, spawn, lambda op: 100, timeout)
        self._lanes = (self._sends, self._group_sends, self._regroups)

    def _reset_counts(self) -> None:
        self._generation = self.connections.generation
        self._floors = FloorBook()
        self._credits = Credits()

    def close(self) -> None:
        """Take no more."""
        for lane in self._lanes:
            lane.close()

    async def guests_finish(self) -> None:
        """Returns when no other loop writes any more."""
        await asyncio.gather(*(lane.guest_finishes() for lane in self._lanes))

    async def finish(self) -> None:
        """Take no more; returns when the writes in flight have ended."""
        await asyncio.gather(*(lane.finish() for lane in self._lanes))

    def submit(self, op: Op, *, may_write: bool = False) -> Coroutine[Any, Any, None]:
        """Do it, from any loop; returns when it is committed.

        ``may_write`` as for `Lane.submit`. Raises `ChannelFull`, and as that.
        """
        if isinstance(op, Send):
            return self._sends.submit(op, may_write=may_write)
        if isinstance(op, GroupSend):
            return self._group_sends.submit(op, may_write=may_write)
        return self._regroups.submit(op, may_write=may_write)

    async def _send(self, ops: list[Send], timeout: float) -> Sequence[Outcome]:
        prefix = self.client.config.prefix
        self.client.counters["send_batches"] += 1
        if self._generation != self.connections.generation:  # floors may be ids of another server
            self._reset_counts()
        if len(ops) == 1:
            op = ops[0]
            inbox = inbox_of(prefix, op.channel)
            floor = None if self._credits.spend((op.channel,)) else self._floors.of(inbox)
            is_full, look = await self.connections.run(
                lambda session: store.send_one(session, prefix, *op, floor), timeout=timeout
            )
            full = {0} if is_full else set()
            if look is not None:
                self._floors.learn(store.Floors((inbox,), (look.floor,)))
                self._credits.grant(op.channel, op.capacity - look.waiting)
        else:
            channels, payloads, expiries, capacities = zip(*ops, strict=True)
            known = None if self._credits.spend(channels) else self._floors.tell()
            full, looks = await self.connections.run(
                lambda session: store.send_batch(
                    session, prefix, channels, payloads, expiries, capacities, known
                ),
                timeout=timeout,
            )
            if looks is not None:
                self._floors.learn(looks.floors)
                for op in ops:
                    self._credits.grant(op.channel, op.capacity - looks.waiting)
        self.client.counters["sent"] += len(ops) - len(full)
        self.client.counters["refused_full"] += len(full)
        return [
            ChannelFull(f"Channel {op.channel} is full: {op.capacity} messages wait.")
            if index in full
            else None
            for index, op in enumerate(ops)
        ]

    async def _group_send(self, ops: list[GroupSend], timeout: float) -> Sequence[Outcome]:
        config = self.client.config
        self.client.counters["group_send_batches"] += 1
        if len(ops) == 1:
            op = ops[0]
            missed = [
                (op.group, channel)
                for channel in await self.connections.run(
                    lambda session: store.group_send_one(session, config.prefix, *op),
                    timeout=timeout,
                )
            ]
        else:
            groups, payloads, expiries = zip(*ops, strict=True)
            missed = await self.connections.run(
                lambda session: store.group_send_batch(session, config.prefix, groups, payloads, expiries),
                timeout=timeout,
            )
        self.client.counters["group_sent"] += len(ops)
        for group, channel in missed:
            self.client.count_dropped(group, channel)
        return [None] * len(ops)

    async def _regroup(self, ops: list[Regroup], timeout: float) -> Sequence[Outcome]:
        client = self.client
        config = client.config
        last = {(op.group, op.channel): op.joins for op in ops}
        joins = [pair for pair, is_join in last.items() if is_join]
        if any(client.owns(channel) for _, channel in joins):
            client.has_lease = True  # perhaps, from here on
        capacities = [config.capacity_of(channel) for _, channel in joins]
        leaves = [pair for pair, is_join in last.items() if not is_join]
        try:
            since, expires_at = await self.connections.run(
                lambda session: store.regroup(
                    session,
                    config.prefix,
                    client.inbox_name,
                    config.lease,
                    config.group_expiry,
                    joins,
                    capacities,
                    leaves,
                ),
                timeout=timeout,
                is_idempotent=True,
            )
        except LayerUnavailable:
            # Who wanted to leave hears no more, whatever becomes of the row.
            for group, channel in leaves:
                client.memberships.drop(group, channel)
            raise
        client.last_id = max(client.last_id, since)
        for group, channel in leaves:
            if client.owns(channel):
                client.memberships.leave(group, channel, since)
        for group, channel in joins:
            if client.owns(channel):
                client.memberships.join(group, client.mailbox(channel), since, expires_at)
        if client.has_lease:
            self._on_lease()
        return [None] * len(ops)


def _payload_size(op: Send | GroupSend) -> int:
    return len(op.payload)
