"""Statements on a connection, prepared if possible.

It calls libpq through `psycopg.pq`. To execute a statement by a psycopg cursor costs several
times as much, because the cursor looks at the type of each value.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import socket
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection, errors, pq
from psycopg.adapt import Transformer
from psycopg.pq.abc import PGresult

from pg_layer._db.statement import Statement

_BINARY = 1
_GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
_numbers = count(1)

DEFAULT_TIMEOUT = 10.0  # seconds
INTERRUPTED_TIMEOUT = 2.0  # seconds

Rows = list[tuple[Any, ...]]


class Session:
    """A connection that one caller uses at a time.

    ``can_prepare``: the same server process answers all statements, so that it has the prepared
    ones. Behind a pooler it may not.

    While `is_reusable` is false, a statement is in flight or a transaction is open. Then only
    `settle`, `close` and `cut` may be called.
    """

    def __init__(
        self, conn: AsyncConnection[Any] | Connection[Any], *, can_prepare: bool = False
    ) -> None:
        self.conn = conn
        self.can_prepare = can_prepare
        self._timeout = DEFAULT_TIMEOUT
        self._pgconn = conn.pgconn
        self._names: dict[Statement, bytes] = {}
        self._is_waiting = False
        self._answer: _Answer | None = None  # while a task awaits it
        self._transformer = Transformer(conn)
        self._poll = _new_poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)

    def fileno(self) -> int:
        """Return the socket's file descriptor.

        Raises `psycopg.OperationalError` if the connection is closed.
        """
        return self._pgconn.socket

    def set_timeout(self, seconds: float) -> None:
        """Wait this long for each answer of `execute`. Then the connection is cut."""
        self._timeout = seconds

    def allow_preparing(self) -> None:
        """Prepare statements from now on: one server process answers all of them."""
        self.can_prepare = True

    @property
    def is_closed(self) -> bool:
        """Whether the connection is known to be lost."""
        return self._pgconn.status == pq.ConnStatus.BAD

    @property
    def has_hung_up(self) -> bool:
        """Whether the server has closed this idle connection. Needs no round trip.

        An idle connection receives nothing else, so that a readable socket is enough.
        """
        return self.is_closed or bool(self._poll.poll(0))

    @property
    def is_reusable(self) -> bool:
        """Whether the next statement may begin."""
        return not self._is_waiting and self._pgconn.transaction_status == pq.TransactionStatus.IDLE

    async def execute(self, statement: Statement, *values: object) -> Rows:
        """Run a statement, and return its rows. Raises the exceptions of psycopg.

        If the caller is cancelled, the statement continues in the server: see `settle`.
        """
        parameters = statement.encode(values)
        if self.can_prepare and statement not in self._names:
            name = self._send_prepare(statement)
            _checked(await self._results())
            self._names[statement] = name
        self._send(statement, parameters)
        return self._rows(await self._results())

    def execute_now(
        self,
        statement: Statement,
        *values: object,
        timeout: float | None = None,
        interrupt: socket.socket | None = None,
    ) -> Rows:
        """Run a statement, and block until its rows are here. Return them.

        ``timeout``: seconds to wait, preparing included. None: no limit.
        ``interrupt``: once this socket can be read, wait at most `INTERRUPTED_TIMEOUT` longer.

        Raises the exceptions of psycopg. After an error that the server has not sent, the
        connection is closed.
        """
        parameters = statement.encode(values)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            if self.can_prepare and statement not in self._names:
                name = self._send_prepare(statement)
                _checked(self._results_now(deadline, interrupt))
                self._names[statement] = name
            self._send(statement, parameters)
            results = self._results_now(deadline, interrupt)
        except BaseException as error:
            if getattr(error, "sqlstate", None) is None:
                self.close()
            raise
        return self._rows(results)

    def _send(self, statement: Statement, parameters: list[bytes | None]) -> None:
        name = self._names.get(statement) if self.can_prepare else None
        if name is not None:
            self._pgconn.send_query_prepared(name, parameters, statement.formats, _BINARY)
        else:
            self._pgconn.send_query_params(
                statement.sql, parameters, statement.oids, statement.formats, _BINARY
            )
        self._is_waiting = True

    def _send_prepare(self, statement: Statement) -> bytes:
        # Each attempt uses a new name. An attempt that was cancelled may have used its name.
        name = b"pg_layer_%d" % next(_numbers)
        self._pgconn.send_prepare(name, statement.sql, statement.oids)
        self._is_waiting = True
        return name

    def _rows(self, results: list[PGresult]) -> Rows:
        try:
            result = _checked(results)
        except errors.InvalidSqlStatementName:
            self._names.clear()  # the prepared statements were deallocated in the server
            raise
        except errors.FeatureNotSupported as error:
            if error.diag.source_function == "get_relation_info":
                # A standby cannot read unlogged tables. Report it as other standbys are.
                raise errors.ReadOnlySqlTransaction("The server is a standby.") from error
            if error.diag.source_function != "RevalidateCachedQuery":
                raise
            # The types of the result have changed since the statement was prepared.
            self._names.clear()
            raise errors.InvalidSqlStatementName(str(error)) from None
        self._transformer.set_pgresult(result)
        rows = self._transformer.load_rows(0, result.ntuples, tuple)
        self._transformer.set_pgresult(None)
        return rows

    def notifies(self) -> Iterator[tuple[str, str]]:
        """Yield the channel and payload of each notification that has arrived.

        Raises the exceptions of psycopg.
        """
        self._pgconn.consume_input()
        while (notify := self._pgconn.notifies()) is not None:
            yield notify.relname.decode(), notify.extra.decode(errors="replace")

    async def settle(self) -> None:
        """Make the session reusable after its caller was cancelled in a statement.

        Wait for the end of the statement, and roll back a transaction that it left open.
        """
        if self._is_waiting:
            await self._results(is_late=True)
        if self._pgconn.transaction_status in (
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        ):
            self._pgconn.send_query_params(b"ROLLBACK", None)
            self._is_waiting = True
            _checked(await self._results())

    def close(self) -> None:
        """Close at once. A task that waits for an answer gets an `OperationalError`.

        Called on the loop of that task, or when the loop does not run any more.
        """
        if self._answer is not None:
            self._answer.fail(psycopg.OperationalError("The connection was closed."))
        self._pgconn.finish()

    def cut(self) -> None:
        """Shut the socket down, so that waiting for an answer fails at once. From any thread."""
        try:
            duplicate = socket.socket(fileno=os.dup(self._pgconn.socket))
        except (OSError, psycopg.OperationalError):  # already closed
            return
        try:
            duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            duplicate.close()

    async def _results(self, is_late: bool = False) -> list[PGresult]:
        """Wait for the results of the statement that was sent, and return them.

        ``is_late``: some of them may have arrived before. The socket does not report these.
        """
        self._answer = answer = _Answer(self._pgconn)
        watchdog = asyncio.get_running_loop().call_later(self._timeout, self.cut)
        try:
            if is_late:
                answer.readable()
            return await answer.done
        finally:
            watchdog.cancel()
            answer.unwatch()
            self._answer = None
            self._is_waiting = not (answer.is_complete or self.is_closed)

    def _results_now(self, deadline: float, interrupt: socket.socket | None) -> list[PGresult]:
        pgconn = self._pgconn
        results: list[PGresult] = []
        while True:
            poll = self._poll
            if pgconn.flush() or interrupt is not None:
                poll = _new_poll()
                poll.register(self, select.POLLIN | (select.POLLOUT if pgconn.flush() else 0))
                if interrupt is not None:
                    poll.register(interrupt, select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0:
                raise psycopg.OperationalError("The database did not answer in time.")
            ready = poll.poll(None if left == math.inf else math.ceil(1000 * left))
            if interrupt is not None and any(fd == interrupt.fileno() for fd, _ in ready):
                interrupt, deadline = None, min(deadline, time.monotonic() + INTERRUPTED_TIMEOUT)
            pgconn.consume_input()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    self._is_waiting = False
                    return results
                results.append(result)


class _SelectPoll:
    """The needed part of `select.poll` by `select.select`. eventlet removes `select.poll`."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}

    def register(self, file: int | Session | socket.socket, events: int) -> None:
        self._events[file if isinstance(file, int) else file.fileno()] = events

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """Return the ready file descriptors. ``timeout``: milliseconds; None: no limit."""
        readers = [fd for fd, events in self._events.items() if events & select.POLLIN]
        writers = [fd for fd, events in self._events.items() if events & select.POLLOUT]
        seconds = None if timeout is None else timeout / 1000
        readable, writable, _ = select.select(readers, writers, [], seconds)
        return [(fd, select.POLLIN) for fd in readable] + [(fd, select.POLLOUT) for fd in writable]


