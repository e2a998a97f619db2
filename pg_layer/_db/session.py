"""Runs statements on a connection: prepared where that works, awaited on whatever event loop asks.

It speaks to libpq itself. A cursor's execution costs several times as much as the call to libpq, and binds a
connection to one event loop, whereas here threads lend each other a connection between statements.
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

DEFAULT_TIMEOUT = 10.0
INTERRUPTED_TIMEOUT = 2.0

Rows = list[tuple[Any, ...]]


class Session:
    """A connection in the hands of one caller at a time, on any event loop.

    ``can_prepare``: one server process answers for good, so that it remembers what was prepared. While
    `is_reusable` is false, a statement is under way or a transaction open: only `settle` may be called.
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
        self._answer_to: _Answer | None = None  # while somebody awaits it
        self._transformer = Transformer(conn)
        self._poll = _new_poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)

    def fileno(self) -> int:
        """The socket's number. Raises `psycopg.OperationalError` if the connection is closed."""
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
        """Whether the server has said goodbye to this idle connection. Costs no round trip."""
        return self.is_closed or bool(self._poll.poll(0))

    @property
    def is_reusable(self) -> bool:
        """Whether the next statement may begin."""
        return not self._is_waiting and self._pgconn.transaction_status == pq.TransactionStatus.IDLE

    async def execute(self, statement: Statement, *values: object) -> Rows:
        """The rows that the statement returns. Raises what psycopg raises.

        Cancelled, it leaves the statement to its own end: see `settle`.
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
        """The same, blocking this thread. The connection is closed if it raises no error of the server's.

        Waits ``timeout`` seconds, preparing included, or as long as it takes; and no longer than
        `INTERRUPTED_TIMEOUT` once ``interrupt`` can be read.
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
        # Each attempt has a name of its own: it is unknown what became of one that was cancelled.
        name = b"pg_layer_%d" % next(_numbers)
        self._pgconn.send_prepare(name, statement.sql, statement.oids)
        self._is_waiting = True
        return name

    def _rows(self, results: list[PGresult]) -> Rows:
        try:
            result = _checked(results)
        except errors.InvalidSqlStatementName:
            self._names.clear()  # the server has forgotten what was prepared
            raise
        except errors.FeatureNotSupported as error:
            if error.diag.source_function == "get_relation_info":
                # Unlogged tables cannot be read on a standby.
                raise errors.ReadOnlySqlTransaction("The server is a standby.") from error
            if error.diag.source_function != "RevalidateCachedQuery":
                raise
            self._names.clear()  # what was prepared would return other types since
            raise errors.InvalidSqlStatementName(str(error)) from None
        self._transformer.set_pgresult(result)
        rows = self._transformer.load_rows(0, result.ntuples, tuple)
        self._transformer.set_pgresult(None)
        return rows

    def notifies(self) -> Iterator[tuple[str, str]]:
        """The NOTIFYs that have come, by their channel and payload. Raises what psycopg raises."""
        self._pgconn.consume_input()
        while (notify := self._pgconn.notifies()) is not None:
            yield notify.relname.decode(), notify.extra.decode(errors="replace")

    async def settle(self) -> None:
        """Wait for a statement whose caller was cancelled, and roll back a transaction that it left open."""
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
        """Close at once, and tell who waits for an answer: on their loop, or when that runs no more."""
        if self._answer_to is not None:
            self._answer_to.fail(psycopg.OperationalError("The connection was closed."))
        self._pgconn.finish()

    def cut(self) -> None:
        """Shut the socket, so that whoever waits for an answer is told at once."""
        try:
            duplicate = socket.socket(fileno=os.dup(self._pgconn.socket))
        except (OSError, psycopg.OperationalError):  # closed already
            return
        try:
            duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            duplicate.close()

    async def _results(self, is_late: bool = False) -> list[PGresult]:
        """What the server answers to what was sent, to its end. ``is_late``: some of it may be here."""
        self._answer_to = answer = _Answer(self._pgconn)
        watchdog = asyncio.get_running_loop().call_later(self._timeout, self.cut)
        try:
            if is_late:
                answer.readable()
            return await answer.done
        finally:
            watchdog.cancel()
            answer.unwatch()
            self._answer_to = None
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
    """As much of `select.poll` as is needed here, for eventlet, which has removed that."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}

    def register(self, file: int | Session | socket.socket, events: int) -> None:
        self._events[file if isinstance(file, int) else file.fileno()] = events

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """``timeout``: milliseconds; None: as long as it takes."""
        readers = [fd for fd, events in self._events.items() if events & select.POLLIN]
        writers = [fd for fd, events in self._events.items() if events & select.POLLOUT]
        seconds = None if timeout is None else timeout / 1000
        readable, writable, _ = select.select(readers, writers, [], seconds)
        return [(fd, select.POLLIN) for fd in readable] + [(fd, select.POLLOUT) for fd in writable]


def _new_poll() -> Any:
    return select.poll() if hasattr(select, "poll") else _SelectPoll()


class _Answer:
    """Watches a connection's socket on the running loop until all results of what was sent have come."""

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
        """The connection is lost."""
        # libpq may have closed the socket: the loop would take the next one with its number for it.
        self.unwatch()
        if self.done.done() or self._loop.is_closed():
            return
        if any(result.status == pq.ExecStatus.FATAL_ERROR for result in self._results):
            self.done.set_result(self._results)  # the server has said why it goes
        else:
            self.done.set_exception(error)

    def unwatch(self) -> None:
        """Leave the socket alone."""
        if self._fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            if self._is_sending:
                self._loop.remove_writer(self._fd)
        self._fd = -1


def _checked(results: list[PGresult]) -> PGresult:
    """The result of a single statement, if that went well."""
    for index, result in enumerate(results):
        if result.status not in _GOOD:
            error = errors.error_from_result(result)
            # libpq's own words, or the server's on its way out after it had run the statement: the
            # connection was lost, and it is unknown whether that was before the commit or after it.
            if error.sqlstate is None or (index and error.sqlstate.startswith("57P")):
                raise psycopg.OperationalError(str(error)) from None
            raise error
    if not results:
        raise psycopg.OperationalError("The connection was lost.")
    return results[-1]
