"""Statements on a connection of Django's: how they get there, and what is known of where it leads."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from inspect import getfile
from operator import attrgetter
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import django
import psycopg
from django.db import Error as DjangoError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from psycopg import Connection, pq

from pg_layer._db.queries.receive import BACKEND_PID
from pg_layer._db.session import Session
from pg_layer._db.statement import Statement

T = TypeVar("T")

PREPARE_AFTER = 5  # executions on a connection: psycopg's own default
MOST_DEAD = (
    100  # connections of a pool that the server has closed, before the next one is tried unseen
)
LEAST_CONNECT_TIMEOUT = 2  # seconds: to libpq and psycopg one is two

_TRANSACTION = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


class _Loan(Session):
    """The session on what Django is connected by."""

    def __init__(self, conn: Connection[Any], prepare_after: int | None) -> None:
        super().__init__(conn)
        self._prepare_after = prepare_after  # executions; None: never
        self._uses: dict[Statement, int] = {}
        self._is_direct: bool | None = None  # unknown

    def is_worth_preparing(self, statement: Statement, patience: float) -> bool:
        """Whether it was run often enough, by one server process that answers for good: that is asked once.

        Outside of transactions only: a `DISCARD ALL` by somebody else would break them.
        """
        if self._prepare_after is None:
            return False
        uses = self._uses[statement] = self._uses.get(statement, 0) + 1
        if uses <= self._prepare_after:
            return False
        if self._is_direct is None:
            ((pid,),) = self.execute_now(BACKEND_PID, timeout=patience)
            self._is_direct = (
                pid == self.conn.info.backend_pid
            )  # a pooler makes up the one it tells at first
        return self._is_direct

    def forgotten(self) -> None:
        """The server has been told to forget what was prepared: it would be again."""
        self._prepare_after = None


_loans: WeakKeyDictionary[BaseDatabaseWrapper, _Loan] = WeakKeyDictionary()
_lent: WeakSet[Connection[Any]] = WeakSet()  # what the loans are, or were, sessions on


def _loan_of(connection: BaseDatabaseWrapper) -> _Loan:
    """The session on what Django is connected by now. Raises Django's error if that is lost."""
    loan = _loans.get(connection)
    if loan is None or loan.conn is not connection.connection:
        conn = connection.connection
        options = connection.settings_dict["OPTIONS"]
        # Django's default for the threshold is None, because of poolers: those are found out. A pool's
        # connection comes and goes with what is prepared on it, and would have ever more of that. A backend
        # may have a pool of its own: then the connection comes again.
        is_pooled = bool(options.get("pool")) or conn in _lent
        after = None if is_pooled else options.get("prepare_threshold", PREPARE_AFTER)
        with connection.wrap_database_errors:
            loan = _loans[connection] = _Loan(conn, after)
        _lent.add(conn)
    return loan


