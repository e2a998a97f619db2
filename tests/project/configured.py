"""Django's settings in the test's own process, for as long as a test needs them."""

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
    """`get_channel_layer()` returns `layer`, and Django has the settings `values`.

    Where Django had none before, this thread's connections to these databases are closed in the end.
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
        # What it read from the settings when it was first used.
        vars(connections).pop("settings", None)
        vars(connections)["_settings"] = None


@contextmanager
def _closing_connections() -> Iterator[None]:
    """Otherwise whoever asks for that alias next is given a connection to the database of another test."""
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
