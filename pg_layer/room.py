"""What is known of the room in channels, so that most sends need not look at what waits. No I/O."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

FLOORS_MOST = 64
CREDIT_PART = 16
CREDIT_AGE = 0.1  # seconds
FLOOR_AGE = 0.1  # seconds: a floor is used when it is at least so old, as ids commit out of order


class Floors(NamedTuple):
    """Per inbox, the id below which nothing was seen waiting: where a count of what waits may begin."""

    inboxes: Sequence[str]
    ids: Sequence[int]


class FloorBook:
    """Remembers per inbox where counts of what waits may begin.

    A floor is used only when it is a moment old: a message with a smaller id may still be about to commit.
    """

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._ripe: dict[str, int] = {}  # of the time before: one more keeps all used ones old enough
        self._ripening: dict[str, int] = {}
        self._since = time.monotonic()

    def learn(self, floors: Floors) -> None:
        """Take the floors that a statement returned."""
        now = time.monotonic()
        if now - self._since >= FLOOR_AGE:
            self._used, self._ripe = self._ripe, self._ripening
            self._ripening, self._since = {}, now
        for inbox, id in zip(floors.inboxes, floors.ids, strict=True):
            self._ripening.setdefault(inbox, id)

    def tell(self) -> Floors:
        """The floors to count from."""
        if len(self._used) > FLOORS_MOST:
            self._used = dict(list(self._used.items())[-FLOORS_MOST:])
        return Floors(list(self._used), list(self._used.values()))

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

    def grant(self, channels: Sequence[str], capacities: Sequence[int], waiting: int | None) -> None:
        """So many messages were seen to wait in each of these channels; None: do not trust that."""
        if waiting is not None:
            for channel, capacity in zip(channels, capacities, strict=True):
                self._left[channel] = (capacity - waiting) // CREDIT_PART

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


class Room:
    """Both, of the channels of one database, for callers on any thread.

    ``boot``: ids of another one say nothing, because a crash or a failover may hand them out again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._floors = FloorBook()
        self._credits = Credits()
        self._boot: int | None = None

    def low_id(self, address: str, channel: str) -> int | None:
        """Where the next message to a channel counts from; None: it may be sent without a look."""
        with self._lock:
            return None if self._credits.spend((channel,)) else self._floors.of(address)

    def floors(self, channels: Sequence[str]) -> Floors | None:
        """The same for many messages, one for each of these channels."""
        with self._lock:
            return None if self._credits.spend(channels) else self._floors.tell()

    def learn(
        self,
        channels: Sequence[str],
        capacities: Sequence[int],
        waiting: int | None,
        floors: Floors,
        boot: int,
    ) -> None:
        """Take note of what was seen: so many messages wait in each channel, and these floors."""
        with self._lock:
            if boot != self._boot:
                self._boot, self._floors, self._credits = boot, FloorBook(), Credits()
            self._floors.learn(floors)
            self._credits.grant(channels, capacities, waiting)
