"""The pool, and the rules of when a statement is tried again. Bound to one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, errors
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from pg_layer import arrays, store
from pg_layer.config import Config
from pg_layer.exceptions import LayerUnavailable, NotMigrated

T = TypeVar("T")

logger = logging.getLogger("pg_layer.connections")

_POOL_NAME = "pg_layer"


class _Connection(AsyncConnection[Any]):
    """A connection of ours."""


def _is_not_ours(record: logging.LogRecord) -> bool:
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (about == _POOL_NAME or isinstance(about, _Connection))


# The pool warns of every connection that fails. Ours tells its user why instead, and the log once.
logging.getLogger("psycopg.pool").addFilter(_is_not_ours)

# Errors after which the statement surely did not take effect, and another attempt may succeed.
# Not "08": a pooler says that also of a statement that was committed and whose answer it lost.
_TRANSIENT_CLASSES = ("40001", "40P01", "53", "57", "25006", "55P03")
RETRY = 0.05  # seconds before the next attempt
_WAIT = 1.0  # seconds for which to wait for a connection before the reason is looked at again


class Connections:
    """At most ``max_size`` connections, opened when needed.

    Everything runs in autocommit mode: each statement is one transaction.
    """

    def __init__(self, config: Config, max_size: int, max_idle: float) -> None:
        self._config = config
        self._all: weakref.WeakSet[AsyncConnection[Any]] = weakref.WeakSet()
        self._reason: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._is_open = False
        self._getting = 0  # callers that wait for a connection
        self._returning: set[asyncio.Task[None]] = set()
        connections = self

        class ReportingConnection(_Connection):
            """A connection that tells why it could not be made: the pool says only that it took too long."""

            @classmethod
            async def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
                try:
                    conn = await super().connect(conninfo, **kwargs)
                except Exception as error:
                    connections._reason = error
                    raise
                connections._reason = None
                return conn

        self._pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
            connection_class=ReportingConnection,
            kwargs=self._kwargs,
            configure=self._configure,
            check=_check,
            min_size=0,
            max_size=max_size,
            max_idle=max_idle,
            reconnect_timeout=5.0,
            num_workers=1,
            open=False,
            name=_POOL_NAME,
        )

    async def _kwargs(self) -> dict[str, Any]:
        return {**self._config.connect_kwargs("pool"), "autocommit": True, "prepare_threshold": None}

    async def _configure(self, conn: AsyncConnection[Any]) -> None:
        arrays.register(conn)
        self._all.add(conn)
        # Through a pooler the next statement may meet another server process, which has not prepared it.
        if await store.is_direct(conn):
            conn.prepare_threshold = 0

    async def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            await self._pool.open()

    async def grow(self, max_size: int) -> None:
        """Allow more connections."""
        await self._open()
        await self._pool.resize(min_size=0, max_size=max_size)

    async def run(
        self,
        work: Callable[[AsyncConnection[Any]], Awaitable[T]],
        *,
        timeout: float,
        is_idempotent: bool = False,
    ) -> T:
        """Run a statement, and again after what surely undid it, until ``timeout`` seconds have passed.

        ``is_idempotent``: doing it twice does no harm, so that it is also tried again where the connection
        was lost on the way. Otherwise that raises `LayerUnavailable` at once: trying again could send a
        message twice. Raises `LayerUnavailable` and `NotMigrated`.
        """
        deadline = time.monotonic() + timeout
        await self._open()
        while True:
            conn = await self._connection(deadline)
            watchdog = self._loop.call_later(max(deadline - time.monotonic(), 0.001), cut, conn)
            try:
                return await work(conn)
            except psycopg.Error as error:
                self._judge(error, is_idempotent, deadline)
            finally:
                watchdog.cancel()
                await self._give_back(conn)
            await asyncio.sleep(RETRY)

    async def _give_back(self, conn: AsyncConnection[Any]) -> None:
        if not self._getting:
            await self._pool.putconn(conn)  # does not suspend
            return
        # To hand it on the pool suspends, and a caller cancelled there would lose the connection for good.
        task = self._loop.create_task(self._pool.putconn(conn))
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        await asyncio.shield(task)

    async def _connection(self, deadline: float) -> AsyncConnection[Any]:
        while True:
            wait = min(_WAIT, deadline - time.monotonic())
            self._getting += 1
            try:
                return await self._pool.getconn(timeout=max(wait, 0.001))
            except PoolTimeout as error:
                reason = self._reason
                if isinstance(reason, psycopg.Error) and _is_hopeless(reason):
                    raise unavailable(reason) from reason
                if time.monotonic() >= deadline:
                    raise unavailable(reason) from (reason or error)
            except PoolClosed as error:
                raise LayerUnavailable("The channel layer was closed.") from error
            finally:
                self._getting -= 1

    def _judge(self, error: psycopg.Error, is_idempotent: bool, deadline: float) -> None:
        """Return if the statement may be tried again, else raise."""
        if isinstance(error, (errors.UndefinedFunction, errors.UndefinedTable)):
            raise NotMigrated from error
        is_late = time.monotonic() >= deadline
        if error.sqlstate is not None and error.sqlstate.startswith(_TRANSIENT_CLASSES):
            if is_late:
                raise unavailable(error) from error
            return
        if (error.sqlstate or "08").startswith("08") and isinstance(error, psycopg.OperationalError):
            if is_idempotent and not is_late:
                return
            raise LayerUnavailable(
                "The connection to the database was lost; it is unknown whether the call took effect."
            ) from error
        raise LayerUnavailable(
            f"The database refused the call: {error.diag.message_primary or error}"
        ) from error

    async def close(self) -> None:
        """Close in order."""
        if self._returning:
            await asyncio.wait(self._returning, timeout=1.0)
        if self._is_open:
            await self._pool.close(timeout=1.0)

    def abandon(self) -> None:
        """Drop every connection at once, also when the loop will not run again."""
        for conn in list(self._all):
            conn.pgconn.finish()


def unavailable(reason: BaseException | None) -> LayerUnavailable:
    """`LayerUnavailable` that says why. libpq's texts hold hosts and names, never passwords."""
    why = " ".join(str(reason).split()) if reason is not None else "no connection became free"
    return LayerUnavailable(f"The database could not be reached: {why}")


def _is_hopeless(error: psycopg.Error) -> bool:
    # A wrong password or a missing database does not mend itself within seconds.
    return isinstance(error, (errors.InvalidAuthorizationSpecification, errors.InvalidCatalogName))


async def _check(conn: AsyncConnection[Any]) -> None:
    """Refuse an idle connection whose socket is readable: the server has hung up. Costs no round trip."""
    poll = select.poll()
    poll.register(conn.fileno(), select.POLLIN)
    if poll.poll(0):
        await conn.close()  # or the pool takes it for a good one that failed by chance
        raise errors.AdminShutdown("The server closed the idle connection.")


def cut(conn: AsyncConnection[Any]) -> None:
    """Shut the connection's socket, so that whoever waits for an answer on it is told at once."""
    if conn.closed:
        return
    duplicate = socket.socket(fileno=os.dup(conn.fileno()))
    try:
        duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        duplicate.close()
