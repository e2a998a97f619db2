"""Dispatch to channel queues, and the application of control messages.

It takes both from the head of the announcement queue, in its order.
Bound to the owner loop. See ``docs/protocols.md``, sections 2 and 4.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pg_layer._groups.writer import MembershipWriter
from pg_layer._messages.codec import Template
from pg_layer._messages.rows import Row
from pg_layer._process.tasks import Spawn
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage
from pg_layer._state.client import Client
from pg_layer._state.memberships import Pair
from pg_layer._state.snapshot import Moment, Snapshot
from pg_layer.exceptions import UndecodableMessage

if TYPE_CHECKING:
    from pg_layer._receive.receiver import Receiver

# Dispatch waits for members whose channel queue is full. A round lasts PAUSE seconds, and
# PAUSE more for each such member. A member must receive something in each round, and half of
# its queue in ROUNDS rounds. So a slow member delays other channels by at most these rounds, once
# for each half of its queue.
PAUSE = 0.05
ROUNDS = 5
SLICES = 5  # of a round for one member


class Dispatcher:
    """The dispatch of entries that are ready, in the order of the announcement queue.

    Dispatch stops at a head whose rows must still be read. It also waits (``is_blocked``) for
    members with full channel queues, and for a `Receiver.join`. If the control message at the head
    changes a membership, it waits for an own change of the same membership.
    """

    def __init__(
        self,
        client: Client,
        receiver: Receiver,
        writer: MembershipWriter,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._receiver = receiver
        self._writer = writer
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self.is_blocked = False
        self._own_changes: Counter[Pair] = Counter()  # memberships with an own change in flight
        self._own_change_ended = asyncio.Event()

    def start(self) -> None:
        """Take over the messages that the last owner loop could not place."""
        if self._client.unplaced:
            self._block(self._place_unplaced)

    # ------------------------------------------------------------------ messages

    def dispatch(self) -> None:
        """Dispatch from the head until it is not ready, or until dispatch must wait."""
        announcements = self._client.announcements
        while not self.is_blocked and (rows := announcements.head()) is not None:
            first = rows[0]
            if first.kind != "message":
                if not self._apply(first):
                    return
                rows.popleft()
                announcements.dispatched((first,))
                continue
            run = announcements.pop_run()
            self._client.counters.add("received", len(run))
            if first.group is None:
                self._dispatch_to_channels(run)
            else:
                self._fan_out(first.group, first.excluded, run)

    def _dispatch_to_channels(self, rows: Sequence[Row]) -> None:
        """Put messages that were sent to channels into the channel queues."""
        client = self._client
        channels = set()
        for row in rows:
            channel = row.channel or ""
            queue = client.queue(channel) if row.is_job else client.own_queue(channel)
            if queue is None:
                client.log_unknown_channel(channel)
            payload = None if queue is None else self._plaintext(row)
            if queue is None or payload is None:
                client.delete_row_later(row.key)
                self._receiver.deletions.schedule()
                continue
            if row.is_job:
                channels.add(channel)
            if len(queue) >= queue.capacity:
                client.drop_expired(queue)
            queue.count_row()
            queue.put(QueuedMessage(payload, row.expires_at, row.key))
        for channel in channels:
            self._receiver.jobs.dispatched(channel)

    def _fan_out(self, group: str, excluded: str | None, rows: Sequence[Row]) -> None:
        """Put messages of one transaction into the channel queues of a group's members."""
        members = self._client.memberships.members(group)
        if not members:
            return
        is_shared = len(members) > 1
        messages = [
            QueuedMessage(Template(payload) if is_shared else payload, row.expires_at, None)
            for row in rows
            if (payload := self._plaintext(row)) is not None
        ]
        now = self._client.clock.now()
        boot, xid = self._client.cursor.boot_of(rows[0]), rows[0].xid
        for member in members:
            if member.expires_at <= now or member.channel == excluded:
                continue
            if member.since is None or not member.since.sees(boot, xid):
                self._put(group, member.queue, messages)
        if self._client.unplaced:
            self._block(self._place_unplaced)

    def _put(self, group: str, queue: ChannelQueue, messages: Sequence[QueuedMessage]) -> None:
        """Put messages into a member's queue. Drop or keep those beyond its capacity."""
        rest = queue.put_fitting(messages, self._loop)
        if not rest:
            return
        self._client.drop_expired(queue)
        rest = queue.put_fitting(rest, self._loop)
        if not rest:
            return
        if queue.is_stalled:
            self._client.count_dropped(group, queue.channel, len(rest))
        else:
            self._client.unplaced.append((group, queue, list(rest)))

    def _plaintext(self, row: Row) -> bytes | None:
        try:
            return self._client.codec.open(row.payload, row.name)
        except UndecodableMessage as error:
            self._client.log_undecodable(row.channel or row.group, error)
            return None

    def _block(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Dispatch nothing until ``work`` is done."""
        self.is_blocked = True
        self._spawn("Dispatch", partial(self._work_blocked, work))

    async def _work_blocked(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await work()
        self.is_blocked = False
        self._receiver.dispatch_soon()

    async def _place_unplaced(self) -> None:
        """Wait for members with full queues, and put what their capacity allows then."""
        client = self._client
        # Members that have not received half of their queue yet: messages, and rounds.
        slow: dict[ChannelQueue, tuple[int, int]] = {}
        while client.unplaced:
            waiting = [queue.half_free(self._loop) for _, queue, _ in client.unplaced]
            # Wait in slices: if the process is not scheduled for a while, its readers lose a slice,
            # and not the round. Only members that are still full make the round longer: the
            # others do not wait for them.
            full, slices = set(waiting), 0
            while full and 2 * slices < SLICES * (len(full) + 1):
                _, full = await asyncio.wait(full, timeout=2 * PAUSE / SLICES)
                slices += 1
            unplaced = []
            for (group, queue, messages), half_free in zip(client.unplaced, waiting, strict=True):
                rest = queue.put_fitting(messages, self._loop)
                if not rest:
                    continue
                received, rounds = slow.pop(queue, (0, 0))
                received += len(messages) - len(rest)
                is_quick = half_free.done() or 2 * received >= queue.capacity
                if is_quick or (len(rest) < len(messages) and rounds + 1 < ROUNDS):
                    unplaced.append((group, queue, list(rest)))
                    if not is_quick:
                        slow[queue] = received, rounds + 1
                else:
                    queue.mark_stalled()
                    client.count_dropped(group, queue.channel, len(rest))
            client.unplaced[:] = unplaced
            for half_free in waiting:
                half_free.cancel()

    # ------------------------------------------------------------------ control messages

    def _apply(self, row: Row) -> bool:
        """Apply a control message.

        Return False if dispatch must wait. The message then stays at the head until it is applied,
        or `Receiver.join` removes it.
        """
        client = self._client
        client.delete_row_later(row.key)
        self._receiver.deletions.schedule()
        try:
            if row.kind == "flush":
                self._apply_flush(row)
            elif row.kind in ("add", "discard") and row.channel is not None:
                return self._apply_request(row, row.channel, json.loads(row.payload))
            else:
                error = UndecodableMessage(f"It is of the unknown kind {row.kind!r}.")
                client.log_undecodable(row.channel, error)
        except Exception as error:  # dispatch must continue after any malformed message
            client.log_undecodable(row.channel, UndecodableMessage(f"It is malformed: {error}"))
        return True

    def _apply_request(self, row: Row, channel: str, change: dict[str, Any]) -> bool:
        """Apply a membership request. Return False if dispatch must wait; see `_apply`."""
        memberships = self._client.memberships
        pair = (str(change["group"]), channel)
        if pair in self._own_changes:
            # The order of the two is known when the statement of the own change returns.
            self._block(partial(self.wait_for_own_change, pair))
            return False
        requester = change.get("requester")
        if requester is None or not memberships.is_stale_request(
            pair, requester, change["number"], row.id
        ):
            if row.kind == "add":
                return self._apply_add(row, change)
            boot = self._client.cursor.boot_of(row)
            if not memberships.resolve_against_own_change(*pair, boot, row.xid, None):
                memberships.discard(*pair)
        self._writer.write_soon(*pair, change["request"])
        return True

    def _apply_flush(self, row: Row) -> None:
        client = self._client
        boot = client.cursor.boot_of(row)
        for group, channel in client.memberships.flush(boot, row.xid):
            self._writer.write_soon(group, channel)
        client.unplaced.clear()
        for queue in client.queues():
            client.delete_later(queue, queue.pop_all())
        self._spawn("The confirmation of a flush", self._confirm_flush)

    async def _confirm_flush(self) -> None:
        """Delete the row of a flush, which confirms it, when its memberships have no rows.

        An owner that has just begun may have written them again after the flush had removed them.
        """
        await self._writer.written()
        self._receiver.deletions.delete_now()

    def _apply_add(self, row: Row, change: dict[str, Any]) -> bool:
        client, memberships = self._client, self._client.memberships
        group, channel = str(change["group"]), str(row.channel)
        expires_at = float("inf") if change["expires_at"] is None else float(change["expires_at"])
        boot = client.cursor.boot_of(row)
        asked = Moment(boot, Snapshot(change["snapshot"]))
        since = memberships.start_of((group, channel), boot, row.xid, asked)
        if not client.owns(channel) or expires_at <= client.clock.now():
            self._writer.write_soon(group, channel, change["request"])
            return True
        # If an own change has added the first member since the request, the client did not
        # listen to the group before that. It may have missed messages that the requested
        # membership must receive.
        joined = memberships.joined_after(group, boot, row.xid)
        if group not in memberships.groups or joined is not None:
            self._block(
                partial(
                    self._receiver.join, row, group, channel, expires_at, since, change["request"]
                )
            )
            return False
        if not memberships.resolve_against_own_change(group, channel, boot, row.xid, since):
            memberships.add(group, client.queue(channel), expires_at, since)
        self._writer.write_soon(group, channel, change["request"])
        return True

    @contextmanager
    def own_change(self, pairs: Iterable[Pair]) -> Iterator[None]:
        """Make requests for these memberships wait until the block ends.

        An own change of them is in flight: its snapshot decides which change came first.
        """
        pairs = list(pairs)
        self._own_changes.update(pairs)
        try:
            yield
        finally:
            self._own_changes.subtract(pairs)
            self._own_changes = +self._own_changes
            ended, self._own_change_ended = self._own_change_ended, asyncio.Event()
            ended.set()

    async def wait_for_own_change(self, pair: Pair) -> None:
        """Wait until no own change of a membership is in flight."""
        while pair in self._own_changes:
            await self._own_change_ended.wait()
