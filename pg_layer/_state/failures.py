"""What of the layer's own work fails right now: for the log, `health()` and `stats()`. Pure; any thread."""

from __future__ import annotations

import logging
import threading
import time

from pg_layer._state import log_events

logger = logging.getLogger("pg_layer")

LOG_PERIOD = 60.0  # seconds between two log lines about the same work


class Failures:
    """Work that failed for a reason that the layer does not expect, and that is tried again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[object, tuple[str, str]] = {}  # task -> what fails, and why
        self._logged: dict[str, float] = {}  # what failed -> when it was logged last
        self._in_log: set[str] = set()  # what fails now, and whose failure is in the log

    def __len__(self) -> int:
        return len(self._failing)

    def begin(self, task: object, what: str, error: Exception) -> None:
        """A task has failed, perhaps again. Logged once, however many tries and tasks fail at the same."""
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
        """A task has ended: it succeeded, or nobody needs it any more."""
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
        """What fails, in words."""
        with self._lock:
            failing = dict(self._failing.values())
        return [f"{what} fails, and is tried again: {why}" for what, why in failing.items()]


def words(error: Exception) -> str:
    """An unexpected error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
