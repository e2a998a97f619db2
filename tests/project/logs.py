"""The log of the test project's processes, which tests read from the standard error stream."""

from __future__ import annotations

import logging


class EventFormatter(logging.Formatter):
    """A formatter that puts the event first: ``[database_lost] Lost the database``."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        text = super().format(record)
        return text if event is None else f"[{event}] {text}"
