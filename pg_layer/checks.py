"""System checks, by id in docs/checks.md: of the settings, and of the database where one is named."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from channels.layers import channel_layers
from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.module_loading import import_string

from pg_layer._config.databases import alias_of, how_to_migrate
from pg_layer._config.dsn import without_secrets
from pg_layer._config.options import Config
from pg_layer._db.errors import is_forbidden
from pg_layer._db.pool import connected_now
from pg_layer._db.queries import access, maintenance
from pg_layer.exceptions import NotMigrated, PgLayerError
from pg_layer.layer import PostgresChannelLayer

DAY = 86400.0  # seconds
KEYS = ("BACKEND", "CONFIG", "TEST_CONFIG")  # what Channels reads of an entry


def register_checks() -> None:
    """Have Django run them."""
    register(check_settings)
    register(check_tenants)
    register(check_database, Tags.database)


def configs() -> Iterator[tuple[str, Config | ImproperlyConfigured]]:
    """The entries of CHANNEL_LAYERS that are ours: alias and options, or what is wrong with these."""
    for alias, entry in channel_layers.configs.items():
        if not is_ours(entry):
            continue
        options = entry.get("CONFIG", {})
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            kind = type(options).__name__
            yield (
                alias,
                ImproperlyConfigured(
                    f"CONFIG must be a dict of options by their names, not {kind}."
                ),
            )
            continue
        try:
            layer = channel_layers[alias]
        except ImproperlyConfigured as error:
            yield alias, error
        else:
            if isinstance(layer, PostgresChannelLayer):  # and not another that a test has set
                yield alias, layer.config


def is_ours(entry: Any) -> bool:
    """Whether an entry of CHANNEL_LAYERS is ours. What is wrong with one that is not, Channels says."""
    try:
        backend = import_string(entry["BACKEND"])
    except (ImportError, KeyError, TypeError, AttributeError):
        return False
    return isinstance(backend, type) and issubclass(backend, PostgresChannelLayer)


def _misspelt_backend(entry: Any) -> str | None:
    """The BACKEND of an entry that is not ours, if it is below this package."""
    backend = entry.get("BACKEND") if isinstance(entry, Mapping) else None
    return backend if isinstance(backend, str) and backend.partition(".")[0] == "pg_layer" else None


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Whether CHANNEL_LAYERS is sound. Connects to nothing."""
    found: list[CheckMessage] = []
    places: dict[tuple[str, ...], str] = {}
    for alias, entry in channel_layers.configs.items():
        if not is_ours(entry) and (misspelt := _misspelt_backend(entry)) is not None:
            found.append(
                Error(
                    f"BACKEND is no channel layer of pg_layer: {misspelt!r}.",
                    hint="Set it to 'pg_layer.PostgresChannelLayer'.",
                    obj=f"CHANNEL_LAYERS[{alias!r}]",
                    id="pg_layer.E003",
                )
            )
    for alias, config in configs():
        where = f"CHANNEL_LAYERS[{alias!r}]"
        unread = [repr(key) for key in channel_layers.configs[alias] if key not in KEYS]
        if unread:
            found.append(
                Warning(
                    f"It has keys that nobody reads: {', '.join(unread)}.",
                    hint="The layer's options stand in CONFIG. Beside it there are BACKEND and TEST_CONFIG.",
                    obj=where,
                    id="pg_layer.W005",
                )
            )
        if isinstance(config, ImproperlyConfigured):
            hint = 'The options are described in the README of pg_layer, under "Options".'
            found.append(Error(_text(config), hint=hint, obj=where, id="pg_layer.E001"))
            continue
        try:
            parameters = config.connect_kwargs("pool")
        except ImproperlyConfigured as error:
            hint = "Set 'using' in CONFIG to the alias of a PostgreSQL database, or 'dsn' to where it is."
            found.append(Error(_text(error), hint=hint, obj=where, id="pg_layer.E002"))
            continue
        place = (
            config.prefix,
            *(str(parameters.get(name) or "") for name in ("host", "port", "dbname")),
        )
        first = places.setdefault(place, alias)
        if first != alias:
            found.append(
                Warning(
                    f"It is the same layer as {first!r}: the same database, and the same prefix.",
                    hint="Give each a 'prefix' of its own in CONFIG.",
                    obj=where,
                    id="pg_layer.W003",
                )
            )
    return found


