"""System checks of the settings and of the layer's tables: see docs/reference/checks.md."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from channels.layers import channel_layers
from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured

from pg_layer._config.aliases import name_postgresql_aliases, postgresql_aliases
from pg_layer._config.databases import how_to_migrate
from pg_layer._config.dsn import without_secrets
from pg_layer._config.options import Config
from pg_layer._configured_layers import configurations, is_pg_layer
from pg_layer._db.errors import is_forbidden, is_permanent
from pg_layer._db.pool import connected_now
from pg_layer._db.queries import access, maintenance
from pg_layer._db.same_database import alias_of
from pg_layer.exceptions import NotMigrated, PgLayerError

DAY = 86400.0  # seconds
ENTRY_KEYS = ("BACKEND", "CONFIG", "TEST_CONFIG")  # the keys of an entry that Channels reads


def register_checks() -> None:
    """Register the checks with Django."""
    register(check_settings)
    register(check_tenants)
    register(check_psycopg2)
    register(check_database, Tags.database)


# ---------------------------------------------------------------------- settings


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check CHANNEL_LAYERS. Opens no connection."""
    found = list(_check_backends())
    aliases: dict[tuple[str, ...], str] = {}  # database and prefix -> the first alias
    for alias, config in configurations():
        where = f"CHANNEL_LAYERS[{alias!r}]"
        found += _check_keys(alias, where)
        if isinstance(config, ImproperlyConfigured):
            hint = "docs/reference/options.md describes all options."
            found.append(Error(_one_line(config), hint=hint, obj=where, id="pg_layer.E001"))
            continue
        try:
            first = aliases.setdefault(_parameters(config), alias)
        except ImproperlyConfigured as error:
            found.append(_without_database(error, where))
            continue
        if first != alias:
            found.append(_same_layer(first, where))
    return found


def _parameters(config: Config) -> tuple[str, ...]:
    """Return values that are equal if two layers are one, as far as the settings determine it."""
    parameters = config.connect_kwargs("pool")
    return config.prefix, *(str(parameters.get(name) or "") for name in ("host", "port", "dbname"))


def _without_database(error: ImproperlyConfigured, where: str) -> CheckMessage:
    """Return an error, or in debug mode a warning for a project without PostgreSQL."""
    hint = "Set 'using' in CONFIG to the alias of a PostgreSQL database, or set 'dsn'."
    if settings.DEBUG and not postgresql_aliases():
        hint += " To work without one: BACKEND 'pg_layer.testing.InMemoryChannelLayer'."
        return Warning(_one_line(error), hint=hint, obj=where, id="pg_layer.W010")
    return Error(_one_line(error), hint=hint, obj=where, id="pg_layer.E002")


def _same_layer(first: str, where: str | None = None) -> Warning:
    return Warning(
        f"It is the same layer as {first!r}: the same database and the same prefix.",
        hint="Give each layer its own 'prefix' in CONFIG.",
        obj=where,
        id="pg_layer.W003",
    )


def _check_backends() -> Iterator[CheckMessage]:
    """Find backends in this package that are not channel layers, or do not exist."""
    for alias, entry in channel_layers.configs.items():
        backend = entry.get("BACKEND") if isinstance(entry, Mapping) else None
        if (
            isinstance(backend, str)
            and backend.partition(".")[0] == "pg_layer"
            and not is_pg_layer(entry)
        ):
            yield Error(
                f"BACKEND is not a channel layer of pg_layer: {backend!r}.",
                hint="Set it to 'pg_layer.PostgresChannelLayer'.",
                obj=f"CHANNEL_LAYERS[{alias!r}]",
                id="pg_layer.E003",
            )


def _check_keys(alias: str, where: str) -> Iterator[CheckMessage]:
    """Find keys of an entry that Channels ignores."""
    unread = [repr(key) for key in channel_layers.configs[alias] if key not in ENTRY_KEYS]
    if unread:
        yield Warning(
            f"Channels ignores these keys: {', '.join(unread)}.",
            hint="Options belong in CONFIG. The other allowed keys are BACKEND and TEST_CONFIG.",
            obj=where,
            id="pg_layer.W005",
        )


def check_tenants(**kwargs: Any) -> list[CheckMessage]:
    """Check that django-tenants does not create the tables for each tenant."""
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
            f"pg_layer is in {', '.join(wrong)}, so each tenant has its own tables. Messages that"
            " layer.sync sends while a tenant is active go to these tables and are lost, because"
            " receivers read the shared ones.",
            hint=f"Name pg_layer in {shared} only: see docs/how-to/tenants.md.",
            id="pg_layer.E004",
        )
    ]


