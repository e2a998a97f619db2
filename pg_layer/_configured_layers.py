"""The entries of CHANNEL_LAYERS whose backend is of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from channels.layers import channel_layers
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from pg_layer._config.aliases import postgresql_aliases
from pg_layer._config.databases import alias_by_settings
from pg_layer._config.options import Config
from pg_layer._in_memory import InMemoryChannelLayer
from pg_layer.layer import PostgresChannelLayer


def is_pg_layer(entry: Any) -> bool:
    """Return whether an entry of CHANNEL_LAYERS has a backend of this package.

    An entry that is invalid in another way is not an error here: Channels reports it.
    """
    try:
        backend = import_string(entry["BACKEND"])
    except (ImportError, KeyError, TypeError, AttributeError):
        return False
    return isinstance(backend, type) and issubclass(backend, PostgresChannelLayer)


def has_database(layer: object) -> TypeGuard[PostgresChannelLayer]:
    """Return whether a layer is of this package, and not in memory."""
    return isinstance(layer, PostgresChannelLayer) and not isinstance(layer, InMemoryChannelLayer)


def aliases() -> list[str]:
    """Return the aliases of the entries that have a backend of this package, in their order."""
    return [alias for alias, entry in channel_layers.configs.items() if is_pg_layer(entry)]


def configurations() -> Iterator[tuple[str, Config | ImproperlyConfigured]]:
    """Yield the alias of each such entry, with its options or with the error in them.

    Layers in memory are left out, and an alias for which a test has set a layer of another class.
    """
    for alias in aliases():
        options = channel_layers.configs[alias].get("CONFIG", {})
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            kind = type(options).__name__
            yield (
                alias,
                ImproperlyConfigured(f"CONFIG must be a dict of options by name, not {kind}."),
            )
            continue
        try:
            layer = channel_layers[alias]
        except ImproperlyConfigured as error:
            yield alias, error
        else:
            if has_database(layer):
                yield alias, layer.config


def aliases_of_databases() -> list[str]:
    """Return the aliases in DATABASES of the layers' databases. Opens no connection."""
    found: dict[str, None] = {}
    for _, config in configurations():
        if isinstance(config, Config):
            alias = alias_by_settings(config)
            if alias in postgresql_aliases():
                found[alias] = None
    return list(found)
