"""Expiry: a message that waited too long is never delivered, wherever it waited, swept or not."""

from __future__ import annotations

import time

import pytest

from tests.conftest import MakeLayer, Observer
from tests.processes import Link, Message, Processes, listen, open_layer, receive, until

EXPIRY = 0.3


async def all_expired(observer: Observer) -> None:
    """Return when every message in the table is past its end."""
    await until(
        lambda: observer.execute(
            "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_layer_message WHERE expires_at > clock_timestamp())"
        ).fetchone()
    )


def count(observer: Observer, table: str) -> int:
    row = observer.execute(f"SELECT count(*) FROM pg_layer_{table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


async def read_when_told(
    link: Link, dsn: str, name: str | None, starts: str, error: float
) -> Message:
    """The first message that is received once the test says so, by a process whose clock may be wrong."""
    real = time.time
    time.time = lambda: real() + error
    async with open_layer(dsn) as layer:
        channel = name or await layer.new_channel()
        await layer.group_add("room", channel)
        if starts == "listening":
            await listen(layer)
        link.say(channel)
        await link.hear()
        return await receive(layer, channel)


@pytest.mark.parametrize(
    ("name", "starts", "error"),
    [
        pytest.param(None, "listening", 0.0, id="specific"),
        pytest.param(None, "later", 0.0, id="specific, nobody listens"),
        pytest.param("jobs", "listening", 0.0, id="normal"),
        pytest.param("jobs", "later", 0.0, id="normal, nobody listens"),
        pytest.param(None, "listening", 86400.0, id="fast clock"),
        pytest.param(None, "listening", -86400.0, id="slow clock"),
    ],
)
@pytest.mark.parametrize("way", ["send", "group_send"])
async def test_an_expired_message_is_never_delivered(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    way: str,
    name: str | None,
    starts: str,
    error: float,
) -> None:
    brief, lasting = make_layer(expiry=EXPIRY), make_layer()
    reader = processes.start(read_when_told, migrated_dsn, name, starts, error)
    channel = await reader.hear()
    for number in range(3):
        message = {"number": number, "blob": bytes(3000 * number)}
        await (brief.send(channel, message) if way == "send" else brief.group_send("room", message))
    await all_expired(observer)
    await lasting.send(channel, {"number": 3})
    reader.say("now")
    assert await reader.result() == {"number": 3}


async def test_what_is_received_in_time_is_delivered(make_layer: MakeLayer) -> None:
    layer, brief = make_layer(), make_layer(expiry=30)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for number in range(10):
        await brief.send(channel, {"number": number})
        await brief.group_send("room", {"number": number})
        assert [await receive(layer, channel) for _ in range(2)] == [{"number": number}] * 2


async def test_each_message_has_the_expiry_of_its_sender(
    make_layer: MakeLayer, observer: Observer
) -> None:
    for expiry in (7, 0.5, 1000):
        await make_layer(expiry=expiry).send("jobs", {})
    left = observer.execute(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM pg_layer_message ORDER BY id"
    ).fetchall()
    # Each ends after its time at the latest, and the longest lived cannot have lost minutes.
    assert left[0][0] <= 7
    assert left[1][0] <= 0.5
    assert 900 < left[2][0] <= 1000


# ---------------------------------------------------------------------- memberships


@pytest.mark.parametrize("way", ["send", "group_send"])
async def test_a_message_that_expires_unread_leaves_the_memberships_of_its_channel(
    make_layer: MakeLayer, observer: Observer, way: str
) -> None:
    layer, sender = make_layer(heartbeat=0.1), make_layer(expiry=EXPIRY)
    unread, quiet = [await layer.new_channel() for _ in range(2)]
    for channel in (unread, quiet):
        await layer.group_add("room", channel)
    await listen(layer)
    if way == "send":
        await sender.send(unread, {"number": 0})
    else:
        await sender.group_send("room", {"number": 0})
    # A heartbeat drops it from the channel queue.
    await until(lambda: layer.stats()["dropped_expired"] >= (1 if way == "send" else 2))
    assert sorted(await sender.group_channels("room")) == sorted([unread, quiet])
    await make_layer().group_send("room", {"number": 1})
    assert await receive(layer, unread) == await receive(layer, quiet) == {"number": 1}


# ---------------------------------------------------------------------- deleting


async def test_expired_messages_without_a_sweeper_are_deleted_by_a_heartbeat(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, brief = make_layer(heartbeat=0.1, sweep_interval=0), make_layer(expiry=EXPIRY)
    elsewhere = make_layer(expiry=EXPIRY, prefix="elsewhere")
    lasting = make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for sender in (brief, elsewhere, lasting):
        await sender.send("jobs", {})
        await sender.group_send("room", {"blob": bytes(10_000)})
    assert count(observer, "message") == 6
    await until(lambda: count(observer, "message") == 2)
    # A second time, too, and what expires out of turn.
    await lasting.send("jobs", {}, expiry=3600)
    await brief.send_many([("jobs", {})] * 50)
    await until(lambda: count(observer, "message") == 3)


async def test_sweep_removes_expired_rows_and_nothing_else(
    make_layer: MakeLayer, observer: Observer
) -> None:
    brief, lasting = make_layer(expiry=EXPIRY, group_expiry=EXPIRY), make_layer()
    elsewhere = make_layer(expiry=EXPIRY, group_expiry=EXPIRY, prefix="elsewhere")
    for layer in (brief, lasting, elsewhere):
        await layer.group_add("room", await layer.new_channel())
        await layer.group_add("room", "jobs")
    await brief.group_add("room", "errands")
    for layer in (brief, lasting, elsewhere):
        for name in (await layer.new_channel(), "jobs", "nobody.!at-all"):
            await layer.send(name, {})
    # The lasting layer's group_add of "jobs" has replaced the brief one's. An owner deletes its own rows.
    expired = "SELECT count(*) FROM pg_layer_{} WHERE expires_at <= clock_timestamp()"
    await until(lambda: observer.execute(expired.format("message").encode()).fetchone() == (6,))
    await until(lambda: observer.execute(expired.format("membership").encode()).fetchone() == (4,))
    # Expired messages of all prefixes are removed.
    assert observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (6, 1, 0)
    swept = "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 1000, true, 0)"
    assert observer.execute(swept.encode()).fetchone() == (6, 1, 0)
    assert observer.execute(swept.encode()).fetchone() == (0, 0, 0)
    assert count(observer, "message") == 3
    assert count(observer, "membership") == 5


async def test_a_process_that_receives_sweeps_by_itself(
    make_layer: MakeLayer, observer: Observer
) -> None:
    brief = make_layer(expiry=EXPIRY, group_expiry=EXPIRY)
    await brief.send("jobs", {})
    await brief.group_add("room", "jobs")
    await listen(make_layer(heartbeat=0.1, sweep_interval=0.1))
    await until(lambda: count(observer, "message") == count(observer, "membership") == 0)
