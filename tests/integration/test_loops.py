"""Event loops: one for each test, several at once, loops that stop, and loops that end.

These tests are no coroutines, because they run the loops themselves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import LayerUnavailable, PostgresChannelLayer
from pg_layer._runtime import engine
from tests.processes import new_layer
from tests.project.commands import TIMEOUT, eventually, run, succeeded

T = TypeVar("T")
Message = dict[str, Any]
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


def waiting_backends(dsn: str) -> list[int]:
    """Return the process ids of backends that wait for a lock."""
    with psycopg.connect(dsn) as conn:
        rows = conn.execute(
            """
            SELECT l.pid FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
            WHERE d.datname = current_database() AND NOT l.granted
            """
        )
        return [pid for (pid,) in rows]


@contextmanager
def locked(dsn: str) -> Iterator[Callable[[], None]]:
    """Lock the clients and memberships. Yield a function that returns when a statement waits."""
    with psycopg.connect(dsn) as conn:
        conn.execute("LOCK TABLE pg_layer_client, pg_layer_membership")
        yield lambda: eventually(
            lambda: bool(waiting_backends(dsn)), "a statement waits for the lock"
        )
        conn.rollback()


def terminate_waiting(dsn: str) -> None:
    """Terminate the backends that wait for a lock. Their statements have no effect."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for pid in waiting_backends(dsn):
            conn.execute("SELECT pg_terminate_backend(%s)", (pid,))
    eventually(lambda: not waiting_backends(dsn), "their processes have ended")


def left_behind(dsn: str) -> tuple[int, int]:
    """Return the number of clients that have not ended, and of memberships."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            """
            SELECT (SELECT count(*) FROM pg_layer_client WHERE ended_at IS NULL),
                (SELECT count(*) FROM pg_layer_membership)
            """
        ).fetchone()
    assert row is not None
    return row


@contextmanager
def connected_layer(dsn: str, **options: Any) -> Iterator[PostgresChannelLayer]:
    """Yield a layer, and close it on a new loop: the loop that used it last may have ended."""
    layer = PostgresChannelLayer(dsn=dsn, **options)
    try:
        yield layer
    finally:
        asyncio.run(layer.close())


@pytest.fixture
def layer(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    with connected_layer(migrated_dsn) as layer:
        yield layer


@pytest.fixture
def other(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """A layer in the role of another process."""
    with connected_layer(migrated_dsn) as layer:
        yield layer


def number(n: int) -> Message:
    return {"type": "test.number", "n": n}


async def soon(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wait_for(work, TIMEOUT)


async def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Return the numbers of the next messages."""
    return [(await soon(layer.receive(channel)))["n"] for _ in range(count)]


async def waits(task: asyncio.Task[Any]) -> None:
    """Let a task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()


class LoopThread:
    """A thread with an event loop that runs until `stop`."""

    def __init__(self, make_loop: MakeLoop = asyncio.new_event_loop) -> None:
        self._make_loop = make_loop
        self._is_halted = False
        self._ready: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.loop, self._stop = self._ready.get()

    def _run(self) -> None:
        async def serve() -> None:
            stop = asyncio.Event()
            self._ready.put((asyncio.get_running_loop(), stop))
            await stop.wait()

        loop = self._make_loop()
        try:
            loop.run_until_complete(serve())
        except RuntimeError:
            if not self._is_halted:
                raise
        else:
            end(loop)

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(TIMEOUT)

    def halt(self) -> None:
        """Stop the loop without cancelling its tasks or closing it."""
        self._is_halted = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """End the loop as `asyncio.run` does, and the thread with it."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
        elif self._is_halted and not self.loop.is_closed():
            end(self.loop)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


