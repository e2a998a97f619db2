"""Synchronous code: threads without an event loop that call the layer through `async_to_sync`."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from psycopg.conninfo import make_conninfo

import pg_layer._runtime.engine
from pg_layer import ChannelFull, LayerUnavailable, MessageTooLarge, PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.project.commands import PATIENCE, django, eventually

CALLS = 500
THREADS = 8
NAME = "pg_layer_test_threads"

Message = dict[str, Any]


def number(n: int) -> Message:
    return {"type": "test.number", "n": n}


@pytest.fixture
def named_dsn(migrated_dsn: str) -> str:
    """The test's database, for connections that can be told from others."""
    return make_conninfo(migrated_dsn, application_name=NAME)


@pytest.fixture
def sync_layer(named_dsn: str) -> Iterator[PostgresChannelLayer]:
    """A layer for synchronous code, closed as synchronous code does it."""
    layer = PostgresChannelLayer(dsn=named_dsn, capacity=10_000)
    yield layer
    async_to_sync(layer.close)()


async def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """The numbers of the next messages."""
    return [(await asyncio.wait_for(layer.receive(channel), PATIENCE))["n"] for _ in range(count)]


def in_threads(function: Callable[[int], object], count: int = CALLS) -> None:
    """Call it for each number below `count`, in several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(function, range(count)))


@contextmanager
def watched_connections(observer: Observer) -> Iterator[Counter[frozenset[int]]]:
    """Counts the sets of connections that were seen at once, as long as the block runs."""
    seen: Counter[frozenset[int]] = Counter()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.02):
            seen[backends(observer)] += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        seen[backends(observer)] += 1


def backends(observer: Observer) -> frozenset[int]:
    rows = observer.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (NAME,))
    return frozenset(pid for (pid,) in rows)


def most(seen: Counter[frozenset[int]]) -> int:
    """How many connections there were at once."""
    return max(map(len, seen))


# ---------------------------------------------------------------------- where no loop receives


def test_sends_from_threads(sync_layer: PostgresChannelLayer, observer: Observer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.send)(channel, number(n)))
    assert len(frozenset.union(*seen)) == 1  # one and the same connection
    assert sorted(asyncio.run(received(sync_layer, channel, CALLS))) == list(range(CALLS))


def test_group_sends_from_threads(
    sync_layer: PostgresChannelLayer, migrated_dsn: str, observer: Observer
) -> None:
    other = PostgresChannelLayer(dsn=migrated_dsn, capacity=10_000)
    channels = [async_to_sync(layer.new_channel)() for layer in (sync_layer, sync_layer, other)]
    for channel in channels:
        async_to_sync(sync_layer.group_add)("room", channel)
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.group_send)("room", number(n)))
    assert len(frozenset.union(*seen)) <= 3  # the same ones: a process with members listens

    async def receive_all() -> list[list[int]]:
        return [await received(sync_layer, channel, CALLS) for channel in channels[:2]]

    async def receive_elsewhere() -> list[int]:
        numbers = await received(other, channels[2], CALLS)
        await other.close()
        return numbers

    results = asyncio.run(receive_all())
    assert results[0] == results[1]
    assert sorted(results[0]) == list(range(CALLS))
    assert asyncio.run(receive_elsewhere()) == results[0]


def test_group_adds_from_threads(sync_layer: PostgresChannelLayer, observer: Observer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.group_add)(f"room-{n}", channel))
    assert len(frozenset.union(*seen)) <= 3
    assert observer.execute(
        "SELECT count(DISTINCT group_name) FROM pg_layer_membership"
    ).fetchone() == (CALLS,)
    in_threads(lambda n: async_to_sync(sync_layer.group_send)(f"room-{n}", number(n)))
    assert sorted(asyncio.run(received(sync_layer, channel, CALLS))) == list(range(CALLS))
    in_threads(lambda n: async_to_sync(sync_layer.group_discard)(f"room-{n}", channel))
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


def test_calls_in_a_row_keep_their_order(sync_layer: PostgresChannelLayer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    async_to_sync(sync_layer.group_add)("room", channel)
    for n in range(0, 100, 2):
        async_to_sync(sync_layer.send)(channel, number(n))
        async_to_sync(sync_layer.group_send)("room", number(n + 1))
    assert asyncio.run(received(sync_layer, channel, 100)) == list(range(100))


def test_receive_from_threads(sync_layer: PostgresChannelLayer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    for n in range(20):
        async_to_sync(sync_layer.send)(channel, number(n))
        async_to_sync(sync_layer.send)("jobs", number(n))
        assert async_to_sync(sync_layer.receive)(channel) == number(n)
    jobs: list[int] = []
    in_threads(lambda n: jobs.append(async_to_sync(sync_layer.receive)("jobs")["n"]), 20)
    assert sorted(jobs) == list(range(20))


def test_background_loop_idle_closes_its_connection(
    named_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg_layer._runtime.engine, "SENDER_IDLE", 0.2)
    layer = PostgresChannelLayer(dsn=named_dsn)
    for _ in range(2):
        async_to_sync(layer.send)("jobs", number(0))
        assert len(backends(observer)) == 1
        eventually(lambda: not backends(observer), "idle connection closed")
    async_to_sync(layer.close)()


def test_close_ends_the_background_loop(named_dsn: str, observer: Observer) -> None:
    layer = PostgresChannelLayer(dsn=named_dsn)
    for _ in range(2):
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
        assert 1 < len(backends(observer)) <= 3
        assert len(background_threads()) == 1
        async_to_sync(layer.close)()
        assert not background_threads()
        eventually(lambda: not backends(observer), "the server has ended the connections")
        assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pg_layer-background"]


def test_exceptions_reach_the_calling_thread(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(dsn=migrated_dsn, capacity=1, max_message_size=1000)
    async_to_sync(layer.send)("jobs", number(0))
    with pytest.raises(ChannelFull):
        async_to_sync(layer.send)("jobs", number(1))
    with pytest.raises(MessageTooLarge):
        async_to_sync(layer.group_send)("room", {"type": "test", "text": "x" * 2000})
    with pytest.raises(TypeError):
        async_to_sync(layer.send)("no channel", number(1))
    with pytest.raises(TypeError):
        async_to_sync(layer.receive)("specific.0123456789abcdef!1")
    async_to_sync(layer.close)()


def test_process_that_used_the_background_loop_ends_in_order(
    migrated_dsn: str, observer: Observer
) -> None:
    code = """
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

