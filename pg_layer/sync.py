"""``layer.sync``: the layer for synchronous code, on Django's own connection and in its transactions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist
from psycopg import errors

from pg_layer import roster, sql, store
from pg_layer.aliases import alias_of, not_migrated
from pg_layer.client import inbox_of
from pg_layer.config import Config
from pg_layer.django_session import DjangoSession
from pg_layer.faults import REFUSALS, UNDEFINED, is_hopeless, judge, unavailable
from pg_layer.ops import Drafts, GroupSend, Regroup, Send
from pg_layer.room import Floors, Room
from pg_layer.sender import channel_full

if TYPE_CHECKING:
    from pg_layer.homes import Homes

T = TypeVar("T")

RETRY = 0.1  # seconds before the next attempt
CAREFUL = 600.0  # seconds for which a transaction is protected after the server has refused NOTIFY
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
        self._refusals = 0  # of NOTIFY, that were seen
        self._careful_until = 0.0
        _all.add(self)
        self.forget()

    def forget(self) -> None:
        """What was seen of ids and of room says nothing any more."""
        # By alias, and of which generation of its: each leads to a server of its own.
        self._rooms: dict[str, tuple[int, Room]] = {}

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
            using, lambda session: roster.group_channels(session, prefix, name), is_idempotent=True
        )

    def group_count(self, group: str, *, using: str | None = None) -> int:
        """As `PostgresChannelLayer.group_count`."""
        work = partial(roster.group_count, prefix=self._config.prefix, group=self._drafts.group(group))
        return self._run(using, work, is_idempotent=True)

    # ------------------------------------------------------------------ how they are done

    def _send(self, using: str | None, sends: Any) -> list[bool]:
        prefix = self._config.prefix
        channels, payloads, expiries, capacities = zip(*sends, strict=True)
        first: Send = sends[0]

        async def send_one(session: DjangoSession) -> set[int]:
            # Not before it is connected: it may lead to another server than before.
            room, inbox = self._room_of(session), inbox_of(prefix, first.channel)
            floor = room.floor_of(inbox, first.channel)
            is_full, look = await store.send_one(session, prefix, *first, floor)
            if floor is not None and look is not None:
                room.learn(
                    channels,
                    capacities,
                    Floors((inbox,), (floor,)),
                    look.waiting,
                    Floors((inbox,), (look.floor,)),
                )
            return {0} if is_full else set()

        async def send_batch(session: DjangoSession) -> set[int]:
            room = self._room_of(session)
            floors = room.floors(channels)
            full, looks = await store.send_batch(
                session, prefix, channels, payloads, expiries, capacities, floors
            )
            if floors is not None and looks is not None:
                room.learn(channels, capacities, floors, looks.waiting, looks.floors)
            return full

        full = self._run(using, send_one if len(sends) == 1 else send_batch)
        counters = self._homes.client.counters
        counters.add("batches")
        counters.add("sent", len(sends) - len(full))
        counters.add("refused_full", len(full))
        return [index not in full for index in range(len(sends))]

    def _room_of(self, session: DjangoSession) -> Room:
        """What is known of the room on the server that the session leads to."""
        generation = session.generation
        known = self._rooms.get(session.alias)
        if known is None or known[0] != generation:
            known = self._rooms[session.alias] = (generation, Room())
        return known[1]

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
            lambda session: roster.regroup(
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
        session = DjangoSession(self._connection(using))
        result = self._run_on(session, work, is_idempotent)
        session.hand_on_notifies()
        return result

    def _run_on(self, session: DjangoSession, work: Work[T], is_idempotent: bool) -> T:
        deadline = time.monotonic() + self._config.send_timeout
        is_silent = False
        while not session.is_in_transaction:
            left = deadline - time.monotonic()
            try:
                session.connect(left)
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                is_late = time.monotonic() + RETRY >= deadline
                if is_late or is_hopeless(cause) or cause.sqlstate is not None:
                    raise unavailable(cause) from error
                time.sleep(RETRY)
                continue
            if session.is_in_transaction:  # AUTOCOMMIT is off
                break
            session.deadline = deadline
            if time.monotonic() >= deadline:  # nothing was sent: that is better known than cut short
                raise unavailable(TimeoutError("connecting took all the time there was"))
            try:
                if not is_silent:
                    return _finish(work(session))
                with transaction.atomic(using=session.alias):
                    return _finish(store.without_ringing(session, work))
            except DjangoError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                if cause.sqlstate in REFUSALS and not is_silent:
                    self._refused(cause)
                    is_silent = True
                    continue
                is_late = time.monotonic() + RETRY >= deadline
                judge(cause, is_idempotent, is_late, self._config, session.alias)
                if isinstance(cause, errors.InvalidSqlStatementName):
                    continue  # it will not be asked for again
            time.sleep(RETRY)
        session.deadline = None
        return self._run_in_transaction(session, work)

    def _run_in_transaction(self, session: DjangoSession, work: Work[T]) -> T:
        refusals = self._homes.client.counters["refused_notifies"]  # also those that asynchronous calls met
        if refusals != self._refusals:
            self._refusals = refusals
            self._careful_until = time.monotonic() + CAREFUL
        try:
            if time.monotonic() >= self._careful_until:
                return _finish(work(session))
            return _finish(_carefully(session, work))
        except DjangoError as error:
            cause = error.__cause__
            if isinstance(cause, UNDEFINED):
                raise not_migrated(self._config, session.alias) from error
            if _is_refusal(error):
                self._refused(cause)
            raise

    def _refused(self, error: Any) -> None:
        """The server refused NOTIFY."""
        self._homes.client.counters.add("refused_notifies")
        self._homes.client.unheard(f"the server refuses NOTIFY: {error.diag.message_primary}.")

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


async def _carefully(session: DjangoSession, work: Work[T]) -> T:
    """Within somebody's transaction, which is not to fail should the server refuse NOTIFY."""
    if session.is_pipelining:  # a refusal would end the pipeline, savepoint or not: nothing is tried
        return await store.without_ringing(session, work)
    await session.execute(sql.SAVEPOINT)
    try:
        result = await work(session)
    except DjangoError as error:
        if not _is_refusal(error):
            raise
        await session.execute(sql.ROLLBACK_TO_SAVEPOINT)
        return await store.without_ringing(session, work)
    await session.execute(sql.RELEASE_SAVEPOINT)
    return result


def _is_refusal(error: DjangoError) -> bool:
    cause = error.__cause__
    return isinstance(cause, psycopg.Error) and cause.sqlstate in REFUSALS


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that awaits nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("The coroutine waits for something.")


_all: WeakSet[Sync] = WeakSet()


def _after_fork_in_child() -> None:
    for sync in list(_all):
        sync.forget()  # a thread that is not here may hold a lock of what it knew


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
