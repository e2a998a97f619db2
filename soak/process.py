"""The entry point of a process, its Django settings and its role."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection

import django
from django.conf import settings
from django.core.management import call_command
from django.db import DEFAULT_DB_ALIAS
from psycopg.conninfo import conninfo_to_dict

from soak.book import Book, now
from soak.clerk import Clerk
from soak.records import Complaint
from soak.roles import OPTIONS, SWEEP, Part, Player, Receiver, Role, Sender, Single, Threads, Worker

_ROLES: dict[Role, type[Player]] = {
    "sender": Sender,
    "threads": Threads,
    "clerk": Clerk,
    "receiver": Receiver,
    "worker": Worker,
    "single": Single,
}


def play(part: Part, pipe: Connection) -> None:
    """Run the role of a process: its entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    book = Book(part.folder, part.name)
    logger = logging.getLogger()
    logger.handlers[:] = [_Complaints(book)]
    logger.setLevel(logging.ERROR)
    try:
        _configure(part.dsn)
        if part.role == "sweeper":
            _sweep(pipe)
        else:
            asyncio.run(_ROLES[part.role](part, pipe, book).run())
    except BaseException:
        book.write(Complaint(now(), traceback.format_exc()))
        raise
    finally:
        book.close()


class _Complaints(logging.Handler):
    def __init__(self, book: Book) -> None:
        super().__init__(logging.ERROR)
        self._book = book

    def emit(self, record: logging.LogRecord) -> None:
        self._book.write(Complaint(now(), self.format(record)))


def _configure(dsn: str) -> None:
    """Set up Django with the database of a DSN."""
    parameters = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parameters.pop("dbname"),
        "USER": parameters.pop("user"),
        "PASSWORD": parameters.pop("password"),
        "HOST": parameters.pop("host"),
        "PORT": parameters.pop("port"),
        "OPTIONS": parameters,
        "CONN_MAX_AGE": None,
    }
    layer = {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"dsn": dsn, **OPTIONS}}
    settings.configure(
        DATABASES={DEFAULT_DB_ALIAS: database},
        CHANNEL_LAYERS={"default": layer},
        INSTALLED_APPS=["channels", "pg_layer"],
        USE_TZ=True,
        LOGGING_CONFIG=None,
    )
    django.setup()


def _sweep(pipe: Connection) -> None:
    """Run ``manage.py pg_layer_sweep`` until SIGTERM."""
    # Applies until the command installs its own handler.
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
    threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    pipe.send(("ready", None))
    with open(os.devnull, "w") as nothing:
        call_command("pg_layer_sweep", interval=SWEEP, verbosity=0, stdout=nothing, stderr=nothing)


def _die_with_parent(pipe: Connection) -> None:
    try:
        while pipe.recv():
            pass
    except (EOFError, OSError):
        os._exit(1)
