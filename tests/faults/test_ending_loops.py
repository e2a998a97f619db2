"""Event loops that end during calls of the layer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

import psycopg

from pg_layer import PostgresChannelLayer
from pg_layer.exceptions import LayerUnavailable
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.processes import TIMEOUT, UNHURRIED, listen, new_layer, receive, until

CALLS = 8  # more than the connections that are open before


def test_loop_ending_while_its_engine_stops_does_not_wait_for_a_connection(
    migrated_dsn: str,
) -> None:
    """The database does not answer. The connections of cancelled calls wait for it.

    A takeover by another loop stops the engine, and waits for these connections. Then the loop
    ends, and asyncio cancels that wait, and the task that opens another connection. Before
    Python 3.12 that task may swallow the cancellation: it must be cancelled again.
    """
    with Proxy(migrated_dsn) as proxy:
        layer = PostgresChannelLayer(
            dsn=proxy.dsn(connect_timeout=2),
            pool_max_size=20,
            send_timeout=2 * TIMEOUT,
            **UNHURRIED,
        )

        async def main() -> None:
            await layer.group_add("room", await layer.new_channel())
            engine = layer._loops.main_engine
            assert engine is not None
            connections = engine.connections
            proxy.swallow()
            calls = [asyncio.create_task(layer.group_count("room")) for _ in range(CALLS)]
            await until(lambda: connections._pool._opening)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            stopping = asyncio.create_task(engine.stop())
            # Step by step: a busy machine must not miss the moment in which it waits.
            while not connections._pool.is_closed:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not stopping.done()

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        proxy.let_go(revive=False)
        asyncio.run(layer.close())


def test_close_during_a_membership_write_leaves_the_loop_running(
    migrated_dsn: str, observer: Observer
) -> None:
    """The interrupted write is repeated on the closed pool, which refuses at once.

    If it were repeated until ``send_timeout``, nothing else would run on the loop meanwhile.
    """
    ended: list[object] = []

    def is_blocked() -> bool:
        [(count,)] = observer.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchall()
        return bool(count)

    async def main() -> None:
        layer = new_layer(migrated_dsn, send_timeout=10 * TIMEOUT)
        channel = await layer.new_channel()
        await listen(layer)
        async with await psycopg.AsyncConnection.connect(migrated_dsn) as connection:
            await connection.execute("LOCK TABLE pg_layer_membership IN ACCESS EXCLUSIVE MODE")
            adding = asyncio.create_task(layer.group_add("room", channel))
            await until(is_blocked)
            await layer.close()
            ended.extend(await asyncio.gather(adding, return_exceptions=True))

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    [error] = ended
    assert isinstance(error, LayerUnavailable)


class EndingLoop(asyncio.SelectorEventLoop):
    """A loop that closes when another thread calls `call_soon_threadsafe`.

    ``is_ending``: the next of these calls finds the loop closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_ending = False
        self.is_blocked = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = threading.Event()

    def call_soon_threadsafe(  # type: ignore[override]  # Context is keyword-only since Python 3.11
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if self.is_ending:
            self.is_ending = False
            self.may_end.set()
            assert self.has_ended.wait(TIMEOUT)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def serve(self, main: Callable[[], Any]) -> None:
        """Run ``main``, block the loop until it may end, and close it."""
        self.run_until_complete(main())
        self.call_soon(self._block)
        self.run_until_complete(_cancel_others())
        self.close()
        self.has_ended.set()

    def _block(self) -> None:
        self.is_blocked.set()
        self.may_end.wait()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_takeover_from_a_loop_that_closes_at_that_moment_receives(
    make_layer: MakeLayer,
) -> None:
    """That loop only sends. It still runs at the check, and is closed when it is asked to stop."""
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    loop = EndingLoop()
    thread = threading.Thread(
        target=loop.serve, args=(lambda: layer.send(channel, {"number": 1}),), daemon=True
    )
    thread.start()
    await until(loop.is_blocked.is_set)
    loop.is_ending = True
    receiving = asyncio.create_task(receive(layer, channel))
    await until(loop.has_ended.is_set)
    await sender.send(channel, {"number": 2})
    assert [(await receiving)["number"], (await receive(layer, channel))["number"]] == [1, 2]
    thread.join()


async def test_calls_of_a_foreign_loop_go_on_when_the_owner_loop_ends(
    make_layer: MakeLayer,
) -> None:
    """A loop's end cancels the tasks on it. Calls of foreign loops continue at the next owner."""

    async def own(layer: PostgresChannelLayer, owned: asyncio.Event, ends: threading.Event) -> None:
        receiving = asyncio.create_task(layer.receive(await layer.new_channel()))
        await until(lambda: layer.stats()["listener"] == "listening")
        loop.call_soon_threadsafe(owned.set)
        await until(ends.is_set)
        assert not receiving.done()

    loop = asyncio.get_running_loop()
    for _ in range(12):
        layer, owned, ends = make_layer(), asyncio.Event(), threading.Event()
        ending = asyncio.create_task(asyncio.to_thread(asyncio.run, own(layer, owned, ends)))
        await owned.wait()
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        while not ending.done():
            count, health, _ = await asyncio.gather(
                layer.group_count("room"), layer.health(), asyncio.sleep(0)
            )
            assert count == 0
            assert isinstance(health["problems"], list)
            ends.set()
        await ending
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait({waiting})
