"""``layer.sync``: the layer for synchronous code, on Django's own connection and in its transactions."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist
from psycopg import errors

from pg_layer._config.databases import alias_of, not_migrated
from pg_layer._config.options import Config
from pg_layer._db.errors import REFUSALS, UNDEFINED, Attempts, is_hopeless
from pg_layer._db.pool import HURRY
from pg_layer._db.queries import groups as group_queries
from pg_layer._db.queries import send as queries
from pg_layer._db.queries.send import GroupSent, Sent, Unannounced
from pg_layer._send.announcer import PART
from pg_layer._send.operations import Change, OperationBuilder
from pg_layer._send.sender import channel_full, count_group_sent, count_sent
from pg_layer._send.writes import write_changes, write_group_sends, write_sends
from pg_layer._state import log_events
from pg_layer._state.capacity import Room
from pg_layer._sync.django_session import DjangoSession, finish
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown, PgLayerError

if TYPE_CHECKING:
    from pg_layer._runtime.loops import Loops

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger("pg_layer")

RETRY = 0.1  # seconds before the next attempt
CAREFUL = 600.0  # seconds for which transactions do not notify after the server has refused NOTIFY
Work = Callable[[DjangoSession], Coroutine[Any, Any, T]]


class Write(Protocol[T_co]):
    """A statement that writes, and returns rows to announce if it is quiet."""

    async def __call__(
        self, session: DjangoSession, *, own: bool, quiet: bool
    ) -> tuple[T_co, list[Unannounced]]:
        """Run it."""
        ...


class Sync:
    """`send` and the like as plain functions, without an event loop.

    They run on Django's connection of this thread: to the layer's alias, to the one that leads to the
    database of its ``dsn``, or to ``using``. Inside `transaction.atomic` a message is sent when the outermost
    block commits, and never if that, or the savepoint it was sent in, is rolled back; outside at once.
    It is announced after the commit, in a statement of its own: a transaction that notifies would make all
    others of the server wait for its commit.

    Raises what the asynchronous calls raise, `ImproperlyConfigured` if no alias leads to the database, and
    `SynchronousOnlyOperation` on the thread of a running event loop. Inside a transaction the database's own
    errors are Django's, as everywhere in it: they concern the transaction.
    """

    def __init__(self, config: Config, operations: OperationBuilder, loops: Loops) -> None:
        self._config = config
        self._operations = operations
        self._loops = loops
        self._alias: str | None = None
        self._refusals = 0  # of NOTIFY, that were seen
        self._careful_until = 0.0
        _all.add(self)
        self.forget()

    def forget(self) -> None:
        """What was seen of ids and of room says nothing any more."""
        self._rooms: dict[str, Room] = {}  # by alias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config!r})"

    # ------------------------------------------------------------------ calls

    def send(
        self,
        channel: str,
        message: dict[str, Any],
        *,
        expiry: float | None = None,
        using: str | None = None,
    ) -> None:
        """As `PostgresChannelLayer.send`."""
        send = self._operations.send(channel, message, expiry)
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
        many = self._operations.send_many(messages, expiry)
        return self._send(using, many.operations) if many.operations else []

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
        self._group_send(using, [self._operations.group_send(group, message, expiry, exclude)])

    def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
        using: str | None = None,
    ) -> list[bool]:
        """As `PostgresChannelLayer.group_send_many`."""
        many = self._operations.group_send_many(messages, expiry, exclude)
        return self._group_send(using, many.operations) if many.operations else []

    def group_add(self, group: str, channel: str, *, using: str | None = None) -> None:
        """As `PostgresChannelLayer.group_add`; inside a transaction it holds from the commit on."""
        self._change(using, self._operations.change(group, channel, added=True))

    def group_discard(self, group: str, channel: str, *, using: str | None = None) -> None:
        """As `PostgresChannelLayer.group_discard`; inside a transaction it holds from the commit on."""
        self._change(using, self._operations.change(group, channel, added=False))

    def group_channels(self, group: str, *, using: str | None = None) -> list[str]:
        """As `PostgresChannelLayer.group_channels`."""
        prefix, name = self._config.prefix, self._operations.group(group)
        return self._read(
            using, lambda session: group_queries.group_channels(session, prefix, name)
        )

    def group_count(self, group: str, *, using: str | None = None) -> int:
        """As `PostgresChannelLayer.group_count`."""
        work = partial(
            group_queries.group_count,
            prefix=self._config.prefix,
            group=self._operations.group(group),
        )
        return self._read(using, work)

    # ------------------------------------------------------------------ writing

    def _send(self, using: str | None, sends: Any) -> list[bool]:
        async def write(
            session: DjangoSession, *, own: bool, quiet: bool
        ) -> tuple[Sent, list[Unannounced]]:
            room = self._rooms.setdefault(session.alias, Room())
            return await write_sends(
                session, self._config.prefix, sends, room, own=own, quiet=quiet
            )

        sent = self._write(using, write)
        count_sent(self._loops.client, len(sends), sent)
        return [index not in sent.full for index in range(len(sends))]

    def _group_send(self, using: str | None, sends: Any) -> list[bool]:
        async def write(
            session: DjangoSession, *, own: bool, quiet: bool
        ) -> tuple[GroupSent, list[Unannounced]]:
            return await write_group_sends(
                session, self._config.prefix, sends, own=own, quiet=quiet
            )

        sent = self._write(using, write)
        count_group_sent(self._loops.client, sends, sent)
        missed = {index for index, _ in sent.missed}
        return [index not in missed for index in range(len(sends))]

    def _change(self, using: str | None, change: Change) -> None:
        config = self._config
        numbered = self._loops.client.next_number()

        async def write(
            session: DjangoSession, *, own: bool, quiet: bool
        ) -> tuple[None, list[Unannounced]]:
            # Owners in this process, too, apply it only if it is committed.
            return None, await write_changes(
                session,
                config.prefix,
                config.group_expiry,
                [change],
                own=own,
                quiet=quiet,
                # A transaction has its place in the order by its commit.
                numbered=numbered if own else None,
            )

        self._write(using, write, is_idempotent=True)
        if change.added:
            try:
                self._loops.joined(change.channel)
            except LayerUnavailable as error:  # the thread that is to apply it did not start
                raise OutcomeUnknown(
                    f"The change was written, but is not applied yet: {error}"
                ) from error

    def _write(self, using: str | None, write: Write[T], *, is_idempotent: bool = False) -> T:
        """Write, and announce it: now, or after the commit."""
        session = DjangoSession(self._connection(using))
        announcer = self._loops.announcer
        if not session.is_in_transaction:
            # A callback of the application that runs after the commit, but before the layer's.
            self.announce_committed(session.connection)
            self._announce_pending(session)
        is_quiet = bool(announcer)

        async def work(
            session: DjangoSession, *, quiet: bool = False
        ) -> tuple[T, list[Unannounced]]:
            return await write(session, own=True, quiet=quiet or is_quiet)

        async def work_in_transaction(session: DjangoSession) -> tuple[T, list[Unannounced]]:
            quiet = session.is_atomic or self._is_careful
            return await write(session, own=False, quiet=quiet)

        attempts = self._attempts(session, is_idempotent=is_idempotent)
        result, rows = self._run_on(
            session, work, work_in_transaction, attempts, partial(work, quiet=True)
        )
        session.hand_on_notifies()
        if rows and session.is_atomic:
            self._announce_after_commit(session, rows)
        elif rows and not session.is_in_transaction:
            announcer.add(rows)
            self._loops.announce_soon()
        return result

    # ------------------------------------------------------------------ announcing

    def _announce_after_commit(self, session: DjangoSession, rows: list[Unannounced]) -> None:
        """Announce rows after the commit, all of a transaction at once."""
        connection = session.connection
        pending = _pending.get(connection)
        if pending is None or pending.rows[0].xid != rows[0].xid:  # of one that was rolled back
            pending = _pending[connection] = Pending([])
        pending.rows.extend(rows)
        # A savepoint that is rolled back takes the callbacks along that were registered in it.
        callbacks = (callback for _, callback, *_ in connection.run_on_commit)
        if not any(isinstance(each, AfterCommit) and not each.is_called for each in callbacks):
            transaction.on_commit(AfterCommit(self, connection), using=connection.alias)

    def announce_committed(self, connection: BaseDatabaseWrapper) -> None:
        """Announce what the last transaction wrote. Rows that a savepoint has undone are left out."""
        if connection.in_atomic_block:  # a test runs the callbacks: nothing is committed
            return
        pending = _pending.pop(connection, None)
        if pending is not None:
            session = DjangoSession(connection)
            self._announce_pending(session)
            if self._loops.announcer or not self._announce(session, pending.rows):
                # What this process writes next announces them, or receivers find them.
                self._loops.announcer.add(pending.rows)
                self._loops.announce_soon()

    def _announce_pending(self, session: DjangoSession) -> None:
        """Announce what could not be announced before."""
        announcer = self._loops.announcer
        while rows := announcer.first():
            if not self._announce(session, rows):
                self._loops.announce_soon()
                return
            announcer.announced(rows)

    def _announce(self, session: DjangoSession, rows: list[Unannounced]) -> bool:
        """Announce rows, on this connection and outside of transactions. Return whether that worked."""
        for start in range(0, len(rows), PART):

            async def work(session: DjangoSession, part: Any = rows[start : start + PART]) -> None:
                await queries.announce(session, part)

            try:
                attempts = self._attempts(session, is_idempotent=True)
                self._run_on(session, work, work, attempts)
            except (PgLayerError, DjangoError) as error:
                logger.info(
                    "Could not announce %d messages yet: %s",
                    len(rows) - start,
                    error,
                    extra={"event": log_events.ANNOUNCEMENT_FAILED},
                )
                return False
        return True

    # ------------------------------------------------------------------ running

    def _read(self, using: str | None, work: Work[T]) -> T:
        session = DjangoSession(self._connection(using))
        attempts = self._attempts(session, is_read=True)
        result = self._run_on(session, work, work, attempts)
        session.hand_on_notifies()
        return result

    def _attempts(
        self, session: DjangoSession, *, is_idempotent: bool = False, is_read: bool = False
    ) -> Attempts:
        return Attempts(
            self._config,
            is_idempotent=is_idempotent,
            is_read=is_read,
            alias=session.alias,
            gives_up=lambda: self._loops.gives_up,
        )

    def _run_on(
        self,
        session: DjangoSession,
        work: Work[T],
        work_in_transaction: Work[T],
        attempts: Attempts,
        quietly: Work[T] | None = None,
    ) -> T:
        """Run a statement. ``quietly``: what to run instead where the server refuses NOTIFY."""
        gives_up = self._loops.gives_up
        deadline = time.monotonic() + (HURRY if gives_up else self._config.send_timeout)
        while not session.is_in_transaction:
            left = deadline - time.monotonic()
            if gives_up and not session.is_connected:
                raise attempts.unavailable(
                    psycopg.OperationalError("The connections to it were lost.")
                )
            try:
                session.connect(left)
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                is_late = time.monotonic() + RETRY >= deadline or gives_up
                if is_late or is_hopeless(cause) or cause.sqlstate is not None:
                    raise attempts.unavailable(cause) from error
                time.sleep(RETRY)
                continue
            if session.is_in_transaction:  # AUTOCOMMIT is off
                break
            session.deadline = deadline
            if (
                time.monotonic() >= deadline
            ):  # nothing was sent: that is better known than cut short
                raise attempts.unavailable(TimeoutError("connecting took all the time there was"))
            try:
                return finish(work(session))
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                if cause.sqlstate in REFUSALS and quietly is not None:
                    self._refused(cause)
                    work, quietly = quietly, None
                    continue
                is_late = time.monotonic() + RETRY >= deadline
                attempts.failed(cause, is_late=is_late)
                if isinstance(cause, errors.InvalidSqlStatementName):
                    continue  # it will not be asked for again
            time.sleep(RETRY)
        session.deadline = None
        return self._run_in_transaction(session, work_in_transaction)

    def _run_in_transaction(self, session: DjangoSession, work: Work[T]) -> T:
        refusals = self._loops.client.counters[
            "refused_notifications"
        ]  # of asynchronous calls, too
        if refusals != self._refusals:
            self._refusals = refusals
            self._careful_until = time.monotonic() + CAREFUL
        try:
            return finish(work(session))
        except DjangoError as error:
            cause = error.__cause__
            if isinstance(cause, UNDEFINED):
                raise not_migrated(self._config, session.alias) from error
            if isinstance(cause, psycopg.Error) and cause.sqlstate in REFUSALS:
                self._refused(cause)
            raise

    @property
    def _is_careful(self) -> bool:
        """Whether a transaction that notifies could fail, because the server has refused NOTIFY lately."""
        return time.monotonic() < self._careful_until

    def _refused(self, error: psycopg.Error) -> None:
        """The server refused NOTIFY."""
        client = self._loops.client
        client.counters.add("refused_notifications")
        client.silent(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    def _connection(self, using: str | None) -> BaseDatabaseWrapper:
        alias = self._alias if using is None else using
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


class Pending:
    """What a transaction wrote, to be announced after its commit."""

    def __init__(self, rows: list[Unannounced]) -> None:
        self.rows = rows


class AfterCommit:
    """The callback for `transaction.on_commit`."""

    def __init__(self, sync: Sync, connection: BaseDatabaseWrapper) -> None:
        self._sync = sync
        self._connection = connection
        self.is_called = False

    def __call__(self) -> None:
        """Announce what the transaction wrote."""
        self.is_called = True
        self._sync.announce_committed(self._connection)


_all: WeakSet[Sync] = WeakSet()
_pending: WeakKeyDictionary[BaseDatabaseWrapper, Pending] = WeakKeyDictionary()


def _after_fork_in_child() -> None:
    for sync in list(_all):
        sync.forget()  # a thread that is not here may hold a lock of what it knew


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
