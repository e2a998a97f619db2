from __future__ import annotations

import json
import select
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from django.core.management.base import CommandError, CommandParser

from pg_layer._config.options import Config
from pg_layer._db.errors import is_forbidden
from pg_layer._db.pool import are_named, connected_now
from pg_layer._db.queries import access, maintenance
from pg_layer._maintenance import status_text as _status_text
from pg_layer._state.status import Problem, Status
from pg_layer.exceptions import PgLayerError
from pg_layer.management.commands._layer import LayerCommand, count, ended_by_signals, seconds

CLEAR = "\x1b[H\x1b[2J"


class Command(LayerCommand):
    help = (
        "Shows the problems of a channel layer, its clients, groups and channels with a backlog, "
        "the messages that were dropped, its tables, NOTIFY's queue and the last sweep. "
        "Exits with status 1 if there are problems."
    )

    _is_in_shell = False

    def run_from_argv(self, argv: list[str]) -> None:
        self._is_in_shell = True
        super().run_from_argv(argv)

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--json", action="store_true", help="Print a JSON object.")
        parser.add_argument(
            "--watch",
            type=seconds,
            nargs="?",
            const=2.0,
            metavar="SECONDS",
            help="Repeat every SECONDS (default: 2), until SIGTERM or SIGINT.",
        )
        parser.add_argument(
            "--top",
            type=count,
            default=10,
            metavar="N",
            help="The number of clients, groups and channels to list (default: 10).",
        )
        parser.add_argument(
            "--sweep-age",
            type=seconds,
            default=1200.0,
            metavar="SECONDS",
            help="The largest allowed age of the last sweep (default: 1200).",
        )

    def begin(self, config: Config, options: dict[str, Any]) -> None:
        show = self._show_json if options["json"] else self._show_text
        if options["watch"] is not None:
            self._watch(config, options, show)
        elif problems := self._show_status(config, options, show):
            if self._is_in_shell:
                sys.exit(1)  # the problems have been shown
            raise CommandError("; ".join(problems), returncode=1)

    def _watch(self, config: Config, options: dict[str, Any], show: Callable[..., None]) -> None:
        bell, ringer = socket.socketpair()
        with bell, ringer, suppress(KeyboardInterrupt), ended_by_signals(_interrupt, ringer):
            is_over = False
            while not is_over:
                self._show_status(config, options, show)
                self.stdout.flush()
                is_over = bool(select.select([bell], [], [], options["watch"])[0])

    def _show_status(
        self, config: Config, options: dict[str, Any], show: Callable[..., None]
    ) -> list[str]:
        """Query the status and show it. Return the problems."""
        status, problems = self._query_status(config, options)
        show(status, problems, options)
        return problems

    def _query_status(
        self, config: Config, options: dict[str, Any]
    ) -> tuple[Status | None, list[str]]:
        """Return the status and the problems; None if the database does not tell its status.

        The connection is gone before anything is shown. A signal often follows what is shown, and
        its exception must not meet the connection's finaliser, in which Python ignores it.
        """
        role_problems: list[Problem] = []
        try:
            with connected_now(config) as conn:
                role_problems = access.role_problems(conn)
                status = maintenance.status(
                    conn,
                    config.prefix,
                    options["top"],
                    are_named=are_named(config),
                    capacity_of=config.capacity_of,
                    role_problems=role_problems,
                )
        except PgLayerError as error:
            problem = " ".join(str(error).split())
            if is_forbidden(error):
                problem += ". Grant the role what docs/reference/permissions.md names."
            return None, [*map(str, role_problems), problem]
        return status, status.problems(options["sweep_age"])

    def _show_json(
        self, status: Status | None, problems: list[str], options: dict[str, Any]
    ) -> None:
        # Without an answer of the database there are no other keys.
        shown: dict[str, Any] = {"ok": False, "problems": problems}
        if status is not None:
            shown = status.as_dict(options["sweep_age"])
        self.stdout.write(json.dumps(shown))

    def _show_text(
        self, status: Status | None, problems: list[str], options: dict[str, Any]
    ) -> None:
        page = _status_text.page(problems, status)
        is_terminal = self.stdout.isatty()
        size = shutil.get_terminal_size()
        text = _status_text.plain(page)
        if is_terminal or options["force_color"]:
            try:
                text = _status_text.rich(page, size.columns, has_colours=not options["no_color"])
            except ImportError:
                pass
        if options["watch"] is not None:
            if is_terminal:
                # The problems are in the first lines, which must stay on the screen.
                text = CLEAR + "".join(text.splitlines(keepends=True)[: size.lines - 1])
            else:
                text = f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n{text}\n"
        self.stdout.write(text)


def _interrupt() -> None:
    raise KeyboardInterrupt
