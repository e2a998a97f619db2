"""The availability of the database. Logs one line when it is lost, and one when it returns.

While the database refuses to let the client receive, each new reason is logged, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pg_layer._db.errors import outage_reason, was_refused
from pg_layer._state import log_events
from pg_layer._state.client import Client

logger = logging.getLogger("pg_layer")

# Seconds without any connection after which the database counts as unavailable. A single failure
# proves little: the server may have had too many connections for a moment.
AWAY_AFTER = 1.0


class Outage:
    """An outage as one event loop observes it. Only `is_away` may be read from other threads.

    A process that receives calls `begin` and `end`. A process that only sends does not notice the
    loss of an idle connection. There the failed attempts to connect count.

    ``is_over``: returns whether the connections of this loop were closed. Then errors do not show
    the state of the database.
    ``is_listening``: returns whether a connection listens. Then the database is available, even
    if no other connection can be made.
    """

    def __init__(
        self,
        client: Client,
        is_over: Callable[[], bool] = lambda: False,
        is_listening: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._is_over = is_over
        self._is_listening = is_listening
        self.since = 0.0  # by time.monotonic()
        self.why: str | None = None  # the reason, while the database is unavailable
        self._logged: set[str] = set()  # reasons of this outage
        self._was_connected = False  # before the outage
        self._is_refused = False  # the database is available, but refuses to let the client receive
        self._failing_since: float | None = None  # no connection could be made since then

    def begin(self, error: Exception) -> None:
        """Note that the database is lost, cannot be reached, or refuses to let the client receive.

        During an outage only a refusal changes the reason, because it is an answer of the database.
        Each refusal is logged once.
        """
        is_first = self.why is None
        if self._is_over() or not (is_first or was_refused(error)):
            return
        if is_first:
            self.since, self._was_connected = time.monotonic(), self._client.renewed_at > 0
        self.why = outage_reason(error)
        if not is_first and self.why in self._logged:
            return
        self._logged = {self.why} if is_first else {*self._logged, self.why}
        event, what = self._describe(error)
        logger.warning("%s: %s", what, self.why, extra={"event": event})
        if is_first:
            self._client.send_to_consumers(self._client.config.on_disconnect)

    def _describe(self, error: Exception) -> tuple[str, str]:
        """Return the event to log, and the beginning of its line."""
        self._is_refused = was_refused(error)
        if self._is_refused:
            return log_events.RECEIVING_REFUSED, "Cannot receive"
        if self._was_connected:
            return log_events.DATABASE_LOST, "Lost the database"
        return log_events.DATABASE_UNREACHABLE, "Cannot reach the database"

    def connection_failed(self) -> None:
        """Note that a connection could not be made."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()

    def connected(self) -> None:
        """Note that a connection was made."""
        self._failing_since = None

    @property
    def is_away(self) -> bool:
        """Whether the database is known to be unavailable. From any thread."""
        if self.why is not None:
            return not self._is_refused
        since = self._failing_since
        is_failing = since is not None and time.monotonic() - since >= AWAY_AFTER
        return is_failing and not self._is_listening()

    def end(self, caught_up: int) -> None:
        """Note that the database has returned, and how many missed messages have been read."""
        if self.why is None:
            return
        self.why = None
        logger.warning(
            "The database is %s after %.1f s: caught up with %d %s.",
            "back" if self._was_connected else "available",
            time.monotonic() - self.since,
            caught_up,
            "message" if caught_up == 1 else "messages",
            extra={"event": log_events.DATABASE_BACK},
        )
        self._client.send_to_consumers(self._client.config.on_reconnect)
