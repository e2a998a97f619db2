"""The plugin for pytest: layers are reset after each test. An entry point registers it.

`-p no:pg_layer` turns it off. It does nothing in a project without a layer of this package.

Each pytest in the environment imports this module, also for other projects, and before their
`conftest.py`, which may replace modules as gevent does. Therefore it is not in the package, and
imports nothing of it, nor of Django, before a test has used a layer.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import pytest

# The fixtures of pytest-django on which its other database fixtures depend.
DATABASE_FIXTURES = {"db", "transactional_db", "live_server"}
CLOSE_TIMEOUT = 5.0  # seconds for the thread of sync_to_async to become free


def _has_layers() -> bool:
    """Return whether a layer exists. Its modules are imported then."""
    shutdown = sys.modules.get("pg_layer._process.shutdown")
    return shutdown is not None and bool(shutdown.registered())


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Close layers that were used before the tests, as in `AppConfig.ready`."""
    if _has_layers():
        from pg_layer._runtime.databases_of_tests import used_layers

        for loops in used_layers():
            loops.close_now()


@pytest.fixture(autouse=True)
def _reset_pg_layers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reset layers after each test."""
    yield
    if not _has_layers():
        return
    from django.test import TransactionTestCase

    from pg_layer.testing import close_layers

    is_test_case = isinstance(request.cls, type) and issubclass(request.cls, TransactionTestCase)
    is_marked = request.node.get_closest_marker("django_db") is not None
    has_database = is_marked or not DATABASE_FIXTURES.isdisjoint(request.fixturenames)
    # A fixture may have replaced the test database by one that others use.
    close_layers(may_leave=has_database or is_test_case)
    if has_database and inspect.iscoroutinefunction(request.function):
        _close_connections_of_async_code()


def _close_connections_of_async_code() -> None:
    """Close the connections of the thread in which an async test has used Django's databases.

    Nothing else closes them, and Django cannot drop a database that has connections.
    """
    from concurrent.futures import wait

    from asgiref.sync import SyncToAsync
    from django.db import connections

    closing = SyncToAsync.single_thread_executor.submit(connections.close_all)
    if not wait([closing], CLOSE_TIMEOUT).done:
        raise RuntimeError(
            "pg_layer: a function that the test has passed to sync_to_async() has not returned"
            f" {CLOSE_TIMEOUT:g} s after the end of the test, so its connections to the database"
            " cannot be closed. Make the test wait for it."
        )
    closing.result()
