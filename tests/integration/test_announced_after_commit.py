"""``layer.sync`` in a transaction: messages are announced after the commit, never within it.

A transaction that has called NOTIFY holds a lock, one for the whole cluster, until its commit is
durable.
"""

from __future__ import annotations

import asyncio
import os
import signal
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import psycopg
import pytest
from django.apps import apps
from django.db import connection, connections, transaction
from django.test import TestCase

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.conftest import migrate
from tests.integration.test_django import postgres
from tests.processes import (
    UNHURRIED,
    Link,
    Processes,
    ProcessFailed,
    listen,
    new_layer,
    open_layer,
    receive,
    until,
)
from tests.project.configured import configured
from tests.stand_ins import find_first

T = TypeVar("T")

GROUP = "room"
# The lock of NOTIFY belongs to the whole cluster, not to a database.
CLUSTER_LOCKS = (
    "SELECT pid, mode FROM pg_locks"
    " WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND objid = 0"
)


@contextmanager
def on_django(dsn: str, **options: object) -> Iterator[PostgresChannelLayer]:
    """Return a layer on Django's default database. Callers close it if a loop has used it."""
    layer = PostgresChannelLayer(**{**UNHURRIED, **options})
    with configured(layer, DATABASES={"default": postgres(dsn)}, SECRET_KEY="x"):
        apps.populate([])
        yield layer


@pytest.fixture
async def layer(migrated_dsn: str) -> AsyncIterator[PostgresChannelLayer]:
    """The layer of the application, which sends in its transactions."""
    with on_django(migrated_dsn) as layer:
        yield layer
        await layer.close()


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread whose connection to the database is closed in the end."""

    def run() -> T:
        try:
            return function()
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


async def member(layer: PostgresChannelLayer) -> str:
    """Return a channel of a layer that listens, in the group."""
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add(GROUP, channel)
    return channel


async def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[Any]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


def number(n: object) -> dict[str, Any]:
    return {"type": "test", "number": n}


# ---------------------------------------------------------------------- the lock of the cluster


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server whose commits can be delayed, and that prepares transactions."""
    with PostgresServer(fsync=True, settings={"max_prepared_transactions": 2}) as server:
        yield server


@pytest.fixture
def database(server: PostgresServer) -> Iterator[str]:
    """The DSN of a migrated database on that server."""
    dsn = server.create_database("layer")
    migrate(dsn)
    yield dsn
    server.execute("DROP DATABASE layer WITH (FORCE)")


@contextmanager
def commits_held_up(server: PostgresServer, observer: Observer) -> Iterator[None]:
    """Durable commits wait, with all their locks, for a standby that does not exist.

    Transactions with ``synchronous_commit = off`` do not wait.
    """

    def wait_for(standby: str) -> None:
        server.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'")
        server.execute("SELECT pg_reload_conf()")

    def is_set() -> bool:
        return observer.execute("SHOW synchronous_standby_names").fetchone() == ("nobody",)

    wait_for("nobody")
    try:
        # A session applies the setting when it begins its next statement.
        while not is_set():
            observer.execute("SELECT pg_sleep(0.01)")
        yield
    finally:
        wait_for("")


def waiting(observer: Observer, wait_event: str) -> list[int]:
    """Return the pids of the sessions that wait for this event."""
    query = "SELECT pid FROM pg_stat_activity WHERE wait_event = %s"
    return [pid for (pid,) in observer.execute(query, [wait_event])]


