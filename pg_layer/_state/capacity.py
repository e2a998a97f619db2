"""What is known of the room in channels, so that most sends need not look at what waits. No I/O."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

LOW_IDS_MOST = 64
CREDIT_PART = 16
CREDIT_AGE = 0.1  # seconds
LOW_ID_AGE = 0.1  # seconds: a low id is used when it is at least so old, as ids commit out of order


class LowIds(NamedTuple):
    """Per address, the id below which nothing was seen waiting: where a count of what waits may begin."""

    addresses: Sequence[str]
    ids: Sequence[int]


class LowIdBook:
    """Remembers per address where counts of what waits may begin.

    A low id is used only when it is a moment old: a message with a smaller id may still be about to commit.
    """

    def __init__(self) -> None:
        self._usable: dict[str, int] = {}
        self._aging: dict[
            str, int
        ] = {}  # of the time before: one more keeps all used ones old enough
        self._new: dict[str, int] = {}
        self._since = time.monotonic()

    def learn(self, low_ids: LowIds) -> None:
        """Take the low ids that a statement returned."""
        now = time.monotonic()
        if now - self._since >= LOW_ID_AGE:
            self._usable, self._aging = self._aging, self._new
            self._new, self._since = {}, now
        for address, id in zip(low_ids.addresses, low_ids.ids, strict=True):
            self._new.setdefault(address, id)

    def tell(self) -> LowIds:
        """The low ids to count from."""
        if len(self._usable) > LOW_IDS_MOST:
            self._usable = dict(list(self._usable.items())[-LOW_IDS_MOST:])
        return LowIds(list(self._usable), list(self._usable.values()))

    def of(self, address: str) -> int:
        """The low id of one address."""
        return self._usable.get(address, 0)


class Credits:
    """How many messages may go to a channel before it is looked at again whether it is full.

    A small part of the room that was seen, for a moment: one sender alone never sends too many, and several
    at once hardly more than they would by looking at the same time. Near the limit every message looks.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._since = time.monotonic()

    def grant(
        self, channels: Sequence[str], capacities: Sequence[int], waiting: int | None
    ) -> None:
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
        self._low_ids = LowIdBook()
        self._credits = Credits()
        self._boot: int | None = None

    def low_id(self, address: str, channel: str) -> int | None:
        """Where the next message to a channel counts from; None: it may be sent without a look."""
        with self._lock:
            return None if self._credits.spend((channel,)) else self._low_ids.of(address)

    def low_ids(self, channels: Sequence[str]) -> LowIds | None:
        """The same for many messages, one for each of these channels."""
        with self._lock:
            return None if self._credits.spend(channels) else self._low_ids.tell()

    def learn(
        self,
        channels: Sequence[str],
        capacities: Sequence[int],
        waiting: int | None,
        low_ids: LowIds,
        boot: int,
    ) -> None:
        """Take note of what was seen: so many messages wait in each channel, and these low_ids."""
        with self._lock:
            if boot != self._boot:
                self._boot, self._low_ids, self._credits = boot, LowIdBook(), Credits()
            self._low_ids.learn(low_ids)
            self._credits.grant(channels, capacities, waiting)