def check_psycopg2(**kwargs: Any) -> list[CheckMessage]:
    """Check that no code has imported psycopg2 where Django's connections are of psycopg 3."""
    if "psycopg2" not in sys.modules or not postgresql_aliases():
        return []
    return [
        Warning(
            "psycopg2 is imported in this process, and Django uses psycopg 3, which pg_layer"
            " requires: Django prefers it if both are installed. Code fails that gives Django's"
            " connections or cursors to psycopg2, puts values of psycopg2.extras into queries, or"
            " expects errors of psycopg2.",
            hint="Change this code to psycopg 3, for example psycopg2.extras.Json to"
            " psycopg.types.json.Json, and uninstall psycopg2. If psycopg2 is only used for"
            " connections of its own, silence this check.",
            id="pg_layer.W009",
        )
    ]


# ---------------------------------------------------------------------- databases


def check_database(databases: Collection[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check that the tables exist in these databases, are swept and can be used by the role."""
    found = []
    firsts: dict[tuple[str, str], tuple[str, Config]] = {}  # by prefix and alias of the database
    for alias, config in configurations():
        if not databases or not isinstance(config, Config) or not _is_usable(config):
            continue
        try:
            using = alias_of(config)
        except ImproperlyConfigured:
            messages = list(_check_without_alias(config))
        except PgLayerError as error:
            messages = [_unchecked(error, config)]
        else:
            messages = list(_check_tables(config, using)) if using in databases else []
            first, its_config = firsts.setdefault((config.prefix, using), (alias, config))
            # If the settings determine it, `check_settings` reports it.
            if first != alias and _parameters(config) != _parameters(its_config):
                messages.append(_same_layer(first))
        for message in messages:
            message.obj = f"CHANNEL_LAYERS[{alias!r}]"
            found.append(message)
    return found


def _is_usable(config: Config) -> bool:
    """Return whether the layer's database can be used; `check_settings` reports if not."""
    try:
        config.connect_kwargs("pool")
    except ImproperlyConfigured:
        return False
    return True


def _check_without_alias(config: Config) -> Iterator[CheckMessage]:
    if not _is_migrating():
        yield Warning(
            "No alias in DATABASES leads to the database of 'dsn'"
            f" ({without_secrets(config.dsn or '')}), so its tables cannot be checked."
            f" {name_postgresql_aliases()}",
            hint="Add an alias for the same database and search_path:"
            " migrate, check, layer.sync and the admin find databases by alias.",
            id="pg_layer.W006",
        )


def _check_tables(config: Config, using: str) -> Iterator[CheckMessage]:
    try:
        with connected_now(config) as conn:
            access.prove_usage(conn)
            maintenance.prove_tables(conn)
            if (problem := access.row_security(conn)) is not None:
                yield Warning(problem.text, hint=problem.advice, id="pg_layer.W007")
            if (problem := access.privileges(conn)) is not None:
                yield Warning(problem.text, hint=problem.advice, id="pg_layer.W008")
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
        yield _unchecked(error, config)
        return
    if unswept_for is not None and unswept_for > DAY:
        yield Warning(
            "The tables of pg_layer have not been swept for a day. They grow without a sweep.",
            hint="Keep manage.py pg_layer_sweep running beside the servers.",
            id="pg_layer.W002",
        )


def _unchecked(error: PgLayerError, config: Config) -> Warning:
    where = "CONFIG['dsn']" if config.using is None else f"DATABASES[{config.using!r}]"
    hint = f"Check that the database of {where} runs and can be reached from this machine."
    if is_permanent(error.__cause__):
        hint = f"Check the user, the password and the name of the database in {where}."
    elif is_forbidden(error):
        hint = (
            "Grant the role what docs/reference/permissions.md names for its use of the layer;"
            " to run the check, as a role that only looks."
        )
    return Warning(
        f"The tables of pg_layer could not be checked. {_one_line(error)}",
        hint=hint,
        id="pg_layer.W004",
    )


def _is_migrating() -> bool:
    return sys.argv[1:2] in (["migrate"], ["migrate_schemas"])  # the second is of django-tenants


def _one_line(error: Exception) -> str:
    return " ".join(str(error).removeprefix("pg_layer: ").split())