async def test_transactions_that_send_commit_at_once(server: PostgresServer, database: str) -> None:
    """Commits wait for the disk. Four transactions send and commit at the same time.

    No transaction waits for another one, because none has the lock of the cluster. Other messages
    of the layer arrive meanwhile. The messages of the transactions arrive after their commits.
    """
    reader, other = new_layer(database), new_layer(database)
    with (
        on_django(database) as layer,
        psycopg.connect(database, autocommit=True) as observer,
    ):
        observer.execute("CREATE TABLE note (number int)")
        channel = await member(reader)
        await other.group_send(GROUP, number("before"))
        assert await received(reader, channel, 1) == ["before"]

        def commit(n: int) -> None:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("INSERT INTO note VALUES (%s)", [n])
                layer.sync.group_send(GROUP, number(n))
                layer.sync.send(channel, number(n))

        commits: list[asyncio.Task[None]] = []
        try:
            with commits_held_up(server, observer):
                commits += [asyncio.create_task(in_thread(partial(commit, n))) for n in range(4)]
                await until(
                    lambda: len(waiting(observer, "SyncRep") + waiting(observer, "object")) == 4
                )
                assert waiting(observer, "object") == []
                assert observer.execute(CLUSTER_LOCKS).fetchall() == []
                await other.group_send(GROUP, number("meanwhile"))
                assert await received(reader, channel, 1) == ["meanwhile"]
            await asyncio.gather(*commits)
            assert sorted(await received(reader, channel, 8)) == [0, 0, 1, 1, 2, 2, 3, 3]
        finally:
            await asyncio.gather(*commits, return_exceptions=True)
            for each in (layer, reader, other):
                await each.close()


async def test_open_transaction_that_has_sent_holds_no_lock_of_the_cluster(
    layer: PostgresChannelLayer, make_layer: MakeLayer, observer: Observer
) -> None:
    """An open transaction that has sent in every way has not taken the lock of NOTIFY."""
    reader, other = make_layer(), make_layer()
    channel = await member(reader)

    def look() -> list[Any]:
        with transaction.atomic():
            layer.sync.send(channel, number(1))
            layer.sync.group_send(GROUP, number(2))
            layer.sync.send_many([(channel, number(3)), (channel, number(4))])
            layer.sync.group_send_many([(GROUP, number(5)), (GROUP, number(6))])
            locks = observer.execute(CLUSTER_LOCKS).fetchall()
            # In the database, too: other clients send without waiting for this transaction.
            asyncio.run_coroutine_threadsafe(other.group_send(GROUP, number(0)), loop).result(30)
        return locks

    loop = asyncio.get_running_loop()
    assert await in_thread(look) == []
    assert await received(reader, channel, 7) == list(range(7))


# ---------------------------------------------------------------------- after the commit, or never


async def test_message_of_a_transaction_arrives_after_its_commit(
    layer: PostgresChannelLayer, make_layer: MakeLayer
) -> None:
    """Messages that other layers send while the transaction is open arrive before its messages."""
    reader, other = make_layer(), make_layer()
    channel = await member(reader)
    loop = asyncio.get_running_loop()

    async def meanwhile() -> list[int]:
        await other.group_send(GROUP, number(0))
        await other.send(channel, number(1))
        return await received(reader, channel, 2)

    def commit() -> None:
        with transaction.atomic():
            layer.sync.group_send(GROUP, number(2))
            layer.sync.send(channel, number(3))
            assert asyncio.run_coroutine_threadsafe(meanwhile(), loop).result(30) == [0, 1]

    await in_thread(commit)
    assert await received(reader, channel, 2) == [2, 3]


async def test_message_of_a_transaction_that_is_rolled_back_never_arrives(
    layer: PostgresChannelLayer, make_layer: MakeLayer
) -> None:
    """The message is not announced at once, with the next transaction, or at a heartbeat."""
    reader = make_layer(heartbeat=0.2)
    channel = await member(reader)

    def roll_back() -> None:
        with suppress(ZeroDivisionError), transaction.atomic():
            layer.sync.group_send(GROUP, number(-1))
            layer.sync.send(channel, number(-2))
            raise ZeroDivisionError

    def commit() -> None:
        with transaction.atomic():
            layer.sync.group_send(GROUP, number(1))

    await in_thread(roll_back)
    await in_thread(commit)
    assert await received(reader, channel, 1) == [1]
    beats = 3
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(reader.receive(channel), beats * 0.2)


