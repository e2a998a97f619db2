from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from pg_layer._config.options import Config
from pg_layer._db.errors import is_permanent
from pg_layer._db.queries.maintenance import Swept
from pg_layer._maintenance.sweeper import Sweeper
from pg_layer.management.commands._layer import LayerCommand, count, ended_by_signals, seconds


class Command(LayerCommand):
    help = (
        "Removes expired messages, and memberships of processes that ended without closing their "
        "layer. Runs until SIGTERM or SIGINT. Several may run at once. Only the size of the tables "
        "depends on it."
    )

    _is_failing = False  # the last sweep has failed

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--once", action="store_true", help="Sweep once, then exit.")
        parser.add_argument(
            "--interval",
            type=seconds,
            default=15.0,
            help="Seconds between two sweeps (default: 15).",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=1000,
            help="The approximate number of rows that one statement removes (default: 1000).",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Print the numbers of rows that would be removed, then exit.",
        )

    def begin(self, config: Config, options: dict[str, Any]) -> None:
        self._verbosity = options["verbosity"]
        with Sweeper(config, options["batch_size"], self._report, self._complain) as sweeper:
            if options["dry_run"]:
                self.stdout.write(f"Would remove {_counts(sweeper.look())}.")
            elif options["once"]:
                swept = sweeper.run_once()
                if self._verbosity:
                    self._say(f"Removed {_counts(swept)}.")
            else:
                self._run(sweeper, options["interval"])

    def _run(self, sweeper: Sweeper, interval: float) -> None:
        with ended_by_signals(sweeper.stop, sweeper.ringer):
            if self._verbosity:
                self._say(f"Sweeping every {interval:g} seconds.")
            sweeper.run(interval)
        if self._verbosity:
            self._say("Stopped.")

    def _report(self, swept: Swept) -> None:
        if self._is_failing:
            self._is_failing = False
            self.stderr.write("The sweep works again.")
        if self._verbosity > 1 or (swept and self._verbosity):
            self._say(f"Removed {_counts(swept)}.")

    def _complain(self, error: Exception) -> None:
        self._is_failing = True
        advice = " Check the settings of the database." if is_permanent(error.__cause__) else ""
        reason = " ".join(str(error).split())
        self.stderr.write(f"The sweep failed and will be repeated: {reason}{advice}")

    def _say(self, line: str) -> None:
        """Print a line at once, also if the output is a pipe or a file."""
        self.stdout.write(line)
        self.stdout.flush()


def _counts(swept: Swept) -> str:
    return f"{swept.messages} messages, {swept.memberships} memberships, {swept.clients} clients"
