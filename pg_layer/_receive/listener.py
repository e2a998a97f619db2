"""The one connection that listens: connects, is watched, and connects again.

Bound to the owner loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, errors

from pg_layer._config.databases import not_migrated
from pg_layer._config.options import Config
from pg_layer._db.pool import connection_kwargs
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._process.tasks import Spawn
from pg_layer._state import log_events

logger = logging.getLogger("pg_layer.listener")

BACKOFF_FIRST = 0.1  # seconds
BACKOFF_LAST = 2.0  # seconds: the listener connects within this time after the server's return


class Listener:
    """The connection that listens, kept while `run` runs.

    ``prepare`` is awaited with the session of each new connection. Then ``on_connect`` is
    awaited: it calls `listen` and requests a catch-up.
    ``on_notify`` is called with the NOTIFY channel and the payload of each notification.
    ``on_lost`` is called with the reason when the connection is lost or cannot be made.
    """

    def __init__(
        self,
        config: Config,
        prepare: Callable[[Session], Awaitable[None]],
        on_connect: Callable[[], Awaitable[None]],
        on_notify: Callable[[str, str], None],
        on_lost: Callable[[Exception], None],
        client_id: str,
        spawn: Spawn,
    ) -> None:
        self._config = config
        self._client_id = client_id
        self._spawn = spawn
        self._prepare = prepare
        self._on_connect = on_connect
        self._on_notify = on_notify
        self._on_lost = on_lost
        self._session: Session | None = None
        self._is_prepared = False  # until then only `prepare` may use the session
        self._lost: asyncio.Future[None] | None = None
        self._fd = -1  # the socket that is watched
        self._channels: set[str] = set()  # of the present connection
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.is_connected = False

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled."""
        backoff = BACKOFF_FIRST
        has_failed = False
        while True:
            try:
                await self._connect()
                backoff, has_failed = BACKOFF_FIRST, False
                assert self._lost is not None
                await self._lost
                error: Exception = psycopg.OperationalError("The listening connection was lost.")
            except (psycopg.Error, OSError) as caught:
                error = caught
            except Exception as caught:  # after a bug, too, the process must hear
                if not has_failed:
                    logger.exception(
                        "Listening failed.", extra={"event": log_events.LISTENING_FAILED}
                    )
                error, has_failed = caught, True
            finally:
                self._drop()
            if isinstance(error, (errors.UndefinedFunction, errors.UndefinedTable)):
                error = not_migrated(self._config)
            self._on_lost(error)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, BACKOFF_LAST)

    async def _connect(self) -> None:
        kwargs = connection_kwargs(self._config, "listen", self._client_id)
        conn: AsyncConnection[Any] = await AsyncConnection.connect(**kwargs)
        self._session = session = Session(conn)
        self._lost = self._loop.create_future()
        await self._prepare(session)
        self._is_prepared = True
        await self._on_connect()
        self.is_connected = True
        self._watch(session)

    def is_listening_to(self, channel: str) -> bool:
        """Return whether the present connection listens to a NOTIFY channel."""
        return channel in self._channels

    async def listen(self, channels: Sequence[str]) -> bool:
        """Listen to NOTIFY channels. Return whether the connection listens to them.

        If it is lost, the next connection listens to what ``on_connect`` asks for.
        """
        if all(map(self.is_listening_to, channels)):
            return True

        async def work(session: Session) -> None:
            missing = [channel for channel in channels if channel not in self._channels]
            if missing:
                await queries.listen(session, missing)
            if session is self._session:
                self._channels.update(missing)

        return await self._execute(work)

    async def unlisten(self, channels: Sequence[str]) -> None:
        """Stop listening to NOTIFY channels."""
        listened = [channel for channel in channels if channel in self._channels]
        # Before the statement: a `listen` during it must send LISTEN again, behind the UNLISTEN.
        self._channels.difference_update(listened)
        if listened:
            await self._execute(lambda session: queries.unlisten(session, listened))

    async def unlisten_to_all(self) -> None:
        """Stop listening to all. The next LISTEN begins at the end of NOTIFY's queue."""
        await self.unlisten(list(self._channels))

    async def _execute(self, work: Callable[[Session], Awaitable[object]]) -> bool:
        async with self._lock:
            session = self._session
            if session is None or session.is_closed or not self._is_prepared:
                return False
            # While the session waits for an answer it watches the same socket.
            self._unwatch()
            try:
                if not session.is_reusable:  # the last caller was cancelled
                    await session.settle()
                await work(session)
            except psycopg.Error as error:
                self.reconnect(error)
                return False
            finally:
                if self._session is session:
                    if session.is_closed:
                        self.reconnect()
                    elif self.is_connected:
                        if not session.is_reusable:
                            # The caller was cancelled. Notifications behind an answer are not
                            # heard until the answer is fetched.
                            self._spawn("The listener", self._fetch_answer)
                        self._watch(session)
            return True

    async def _fetch_answer(self) -> None:
        await self._execute(_nothing)

    def reconnect(self, why: psycopg.Error | None = None) -> None:
        """Give up the present connection, even if it works, and connect again."""
        if self._lost is None or self._lost.done():
            return
        if why is None:
            self._lost.set_result(None)
        else:
            self._lost.set_exception(why)
            self._lost.exception()  # so that asyncio does not log it if `run` has ended

    def _readable(self) -> None:
        session = self._session
        if session is None:
            return
        try:
            for channel, payload in session.notifies():
                self._on_notify(channel, payload)
        except psycopg.Error:
            # libpq may have closed the socket. The loop would watch the next one with its number.
            self._unwatch()
            self.reconnect()

    def _watch(self, session: Session) -> None:
        self._fd = session.fileno()
        self._loop.add_reader(self._fd, self._readable)
        self._readable()

    def _unwatch(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(fd)

    def _drop(self) -> None:
        session, self._session = self._session, None
        self.is_connected = self._is_prepared = False
        self._channels.clear()
        if session is not None:
            self._unwatch()
            session.close()

    def abandon(self) -> None:
        """Drop the connection. Works also if the loop does not run again."""
        self._drop()

    def cut(self) -> None:
        """Shut the socket down. From any thread."""
        session = self._session
        if session is not None:
            session.cut()


async def _nothing(session: Session) -> None:
    """Send no statement: `Listener._execute` has settled the session before."""