async def test_message_of_a_savepoint_that_is_rolled_back_never_arrives(
    layer: PostgresChannelLayer, make_layer: MakeLayer
) -> None:
    """The transaction's other messages arrive at once, also those sent after the savepoint.

    Django discards on_commit callbacks together with a savepoint. The messages after it must be
    announced nevertheless. The reader's next heartbeat is in 20 minutes.
    """
    reader = make_layer()
    channel = await member(reader)

    def commit(*, sends_before: bool, by_hand: bool) -> None:
        with transaction.atomic():
            if sends_before:
                layer.sync.group_send(GROUP, number(1))
            if by_hand:
                savepoint = transaction.savepoint()
                layer.sync.group_send(GROUP, number(-1))
                transaction.savepoint_rollback(savepoint)
            else:
                with suppress(ZeroDivisionError), transaction.atomic():
                    layer.sync.send(channel, number(-1))
                    layer.sync.group_send(GROUP, number(-2))
                    raise ZeroDivisionError
            layer.sync.group_send(GROUP, number(2))
            with transaction.atomic():
                layer.sync.send(channel, number(3))

    for by_hand in (False, True):
        await in_thread(partial(commit, sends_before=False, by_hand=by_hand))
        assert await received(reader, channel, 2) == [2, 3]
        await in_thread(partial(commit, sends_before=True, by_hand=by_hand))
        assert await received(reader, channel, 3) == [1, 2, 3]


async def test_message_sent_on_commit_arrives_after_those_of_its_transaction(
    layer: PostgresChannelLayer, make_layer: MakeLayer
) -> None:
    """Messages of on_commit callbacks arrive last, even if a callback runs before the layer's."""
    reader = make_layer()
    channel = await member(reader)

    def commit() -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: layer.sync.group_send(GROUP, number(3)))
            layer.sync.group_send(GROUP, number(1))
            transaction.on_commit(lambda: layer.sync.send(channel, number(4)))
            layer.sync.send(channel, number(2))

    await in_thread(commit)
    assert await received(reader, channel, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("begins", ["without autocommit", "BEGIN", "psycopg"])
async def test_message_of_a_transaction_that_django_does_not_manage_arrives(
    layer: PostgresChannelLayer, make_layer: MakeLayer, begins: str
) -> None:
    """Django calls nothing after such a commit. The messages arrive nevertheless."""
    reader = make_layer(heartbeat=1)
    channel = await member(reader)

    def send(n: int) -> None:
        layer.sync.group_send(GROUP, number(n))
        layer.sync.send(channel, number(n + 1))

    def commit() -> None:
        if begins == "without autocommit":
            transaction.set_autocommit(False)
            send(-2)
            transaction.rollback()
            send(1)
            transaction.commit()
            transaction.set_autocommit(True)
        elif begins == "BEGIN":
            with connection.cursor() as cursor:
                cursor.execute("BEGIN")
                send(1)
                cursor.execute("COMMIT")
        else:
            connection.ensure_connection()
            with connection.connection.transaction():
                send(1)

    await in_thread(commit)
    assert sorted(await received(reader, channel, 2)) == [1, 2]


# ---------------------------------------------------------------------- the announcement

# The search path finds this function before the real one, which it calls.
NOTED_NOTIFY = """
    CREATE SCHEMA noting;
    CREATE TABLE noting.noted (id serial, xid xid8);
    CREATE FUNCTION noting.pg_notify(text, text) RETURNS void LANGUAGE sql AS $$
        INSERT INTO noting.noted (xid) VALUES (pg_current_xact_id());
        SELECT pg_catalog.pg_notify($1, $2);
    $$;
"""


async def test_messages_of_one_transaction_are_announced_in_one_other_transaction_in_order(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """A transaction sends 20 times and announces none. One later transaction announces all."""
    observer.execute(NOTED_NOTIFY.encode())
    find_first(observer, "noting")
    reader = make_layer()
    channel = await member(reader)
    observer.execute("TRUNCATE noting.noted")

    def commit() -> str:
        with transaction.atomic():
            for n in range(0, 20, 2):
                own_layer.sync.group_send(GROUP, number(n))
                own_layer.sync.send(channel, number(n + 1))
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_current_xact_id()::text")
                return str(cursor.fetchone()[0])

    with on_django(migrated_dsn) as own_layer:
        own = await in_thread(commit)
        assert await received(reader, channel, 20) == list(range(20))
        await own_layer.close()
    announcing = observer.execute("SELECT DISTINCT xid::text FROM noting.noted").fetchall()
    assert len(announcing) == 1
    assert announcing != [(own,)]


async def test_capture_on_commit_callbacks_of_a_test_case_runs_the_announcement(
    layer: PostgresChannelLayer, make_layer: MakeLayer
) -> None:
    """A test of the application runs the callbacks in its transaction, which never commits.

    One callback announces all messages of a block, also of a later block. It raises nothing and
    leaves the test's transaction usable. Nothing arrives, because the test is rolled back.
    """
    reader = make_layer(heartbeat=0.2)
    channel = await member(reader)

    class Case(TestCase):
        def runTest(self) -> None:
            for n in range(2):
                with self.captureOnCommitCallbacks(execute=True) as callbacks:
                    layer.sync.group_send(GROUP, number(-n))
                    layer.sync.send(channel, number(-n))
                assert len(callbacks) == 1
            with self.captureOnCommitCallbacks(execute=True):
                transaction.on_commit(lambda: layer.sync.send(channel, number(-3)))
            with self.captureOnCommitCallbacks(execute=False):
                layer.sync.group_send(GROUP, number(-4))
            assert layer.sync.group_channels(GROUP) == [channel]

    result = unittest.TestResult()
    await in_thread(lambda: unittest.TestSuite([Case()]).run(result))
    assert result.wasSuccessful(), result.errors + result.failures

    def commit() -> None:
        with transaction.atomic():
            layer.sync.group_send(GROUP, number(1))

    await in_thread(commit)
    assert await received(reader, channel, 1) == [1]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(reader.receive(channel), 3 * 0.2)


# ---------------------------------------------------------------------- a lost announcement


async def end_after_commit(link: Link, dsn: str, channel: str) -> None:
    """Commit a transaction that sends, and die before anything that follows the commit."""

    def commit() -> None:
        with on_django(dsn) as layer, transaction.atomic():
            transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))
            for n in range(0, 6, 2):
                layer.sync.group_send(GROUP, number(n))
                layer.sync.send(channel, number(n + 1))

    await asyncio.to_thread(commit)