layer = get_channel_layer()
channel = async_to_sync(layer.new_channel)()
async_to_sync(layer.group_add)("room", channel)
async_to_sync(layer.group_send)("room", {"type": "test"})
async_to_sync(layer.send)("jobs", {"type": "test"})
print("done")
"""
    assert django(migrated_dsn, code) == "done"
    # Its lease and memberships went with it; messages to others and to groups stay until they expire.
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)
    assert observer.execute(
        "SELECT count(*) FROM pg_layer_client WHERE expires_at > clock_timestamp()"
    ).fetchone() == (0,)
    addresses = observer.execute("SELECT address FROM pg_layer_message ORDER BY id").fetchall()
    assert addresses == [("asgi!@room",), ("asgi!:jobs",)]


# ---------------------------------------------------------------------- beside a loop that receives


async def test_calls_from_threads_beside_a_receiving_loop(
    make_layer: MakeLayer, named_dsn: str, observer: Observer
) -> None:
    layer = make_layer(dsn=named_dsn, capacity=10_000)
    channels = [await layer.new_channel() for _ in range(3)]
    await layer.group_add("room", channels[1])
    waiting = [asyncio.create_task(received(layer, channel, CALLS)) for channel in channels]

    def call(n: int) -> None:
        async_to_sync(layer.send)(channels[0], number(n))
        async_to_sync(layer.group_send)("room", number(n))
        async_to_sync(layer.group_add)(f"room-{n}", channels[2])
        async_to_sync(layer.group_send)(f"room-{n}", number(n))

    with watched_connections(observer) as seen:
        await asyncio.to_thread(in_threads, call)
        for task in waiting:
            assert sorted(await task) == list(range(CALLS))
    assert most(seen) <= 3


async def test_a_process_that_sent_before_it_serves_keeps_within_its_connections(
    make_layer: MakeLayer, named_dsn: str, observer: Observer
) -> None:
    layer = make_layer(dsn=named_dsn, capacity=10_000)
    with watched_connections(observer) as seen:
        await asyncio.to_thread(
            in_threads, lambda n: async_to_sync(layer.send)("jobs", number(n)), 50
        )
        readers = [asyncio.create_task(received(layer, "jobs", 100)) for _ in range(4)]
        await asyncio.to_thread(
            in_threads, lambda n: async_to_sync(layer.send)("jobs", number(n)), 350
        )
        numbers = [n for task in readers for n in await task]
    assert Counter(numbers) == Counter(range(50)) + Counter(range(350))
    # The background loop may still be closing its connection when the owner loop opens its last one.
    assert most(seen) <= 4
    assert len(backends(observer)) <= 3


async def test_threads_of_sync_to_async_call_back_into_the_loop(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=1000)
    channel = await layer.new_channel()

    def view() -> None:
        for n in range(0, 50, 2):
            async_to_sync(layer.send)(channel, number(n))
            async_to_sync(layer.group_add)("room", channel)
            async_to_sync(layer.group_send)("room", number(n + 1))

    await sync_to_async(view)()
    assert await received(layer, channel, 50) == list(range(50))


async def test_a_thread_sends_while_the_receiving_loop_is_busy(make_layer: MakeLayer) -> None:
    layer = make_layer(send_timeout=30)
    channel = await layer.new_channel()
    await layer.send(channel, number(-1))
    assert await received(layer, channel, 1) == [-1]
    begun = threading.Event()
    ended = threading.Event()

    def sends() -> None:
        begun.set()
        for n in range(10):
            async_to_sync(layer.send)(channel, number(n))
        ended.set()

    thread = threading.Thread(target=sends)
    thread.start()
    begun.wait()
    ended.wait(0.3)  # the loop does nothing else meanwhile
    assert await received(layer, channel, 10) == list(range(10))
    thread.join()


async def test_a_thread_does_not_hang_on_a_loop_that_is_stuck(make_layer: MakeLayer) -> None:
    layer = make_layer(send_timeout=0.2)
    channel = await layer.new_channel()
    await layer.send(channel, number(-1))
    assert await received(layer, channel, 1) == [-1]
    outcome: list[BaseException | None] = []
    ended = threading.Event()

    def send() -> None:
        try:
            async_to_sync(layer.send)(channel, number(0))
        except BaseException as error:
            outcome.append(error)
        ended.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert ended.wait(PATIENCE)  # as long as this loop is stuck, nobody writes
    thread.join()
    assert [type(error) for error in outcome] == [LayerUnavailable]
    # Given up, it is not sent later either.
    await layer.send(channel, number(1))
    assert await received(layer, channel, 1) == [1]


def test_a_thread_sends_while_owner_loops_come_and_go(
    sync_layer: PostgresChannelLayer, observer: Observer
) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    async_to_sync(sync_layer.group_add)("room", channel)
    count = 120
    failed: list[int] = []

    def sends() -> None:
        for n in range(count):
            try:
                async_to_sync(sync_layer.group_send)("room", number(n))
            except LayerUnavailable:
                failed.append(n)  # in flight as its loop ended: it may have gone out or not

    thread = threading.Thread(target=sends)
    thread.start()
    numbers: list[int] = []
    while thread.is_alive():
        numbers += asyncio.run(received_within(sync_layer, channel, 3))
    while found := asyncio.run(received_within(sync_layer, channel, 1)):
        numbers += found
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) | set(failed) == set(range(count))
    assert [n for n in numbers if n not in failed] == sorted(set(numbers) - set(failed))


async def received_within(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Up to `count` numbers, as long as they come without a long wait."""
    numbers: list[int] = []
    try:
        while len(numbers) < count:
            numbers.append((await asyncio.wait_for(layer.receive(channel), 1))["n"])
    except asyncio.TimeoutError:
        pass
    return numbers


def test_the_observer_sees_connections(named_dsn: str, observer: Observer) -> None:
    assert not backends(observer)
    with psycopg.connect(named_dsn):
        assert len(backends(observer)) == 1
