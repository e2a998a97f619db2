"""The layer's tasks that fail at present, for the log, `health()` and `stats()`. Any thread."""

from __future__ import annotations

import logging
import threading
import time

from pg_layer._state import log_events

logger = logging.getLogger("pg_layer")

LOG_PERIOD = 60.0  # seconds between two log lines about the same work


class Failures:
    """Work that failed with an unexpected error and is tried again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[object, tuple[str, str]] = {}  # task -> work and error
        self._logged: dict[str, float] = {}  # work -> time of its last record
        self._in_log: set[str] = set()  # failing work that was logged

    def __len__(self) -> int:
        return len(self._failing)

    def begin(self, task: object, what: str, error: Exception) -> None:
        """Record that a task failed. Log it once for the same work, however many tries."""
        with self._lock:
            self._failing[task] = what, words(error)
            now = time.monotonic()
            if what in self._in_log or now - self._logged.get(what, -LOG_PERIOD) < LOG_PERIOD:
                return
            self._logged[what] = now
            self._in_log.add(what)
        logger.error(
            "%s failed, and is tried again until it succeeds.",
            what,
            exc_info=error,
            extra={"event": log_events.TASK_FAILED, "task": what},
        )

    def end(self, task: object, *, is_done: bool) -> None:
        """Record that a task ended. ``is_done``: it succeeded; otherwise it is no longer needed."""
        with self._lock:
            what, _ = self._failing.pop(task, (None, None))
            if what not in self._in_log or any(
                what == other for other, _ in self._failing.values()
            ):
                return
            self._in_log.remove(what)
        if is_done:
            logger.warning(
                "%s works again.", what, extra={"event": log_events.TASK_RECOVERED, "task": what}
            )

    def problems(self) -> list[str]:
        """Return a sentence for each failing work."""
        with self._lock:
            failing = dict(self._failing.values())
        return [f"{what} fails, and is tried again: {why}" for what, why in failing.items()]


def words(error: Exception) -> str:
    """Return an unexpected error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