async def test_messages_of_a_process_killed_after_its_commit_arrive_within_two_heartbeats(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """The process dies between the commit and the announcement. Readers find the messages.

    They arrive once and in order, in every process that has a member.
    """
    heartbeat = 1.0
    readers = [make_layer(heartbeat=heartbeat) for _ in range(2)]
    channel, other = [await member(reader) for reader in readers]
    with pytest.raises(ProcessFailed):
        await processes.start(end_after_commit, migrated_dsn, channel).result()
    both = asyncio.gather(received(readers[0], channel, 6), received(readers[1], other, 3))
    first, second = await asyncio.wait_for(both, 2 * heartbeat + 10)
    assert (first, second) == (list(range(6)), [0, 2, 4])
    # Later searches find no message a second time.
    channels = (channel, other)
    more = [asyncio.create_task(receive(*each)) for each in zip(readers, channels, strict=True)]
    done, _ = await asyncio.wait(more, timeout=2.5 * heartbeat)
    assert not done
    async with open_layer(migrated_dsn) as last:
        for each in channels:
            await last.send(each, number("last"))
    assert await asyncio.gather(*more) == [number("last")] * 2


# ---------------------------------------------------------------------- two-phase commit


async def test_messages_of_a_prepared_transaction_are_received_once_when_it_is_committed(
    database: str,
) -> None:
    """Nothing announces the messages. They wait for at most two heartbeats."""
    reader, other = new_layer(database, **{**UNHURRIED, "heartbeat": 0.5}), new_layer(database)
    with on_django(database) as layer, psycopg.connect(database, autocommit=True) as observer:
        channel = await member(reader)

        def prepare() -> None:
            with transaction.atomic():
                layer.sync.group_send(GROUP, number(1))
                layer.sync.send(channel, number(2))
                with connection.cursor() as cursor:
                    cursor.execute("PREPARE TRANSACTION 'sent'")

        try:
            await in_thread(prepare)
            await other.send(channel, number(0))
            assert await received(reader, channel, 1) == [0]
            observer.execute("COMMIT PREPARED 'sent'")
            assert await received(reader, channel, 2) == [1, 2]
            await other.send(channel, number(3))
            assert await received(reader, channel, 1) == [3]
        finally:
            await reader.close()
            await other.close()
