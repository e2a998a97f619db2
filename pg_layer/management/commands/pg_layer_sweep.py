from __future__ import annotations

import argparse
import math
import signal
import threading
from typing import Any

from channels import DEFAULT_CHANNEL_LAYER
from channels.layers import channel_layers
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from pg_layer.config import MAX_COUNT
from pg_layer.exceptions import PgLayerError
from pg_layer.layer import PostgresChannelLayer
from pg_layer.ops import MAX_SECONDS
from pg_layer.store import Swept
from pg_layer.sweeper import Sweeper


class Command(BaseCommand):
    help = (
        "Removes expired messages and memberships, and what processes left that ended without taking leave. "
        "Runs until SIGTERM or SIGINT. Several at once do no harm; only the size of the tables depends on it."
    )
    # Runs where the tables may not be migrated yet, and touches no models.
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="Sweep once, and end.")
        parser.add_argument(
            "--interval", type=_seconds, default=15.0, help="Seconds between two sweeps (default: 15)."
        )
        parser.add_argument(
            "--layer", default=DEFAULT_CHANNEL_LAYER, help="The alias in CHANNEL_LAYERS (default: default)."
        )
        parser.add_argument(
            "--batch-size", type=_count, default=1000, help="Rows removed by one statement (default: 1000)."
        )
        parser.add_argument("--dry-run", action="store_true", help="Say what would be removed, and end.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            self._begin(options)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error

    def _begin(self, options: dict[str, Any]) -> None:
        config = self._layer(options["layer"]).config
        self._verbosity = options["verbosity"]
        with Sweeper(config, options["batch_size"], self._report, self._complain) as sweeper:
            self._sweep(sweeper, options)

    def _sweep(self, sweeper: Sweeper, options: dict[str, Any]) -> None:
        try:
            if options["dry_run"]:
                self.stdout.write(f"Would remove {_counts(sweeper.look())}.")
            elif options["once"]:
                if self._verbosity:
                    self.stdout.write(f"Removed {_counts(sweeper.run_once())}.")
                else:
                    sweeper.run_once()
            else:
                self._run(sweeper, options["interval"])
        except PgLayerError as error:
            raise CommandError(str(error)) from error

    def _layer(self, alias: str) -> PostgresChannelLayer:
        if alias not in channel_layers:
            raise CommandError(f"There is no channel layer {alias!r} in CHANNEL_LAYERS.")
        layer = channel_layers[alias]
        if not isinstance(layer, PostgresChannelLayer):
            raise CommandError(f"The channel layer {alias!r} is no pg_layer.PostgresChannelLayer.")
        return layer

    def _run(self, sweeper: Sweeper, interval: float) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: sweeper.stop())
        if self._verbosity:
            self.stdout.write(f"Sweeping every {interval:g} seconds.")
        sweeper.run(interval)
        if self._verbosity:
            self.stdout.write("Stopped.")

    def _report(self, swept: Swept) -> None:
        if self._verbosity > 1 or (swept and self._verbosity):
            self.stdout.write(f"Removed {_counts(swept)}.")

    def _complain(self, error: Exception) -> None:
        self.stderr.write(f"Could not sweep, trying again: {' '.join(str(error).split())}")


def _counts(swept: Swept) -> str:
    return f"{swept.messages} messages, {swept.memberships} memberships, {swept.clients} clients"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return value
