"""The alias in DATABASES of the layer's database, by what the servers say of themselves.

Parameters of two connections may differ and lead to one database: `127.0.0.1` and `localhost`, a
socket, a service file, a pooler. The servers are asked only if the settings leave a doubt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable

from django.core.exceptions import ImproperlyConfigured
from django.utils.asyncio import async_unsafe

from pg_layer._config.aliases import name_postgresql_aliases, postgresql_aliases
from pg_layer._config.databases import alias_by_settings, places_of_aliases
from pg_layer._config.options import Config
from pg_layer._db.pool import connected_now
from pg_layer._db.queries.identity import identity
from pg_layer.exceptions import LayerUnavailable


def alias_of(config: Config, *, repeat_failure: float = 0.0) -> str:
    """Return the alias in DATABASES that leads to the layer's database.

    If no alias has the parameters of the layer's ``dsn``, open a connection to its database, and
    one to each PostgreSQL database in DATABASES, for a statement. A database that cannot be reached
    is not the layer's. ``repeat_failure``: seconds for which the servers are not asked again if
    that has found no alias.

    Raises `ImproperlyConfigured` if no alias leads to the layer's database; `LayerUnavailable` if
    that database cannot be reached; Django's `SynchronousOnlyOperation` on the thread of a running
    event loop, instead of opening a connection.
    """
    alias = alias_by_settings(config)
    if alias is None:
        alias = _ask_servers(config, repeat_failure)
    if alias is None:
        raise ImproperlyConfigured(
            "pg_layer: no alias in DATABASES leads to the database and the search_path of"
            " CONFIG['dsn'], and layer.sync runs on one of Django's connections."
            f" {name_postgresql_aliases()} Add an alias to DATABASES for the same database and"
            " search_path as in CONFIG['dsn']."
        )
    return alias


# Answers of the servers, by the settings for which they hold. Of a failure: its time by
# time.monotonic(), and the text of the error, if the layer's database could not be reached.
_found: dict[Hashable, str] = {}
_failures: dict[Hashable, tuple[float, str | None]] = {}


def _ask_servers(config: Config, repeat_failure: float) -> str | None:
    settings = (config.dsn, *places_of_aliases())
    if settings in _found:
        return _found[settings]
    failed_at, text = _failures.get(settings, (-math.inf, None))
    if time.monotonic() < failed_at + repeat_failure:
        if text is None:
            return None
        raise LayerUnavailable(text)
    try:
        alias = _compare_servers(config)
    except LayerUnavailable as error:
        _failures[settings] = time.monotonic(), str(error)
        raise
    if alias is None:
        _failures[settings] = time.monotonic(), None
    else:
        _found[settings] = alias
    return alias


@async_unsafe
def _compare_servers(config: Config) -> str | None:
    aliases = postgresql_aliases()
    if not aliases:
        return None
    with connected_now(config) as conn:
        wanted = identity(conn)
    for alias in aliases:
        try:
            with connected_now(Config(using=alias)) as conn:
                if identity(conn) == wanted:
                    return alias
        except (ImproperlyConfigured, LayerUnavailable):
            continue
    return None
