"""The one connection that LISTENs: connects, is watched as a socket, reconnects. Bound to one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection, Notify, errors

from pg_layer import arrays
from pg_layer.config import Config
from pg_layer.connections import cut
from pg_layer.exceptions import NotMigrated

logger = logging.getLogger("pg_layer.listener")

BACKOFF_FIRST = 0.1  # seconds
BACKOFF_LAST = 15.0


class Listener:
    """Keeps a LISTEN connection for as long as `run` runs.

    ``on_connect`` is awaited with each new connection: it LISTENs and makes up for what was missed.
    ``on_notify`` is called with the NOTIFY channel and the payload.
    """

    def __init__(
        self,
        config: Config,
        on_connect: Callable[[AsyncConnection[Any]], Awaitable[None]],
        on_notify: Callable[[str, str], None],
    ) -> None:
        self._config = config
        self._on_connect = on_connect
        self._on_notify = on_notify
        self._conn: AsyncConnection[Any] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._fd = -1  # the connection's socket, also when libpq has closed it
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.is_connected = False
        self.reconnects = 0

    async def run(self) -> None:
        """Connect, and again for ever. Ends only by cancellation."""
        backoff = BACKOFF_FIRST
        is_down = False
        while True:
            try:
                await self._connect()
                backoff = BACKOFF_FIRST
                if is_down:
                    logger.warning("Listening to the database again.")
                is_down = False
                assert self._lost is not None
                await self._lost
                error: Exception = psycopg.OperationalError("The connection was lost.")
            except (psycopg.Error, OSError) as caught:
                error = caught
            except Exception as caught:  # a fault of ours must not make the process deaf
                if not is_down:
                    logger.exception("Listening failed.")
                error = caught
            finally:
                self._drop()
            self.reconnects += 1
            if not is_down:
                is_down = True
                if isinstance(error, (errors.UndefinedFunction, errors.UndefinedTable)):
                    logger.error("%s", NotMigrated())
                else:
                    logger.warning(
                        "Not listening to the database: %s Trying again.", " ".join(str(error).split())
                    )
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, BACKOFF_LAST)

    async def _connect(self) -> None:
        kwargs = {**self._config.connect_kwargs("listen"), "autocommit": True, "prepare_threshold": None}
        self._conn = conn = await AsyncConnection.connect(**kwargs)
        self._fd = conn.fileno()
        arrays.register(conn)
        self._lost = self._loop.create_future()
        # NOTIFYs that come while a command runs on this connection.
        conn.add_notify_handler(self._hear)
        await self._on_connect(conn)
        self._loop.add_reader(self._fd, self._readable)
        self.is_connected = True
        self._readable()

    async def execute(self, work: Callable[[AsyncConnection[Any]], Awaitable[object]]) -> bool:
        """Run a command (LISTEN, UNLISTEN) on the connection; False if there is none or it was lost."""
        async with self._lock:
            conn = self._conn
            if conn is None or not self.is_connected:
                return False
            # psycopg watches the same socket while it waits for an answer.
            self._loop.remove_reader(self._fd)
            try:
                await work(conn)
            except psycopg.Error:
                self.reconnect()
                return False
            finally:
                if self.is_connected and self._conn is conn and not conn.closed:
                    self._loop.add_reader(self._fd, self._readable)
                    self._readable()
            return True

    def reconnect(self) -> None:
        """Give this connection up, however healthy it looks."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def _readable(self) -> None:
        conn = self._conn
        if conn is None:
            return
        pgconn = conn.pgconn
        try:
            pgconn.consume_input()
            while (notify := pgconn.notifies()) is not None:
                self._on_notify(notify.relname.decode(), notify.extra.decode(errors="replace"))
        except psycopg.Error:
            # libpq may have closed the socket: the loop would take the next one with its number for it.
            self._loop.remove_reader(self._fd)
            self.reconnect()

    def _hear(self, notify: Notify) -> None:
        self._on_notify(notify.channel, notify.payload)

    def _drop(self) -> None:
        conn, self._conn = self._conn, None
        self.is_connected = False
        if conn is not None:
            self._loop.remove_reader(self._fd)
            cut(conn)
            conn.pgconn.finish()

    def abandon(self) -> None:
        """Drop the connection, also when the loop will not run again."""
        conn, self._conn = self._conn, None
        self.is_connected = False
        if conn is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            conn.pgconn.finish()
