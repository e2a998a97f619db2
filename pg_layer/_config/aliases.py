"""The aliases in DATABASES: which of them are PostgreSQL, and whether there are any."""

from __future__ import annotations

import os
from contextlib import suppress

from django.conf import ENVIRONMENT_VARIABLE, settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections


def has_settings() -> bool:
    """Return whether Django has settings in this process, or knows where to read them."""
    return bool(settings.configured or os.environ.get(ENVIRONMENT_VARIABLE))


def has_databases() -> bool:
    """Return whether Django has settings, with a database in DATABASES."""
    # Django itself adds the alias "default" if there are none.
    return has_settings() and any(
        database["ENGINE"] != "django.db.backends.dummy"
        for database in connections.settings.values()
    )


def require_settings(alias: str) -> None:
    """Raise `ImproperlyConfigured` if Django has no settings, and so no database ``alias``."""
    if not has_settings():
        raise ImproperlyConfigured(
            f"pg_layer: the database {alias!r} is an alias in DATABASES, and Django has no settings"
            " in this process. Set DJANGO_SETTINGS_MODULE and call django.setup(), or create the"
            " layer with a connection string: PostgresChannelLayer(dsn='postgresql://...')."
        )


def postgresql_aliases() -> list[str]:
    """Return the aliases in DATABASES of PostgreSQL databases. Opens no connection."""
    found = []
    for alias in connections:
        # An alias with an error of its own is of no use to the layer.
        with suppress(ImproperlyConfigured, ImportError):
            if connections[alias].vendor == "postgresql":
                found.append(alias)
    return found


def name_postgresql_aliases() -> str:
    """Return a sentence that names the aliases that the layer can use, for an error message."""
    aliases = postgresql_aliases()
    if not aliases:
        return "DATABASES has no alias of a PostgreSQL database."
    return f"The aliases of PostgreSQL databases are: {', '.join(map(repr, aliases))}."
