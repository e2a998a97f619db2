"""Programs that fork: `python -m tests.project.forks FUNCTION` prints its result as JSON.

Each program runs in a separate process, so that the test run itself is not forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, NoReturn

import psycopg
from asgiref.sync import async_to_sync
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer

TIMEOUT = 30  # seconds
PARENT = "pg_layer_test_parent"
DSN = os.environ.get("PG_LAYER_TEST_PROJECT_DSN", "")

Result = dict[str, Any]


def new_layer(**options: Any) -> PostgresChannelLayer:
    return PostgresChannelLayer(
        dsn=make_conninfo(DSN, application_name=PARENT), **{"capacity": 10_000, **options}
    )


def number(n: int) -> dict[str, Any]:
    return {"type": "test.number", "n": n}


async def received(layer: PostgresChannelLayer, channel: str, count: int = 1) -> list[int]:
    return [(await asyncio.wait_for(layer.receive(channel), TIMEOUT))["n"] for _ in range(count)]


async def round_trip(layer: PostgresChannelLayer) -> str:
    """Use a new channel for direct and group messages; return its client."""
    channel = await layer.new_channel()
    await layer.group_add(channel.replace("!", "-"), channel)
    await layer.send(channel, number(1))
    await layer.group_send(channel.replace("!", "-"), number(2))
    assert await received(layer, channel, 2) == [1, 2]
    return client_of(channel)


def client_of(channel: str) -> str:
    return channel.partition("!")[0].rpartition(".")[2]


def connections() -> list[int]:
    """Return the pids of the server processes of this layer's and its children's connections."""
    with psycopg.connect(DSN) as conn:
        rows = conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY 1", (PARENT,)
        ).fetchall()
    return [pid for (pid,) in rows]


class Child:
    """A forked child that runs a function and reports its result."""

    def __init__(
        self, function: Callable[[], object], leave: Callable[[int], NoReturn] = os._exit
    ) -> None:
        here, there = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(TIMEOUT)
            os.close(here)
            with os.fdopen(there, "w") as pipe:
                json.dump(function(), pipe)
            leave(0)
        os.close(there)
        self._pipe = os.fdopen(here)

    def result(self) -> Any:
        """Wait for the end of the child and return the result of the function."""
        with self._pipe:
            text = self._pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"the child ended with status {status}"
        return json.loads(text)


class LoopThread:
    """A thread with an event loop that runs until `stop`."""

    def __init__(self) -> None:
        ready: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()

        async def serve() -> None:
            self._stop = asyncio.Event()
            ready.put(asyncio.get_running_loop())
            await self._stop.wait()

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        self._loop = ready.get()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


# ---------------------------------------------------------------------- the programs


def before_use() -> Result:
    """Fork when the layer exists but has not been used."""
    layer = new_layer()
    children = [Child(lambda: asyncio.run(used_and_closed(layer))) for _ in range(2)]
    parent = asyncio.run(used_and_closed(layer))
    return {"clients": [parent, *(child.result() for child in children)]}


async def used_and_closed(layer: PostgresChannelLayer) -> str:
    client = await round_trip(layer)
    await layer.close()
    return client


def after_use() -> Result:
    """Fork when the layer was used on a loop that has ended."""
    layer = new_layer()
    clients = [asyncio.run(round_trip(layer))]
    children = [Child(lambda: asyncio.run(used_and_closed(layer))) for _ in range(2)]
    clients += [child.result() for child in children]
    again = asyncio.run(used_and_closed(layer))
    return {"clients": clients, "again": again}


def while_receiving() -> Result:
    """Fork in a coroutine while the parent receives."""

    async def main() -> Result:
        layer = new_layer()
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, number(0))
        assert await received(layer, channel) == [0]
        waiting = asyncio.create_task(received(layer, channel, 3))
        await asyncio.sleep(0)
        before = await asyncio.to_thread(connections)

        async def child() -> str:
            await layer.send(channel, number(1))
            await layer.group_send("room", number(2))
            return await used_and_closed(layer)

        forked = Child(lambda: asyncio.run(child()))
        client = await asyncio.to_thread(forked.result)
        await layer.group_send("room", number(3))
        numbers = await waiting
        after = await asyncio.to_thread(connections)
        await layer.close()
        return {
            "clients": [client_of(channel), client],
            "numbers": numbers,
            "kept": set(before) <= set(after),
            "connections": len(before),
        }

    return asyncio.run(main())


def after_sync_use() -> Result:
    """Fork four children while the background loop runs; children and parent send."""
    layer = new_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("room", channel)
    async_to_sync(layer.send)(channel, number(-1))
    before = connections()

    def send(first: int) -> str:
        for n in range(first, first + 50, 2):
            async_to_sync(layer.send)(channel, number(n))
            async_to_sync(layer.group_send)("room", number(n + 1))
        client = client_of(async_to_sync(layer.new_channel)())
        async_to_sync(layer.close)()
        return client

    children = [Child(lambda first=first: send(first)) for first in range(50, 250, 50)]  # type: ignore[misc]
    for n in range(50):
        async_to_sync(layer.send)(channel, number(n))
    clients = [client_of(channel), *(child.result() for child in children)]
    kept = set(before) <= set(connections())  # the listener's may have been made since
    numbers = asyncio.run(received(layer, channel, 251))
    async_to_sync(layer.close)()
    return {"clients": clients, "numbers": numbers, "kept": kept, "connections": len(before)}


def tasks_in_transactions() -> Result:
    """Fork workers after Django was used, like a task queue; some of their tasks fail."""
    import django
    from channels.layers import get_channel_layer
    from django.db import connections as databases
    from django.db import transaction

    django.setup()
    layer = get_channel_layer()
    assert isinstance(layer, PostgresChannelLayer)
    layer.sync.send("jobs", number(0))
    databases.close_all()  # like pre-forking servers and task queues

    def task(n: int) -> None:
        layer.sync.group_send("room", number(n))
        with transaction.atomic():
            layer.sync.group_send("room", number(n + 1))
            layer.sync.send("jobs", number(n + 1))
            if n % 10 == 0:
                raise ZeroDivisionError

    def work(first: int) -> list[int]:
        most = 0
        with psycopg.connect(DSN, autocommit=True, application_name="observer") as observer:
            for n in range(first, first + 400, 2):
                with contextlib.suppress(ZeroDivisionError):
                    task(n)
                if n % 100 == 0:
                    row = observer.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s",
                        (PARENT,),
                    ).fetchone()
                    most = max(most, row[0] if row else 0)
        databases.close_all()
        return [most]

    children = [Child(lambda first=first: work(first)) for first in range(1000, 5000, 1000)]  # type: ignore[misc]
    return {"connections": max(most for child in children for most in child.result())}


def children_that_leave_in_order() -> Result:
    """Fork children that end with Python's regular exit, while the parent's loops run."""
    layer, sync_layer = new_layer(), new_layer()
    loop_thread = LoopThread()
    channel = loop_thread.do(layer.new_channel())
    loop_thread.do(layer.group_add("room", channel))
    loop_thread.do(layer.send(channel, number(0)))
    assert loop_thread.do(received(layer, channel)) == [0]
    async_to_sync(sync_layer.group_add)("room", async_to_sync(sync_layer.new_channel)())
    before = connections()

    def use() -> list[str]:
        clients = [asyncio.run(round_trip(layer)), async_to_sync(round_trip)(sync_layer)]
        gc.collect()
        return clients

    idle = [Child(lambda: None, leave=sys.exit).result() for _ in range(2)]
    used = [Child(use, leave=sys.exit).result() for _ in range(2)]
    loop_thread.do(layer.group_send("room", number(1)))
    async_to_sync(sync_layer.group_send)("room", number(2))
    numbers = loop_thread.do(received(layer, channel, 2))
    kept = set(before) <= set(connections())
    loop_thread.do(layer.close())
    loop_thread.stop()
    async_to_sync(sync_layer.close)()
    return {
        "idle": idle,
        "clients": [client_of(channel), *(client for clients in used for client in clients)],
        "kept": kept,
        "numbers": numbers,
    }


def a_childs_close() -> Result:
    """Fork a child that closes the layer: the parent's memberships remain."""
    layer = new_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("room", channel)

    def child() -> None:
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
        async_to_sync(layer.close)()

    Child(child).result()
    Child(lambda: async_to_sync(layer.close)()).result()
    async_to_sync(layer.group_send)("room", number(1))
    numbers = asyncio.run(received(layer, channel))
    with psycopg.connect(DSN) as conn:
        members = conn.execute("SELECT channel FROM pg_layer_membership").fetchall()
    async_to_sync(layer.close)()
    return {"numbers": numbers, "is_alone": members == [(channel,)]}


