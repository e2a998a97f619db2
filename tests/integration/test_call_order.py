"""Calls of one process that concern one group take effect in the order in which they began."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync

from pg_layer import LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
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


async def test_add_begun_after_a_group_send_that_has_not_returned_misses_the_message(
    make_layer: MakeLayer,
) -> None:
    layer, other = make_layer(), make_layer()
    own, foreign = await layer.new_channel(), await other.new_channel()
    member = await layer.new_channel()
    await layer.group_add("room", member)
    for number in range(ROUNDS):
        await asyncio.gather(
            layer.group_send("room", {"number": number}),
            layer.group_add("room", own),
            layer.group_add("room", foreign),
        )
        await asyncio.gather(layer.group_discard("room", own), layer.group_discard("room", foreign))
    assert await numbers(layer, own) == []
    assert await numbers(other, foreign) == []
    assert await numbers(layer, member) == list(range(ROUNDS))


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
        order = layer._loops._order
        await until(lambda: getattr(order._last.get("room"), "ahead", None) is not None)
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
        discarding = await begun(asyncio.create_task(layer.group_discard("room", channel)))
        sends[0].cancel()
        discarding.cancel()
        await asyncio.wait((sends[0], discarding))
        await connection.rollback()
    await asyncio.gather(adding, sends[1])
    assert await numbers(layer, channel) == [1]
    assert await layer.group_channels("room") == [channel]


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


async def test_discard_that_waits_for_longer_than_its_timeout_is_applied_here(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    """As without an earlier call: a discard is applied in memory and raises `OutcomeUnknown`."""
    layer = make_layer(**UNHURRIED, send_timeout=0.5)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    order = layer._loops._order
    loop = asyncio.get_running_loop()
    ahead, _ = order.begin(("room",), loop, is_change=False)
    with psycopg.connect(migrated_dsn) as blocker:
        blocker.execute("LOCK TABLE pg_layer_membership IN SHARE MODE")
        with pytest.raises(OutcomeUnknown):
            await layer.group_discard("room", channel)
    order.end(ahead, loop)
    await layer.group_send("room", {"number": 1})
    assert await numbers(layer, channel) == []


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