def run_on(make_loop: MakeLoop, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine as `asyncio.run` does, on a loop of a certain kind."""
    loop = make_loop()
    try:
        return loop.run_until_complete(main())
    finally:
        end(loop)


def end(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop as `asyncio.run` does."""

    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        loop.run_until_complete(cancel_all())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


@pytest.fixture
def loop_thread() -> Iterator[Callable[..., LoopThread]]:
    threads: list[LoopThread] = []

    def make(make_loop: MakeLoop = asyncio.new_event_loop) -> LoopThread:
        threads.append(LoopThread(make_loop))
        return threads[-1]

    yield make
    for thread in threads:
        thread.stop()


@pytest.fixture
def new_loop() -> Iterator[MakeLoop]:
    """Make loops that a test runs repeatedly."""
    loops: list[asyncio.AbstractEventLoop] = []

    def make() -> asyncio.AbstractEventLoop:
        loops.append(asyncio.new_event_loop())
        return loops[-1]

    yield make
    for loop in loops:
        end(loop)


def backends(dsn: str, application_name: str) -> set[int]:
    """Return the process ids of the backends of one application name."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        rows = conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", (application_name,)
        )
        return {pid for (pid,) in rows}


# ---------------------------------------------------------------------- one loop after the other


def test_loop_per_test_keeps_memberships(layer: PostgresChannelLayer) -> None:
    async def join() -> str:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        return channel

    channel = asyncio.run(join())
    for n in range(4):

        async def talk(n: int = n) -> list[int]:
            await layer.group_send("room", number(n))
            return await received(layer, channel, 1)

        assert asyncio.run(talk()) == [n]


def test_loop_per_test_keeps_queued_messages(
    layer: PostgresChannelLayer, other: PostgresChannelLayer
) -> None:
    async def start() -> tuple[str, list[int]]:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        for n in range(3):
            await other.send(channel, number(n))
            await other.group_send("room", number(10 + n))
        # The messages after the first are fetched with it, and wait in the channel queue.
        return channel, await received(layer, channel, 1)

    channel, numbers = asyncio.run(start())
    while len(numbers) < 6:
        numbers += asyncio.run(received(layer, channel, 1))
    assert numbers == [0, 10, 1, 11, 2, 12]


def test_message_sent_between_two_loops_arrives(
    layer: PostgresChannelLayer, other: PostgresChannelLayer
) -> None:
    async def start() -> str:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, number(0))
        assert await received(layer, channel, 1) == [0]
        return channel

    async def from_elsewhere() -> None:
        await other.send(channel, number(1))
        await other.group_send("room", number(2))
        await other.send("jobs", number(3))

    async def resume() -> list[int]:
        return await received(layer, channel, 2) + await received(layer, "jobs", 1)

    channel = asyncio.run(start())
    asyncio.run(from_elsewhere())
    assert asyncio.run(resume()) == [1, 2, 3]


def test_receive_ended_with_its_loop_takes_no_message(
    layer: PostgresChannelLayer, other: PostgresChannelLayer
) -> None:
    async def left_waiting() -> str:
        channel = await layer.new_channel()
        await layer.send(channel, number(0))
        assert await received(layer, channel, 1) == [0]
        # `asyncio.run` cancels these.
        tasks = [asyncio.create_task(layer.receive(name)) for name in (channel, channel, "jobs")]
        for task in tasks:
            await waits(task)
        return channel

    async def from_elsewhere() -> None:
        for n in range(1, 4):
            await other.send(channel, number(n))
            await other.send("jobs", number(n))

    async def resume() -> tuple[list[int], list[int]]:
        return await received(layer, channel, 3), await received(layer, "jobs", 3)

    channel = asyncio.run(left_waiting())
    asyncio.run(from_elsewhere())
    assert asyncio.run(resume()) == ([1, 2, 3], [1, 2, 3])


def test_loop_closed_without_cancelling_its_tasks_is_replaced(migrated_dsn: str) -> None:
    # In a process of its own, because Python warns of the pending tasks of such a loop.
    code = """
import asyncio, os
from pg_layer import PostgresChannelLayer

layer, other = (PostgresChannelLayer(dsn=os.environ["PG_LAYER_TEST_PROJECT_DSN"]) for _ in range(2))

async def start():
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "test", "n": 0})
    assert (await layer.receive(channel))["n"] == 0
    return channel

async def resume():
    await other.group_send("room", {"type": "test", "n": 1})
    print((await layer.receive(channel))["n"])

loop = asyncio.new_event_loop()
channel = loop.run_until_complete(start())
loop.close()
asyncio.run(resume())
asyncio.run(layer.close())
asyncio.run(other.close())
"""
    result = run(migrated_dsn, "-c", code)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr


def test_connections_are_closed_when_their_loop_ends(migrated_dsn: str) -> None:
    name = "pg_layer_test_loops"
    with connected_layer(make_conninfo(migrated_dsn, application_name=name)) as layer:

        async def use() -> None:
            channel = await layer.new_channel()
            await asyncio.gather(*(layer.send(channel, number(n)) for n in range(20)))
            await received(layer, channel, 20)

        for _ in range(4):
            asyncio.run(use())
            eventually(lambda: not backends(migrated_dsn, name), "no connections without a loop")


def test_loop_per_test_causes_no_warnings(migrated_dsn: str) -> None:
    code = """