def _new_poll() -> Any:
    return select.poll() if hasattr(select, "poll") else _SelectPoll()


class _Answer:
    """The results of a statement, read on the running loop when they arrive."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._loop = asyncio.get_running_loop()
        self._results: list[PGresult] = []
        self._fd = pgconn.socket
        self.done: asyncio.Future[list[PGresult]] = self._loop.create_future()
        self.is_complete = False
        self._is_sending = bool(pgconn.flush())
        self._loop.add_reader(self._fd, self.readable)
        if self._is_sending:
            self._loop.add_writer(self._fd, self._writable)

    def readable(self) -> None:
        pgconn = self._pgconn
        try:
            pgconn.consume_input()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    self.is_complete = True
                    if not self.done.done():
                        self.done.set_result(self._results)
                    return
                self._results.append(result)
        except psycopg.Error as error:
            self.fail(error)

    def _writable(self) -> None:
        try:
            if not self._pgconn.flush():
                self._loop.remove_writer(self._fd)
                self._is_sending = False
        except psycopg.Error as error:
            self.fail(error)

    def fail(self, error: psycopg.Error) -> None:
        """End the wait with an error. The connection is lost."""
        # libpq may have closed the socket. Another socket could get its number, and the loop
        # would watch that.
        self.unwatch()
        if self.done.done() or self._loop.is_closed():
            return
        if any(result.status == pq.ExecStatus.FATAL_ERROR for result in self._results):
            self.done.set_result(self._results)  # the server has sent the reason
        else:
            self.done.set_exception(error)

    def unwatch(self) -> None:
        """Stop watching the socket."""
        if self._fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            if self._is_sending:
                self._loop.remove_writer(self._fd)
        self._fd = -1


def _checked(results: list[PGresult]) -> PGresult:
    """Return the result of a statement. Raises its error."""
    for index, result in enumerate(results):
        if result.status not in _GOOD:
            error = errors.error_from_result(result)
            # The error is libpq's, or the server's shutdown after it has run the statement. The
            # connection was lost, and it is unknown whether the statement was committed before.
            if error.sqlstate is None or (index and error.sqlstate.startswith("57P")):
                raise psycopg.OperationalError(str(error)) from None
            raise error
    if not results:
        raise psycopg.OperationalError("The connection was lost.")
    return results[-1]
