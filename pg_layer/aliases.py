"""Which alias in DATABASES leads to the layer's database, and what to do where the tables are missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from pg_layer.config import Config
from pg_layer.dsn import parsed
from pg_layer.exceptions import NotMigrated


def alias_of(config: Config) -> str:
    """The alias in DATABASES that leads to the layer's database.

    Raises `ImproperlyConfigured` if that was given by ``dsn``, and none does.
    """
    if config.dsn is None:
        return config.using or "default"
    place = _place(parsed(config.dsn))
    for alias in connections:
        with suppress(ImproperlyConfigured, ImportError):  # that alias is wrong by itself
            wrapper = connections[alias]
            if wrapper.vendor == "postgresql" and _place(wrapper.get_connection_params()) == place:
                return alias
    raise ImproperlyConfigured(
        "pg_layer: layer.sync runs on one of Django's own connections, and no alias in DATABASES leads to "
        "the database of CONFIG['dsn']. Set CONFIG['using'] to an alias instead of 'dsn', or name one in the "
        "call: layer.sync.send(..., using='default')."
    )


def _place(parameters: Mapping[str, Any]) -> tuple[str, str, str]:
    """Host, port and name of a database."""
    environ = os.environ
    host = parameters.get("host") or parameters.get("hostaddr") or environ.get("PGHOST") or ""
    port = parameters.get("port") or environ.get("PGPORT") or "5432"
    user = parameters.get("user") or environ.get("PGUSER") or ""
    return (str(host), str(port), str(parameters.get("dbname") or environ.get("PGDATABASE") or user))


def not_migrated(config: Config, alias: str | None = None) -> NotMigrated:
    """`NotMigrated` that says how to make the tables. ``alias``: of the database, if not that of `config`."""
    return NotMigrated(f"The tables of pg_layer are missing or out of date: {how_to_migrate(config, alias)}.")


def how_to_migrate(config: Config, alias: str | None = None) -> str:
    """What to do to have the tables made, as the rest of a sentence."""
    steps = []
    if apps.ready and not apps.is_installed("pg_layer"):
        steps.append('add "pg_layer" to INSTALLED_APPS')
    try:
        alias = alias or alias_of(config)
    except ImproperlyConfigured:
        if apps.ready:
            steps.append("add an alias to DATABASES for the database of CONFIG['dsn']")
            alias = "<alias>"
        else:  # without Django's settings nothing is known of aliases, not even that there is none
            alias = "default"
    option = "" if alias == "default" else f" --database {alias}"
    run = f"run `python manage.py migrate pg_layer{option}`"
    return f"{', '.join(steps)}, and {run}" if steps else run
