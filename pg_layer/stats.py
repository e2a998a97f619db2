"""What `layer.stats()` returns, and how it is counted. No I/O."""

from __future__ import annotations

import itertools
import threading
from typing import Literal, TypedDict, cast


class Counts(TypedDict):
    """What a layer did in this process since it was made. None of them ever goes down.

    - ``sent``: messages to channels that the database accepted; in a transaction of Django's, whether or not
      that commits.
    - ``group_sent``: messages to groups, each once, however many members.
    - ``refused_full``: messages to channels that were refused, as the channel was full.
    - ``batches``: statements that carried those messages.
    - ``received``: messages that came here; a group's once for all its members, a job that went back unread
      and came again once more.
    - ``delivered``: messages that `receive()` returned; a group's once for each member.
    - ``dropped_full``: a group's messages that a member missed, as its channel was full. Counted where the
      member's mailbox is; for normal channels where the message was sent.
    - ``dropped_expired``: messages that expired here before anybody received them.
    - ``dropped_undecodable``: messages that could not be read.
    - ``shortcuts``: messages that came inside their doorbell, and saved a drain.
    - ``drains``: reads of the inbox.
    - ``reconnects``: how often the listening connection was lost and made anew.
    - ``refused_notifies``: statements for which the server refused NOTIFY, and that were run again without.
    - ``foreign_notifies``: notifications on a doorbell that were none of the layer's.
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
    shortcuts: int
    drains: int
    reconnects: int
    refused_notifies: int
    foreign_notifies: int


class State(TypedDict):
    """How a layer stands in this process now.

    - ``mailboxes``: channels of which this process keeps a mailbox.
    - ``mailbox_messages``: messages in them, which nobody has received yet.
    - ``lane_operations``: sends, joinings and leavings that wait for the statement in flight to end.
    - ``memberships``: of this process's channels, one for each channel and group.
    - ``listener``: as in `Health`: "off" where nothing is received, or by a loop that does not run;
      "connecting"; "listening"; "polling".
    - ``lease_age``: seconds since the lease was renewed; None without a lease.
    """

    mailboxes: int
    mailbox_messages: int
    lane_operations: int
    memberships: int
    listener: Literal["off", "connecting", "listening", "polling"]
    lease_age: float | None


class Stats(Counts, State):
    """All of it. ``mean_batch_size``: messages to a statement, since the start; 0.0 before the first."""

    mean_batch_size: float


COUNTED = tuple(Counts.__annotations__)


class Counters:
    """Counts from any thread, and loses none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTED, 0)
        # receive() counts each message, and a lock would cost it a tenth of its time. next() of this is one
        # step of the interpreter, and no thread comes between.
        self._delivered = itertools.count()
        self._reads = 0  # a look at it counts as well
        self.delivered = self._delivered.__next__

    def add(self, name: str, count: int = 1) -> None:
        """Count what has a name in `Counts`, but for deliveries: those by calling `delivered`."""
        with self._lock:
            self._counts[name] += count

    def read(self) -> Counts:
        """All counters, as they are at one moment."""
        with self._lock:
            counts = cast(Counts, dict(self._counts))
            counts["delivered"] = next(self._delivered) - self._reads
            self._reads += 1
            return counts

    def __getitem__(self, name: str) -> int:
        """One of them."""
        return self.read()[name]  # type: ignore[literal-required,no-any-return]

    def since(self, before: Counts) -> dict[str, int]:
        """What was counted since that was read."""
        now = self.read()
        return {name: now[name] - before[name] for name in COUNTED}  # type: ignore[literal-required]


def make_stats(counts: Counts, state: State) -> Stats:
    """What `layer.stats()` returns."""
    messages = counts["sent"] + counts["group_sent"] + counts["refused_full"]
    mean = messages / counts["batches"] if counts["batches"] else 0.0
    return Stats(**counts, **state, mean_batch_size=mean)
