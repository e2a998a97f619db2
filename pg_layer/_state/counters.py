"""The result of ``layer.stats()``, and its counters. No I/O; any thread."""

from __future__ import annotations

import itertools
import threading
from typing import Literal, TypedDict, cast


class Counts(TypedDict):
    """Counters of a layer in this process since it was created. They never decrease.

    - ``sent``: messages to channels that the database accepted; in a transaction of Django, whether
      or not it commits.
    - ``group_sent``: messages to groups, each once, however many members.
    - ``refused_full``: messages to channels that were refused because the channel was full.
    - ``batches``: statements that carried those messages.
    - ``received``: messages that reached this process; a group message once for all its members, a
      job that is released unread and claimed again twice.
    - ``delivered``: messages that ``receive()`` returned; a group message once for each member.
    - ``dropped_full``: group messages that a member missed because its channel was full. Counted
      in the member's process; for a normal channel, in the sender's.
    - ``dropped_expired``: messages that expired in this process before they were received.
    - ``dropped_undecodable``: messages that could not be decoded.
    - ``inline_messages``: messages delivered inside the notification, without a read.
    - ``reads``: statements that read announced messages.
    - ``reconnects``: times the listening connection was lost and made again.
    - ``expired_leases``: times the lease of this process had expired while the database was
      available, so that messages may have been missed.
    - ``refused_notifications``: statements for which the server refused NOTIFY, and that were
      repeated without it.
    - ``ignored_notifications``: notifications on the layer's NOTIFY channels that the layer did not
      send, and messages for channels that this process has not made.
    """

    sent: int
    group_sent: int
    refused_full: int
    batches: int
    received: int
    delivered: int
    dropped_full: int
    dropped_expired: int
    dropped_undecodable: int
    inline_messages: int
    reads: int
    reconnects: int
    expired_leases: int
    refused_notifications: int
    ignored_notifications: int


class State(TypedDict):
    """The state of a layer in this process at one moment.

    - ``channels``: channels for which this process has a queue.
    - ``queued_messages``: messages in those queues, not yet received.
    - ``pending_announcements``: announcements that are not dispatched yet.
    - ``pending_operations``: sends and membership changes that wait for the statement in flight.
    - ``memberships``: memberships of this process's channels, one for each channel and group.
    - ``remembered_keys``: keys of messages that the process remembers so that no message is
      delivered twice.
    - ``listener``: "off" in a process that does not receive; "connecting"; "listening"; "polling",
      by the option ``poll_interval`` or because notifications do not arrive.
    - ``lease_age``: seconds since the lease was renewed; None without a lease.
    - ``failing_tasks``: tasks of the layer that fail with an unexpected error and try again.
      `health()` and the log name them.
    """

    channels: int
    queued_messages: int
    pending_announcements: int
    pending_operations: int
    memberships: int
    remembered_keys: int
    listener: Literal["off", "connecting", "listening", "polling"]
    lease_age: float | None
    failing_tasks: int


class Stats(Counts, State):
    """Counters and state. ``mean_batch_size``: messages in a statement on average; at first 0.0."""

    mean_batch_size: float


COUNTED = tuple(Counts.__annotations__)


class Counters:
    """Counters that any thread may increase."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTED, 0)
        # receive() counts each message, and a lock would take a tenth of its time. next() of this
        # iterator is atomic.
        self._delivered = itertools.count()
        self._reads = 0  # each read increases `_delivered`
        self.delivered = self._delivered.__next__

    def add(self, name: str, count: int = 1) -> None:
        """Increase a counter of `Counts`. For ``delivered``, call `delivered` instead."""
        with self._lock:
            self._counts[name] += count

    def read(self) -> Counts:
        """Return all counters at one moment."""
        with self._lock:
            counts = cast(Counts, dict(self._counts))
            counts["delivered"] = next(self._delivered) - self._reads
            self._reads += 1
            return counts

    def __getitem__(self, name: str) -> int:
        """Return one counter."""
        return self.read()[name]  # type: ignore[literal-required,no-any-return]

    def since(self, before: Counts) -> dict[str, int]:
        """Return how much each counter has increased since ``before`` was read."""
        now = self.read()
        return {name: now[name] - before[name] for name in COUNTED}  # type: ignore[literal-required]


def make_stats(counts: Counts, state: State) -> Stats:
    """Return the result of ``layer.stats()``."""
    messages = counts["sent"] + counts["group_sent"] + counts["refused_full"]
    mean = messages / counts["batches"] if counts["batches"] else 0.0
    return Stats(**counts, **state, mean_batch_size=mean)
