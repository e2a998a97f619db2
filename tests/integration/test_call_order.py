"""Calls that use the members of a group wait for changes of their process that began before."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync

from pg_layer import LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
from pg_layer._runtime.engine import Engine
from tests.conftest import MakeLayer, Observer
from tests.processes import TIMEOUT, UNHURRIED, listen, new_layer, receive, until

ROUNDS = 50


async def begun(task: asyncio.Task[Any]) -> asyncio.Task[Any]:
    """Let a task begin its call, and return it."""
    await asyncio.sleep(0)
    return task


async def numbers(layer: PostgresChannelLayer, channel: str) -> list[int]:
    """Return the numbers of the messages that have arrived before a last one."""
    await layer.send(channel, {"number": -1})
    found: list[int] = []
    while (number := (await receive(layer, channel))["number"]) >= 0:
        found.append(number)
    return found


async def test_group_send_begun_after_an_add_that_has_not_returned_reaches_the_channel(
    migrated_dsn: str,
) -> None:
    """On a fresh loop the first add waits for the lease and for LISTEN."""
    for number in range(5):
        layer = new_layer(migrated_dsn)
        pairs = [(f"room{index}", await layer.new_channel()) for index in range(ROUNDS // 5)]
        calls = [
            call
            for group, channel in pairs
            for call in (
                layer.group_add(group, channel),
                layer.group_send(group, {"number": number}),
            )
        ]
        await asyncio.gather(*calls)
        assert [await numbers(layer, channel) for _, channel in pairs] == [[number]] * len(pairs)
        await layer.close()


async def test_group_send_many_begun_after_adds_that_have_not_returned_reaches_them(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    pairs = [(f"room{index}", await layer.new_channel()) for index in range(10)]
    adds = [layer.group_add(group, channel) for group, channel in pairs]
    await asyncio.gather(
        *adds, layer.group_send_many([(group, {"number": 1}) for group, _ in pairs])
    )
    assert [await numbers(layer, channel) for _, channel in pairs] == [[1]] * 10


async def test_group_send_begun_after_a_discard_that_has_not_returned_misses_the_channel(
    make_layer: MakeLayer,
) -> None:
    """Also the discard of another process's channel, which its owner applies."""
    layer, other = make_layer(), make_layer()
    own, foreign = await layer.new_channel(), await other.new_channel()
    for number in range(ROUNDS):
        await layer.group_add("room", own)
        await layer.group_add("room", foreign)
        await asyncio.gather(
            layer.group_discard("room", own),
            layer.group_discard("room", foreign),
            layer.group_send("room", {"number": number}),
        )
    assert await numbers(layer, own) == []
    assert await numbers(other, foreign) == []


