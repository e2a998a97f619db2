"""Synchronous code: threads without an event loop call the layer through ``async_to_sync``."""

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
from tests.project.commands import TIMEOUT, django, eventually

CALLS = 500
THREADS = 8
NAME = "pg_layer_test_threads"

Message = dict[str, Any]


def numbered(n: int) -> Message:
    return {"type": "test.number", "n": n}


@pytest.fixture
def named_dsn(migrated_dsn: str) -> str:
    """Return the DSN of the test's database, with an application name of its own."""
    return make_conninfo(migrated_dsn, application_name=NAME)


@pytest.fixture
def sync_layer(named_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Yield a layer for synchronous code. Close it as synchronous code does."""
    layer = PostgresChannelLayer(dsn=named_dsn, capacity=10_000)
    yield layer
    async_to_sync(layer.close)()


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Return the numbers of the next ``count`` messages."""
    return [(await asyncio.wait_for(layer.receive(channel), TIMEOUT))["n"] for _ in range(count)]


def in_threads(function: Callable[[int], object], count: int = CALLS) -> None:
    """Call the function for each number below ``count``, in several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(function, range(count)))


@contextmanager
def watched_connections(observer: Observer) -> Iterator[Counter[frozenset[int]]]:
    """Count the sets of connections that are open at once, while the block runs."""
    seen: Counter[frozenset[int]] = Counter()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            seen[backends(observer)] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        seen[backends(observer)] += 1


def backends(observer: Observer) -> frozenset[int]:
    """Return the process ids of the backends with the application name of these tests."""
    rows = observer.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (NAME,))
    return frozenset(pid for (pid,) in rows)


def most_at_once(seen: Counter[frozenset[int]]) -> int:
    """Return the largest number of connections that were open at once."""
    return max(map(len, seen))


# ---------------------------------------------------------------------- no loop receives


def test_send_from_threads_uses_one_connection_and_arrives_once(
    sync_layer: PostgresChannelLayer, observer: Observer
) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.send)(channel, numbered(n)))
    assert len(frozenset.union(*seen)) == 1  # one and the same connection
    assert sorted(asyncio.run(receive_numbers(sync_layer, channel, CALLS))) == list(range(CALLS))


def test_group_send_from_threads_arrives_in_one_order_at_all_members(
    sync_layer: PostgresChannelLayer, migrated_dsn: str, observer: Observer
) -> None:
    other = PostgresChannelLayer(dsn=migrated_dsn, capacity=10_000)
    channels = [async_to_sync(layer.new_channel)() for layer in (sync_layer, sync_layer, other)]
    for channel in channels:
        async_to_sync(sync_layer.group_add)("room", channel)
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.group_send)("room", numbered(n)))
    # The same connections all the time. One of them listens, because the process has members.
    assert len(frozenset.union(*seen)) <= 3

    async def receive_all() -> list[list[int]]:
        return [await receive_numbers(sync_layer, channel, CALLS) for channel in channels[:2]]

    async def receive_elsewhere() -> list[int]:
        numbers = await receive_numbers(other, channels[2], CALLS)
        await other.close()
        return numbers

    results = asyncio.run(receive_all())
    assert results[0] == results[1]
    assert sorted(results[0]) == list(range(CALLS))
    assert asyncio.run(receive_elsewhere()) == results[0]


def test_group_add_and_discard_from_threads_take_effect(
    sync_layer: PostgresChannelLayer, observer: Observer
) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    with watched_connections(observer) as seen:
        in_threads(lambda n: async_to_sync(sync_layer.group_add)(f"room-{n}", channel))
    assert len(frozenset.union(*seen)) <= 3
    assert observer.execute(
        "SELECT count(DISTINCT group_name) FROM pg_layer_membership"
    ).fetchone() == (CALLS,)
    in_threads(lambda n: async_to_sync(sync_layer.group_send)(f"room-{n}", numbered(n)))
    assert sorted(asyncio.run(receive_numbers(sync_layer, channel, CALLS))) == list(range(CALLS))
    in_threads(lambda n: async_to_sync(sync_layer.group_discard)(f"room-{n}", channel))
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


def test_consecutive_calls_of_a_thread_keep_their_order(sync_layer: PostgresChannelLayer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    async_to_sync(sync_layer.group_add)("room", channel)
    for n in range(0, 100, 2):
        async_to_sync(sync_layer.send)(channel, numbered(n))
        async_to_sync(sync_layer.group_send)("room", numbered(n + 1))
    assert asyncio.run(receive_numbers(sync_layer, channel, 100)) == list(range(100))


def test_receive_from_threads_gives_each_message_once(sync_layer: PostgresChannelLayer) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    for n in range(20):
        async_to_sync(sync_layer.send)(channel, numbered(n))
        async_to_sync(sync_layer.send)("jobs", numbered(n))
        assert async_to_sync(sync_layer.receive)(channel) == numbered(n)
    jobs: list[int] = []
    in_threads(lambda n: jobs.append(async_to_sync(sync_layer.receive)("jobs")["n"]), 20)
    assert sorted(jobs) == list(range(20))


def test_background_loop_idle_closes_its_connection_and_opens_it_again(
    named_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg_layer._runtime.engine, "SENDER_IDLE", 0.2)
    layer = PostgresChannelLayer(dsn=named_dsn)
    for _ in range(2):
        async_to_sync(layer.send)("jobs", numbered(0))
        assert len(backends(observer)) == 1
        eventually(lambda: not backends(observer), "idle connection closed")
    async_to_sync(layer.close)()


def test_close_ends_the_background_loop_and_its_thread(named_dsn: str, observer: Observer) -> None:
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


def test_exceptions_of_the_background_loop_reach_the_calling_thread(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(dsn=migrated_dsn, capacity=1, max_message_size=1000)
    async_to_sync(layer.send)("jobs", numbered(0))
    with pytest.raises(ChannelFull):
        async_to_sync(layer.send)("jobs", numbered(1))
    with pytest.raises(MessageTooLarge):
        async_to_sync(layer.group_send)("room", {"type": "test", "text": "x" * 2000})
    with pytest.raises(TypeError):
        async_to_sync(layer.send)("no channel", numbered(1))
    with pytest.raises(TypeError):
        async_to_sync(layer.receive)("specific.0123456789abcdef!1")
    async_to_sync(layer.close)()


def test_process_using_the_background_loop_removes_its_rows_at_exit(
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
    # Its lease and memberships are gone. Messages to others and to groups stay until they expire.
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)
    assert observer.execute(
        "SELECT count(*) FROM pg_layer_client WHERE expires_at > clock_timestamp()"
    ).fetchone() == (0,)
    addresses = observer.execute("SELECT address FROM pg_layer_message ORDER BY id").fetchall()
    assert addresses == [("asgi!@room",), ("asgi!:jobs",)]


# ---------------------------------------------------------------------- beside a loop that receives


async def test_calls_from_threads_beside_a_receiving_loop_share_its_connections(
    make_layer: MakeLayer, named_dsn: str, observer: Observer
) -> None:
    layer = make_layer(dsn=named_dsn, capacity=10_000)
    channels = [await layer.new_channel() for _ in range(3)]
    await layer.group_add("room", channels[1])
    waiting = [asyncio.create_task(receive_numbers(layer, channel, CALLS)) for channel in channels]

    def call(n: int) -> None:
        async_to_sync(layer.send)(channels[0], numbered(n))
        async_to_sync(layer.group_send)("room", numbered(n))
        async_to_sync(layer.group_add)(f"room-{n}", channels[2])
        async_to_sync(layer.group_send)(f"room-{n}", numbered(n))

    with watched_connections(observer) as seen:
        await asyncio.to_thread(in_threads, call)
        for task in waiting:
            assert sorted(await task) == list(range(CALLS))
    assert most_at_once(seen) <= 3


async def test_process_sending_before_it_receives_keeps_within_its_connections(
    make_layer: MakeLayer, named_dsn: str, observer: Observer
) -> None:
    layer = make_layer(dsn=named_dsn, capacity=10_000)
    with watched_connections(observer) as seen:
        await asyncio.to_thread(
            in_threads, lambda n: async_to_sync(layer.send)("jobs", numbered(n)), 50
        )
        readers = [asyncio.create_task(receive_numbers(layer, "jobs", 100)) for _ in range(4)]
        await asyncio.to_thread(
            in_threads, lambda n: async_to_sync(layer.send)("jobs", numbered(n)), 350
        )
        numbers = [n for task in readers for n in await task]
    assert Counter(numbers) == Counter(range(50)) + Counter(range(350))
    # The background loop may still close its connection when the owner loop opens its last one.
    assert most_at_once(seen) <= 4
    assert len(backends(observer)) <= 3


async def test_calls_in_a_thread_of_sync_to_async_use_the_loop(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=1000)
    channel = await layer.new_channel()

    def view() -> None:
        for n in range(0, 50, 2):
            async_to_sync(layer.send)(channel, numbered(n))
            async_to_sync(layer.group_add)("room", channel)
            async_to_sync(layer.group_send)("room", numbered(n + 1))

    await sync_to_async(view)()
    assert await receive_numbers(layer, channel, 50) == list(range(50))


async def test_send_from_a_thread_while_the_receiving_loop_is_busy_arrives_later(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(send_timeout=30)
    channel = await layer.new_channel()
    await layer.send(channel, numbered(-1))
    assert await receive_numbers(layer, channel, 1) == [-1]
    begun = threading.Event()
    ended = threading.Event()

    def send_all() -> None:
        begun.set()
        for n in range(10):
            async_to_sync(layer.send)(channel, numbered(n))
        ended.set()

    thread = threading.Thread(target=send_all)
    thread.start()
    begun.wait()
    ended.wait(0.3)  # the loop does nothing else meanwhile
    assert await receive_numbers(layer, channel, 10) == list(range(10))
    await asyncio.to_thread(thread.join)  # the last send may still wait for its answer by this loop


async def test_send_from_a_thread_while_the_loop_is_stuck_raises_after_its_timeout(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(send_timeout=0.2)
    channel = await layer.new_channel()
    await layer.send(channel, numbered(-1))
    assert await receive_numbers(layer, channel, 1) == [-1]
    outcome: list[BaseException | None] = []
    ended = threading.Event()

    def send() -> None:
        try:
            async_to_sync(layer.send)(channel, numbered(0))
        except BaseException as error:
            outcome.append(error)
        ended.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert ended.wait(TIMEOUT)  # this loop is stuck meanwhile, and nothing else writes
    thread.join()
    assert [type(error) for error in outcome] == [LayerUnavailable]
    # The message that raised is not sent later.
    await layer.send(channel, numbered(1))
    assert await receive_numbers(layer, channel, 1) == [1]


def test_group_send_from_a_thread_while_owner_loops_change_arrives_once(
    sync_layer: PostgresChannelLayer, observer: Observer
) -> None:
    channel = async_to_sync(sync_layer.new_channel)()
    async_to_sync(sync_layer.group_add)("room", channel)
    count = 120
    failed: list[int] = []

    def send_all() -> None:
        for n in range(count):
            try:
                async_to_sync(sync_layer.group_send)("room", numbered(n))
            except LayerUnavailable:
                failed.append(n)  # it was in flight when its loop ended: it may be sent or not

    thread = threading.Thread(target=send_all)
    thread.start()
    numbers: list[int] = []
    while thread.is_alive():
        numbers += asyncio.run(receive_some(sync_layer, channel, 3))
    while found := asyncio.run(receive_some(sync_layer, channel, 1)):
        numbers += found
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) | set(failed) == set(range(count))
    assert [n for n in numbers if n not in failed] == sorted(set(numbers) - set(failed))


async def receive_some(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Return up to ``count`` numbers, or fewer if none comes for a second."""
    numbers: list[int] = []
    try:
        while len(numbers) < count:
            numbers.append((await asyncio.wait_for(layer.receive(channel), 1))["n"])
    except asyncio.TimeoutError:
        pass
    return numbers


def test_backends_counts_a_connection_with_the_name_of_the_tests(
    named_dsn: str, observer: Observer
) -> None:
    """Check the helper: if it saw no connections, the bounds in this module would prove nothing."""
    assert not backends(observer)
    with psycopg.connect(named_dsn):
        assert len(backends(observer)) == 1
