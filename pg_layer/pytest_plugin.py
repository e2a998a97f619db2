"""The plugin for pytest: layers are reset after each test. An entry point registers it.

`-p no:pg_layer` turns it off. It does nothing in a project without a layer of this package.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from pg_layer._process.shutdown import registered

# The fixtures of pytest-django on which its other database fixtures depend.
DATABASE_FIXTURES = {"db", "transactional_db", "live_server"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Close layers that were used before the tests, as in `AppConfig.ready`."""
    if registered():
        from pg_layer._runtime.databases_of_tests import used_layers

        for loops in used_layers():
            loops.close_now()


@pytest.fixture(autouse=True)
def _reset_pg_layers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reset layers after each test."""
    yield
    if not registered():  # the project has no layer: import nothing
        return
    from asgiref.sync import SyncToAsync
    from django.db import connections
    from django.test import TransactionTestCase

    from pg_layer.testing import reset_layers

    is_test_case = isinstance(request.cls, type) and issubclass(request.cls, TransactionTestCase)
    is_marked = request.node.get_closest_marker("django_db") is not None
    has_database = is_marked or not DATABASE_FIXTURES.isdisjoint(request.fixturenames)
    reset_layers(None if has_database or is_test_case else ())
    if has_database and inspect.iscoroutinefunction(request.function):
        # The test's queries ran in this thread. Nothing else closes its connections.
        SyncToAsync.single_thread_executor.submit(connections.close_all).result()
