"""The layers that are compared, each set up as its users run it well."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

#: For all layers the same, and large enough that none drops a message for lack of room.
CAPACITY = 10_000
EXPIRY = 60

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
    """``create`` runs in each process of its own; ``close`` gives the layer's connections back."""

    title: str
    server: str
    requires: str
    create: Callable[[str], Layer]
    close: Callable[[Layer], Awaitable[None]]

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


def _closer(name: str) -> Callable[[Layer], Awaitable[None]]:
    async def close(layer: Layer) -> None:
        await getattr(layer, name)()

    return close


KINDS: Mapping[str, LayerKind] = {
    "pg": LayerKind("pg_layer", "postgres", "pg_layer", _postgres, _closer("close")),
    "core": LayerKind("redis core", "redis", "channels_redis", _redis_core, _closer("close_pools")),
    "pubsub": LayerKind("redis pub/sub", "redis", "channels_redis", _redis_pubsub, _closer("flush")),
}


def configure_django(dsn: str | None) -> None:
    """Set Django up as a project with pg_layer would be; without a DSN, as one that has no database."""
    if settings.configured:
        return
    databases = {} if dsn is None else {"default": _database(dsn)}
    apps = [] if dsn is None else ["pg_layer"]
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
