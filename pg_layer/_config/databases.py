"""The layer's database in DATABASES: its alias, its name, and how to create its tables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from pg_layer._config.dsn import parsed
from pg_layer._config.options import Config
from pg_layer.exceptions import NotMigrated


def alias_of(config: Config) -> str:
    """Return the alias in DATABASES that leads to the layer's database.

    Raises `ImproperlyConfigured` if the layer has a ``dsn`` and no alias leads to its database.
    """
    if config.dsn is None:
        return config.using or "default"
    place = _place(parsed(config.dsn))
    for alias in connections:
        # An alias with an error of its own does not lead to the database.
        with suppress(ImproperlyConfigured, ImportError):
            wrapper = connections[alias]
            if wrapper.vendor == "postgresql" and _place(wrapper.get_connection_params()) == place:
                return alias
    raise ImproperlyConfigured(
        "pg_layer: layer.sync runs on one of Django's connections, and no alias in DATABASES leads "
        "to the database of CONFIG['dsn']: the same host, port, name, service and search_path. "
        "Set CONFIG['using'] to an alias instead of 'dsn', or name one in the call: "
        "layer.sync.send(..., using='default')."
    )


def settings_of(config: Config) -> Mapping[str, Any]:
    """Return Django's settings of the layer's database; empty for a layer with a ``dsn``.

    When Django creates or destroys a test database, it changes NAME in this dict.
    """
    settings: Mapping[str, Any] = {} if config.using is None else connections.settings[config.using]
    return settings


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
    try:
        alias = alias or alias_of(config)
    except ImproperlyConfigured:
        if apps.ready:
            steps.append("add an alias to DATABASES for the database of CONFIG['dsn']")
            alias = "<alias>"
        else:  # without Django's settings it is unknown which aliases exist
            alias = "default"
    option = "" if alias == "default" else f" --database {alias}"
    run = f"run `python manage.py migrate pg_layer{option}`"
    return f"{', '.join(steps)}, and {run}" if steps else run
