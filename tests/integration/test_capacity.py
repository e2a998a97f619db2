"""Capacity: the number of messages that may wait in a channel, and the result of one more."""

from __future__ import annotations

import asyncio
import re

import pytest

from pg_layer import ChannelFull, PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.logs import records
from tests.processes import Link, Processes, listen, open_layer, receive, until


async def fill(layer: PostgresChannelLayer, channel: str, capacity: int) -> None:
    """Check that an empty channel accepts exactly ``capacity`` messages."""
    for number in range(capacity):
        await layer.send(channel, {"number": number})
    await expect_full(layer, channel)


async def expect_full(layer: PostgresChannelLayer, channel: str) -> None:
    for _ in range(3):
        with pytest.raises(ChannelFull, match=re.escape(channel)):
            await layer.send(channel, {"number": -1})


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def expect_nothing(layer: PostgresChannelLayer, *channels: str) -> None:
    """Check that nothing arrives: earlier messages would arrive before one on another channel."""
    await listen(layer)
    for channel in channels:
        task = asyncio.create_task(layer.receive(channel))
        await asyncio.wait({task}, timeout=0.1)
        assert not task.done()
        task.cancel()


# ---------------------------------------------------------------------- send


async def receive_on_demand(
    link: Link, dsn: str, channel: str | None, starts: str, capacity: int
) -> None:
    """Receive as many messages as the test asks for, until it sends None."""
    async with open_layer(dsn, capacity=capacity) as layer:
        channel = channel or await layer.new_channel()
        if starts == "listening":
            await listen(layer)
        link.say(channel)
        while (count := await link.hear()) is not None:
            link.say(await receive_numbers(layer, channel, count))


@pytest.mark.parametrize("starts", ["listening", "later"])
@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_channel_holds_its_capacity_and_each_receive_frees_one_place(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, name: str | None, starts: str
) -> None:
    layer = make_layer(capacity=5)
    reader = processes.start(receive_on_demand, migrated_dsn, name, starts, 5)
    channel = await reader.hear()
    await fill(layer, channel, 5)
    received = []
    for number in range(5, 15):
        reader.say(1)
        received += await reader.hear()
        await layer.send(channel, {"number": number})
        if name is None:  # a worker may have claimed some ahead: they no longer wait
            await expect_full(layer, channel)
    reader.say(5)
    received += await reader.hear()
    assert received == list(range(15))


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_received_messages_do_not_count(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, name: str | None
) -> None:
    layer = make_layer(capacity=8)
    reader = processes.start(receive_on_demand, migrated_dsn, name, "listening", 8)
    channel = await reader.hear()
    for _ in range(20):
        await fill(layer, channel, 8)
        reader.say(8)
        assert await reader.hear() == list(range(8))


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_capacity_within_one_process_holds(make_layer: MakeLayer, name: str | None) -> None:
    layer = make_layer(capacity=5)
    await listen(layer)
    channel = name or await layer.new_channel()
    await fill(layer, channel, 5)
    for number in range(5, 10):
        assert await receive_numbers(layer, channel, 1) == [number - 5]
        await layer.send(channel, {"number": number})
        if name is None:
            await expect_full(layer, channel)
    assert await receive_numbers(layer, channel, 5) == list(range(5, 10))


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
@pytest.mark.parametrize("capacity", [5, 100])
async def test_capacity_is_shared_by_writers_in_turn(
    make_layer: MakeLayer, name: str | None, capacity: int
) -> None:
    layer, *writers = (make_layer(capacity=capacity) for _ in range(3))
    await listen(layer)
    channel = name or await layer.new_channel()
    for number in range(capacity):
        await writers[number % 2].send(channel, {"number": number})
    for writer in writers:
        await expect_full(writer, channel)
    assert await receive_numbers(layer, channel, capacity) == list(range(capacity))


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_sends_at_once_beyond_the_capacity_only_the_last_are_refused(
    make_layer: MakeLayer, name: str | None
) -> None:
    layer, sender = make_layer(capacity=7), make_layer(capacity=7)
    await listen(layer)
    await listen(sender)
    channel = name or await layer.new_channel()
    outcomes = await asyncio.gather(
        *(sender.send(channel, {"number": number}) for number in range(50)), return_exceptions=True
    )
    assert [outcome is None for outcome in outcomes] == [True] * 7 + [False] * 43
    assert {type(outcome) for outcome in outcomes[7:]} == {ChannelFull}
    assert await receive_numbers(layer, channel, 7) == list(range(7))
    await expect_nothing(layer, channel)


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_batches_of_one_sender_fill_a_channel_exactly(
    make_layer: MakeLayer, name: str | None
) -> None:
    capacity, size = 500, 7  # some batches are sent on credit
    layer, sender = make_layer(capacity=capacity), make_layer(capacity=capacity)
    await listen(sender)
    channel, other = name or await layer.new_channel(), await layer.new_channel()
    for start in range(0, capacity + 3 * size, size):
        sends = [sender.send(channel, {"number": number}) for number in range(start, start + size)]
        await asyncio.gather(sender.send(other, {}), *sends, return_exceptions=True)
    await expect_full(sender, channel)
    assert await receive_numbers(layer, channel, capacity) == list(range(capacity))
    await expect_nothing(layer, channel)