def foreign_channels() -> Result:
    """Fork a child that tries to receive on its parent's channel."""
    layer = new_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.send)(channel, number(1))

    def child() -> str:
        try:
            asyncio.run(received(layer, channel))
        except TypeError as error:
            return f"TypeError: {error}"
        return "received"

    outcome = Child(child).result()
    numbers = asyncio.run(received(layer, channel))
    async_to_sync(layer.close)()
    return {"outcome": outcome, "numbers": numbers}


def grandchildren() -> Result:
    """Fork a child that forks again."""
    layer = new_layer()
    clients = [asyncio.run(round_trip(layer))]

    def child() -> list[str]:
        own = async_to_sync(round_trip)(layer)
        return [own, Child(lambda: asyncio.run(used_and_closed(layer))).result()]

    clients += Child(child).result()
    asyncio.run(used_and_closed(layer))
    return {"clients": clients}


def with_multiprocessing() -> Result:
    """Use the layer in children of `multiprocessing`."""
    layer = new_layer()
    clients = [asyncio.run(round_trip(layer))]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        results.put(async_to_sync(round_trip)(layer))

    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    clients += [results.get() for _ in children]
    for child in children:
        child.join(TIMEOUT)
    asyncio.run(used_and_closed(layer))
    return {"clients": clients, "statuses": [child.exitcode for child in children]}