import asyncio, os
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=os.environ["PG_LAYER_TEST_PROJECT_DSN"])

async def test(n):
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "test", "n": n})
    assert (await layer.receive(channel))["n"] == n
    await layer.group_discard("room", channel)

for n in range(5):
    asyncio.run(test(n))
print("done")
"""
    assert succeeded(run(migrated_dsn, "-W", "error", "-c", code)) == "done"


# ---------------------------------------------------------------------- one loop, run repeatedly


def test_loop_run_repeatedly_receives(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, new_loop: MakeLoop
) -> None:
    loop = new_loop()
    channel = loop.run_until_complete(layer.new_channel())
    loop.run_until_complete(layer.group_add("room", channel))
    for n in range(5):
        loop.run_until_complete(layer.group_send("room", number(n)))
        asyncio.run(other.send(channel, number(10 + n)))
        assert loop.run_until_complete(received(layer, channel, 2)) == [n, 10 + n]


def test_loop_that_does_not_run_is_not_the_owner(
    layer: PostgresChannelLayer, new_loop: MakeLoop, loop_thread: Callable[..., LoopThread]
) -> None:
    async def start() -> str:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, number(0))
        assert await received(layer, channel, 1) == [0]
        return channel

    channel = new_loop().run_until_complete(start())
    asyncio.run(layer.group_send("room", number(1)))
    assert asyncio.run(received(layer, channel, 1)) == [1]
    thread = loop_thread()
    thread.do(layer.group_send("room", number(2)))
    assert thread.do(received(layer, channel, 1)) == [2]


def test_former_owner_loop_that_runs_again_receives(
    migrated_dsn: str,
    new_loop: MakeLoop,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "pg_layer_test_loops"
    loops = [new_loop(), new_loop()]
    dsn = make_conninfo(migrated_dsn, application_name=name)
    with connected_layer(dsn, heartbeat=1) as layer, connected_layer(migrated_dsn) as other:
        channel = loops[0].run_until_complete(layer.new_channel())
        loops[0].run_until_complete(layer.group_add("room", channel))
        for turn in range(6):
            first = 4 * turn

            async def talk(first: int = first) -> list[int]:
                await layer.group_send("room", number(first))
                await layer.send(channel, number(first + 1))
                await layer.send("jobs", number(first + 3))
                numbers = await received(layer, channel, 3) + await received(layer, "jobs", 1)
                await asyncio.sleep(1.1)  # a heartbeat; the loop's former engine must not send one
                return numbers

            waiting = loops[turn % 2].create_task(talk())
            asyncio.run(other.send(channel, number(first + 2)))
            numbers = loops[turn % 2].run_until_complete(waiting)
            assert sorted(numbers) == list(range(first, first + 4))
            assert len(backends(migrated_dsn, name)) <= 3
    assert not [
        record
        for record in caplog.records
        # asyncio's development mode warns of every slow step. On a busy machine any step is.
        if record.levelname in ("ERROR", "WARNING")
        and not record.getMessage().startswith("Executing ")
    ]


# ---------------------------------------------------------------------- two loops at once


def test_two_loops_receive_at_the_same_time_on_their_own_channels(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, loop_thread: Callable[..., LoopThread]
) -> None:
    threads = [loop_thread(), loop_thread()]
    channels = [thread.do(layer.new_channel()) for thread in threads]
    for thread, channel in zip(threads, channels, strict=True):
        thread.do(layer.group_add("room", channel))
    futures = [
        thread.start(received(layer, channel, 60))
        for thread, channel in zip(threads, channels, strict=True)
    ]

    async def from_elsewhere() -> None:
        for n in range(0, 60, 2):
            await other.group_send("room", number(n))
            for channel in channels:
                await other.send(channel, number(n + 1))

    asyncio.run(from_elsewhere())
    assert [future.result(TIMEOUT) for future in futures] == [list(range(60))] * 2


@pytest.mark.parametrize("loops", [1, 2])
def test_receivers_do_not_wait_while_jobs_wait(
    migrated_dsn: str,
    other: PostgresChannelLayer,
    loop_thread: Callable[..., LoopThread],
    loops: int,
) -> None:
    # No heartbeat claims the jobs instead.
    with connected_layer(migrated_dsn, heartbeat=240, lease=600) as layer:
        threads = [loop_thread() for _ in range(loops)]
        elsewhere = loop_thread()

        async def send(numbers: range) -> None:
            for n in numbers:
                await other.send("jobs", number(n))

        for n in range(60):
            # Each receiver takes one job, and waits for the others.
            workers = [threads[k % loops].start(received(layer, "jobs", 1)) for k in range(3)]
            elsewhere.do(send(range(3 * n, 3 * n + 3)))
            numbers = [worker.result(TIMEOUT)[0] for worker in workers]
            assert sorted(numbers) == [3 * n, 3 * n + 1, 3 * n + 2]
        threads[0].do(layer.close())


@pytest.mark.parametrize(
    "is_own", [True, False], ids=["sent by the same process", "sent by another"]
)
def test_two_loops_reading_one_normal_channel_share_its_jobs(
    layer: PostgresChannelLayer,
    other: PostgresChannelLayer,
    loop_thread: Callable[..., LoopThread],
    is_own: bool,
) -> None:
    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    async def work() -> None:
        while (n := (await layer.receive("jobs"))["n"]) >= 0:
            done.put(n)

    threads = [loop_thread(), loop_thread()]
    workers = [thread.start(work()) for thread in threads for _ in range(2)]

    async def from_elsewhere() -> None:
        sender = layer if is_own else other
        for n in range(80):
            await sender.send("jobs", number(n))

    asyncio.run(from_elsewhere())
    assert sorted(done.get(timeout=TIMEOUT) for _ in range(80)) == list(range(80))

    async def end() -> None:
        for _ in workers:
            await other.send("jobs", number(-1))

    asyncio.run(end())
    for worker in workers:
        worker.result(TIMEOUT)
    assert done.empty()


def test_send_while_the_owner_loop_runs_in_another_thread_arrives(
    migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    name = "pg_layer_test_loops"
    with connected_layer(
        make_conninfo(migrated_dsn, application_name=name), capacity=1000
    ) as layer:
        owner = loop_thread()
        channel = owner.do(layer.new_channel())
        owner.do(layer.group_add("room", channel))
        future = owner.start(received(layer, channel, 150))
        eventually(lambda: len(backends(migrated_dsn, name)) >= 2, "the owner listens")

        async def from_this_thread() -> None:
            for n in range(0, 100, 2):
                await layer.send(channel, number(n))
                await layer.group_send("room", number(n + 1))
            await asyncio.gather(*(layer.send(channel, number(n)) for n in range(100, 150)))

        asyncio.run(from_this_thread())
        numbers = future.result(TIMEOUT)
        assert numbers[:100] == list(range(100))
        assert sorted(numbers[100:]) == list(range(100, 150))
        assert len(backends(migrated_dsn, name)) <= 3
        owner.do(layer.close())


def test_loop_that_receives_takes_over_from_a_loop_that_sends(
    migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    name = "pg_layer_test_loops"
    with connected_layer(make_conninfo(migrated_dsn, application_name=name)) as layer:
        sender, receiver = loop_thread(), loop_thread()
        for n in range(10):
            sender.do(layer.send("jobs", number(n)))
        assert receiver.do(received(layer, "jobs", 10)) == list(range(10))
        waiting = receiver.start(received(layer, "jobs", 10))
        for n in range(10):
            sender.do(layer.send("jobs", number(n)))
        assert sorted(waiting.result(TIMEOUT)) == list(range(10))
        eventually(
            lambda: len(backends(migrated_dsn, name)) <= 3, "one listens, two are in the pool"
        )
        receiver.do(layer.close())


@pytest.mark.parametrize("kind", ["specific", "normal"])
def test_waiting_loop_takes_over_when_the_owner_loop_ends(
    layer: PostgresChannelLayer,
    other: PostgresChannelLayer,
    loop_thread: Callable[..., LoopThread],
    kind: str,
) -> None:
    first, second = loop_thread(), loop_thread()

    async def start() -> str:
        channel = await layer.new_channel()
        await layer.send(channel, number(0))
        assert await received(layer, channel, 1) == [0]
        return channel

    specific = first.do(start())  # so that the first is the owner loop
    channel = specific if kind == "specific" else "jobs"
    waiting = second.start(received(layer, channel, 3))
    asyncio.run(other.send(channel, number(1)))
    first.stop()
    asyncio.run(other.send(channel, number(2)))
    asyncio.run(other.send(channel, number(3)))
    assert waiting.result(TIMEOUT) == [1, 2, 3]


def test_jobs_claimed_by_an_ended_loop_come_before_the_rest(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, migrated_dsn: str
) -> None:
    async def start() -> None:
        await other.send("jobs", number(0))
        assert await received(layer, "jobs", 1) == [0]

    for _ in range(10):
        asyncio.run(start())
        with psycopg.connect(migrated_dsn, autocommit=True) as conn:
            [(address, fence)] = conn.execute(
                "SELECT address, fence FROM pg_layer_client WHERE pid > 0"
            ).fetchall()
            for n in range(1, 4):
                asyncio.run(other.send("jobs", number(n)))
                if n == 1:
                    # As if the answer had been lost when the claiming loop ended.
                    conn.execute(
                        "SELECT pg_layer_claim('asgi', 'jobs', %s, %s, 0, 1)", (address, fence)
                    )
        assert asyncio.run(received(layer, "jobs", 3)) == [1, 2, 3]


def test_receive_cancelled_on_a_foreign_loop_takes_no_message(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, loop_thread: Callable[..., LoopThread]
) -> None:
    owner = loop_thread()
    channel = owner.do(layer.new_channel())
    owner.do(layer.send(channel, number(-1)))
    assert owner.do(received(layer, channel, 1)) == [-1]

    async def impatient() -> list[int]:
        numbers: list[int] = []
        while len(numbers) < 40:
            task = asyncio.create_task(layer.receive(channel))
            await asyncio.sleep(0)
            task.cancel()
            try:
                numbers.append((await task)["n"])
            except asyncio.CancelledError:
                await asyncio.sleep(0.001)
        return numbers

    async def from_elsewhere() -> None:
        for n in range(40):
            await other.send(channel, number(n))

    waiting = loop_thread().start(soon(impatient()))
    asyncio.run(from_elsewhere())
    assert waiting.result(TIMEOUT) == list(range(40))


def test_foreign_loop_ending_while_it_waits_leaves_messages_to_others(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, loop_thread: Callable[..., LoopThread]
) -> None:
    owner, foreign = loop_thread(), loop_thread()
    channel = owner.do(layer.new_channel())
    owner.do(layer.send(channel, number(0)))
    assert owner.do(received(layer, channel, 1)) == [0]
    left = [foreign.start(layer.receive(name)) for name in (channel, "jobs")]
    foreign.do(asyncio.sleep(0))
    foreign.stop()
    for future in left:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(TIMEOUT)
    for name in (channel, "jobs"):
        asyncio.run(other.send(name, number(1)))
        assert owner.do(received(layer, name, 1)) == [1]


async def is_in_room(layer: PostgresChannelLayer, channel: str) -> bool:
    return await layer.group_channels("room") == [channel]


async def joins(layer: PostgresChannelLayer, channel: str) -> None:
    await layer.group_add("room", channel)
    assert await is_in_room(layer, channel)


async def joins_with_another(layer: PostgresChannelLayer, channel: str) -> None:
    other = f"specific.{'0' * 16}!1"  # of another process
    await layer.group_add("others", other)
    assert await layer.group_channels("others") == [other]


async def leaves(layer: PostgresChannelLayer, channel: str) -> None:
    await layer.group_discard("room", channel)
    assert not await layer.group_count("room")


async def counts(layer: PostgresChannelLayer, channel: str) -> None:
    assert await layer.group_count("room") == 1


async def lists(layer: PostgresChannelLayer, channel: str) -> None:
    assert await is_in_room(layer, channel)


async def flushes(layer: PostgresChannelLayer, channel: str) -> None:
    await layer.flush()
    assert not await layer.group_count("room")


async def examines(layer: PostgresChannelLayer, channel: str) -> None:
    assert not (await layer.health())["problems"]


CALLS = [joins, joins_with_another, leaves, counts, lists, flushes, examines]


@pytest.mark.parametrize("is_halted", [False, True], ids=["ended", "halted"])
@pytest.mark.parametrize("call", CALLS)
def test_call_served_by_another_loop_succeeds_when_that_loop_ends(
    migrated_dsn: str,
    loop_thread: Callable[..., LoopThread],
    caplog: pytest.LogCaptureFixture,
    call: Callable[[PostgresChannelLayer, str], Coroutine[Any, Any, None]],
    is_halted: bool,
) -> None:
    # No timeout ends the call instead.
    with connected_layer(migrated_dsn, heartbeat=240, lease=600, send_timeout=600) as layer:
        owner, caller = loop_thread(), loop_thread()
        channel = owner.do(layer.new_channel())
        owner.do(joins(layer, channel))
        owner.do(examines(layer, channel))
        with locked(migrated_dsn) as until_one_waits:
            waiting = caller.start(call(layer, channel))
            until_one_waits()
            if is_halted:
                owner.halt()
            else:
                owner.stop()
        waiting.result(TIMEOUT)
        owner.stop()
        caller.do(layer.close())
    assert left_behind(migrated_dsn)[0] == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_call_on_a_loop_during_a_takeover_from_it_succeeds(
    migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    with connected_layer(migrated_dsn, heartbeat=240, lease=600) as layer:
        sender, receiver = loop_thread(), loop_thread()
        sender.do(layer.send("jobs", number(0)))
        with locked(migrated_dsn) as until_one_waits:
            waiting = sender.start(layer.group_count("room"))
            until_one_waits()
            main = layer._loops.main_engine
            receiving = receiver.start(received(layer, "jobs", 1))
            eventually(lambda: main is not None and main.stopped.done(), "the sender has stopped")
        assert waiting.result(TIMEOUT) == 0
        assert receiving.result(TIMEOUT) == [0]
        receiver.do(layer.close())


def test_receive_from_a_full_channel_succeeds_when_the_owner_loop_halts(
    migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    """`receive()` waits until the owner loop has deleted the row, which senders count."""
    options: dict[str, Any] = {"heartbeat": 240, "lease": 600, "send_timeout": 600, "capacity": 1}
    with connected_layer(migrated_dsn, **options) as layer, psycopg.connect(migrated_dsn) as conn:
        owner, foreign = loop_thread(), loop_thread()
        channel = owner.do(layer.new_channel())
        owner.do(joins(layer, channel))
        waiting = foreign.start(received(layer, channel, 1))
        conn.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN OLD; END'"
        )
        conn.execute(
            "CREATE TRIGGER wait BEFORE DELETE ON pg_layer_message"
            " FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        conn.commit()
        conn.execute("SELECT pg_advisory_xact_lock(1)")
        owner.do(layer.send(channel, number(0)))
        eventually(lambda: bool(waiting_backends(migrated_dsn)), "the row is being deleted")
        owner.halt()
        assert waiting.result(TIMEOUT) == [0]
        conn.rollback()
        owner.stop()
        foreign.do(layer.close())


def test_call_served_by_another_loop_fails_when_the_layer_is_closed(
    migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    name = "pg_layer_test_loops"
    dsn = make_conninfo(migrated_dsn, application_name=name)
    with connected_layer(dsn, heartbeat=240, lease=600) as layer:
        owner, caller = loop_thread(), loop_thread()
        owner.do(joins(layer, owner.do(layer.new_channel())))
        with locked(migrated_dsn) as until_one_waits:
            waiting = caller.start(layer.group_count("room"))
            until_one_waits()
            closing = owner.start(layer.close())
            with pytest.raises(LayerUnavailable, match="closed"):
                waiting.result(TIMEOUT)
        closing.result(TIMEOUT)
        assert not backends(migrated_dsn, name)


def test_late_membership_write_of_a_halted_loop_is_refused(
    layer: PostgresChannelLayer, migrated_dsn: str, new_loop: MakeLoop
) -> None:
    """A network may delay the last statement of a loop that has stopped."""
    loop = new_loop()
    channel = loop.run_until_complete(layer.new_channel())
    loop.run_until_complete(joins(layer, channel))
    with psycopg.connect(migrated_dsn, autocommit=True) as conn:
        [(address, fence)] = conn.execute("SELECT address, fence FROM pg_layer_client").fetchall()
        asyncio.run(leaves(layer, channel))
        with pytest.raises(psycopg.Error):
            conn.execute(
                "SELECT pg_layer_write_memberships("
                "%s, %s, %s, %s, ARRAY[NULL::float8], '{}', '{}', '{}', '{}', '{}')",
                (address, fence, ["room"], [channel]),
            )
    assert not asyncio.run(layer.group_count("room"))


# ---------------------------------------------------------------------- closing


def test_close_from_a_foreign_loop_closes_the_client(
    migrated_dsn: str, other: PostgresChannelLayer, loop_thread: Callable[..., LoopThread]
) -> None:
    name = "pg_layer_test_loops"
    layer = PostgresChannelLayer(dsn=make_conninfo(migrated_dsn, application_name=name))
    owner = loop_thread()
    channel = owner.do(layer.new_channel())
    owner.do(layer.group_add("room", channel))
    owner.do(layer.send(channel, number(0)))
    assert owner.do(received(layer, channel, 1)) == [0]
    asyncio.run(layer.close())
    assert not backends(migrated_dsn, name)
    with psycopg.connect(migrated_dsn) as conn:
        assert conn.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)
        assert conn.execute(
            "SELECT count(*) FROM pg_layer_client WHERE expires_at > now()"
        ).fetchone() == (0,)
    # The layer begins a new client, on any loop.
    channel = asyncio.run(layer.new_channel())
    asyncio.run(layer.group_add("room", channel))
    asyncio.run(other.group_send("room", number(1)))
    assert owner.do(received(layer, channel, 1)) == [1]
    owner.do(layer.close())


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("steps", range(12))
def test_close_cancelled_at_any_step_goes_on(
    layer: PostgresChannelLayer,
    migrated_dsn: str,
    loop_thread: Callable[..., LoopThread],
    steps: int,
) -> None:
    """Another close waits for it. A receiver does not wait any more."""
    foreign = loop_thread()

    async def use() -> concurrent.futures.Future[Message]:
        channel = await layer.new_channel()
        await joins(layer, channel)
        waiting = foreign.start(layer.receive(channel))
        await asyncio.wrap_future(foreign.start(asyncio.sleep(0)))
        closing = asyncio.create_task(layer.close())
        for _ in range(1 + steps):
            await asyncio.sleep(0)
        await cancelled(closing)
        await layer.close()
        assert left_behind(migrated_dsn) == (0, 0)
        return waiting

    with pytest.raises(LayerUnavailable):
        asyncio.run(use()).result(TIMEOUT)


def test_close_cancelled_before_the_database_answers_goes_on(
    layer: PostgresChannelLayer, migrated_dsn: str
) -> None:
    async def use() -> None:
        await joins(layer, await layer.new_channel())
        with locked(migrated_dsn) as until_one_waits:
            closing = asyncio.create_task(layer.close())
            await asyncio.to_thread(until_one_waits)
            await cancelled(closing)
        await asyncio.to_thread(
            eventually, lambda: left_behind(migrated_dsn) == (0, 0), "it has closed"
        )

    asyncio.run(use())


def test_close_whose_loop_ends_is_completed_by_the_next_close(
    layer: PostgresChannelLayer, migrated_dsn: str
) -> None:
    async def use() -> None:
        await joins(layer, await layer.new_channel())
        until_one_waits = held.enter_context(locked(migrated_dsn))
        closing = asyncio.create_task(layer.close())
        await asyncio.to_thread(until_one_waits)
        await cancelled(closing)

    with ExitStack() as held:
        asyncio.run(use())
        terminate_waiting(migrated_dsn)
    assert left_behind(migrated_dsn) == (1, 1)
    asyncio.run(layer.close())
    assert left_behind(migrated_dsn) == (0, 0)


def test_close_failing_is_completed_by_the_next_close(
    layer: PostgresChannelLayer, migrated_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CLOSE_TIMEOUT", 0.5)

    async def use() -> None:
        await joins(layer, await layer.new_channel())
        with locked(migrated_dsn):
            await layer.close()
            await asyncio.to_thread(terminate_waiting, migrated_dsn)
        assert left_behind(migrated_dsn) == (1, 1)
        await layer.close()
        assert left_behind(migrated_dsn) == (0, 0)

    asyncio.run(use())


def test_close_from_a_foreign_loop_succeeds_when_the_owner_loop_ends(
    layer: PostgresChannelLayer, migrated_dsn: str, loop_thread: Callable[..., LoopThread]
) -> None:
    owner, closer = loop_thread(), loop_thread()
    owner.do(joins(layer, owner.do(layer.new_channel())))
    with locked(migrated_dsn) as until_one_waits:
        closing = closer.start(layer.close())
        until_one_waits()
        owner.stop()
    closing.result(TIMEOUT)
    assert left_behind(migrated_dsn) == (0, 0)


def test_close_whose_loop_ends_is_completed_at_the_end_of_the_process(migrated_dsn: str) -> None:
    code = """