async def test_channel_capacity_by_glob_and_pattern_applies(make_layer: MakeLayer) -> None:
    layer = make_layer(
        capacity=6,
        channel_capacity={
            "http.request": 1,
            "http.response!*": 3,
            "http.*": 2,
            re.compile(r"websocket\.(send|receive)"): 4,
            "specific.*": 5,
        },
    )
    expected = {
        "http.request": 1,
        "http.response!a": 3,
        "http.response!b": 3,
        "http.disconnect": 2,
        "websocket.send": 4,
        "websocket.sending": 4,  # patterns match at the beginning
        "a.websocket.send": 6,
        await layer.new_channel(): 5,
        await layer.new_channel("other"): 6,
    }
    for channel, capacity in expected.items():
        assert layer.get_capacity(channel) == capacity
        await fill(layer, channel, capacity)
    mixed = [channel for channel in expected for _ in range(10)]
    await layer.flush()
    outcomes = await asyncio.gather(
        *(layer.send(channel, {"number": 0}) for channel in mixed), return_exceptions=True
    )
    accepted = [
        channel for channel, outcome in zip(mixed, outcomes, strict=True) if outcome is None
    ]
    assert {channel: accepted.count(channel) for channel in expected} == expected


async def test_channels_of_one_process_have_capacities_of_their_own(make_layer: MakeLayer) -> None:
    layer, sender = make_layer(capacity=5), make_layer(capacity=5)
    await listen(layer)
    channels = [await layer.new_channel() for _ in range(10)]
    for channel in channels:
        await fill(sender, channel, 5)
    for channel in channels:
        assert await receive_numbers(layer, channel, 5) == list(range(5))


async def serve_beside_a_stuck_consumer(link: Link, dsn: str, count: int) -> list[int]:
    async with open_layer(dsn, capacity=10) as layer:
        stuck, busy = await layer.new_channel(), await layer.new_channel()
        for channel in (stuck, busy):
            await layer.group_add("room", channel)
        await listen(layer)
        link.say((stuck, busy))
        found = []
        for _ in range(count):
            found += await receive_numbers(layer, busy, 1)
            link.say("received")
        return found


