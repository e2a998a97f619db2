"""The database's clock, as a client knows it."""

from __future__ import annotations

import time


class DatabaseClock:
    """Tells the database's time without asking it, from the last answer and the process's monotonic clock.

    What it tells is never earlier than the database's own clock was at the same moment (but for a step of
    that clock since the last answer), so that what is not expired here is not expired there. The clock of
    the machine that the process runs on plays no part.
    """

    def __init__(self) -> None:
        self._offset = 0.0
        self.is_set = False

    def observe(self, asked_at: float, answer: float) -> None:
        """The database said ``answer`` (seconds since 1970), asked at ``asked_at`` (`time.monotonic`)."""
        self._offset = answer - asked_at
        self.is_set = True

    def now(self) -> float:
        """Seconds since 1970; 0 before the first answer, so that only the database calls things expired."""
        return time.monotonic() + self._offset if self.is_set else 0.0