import asyncio, os
from contextlib import ExitStack
from pg_layer import PostgresChannelLayer
from tests.integration.test_loops import cancelled, joins, left_behind, locked, terminate_waiting

dsn = os.environ["PG_LAYER_TEST_PROJECT_DSN"]
layer = PostgresChannelLayer(dsn=dsn)

async def use():
    await joins(layer, await layer.new_channel())
    until_one_waits = held.enter_context(locked(dsn))
    closing = asyncio.create_task(layer.close())
    await asyncio.to_thread(until_one_waits)
    await cancelled(closing)

with ExitStack() as held:
    asyncio.run(use())
    terminate_waiting(dsn)
print(left_behind(dsn))
"""
    assert succeeded(run(migrated_dsn, "-W", "error", "-c", code)) == "(1, 1)"
    assert left_behind(migrated_dsn) == (0, 0)


# ---------------------------------------------------------------------- kinds of loops


async def conversation(layer: PostgresChannelLayer, other: PostgresChannelLayer) -> None:
    """Use each method of the layer."""
    channels = [await layer.new_channel() for _ in range(2)]
    for channel in channels:
        await layer.group_add("room", channel)
    waiting = [asyncio.create_task(received(layer, channel, 31)) for channel in channels]
    jobs = asyncio.create_task(received(layer, "jobs", 20))
    for n in range(30):
        await other.group_send("room", number(n))
    await asyncio.gather(*(other.send("jobs", number(n)) for n in range(20)))
    for channel in channels:
        await other.send(channel, {**number(30), "padding": b"x" * 100_000})
    for task in waiting:
        assert await task == list(range(31))
    assert sorted(await jobs) == list(range(20))
    await layer.group_discard("room", channels[0])
    await layer.group_send("room", number(31))
    await layer.send(channels[0], number(32))
    assert await received(layer, channels[0], 1) == [32]
    assert await received(layer, channels[1], 1) == [31]
    await layer.flush()
    await layer.close()
    await other.close()


def test_asyncio_debug_mode_logs_no_errors(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(conversation(layer, other), debug=True)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_uvloop_sends_and_receives(
    layer: PostgresChannelLayer, other: PostgresChannelLayer
) -> None:
    uvloop = pytest.importorskip("uvloop")
    for _ in range(2):
        run_on(uvloop.new_event_loop, lambda: conversation(layer, other))


def test_uvloop_ended_without_close_is_replaced(
    layer: PostgresChannelLayer, other: PostgresChannelLayer
) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def start() -> str:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_send("room", number(0))
        assert await received(layer, channel, 1) == [0]
        return channel

    channel = run_on(uvloop.new_event_loop, start)
    for n in range(3):
        asyncio.run(other.group_send("room", number(n)))
        make_loop = uvloop.new_event_loop if n % 2 else asyncio.new_event_loop
        assert run_on(make_loop, lambda: received(layer, channel, 1)) == [n]


def test_uvloop_as_owner_loop_serves_foreign_loops(
    layer: PostgresChannelLayer, other: PostgresChannelLayer, loop_thread: Callable[..., LoopThread]
) -> None:
    uvloop = pytest.importorskip("uvloop")
    owner = loop_thread(uvloop.new_event_loop)
    channel = owner.do(layer.new_channel())
    owner.do(layer.group_add("room", channel))
    owner.do(layer.group_send("room", number(0)))
    assert owner.do(received(layer, channel, 1)) == [0]
    foreign = loop_thread()
    waiting = foreign.start(received(layer, channel, 20))
    asyncio.run(_group_send_all(layer, 0, 10))
    asyncio.run(_group_send_all(other, 10, 20))
    assert waiting.result(TIMEOUT) == list(range(20))
    owner.do(layer.close())


async def _group_send_all(layer: PostgresChannelLayer, start: int, stop: int) -> None:
    for n in range(start, stop):
        await layer.group_send("room", number(n))


@pytest.mark.parametrize("steps", range(12))
def test_close_on_a_loop_run_repeatedly_leaves_no_task(
    migrated_dsn: str, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A test runner runs its loop for each fixture. The layer's tasks may be at any step."""
    monkeypatch.setattr(engine, "STOP_TIMEOUT", 600.0)  # the engine waits for all its tasks

    async def join(layer: PostgresChannelLayer) -> None:
        for channel in (await layer.new_channel(), "jobs"):
            await layer.group_add("room", channel)
        for _ in range(steps):
            await asyncio.sleep(0)

    with closing(asyncio.new_event_loop()) as loop:
        made = new_layer(migrated_dsn)
        loop.run_until_complete(join(made))
        loop.run_until_complete(made.close())
        assert not asyncio.all_tasks(loop)
