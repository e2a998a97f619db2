"""The layers in tests: they follow Django to a test database, and leave it before it is dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pg_layer._config.databases import is_test_environment
from pg_layer._process.shutdown import registered
from pg_layer._runtime.loops import Dropped, Loops
from pg_layer._state import log_events

logger = logging.getLogger("pg_layer")

# The NAME of each alias when Django was ready. A test database has another one.
_names_at_start: dict[str, object] = {}


def follow_test_databases() -> None:
    """Watch the connections that Django opens in tests. Called when Django is ready.

    Reads the settings only. `connections[alias]` would import the driver of each database, also of
    one that this process does not use, and whose driver it lacks.
    """
    connection_created.connect(_watch)
    _names_at_start.update(
        (alias, database.get("NAME") or "") for alias, database in settings.DATABASES.items()
    )


def is_test_database(alias: str) -> bool:
    """Return whether Django has made the database of an alias for tests."""
    name: object = connections.settings[alias].get("NAME") or ""
    return name != _names_at_start.get(alias, name)


def used_layers() -> list[Loops]:
    """Return the `Loops` of all layers that were used in this process."""
    return [loops for loops in registered() if isinstance(loops, Loops) and loops.is_used]


def _dropped_layers() -> list[Dropped]:
    """Return what is left of layers that no longer exist."""
    return [each for each in registered() if isinstance(each, Dropped) and each.is_used]


def _watch(connection: BaseDatabaseWrapper, **_: Any) -> None:
    # Layers of other processes are not closed, whatever statements the application runs.
    if is_test_environment() and _close_before not in connection.execute_wrappers:
        # `connection.execute_wrapper()` removes the last one at the end of its block. It may be the
        # block in which the connection is opened.
        connection.execute_wrappers.insert(0, _close_before)


def _close_before(
    execute: Callable[..., Any],
    sql: object,
    params: object,
    many: bool,
    context: dict[str, Any],
) -> Any:
    """Close layers before a statement of Django that needs their connections to be closed.

    PostgreSQL neither copies nor drops a database that has connections. A `TransactionTestCase`
    truncates the tables, and a layer that uses several of them meanwhile could make a deadlock.
    Their leases and memberships end with that as well.
    """
    if isinstance(sql, str) and sql.startswith(("CREATE DATABASE", "DROP DATABASE", "TRUNCATE")):
        database = context["connection"].settings_dict["NAME"]
        is_truncation = sql.startswith("TRUNCATE")
        for loops in used_layers():
            if not is_truncation or ("pg_layer_" in sql and loops.database == database):
                _close(loops)
        for dropped in _dropped_layers():
            if not is_truncation or ("pg_layer_" in sql and dropped.database == database):
                dropped.close_now()
    return execute(sql, params, many, context)


def _close(loops: Loops) -> None:
    """Close a layer. If that fails, disconnect it. Does not raise: the statement is Django's."""
    try:
        loops.close_now()
    except Exception as error:
        loops.cut()
        logger.warning(
            "Could not close a layer before Django creates, drops or empties a database. Its"
            " connections were cut, and its lease expires by itself: %s",
            error,
            extra={"event": log_events.CLOSE_FAILED},
        )
