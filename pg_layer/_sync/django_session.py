"""Statements of `pg_layer._db.queries` on a connection of Django's, by its cursors."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import psycopg
from django.db import Error as DjangoError
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from psycopg import pq

from pg_layer._db.session import Session
from pg_layer._db.statement import Statement
from pg_layer._sync.watchdog import Watch, watchdog
from pg_layer.exceptions import OutcomeUnknown

T = TypeVar("T")

# The server ends the connection. psycopg does not tell whether the result came before.
_ENDING = ("57P01", "57P02")
_TRANSACTION = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


class DjangoSession:
    """A connection of Django's, as an `Executor` of one call.

    ``deadline``: a time of `time.monotonic` for everything outside of transactions. Inside a
    transaction there is no limit, because a connection that is cut would undo all of it.
    """

    def __init__(self, connection: BaseDatabaseWrapper, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that is not known to be lost."""
        conn = self.connection.connection
        return conn is not None and not conn.closed

    def connect(self) -> None:
        """Connect, unless there is a working connection. Outside of transactions only.

        A connection that the server has closed is replaced, before anything is sent on it. A pool
        may return several of those.
        """
        self.connection.ensure_connection()
        self.connection.validate_thread_sharing()
        while _has_hung_up(self.connection.connection) and time.monotonic() < self.deadline:
            self._close()
            self.connection.ensure_connection()
        if time.monotonic() >= self.deadline:
            # Nothing was sent: a statement that is cut short would leave its outcome unknown.
            _raise_lost("Connecting took all the time.")

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a statement. Await nothing. Raise Django's errors.

        Outside of transactions a connection that was lost is closed, because Django would use it
        for its next query. Inside, Django must notice the loss itself.
        """
        with self.connection.cursor() as cursor:
            if is_in_transaction(self.connection):
                return _rows(cursor, statement, values)
            conn = self.connection.connection
            watch = Watch(conn, self.deadline)
            try:
                watchdog.begin(watch)
                return _rows(cursor, statement, values)
            except DjangoError as error:
                if watch.is_cut:
                    _raise_lost("The database did not answer in time.")
                if getattr(error.__cause__, "sqlstate", None) in _ENDING:
                    # If the result came before, the transaction may be committed. A send that is
                    # repeated then would be received twice.
                    _raise_lost(str(error))
                if _has_unread_answer(conn):
                    # Not the server's error: a notify handler of the application raised it. The
                    # statement has perhaps taken effect, and must not be repeated.
                    raise OutcomeUnknown(
                        f"It is unknown whether the call took effect: {error}"
                    ) from error
                raise
            finally:
                watchdog.end(watch)
                if watch.is_cut or conn.closed or _has_unread_answer(conn):
                    # psycopg does not know of the cut if the answer came before it. A pool would
                    # hand the connection out again.
                    conn.close()
                    self._close()

    def _close(self) -> None:
        with suppress(DjangoError):
            self.connection.close()


def is_in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a statement would be part of a transaction.

    Django does not know of a transaction that began with psycopg's `transaction()` or with BEGIN:
    the connection's status shows it.
    """
    conn = connection.connection
    return bool(connection.in_atomic_block) or (
        conn is not None
        and (not connection.autocommit or conn.pgconn.transaction_status in _TRANSACTION)
    )


def _raise_lost(reason: str) -> NoReturn:
    """Raise Django's error of a lost connection, caused by psycopg's, without a SQLSTATE."""
    raise OperationalError(reason) from psycopg.OperationalError(reason)


def _rows(
    cursor: CursorWrapper, statement: Statement, values: tuple[object, ...]
) -> list[tuple[Any, ...]]:
    cursor.execute(statement.cursor_sql, statement.parameters(values))
    rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def _has_unread_answer(conn: psycopg.Connection[Any]) -> bool:
    """Return whether a statement was interrupted, so that no other can begin."""
    return (
        conn.pgconn.pipeline_status == pq.PipelineStatus.OFF
        and conn.pgconn.transaction_status == pq.TransactionStatus.ACTIVE
    )


def _has_hung_up(conn: psycopg.Connection[Any]) -> bool:
    """Return whether the server has closed this idle connection. Costs no round trip."""
    if conn.closed:
        return True
    session = Session(conn)
    try:
        while session.has_hung_up and not session.is_closed:
            # The server may have sent a notification. psycopg passes it on at the next statement.
            conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return session.is_closed


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that awaits nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("The coroutine waits for something.")