def check_tenants(**kwargs: Any) -> list[CheckMessage]:
    """Whether django-tenants is told to make the tables for each tenant."""
    public = getattr(settings, "PUBLIC_SCHEMA_NAME", "public")
    if getattr(settings, "HAS_MULTI_TYPE_TENANTS", False):
        kinds = getattr(settings, "TENANT_TYPES", {})
        lists = {
            f"TENANT_TYPES[{kind!r}]['APPS']": kinds[kind].get("APPS", ())
            for kind in kinds
            if kind != public
        }
        shared = f"TENANT_TYPES[{public!r}]['APPS']"
    else:
        lists = {"TENANT_APPS": getattr(settings, "TENANT_APPS", ())}
        shared = "SHARED_APPS"
    app = apps.get_app_config("pg_layer")
    names = {app.name, f"{type(app).__module__}.{type(app).__name__}"}
    wrong = [where for where, tenant_apps in lists.items() if not names.isdisjoint(tenant_apps)]
    if not wrong:
        return []
    return [
        Error(
            f"pg_layer is in {', '.join(wrong)}: each tenant has tables of its own. What layer.sync sends"
            " while a tenant is active goes to these, and is lost: receivers read the shared ones.",
            hint=f"Name pg_layer in {shared} alone: see docs/tenants.md.",
            id="pg_layer.E004",
        )
    ]


def check_database(databases: Collection[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Whether the tables are there and are swept, in these databases."""
    found = []
    for alias, config in configs():
        if not databases or not isinstance(config, Config):
            continue
        using = _alias_of(config)
        messages: list[CheckMessage] = []
        if using is not None:
            messages = list(_examine(config, using)) if using in databases else []
        elif config.dsn is not None and not _is_migrating():
            messages = [
                Warning(
                    f"No alias in DATABASES leads to the database of 'dsn' ({without_secrets(config.dsn)}):"
                    f" nothing is known of its tables. The aliases are {', '.join(connections)}.",
                    hint="Add one with the same host, port, name, service and search_path: migrate, check,"
                    " layer.sync and the admin find databases by their aliases.",
                    id="pg_layer.W006",
                )
            ]
        for message in messages:
            message.obj = f"CHANNEL_LAYERS[{alias!r}]"
            found.append(message)
    return found


def _examine(config: Config, using: str) -> Iterator[CheckMessage]:
    try:
        with connected_now(config) as conn:
            access.prove_usage(conn)
            maintenance.prove_tables(conn)
            if (fault := access.row_security(conn)) is not None:
                yield Warning(fault.text, hint=fault.advice, id="pg_layer.W007")
            if (fault := access.privileges(conn)) is not None:
                yield Warning(fault.text, hint=fault.advice, id="pg_layer.W008")
            unswept_for = maintenance.unswept_for(conn, config.prefix)
    except NotMigrated:
        # `migrate` runs this check before it creates the tables. Do not warn then.
        if not _is_migrating():
            advice = how_to_migrate(config, using)
            yield Warning(
                "The tables of pg_layer are missing or out of date.",
                hint=f"{advice[0].upper()}{advice[1:]}.",
                id="pg_layer.W001",
            )
        return
    except PgLayerError as error:
        hint = "See whether the database runs, and may be reached from here."
        if is_forbidden(error):
            hint = (
                "Grant the role what docs/permissions.md names for what it does; to check, as a role that"
                " only looks."
            )
        yield Warning(
            f"The tables of pg_layer could not be checked. {_text(error)}",
            hint=hint,
            id="pg_layer.W004",
        )
        return
    if unswept_for is not None and unswept_for > DAY:
        yield Warning(
            "Nobody has swept the tables of pg_layer for a day: they grow.",
            hint="Keep manage.py pg_layer_sweep running beside the servers.",
            id="pg_layer.W002",
        )


def _alias_of(config: Config) -> str | None:
    try:
        config.connect_kwargs("pool")
        return alias_of(config)
    except (
        ImproperlyConfigured
    ):  # `check_settings` tells why; or no alias leads to the database of its dsn
        return None


def _is_migrating() -> bool:
    return sys.argv[1:2] in (["migrate"], ["migrate_schemas"])  # the second one is django-tenants'


def _text(error: Exception) -> str:
    return " ".join(str(error).removeprefix("pg_layer: ").split())
