"""Servers that a test may break, and a table of how long recovering took."""

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
    """``with recovery("what recovers"): ...`` notes the seconds: shown, never asserted."""
    noted = request.config.stash.setdefault(_KEY, [])

    @contextmanager
    def measure(what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        noted.append((what, time.monotonic() - start))

    return measure


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    noted = config.stash.get(_KEY, [])
    if not noted:
        return
    terminalreporter.section("recovery times")
    for what, seconds in sorted(noted):
        terminalreporter.write_line(f"{seconds:8.2f} s  {what}")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of this test's own, to be stopped, crashed and started again. It syncs."""
    with PostgresServer(fsync=True) as server:
        yield server


@pytest.fixture
def database(server: PostgresServer) -> str:
    """The DSN of a migrated database on that server."""
    dsn = server.create_database("layer")
    migrate(dsn)
    return dsn


def migrate(dsn: str) -> None:
    """Run the migrations' SQL."""
    with psycopg.connect(dsn) as connection:
        for file in sorted(Path(MIGRATIONS).glob("*.sql")):
            if not file.stem.endswith("_reverse"):
                connection.execute(file.read_bytes())
