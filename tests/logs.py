"""The log records of the package, by the names of their events (`pg_layer._state.log_events`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest


def event_of(record: logging.LogRecord) -> str | None:
    """Return the name of the event that a record of the package reports."""
    return getattr(record, "event", None)


def records(
    source: pytest.LogCaptureFixture | Iterable[logging.LogRecord],
    *events: str,
    level: int = logging.WARNING,
) -> list[logging.LogRecord]:
    """Return the package's records from ``level`` on, of all events or only of ``events``."""
    all_records = source.records if isinstance(source, pytest.LogCaptureFixture) else source
    return [
        record
        for record in all_records
        if record.name == "pg_layer"
        and record.levelno >= level
        and (not events or event_of(record) in events)
    ]


def events(
    source: pytest.LogCaptureFixture | Iterable[logging.LogRecord], level: int = logging.WARNING
) -> list[str | None]:
    """Return the names of the events that the package logged from ``level`` on, in order."""
    return [event_of(record) for record in records(source, level=level)]
