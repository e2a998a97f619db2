"""The layer's database in DATABASES: its alias, its name, and how to create its tables."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from pg_layer._config.aliases import postgresql_aliases
from pg_layer._config.dsn import parsed
from pg_layer._config.options import Config
from pg_layer.exceptions import NotMigrated


def alias_by_settings(config: Config) -> str | None:
    """Return the alias in DATABASES of the layer's database, as far as the settings determine it.

    None if the layer has a ``dsn`` and no alias has the same parameters. An alias with other
    parameters may lead to the same database: `pg_layer._db.same_database.alias_of` asks the
    servers. This function opens no connection, and may be called on an event loop.
    """
    if config.dsn is None:
        return config.using or "default"
    place = _place(parsed(config.dsn))
    return next((alias for alias, other in places_of_aliases() if other == place), None)


def _similar_aliases(dsn: str) -> list[str]:
    """Return the aliases whose parameters differ from the DSN in the host or the service only."""
    place = _place(parsed(dsn))
    return [alias for alias, other in places_of_aliases() if other[2:] == place[2:]]


def places_of_aliases() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each PostgreSQL alias in DATABASES and where it leads, for comparison."""
    for alias in postgresql_aliases():
        # An alias with an error of its own does not lead to the database.
        with suppress(ImproperlyConfigured, ImportError):
            yield alias, _place(connections[alias].get_connection_params())


def settings_of(config: Config) -> Mapping[str, Any]:
    """Return Django's settings of the layer's database; empty for a layer with a ``dsn``.

    When Django creates or destroys a test database, it changes NAME in this dict.
    """
    settings: Mapping[str, Any] = {} if config.using is None else connections.settings[config.using]
    return settings


def is_test_environment() -> bool:
    """Return whether Django's `setup_test_environment()` was called, as by its runner or by pytest.

    `mail.outbox`, which Django documents, exists also after a mail was sent with the backend
    "locmem", in any process.
    """
    utils = sys.modules.get("django.test.utils")  # imported by the caller of that function
    return hasattr(getattr(utils, "_TestState", None), "saved_data")


def _place(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return where the tables are, as far as the parameters of a connection determine it.

    Service files are not read. So two connections differ if only one of them names a service.
    """

    def of(*names: str, variable: str) -> str:
        given = (str(value) for name in names if (value := parameters.get(name)))
        return next(given, os.environ.get(variable, ""))

    user = of("user", variable="PGUSER")
    return (
        of("service", variable="PGSERVICE"),
        of("host", "hostaddr", variable="PGHOST"),
        of("port", variable="PGPORT") or "5432",
        of("dbname", variable="PGDATABASE") or user,
        _search_path(of("options", variable="PGOPTIONS")),
    )


def _search_path(options: str) -> str:
    """Return the search_path in a connection's options for the server, without spaces, or ""."""
    # The server splits the options at spaces that do not follow a backslash.
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", options)]
    settings = re.findall(r"(?:^|\0)(?:-c\0?|--)([^\0=]+)=([^\0]*)", "\0".join(words))
    paths = [
        value for name, value in settings if name.strip().replace("-", "_").lower() == "search_path"
    ]
    return "".join(paths[-1].split()) if paths else ""


def not_migrated(config: Config, alias: str | None = None) -> NotMigrated:
    """Return a `NotMigrated` that names the command that creates the tables.

    ``alias``: of the database; default: the alias for `config`.
    """
    return NotMigrated(
        f"The tables of pg_layer are missing or out of date: {how_to_migrate(config, alias)}."
    )


def how_to_migrate(config: Config, alias: str | None = None) -> str:
    """Return the steps that create the tables, as the end of a sentence."""
    steps = []
    if apps.ready and not apps.is_installed("pg_layer"):
        steps.append('add "pg_layer" to INSTALLED_APPS')
    if alias is None:
        try:
            alias = alias_by_settings(config)
        except ImproperlyConfigured:  # without Django's settings it is unknown which aliases exist
            alias = "default"
    if alias is None:
        similar = _similar_aliases(config.dsn or "")
        alias = similar[0] if len(similar) == 1 else "<alias>"
        if similar:
            names = " or ".join(map(repr, similar))
            steps.append(f"check that {names} in DATABASES is the database of CONFIG['dsn']")
        else:
            steps.append("add an alias to DATABASES for the database of CONFIG['dsn']")
    option = "" if alias == "default" else f" --database {alias}"
    run = f"run `python manage.py migrate pg_layer{option}`"
    return f"{', '.join(steps)}, and {run}" if steps else run
