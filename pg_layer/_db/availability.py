"""Whether the database is away: said once when it goes, and once when it is back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pg_layer._db.errors import reason_of, was_refused
from pg_layer._state import log_events
from pg_layer._state.client import Client

logger = logging.getLogger("pg_layer")


class Outage:
    """What is known of the database being away. Belongs to one event loop."""

    def __init__(self, client: Client, is_over: Callable[[], bool] = lambda: False) -> None:
        # is_over: whether the loop's connections were closed, so that they say nothing of the database
        self._client = client
        self._is_over = is_over
        self.since = 0.0  # by time.monotonic()
        self.why: str | None = None  # while it is away
        self._was_there = False  # before that
        self._is_refused = False  # it is there, and refuses what receiving needs

    def begin(self, error: Exception) -> None:
        """The database is lost, or cannot be had; the first of several calls counts."""
        if self.why is not None or self._is_over():
            return
        event, what = self._what(error)
        self.why, self.since = reason_of(error), time.monotonic()
        logger.warning("%s: %s", what, self.why, extra={"event": event})
        self._client.announce_locally(self._client.config.on_disconnect)

    @property
    def is_away(self) -> bool:
        """Whether the database is known to be away. From any thread."""
        return self.why is not None and not self._is_refused

    def _what(self, error: Exception) -> tuple[str, str]:
        """Return the event to log, and the beginning of its line."""
        self._was_there = self._client.renewed_at > 0
        self._is_refused = was_refused(error)
        if self._is_refused:
            return log_events.RECEIVING_REFUSED, "Cannot receive"
        if self._was_there:
            return log_events.DATABASE_LOST, "Lost the database"
        return log_events.DATABASE_UNREACHABLE, "Cannot reach the database"

    def end(self, caught_up: int) -> None:
        """The database is back, and so many messages that had come meanwhile have been read."""
        if self.why is None:
            return
        self.why = None
        logger.warning(
            "The database is %s after %.1f s: caught up with %d messages.",
            "back" if self._was_there else "there",
            time.monotonic() - self.since,
            caught_up,
            extra={"event": log_events.DATABASE_BACK},
        )
        self._client.announce_locally(self._client.config.on_reconnect)
