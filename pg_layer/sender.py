"""The sending side of a client on one loop: a lane each for sends, group sends and changes of membership."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pg_layer import roster, store
from pg_layer.client import Client, inbox_of
from pg_layer.connections import Connections
from pg_layer.exceptions import ChannelFull, Held, LayerUnavailable
from pg_layer.lane import Lane, Outcome
from pg_layer.ops import GroupSend, Many, Op, Regroup, Send
from pg_layer.room import Credits, FloorBook, Floors

HELD_PAUSE = 0.25  # seconds before a change of what somebody's transaction holds is tried again
HELD_TOO_LONG = "Another transaction, still open, has changed this membership: the call did not take effect."


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
        self._sends = Lane[Send | Many](loop, self._send, spawn, _payload_size, timeout)
        self._group_sends = Lane[GroupSend | Many](loop, self._group_send, spawn, _payload_size, timeout)
        self._regroups = Lane[Regroup](loop, self._regroup, spawn, lambda op: 100, timeout)
        self._lane_of: dict[type, Lane[Any]] = {
            Send: self._sends,
            GroupSend: self._group_sends,
            Regroup: self._regroups,
        }

    def _reset_counts(self) -> None:
        self._generation = self.connections.generation
        self._floors = FloorBook()
        self._credits = Credits()

    def close(self) -> None:
        """Take no more."""
        for lane in self._lane_of.values():
            lane.close()

    @property
    def waiting(self) -> int:
        """How many operations wait for a write in flight to end. From any thread."""
        return sum(len(lane._queue) for lane in self._lane_of.values())

    async def guests_finish(self) -> None:
        """Returns when no other loop writes any more."""
        await asyncio.gather(*(lane.guest_finishes() for lane in self._lane_of.values()))

    async def finish(self) -> None:
        """Take no more; returns when the writes in flight have ended."""
        await asyncio.gather(*(lane.finish() for lane in self._lane_of.values()))

    def submit(self, op: Op, *, may_write: bool = False) -> Coroutine[Any, Any, Any]:
        """Do it, from any loop; returns when it is committed: of `Many`, whether each was accepted.

        ``may_write`` as for `Lane.submit`. Raises `ChannelFull`, and as that.
        """
        if isinstance(op, Regroup):
            return self._submit_regroup(op, may_write)
        lane = self._lane_of[type(op.ops[0] if isinstance(op, Many) else op)]
        return lane.submit(op, may_write=may_write)

    async def _submit_regroup(self, op: Regroup, may_write: bool) -> None:
        """What somebody's transaction holds is put behind what others want meanwhile."""
        deadline = time.monotonic() + self.client.config.send_timeout
        while True:
            try:
                await self._regroups.submit(op, may_write=may_write)
                return
            except Held:
                if time.monotonic() + HELD_PAUSE >= deadline:
                    raise LayerUnavailable(HELD_TOO_LONG) from None
            await asyncio.sleep(HELD_PAUSE)

    async def _send(self, ops: list[Send | Many], timeout: float) -> Sequence[Outcome]:
        prefix = self.client.config.prefix
        if self._generation != self.connections.generation:  # floors may be ids of another server
            self._reset_counts()
        sends: list[Send] = _flat(ops)
        if len(sends) == 1:
            send = sends[0]
            inbox = inbox_of(prefix, send.channel)
            floor = None if self._credits.spend((send.channel,)) else self._floors.of(inbox)
            is_full, look = await self.connections.run(
                lambda session: store.send_one(session, prefix, *send, floor), timeout=timeout
            )
            full = {0} if is_full else set()
            if look is not None:
                self._floors.learn(Floors((inbox,), (look.floor,)))
                self._credits.grant((send.channel,), (send.capacity,), look.waiting)
        else:
            channels, payloads, expiries, capacities = zip(*sends, strict=True)
            known = None if self._credits.spend(channels) else self._floors.tell()
            full, looks = await self.connections.run(
                lambda session: store.send_batch(
                    session, prefix, channels, payloads, expiries, capacities, known
                ),
                timeout=timeout,
            )
            if looks is not None:
                self._floors.learn(looks.floors)
                self._credits.grant(channels, capacities, looks.waiting)
        counters = self.client.counters
        counters.add("batches")
        counters.add("sent", len(sends) - len(full))
        counters.add("refused_full", len(full))
        return _outcomes(ops, full, channel_full)

    async def _group_send(self, ops: list[GroupSend | Many], timeout: float) -> Sequence[Outcome]:
        prefix = self.client.config.prefix
        sends: list[GroupSend] = _flat(ops)
        if len(sends) == 1:
            missed = await self.connections.run(
                lambda session: store.group_send_one(session, prefix, *sends[0]), timeout=timeout
            )
        else:
            groups, payloads, expiries, excluded = zip(*sends, strict=True)
            missed = await self.connections.run(
                lambda session: store.group_send_batch(session, prefix, groups, payloads, expiries, excluded),
                timeout=timeout,
            )
        self.client.counters.add("batches")
        self.client.counters.add("group_sent", len(sends))
        for index, channel in missed:
            self.client.count_dropped(sends[index].group, channel)
        return _outcomes(ops, {index for index, _ in missed}, lambda send: None)

    async def _regroup(self, ops: list[Regroup], timeout: float) -> Sequence[Outcome]:
        client = self.client
        config = client.config
        last: dict[tuple[str, str], Regroup] = {}
        for op in ops:
            before = last.get((op.group, op.channel))
            # Who leaves unless he has joined stays if he is about to.
            if op.unless_since is None or before is None:
                last[op.group, op.channel] = op
        joins = [pair for pair, op in last.items() if op.joins]
        if any(client.owns(channel) for _, channel in joins):
            client.has_lease = True  # perhaps, from here on
        capacities = [config.capacity_of(channel) for _, channel in joins]
        leaves = [pair for pair, op in last.items() if not op.joins]
        unless = [op.unless_since for op in last.values() if not op.joins]
        deadline = time.monotonic() + timeout
        try:
            since, expires_at, stayed = await self.connections.run(
                lambda session: roster.regroup(
                    session,
                    config.prefix,
                    client.inbox_name,
                    config.lease,
                    config.group_expiry,
                    joins,
                    capacities,
                    leaves,
                    unless if any(id is not None for id in unless) else None,
                ),
                timeout=timeout,
                is_idempotent=True,
            )
        except LayerUnavailable:
            self._drop(last)
            raise
        except Held as held:
            half = len(ops) // 2
            if not half:
                self._drop(last)
                return [held]
            # One of them is held: the others are not to wait.
            outcomes = [*await self._regroup(ops[:half], timeout)]
            try:
                return outcomes + [*await self._regroup(ops[half:], deadline - time.monotonic())]
            except LayerUnavailable as error:
                return outcomes + [error] * (len(ops) - half)
        client.last_id = max(client.last_id, since)
        for index, (group, channel) in enumerate(leaves):
            if client.owns(channel) and index not in stayed:
                client.memberships.leave(group, channel, since)
        for group, channel in joins:
            if client.owns(channel):
                client.memberships.join(group, client.mailbox(channel), since, expires_at)
        if client.has_lease:
            self._on_lease()
        return [None] * len(ops)

    def _drop(self, last: dict[tuple[str, str], Regroup]) -> None:
        """Who wanted to leave hears no more, whatever becomes of the row."""
        for (group, channel), op in last.items():
            if not op.joins and op.unless_since is None:
                self.client.memberships.drop(group, channel)


def channel_full(send: Send) -> ChannelFull:
    """What the sender of a message that was refused is told."""
    return ChannelFull(f"Channel {send.channel} is full: {send.capacity} messages wait.")


def _flat(ops: list[Any]) -> list[Any]:
    if Many not in map(type, ops):
        return ops
    return [send for op in ops for send in (op.ops if isinstance(op, Many) else (op,))]


def _outcomes(ops: list[Any], refused: set[int], refusal: Callable[[Any], Outcome]) -> list[Outcome]:
    """``refused``: indexes into the flat list of messages."""
    if not refused and Many not in map(type, ops):
        return [None] * len(ops)
    outcomes: list[Outcome] = []
    index = 0
    for op in ops:
        if isinstance(op, Many):
            outcomes.append([i not in refused for i in range(index, index + len(op.ops))])
            index += len(op.ops)
        else:
            outcomes.append(refusal(op) if index in refused else None)
            index += 1
    return outcomes


def _payload_size(op: Send | GroupSend | Many) -> int:
    return sum(len(each.payload) for each in op.ops) if isinstance(op, Many) else len(op.payload)
