"""The base of the management commands."""

from __future__ import annotations

import argparse
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from channels import DEFAULT_CHANNEL_LAYER
from channels.layers import channel_layers
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from pg_layer._config.options import MAX_COUNT, MAX_SECONDS, Config
from pg_layer._configured_layers import has_database
from pg_layer.exceptions import PgLayerError
from pg_layer.layer import PostgresChannelLayer

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LayerCommand(BaseCommand):
    """A command for the layer that ``--layer`` names. Subclasses implement `begin`.

    An invalid configuration and a database that cannot be reached raise `CommandError`.
    """

    # The command uses no models, and the tables may not be migrated yet.
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--layer",
            default=DEFAULT_CHANNEL_LAYER,
            help="The alias in CHANNEL_LAYERS (default: default).",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            self.begin(_find_layer(options["layer"]).config, options)
        except (ImproperlyConfigured, PgLayerError) as error:
            raise CommandError(str(error)) from error

    def begin(self, config: Config, options: dict[str, Any]) -> None:
        """Run the command for a layer with these options of CONFIG."""
        raise NotImplementedError


def _find_layer(alias: str) -> PostgresChannelLayer:
    if alias not in channel_layers:
        raise CommandError(f"CHANNEL_LAYERS has no channel layer {alias!r}.")
    layer = channel_layers[alias]
    if not has_database(layer):
        raise CommandError(f"The channel layer {alias!r} is not a pg_layer.PostgresChannelLayer.")
    return layer


@contextmanager
def ended_by_signals(stop: Callable[[], object], ringer: socket.socket) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT, and write to ``ringer``. On the main thread only.

    Python runs no handler while it waits, and a signal that arrives just before a wait does not end
    it. So the caller must also wait for the other end of the ringer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ringer.setblocking(False)
    fd_before = signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    before: dict[signal.Signals, Any] = {}
    try:
        for number in END_SIGNALS:
            before[number] = signal.signal(number, lambda *_: stop())
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def seconds(text: str) -> float:
    """Parse an argument that is a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def count(text: str) -> int:
    """Parse an argument that is an integer from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 on")
    return value
