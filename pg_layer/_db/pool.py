"""The connections of one event loop: a small pool, and the rules of repeating a statement."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, TypeVar

import psycopg
from psycopg import AsyncConnection, Connection

from pg_layer._config.options import Config
from pg_layer._db.availability import Outage
from pg_layer._db.errors import NOTIFY_REFUSED, READ_ONLY, Attempts, is_permanent, translated
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._process import shutdown
from pg_layer._process.cancelling import wait_for_cancelled
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown

T = TypeVar("T")

RETRY = 0.05  # seconds before a statement is repeated
STOPPING_TIMEOUT = 1.0  # seconds that a stopping process waits for the database
_NAME = "pg_layer"
_CLOSED = "The channel layer was closed."
_CHECK_INTERVAL = 0.1  # seconds after which a caller that waits for a session checks why
_RECONNECT = 0.25  # seconds before the next attempt to connect
_SETTLE_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 1.0
# Seconds after which a connection is replaced: a server process keeps memory that it has used.
_MAX_LIFETIME = 3600.0


class Pool:
    """Up to ``max_size`` sessions, opened when needed and closed when idle.

    Bound to the event loop on which it is made; `abandon` may be called from any thread if
    that loop does not run. Each session belongs to one caller at a time.

    ``connect``: opens a connection. ``prepare``: sets up a new session before its first use.
    ``settle``: makes a session reusable whose caller was cancelled in a statement.
    ``max_idle``: seconds after which an idle session is closed.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Session]],
        prepare: Callable[[Session], Awaitable[None]],
        settle: Callable[[Session], Awaitable[None]],
        max_size: int,
        max_idle: float,
    ) -> None:
        self._connect = connect
        self._prepare = prepare
        self._settle = settle
        self._max_size = max_size
        self._max_idle = max_idle
        self._loop = asyncio.get_running_loop()
        # All sessions that are set up, and when each must be replaced.
        self._sessions: dict[Session, float] = {}
        self._preparing: set[Session] = set()  # each belongs to a task in `_opening`
        self._idle: dict[Session, float] = {}  # and since when; the last one used comes last
        self._waiters: deque[asyncio.Future[Session]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        self.error: Exception | None = None  # of the last attempt to connect, if it failed
        self.is_closed = False

    def resize(self, max_size: int, max_idle: float) -> None:
        """Change the limits. Sessions above a smaller ``max_size`` stay until they are idle."""
        self._max_size, self._max_idle = max_size, max_idle

    def take(self) -> Session | None:
        """Return an idle session at once, or None if there is none."""
        while self._idle:
            session, _ = self._idle.popitem()
            if not session.has_hung_up:
                return session
            self._drop(session)
        return None

    async def get(self, timeout: float, check: Callable[[], None] = lambda: None) -> Session | None:
        """Return a session, or None if none is free within ``timeout`` seconds.

        Also return None if the pool is closed meanwhile, or the server has closed the session.

        ``check``: called every `_CHECK_INTERVAL` seconds of the wait. If it raises, the wait ends.
        """
        session = self.take()
        if session is not None or self.is_closed:
            return session
        deadline = time.monotonic() + timeout
        waiter: asyncio.Future[Session] = self._loop.create_future()
        self._waiters.append(waiter)
        self._open_more()
        try:
            # One waiter for the whole wait: the caller keeps its place in the queue.
            while not waiter.done() and (left := deadline - time.monotonic()) > 0:
                await asyncio.wait((waiter,), timeout=min(_CHECK_INTERVAL, left))
                if not waiter.done():
                    check()
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._offer(waiter.result())
            raise
        finally:
            if not waiter.done():
                self._waiters.remove(waiter)
        if not waiter.done() or waiter.cancelled():
            return None
        session = waiter.result()
        if session.has_hung_up:  # since it became free: this loop was busy
            self._drop(session)
            return None
        return session

    def give_back(self, session: Session) -> None:
        """Take a session back. Its statement has ended, or the caller was cancelled in it."""
        # Closed by `abandon`; or the loop is closed, and a caller's coroutine is deleted.
        if session not in self._sessions or self._loop.is_closed():
            self._sessions.pop(session, None)
            session.close()
        elif session.is_closed or session.is_reusable:
            self._offer(session)
        else:
            task = self._loop.create_task(self._settle_and_offer(session))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _settle_and_offer(self, session: Session) -> None:
        try:
            await self._settle(session)
        finally:
            if not session.is_reusable:
                session.close()
            self._offer(session)

    def _offer(self, session: Session) -> None:
        """Hand a session to the caller that waits longest, or keep it idle."""
        now = self._loop.time()
        if session.is_closed or self.is_closed or now >= self._sessions.get(session, now):
            self._drop(session)
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(session)
                return
        self._idle[session] = now
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(self._max_idle, self._close_idle)

    def _drop(self, session: Session) -> None:
        session.close()
        self._sessions.pop(session, None)
        self._open_more()

    def _close_idle(self) -> None:
        """Close sessions that have been idle for long enough, and set the timer for the rest."""
        self._idle_timer = None
        oldest = self._loop.time() - self._max_idle
        for session, since in list(self._idle.items()):
            if since <= oldest:
                del self._idle[session]
                self._drop(session)
        if self._idle:
            next_at = min(self._idle.values()) + self._max_idle
            self._idle_timer = self._loop.call_at(next_at, self._close_idle)

    def _open_more(self) -> None:
        """Open a session for a caller that waits, if there may be one more."""
        is_full = len(self._sessions) + len(self._opening) >= self._max_size
        if len(self._opening) < len(self._waiters) and not (is_full or self.is_closed):
            # In a task of its own: before Python 3.12 psycopg can swallow a cancellation while
            # it connects. A caller's cancellation must not be lost.
            task = self._loop.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if not task.cancelled():  # otherwise the loop ends: it must not begin another one
            self._open_more()

    async def _open(self) -> None:
        """Open a session. Repeat that while it fails and a caller waits."""
        if len(self._opening) == 1:
            self.error = None  # an older error is not about this attempt
        while self._waiters and not self.is_closed:
            try:
                session = await self._open_once()
            except Exception as error:
                self.error = error
                await asyncio.sleep(_RECONNECT)
            else:
                self.error = None
                self._offer(session)
                return

    async def _open_once(self) -> Session:
        session = await self._connect()
        self._preparing.add(session)  # before the next await: `abandon` must close it, too
        try:
            await self._prepare(session)
        except BaseException:
            session.close()
            raise
        finally:
            self._preparing.discard(session)
        if not self.is_closed:
            lifetime = _MAX_LIFETIME * random.uniform(0.95, 1.0)
            self._sessions[session] = self._loop.time() + lifetime
        return session

    async def close(self) -> None:
        """Close all sessions. Statements of cancelled callers have a second to end."""
        self.is_closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        while self._waiters:
            self._waiters.popleft().cancel()
        opening = set(self._opening)
        for task in opening:
            task.cancel()
        try:
            await wait_for_cancelled(opening, _CLOSE_TIMEOUT)
            if self._settling:
                await asyncio.wait(self._settling, timeout=_CLOSE_TIMEOUT)
        finally:
            for task in self._opening:  # this call was cancelled: see `wait_for_cancelled`
                task.cancel()
            self.abandon()

    def abandon(self) -> None:
        """Close every connection at once. May be called when the loop does not run any more."""
        self.is_closed = True
        sessions = [*self._sessions, *self._preparing]
        self._sessions.clear()
        self._idle.clear()
        for session in sessions:
            session.close()

    def cut(self) -> None:
        """Shut the sockets of all connections down. From any thread."""
        for session in [*self._sessions, *self._preparing]:
            session.cut()


class Connections:
    """The execution of statements on a pool's sessions, with retries of those without effect.

    All connections are in autocommit mode: each statement is a transaction of its own.
    Bound to the event loop on which it is made. Nothing is connected before the first `run`.

    ``max_idle``: seconds after which an idle connection is closed.
    ``on_refused``: called when the server refuses NOTIFY, or takes no writes.
    ``outage``: records attempts to connect, and returns whether the database is unavailable.
    """

    def __init__(
        self,
        config: Config,
        max_size: int,
        max_idle: float,
        on_refused: Callable[[psycopg.Error], None],
        client_id: str,
        outage: Outage,
    ) -> None:
        self._config = config
        self._on_refused = on_refused
        self._client_id = client_id
        self._outage = outage
        self.is_closing = False
        self._pool = Pool(self._connect, self._prepare, self._settle, max_size, max_idle)

    def resize(self, max_size: int, max_idle: float) -> None:
        """Allow this many connections, and close them after ``max_idle`` seconds."""
        self._pool.resize(max_size, max_idle)

    async def _connect(self) -> Session:
        kwargs = connection_kwargs(self._config, "pool", self._client_id)
        try:
            conn: AsyncConnection[Any] = await AsyncConnection.connect(**kwargs)
        except Exception:
            self._outage.connection_failed()
            raise
        self._outage.connected()
        return Session(conn)

    async def _prepare(self, session: Session) -> None:
        # Through a pooler the next statement may run in another server process, which does
        # not have the prepared statements or settings of this one.
        if await queries.is_direct(session):
            await queries.set_up_pooled(session)
            session.allow_preparing()

    async def _settle(self, session: Session) -> None:
        if self.gives_up:
            return
        session.set_timeout(_SETTLE_TIMEOUT)
        try:
            await session.settle()
        except psycopg.Error:
            pass

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
        """Run a statement. Repeat it within ``timeout`` seconds after errors without effect.

        ``quietly``: what to run instead if the server refuses NOTIFY.
        ``statement_timeout``: seconds for each of several statements, if all together may
        take longer. The default is the rest of ``timeout``.
        ``is_idempotent``: the statement may be run twice. It is then also repeated if the
        connection was lost on the way. Otherwise that raises `OutcomeUnknown` at once,
        because a second run could send a message twice.
        ``is_read``: the statement changes nothing, so that no outcome is unknown.

        Raises `NotMigrated`; `OutcomeUnknown` if an attempt may have taken effect;
        `LayerUnavailable` if none has.
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
            session = self._pool.take() or await self._wait_for_session(deadline, attempts)
            try:
                left = deadline - time.monotonic()
                if left <= 0:  # a statement that is sent and cut short has an unknown outcome
                    raise attempts.final_error(self._pool.error) from self._pool.error
                most = STOPPING_TIMEOUT if self.gives_up else math.inf
                session.set_timeout(min(statement_timeout or left, most))
                return await work(session)
            except psycopg.Error as error:
                if error.sqlstate in NOTIFY_REFUSED and quietly is not None:
                    self._on_refused(error)
                    work, quietly = quietly, None
                    continue
                if error.sqlstate == READ_ONLY:
                    self._on_refused(error)
                    session.close()  # another connection may lead to a server that takes writes
                # The next attempt may take as long as this one. If it were cut short by the
                # deadline, its outcome would be unknown.
                now = time.monotonic()
                is_late = now + RETRY + (now - begun_at) >= deadline
                attempts.check_retry(error, is_late=is_late or self.gives_up)
            finally:
                self._pool.give_back(session)
            await asyncio.sleep(RETRY)

    async def _wait_for_session(self, deadline: float, attempts: Attempts) -> Session:
        """Return a free session. Raise the reason if there is none until ``deadline``."""

        def check() -> None:
            if self.gives_up:
                lost = psycopg.OperationalError("The connections to it were lost.")
                reason = self._pool.error or lost
                raise attempts.final_error(reason) from reason
            if is_permanent(self._pool.error):
                raise attempts.final_error(self._pool.error) from self._pool.error

        while not self._pool.is_closed:
            if self.gives_up:
                check()
            session = await self._pool.get(max(deadline - time.monotonic(), 0.001), check)
            if session is not None:
                return session
            if not self._pool.is_closed and time.monotonic() >= deadline:
                raise attempts.final_error(self._pool.error) from self._pool.error
        if attempts.is_outcome_unknown:
            raise OutcomeUnknown
        raise LayerUnavailable(_CLOSED)

    @property
    def gives_up(self) -> bool:
        """Whether no call waits for the database. From any thread.

        The process is stopping, or the client closes, while the database is unavailable.
        """
        return (self.is_closing or shutdown.is_stopping()) and self._outage.is_away

    def begin_closing(self) -> None:
        """Stop waiting for a database that is unavailable. From any thread."""
        self.is_closing = True

    async def close(self) -> None:
        """Close all connections. Statements of cancelled callers have a second to end."""
        await self._pool.close()

    def abandon(self) -> None:
        """Close every connection at once. May be called when the loop does not run any more."""
        self._pool.abandon()

    def cut(self) -> None:
        """Shut the sockets of all connections down. From any thread."""
        self._pool.cut()


def connection_kwargs(
    config: Config, role: Literal["pool", "listen"], client_id: str | None = None
) -> dict[str, Any]:
    """Return the arguments for a connection.

    The `application_name` contains the client's id, unless the user has set another name.
    """
    kwargs = {**config.connect_kwargs(role), "autocommit": True, "prepare_threshold": None}
    if client_id is not None and kwargs.get("application_name") == _NAME:
        kwargs["application_name"] = f"{_NAME} {client_id}"
    return kwargs


def are_named(config: Config) -> bool:
    """Return whether the names of connections contain the id of their client."""
    return all(
        connection_kwargs(config, role).get("application_name") == _NAME
        for role in ("pool", "listen")
    )


@contextmanager
def connected_now(config: Config) -> Iterator[Connection[Any]]:
    """Open a blocking connection, for code without an event loop.

    Raises `LayerUnavailable` and `NotMigrated`, also for errors in the `with` block.
    """
    with translated(config), closing(psycopg.connect(**connection_kwargs(config, "pool"))) as conn:
        yield conn
