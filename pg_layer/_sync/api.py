"""``layer.sync``: the layer for synchronous code, in Django's transactions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.asyncio import async_unsafe
from django.utils.connection import ConnectionDoesNotExist

from pg_layer._config.aliases import has_databases, name_postgresql_aliases, require_settings
from pg_layer._config.databases import not_migrated
from pg_layer._config.options import Config
from pg_layer._db.errors import NOTIFY_REFUSED, UNDEFINED, Attempts, is_permanent
from pg_layer._db.pool import STOPPING_TIMEOUT
from pg_layer._db.queries import groups as group_queries
from pg_layer._db.queries import send as queries
from pg_layer._db.queries.send import GroupSent, Sent, Unannounced
from pg_layer._db.same_database import alias_of
from pg_layer._send.announcer import PART
from pg_layer._send.operations import Change, Many, OperationBuilder
from pg_layer._send.sender import channel_full, count_group_sent, count_sent
from pg_layer._send.writes import write_changes, write_group_sends, write_sends
from pg_layer._state import log_events
from pg_layer._state.capacity import KnownCapacity
from pg_layer._sync.django_session import DjangoSession, finish, is_in_transaction
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown, PgLayerError

if TYPE_CHECKING:
    from pg_layer._runtime.loops import Loops

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger("pg_layer")

IN_ASYNC_CODE = (
    "You cannot call this from an async context - use a thread or sync_to_async, or"
    " `await layer.group_send(...)`, the asynchronous call, instead of `layer.sync`."
)
RETRY = 0.1  # seconds before the next attempt
# Seconds after a refused NOTIFY, in which transactions unknown to Django do not notify.
QUIET_AFTER_REFUSAL = 600.0


class Work(Protocol[T_co]):
    """The statements of one call.

    ``own``: each is alone in its transaction. ``quiet``: they do not notify, but return the rows
    that must be announced later.
    """

    def __call__(
        self, session: DjangoSession, *, own: bool, quiet: bool
    ) -> Coroutine[Any, Any, T_co]:
        """Run the statements."""
        ...


class Sync:
    """The layer's calls as plain functions, without an event loop.

    The calls run on Django's connection of the thread. Its alias is the layer's, the one for the
    database of the layer's ``dsn``, or ``using``. Inside `transaction.atomic` the message is
    written in the transaction, and announced after the outermost block has committed, in a
    statement of its own: NOTIFY in the transaction would make all other transactions that notify
    wait for its commit. A message is never received if the transaction, or the savepoint that
    contains it, is rolled back. Outside of transactions the message is sent at once.

    In a process in which Django has no databases, the calls of a layer with a ``dsn`` run on the
    layer's own connections.

    Raises the same errors as the asynchronous calls; `ImproperlyConfigured` if no alias leads to
    the database; `SynchronousOnlyOperation` on the thread of a running event loop. Inside a
    transaction the database's errors are raised as Django's, because they concern the transaction.

    Any thread may call. Each thread has its own Django connection.
    """

    def __init__(
        self, layer: object, config: Config, operations: OperationBuilder, loops: Loops
    ) -> None:
        self._layer = layer  # only so that it is not dropped, and closed, before this object
        self._config = config
        self._operations = operations
        self._loops = loops

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
        """Send a message to a channel.

        ``expiry``: seconds the message may wait, from this call on; default: the option ``expiry``.
        ``using``: an alias in DATABASES; default: the layer's.

        Raises `ChannelFull`, `MessageTooLarge`, `TypeError` for a bad name or message, `ValueError`
        for a bad expiry, and the errors of the class.
        """
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
        """Send ``(channel, message)`` pairs in one statement.

        Return for each pair whether it was accepted. A message is not accepted if its channel is
        full. If one of the pairs is wrong, its error is raised before any is sent.
        """
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
        """Send a message to all channels of a group, except the channel ``exclude``.

        A member whose channel is full misses the message. ``expiry`` and ``using``: see `send`.
        """
        self._group_send(using, [self._operations.group_send(group, message, expiry, exclude)])

    def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
        using: str | None = None,
    ) -> list[bool]:
        """Send ``(group, message)`` pairs in one statement.

        Return for each pair whether all members could have it: False if a normal channel in the
        group is full.
        """
        many = self._operations.group_send_many(messages, expiry, exclude)
        return self._group_send(using, many.operations) if many.operations else []

    def group_add(self, group: str, channel: str, *, using: str | None = None) -> None:
        """Add a channel to a group.

        In a transaction this takes effect with the commit. Outside, the channel receives every
        group message that is sent after this returns.
        """
        self._change(using, self._operations.change(group, channel, added=True))

    def group_discard(self, group: str, channel: str, *, using: str | None = None) -> None:
        """Remove a channel from a group, if it is a member.

        In a transaction this takes effect with the commit.
        """
        self._change(using, self._operations.change(group, channel, added=False))

    def group_channels(self, group: str, *, using: str | None = None) -> list[str]:
        """Return the channels in a group.

        Channels of processes that have ended are left out.
        """
        name = self._operations.group(group)

        async def read(session: DjangoSession, **_: bool) -> list[str]:
            return await group_queries.group_channels(session, self._config.prefix, name)

        if self._is_without_django(using):
            return self._finish(
                self._loops.read, name, lambda engine, end: engine.group_channels(name, end)
            )
        return self._run(self._connection(using), read, quiet=True, is_read=True)

    def group_count(self, group: str, *, using: str | None = None) -> int:
        """Return the number of channels in a group.

        Channels of processes that have ended do not count.
        """
        name = self._operations.group(group)

        async def read(session: DjangoSession, **_: bool) -> int:
            return await group_queries.group_count(session, self._config.prefix, name)

        if self._is_without_django(using):
            count: int = self._finish(
                self._loops.read, name, lambda engine, end: engine.group_count(name, end)
            )
            return count
        return self._run(self._connection(using), read, quiet=True, is_read=True)

    # ------------------------------------------------------------------ without Django

    def _is_without_django(self, using: str | None) -> bool:
        """Return whether the layer's own connections run the call.

        So it is in a script: the layer has a ``dsn``, and Django has no settings or no databases.
        No transaction of Django's can concern the call.
        """
        return self._config.dsn is not None and using is None and not has_databases()

    @async_unsafe(IN_ASYNC_CODE)
    def _finish(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        """Run an asynchronous call to its end."""
        return async_to_sync(call)(*args, **options)

    # ------------------------------------------------------------------ writing

    def _send(self, using: str | None, sends: Any) -> list[bool]:
        async def write(
            session: DjangoSession, *, own: bool, quiet: bool
        ) -> tuple[Sent, list[Unannounced]]:
            capacities = self._loops.client.known_capacities
            known = capacities.setdefault(session.connection.alias, KnownCapacity())
            return await write_sends(
                session, self._config.prefix, sends, known, own=own, quiet=quiet
            )

        if self._is_without_django(using):
            return self._finish(self._loops.submit, Many(sends))
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

        if self._is_without_django(using):
            return self._finish(self._loops.submit, Many(sends))
        sent = self._write(using, write)
        count_group_sent(self._loops.client, sends, sent)
        missed = {index for index, _ in sent.missed}
        return [index not in missed for index in range(len(sends))]

    def _change(self, using: str | None, change: Change) -> None:
        if self._is_without_django(using):
            self._finish(self._loops.submit, change)
            return
        config = self._config
        numbered = self._loops.client.next_number()

        async def write(
            session: DjangoSession, *, own: bool, quiet: bool
        ) -> tuple[None, list[Unannounced]]:
            # Also an owner in this process applies the change only after the commit.
            return None, await write_changes(
                session,
                config.prefix,
                config.group_expiry,
                [change],
                own=own,
                quiet=quiet,
                # The commit decides the place of a transaction in the order.
                numbered=numbered if own else None,
            )

        self._write(using, write, is_idempotent=True)
        if change.added:
            try:
                self._loops.joined(change.channel)
            except LayerUnavailable as error:  # the background thread did not start
                raise OutcomeUnknown(
                    f"The change was written, but is not applied yet: {error}"
                ) from error

    def _write(
        self,
        using: str | None,
        write: Work[tuple[T, list[Unannounced]]],
        *,
        is_idempotent: bool = False,
    ) -> T:
        """Run statements that write, and see that their rows are announced."""
        connection = self._connection(using)
        announcer = self._loops.announcer
        deadline = self._deadline()
        if not is_in_transaction(connection):
            # The announcements may take half of the time of the call.
            until = (time.monotonic() + deadline) / 2
            # This call may come from an application's callback that runs after the commit, but
            # before the layer's callback: the messages of the transaction come first.
            self.announce_committed(connection, until)
            self._announce_pending(connection, until)
        result, rows = self._run(
            connection,
            write,
            quiet=bool(announcer),
            is_idempotent=is_idempotent,
            deadline=deadline,
        )
        if rows and connection.in_atomic_block:
            self._announce_after_commit(connection, rows)
        elif rows and not is_in_transaction(connection):
            announcer.add(rows)
            self._loops.announce_soon()
        return result

    # ------------------------------------------------------------------ announcing

    def _announce_after_commit(
        self, connection: BaseDatabaseWrapper, rows: list[Unannounced]
    ) -> None:
        """Announce all rows of the transaction together after its commit."""
        pending = _pending.get(connection)
        if pending is None or pending[0].xid != rows[0].xid:  # of a transaction rolled back before
            pending = _pending[connection] = []
        pending.extend(rows)
        # The rollback of a savepoint removes the callbacks that were registered in it.
        callbacks = (callback for _, callback, *_ in connection.run_on_commit)
        if not any(isinstance(each, AfterCommit) and not each.is_called for each in callbacks):
            transaction.on_commit(AfterCommit(self, connection), using=connection.alias)

    def announce_committed(
        self, connection: BaseDatabaseWrapper, deadline: float | None = None
    ) -> None:
        """Announce the rows that the last transaction wrote.

        Rows that were rolled back with a savepoint do not exist, and are not announced.
        ``deadline``: by `time.monotonic`; default: in ``send_timeout`` seconds.
        """
        if deadline is None:
            deadline = self._deadline()
        if connection.in_atomic_block:  # a test runs the callbacks: nothing is committed
            return
        rows = _pending.pop(connection, None)
        if rows is not None:
            self._announce_pending(connection, deadline)
            if self._loops.announcer or not self._announce(connection, rows, deadline):
                # The next write of this process announces them, or receivers find them.
                self._loops.announcer.add(rows)
                self._loops.announce_soon()

    def _announce_pending(self, connection: BaseDatabaseWrapper, deadline: float) -> None:
        """Announce rows whose announcement has failed before."""
        announcer = self._loops.announcer
        while rows := announcer.first():
            if not self._announce(connection, rows, deadline):
                self._loops.announce_soon()
                return
            announcer.announced(rows)

    def _announce(
        self, connection: BaseDatabaseWrapper, rows: list[Unannounced], deadline: float
    ) -> bool:
        """Announce rows outside of transactions. Return whether that succeeded."""
        for start in range(0, len(rows), PART):
            part = rows[start : start + PART]

            async def announce(
                session: DjangoSession, part: list[Unannounced] = part, **_: bool
            ) -> None:
                await queries.announce(session, part)

            try:
                self._run(connection, announce, quiet=True, is_idempotent=True, deadline=deadline)
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

    def _deadline(self) -> float:
        """Return when a call that begins now must end outside of transactions."""
        is_stopping = self._loops.gives_up
        return time.monotonic() + (STOPPING_TIMEOUT if is_stopping else self._config.send_timeout)

    def _run(
        self,
        connection: BaseDatabaseWrapper,
        work: Work[T],
        *,
        quiet: bool,
        is_idempotent: bool = False,
        is_read: bool = False,
        deadline: float | None = None,
    ) -> T:
        """Run statements in the open transaction, or else until ``deadline``.

        The default of ``deadline`` is in ``send_timeout`` seconds.

        Outside of transactions the statements are repeated after an error that surely undid them.
        If they are not ``quiet`` and the server refuses NOTIFY, they are repeated without it.
        ``is_idempotent``: repeating them after an unknown outcome is harmless. ``is_read``: they
        have no effect.
        """
        gives_up = self._loops.gives_up
        if deadline is None:
            deadline = self._deadline()
        session = DjangoSession(connection, deadline)
        attempts = Attempts(
            self._config,
            is_idempotent=is_idempotent,
            is_read=is_read,
            alias=connection.alias,
            gives_up=lambda: self._loops.gives_up,
        )
        while not is_in_transaction(connection):
            is_sent = False
            try:
                if gives_up and not session.is_connected:
                    raise attempts.final_error(
                        psycopg.OperationalError("The connections to it were lost.")
                    )
                session.connect()
                if is_in_transaction(connection):  # AUTOCOMMIT is off
                    break
                is_sent = True
                return finish(work(session, own=True, quiet=quiet))
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                is_late = time.monotonic() + RETRY >= deadline
                if not is_sent:
                    if is_late or gives_up or is_permanent(cause) or cause.sqlstate is not None:
                        raise attempts.final_error(cause) from error
                elif cause.sqlstate in NOTIFY_REFUSED and not quiet:
                    self._refused(cause)
                    quiet = True
                    continue
                else:
                    attempts.check_retry(cause, is_late=is_late)
            time.sleep(RETRY)
        return self._run_in_transaction(session, work)

    def _run_in_transaction(self, session: DjangoSession, work: Work[T]) -> T:
        connection = session.connection
        # Django does not report the commit of a transaction that it does not manage. So this one
        # notifies, unless the server has refused NOTIFY recently and the transaction would fail.
        quiet_until = self._loops.client.notify_refused_at + QUIET_AFTER_REFUSAL
        quiet = connection.in_atomic_block or time.monotonic() < quiet_until
        try:
            return finish(work(session, own=False, quiet=quiet))
        except DjangoError as error:
            cause = error.__cause__
            if isinstance(cause, UNDEFINED):
                raise not_migrated(self._config, connection.alias) from error
            if isinstance(cause, psycopg.Error) and cause.sqlstate in NOTIFY_REFUSED:
                self._refused(cause)
            raise

    def _refused(self, error: psycopg.Error) -> None:
        """Count and log that the server refused NOTIFY."""
        client = self._loops.client
        client.notify_refused()
        client.log_unannounced(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    @async_unsafe(IN_ASYNC_CODE)
    def _connection(self, using: str | None) -> BaseDatabaseWrapper:
        """Return this thread's connection of an alias; None: the layer's alias."""
        alias = alias_of(self._config) if using is None else using
        require_settings(alias)
        try:
            connection = connections[alias]
        except ConnectionDoesNotExist as error:
            raise ImproperlyConfigured(
                f"pg_layer: there is no alias {alias!r} in DATABASES. {name_postgresql_aliases()}"
            ) from error
        if connection.vendor != "postgresql":
            raise ImproperlyConfigured(
                f"pg_layer: DATABASES[{alias!r}] is {connection.vendor}; layer.sync needs"
                f" PostgreSQL. {name_postgresql_aliases()}"
            )
        return connection


class AfterCommit:
    """The callback for `transaction.on_commit`."""

    def __init__(self, sync: Sync, connection: BaseDatabaseWrapper) -> None:
        self._sync = sync
        self._connection = connection
        self.is_called = False

    def __call__(self) -> None:
        """Announce the rows that the transaction wrote."""
        self.is_called = True
        self._sync.announce_committed(self._connection)


# By connection: the rows of its transaction, to be announced after the commit.
_pending: WeakKeyDictionary[BaseDatabaseWrapper, list[Unannounced]] = WeakKeyDictionary()
