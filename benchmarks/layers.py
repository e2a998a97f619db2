"""The layers of the comparison, each configured as its users run it."""

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

#: The same for all layers, and large enough that none drops a message because of it.
CAPACITY = 10_000
EXPIRY = 60

#: The durability of pg_layer's writes and of the bare measurements.
LAZY = "synchronous_commit off (taking jobs: on)"

#: redis-py 8 turns "no limit" into 100 connections.
_UNLIMITED = 10_000


class Layer(Protocol):
    """The methods of a channel layer that the scenarios call."""

    async def send(self, channel: str, message: dict[str, Any]) -> None: ...
    async def receive(self, channel: str) -> dict[str, Any]: ...
    async def new_channel(self) -> str: ...
    async def group_add(self, group: str, channel: str) -> None: ...
    async def group_discard(self, group: str, channel: str) -> None: ...
    async def group_send(self, group: str, message: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LayerSpec:
    """A layer and the address (DSN or URL) of its server.

    ``database`` is the DSN of the application's database with pgbench's tables, if there is one.
    """

    name: str
    address: str
    database: str | None = None


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer. ``create`` runs in each process; ``close`` closes its connections.

    ``server``: the kind of server that it needs, "" for none. ``app``: the Django app whose
    migrations create its tables. ``schema``: the SQL that creates them without such an app.
    ``played``: by separate processes, by tasks of one event loop around one layer, or with the
    scenario's bare roles and no layer. ``durability``: how durable its writes are, "" if the server
    decides.
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
    # redis-py 8 limits a read to 5 s, which ends the wait of an idle consumer, and a pool to 100
    # connections.
    host = {"address": url, "socket_timeout": None, "max_connections": _UNLIMITED}
    return {"hosts": [host], "capacity": CAPACITY, "expiry": EXPIRY}


def _redis_core(url: str) -> Layer:
    module = importlib.import_module("channels_redis.core")
    return cast(Layer, module.RedisChannelLayer(**_redis_options(url)))


def _redis_pubsub(url: str) -> Layer:
    module = importlib.import_module("channels_redis.pubsub")
    # It ignores capacity and expiry.
    return cast(Layer, module.RedisPubSubChannelLayer(**_redis_options(url)))


def _channels_postgres(dsn: str) -> Layer:
    module = importlib.import_module("channels_postgres.core")
    # The CONFIG of its README with the pool, and TIME_ZONE: Django's connection wrapper, which it
    # builds from CONFIG, reads that with USE_TZ. The layer has no capacity.
    config = {
        **_database(dsn),
        "TIME_ZONE": None,
        "PSYCOPG_OPTIONS": {"min_size": 10, "max_size": 10},
    }
    return cast(Layer, module.PostgresChannelLayer(**config, expiry=EXPIRY))


async def _close_channels_postgres(layer: Layer) -> None:
    # The pool belongs to the module; the layer has no method to close it.
    pool = importlib.import_module("channels_postgres.db").connection_pool
    if pool is not None:
        await pool.close()


def _memory(address: str) -> Layer:
    return cast(Layer, InMemoryChannelLayer(capacity=CAPACITY, expiry=EXPIRY))


def _no_layer(dsn: str) -> Layer:
    return cast(Layer, object())  # bare roles connect themselves and do not use it


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

#: channels_postgres also reads and writes through Django, under its own alias beside its pool.
_ALIASES = {"pg_layer": ["default"], "channels_postgres": ["default", "channels_postgres"]}


def configure_django(dsn: str | None, app: str = "pg_layer") -> None:
    """Set up Django for a project with this layer; without a DSN, with no database."""
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
