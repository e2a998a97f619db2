"""The layers that are compared, each set up as its users run it well."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import django
from channels.layers import InMemoryChannelLayer
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

#: For all layers the same, and large enough that none drops a message for lack of room.
CAPACITY = 10_000
EXPIRY = 60

#: How pg_layer writes, and what is measured without a layer.
LAZY = "synchronous_commit off (taking jobs: on)"

#: redis-py 8 turns "no limit" into 100 connections.
_UNLIMITED = 10_000


class Layer(Protocol):
    """What Channels asks of a layer."""

    async def send(self, channel: str, message: dict[str, Any]) -> None: ...
    async def receive(self, channel: str) -> dict[str, Any]: ...
    async def new_channel(self) -> str: ...
    async def group_add(self, group: str, channel: str) -> None: ...
    async def group_discard(self, group: str, channel: str) -> None: ...
    async def group_send(self, group: str, message: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LayerSpec:
    """Which layer, and the address (DSN or URL) of the server behind it.

    ``database`` is the DSN of the application's own database, if there is one: pgbench's tables are there.
    """

    name: str
    address: str
    database: str | None = None


@dataclass(frozen=True)
class LayerKind:
    """``create`` runs in each process of its own; ``close`` gives the layer's connections back.

    ``server``: what it needs one of, "" for none; ``app``: the Django app whose migrations make its tables;
    ``schema``: the SQL that makes them where there is no such app. ``played``: by processes of their own, by
    tasks of one event loop around one layer, or with the scenario's bare roles and no layer at all.
    ``durability``: how far its writes are safe, "" if that is the server's affair.
    """

    title: str
    server: Literal["postgres", "redis", ""]
    requires: str
    create: Callable[[str], Layer]
    close: Callable[[Layer], Awaitable[None]]
    app: str = ""
    schema: Path | None = None
    played: Literal["in processes", "in one loop", "bare"] = "in processes"
    durability: str = ""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.requires) is not None


def _postgres(dsn: str) -> Layer:
    module = importlib.import_module("pg_layer")
    return cast(Layer, module.PostgresChannelLayer(dsn=dsn, capacity=CAPACITY, expiry=EXPIRY))


def _redis_options(url: str) -> dict[str, Any]:
    # redis-py 8 gives a read 5 s, which ends the wait of an idle consumer, and a pool 100 connections.
    host = {"address": url, "socket_timeout": None, "max_connections": _UNLIMITED}
    return {"hosts": [host], "capacity": CAPACITY, "expiry": EXPIRY}


def _redis_core(url: str) -> Layer:
    module = importlib.import_module("channels_redis.core")
    return cast(Layer, module.RedisChannelLayer(**_redis_options(url)))


def _redis_pubsub(url: str) -> Layer:
    module = importlib.import_module("channels_redis.pubsub")
    # It has neither capacity nor expiry and ignores both.
    return cast(Layer, module.RedisPubSubChannelLayer(**_redis_options(url)))


def _channels_postgres(dsn: str) -> Layer:
    module = importlib.import_module("channels_postgres.core")
    # Its README's CONFIG, pool included, and TIME_ZONE: Django's connection wrapper, which it builds from
    # this, looks that up where USE_TZ is on. The layer knows no capacity.
    config = {
        **_database(dsn),
        "TIME_ZONE": None,
        "PSYCOPG_OPTIONS": {"min_size": 10, "max_size": 10},
    }
    return cast(Layer, module.PostgresChannelLayer(**config, expiry=EXPIRY))


async def _close_channels_postgres(layer: Layer) -> None:
    # The pool belongs to the module: the layer has nothing to close it with.
    pool = importlib.import_module("channels_postgres.db").connection_pool
    if pool is not None:
        await pool.close()


def _memory(address: str) -> Layer:
    return cast(Layer, InMemoryChannelLayer(capacity=CAPACITY, expiry=EXPIRY))


def _no_layer(dsn: str) -> Layer:
    return cast(Layer, object())  # bare roles connect by themselves, and never touch it


async def _close_nothing(layer: Layer) -> None:
    pass


def _closer(name: str) -> Callable[[Layer], Awaitable[None]]:
    async def close(layer: Layer) -> None:
        await getattr(layer, name)()

    return close


KINDS: Mapping[str, LayerKind] = {
    "pg": LayerKind(
        "pg_layer",
        "postgres",
        "pg_layer",
        _postgres,
        _closer("close"),
        app="pg_layer",
        durability=LAZY,
    ),
    "core": LayerKind("redis core", "redis", "channels_redis", _redis_core, _closer("close_pools")),
    "pubsub": LayerKind(
        "redis pub/sub", "redis", "channels_redis", _redis_pubsub, _closer("flush")
    ),
    "postgres": LayerKind(
        "channels_postgres",
        "postgres",
        "channels_postgres",
        _channels_postgres,
        _close_channels_postgres,
        app="channels_postgres",
    ),
    "memory": LayerKind(
        "in memory",
        "",
        "channels",
        _memory,
        _closer("close"),
        played="in one loop",
        durability="no persistence",
    ),
    "bare": LayerKind(
        "bare psycopg",
        "postgres",
        "psycopg",
        _no_layer,
        _close_nothing,
        schema=Path(__file__).with_name("bare.sql"),
        played="bare",
        durability=LAZY,
    ),
}

#: channels_postgres reads and writes through Django under an alias of its own, beside its pool.
_ALIASES = {"pg_layer": ["default"], "channels_postgres": ["default", "channels_postgres"]}


def configure_django(dsn: str | None, app: str = "pg_layer") -> None:
    """Set Django up as a project with this layer would be; without a DSN, as one that has no database."""
    if settings.configured:
        return
    databases = {} if dsn is None else {alias: _database(dsn) for alias in _ALIASES[app]}
    apps = [] if dsn is None else [app]
    settings.configure(DATABASES=databases, INSTALLED_APPS=apps, USE_TZ=True)
    django.setup()


def _database(dsn: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(conninfo_to_dict(dsn))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": options.pop("dbname", ""),
        "USER": options.pop("user", ""),
        "PASSWORD": options.pop("password", ""),
        "HOST": options.pop("host", ""),
        "PORT": options.pop("port", ""),
        "OPTIONS": options,
    }