async def test_full_channel_of_a_consumer_does_not_affect_another(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer(capacity=10)
    reader = processes.start(serve_beside_a_stuck_consumer, migrated_dsn, 300)
    stuck, busy = await reader.hear()
    await fill(layer, stuck, 10)
    for number in range(300):
        if number % 2:
            await layer.group_send("room", {"number": number})
        else:
            await layer.send(busy, {"number": number})
        await reader.hear()
    assert await reader.result() == list(range(300))


# ---------------------------------------------------------------------- group_send


def lines_about_full(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in records(caplog, log_events.CHANNEL_FULL)]


@pytest.mark.parametrize("pace", ["one by one", "at once"])
async def test_full_member_keeps_waiting_messages_and_misses_new_ones(
    make_layer: MakeLayer, caplog: pytest.LogCaptureFixture, pace: str
) -> None:
    layer, sender = make_layer(capacity=3), make_layer()
    full, reading = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", full)
    await layer.group_add("room", reading)
    await listen(layer)
    await listen(sender)
    received = []
    if pace == "one by one":
        for number in range(10):
            await sender.group_send("room", {"number": number})
            received += await receive_numbers(layer, reading, 1)
    else:
        task = asyncio.create_task(receive_numbers(layer, reading, 3))
        await asyncio.gather(
            *(sender.group_send("room", {"number": number}) for number in range(10))
        )
        received = await task
    assert received == list(range(len(received)))
    assert await receive_numbers(layer, full, 3) == [0, 1, 2]
    [line] = [line for line in lines_about_full(caplog) if full in line]
    assert "room" in line
    # The channel has free capacity again, and new messages arrive.
    if pace == "one by one":
        await sender.group_send("room", {"number": 10})
        assert await receive_numbers(layer, full, 1) == [10]


async def test_full_normal_channel_in_group_misses_new_messages(
    make_layer: MakeLayer, caplog: pytest.LogCaptureFixture
) -> None:
    sender, worker = make_layer(capacity=3), make_layer()
    await sender.group_add("room", "jobs")
    for number in range(5):
        await sender.group_send("room", {"number": number})
    await asyncio.gather(
        *(sender.group_send("room", {"number": 5 + number}) for number in range(5))
    )
    with pytest.raises(ChannelFull):
        await sender.send("jobs", {"number": -1})
    [line] = lines_about_full(caplog)
    assert "jobs" in line
    assert "room" in line
    assert await receive_numbers(worker, "jobs", 3) == [0, 1, 2]
    await expect_nothing(worker, "jobs")


async def test_normal_channel_in_group_has_its_channel_capacity(
    make_layer: MakeLayer,
) -> None:
    sender, worker = make_layer(capacity=3, channel_capacity={"few": 1, "many": 5}), make_layer()
    await sender.group_add("room", "few")
    await sender.group_add("room", "many")
    await sender.group_add("room", "other")
    for number in range(4):
        await sender.group_send("room", {"number": number})
    await asyncio.gather(
        *(sender.group_send("room", {"number": 4 + number}) for number in range(4))
    )
    assert await receive_numbers(worker, "many", 5) == [0, 1, 2, 3, 4]
    assert await receive_numbers(worker, "other", 3) == [0, 1, 2]
    assert await receive_numbers(worker, "few", 1) == [0]
    await expect_nothing(worker, "few", "many", "other")


# ---------------------------------------------------------------------- what else makes room


async def test_flush_frees_the_capacity_and_removes_everything(make_layer: MakeLayer) -> None:
    layer, sender = make_layer(capacity=4), make_layer(capacity=4)
    await listen(layer)
    channel = await layer.new_channel()
    await fill(sender, channel, 4)
    await listen(layer)  # all messages are in the channel queue now
    await sender.flush()
    await listen(layer)

    async def talk() -> None:
        for number in range(100):
            await sender.send(channel, {"number": number})
            assert await receive_numbers(layer, channel, 1) == [number]

    # Flushed messages must not count as waiting: each receive would wait for their deletion.
    await asyncio.wait_for(talk(), 60)


async def test_expired_messages_do_not_count(make_layer: MakeLayer, observer: Observer) -> None:
    layer, sender = make_layer(capacity=4), make_layer(capacity=4, expiry=0.2)
    await listen(layer)
    channel = await layer.new_channel()
    for name in (channel, "jobs"):
        await fill(sender, name, 4)
    await until(
        lambda: observer.execute(
            "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_layer_message"
            " WHERE expires_at > clock_timestamp())"
        ).fetchone()
    )
    for name in (channel, "jobs"):
        await fill(layer, name, 4)
        assert await receive_numbers(layer, name, 4) == [0, 1, 2, 3]