def multiprocessing_ends() -> Result:
    """Start children of `multiprocessing` that receive and end without closing the layer."""
    layer = new_layer()
    asyncio.run(round_trip(layer))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def loop() -> None:
        results.put(asyncio.run(round_trip(layer)))

    def background_loop() -> None:
        results.put(async_to_sync(round_trip)(layer))

    def new_layer_of_its_own() -> None:
        results.put(asyncio.run(round_trip(new_layer())))

    def failure() -> None:
        loop()
        sys.exit(3)

    def thread() -> None:
        """Receive after the main thread has ended, while the pool's thread is idle."""
        has_begun = threading.Event()
        main_ended: Future[None] = Future()

        def wait_for_main() -> None:
            threading.main_thread().join()
            main_ended.set_result(None)

        async def receive() -> None:
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            await asyncio.to_thread(has_begun.set)
            await asyncio.wrap_future(main_ended)
            await layer.group_send("room", number(1))
            assert await received(layer, channel) == [1]
            results.put(client_of(channel))

        for target in (wait_for_main, lambda: asyncio.run(receive())):
            threading.Thread(target=target).start()
        assert has_begun.wait(TIMEOUT)

    targets = (loop, background_loop, new_layer_of_its_own, failure, thread)
    children = [context.Process(target=target) for target in targets]
    for child in children:
        child.start()
    clients = [results.get() for _ in children]
    for child in children:
        child.join(TIMEOUT)
    with psycopg.connect(DSN) as conn:
        query = "SELECT pid FROM pg_layer_client WHERE expires_at > clock_timestamp()"
        living = {pid for (pid,) in conn.execute(query)}
    asyncio.run(used_and_closed(layer))
    return {
        "clients": clients,
        "statuses": [child.exitcode for child in children],
        "left": [
            target.__name__
            for target, child in zip(targets, children, strict=True)
            if child.pid in living
        ],
        "parent": os.getpid() in living,
    }


def while_threads_send() -> Result:
    """Fork at arbitrary moments while threads send and join groups."""
    layer = new_layer()
    channel = async_to_sync(layer.new_channel)()
    is_over = threading.Event()

    def hammer() -> None:
        while not is_over.is_set():
            async_to_sync(layer.send)("hammered", number(0))
            async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()

    def child(n: int) -> int:
        async_to_sync(layer.send)(channel, number(n))
        async_to_sync(layer.close)()
        return n

    done = [Child(lambda n=n: child(n)).result() for n in range(12)]  # type: ignore[misc]
    is_over.set()
    for thread in threads:
        thread.join()
    numbers = asyncio.run(received(layer, channel, len(done)))
    async_to_sync(layer.flush)()
    async_to_sync(layer.close)()
    return {"numbers": numbers}


if __name__ == "__main__":
    # The warning is right for most programs. These tests fork a process with threads on purpose.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    print(json.dumps(globals()[sys.argv[1]]()))
