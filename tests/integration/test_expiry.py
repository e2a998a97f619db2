"""An expired message is never delivered, wherever it waited, before or after a sweep."""

from __future__ import annotations

import time

import pytest

from tests.conftest import MakeLayer, Observer
from tests.processes import Link, Message, Processes, listen, open_layer, receive, until

EXPIRY = 0.3


async def all_expired(observer: Observer) -> None:
    """Return when every message in the table has expired."""
    await until(
        lambda: observer.execute(
            "SELECT 1 WHERE NOT EXISTS"
            " (SELECT FROM pg_layer_message WHERE expires_at > clock_timestamp())"
        ).fetchone()
    )


def count_rows(observer: Observer, table: str) -> int:
    row = observer.execute(f"SELECT count(*) FROM pg_layer_{table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


async def read_on_request(
    link: Link, dsn: str, name: str | None, listens: str, clock_error: float
) -> Message:
    """Return the first message that is received after the request of the test.

    The wall clock of this process is wrong by ``clock_error`` seconds.
    """
    real_time = time.time
    time.time = lambda: real_time() + clock_error
    async with open_layer(dsn) as layer:
        channel = name or await layer.new_channel()
        await layer.group_add("room", channel)
        if listens == "listening":
            await listen(layer)
        link.say(channel)
        await link.hear()
        return await receive(layer, channel)


@pytest.mark.parametrize(
    ("name", "listens", "clock_error"),
    [
        pytest.param(None, "listening", 0.0, id="specific"),
        pytest.param(None, "later", 0.0, id="specific, nobody listens"),
        pytest.param("jobs", "listening", 0.0, id="normal"),
        pytest.param("jobs", "later", 0.0, id="normal, nobody listens"),
        pytest.param(None, "listening", 86400.0, id="fast clock"),
        pytest.param(None, "listening", -86400.0, id="slow clock"),
    ],
)
@pytest.mark.parametrize("method", ["send", "group_send"])
async def test_message_expired_in_the_table_is_never_delivered(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    method: str,
    name: str | None,
    listens: str,
    clock_error: float,
) -> None:
    brief, lasting = make_layer(expiry=EXPIRY), make_layer()
    reader = processes.start(read_on_request, migrated_dsn, name, listens, clock_error)
    channel = await reader.hear()
    for number in range(3):
        message = {"number": number, "blob": bytes(3000 * number)}
        await (
            brief.send(channel, message) if method == "send" else brief.group_send("room", message)
        )
    await all_expired(observer)
    await lasting.send(channel, {"number": 3})
    reader.say("now")
    assert await reader.result() == {"number": 3}


async def test_message_received_before_its_expiry_is_delivered(make_layer: MakeLayer) -> None:
    layer, brief = make_layer(), make_layer(expiry=30)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for number in range(10):
        await brief.send(channel, {"number": number})
        await brief.group_send("room", {"number": number})
        assert [await receive(layer, channel) for _ in range(2)] == [{"number": number}] * 2


async def test_message_expires_after_the_expiry_of_its_sender(
    make_layer: MakeLayer, observer: Observer
) -> None:
    for expiry in (7, 0.5, 1000):
        await make_layer(expiry=expiry).send("jobs", {})
    left = observer.execute(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8"
        " FROM pg_layer_message ORDER BY id"
    ).fetchall()
    # A part of each expiry has passed. The bounds allow a slow machine, but not minutes.
    assert left[0][0] <= 7
    assert left[1][0] <= 0.5
    assert 900 < left[2][0] <= 1000


# ---------------------------------------------------------------------- memberships


@pytest.mark.parametrize("method", ["send", "group_send"])
async def test_message_expired_unread_does_not_change_the_memberships(
    make_layer: MakeLayer, observer: Observer, method: str
) -> None:
    layer, sender = make_layer(heartbeat=0.1), make_layer(expiry=EXPIRY)
    unread, quiet = [await layer.new_channel() for _ in range(2)]
    for channel in (unread, quiet):
        await layer.group_add("room", channel)
    await listen(layer)
    if method == "send":
        await sender.send(unread, {"number": 0})
    else:
        await sender.group_send("room", {"number": 0})
    # A heartbeat drops the expired message from the channel queue.
    await until(lambda: layer.stats()["dropped_expired"] >= (1 if method == "send" else 2))
    assert sorted(await sender.group_channels("room")) == sorted([unread, quiet])
    await make_layer().group_send("room", {"number": 1})
    assert await receive(layer, unread) == await receive(layer, quiet) == {"number": 1}


# ---------------------------------------------------------------------- deleting


async def test_heartbeat_deletes_expired_messages_without_a_sweeper(
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
    assert count_rows(observer, "message") == 6
    await until(lambda: count_rows(observer, "message") == 2)
    # Repeat it, with messages that expire before an older one.
    await lasting.send("jobs", {}, expiry=3600)
    await brief.send_many([("jobs", {})] * 50)
    await until(lambda: count_rows(observer, "message") == 3)


async def test_sweep_removes_only_expired_rows(make_layer: MakeLayer, observer: Observer) -> None:
    brief, lasting = make_layer(expiry=EXPIRY, group_expiry=EXPIRY), make_layer()
    elsewhere = make_layer(expiry=EXPIRY, group_expiry=EXPIRY, prefix="elsewhere")
    for layer in (brief, lasting, elsewhere):
        await layer.group_add("room", await layer.new_channel())
        await layer.group_add("room", "jobs")
    await brief.group_add("room", "errands")
    for layer in (brief, lasting, elsewhere):
        for name in (await layer.new_channel(), "jobs", "nobody.!at-all"):
            await layer.send(name, {})
    # The group_add of "jobs" by `lasting` has replaced the one by `brief`.
    # A sweep does not remove the memberships of owned channels: their owner does.
    expired = "SELECT count(*) FROM pg_layer_{} WHERE expires_at <= clock_timestamp()"
    await until(lambda: observer.execute(expired.format("message").encode()).fetchone() == (6,))
    await until(lambda: observer.execute(expired.format("membership").encode()).fetchone() == (4,))
    # Expired messages of all prefixes are removed.
    assert observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (6, 1, 0)
    swept = "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 1000, true, 0)"
    assert observer.execute(swept.encode()).fetchone() == (6, 1, 0)
    assert observer.execute(swept.encode()).fetchone() == (0, 0, 0)
    assert count_rows(observer, "message") == 3
    assert count_rows(observer, "membership") == 5


async def test_receiving_process_sweeps_by_itself(
    make_layer: MakeLayer, observer: Observer
) -> None:
    brief = make_layer(expiry=EXPIRY, group_expiry=EXPIRY)
    await brief.send("jobs", {})
    await brief.group_add("room", "jobs")
    await listen(make_layer(heartbeat=0.1, sweep_interval=0.1))
    await until(lambda: count_rows(observer, "message") == count_rows(observer, "membership") == 0)
