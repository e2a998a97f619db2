"""The layers in tests: they follow Django to a test database, and leave it before it is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core import mail
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pg_layer._process.shutdown import registered
from pg_layer._runtime.loops import Loops

# The NAME of each alias when Django was ready. A test database has another one.
_names_at_start: dict[str, object] = {}


def follow_test_databases() -> None:
    """Watch the connections that Django opens in tests. Called when Django is ready."""
    connection_created.connect(_watch)
    for alias in connections:
        _names_at_start[alias] = connections[alias].settings_dict["NAME"]


def is_test_database(alias: str) -> bool:
    """Return whether an alias leads to a test database now."""
    name: object = connections[alias].settings_dict["NAME"]
    return name != _names_at_start.get(alias)


def used_layers() -> list[Loops]:
    """Return the `Loops` of all layers that were used in this process."""
    return [loops for loops in registered() if isinstance(loops, Loops) and loops.is_used]


def _watch(connection: BaseDatabaseWrapper, **_: Any) -> None:
    # Django's documentation: `mail.outbox` exists in the test environment only. Layers of other
    # processes are not closed, whatever statements the application runs.
    if not hasattr(mail, "outbox"):
        return
    if _close_before not in connection.execute_wrappers:
        connection.execute_wrappers.append(_close_before)
    for loops in used_layers():
        loops.follow_settings()


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
                loops.close_now()
    return execute(sql, params, many, context)
