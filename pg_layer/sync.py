"""``layer.sync``: the layer for synchronous code, on Django's own connection and in its transactions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import InterfaceError, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist
from psycopg import pq

from pg_layer import sql, store
from pg_layer.aliases import alias_of, not_migrated
from pg_layer.client import inbox_of
from pg_layer.config import Config
from pg_layer.faults import REFUSALS, judge, unavailable
from pg_layer.ops import Drafts, GroupSend, Regroup, Send
from pg_layer.room import Credits, FloorBook, Floors
from pg_layer.sender import channel_full
from pg_layer.session import Session
from pg_layer.statement import Statement

if TYPE_CHECKING:
    from pg_layer.homes import Homes

T = TypeVar("T")

RETRY = 0.1  # seconds before the next attempt
Work = Callable[["DjangoSession"], Coroutine[Any, Any, T]]


class Sync:
    """`send` and the like as plain functions, without an event loop.

    They run on Django's connection of this thread: to the layer's alias, to the one that leads to the
    database of its ``dsn``, or to ``using``. Inside `transaction.atomic` a message leaves when the outermost
    block commits, and never if that, or the savepoint it was sent in, is rolled back; outside at once.

    Raises what the asynchronous calls raise, `ImproperlyConfigured` if no alias leads to the database, and
    `SynchronousOnlyOperation` on the thread of a running event loop. Inside a transaction the database's own
    errors are Django's, as everywhere in it: they concern the transaction.
    """

    def __init__(self, config: Config, drafts: Drafts, homes: Homes) -> None:
        self._config = config
        self._drafts = drafts
        self._homes = homes
        self._alias: str | None = None
        self._lock = threading.Lock()  # guards what follows
        self.forget()

    def forget(self) -> None:
        """What was seen of ids and of room says nothing any more."""
        self._generation = _sessions_made
        self._floors = FloorBook()
        self._credits = Credits()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config!r})"

    # ------------------------------------------------------------------ calls

    def send(
        self, channel: str, message: dict[str, Any], *, expiry: float | None = None, using: str | None = None
    ) -> None:
        """As `PostgresChannelLayer.send`."""
        send = self._drafts.send(channel, message, expiry)
        if not self._send(using, [send])[0]:
            raise channel_full(send)

    def send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        using: str | None = None,
    ) -> list[bool]:
        """As `PostgresChannelLayer.send_many`."""
        many = self._drafts.send_many(messages, expiry)
        return self._send(using, many.ops) if many.ops else []

    def group_send(
        self,
        group: str,
        message: dict[str, Any],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
        using: str | None = None,
    ) -> None:
        """As `PostgresChannelLayer.group_send`."""
        self._group_send(using, [self._drafts.group_send(group, message, expiry, exclude)])

    def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
        using: str | None = None,
    ) -> list[bool]:
        """As `PostgresChannelLayer.group_send_many`."""
        many = self._drafts.group_send_many(messages, expiry, exclude)
        return self._group_send(using, many.ops) if many.ops else []

    def group_add(self, group: str, channel: str, *, using: str | None = None) -> None:
        """As `PostgresChannelLayer.group_add`; inside a transaction it holds from the commit on."""
        self._regroup(using, self._drafts.regroup(group, channel, joins=True))

    def group_discard(self, group: str, channel: str, *, using: str | None = None) -> None:
        """As `PostgresChannelLayer.group_discard`; inside a transaction it holds from the commit on."""
        self._regroup(using, self._drafts.regroup(group, channel, joins=False))

    def group_channels(self, group: str, *, using: str | None = None) -> list[str]:
        """As `PostgresChannelLayer.group_channels`."""
        prefix, name = self._config.prefix, self._drafts.group(group)
        return self._run(
            using, lambda session: store.group_channels(session, prefix, name), is_idempotent=True
        )

    def group_count(self, group: str, *, using: str | None = None) -> int:
        """As `PostgresChannelLayer.group_count`."""
        work = partial(store.group_count, prefix=self._config.prefix, group=self._drafts.group(group))
        return self._run(using, work, is_idempotent=True)

    # ------------------------------------------------------------------ how they are done

    def _send(self, using: str | None, sends: Any) -> list[bool]:
        prefix = self._config.prefix
        channels, payloads, expiries, capacities = zip(*sends, strict=True)
        with self._lock:
            if self._generation != _sessions_made:  # it may lead to another server
                self.forget()
            floors = None if self._credits.spend(channels) else self._floors.tell()
        if len(sends) == 1:
            send: Send = sends[0]
            inbox = inbox_of(prefix, send.channel)
            floor = None if floors is None else dict(zip(*floors, strict=True)).get(inbox, 0)
            is_full, look = self._run(using, lambda session: store.send_one(session, prefix, *send, floor))
            full = {0} if is_full else set()
            looks = None if look is None else store.Looks(look.waiting, Floors((inbox,), (look.floor,)))
        else:
            full, looks = self._run(
                using,
                lambda session: store.send_batch(
                    session, prefix, channels, payloads, expiries, capacities, floors
                ),
            )
        with self._lock:
            if looks is not None:
                self._floors.learn(looks.floors)
                self._credits.grant(channels, capacities, looks.waiting)
        counters = self._homes.client.counters
        counters.add("batches")
        counters.add("sent", len(sends) - len(full))
        counters.add("refused_full", len(full))
        return [index not in full for index in range(len(sends))]

    def _group_send(self, using: str | None, sends: Any) -> list[bool]:
        prefix = self._config.prefix
        if len(sends) == 1:
            send: GroupSend = sends[0]
            missed = self._run(using, lambda session: store.group_send_one(session, prefix, *send))
        else:
            groups, payloads, expiries, excluded = zip(*sends, strict=True)
            missed = self._run(
                using,
                lambda session: store.group_send_batch(session, prefix, groups, payloads, expiries, excluded),
            )
        client = self._homes.client
        client.counters.add("batches")
        client.counters.add("group_sent", len(sends))
        for index, channel in missed:
            client.count_dropped(sends[index].group, channel)
        refused = {index for index, _ in missed}
        return [index not in refused for index in range(len(sends))]

    def _regroup(self, using: str | None, op: Regroup) -> None:
        config = self._config
        pair = (op.group, op.channel)
        self._run(
            using,
            lambda session: store.regroup(
                session,
                config.prefix,
                None,  # this process, too, learns of it by its inbox, and only if it is committed
                config.lease,
                config.group_expiry,
                [pair] if op.joins else [],
                [config.capacity_of(op.channel)] if op.joins else [],
                [] if op.joins else [pair],
            ),
            is_idempotent=True,
        )
        if op.joins:
            self._homes.joined(op.channel)

    def _run(self, using: str | None, work: Work[T], *, is_idempotent: bool = False) -> T:
        connection = self._connection(using)
        session = DjangoSession(connection, self._config.send_timeout)
        if session.is_in_transaction:
            try:
                return _finish(work(session))
            except DjangoError as error:
                if isinstance(
                    error.__cause__, (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable)
                ):
                    raise not_migrated(self._config, connection.alias) from error
                raise
        deadline = time.monotonic() + self._config.send_timeout
        is_silent = False
        while True:
            try:
                session.connect()
            except (OperationalError, InterfaceError) as error:
                cause = error.__cause__
                if time.monotonic() + RETRY >= deadline or getattr(cause, "sqlstate", None) is not None:
                    raise unavailable(error) from error
                time.sleep(RETRY)
                continue
            if session.is_in_transaction:  # AUTOCOMMIT is off
                return _finish(work(session))
            try:
                if not is_silent:
                    return _finish(work(session))
                with transaction.atomic(using=connection.alias):
                    return _finish(store.without_ringing(session, work))
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                if cause.sqlstate in REFUSALS and not is_silent:
                    self._homes.client.counters.add("refused_notifies")
                    self._homes.client.unheard(f"the server refuses NOTIFY: {cause.diag.message_primary}.")
                    is_silent = True
                    continue
                is_late = time.monotonic() + RETRY >= deadline
                judge(cause, is_idempotent, is_late, self._config, connection.alias)
            time.sleep(RETRY)

    def _connection(self, using: str | None) -> BaseDatabaseWrapper:
        alias = using or self._alias
        if alias is None:
            alias = self._alias = alias_of(self._config)
        try:
            connection = connections[alias]
        except ConnectionDoesNotExist as error:
            raise ImproperlyConfigured(
                f"pg_layer: there is no alias {alias!r} in DATABASES. There are: {', '.join(connections)}."
            ) from error
        if connection.vendor != "postgresql":
            raise ImproperlyConfigured(
                f"pg_layer: DATABASES[{alias!r}] is {connection.vendor}; layer.sync needs PostgreSQL."
            )
        return connection


class DjangoSession:
    """Runs the statements of `pg_layer.store` on a connection of Django's, as far as they need `execute`.

    Goes past Django's cursors, which take a third of the time, unless somebody wants to see what runs.

    ``patience``: seconds for each answer outside of transactions; within them it takes as long as it takes.
    """

    def __init__(self, connection: BaseDatabaseWrapper, patience: float) -> None:
        self._connection = connection
        self._patience = patience

    @property
    def is_in_transaction(self) -> bool:
        """Whether what is executed is a part of somebody's transaction."""
        connection = self._connection
        return connection.in_atomic_block or (connection.connection is not None and not connection.autocommit)

    def connect(self) -> None:
        """Connect, if there is no connection, or none any more. Outside of transactions."""
        connection = self._connection
        if connection.connection is not None and _has_hung_up(_session_of(connection)):
            connection.close()
        connection.ensure_connection()

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """As `Session.execute`; awaits nothing."""
        connection = self._connection
        is_in_transaction = self.is_in_transaction
        connection.ensure_connection()  # complains on an event loop's thread
        if is_in_transaction:
            statement = sql.for_transaction(statement)
        psycopg_connection = connection.connection
        # In a transaction that has not begun yet, psycopg begins it.
        expected = pq.TransactionStatus.INTRANS if is_in_transaction else pq.TransactionStatus.IDLE
        if (
            psycopg_connection.pgconn.transaction_status == expected
            and not connection.execute_wrappers
            and not connection.queries_logged
            and not connection.needs_rollback
        ):
            connection.validate_thread_sharing()
            with connection.wrap_database_errors, psycopg_connection.lock:
                return _session_of(connection).execute_now(
                    statement, *values, patience=None if is_in_transaction else self._patience
                )
        with connection.cursor() as cursor:
            # Psycopg takes a tuple for a row.
            cursor.execute(
                sql.for_cursor(statement),
                [list(value) if isinstance(value, tuple) else value for value in values],
            )
            rows: list[tuple[Any, ...]] = cursor.fetchall()
            return rows


_sessions: WeakKeyDictionary[BaseDatabaseWrapper, Session] = WeakKeyDictionary()
_sessions_made = 0


def _session_of(connection: BaseDatabaseWrapper) -> Session:
    """The session on what Django is connected by now."""
    global _sessions_made
    session = _sessions.get(connection)
    if session is None or session.conn is not connection.connection:
        session = _sessions[connection] = Session(connection.connection)
        _sessions_made += 1
    return session


def _finish(work: Coroutine[Any, Any, T]) -> T:
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
