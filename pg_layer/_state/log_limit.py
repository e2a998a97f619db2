"""A limit for log records that other processes or roles can cause. No I/O."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

PERIOD = 60.0  # seconds
MAX_RECORDS = 20  # of one kind in a period


class LogLimit:
    """A limit of log records: each subject once in a period, and so many records of a kind.

    Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # kind -> subjects logged in the last period and their times, in this order
        self._logged: defaultdict[str, dict[object, float]] = defaultdict(dict)
        self._left_out: Counter[str] = Counter()

    def admit(self, kind: str, about: object = None) -> str | None:
        """Return the end of the text to log, or None if the record must not be logged.

        The end gives the number of records of the kind that were left out since the last one.
        ``kind``: from a small set, because kinds are never forgotten. ``about``: the subject.
        """
        now = self._clock()
        with self._lock:
            logged = self._logged[kind]
            for earlier, at in list(logged.items()):
                if now - at < PERIOD:
                    break
                del logged[earlier]
            if about in logged or len(logged) >= MAX_RECORDS:
                self._left_out[kind] += 1
                return None
            logged[about] = now
            left_out = self._left_out.pop(kind, 0)
        return f" (Similar records left out: {left_out}.)" if left_out else ""
