"""Which lines about what others cause are logged, so that nobody can fill the log. Pure."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

PERIOD = 60.0  # seconds
MOST_LINES = 20  # of a kind in a period


class LogLimit:
    """Has each thing logged once in a period, and of things of a kind only some. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # By kind: what was logged in the last period, and when, in that order.
        self._logged: defaultdict[str, dict[object, float]] = defaultdict(dict)
        self._left_out: Counter[str] = Counter()

    def admit(self, kind: str, about: object = None) -> str | None:
        """None: do not log it. Otherwise what the line must end with: how many lines were left out before.

        ``kind``: one of a few. ``about``: anything.
        """
        now = self._clock()
        with self._lock:
            logged = self._logged[kind]
            for earlier, at in list(logged.items()):
                if now - at < PERIOD:
                    break
                del logged[earlier]
            if about in logged or len(logged) >= MOST_LINES:
                self._left_out[kind] += 1
                return None
            logged[about] = now
            left_out = self._left_out.pop(kind, 0)
        return f" (Left out since the last such line: {left_out}.)" if left_out else ""
