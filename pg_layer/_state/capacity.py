"""A sender's knowledge of the free capacity of channels. No I/O.

With this knowledge most sends do not count the rows that wait in the channel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

MAX_LOW_IDS = 64
CREDIT_PART = 16  # a credit is this part of the free capacity
CREDIT_AGE = 0.1  # seconds after which all credits end
LOW_ID_AGE = 0.1  # seconds after which a low-water id may be used


class LowIds(NamedTuple):
    """Low-water ids: for each address, the id at which a count of waiting rows may begin."""

    addresses: Sequence[str]
    ids: Sequence[int]


class LowWaterIds:
    """The low-water ids that earlier sends have observed, by address.

    A low-water id may be used only `LOW_ID_AGE` seconds after it was observed. Ids are drawn
    before the commit: a row with a smaller id may have been invisible when the count was made.
    """

    def __init__(self) -> None:
        self._usable: dict[str, int] = {}
        # New ids pass through one more generation. So every id that becomes usable has been known
        # for a whole LOW_ID_AGE, also if it was observed just before the generations changed.
        self._aging: dict[str, int] = {}
        self._new: dict[str, int] = {}
        self._since = time.monotonic()

    def observe(self, low_ids: LowIds) -> None:
        """Remember the low-water ids that a statement returned."""
        now = time.monotonic()
        if now - self._since >= LOW_ID_AGE:
            self._usable, self._aging = self._aging, self._new
            self._new, self._since = {}, now
        for address, id in zip(low_ids.addresses, low_ids.ids, strict=True):
            self._new.setdefault(address, id)

    def usable(self) -> LowIds:
        """Return the low-water ids that a statement may count from, at most `MAX_LOW_IDS`."""
        if len(self._usable) > MAX_LOW_IDS:
            self._usable = dict(list(self._usable.items())[-MAX_LOW_IDS:])
        return LowIds(list(self._usable), list(self._usable.values()))

    def usable_of(self, address: str) -> int:
        """Return the usable low-water id of one address, or 0 if none is known."""
        return self._usable.get(address, 0)


class Credits:
    """The number of messages that may be sent to each channel without a count.

    A credit is a sixteenth of the free capacity that a count found, and lasts `CREDIT_AGE`
    seconds. So one sender never exceeds the capacity. Several senders exceed it by little more
    than senders that count at the same moment. If a channel is nearly full, every send counts.
    """

    def __init__(self) -> None:
        # A credit belongs to the capacity that it is a part of: code may change the capacity.
        self._left: dict[tuple[str, int], int] = {}
        self._since = time.monotonic()

    def grant(
        self, channels: Sequence[str], capacities: Sequence[int], waiting: int | None
    ) -> None:
        """Grant a credit for each channel.

        ``waiting``: the number of messages that waited in each of these channels. None: the
        count must not be relied on, and no credit is granted.
        """
        if waiting is not None:
            for channel, capacity in zip(channels, capacities, strict=True):
                self._left[channel, capacity] = (capacity - waiting) // CREDIT_PART

    def spend(self, channels: Sequence[str], capacities: Sequence[int]) -> bool:
        """Return whether one message for each of these channels may be sent without a count.

        Each channel spends one message of its credit, also if a later channel has none left.
        """
        now = time.monotonic()
        if now - self._since > CREDIT_AGE:
            self._left.clear()
            self._since = now
            return False
        for credit in zip(channels, capacities, strict=True):
            left = self._left.get(credit, 0)
            if left <= 0:
                return False
            self._left[credit] = left - 1
        return True


class KnownCapacity:
    """Low-water ids and credits for the channels of one database. Thread-safe.

    Both are forgotten when a statement reports another boot: a crash or a failover may hand out
    the same ids again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._low_ids = LowWaterIds()
        self._credits = Credits()
        self._boot: int | None = None

    def low_id(self, address: str, channel: str, capacity: int) -> int | None:
        """Return the id at which the count for one message begins. None: send without a count.

        ``address``, ``capacity``: of ``channel``.
        """
        with self._lock:
            if self._credits.spend((channel,), (capacity,)):
                return None
            return self._low_ids.usable_of(address)

    def low_ids(self, channels: Sequence[str], capacities: Sequence[int]) -> LowIds | None:
        """Return the ids at which the counts for a batch begin. None: send without a count.

        ``channels``, ``capacities``: the channel of each message, and its capacity.
        """
        with self._lock:
            return None if self._credits.spend(channels, capacities) else self._low_ids.usable()

    def observe(
        self,
        channels: Sequence[str],
        capacities: Sequence[int],
        waiting: int | None,
        low_ids: LowIds,
        boot: int,
    ) -> None:
        """Remember the result of a statement that has counted.

        ``waiting``: the number of messages that wait in each channel, or None. ``boot``: the boot
        in which the statement ran.
        """
        with self._lock:
            if boot != self._boot:
                self._boot, self._low_ids, self._credits = boot, LowWaterIds(), Credits()
            self._low_ids.observe(low_ids)
            self._credits.grant(channels, capacities, waiting)
