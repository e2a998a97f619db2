"""One process's use of the layer: its id, its queues, cursor and memberships. Pure.

A client outlives event loops: when one closes, the next finds everything as it was. It does not outlive a
fork: a child begins with a client of its own. Only the owner loop touches the announcement queue, the cursor
and the memberships; the rest is thread-safe.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import threading
from collections.abc import Iterable
from hashlib import blake2s
from typing import TYPE_CHECKING

from pg_layer._messages.addresses import channel_address
from pg_layer._messages.codec import Codec
from pg_layer._messages.rows import Key
from pg_layer._state import log_events
from pg_layer._state.announcement_queue import AnnouncementQueue
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
    """What is known in this process, whatever loop it is used on."""

    def __init__(self, config: Config, codec: Codec, counters: Counters | None = None) -> None:
        # counters: those of the layer, which go on when the next client begins
        self.config = config
        self.codec = codec
        self.id = secrets.token_hex(8)
        self._secret = secrets.token_bytes(16)
        self.address = channel_address(config.prefix, f"specific.{self.id}!")
        self.process = os.getpid()
        self.has_lease = False
        self.renewed_at = 0.0  # by time.monotonic(); 0 before the first renewal
        self.fence = 0  # statements that move jobs or write memberships carry it
        self.raised_fence = 0  # the one that the database knows
        self.cursor = Cursor()
        self.announcements = AnnouncementQueue(self.cursor)
        self.memberships = Memberships()
        # Messages that left the announcement queue, and wait for room in a member's channel queue.
        self.unplaced: list[tuple[str, ChannelQueue, list[QueuedMessage]]] = []
        # Jobs whose release is in flight, or has an unknown outcome, by channel.
        self.releasing: dict[str, list[QueuedMessage]] = {}
        self.clock = DatabaseClock()
        self.counters = counters or Counters()
        self.failures = Failures()
        self._counted_before = self.counters.read()
        # Rows of no further use, and the queue that counts them (None: none). Deleted many at once.
        self.pending_deletes: dict[Key, ChannelQueue | None] = {}
        self._queues: dict[str, ChannelQueue] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._serial = 0
        self._numbers = itertools.count(1)  # thread-safe
        self.log_limit = LogLimit()
        self._owner_thread: int | None = None

    # ------------------------------------------------------------------ names

    def new_channel(self, prefix: str) -> str:
        """Return a specific channel name that was never used before."""
        with self._lock:
            self._serial += 1
            name = f"{prefix}.{self.id}!{self._serial:x}"
        return f"{name}-{self._code(name)}"

    def next_number(self) -> tuple[str, int]:
        """Return the client's id and a larger number than before, for a statement that others may judge."""
        return self.id, next(self._numbers)

    def owns(self, channel: str) -> bool:
        """Whether `new_channel` has returned it.

        Any role may NOTIFY. Without the code, invented names would make queues without end, and to remember
        all names that were given out would take as much.
        """
        name, _, code = channel.rpartition("-")
        return code == self._code(name)

    def _code(self, name: str) -> str:
        return blake2s(name.encode(errors="replace"), key=self._secret, digest_size=4).hexdigest()

    # ------------------------------------------------------------------ the owner loop

    def begin_ownership(self) -> None:
        """The running loop's thread is the only one that touches the state of receiving from here on."""
        if self._owner_thread is not None:
            # A loop that stopped did not see what became of its last statements: late ones are refused.
            self.fence += 1
        self._owner_thread = threading.get_ident()

    def is_owned_here(self) -> bool:
        """Whether this is the owner loop's thread. For assertions."""
        return self._owner_thread == threading.get_ident()

    # ------------------------------------------------------------------ channel queues

    def queue(self, channel: str) -> ChannelQueue:
        """The queue of a channel, made when it is first needed."""
        queue = self._queues.get(channel)
        if queue is None:
            with self._lock:
                queue = self._queues.get(channel)
                if queue is None:
                    queue = ChannelQueue(channel, self.config.capacity_of(channel))
                    queue.is_closed = self._is_closed
                    self._queues[channel] = queue
        queue.is_used = True
        return queue

    def own_queue(self, channel: str) -> ChannelQueue | None:
        """The queue of a channel that this client has made. None: it has not."""
        return self.queue(channel) if channel in self._queues or self.owns(channel) else None

    def find_queue(self, channel: str) -> ChannelQueue | None:
        """The queue of a channel, if there is one."""
        return self._queues.get(channel)

    def queues(self) -> list[ChannelQueue]:
        """All channel queues."""
        with self._lock:
            return list(self._queues.values())

    def forget_idle_queues(self) -> None:
        """Drop queues that were not used since the last call."""
        with self._lock:
            for channel, queue in list(self._queues.items()):
                if not self.memberships.is_member(channel) and queue.retire():
                    del self._queues[channel]

    def drop_expired(self, queue: ChannelQueue) -> None:
        """Drop messages that expired in a channel queue."""
        expired = queue.pop_expired(self.clock.now())
        if expired:
            self.counters.add("dropped_expired", len(expired))
            self.delete_later(queue, expired)

    def delete_later(self, queue: ChannelQueue, messages: Iterable[QueuedMessage]) -> None:
        """Have the rows of these messages deleted with the next ones."""
        self.pending_deletes.update(
            {message.key: queue for message in messages if message.key is not None}
        )

    def held_keys(self) -> list[Key]:
        """The keys of rows at the own address that were not received yet."""
        held = self.announcements.keys()
        held += [
            message.key
            for messages in self.releasing.values()
            for message in messages
            if message.key
        ]
        for queue in self.queues():
            held += queue.keys()
        return held

    def announce_locally(self, type: str | None) -> None:
        """Put a message of this type, if one is given, into the queue of each consumer here."""
        if type is None:
            return
        payload = self.codec.serialise({"type": type})
        for queue in self.queues():
            if queue.is_receivable and self.owns(queue.channel):
                queue.put_if_room((QueuedMessage(payload, math.inf, None),))

    # ------------------------------------------------------------------ counters and the end

    def counted(self) -> dict[str, int]:
        """What this process did since this client began, by the names in `Counts`, and what fails now."""
        return {**self.counters.since(self._counted_before), "failing_tasks": len(self.failures)}

    def close(self) -> list[Key]:
        """Close the channel queues, also later ones.

        Return the keys of rows received and not deleted yet, those of jobs first.
        """
        with self._lock:
            self._is_closed = True
        for queue in self.queues():
            queue.close()

        pending = list(
            self.pending_deletes.items()
        )  # at once: receivers on other threads note more
        jobs = [key for key, queue in pending if queue is not None and "!" not in queue.channel]
        others = [key for key, queue in pending if queue is None or "!" in queue.channel]
        return [*jobs, *others]

    # ------------------------------------------------------------------ what goes wrong

    def count_dropped(self, group: str, channel: str, count: int = 1) -> None:
        """A full channel missed messages of a group."""
        self.counters.add("dropped_full", count)
        if (end := self.log_limit.admit("full", channel)) is not None:
            logger.warning(
                "Channel %s is full and misses messages of group %s.%s",
                channel,
                group,
                end,
                extra={"event": log_events.CHANNEL_FULL},
            )

    def undecodable(self, where: str | None, error: UndecodableMessage) -> None:
        """A message could not be decoded: it is skipped."""
        self.counters.add("dropped_undecodable")
        if (end := self.log_limit.admit("undecodable", str(error))) is not None:
            logger.error(
                "Skipped a message for %s that cannot be decoded: %s%s",
                where,
                error,
                end,
                extra={"event": log_events.MESSAGE_UNDECODABLE},
            )

    def silent(self, why: str) -> None:
        """What this process sends is not announced."""
        if (end := self.log_limit.admit("silent")) is not None:
            logger.warning(
                "Without notifications: %s Messages wait until their receivers look.%s",
                why,
                end,
                extra={"event": log_events.ANNOUNCEMENTS_REFUSED},
            )

    def foreign(self, channel: str) -> None:
        """A notification came that the layer did not send."""
        self.counters.add("ignored_notifications")
        if (end := self.log_limit.admit("foreign", channel)) is not None:
            logger.warning(
                "Ignored a notification on %s that pg_layer did not send.%s",
                channel,
                end,
                extra={"event": log_events.NOTIFICATION_IGNORED},
            )

    def unknown_channel(self, channel: str) -> None:
        """A message came for a channel that this client has not made."""
        self.counters.add("ignored_notifications")
        if (end := self.log_limit.admit("unknown channel")) is not None:
            logger.warning(
                "Ignored a message for channel %.100r, which this process has not made.%s",
                channel,
                end,
                extra={"event": log_events.MESSAGE_IGNORED},
            )