async def test_changes_of_one_membership_that_have_not_returned_take_effect_in_order(
    make_layer: MakeLayer,
) -> None:
    """Of own channels, and of those of another process."""
    layer, other = make_layer(), make_layer()
    await listen(other)
    for channel in (await layer.new_channel(), await other.new_channel()):
        for last in (True, False):
            changes = [
                layer.group_add("room", channel) if added else layer.group_discard("room", channel)
                for added in [not last, last] * (ROUNDS // 2)
            ]
            *_, channels = await asyncio.gather(*changes, layer.group_channels("room"))
            assert channels == [channel] * last
    await asyncio.gather(
        layer.group_discard("room", channel),
        layer.group_add("room", channel),
        layer.group_send("room", {"number": 1}),
    )
    assert await numbers(other, channel) == [1]


async def test_members_read_after_changes_that_have_not_returned_show_them(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    one, two = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", one)
    _, _, channels, count = await asyncio.gather(
        layer.group_add("room", two),
        layer.group_discard("room", one),
        layer.group_channels("room"),
        layer.group_count("room"),
    )
    assert (channels, count) == ([two], 1)


def test_calls_of_other_threads_keep_the_order(migrated_dsn: str) -> None:
    """A group_send by async_to_sync begins while an add on another loop is in flight."""
    layer = new_layer(migrated_dsn)
    blocker = psycopg.connect(migrated_dsn)

    async def main() -> list[int]:
        channel = await layer.new_channel()
        await listen(layer)
        blocker.execute("LOCK TABLE pg_layer_membership IN SHARE MODE")
        adding = await begun(asyncio.create_task(layer.group_add("room", channel)))
        send = async_to_sync(layer.group_send)
        thread = threading.Thread(target=send, args=("room", {"number": 1}), daemon=True)
        thread.start()
        line = layer._loops._order._lines["room"]
        await until(lambda: len(line) == 2)
        assert not adding.done()
        blocker.rollback()
        await adding
        await asyncio.to_thread(thread.join, TIMEOUT)
        assert not thread.is_alive()
        found = await numbers(layer, channel)
        await layer.close()
        return found

    with blocker:
        assert asyncio.run(main()) == [1]


# --- What is not held


async def test_stuck_change_holds_neither_other_groups_nor_sends_to_channels(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    layer = make_layer(**UNHURRIED)
    channel, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("free", member)
    with psycopg.connect(migrated_dsn) as blocker:
        blocker.execute("LOCK TABLE pg_layer_membership IN SHARE MODE")
        stuck = await begun(asyncio.create_task(layer.group_add("held", channel)))
        held = await begun(asyncio.create_task(layer.group_send("held", {"number": 1})))
        await layer.group_send("free", {"number": 2})
        await layer.group_send_many([("free", {"number": 3})])
        assert await layer.group_count("free") == 1
        await layer.send(channel, {"number": 4})
        assert not stuck.done()
        assert not held.done()
        blocker.rollback()
    await asyncio.gather(stuck, held)
    assert await numbers(layer, member) == [2, 3]
    assert await numbers(layer, channel) == [4, 1]


async def test_group_sends_at_once_still_go_together(make_layer: MakeLayer) -> None:
    layer = make_layer()
    await layer.group_add("room", await layer.new_channel())
    before = layer.stats()["batches"]
    await asyncio.gather(*(layer.group_send("room", {"number": n}) for n in range(100)))
    assert layer.stats()["batches"] - before <= 3


async def test_order_of_calls_that_have_ended_is_forgotten(make_layer: MakeLayer) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await asyncio.gather(
        *(layer.group_add(f"room{n}", channel) for n in range(20)),
        *(layer.group_send(f"room{n}", {"number": n}) for n in range(20)),
    )
    assert not len(layer._loops._order)


# --- Calls that fail, or are cancelled


@pytest.fixture
def stuck_add(migrated_dsn: str, make_layer: MakeLayer) -> Any:
    """Return a function that begins an add of a channel, which waits for a lock."""

    async def begin(layer: PostgresChannelLayer, channel: str) -> Any:
        connection = await psycopg.AsyncConnection.connect(migrated_dsn)
        await connection.execute("LOCK TABLE pg_layer_membership IN SHARE MODE")
        return connection, await begun(asyncio.create_task(layer.group_add("room", channel)))

    return begin


async def test_call_behind_one_that_is_cancelled_proceeds(
    make_layer: MakeLayer, stuck_add: Callable[..., Any]
) -> None:
    layer = make_layer(**UNHURRIED)
    channel, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    connection, adding = await stuck_add(layer, channel)
    async with connection:
        sending = await begun(asyncio.create_task(layer.group_send("room", {"number": 1})))
        adding.cancel()
        await asyncio.wait_for(sending, TIMEOUT)
        assert adding.cancelled()
        assert (await receive(layer, member))["number"] == 1


async def test_call_cancelled_while_it_waits_has_no_effect(
    make_layer: MakeLayer, stuck_add: Callable[..., Any]
) -> None:
    layer = make_layer(**UNHURRIED)
    channel = await layer.new_channel()
    await listen(layer)
    connection, adding = await stuck_add(layer, channel)
    async with connection:
        sends = [
            await begun(asyncio.create_task(layer.group_send("room", {"number": number})))
            for number in range(2)
        ]
        sends[0].cancel()
        await asyncio.wait((sends[0],))
        await connection.rollback()
    await asyncio.gather(adding, sends[1])
    assert await numbers(layer, channel) == [1]


async def test_call_behind_one_that_fails_proceeds_within_its_own_timeout(
    make_layer: MakeLayer, stuck_add: Callable[..., Any]
) -> None:
    """The time in which a call waits for another counts, and it has no effect after that."""
    layer = make_layer(**UNHURRIED, send_timeout=1)
    channel, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    connection, adding = await stuck_add(layer, channel)
    async with connection:
        sending = await begun(asyncio.create_task(layer.group_send("room", {"number": 1})))
        outcomes = await asyncio.gather(adding, sending, return_exceptions=True)
        assert isinstance(outcomes[0], OutcomeUnknown)
        if outcomes[1] is not None:
            assert isinstance(outcomes[1], LayerUnavailable)
            assert not isinstance(outcomes[1], OutcomeUnknown)
        await layer.group_send("room", {"number": 2})
    expected = [2] if outcomes[1] is not None else [1, 2]
    assert [(await receive(layer, member))["number"] for _ in expected] == expected


async def test_change_behind_a_group_send_that_has_not_returned_proceeds(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    layer = make_layer(**UNHURRIED)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    with psycopg.connect(migrated_dsn) as blocker:
        blocker.execute("LOCK TABLE pg_layer_message IN SHARE MODE")
        sending = await begun(asyncio.create_task(layer.group_send("room", {"number": 1})))
        await layer.group_discard("room", channel)
        await layer.group_add("room", channel)
        assert not sending.done()
    await sending


async def test_call_that_waits_until_its_timeout_raises_names_the_wait_and_has_no_effect(
    make_layer: MakeLayer,
) -> None:
    layer, other = make_layer(send_timeout=0.5), make_layer()
    channel = await other.new_channel()
    await other.group_add("room", channel)
    ahead = layer._loops._order.begin("room", asyncio.get_running_loop())
    for call in (
        layer.group_send("room", {"number": 1}),
        layer.group_send_many([("other", {"number": 1}), ("room", {"number": 1})]),
        layer.group_channels("room"),
        layer.group_count("room"),
    ):
        with pytest.raises(LayerUnavailable, match=r"waited for .* group_discard in this") as error:
            await call
        assert not isinstance(error.value, OutcomeUnknown)
    layer._loops._order.end(ahead)
    assert layer.stats()["group_sent"] == 0
    assert await numbers(other, channel) == []


async def test_read_that_has_waited_has_only_the_rest_of_its_timeout(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(send_timeout=TIMEOUT)
    order = layer._loops._order

    async def work(engine: Engine, deadline: float) -> float:
        return deadline

    ahead = order.begin("room", asyncio.get_running_loop())
    reading = await begun(asyncio.create_task(layer._loops.read("room", work)))
    begun_before = time.monotonic()
    order.end(ahead)
    assert await reading <= begun_before + TIMEOUT


# --- Many at once


async def test_joins_of_1000_channels_that_each_tell_the_group_stay_in_batches(
    make_layer: MakeLayer,
) -> None:
    """A chat whose sockets reconnect: each adds itself, then sends to the group."""
    layer = make_layer(**UNHURRIED)
    await listen(layer)
    before = layer.stats()["batches"]

    async def join(number: int) -> None:
        channel = await layer.new_channel()
        await layer.group_add("lobby", channel)
        await layer.group_send("lobby", {"number": number}, expiry=1)

    joins: list[asyncio.Task[None]] = []
    for number in range(1000):
        joins.append(asyncio.create_task(join(number)))
        await asyncio.sleep(0.0005)
    await asyncio.gather(*joins)
    assert await layer.group_count("lobby") == 1000
    # Alone, each of the 2,000 calls would be a batch.
    assert layer.stats()["batches"] - before < 1000
    assert not len(layer._loops._order)


def test_call_on_a_loop_that_was_closed_is_not_waited_for(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = new_layer(migrated_dsn, send_timeout=10 * TIMEOUT)
    blocker = psycopg.connect(migrated_dsn)

    async def begin() -> asyncio.Task[None]:
        channel = await layer.new_channel()
        await listen(layer)
        blocker.execute("LOCK TABLE pg_layer_membership IN SHARE MODE")
        return await begun(asyncio.create_task(layer.group_add("room", channel)))

    async def follow() -> None:
        await layer.group_send("room", {"number": 1})
        await layer.close()

    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(begin())
    loop.close()
    with blocker:
        asyncio.run(asyncio.wait_for(follow(), TIMEOUT))
    del kept
