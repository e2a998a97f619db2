"""The use of the layer by one process: its id, queues, cursor, memberships.

A client outlives event loops: when one is closed, the next owner loop finds the state as it
was. It does not outlive a fork: a child begins with a client of its own. Only the owner loop
uses the announcement queue, the cursor and the memberships. The rest is thread-safe. No I/O.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from hashlib import blake2s
from typing import TYPE_CHECKING

from pg_layer._messages.addresses import channel_address
from pg_layer._messages.codec import Codec
from pg_layer._messages.rows import Key
from pg_layer._state import log_events
from pg_layer._state.announcement_queue import AnnouncementQueue
from pg_layer._state.capacity import KnownCapacity
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage
from pg_layer._state.clock import DatabaseClock
from pg_layer._state.counters import Counters
from pg_layer._state.cursor import Cursor
from pg_layer._state.failures import Failures
from pg_layer._state.log_limit import LogLimit
from pg_layer._state.memberships import Memberships
from pg_layer.exceptions import UndecodableMessage

if TYPE_CHECKING:
    from pg_layer._config.options import Config

logger = logging.getLogger("pg_layer")


class Client:
    """The state of the layer in this process, shared by all event loops.

    ``counters``: the layer's counters, which continue when the next client begins.
    ``capacity_of``: returns how many messages may wait in a channel; default: by the options.
    """

    def __init__(
        self,
        config: Config,
        codec: Codec,
        counters: Counters | None = None,
        capacity_of: Callable[[str], int] | None = None,
    ) -> None:
        self.config = config
        self.codec = codec
        self.id = secrets.token_hex(8)
        self._secret = secrets.token_bytes(16)
        self.address = channel_address(config.prefix, f"specific.{self.id}!")
        self.process = os.getpid()
        self._has_lease = False
        self._renewed_at = 0.0
        self._fence = self._raised_fence = 0
        self.cursor = Cursor()
        self.announcements = AnnouncementQueue(self.cursor)
        self.memberships = Memberships()
        # Messages that have left the announcement queue, and wait because a member's channel
        # queue is full. Only the dispatcher changes this.
        self.unplaced: list[tuple[str, ChannelQueue, list[QueuedMessage]]] = []
        # Jobs whose release is in flight, or has an unknown outcome, by channel. Only
        # `JobReaders` changes this.
        self.releasing: dict[str, list[QueuedMessage]] = {}
        self.clock = DatabaseClock()
        self.counters = counters or Counters()
        self.failures = Failures()
        self._counted_before = self.counters.read()
        # Rows to be deleted, with the channel queue that counts them, or None. `Deletions` deletes
        # them in batches.
        self.pending_deletes: dict[Key, ChannelQueue | None] = {}
        # What `layer.sync` remembers of channels, by alias in DATABASES.
        self.known_capacities: dict[str, KnownCapacity] = {}
        self._queues: dict[str, ChannelQueue] = {}
        self._capacity_of = capacity_of or (lambda channel: config.capacity_of(channel))
        self._lock = threading.Lock()
        self._is_closed = False
        self._serial = 0
        self._numbers = itertools.count(1)  # thread-safe
        self.log_limit = LogLimit()
        self._owner_thread: int | None = None
        self.notify_refused_at = -math.inf  # by time.monotonic()

    # ------------------------------------------------------------------ names

    def new_channel(self, prefix: str) -> str:
        """Return a specific channel name that was never used before."""
        with self._lock:
            self._serial += 1
            name = f"{prefix}.{self.id}!{self._serial:x}"
        return f"{name}-{self._code(name)}"

    def next_number(self) -> tuple[str, int]:
        """Return the client's id, and a number that is larger than before.

        A membership request carries both, so that its receiver can ignore an older one that arrives
        late.
        """
        return self.id, next(self._numbers)

    def owns(self, channel: str) -> bool:
        """Return whether `new_channel` of this client has returned the name.

        The name ends with a code that only this client can compute. Every role of the
        database may call NOTIFY: without the code, invented names would make queues without
        end. A set of all names that were given out would grow as much.
        """
        name, _, code = channel.rpartition("-")
        return code == self._code(name)

    def _code(self, name: str) -> str:
        return blake2s(name.encode(errors="replace"), key=self._secret, digest_size=4).hexdigest()

    # ------------------------------------------------------------------ the lease

    @property
    def has_lease(self) -> bool:
        """Whether the database may have a row of this client, which must be ended."""
        return self._has_lease

    @property
    def renewed_at(self) -> float:
        """When the lease was last renewed, by ``time.monotonic()``; 0: never."""
        return self._renewed_at

    def expect_lease(self) -> None:
        """Note that a statement that writes the client's row is about to be sent.

        Call this before the statement: its outcome may stay unknown.
        """
        self._has_lease = True

    def lease_renewed(self, at: float) -> bool:
        """Note a renewal that was sent at ``at``. Return whether it is the first one."""
        is_first, self._renewed_at = not self._renewed_at, at
        return is_first

    def lease_ended(self) -> None:
        """Note that the database has marked the client as ended."""
        self._has_lease = False

    # ------------------------------------------------------------------ the fence

    @property
    def fence(self) -> int:
        """The number in statements that move jobs or write memberships.

        The server refuses a statement with a smaller number than the client's row has.
        """
        return self._fence

    @property
    def is_fence_raised(self) -> bool:
        """Whether the database refuses all statements that were given up before now."""
        return self._raised_fence >= self._fence

    def advance_fence(self) -> None:
        """Give up statements with the present fence: an outcome is unknown.

        The network may deliver such a statement later. Before the client acts on its reads, it
        raises the fence in the database (see `_db/fence.py`).
        """
        self._fence += 1

    def fence_raised(self, fence: int) -> None:
        """Note that the database now refuses statements with smaller fences."""
        self._raised_fence = max(self._raised_fence, fence)

    # ------------------------------------------------------------------ the owner loop

    def take_ownership(self) -> None:
        """Let only the running loop's thread use the state of receiving."""
        if self._owner_thread is not None:
            # The last owner loop may not have seen the outcome of its last statements. The server
            # must refuse those that arrive late.
            self.advance_fence()
        self._owner_thread = threading.get_ident()

    def is_owned_here(self) -> bool:
        """Return whether this is the owner loop's thread. For assertions."""
        return self._owner_thread == threading.get_ident()

    # ------------------------------------------------------------------ channel queues

    def queue(self, channel: str) -> ChannelQueue:
        """Return the queue of a channel. Make it when it is first needed."""
        queue = self._queues.get(channel)
        if queue is None:
            with self._lock:
                queue = self._queues.get(channel)
                if queue is None:
                    queue = ChannelQueue(
                        channel, self._capacity_of(channel), is_closed=self._is_closed
                    )
                    self._queues[channel] = queue
        queue.note_use()
        return queue

    def capacities_changed(self) -> None:
        """Give every channel queue the capacity that its channel has now."""
        for queue in self.queues():
            queue.capacity = self._capacity_of(queue.channel)

    def own_queue(self, channel: str) -> ChannelQueue | None:
        """Return the queue of a channel, or None if this client has not made the channel."""
        return self.queue(channel) if channel in self._queues or self.owns(channel) else None

    def find_queue(self, channel: str) -> ChannelQueue | None:
        """Return the queue of a channel, or None if there is none."""
        return self._queues.get(channel)

    def queues(self) -> list[ChannelQueue]:
        """Return all channel queues."""
        with self._lock:
            return list(self._queues.values())

    def forget_idle_queues(self) -> None:
        """Drop the queues that were not used since the last call, and that nothing needs."""
        with self._lock:
            for channel, queue in list(self._queues.items()):
                if not self.memberships.is_member(channel) and queue.retire():
                    del self._queues[channel]

    def drop_expired(self, queue: ChannelQueue) -> None:
        """Drop expired messages of a channel queue, and request the deletion of their rows."""
        expired = queue.pop_expired(self.clock.now())
        if expired:
            self.counters.add("dropped_expired", len(expired))
            self.delete_later(queue, expired)

    def delete_row_later(self, key: Key) -> None:
        """Request the deletion of a row that no channel queue counts."""
        self.pending_deletes[key] = None

    def rows_deleted(self, keys: Iterable[Key]) -> None:
        """Note that rows were deleted: senders do not count them any more."""
        for key in keys:
            queue = self.pending_deletes.pop(key, None)
            if queue is not None:
                queue.uncount_rows(1)

    def delete_later(self, queue: ChannelQueue, messages: Iterable[QueuedMessage]) -> None:
        """Request the deletion of rows of a channel queue, together with the next ones."""
        self.pending_deletes.update(
            {message.key: queue for message in messages if message.key is not None}
        )

    def unreceived_keys(self) -> list[Key]:
        """Return the keys of rows at the own address that were not received yet."""
        keys = self.announcements.keys()
        keys += [
            message.key
            for messages in self.releasing.values()
            for message in messages
            if message.key
        ]
        for queue in self.queues():
            keys += queue.keys()
        return keys

    def send_to_consumers(self, type: str | None) -> None:
        """Put a message of this type, if any, into the queue of each consumer here."""
        if type is None:
            return
        payload = self.codec.serialise({"type": type})
        for queue in self.queues():
            if queue.is_receivable and self.owns(queue.channel):
                queue.put_fitting((QueuedMessage(payload, math.inf, None),))

    # ------------------------------------------------------------------ counters and the end

    def counts(self, *, has_notifications: bool) -> dict[str, int]:
        """Return what other processes see: the `Counts` since this client began, and its state.

        ``has_notifications``: False if the process polls, because notifications do not arrive.
        """
        return {
            **self.counters.since(self._counted_before),
            "failing_tasks": len(self.failures),
            "queued_messages": sum(map(len, self.queues())),
            "without_notifications": int(not has_notifications),
        }

    def close(self) -> list[Key]:
        """Close the channel queues, and those that are made later.

        Return the keys of rows that were received and are not deleted yet; jobs come first.
        """
        with self._lock:
            self._is_closed = True
        for queue in self.queues():
            queue.close()

        # Copy in one step of the interpreter: receivers on other threads add keys.
        pending = list(self.pending_deletes.items())
        jobs = [key for key, queue in pending if queue is not None and "!" not in queue.channel]
        others = [key for key, queue in pending if queue is None or "!" in queue.channel]
        return [*jobs, *others]

    # ------------------------------------------------------------------ logged events

    def count_dropped(self, group: str, channel: str, count: int = 1) -> None:
        """Count and log group messages that were dropped for a full channel."""
        self.counters.add("dropped_full", count)
        if (end := self.log_limit.admit("full", channel)) is not None:
            logger.warning(
                "Channel %s is full and misses messages of group %s.%s",
                channel,
                group,
                end,
                extra={"event": log_events.CHANNEL_FULL},
            )

    def log_undecodable(self, where: str | None, error: UndecodableMessage) -> None:
        """Count and log a message that cannot be decoded and is skipped."""
        self.counters.add("dropped_undecodable")
        if (end := self.log_limit.admit("undecodable", str(error))) is not None:
            logger.error(
                "Skipped a message for %s that cannot be decoded: %s%s",
                where,
                error,
                end,
                extra={"event": log_events.MESSAGE_UNDECODABLE},
            )

    def notify_refused(self) -> None:
        """Count a statement for which the server refused NOTIFY."""
        self.counters.add("refused_notifications")
        self.notify_refused_at = time.monotonic()

    def log_unannounced(self, why: str) -> None:
        """Log that what this process sends is not announced."""
        if (end := self.log_limit.admit("silent")) is not None:
            logger.warning(
                "Without notifications: %s Receivers find the messages at a heartbeat.%s",
                why,
                end,
                extra={"event": log_events.ANNOUNCEMENTS_REFUSED},
            )

    def log_foreign_notification(self, channel: str) -> None:
        """Count and log a notification that the layer did not send."""
        self.counters.add("ignored_notifications")
        if (end := self.log_limit.admit("foreign", channel)) is not None:
            logger.warning(
                "Ignored a notification on %s that pg_layer did not send.%s",
                channel,
                end,
                extra={"event": log_events.NOTIFICATION_IGNORED},
            )

    def log_unknown_channel(self, channel: str) -> None:
        """Count and log a message for a channel that this client has not made."""
        self.counters.add("ignored_notifications")
        if (end := self.log_limit.admit("unknown channel")) is not None:
            logger.warning(
                "Ignored a message for channel %.100r, which this process has not made.%s",
                channel,
                end,
                extra={"event": log_events.MESSAGE_IGNORED},
            )
