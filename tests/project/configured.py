"""Django's settings in the test's process, for the duration of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from channels.layers import BaseChannelLayer, channel_layers
from django.conf import settings
from django.db import connections
from django.test.utils import override_settings
from django.utils.functional import empty


@contextmanager
def configured(layer: BaseChannelLayer, **values: Any) -> Iterator[None]:
    """Give Django the settings `values`; `get_channel_layer()` returns `layer`.

    If Django had no settings before, this thread's database connections are closed at the end.
    """
    values = {"CHANNEL_LAYERS": {"default": {"BACKEND": "pg_layer.PostgresChannelLayer"}}, **values}
    if settings.configured:
        with override_settings(**values), _set(layer):
            yield
        return
    settings.configure(**values)
    try:
        with _set(layer), _closing_connections():
            yield
    finally:
        settings._wrapped = empty
        # It caches the settings at its first use.
        vars(connections).pop("settings", None)
        vars(connections)["_settings"] = None


@contextmanager
def _closing_connections() -> Iterator[None]:
    """Close connections, so that the next test does not get one to this test's database."""
    try:
        yield
    finally:
        for connection in connections.all(initialized_only=True):
            del connections[connection.alias]
            connection.close()


@contextmanager
def _set(layer: BaseChannelLayer) -> Iterator[None]:
    before = dict(channel_layers.backends)
    channel_layers.set("default", layer)
    try:
        yield
    finally:
        channel_layers.backends = before
