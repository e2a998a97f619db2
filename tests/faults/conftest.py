"""Servers that a test may break, and a table of the recovery times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest

from devtools.postgres import PostgresServer
from tests.conftest import MIGRATIONS

_KEY = pytest.StashKey[list[tuple[str, float]]]()


@pytest.fixture
def recovery(request: pytest.FixtureRequest) -> Callable[[str], AbstractContextManager[None]]:
    """Return a context manager that measures how long its block takes.

    ``with recovery("what recovers"): ...``. The times are shown at the end of the run, and
    never asserted.
    """
    measured = request.config.stash.setdefault(_KEY, [])

    @contextmanager
    def measure(what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        measured.append((what, time.monotonic() - start))

    return measure


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    measured = config.stash.get(_KEY, [])
    if not measured:
        return
    terminalreporter.section("recovery times")
    for what, seconds in sorted(measured):
        terminalreporter.write_line(f"{seconds:8.2f} s  {what}")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """Yield a server of this test alone, to be stopped, crashed and started again.

    It runs with fsync, because a crash must lose the same data as a real crash.
    """
    with PostgresServer(fsync=True) as server:
        yield server


@pytest.fixture
def database(server: PostgresServer) -> str:
    """Return the DSN of a migrated database on that server."""
    dsn = server.create_database("layer")
    migrate(dsn)
    return dsn


def migrate(dsn: str) -> None:
    """Run the SQL of the migrations."""
    with psycopg.connect(dsn) as connection:
        for file in sorted(Path(MIGRATIONS).glob("*.sql")):
            if not file.stem.endswith("_reverse"):
                connection.execute(file.read_bytes())
