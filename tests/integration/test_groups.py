"""Groups: every member receives every message once and in order, in any process."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.processes import (
    TIMEOUT,
    Link,
    Message,
    Process,
    Processes,
    listen,
    open_layer,
    receive,
    until,
)


def numbers(messages: Sequence[Message]) -> list[int]:
    return [message["number"] for message in messages]


async def receive_all(layer: PostgresChannelLayer, channel: str, last: int) -> list[int]:
    """Return the numbers of all messages up to the number ``last``."""
    found: list[int] = []
    while not found or found[-1] != last:
        found.append((await receive(layer, channel))["number"])
    return found


async def serve(link: Link, /, dsn: str, **options: object) -> None:
    """Call methods for the test, ``(method, *arguments)``, until it sends None."""
    async with open_layer(dsn, **options) as layer:
        await listen(layer)
        while (order := await link.hear()) is not None:
            what, *arguments = order
            if what == "receive_all":
                link.say(await receive_all(layer, *arguments))
            else:
                link.say(await getattr(layer, what)(*arguments))


async def ask(process: Process[None], *order: object) -> object:
    process.say(order)
    return await process.hear()


async def new_channel(process: Process[None]) -> str:
    return str(await ask(process, "new_channel"))


# ---------------------------------------------------------------------- everybody, in order


async def read_group(link: Link, dsn: str, group: str, members: int) -> list[list[int]]:
    async with open_layer(dsn, capacity=1000) as layer:
        channels = [await layer.new_channel() for _ in range(members)]
        for channel in channels:
            await layer.group_add(group, channel)
        await listen(layer)
        link.say("joined")
        return await asyncio.gather(*(receive_all(layer, channel, -1) for channel in channels))


@pytest.mark.parametrize("pace", ["one by one", "at once"])
async def test_members_in_three_processes_receive_each_message_once_in_order(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, pace: str
) -> None:
    layer = make_layer()
    readers = [processes.start(read_group, migrated_dsn, "room", 5) for _ in range(3)]
    for reader in readers:
        await reader.hear()
    await listen(layer)
    sizes = (10, 10, 10, 100, 5000, 6000, 20_000, 200_000)
    messages: list[Message] = [
        {"number": n, "blob": bytes(random.choice(sizes))} for n in range(150)
    ]
    if pace == "one by one":
        for message in messages:
            await layer.group_send("room", message)
    else:
        await asyncio.gather(*(layer.group_send("room", message) for message in messages))
    await layer.group_send("room", {"number": -1})
    for reader in readers:
        assert await reader.result() == [[*range(150), -1]] * 5


async def test_messages_of_one_writer_to_channel_and_group_keep_their_order(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn, capacity=1000)
    channel = await new_channel(reader)
    await layer.group_add("room", channel)
    for number in range(100):
        message = {"number": number, "blob": bytes(random.choice((10, 10, 6000)))}
        if random.random() < 0.5:
            await layer.send(channel, message)
        else:
            await layer.group_send("room", message)
    await layer.send(channel, {"number": -1})
    assert await ask(reader, "receive_all", channel, -1) == [*range(100), -1]


async def test_group_add_twice_channel_receives_one_message(make_layer: MakeLayer) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    for _ in range(2):
        await layer.group_add("room", channel)
        await sender.group_add("room", channel)
    await sender.group_send("room", {"number": 0})
    await sender.send(channel, {"number": -1})
    assert await receive_all(layer, channel, -1) == [0, -1]


def rows(observer: Observer) -> list[tuple[str, int]]:
    """Return the number of rows at each address of a group or a normal channel."""
    return observer.execute(
        "SELECT address, count(*) FROM pg_layer_message WHERE address ~ '!(@|:)'"
        " GROUP BY address ORDER BY 1"
    ).fetchall()


def be_steady(observer: Observer) -> None:
    """Set the lease clock to renewals without a gap for a day."""
    updated = observer.execute(
        "UPDATE pg_layer_lease_clock SET steady_since = steady_since - interval '1 day'"
    )
    assert updated.rowcount == 1


async def test_group_send_to_an_empty_group_while_leases_are_renewed_writes_no_row(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    await listen(layer)
    # Membership rows may be missing until every process has had the time to write them again.
    await layer.group_send("nobody", {"number": 0})
    assert rows(observer) == [("asgi!@nobody", 1)]
    be_steady(observer)
    await layer.group_send("nobody", {"number": 1})
    await layer.group_send_many([("nobody", {"number": 2}), ("nobody-else", {"number": 3})])
    await layer.group_discard("nobody", await layer.new_channel())
    assert rows(observer) == [("asgi!@nobody", 1)]
    channel = await layer.new_channel()
    await layer.group_add("nobody", channel)
    await layer.group_send("nobody", {"number": 4})
    assert await receive(layer, channel) == {"number": 4}


async def test_group_send_to_an_empty_group_after_a_gap_in_renewals_writes_a_row(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    await listen(layer)
    be_steady(observer)
    await layer.group_send("nobody", {"number": 0})
    assert rows(observer) == []
    observer.execute("UPDATE pg_layer_lease_clock SET renewed_at = renewed_at - interval '2 hours'")
    await layer.group_send("nobody", {"number": 1})
    assert rows(observer) == [("asgi!@nobody", 1)]


# ---------------------------------------------------------------------- joining


async def test_group_add_of_own_channel_receives_later_messages(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn)
    for n in range(50):
        channel = await new_channel(reader)
        await ask(reader, "group_add", f"group-{n}", channel)
        await layer.group_send(f"group-{n}", {"number": n})
        assert await ask(reader, "receive", channel) == {"number": n}


async def test_group_add_of_channel_of_another_process_receives_later_messages(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader, writer = (processes.start(serve, migrated_dsn) for _ in range(2))
    for n in range(50):
        channel = await new_channel(reader)
        await layer.group_add(f"group-{n}", channel)
        await layer.group_send(f"group-{n}", {"number": 0})
        await ask(writer, "group_send", f"group-{n}", {"number": 1})
        assert await ask(reader, "receive_all", channel, 1) == [0, 1]


async def test_group_add_by_sender_with_late_notifications_keeps_the_order(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """Another process adds the first member of a group; the owner reads the missed messages.

    The read returns a group message. The notification of an earlier message to the channel is late.
    The earlier message must arrive first.
    """
    [[group]] = observer.execute(
        """
        SELECT min(g) FROM (SELECT 'room-' || n AS g FROM generate_series(1, 20000) AS n) AS g
        WHERE pg_layer_notification_channel(pg_layer_group_address('asgi', g))
            = pg_layer_notification_channel(pg_layer_group_address('asgi', 'hall'))
        """
    ).fetchall()
    with Proxy(migrated_dsn) as pool, Proxy(migrated_dsn) as listener:
        reader, sender = make_layer(dsn=pool.dsn(), listen_dsn=listener.dsn()), make_layer()
        channel, other = await reader.new_channel(), await reader.new_channel()
        await reader.group_add("hall", other)  # it listens to both groups from now on
        for _ in range(3):  # the catch-up of the new connection has ended
            await listen(reader)
        pool.swallow()
        await sender.group_add(group, channel)
        await until(lambda: reader.stats()["pending_announcements"] == 1)
        listener.swallow()
        await sender.send(channel, {"number": 0})
        await sender.group_send(group, {"number": 1})
        pool.let_go()
        # The read ends before the notifications are forwarded.
        await until(
            lambda: (
                reader.stats()["memberships"] == 2 or reader.stats()["pending_announcements"] > 1
            )
        )
        listener.let_go()
        await sender.send(channel, {"number": 2})
        assert await receive_all(reader, channel, 2) == [0, 1, 2]
        await reader.close()


async def test_group_add_before_its_process_listens_receives_later_messages(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer, reader = make_layer(), make_layer()
    own, others = await reader.new_channel(), await reader.new_channel()
    await reader.group_add("room", own)
    await layer.group_add("room", others)
    for number in range(5):
        await layer.group_send("room", {"number": number})
    assert (
        await receive_all(reader, own, 4) == await receive_all(reader, others, 4) == [0, 1, 2, 3, 4]
    )


@pytest.mark.parametrize("by", ["its process", "another process"])
async def test_group_add_earlier_messages_do_not_arrive(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, by: str
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn)
    old = await new_channel(reader)
    await ask(reader, "group_add", "room", old)
    for _ in range(20):
        new = await new_channel(reader)
        await layer.group_send("room", {"number": 0})
        if by == "its process":
            await ask(reader, "group_add", "room", new)
        else:
            await layer.group_add("room", new)
        await layer.group_send("room", {"number": 1})
        assert await ask(reader, "receive_all", old, 1) == [0, 1]
        assert await ask(reader, "receive_all", new, 1) == [1]
        await layer.group_discard("room", new)


# ---------------------------------------------------------------------- leaving


@pytest.mark.parametrize("by", ["its process", "another process"])
async def test_group_discard_later_messages_do_not_arrive(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, by: str
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn)
    staying, leaving = await new_channel(reader), await new_channel(reader)
    await ask(reader, "group_add", "room", staying)
    for _ in range(20):
        await ask(reader, "group_add", "room", leaving)
        await layer.group_send("room", {"number": 0})
        if by == "its process":
            # It leaves at once: messages that have not reached it by then are not delivered.
            assert await ask(reader, "receive_all", leaving, 0) == [0]
            await ask(reader, "group_discard", "room", leaving)
        else:
            await layer.group_discard("room", leaving)
        await layer.group_send("room", {"number": 1})
        await layer.send(leaving, {"number": -1})
        assert await ask(reader, "receive_all", staying, 1) == [0, 1]
        before = [] if by == "its process" else [0]
        assert await ask(reader, "receive_all", leaving, -1) == [*before, -1]


async def test_membership_changed_by_several_processes_last_change_counts(
    make_layer: MakeLayer,
) -> None:
    # A process that polls receives the changes of others after it has made its own.
    owner = make_layer(poll_interval=0.5)
    other = make_layer()
    joined, left, witness = [await owner.new_channel() for _ in range(3)]
    await listen(owner)
    await owner.group_add("room", witness)
    await owner.group_add("room", joined)
    await other.group_discard("room", joined)
    await owner.group_add("room", joined)
    await other.group_add("room", left)
    await owner.group_discard("room", left)
    await listen(owner)
    await other.group_send("room", {"number": 0})
    for channel in (joined, left, witness):
        await other.send(channel, {"number": -1})
    assert await receive_all(owner, witness, -1) == [0, -1]
    assert await receive_all(owner, left, -1) == [-1]
    assert await receive_all(owner, joined, -1) == [0, -1]


async def test_membership_changed_many_times_last_change_counts(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn)
    channels = [await new_channel(reader) for _ in range(20)]
    last = {}
    for _ in range(10):
        for channel in channels:
            last[channel] = random.random() < 0.5
        await asyncio.gather(
            *(
                (layer.group_add if is_in else layer.group_discard)("room", channel)
                for channel, is_in in last.items()
            )
        )
    await layer.group_send("room", {"number": 0})
    for channel in channels:
        await layer.send(channel, {"number": -1})
        expected = [0, -1] if last[channel] else [-1]
        assert await ask(reader, "receive_all", channel, -1) == expected


# ---------------------------------------------------------------------- expiry


async def test_membership_ends_group_expiry_after_the_last_group_add(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(group_expiry=1)
    reader = processes.start(serve, migrated_dsn, group_expiry=1)
    lasting, ending = await new_channel(reader), await new_channel(reader)
    for channel in (ending, lasting):
        await ask(reader, "group_add", "room", channel)
    await layer.group_send("room", {"number": 0})

    def ending_has_ended() -> bool:
        return bool(
            observer.execute(
                "SELECT expires_at <= clock_timestamp() FROM pg_layer_membership"
                " WHERE channel = %s",
                (ending,),
            ).fetchall()[0][0]
        )

    while not ending_has_ended():
        await ask(reader, "group_add", "room", lasting)
        await asyncio.sleep(0.05)
    await layer.group_send("room", {"number": 1})
    for channel in (ending, lasting):
        await layer.send(channel, {"number": -1})
    assert await ask(reader, "receive_all", lasting, -1) == [0, 1, -1]
    assert await ask(reader, "receive_all", ending, -1) == [0, -1]


async def test_group_send_to_a_group_whose_members_have_expired_writes_no_row(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(group_expiry=0.1, heartbeat=0.2), make_layer()
    await layer.group_add("room", await layer.new_channel())
    await layer.group_add("room", "normal")
    # The owner deletes its row. The row of the normal channel stays until a sweep.
    await until(lambda: observer.execute("SELECT FROM pg_layer_membership").rowcount == 1)
    be_steady(observer)
    await until(
        lambda: (
            observer.execute(
                "SELECT FROM pg_layer_membership WHERE expires_at <= clock_timestamp()"
            ).rowcount
        )
    )
    await sender.group_send("room", {"number": 0})
    assert rows(observer) == []


async def test_membership_without_group_expiry_lasts_as_long_as_its_process(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn, group_expiry=None)
    channel = await new_channel(reader)
    await ask(reader, "group_add", "room", channel)
    memberships = "SELECT channel, expires_at = 'infinity' FROM pg_layer_membership"
    assert observer.execute(memberships).fetchall() == [(channel, True)]
    await layer.group_send("room", {"number": 0})
    assert await ask(reader, "receive", channel) == {"number": 0}
    reader.say(None)
    await reader.result()
    assert observer.execute(memberships).fetchall() == []


async def add_with_a_wrong_clock(link: Link, dsn: str, error: float) -> None:
    """Run with a clock that differs from the database's."""
    real = time.time
    time.time = lambda: real() + error
    await serve(link, dsn, group_expiry=60, expiry=60)


