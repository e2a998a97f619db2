"""Whether the database is away: said once when it goes, and once when it is back."""

from __future__ import annotations

import logging
import time

from pg_layer.client import Client

logger = logging.getLogger("pg_layer")


class Outage:
    """What is known of the database being away. Belongs to one event loop."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.since = 0.0  # by time.monotonic()
        self.why: str | None = None  # while it is away

    def begin(self, error: Exception) -> None:
        """The database is lost; the first of several calls counts."""
        if self.why is not None:
            return
        self.why, self.since = " ".join(str(error).split()), time.monotonic()
        logger.warning("Lost the database: %s", self.why)
        self._client.announce(self._client.config.on_disconnect)

    def end(self, caught_up: int) -> None:
        """The database is back, and so many messages that had come meanwhile have been read."""
        if self.why is None:
            return
        self.why = None
        logger.warning(
            "The database is back after %.1f s: caught up with %d messages.",
            time.monotonic() - self.since,
            caught_up,
        )
        self._client.announce(self._client.config.on_reconnect)
