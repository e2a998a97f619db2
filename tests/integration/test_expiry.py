"""Expiry: a message that waited too long is never delivered, wherever it waited, swept or not."""

from __future__ import annotations

import asyncio
import time

import pytest

from pg_layer.ops import Regroup
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


async def read_when_told(link: Link, dsn: str, name: str | None, starts: str, error: float) -> Message:
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
    # A group's row is gone once it is in the mailboxes: the last one tells when all are over.
    await brief.send("clock", {})
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


async def test_each_message_has_the_expiry_of_its_sender(make_layer: MakeLayer, observer: Observer) -> None:
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


async def test_what_expires_unread_ends_its_channels_memberships(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(heartbeat=0.1), make_layer(expiry=EXPIRY)
    unread, read, quiet = [await layer.new_channel() for _ in range(3)]
    for channel in (unread, read, quiet):
        await layer.group_add("room", channel)
    await layer.group_add("other", unread)
    await listen(layer)
    received = asyncio.create_task(layer.receive(read))
    await sender.send(unread, {})
    await sender.send(read, {})
    assert await received == {}
    receiving = asyncio.create_task(layer.receive(read))
    memberships = "SELECT group_name, channel FROM pg_layer_membership"
    await until(lambda: len(observer.execute(memberships).fetchall()) == 2)
    assert set(observer.execute(memberships).fetchall()) == {("room", read), ("room", quiet)}
    # It may join again.
    await layer.group_add("room", unread)
    await make_layer().group_send("room", {"number": 1})
    assert await receive(layer, unread) == await receive(layer, quiet) == await receiving == {"number": 1}


async def test_a_group_message_that_expires_unread_ends_the_membership(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(heartbeat=0.1), make_layer(expiry=EXPIRY)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    await sender.group_send("room", {})
    await until(lambda: count(observer, "membership") == 0)
    await make_layer().group_send("room", {"number": 1})
    await sender.send(channel, {"number": 2})
    assert await receive(layer, channel) == {"number": 2}


@pytest.mark.parametrize("who", ["itself", "itself, meanwhile", "another"])
async def test_who_joins_again_stays_whatever_has_expired_before(
    make_layer: MakeLayer, observer: Observer, who: str
) -> None:
    layer, other, sender = make_layer(), make_layer(), make_layer(expiry=EXPIRY)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await other.group_add("room", "jobs")  # connected
    await listen(layer)
    await sender.send(channel, {"number": 0})
    await all_expired(observer)
    mailbox, engine = layer._homes.client.mailbox(channel), layer._homes.home
    assert engine is not None
    await until(lambda: len(mailbox))
    joining = asyncio.create_task((layer if "itself" in who else other).group_add("room", channel))
    await asyncio.sleep(0)
    if "meanwhile" not in who:
        await joining
    while len(mailbox):  # its clock may be behind the server's
        await engine.expire_unread()
    await joining
    members = b"SELECT channel FROM pg_layer_membership WHERE channel <> 'jobs'"
    assert observer.execute(members).fetchall() == [(channel,)]
    await make_layer().group_send("room", {"number": 1})
    assert await receive(layer, channel) == {"number": 1}


async def test_who_joins_in_the_same_write_stays(make_layer: MakeLayer, observer: Observer) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    engine = layer._homes.home
    assert engine is not None
    leave = Regroup("room", channel, False, unless_since=2**62)
    await engine.sender._regroup([leave, Regroup("room", channel, True), leave], 10)
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == [(channel,)]
    # And who has joined before the message is made to leave.
    await engine.sender._regroup([leave], 10)
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == []


# ---------------------------------------------------------------------- sweeping


async def test_a_sweep_removes_what_has_expired_and_nothing_else(
    make_layer: MakeLayer, observer: Observer
) -> None:
    brief, lasting = make_layer(expiry=EXPIRY, group_expiry=EXPIRY), make_layer()
    elsewhere = make_layer(expiry=EXPIRY, group_expiry=EXPIRY, prefix="elsewhere")
    for layer in (brief, lasting, elsewhere):
        channel = await layer.new_channel()
        for name in (channel, "jobs", "nobody.!at-all"):
            await layer.send(name, {})
        await layer.group_add("room", channel)
        await layer.group_add("room", "jobs")
    # The lasting layer's group_add of "jobs" renewed the brief one's: it is the same channel.
    expired = "SELECT count(*) FROM pg_layer_{} WHERE expires_at <= clock_timestamp()"
    await until(lambda: observer.execute(expired.format("message").encode()).fetchone() == (6,))
    await until(lambda: observer.execute(expired.format("membership").encode()).fetchone() == (3,))
    assert observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (3, 1, 0)
    assert observer.execute(
        "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 1000, true, null, null)"
    ).fetchone() == (3, 1, 0)
    assert observer.execute(
        "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 1000, true, null, null)"
    ).fetchone() == (0, 0, 0)
    assert count(observer, "message") == 6
    assert count(observer, "membership") == 4


async def test_a_serving_process_sweeps_by_itself(make_layer: MakeLayer, observer: Observer) -> None:
    brief = make_layer(expiry=EXPIRY, group_expiry=EXPIRY)
    await brief.send("jobs", {})
    await brief.group_add("room", "jobs")
    await listen(make_layer(heartbeat=0.1, sweep_interval=0.1))
    await until(lambda: count(observer, "message") == count(observer, "membership") == 0)