@pytest.mark.parametrize("error", [86400.0, -86400.0], ids=["fast", "slow"])
async def test_group_expiry_is_measured_by_the_clock_of_the_database(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer, error: float
) -> None:
    layer = make_layer()
    reader = processes.start(add_with_a_wrong_clock, migrated_dsn, error)
    channel = await new_channel(reader)
    await ask(reader, "group_add", "room", channel)
    seconds_left = observer.execute(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM pg_layer_membership"
    ).fetchall()
    assert 60 - TIMEOUT < seconds_left[0][0] <= 60
    await layer.group_send("room", {"number": 0})
    await layer.send(channel, {"number": 1})
    assert await ask(reader, "receive_all", channel, 1) == [0, 1]


# ---------------------------------------------------------------------- normal channels, and rows


async def test_group_send_normal_channel_as_member_receives(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    worker = processes.start(serve, migrated_dsn)
    specific = await new_channel(worker)
    await layer.group_add("room", "jobs")
    await layer.group_add("room", specific)
    for number in range(20):
        await layer.group_send("room", {"number": number, "blob": bytes(random.choice((10, 6000)))})
    assert await ask(worker, "receive_all", "jobs", 19) == list(range(20))
    assert await ask(worker, "receive_all", specific, 19) == list(range(20))
    await layer.group_discard("room", "jobs")
    await layer.group_send("room", {"number": 20})
    await layer.send("jobs", {"number": -1})
    assert await ask(worker, "receive_all", "jobs", -1) == [-1]


async def test_group_send_many_members_and_processes_writes_one_row(
    make_layer: MakeLayer, observer: Observer
) -> None:
    sender, *layers = (make_layer() for _ in range(4))
    for layer in layers:
        for _ in range(50):
            await layer.group_add("room", await layer.new_channel())
    for number in range(2):
        await sender.group_send("room", {"number": number})
    await asyncio.gather(
        *(sender.group_send("room", {"number": number}) for number in range(2, 10))
    )
    assert rows(observer) == [("asgi!@room", 10)]


# ---------------------------------------------------------------------- flush


async def test_flush_by_another_process_removes_everything(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer()
    reader = processes.start(serve, migrated_dsn)
    channel = await new_channel(reader)
    await layer.group_add("room", channel)
    await layer.send(channel, {"number": 0})
    await layer.group_send("room", {"number": 1})
    await layer.send("jobs", {"number": 2})
    marker = await new_channel(reader)

    async def all_has_reached_the_reader() -> None:
        await layer.send(marker, {"number": 3})
        await ask(reader, "receive", marker)

    await all_has_reached_the_reader()
    await layer.flush()
    await all_has_reached_the_reader()
    await layer.group_send("room", {"number": 4})
    for name in (channel, "jobs"):
        await layer.send(name, {"number": -1})
        assert await ask(reader, "receive_all", name, -1) == [-1]
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


async def test_flush_later_changes_and_messages_last(make_layer: MakeLayer) -> None:
    owner, other = make_layer(), make_layer()
    await listen(owner)
    for n in range(30):
        await (owner if n % 2 else other).flush()
        channel = await owner.new_channel()
        await owner.group_add("room", channel)
        await other.group_send("room", {"number": n})
        await listen(owner)
        await other.group_send("room", {"number": -1})
        assert await receive_all(owner, channel, -1) == [n, -1]
        await owner.group_discard("room", channel)
