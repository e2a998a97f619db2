"""The pool, and the rules of when a statement is tried again. Bound to one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, TypeVar, cast

import psycopg
from psycopg import AsyncConnection, Connection, errors
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from pg_layer._config.options import Config
from pg_layer._db.errors import READ_ONLY, REFUSALS, Attempts, is_hopeless, translated
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._process import shutdown as termination
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown

T = TypeVar("T")

logger = logging.getLogger("pg_layer.connections")

_NAME = "pg_layer"


class _Connection(AsyncConnection[Any]):
    """A connection of ours, and its session."""

    session: Session


def _is_not_ours(record: logging.LogRecord) -> bool:
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (about == _NAME or isinstance(about, _Connection))


# The pool warns of every connection that fails. Ours tells its user why instead, and the log once.
logging.getLogger("psycopg.pool").addFilter(_is_not_ours)

RETRY = 0.05  # seconds before the next attempt
_WAIT = 0.5  # seconds for which to wait for a connection before the reason is looked at again
_KEEP = 1.0  # seconds for which a session waits for its next statement before the pool has it back
_KEEP_MOST = 600.0  # seconds after which the pool has it back however busy it is
_SETTLE_TIMEOUT = 10.0
_CLOSED = "The channel layer was closed."
HURRY = 1.0  # seconds for which a process that stops asks a database that is away


def idle_period(seconds: float) -> float:
    """The period for `Connections` that closes a connection before it was idle for so many seconds.

    It stays at hand for up to twice `_KEEP`. Then the pool has it, for the rest of a period and a whole one.
    """
    return max((seconds - 2 * _KEEP) / 2, seconds / 4)


class Connections:
    """At most ``max_size`` connections, opened when needed, and closed when idle.

    At the end of each ``period`` of so many seconds the pool closes one that was idle for all of it.

    Everything runs in autocommit mode: each statement is one transaction. Between statements a session stays
    at hand, as going through the pool costs more than many a statement.
    """

    def __init__(
        self,
        config: Config,
        max_size: int,
        period: float,
        on_refused: Callable[[psycopg.Error], None],
        client_id: str,
        is_away: Callable[[], bool | None],
    ) -> None:
        # on_refused: called from any thread when the server refuses NOTIFY, or writing.
        # is_away: whether the listener has lost the database; None: there is none.
        self._is_away = is_away
        self._failing_since: float | None = None  # no connection could be made, by time.monotonic()
        self.is_ending = False  # nothing waits for a database that is away any more
        self._config = config
        self._client_id = client_id
        self._on_refused = on_refused
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._reason: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._is_open = False
        self._is_closed = False
        self._free: dict[
            Session, float
        ] = {}  # at hand, and since when; the last one used comes last
        self._getting = 0  # callers that wait for the pool
        self._out: dict[Session, float] = {}  # those that the pool has given, and since when
        self._tidying: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempts: set[asyncio.Future[Any]] = set()  # to connect
        connections = self

        class ReportingConnection(_Connection):
            """A connection that tells why it could not be made: the pool says only that it took too long."""

            @classmethod
            async def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
                if connections._is_closed:
                    raise psycopg.OperationalError(_CLOSED)
                attempt = asyncio.ensure_future(super().connect(conninfo, **kwargs))
                connections._attempts.add(attempt)
                attempt.add_done_callback(connections._attempts.discard)
                try:
                    conn = await attempt
                except Exception as error:
                    connections._reason = error
                    connections._failing_since = connections._failing_since or time.monotonic()
                    raise
                connections._reason = connections._failing_since = None
                return conn

        self._pool: AsyncConnectionPool[_Connection] = AsyncConnectionPool(
            connection_class=ReportingConnection,
            kwargs=self._kwargs,
            configure=self._configure,
            check=_check,
            min_size=0,
            max_size=max_size,
            max_idle=period,
            reconnect_timeout=0.0,  # who waits tries again, without the pool's growing pauses
            num_workers=1,
            open=False,
            name=_NAME,
        )

    async def _kwargs(self) -> dict[str, Any]:
        return connection_kwargs(self._config, "pool", self._client_id)

    async def _configure(self, conn: _Connection) -> None:
        conn.session = Session(conn)
        self._all.add(conn)
        # Through a pooler the next statement may meet another server process, which has not prepared it.
        try:
            if await queries.is_direct(conn.session):
                await queries.set_up_pooled(conn.session)
                conn.session.can_prepare = True
        except BaseException:
            conn.session.close()
            raise

    async def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            await self._pool.open()

    async def grow(self, max_size: int, period: float) -> None:
        """Allow more connections, and another period."""
        await self._open()
        self._pool.max_idle = period
        await self._pool.resize(min_size=0, max_size=max_size)

    # ------------------------------------------------------------------ statements

    async def run(
        self,
        work: Callable[[Session], Awaitable[T]],
        *,
        timeout: float,
        quietly: Callable[[Session], Awaitable[T]] | None = None,
        statement_timeout: float | None = None,
        is_idempotent: bool = False,
        is_read: bool = False,
    ) -> T:
        """Run a statement, and again after what surely undid it, until ``timeout`` seconds have passed.

        ``quietly``: what to run instead where the server refuses NOTIFY.

        ``statement_timeout``: seconds for each of several statements, where all together may take long.
        ``is_idempotent``: doing it twice does no harm, so that it is also tried again where the connection
        was lost on the way. Otherwise that raises `OutcomeUnknown` at once: trying again could send a
        message twice. ``is_read``: it changes nothing, so that no outcome is unknown.

        Raises `NotMigrated`; `OutcomeUnknown` if an attempt has perhaps taken effect, and `LayerUnavailable`
        if none has.
        """
        attempts = Attempts(
            self._config,
            is_idempotent=is_idempotent,
            is_read=is_read,
            gives_up=lambda: self.gives_up,
        )
        deadline = time.monotonic() + timeout
        while True:
            begun_at = time.monotonic()
            session = self._at_hand()
            if session is None:
                session = await self._from_pool(deadline, attempts)
            left = deadline - time.monotonic()
            if left <= 0:  # nothing was sent: that is better known than cut short
                self._give_back(session)
                raise attempts.unavailable(self._reason) from self._reason
            session.timeout = min(statement_timeout or left, HURRY if self.gives_up else math.inf)
            is_refused = False
            try:
                return await work(session)
            except psycopg.Error as error:
                is_refused = error.sqlstate in REFUSALS and quietly is not None
                if is_refused or error.sqlstate == READ_ONLY:
                    self._on_refused(error)
                if is_refused and quietly is not None:
                    work, quietly = quietly, None
                else:
                    if error.sqlstate == READ_ONLY:
                        session.close()  # another connection may lead to a server that takes writes
                    # An attempt that is cut short would leave it unknown what became of it.
                    now = time.monotonic()
                    is_late = now + RETRY + (now - begun_at) >= deadline or self.gives_up
                    attempts.failed(error, is_late=is_late)
            finally:
                self._give_back(session)
            if not is_refused:
                await asyncio.sleep(RETRY)

    @property
    def gives_up(self) -> bool:
        """Whether nothing waits for the database: it is known to be away, and the process is stopping.

        One connection that could not be made says little: the server may have had too many for a moment.
        """
        if not (self.is_ending or termination.is_stopping()):
            return False
        is_away, since = self._is_away(), self._failing_since
        if is_away is None:
            return since is not None and time.monotonic() - since >= HURRY
        return is_away

    # ------------------------------------------------------------------ sessions

    def _at_hand(self) -> Session | None:
        """A session that waits for its next statement.

        If there is none, the caller counts as waiting from here on, until `_from_pool` has ended.
        """
        while True:
            if not self._free or self._is_closed:
                self._getting += 1
                return None
            session, _ = self._free.popitem()
            if not session.has_hung_up:
                return session
            session.close()
            self._give_back(session)

    async def _from_pool(self, deadline: float, attempts: Attempts) -> Session:
        try:
            await self._open()
            while True:
                if self.gives_up:
                    lost = psycopg.OperationalError("The connections to it were lost.")
                    reason: Exception | None = self._reason or lost
                    raise attempts.unavailable(reason) from reason
                wait = min(_WAIT, deadline - time.monotonic())
                try:
                    session = (await self._pool.getconn(timeout=max(wait, 0.001))).session
                    break
                except PoolTimeout as error:
                    reason = self._reason
                    if reason is not None and is_hopeless(reason):
                        raise attempts.unavailable(reason) from reason
                    if time.monotonic() >= deadline:
                        raise attempts.unavailable(reason) from (reason or error)
                except PoolClosed as error:
                    if attempts.is_outcome_unknown:
                        raise OutcomeUnknown from error
                    raise LayerUnavailable(_CLOSED) from error
        finally:
            self._getting -= 1
        self._out[session] = self._loop.time()
        if self._tidying is None:
            self._tidying = self._loop.call_later(_KEEP, self._tidy)
        return session

    def _give_back(self, session: Session) -> None:
        """The statement has ended, or its caller has."""
        now = self._loop.time()
        # Now and then the pool is to see it: it knows when a connection has lived long enough.
        is_due = now - self._out.get(session, now) >= _KEEP_MOST
        if session.is_reusable and not (self._getting or self._is_closed or is_due):
            self._free[session] = now
            return
        self._return(session)

    def _tidy(self) -> None:
        """Give the pool back what has been idle for a while."""
        self._tidying = None
        oldest = self._loop.time() - _KEEP
        for session in [session for session, since in self._free.items() if since <= oldest]:
            del self._free[session]
            self._return(session)
        if self._out:
            self._tidying = self._loop.call_later(_KEEP, self._tidy)

    def _return(self, session: Session) -> None:
        if self._out.pop(session, None) is None:
            return
        task = self._loop.create_task(self._return_to_pool(session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _return_to_pool(self, session: Session) -> None:
        try:
            if not (session.is_closed or session.is_reusable or self.gives_up):
                session.timeout = _SETTLE_TIMEOUT
                try:
                    await session.settle()
                except psycopg.Error:
                    pass
            if not session.is_reusable:
                session.close()
        finally:
            await self._pool.putconn(cast(_Connection, session.conn))

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Close in order."""
        if self._tidying is not None:
            self._tidying.cancel()
        self._is_closed = True
        free, self._free = list(self._free), {}
        # The pool's worker outlives a cancellation, and goes on to connect; the end of the loop waits for it.
        for attempt in self._attempts:
            attempt.cancel()
        for session in free:
            self._return(session)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        if self._is_open:
            await self._pool.close(timeout=1.0)
        self.abandon()

    def abandon(self) -> None:
        """Drop every connection at once, also when the loop will not run again."""
        self._is_closed = True
        self._free.clear()
        for conn in list(self._all):
            conn.session.close()


def connection_kwargs(
    config: Config, role: Literal["pool", "listen"], client_id: str | None = None
) -> dict[str, Any]:
    """The arguments for a connection of a client's, or of nobody's.

    Its `application_name` tells whose it is, unless the user has chosen one of his own.
    """
    kwargs = {**config.connect_kwargs(role), "autocommit": True, "prepare_threshold": None}
    if client_id is not None and kwargs.get("application_name") == _NAME:
        kwargs["application_name"] = f"{_NAME} {client_id}"
    return kwargs


def are_named(config: Config) -> bool:
    """Whether connections tell whose they are."""
    return all(
        connection_kwargs(config, role).get("application_name") == _NAME
        for role in ("pool", "listen")
    )


@contextmanager
def connected_now(config: Config) -> Iterator[Connection[Any]]:
    """A blocking connection, where no loop runs. Raises `LayerUnavailable` and `NotMigrated`."""
    with translated(config), closing(psycopg.connect(**connection_kwargs(config, "pool"))) as conn:
        yield conn


async def _check(conn: _Connection) -> None:
    if conn.session.has_hung_up:
        await conn.close()  # or the pool takes it for a good one that failed by chance
        raise errors.AdminShutdown("The server closed the idle connection.")
