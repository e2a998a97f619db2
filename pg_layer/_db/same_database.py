"""The alias in DATABASES of the layer's database, by what the servers say of themselves.

Parameters of two connections may differ and lead to one database: `127.0.0.1` and `localhost`, a
socket, a service file, a pooler. The servers are asked only if the settings leave a doubt.
"""

from __future__ import annotations

from collections.abc import Hashable

from django.core.exceptions import ImproperlyConfigured
from django.utils.asyncio import async_unsafe

from pg_layer._config.aliases import name_postgresql_aliases, postgresql_aliases
from pg_layer._config.databases import alias_by_settings, places_of_aliases
from pg_layer._config.options import Config
from pg_layer._db.pool import connected_now
from pg_layer._db.queries.identity import identity
from pg_layer.exceptions import LayerUnavailable


def alias_of(config: Config) -> str:
    """Return the alias in DATABASES that leads to the layer's database.

    If no alias has the parameters of the layer's ``dsn``, open a connection to its database, and
    one to each PostgreSQL database in DATABASES, for a statement. A database that cannot be reached
    is not the layer's.

    Raises `ImproperlyConfigured` if no alias leads to the layer's database; `LayerUnavailable` if
    that database cannot be reached; Django's `SynchronousOnlyOperation` on the thread of a running
    event loop, instead of opening a connection.
    """
    alias = alias_by_settings(config)
    if alias is None:
        alias = _ask_servers(config)
    if alias is None:
        first = next(iter(postgresql_aliases()), "alias")
        raise ImproperlyConfigured(
            "pg_layer: no alias in DATABASES leads to the database and the search_path of"
            " CONFIG['dsn'], and layer.sync runs on one of Django's connections."
            f" {name_postgresql_aliases()} Set CONFIG['using'] to an alias instead of 'dsn', or"
            f" name one in the call: layer.sync.send(..., using={first!r})."
        )
    return alias


_found: dict[Hashable, str] = {}  # answers of the servers, by the settings for which they hold


def _ask_servers(config: Config) -> str | None:
    settings = (config.dsn, *places_of_aliases())
    alias = _found.get(settings) or _compare_servers(config)
    if alias is not None:
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
