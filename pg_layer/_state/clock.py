"""The database's clock, as a client knows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

# Linux's monotonic clock stands still while the machine sleeps; its other one does not.
_seconds: Callable[[], float] = time.monotonic
if hasattr(time, "CLOCK_BOOTTIME"):
    _seconds = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


class DatabaseClock:
    """Tells the database's time without asking it, from its answers and a clock that counts seconds.

    Each answer bounds the difference of the two clocks from both sides: the database gave it after it was
    asked and before the answer was here. So a slow answer says little, and takes nothing away from what a
    quick one said. Answers that contradict each other mean that a clock was set or has drifted: then the last
    one counts.

    What the clock tells is not earlier than the database's own clock, but for the drift of the two clocks by
    less than a round trip. So what has expired there is expired here. The wall clock of the process plays no
    part.
    """

    #: Seconds since some moment, also those in which the machine slept where the system counts them.
    ticks = staticmethod(_seconds)

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf  # by how much the database's clock is ahead
        self.is_set = False

    def observe(self, asked_at: float, answer: float) -> None:
        """``answer`` (seconds since 1970) has just come, to what was asked at ``asked_at`` (`ticks`)."""
        least, most = answer - self.ticks(), answer - asked_at
        if least <= self._most and self._least <= most:
            least, most = max(least, self._least), min(most, self._most)
        self._least, self._most = least, most
        self.is_set = True

    def now(self) -> float:
        """Seconds since 1970; 0 before the first answer, so that only the database calls things expired."""
        return self.ticks() + self._most if self.is_set else 0.0