class DjangoSession:
    """Runs statements of `pg_layer._db.queries` on a connection of Django's, as far as they need `execute`.

    Goes past Django's cursors, which take a third of the time, unless somebody wants to see what runs.

    ``deadline``: of `time.monotonic`, for all answers together; None in somebody's transaction: it takes as
    long as it takes.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.alias = connection.alias
        self.deadline: float | None = None
        self._connection = connection

    @property
    def is_in_transaction(self) -> bool:
        """Whether what is executed is part of a transaction: of Django's, or one it knows nothing of."""
        connection = self._connection
        if connection.in_atomic_block:
            return True
        conn = connection.connection
        return conn is not None and (
            not connection.autocommit or conn.pgconn.transaction_status in _TRANSACTION
        )

    @property
    def is_atomic(self) -> bool:
        """Whether it is inside `transaction.atomic`, which calls back after the commit."""
        return bool(self._connection.in_atomic_block)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection of Django's."""
        return self._connection

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, and it is not known to be lost."""
        conn = self._connection.connection
        return conn is not None and not conn.closed

    def connect(self, timeout: float) -> None:
        """Connect, if there is no connection, or none any more. Outside of transactions."""
        connection = self._connection
        # Django's, or one of the backend's own. A pool is made here, if there is none yet: it keeps the
        # parameters that it is made with.
        has_pool = getattr(connection, "pool", None) is not None
        for _ in range(MOST_DEAD if has_pool else 2):
            if connection.connection is not None:
                # Django keeps one that it knows to be lost, until the request ends.
                if not connection.connection.closed and not _has_hung_up(_loan_of(connection)):
                    break
                self._drop()
            with nullcontext() if has_pool else _connecting_within(connection, timeout):
                connection.ensure_connection()
        connection.ensure_connection()  # complains on an event loop's thread

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """As `Session.execute`; awaits nothing."""
        connection = self._connection
        connection.ensure_connection()
        is_in_transaction = self.is_in_transaction
        try:
            if _is_watched(connection, is_in_transaction):
                rows = self._execute_by_cursor(statement, values)
            else:
                rows = self._execute_directly(statement, values)
        except BaseException:
            # Django would go on with a dead one. In a transaction it is to find out by itself.
            if (
                not is_in_transaction
                and connection.connection is not None
                and connection.connection.closed
            ):
                self._drop()
            raise
        return rows

    def hand_on_notifies(self) -> None:
        """Give the NOTIFYs that came meanwhile to psycopg, for whoever listens on the connection.

        Not while a call is under way: what their handlers raise would be taken for an error of its own.
        """
        conn = self._connection.connection
        pgconn = None if conn is None else conn.pgconn
        while pgconn is not None and (notify := pgconn.notifies()) is not None:
            if pgconn.notify_handler is not None:
                pgconn.notify_handler(notify)

    @property
    def _patience(self) -> float | None:
        """The seconds that are left."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def _execute_directly(
        self, statement: Statement, values: tuple[object, ...]
    ) -> list[tuple[Any, ...]]:
        connection = self._connection
        connection.validate_thread_sharing()
        with connection.wrap_database_errors, connection.connection.lock:
            loan = _loan_of(connection)
            patience = self._patience
            loan.can_prepare = patience is not None and loan.is_worth_preparing(statement, patience)
            try:
                return loan.execute_now(statement, *values, timeout=self._patience)
            except psycopg.errors.InvalidSqlStatementName:
                loan.forgotten()
                raise

    def _execute_by_cursor(
        self, statement: Statement, values: tuple[object, ...]
    ) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor, self._cutting():
            cursor.execute(statement.cursor_sql, statement.parameters(values))
            # In a pipeline it is fetching that waits for the answer, and tells what it is: none runs there
            # that returns no rows.
            is_fetchable = cursor.description is not None or _is_pipelining(self._connection)
            return cursor.fetchall() if is_fetchable else []

    @contextmanager
    def _cutting(self) -> Iterator[None]:
        """Cut the connection when patience ends, as nobody but psycopg waits for the answer."""
        patience = self._patience
        if patience is None:
            yield
            return
        watchdog = threading.Timer(patience, _loan_of(self._connection).cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def _drop(self) -> None:
        """Close what was lost, as Django knows nothing of it yet."""
        with suppress(DjangoError):
            self._connection.close()


def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("The coroutine waits for something.")


def _has_hung_up(session: Session) -> bool:
    """Whether the server has closed this idle connection: then nothing is lost if it is opened anew."""
    try:
        while session.has_hung_up and not session.is_closed:  # or has told something else
            session.conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return session.is_closed


@contextmanager
def _connecting_within(connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
    """Connect in that time, where nobody has set a shorter one: for each host, and in whole seconds."""
    before = vars(connection).get("get_connection_params")
    parameters_of = connection.get_connection_params

    def get_connection_params() -> dict[str, Any]:
        parameters: dict[str, Any] = parameters_of()
        timeout = max(math.ceil(seconds), LEAST_CONNECT_TIMEOUT)
        with suppress(TypeError, ValueError):
            given = int(
                float(parameters.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT") or 0)
            )
            timeout = min(timeout, given) if given > 0 else timeout
        return {**parameters, "connect_timeout": timeout}

    connection.get_connection_params = get_connection_params  # type: ignore[method-assign]
    try:
        yield
    finally:
        del connection.get_connection_params
        if before is not None:
            connection.get_connection_params = before  # type: ignore[method-assign]


# ---------------------------------------------------------------------- who wants to see what runs

_DJANGO = os.path.join(os.path.dirname(getfile(django)), "")
_FUNCTIONS = (FunctionType, MethodType)
_ON_THE_WAY = ("cursor", "_cursor", "create_cursor", "_prepare_cursor", "make_cursor")


def _is_watched(connection: BaseDatabaseWrapper, is_in_transaction: bool) -> bool:
    """Whether a statement has to take the way of Django's cursors, or can take no other."""
    pgconn = connection.connection.pgconn
    # In a transaction that has not begun yet, psycopg begins it.
    expected = pq.TransactionStatus.INTRANS if is_in_transaction else pq.TransactionStatus.IDLE
    return (
        pgconn.transaction_status != expected
        or _is_pipelining(connection)
        or bool(connection.execute_wrappers)
        or connection.queries_logged
        or connection.needs_rollback
        or _is_replaced(connection)
        or not connection.connection.cursor_factory.__module__.startswith("django.")
    )


def _is_pipelining(connection: BaseDatabaseWrapper) -> bool:
    status: pq.PipelineStatus = connection.connection.pgconn.pipeline_status
    return status != pq.PipelineStatus.OFF


def _is_replaced(connection: BaseDatabaseWrapper) -> bool:
    """Whether somebody has put something of his own in the place of Django's: to forbid or to trace."""
    # Who takes his own away again leaves Django's bound method behind.
    is_bound = not vars(connection).keys().isdisjoint(_ON_THE_WAY)
    return not all(
        map(
            _is_djangos,
            (CursorWrapper.execute, *_steps(connection if is_bound else type(connection))),
        )
    )


_steps = attrgetter(*_ON_THE_WAY)


def _is_djangos(function: Any) -> bool:
    """Whether Django itself defines that. What only looks like a function may hand on what it wraps."""
    return type(function) in _FUNCTIONS and function.__code__.co_filename.startswith(_DJANGO)
