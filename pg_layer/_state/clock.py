"""A client's estimate of the database's clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

# Linux's monotonic clock stops while the machine is suspended. CLOCK_BOOTTIME does not.
_seconds: Callable[[], float] = time.monotonic
if hasattr(time, "CLOCK_BOOTTIME"):
    _seconds = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


class DatabaseClock:
    """The database's time, computed from its answers and a monotonic clock.

    Each answer bounds the difference of the two clocks from both sides. The database read its clock
    after the statement was sent, and before the answer arrived. So a slow answer gives a wide
    bound, and does not widen a narrow bound from a quick answer. If answers contradict each other,
    a clock was set or has drifted: then the last answer counts.

    The computed time is never earlier than the database's own, except that the two clocks
    may drift apart by less than a round trip. So a message that has expired in the database
    has expired here. The wall clock of the process is not used.
    """

    #: Seconds since some moment. Linux also counts those while the machine was suspended.
    ticks = staticmethod(_seconds)

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf  # seconds the database's clock is ahead
        self.is_set = False

    def observe(self, asked_at: float, answer: float) -> None:
        """Note the database's time from an answer that has just arrived.

        ``asked_at``: `ticks` when the statement was sent. ``answer``: seconds since 1970.
        """
        least, most = answer - self.ticks(), answer - asked_at
        if least <= self._most and self._least <= most:
            least, most = max(least, self._least), min(most, self._most)
        self._least, self._most = least, most
        self.is_set = True

    def now(self) -> float:
        """Return the seconds since 1970.

        Return 0 before the first answer: until then only the database finds messages expired.
        """
        return self.ticks() + self._most if self.is_set else 0.0
