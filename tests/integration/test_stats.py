"""`layer.stats()`: each counter moves by what it counts, and by nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from pg_layer import ChannelFull, PostgresChannelLayer
from pg_layer._state.counters import COUNTED, State, Stats
from tests.conftest import MakeLayer, Observer
from tests.integration.test_django import postgres
from tests.integration.test_sweeper import steady
from tests.integration.test_sync import on_django
from tests.processes import Processes, listen, new_layer, receive, until, write
from tests.project.commands import run, succeeded
from tests.project.forks import LoopThread
from tests.stand_ins import find_first

THREADS = 8
TIMES = 1000
LARGE = 20_000  # bytes, and so not in a notification

Message = dict[str, Any]


def number(n: int, size: int = 0) -> Message:
    return {"type": "test", "n": n, "blob": bytes(size)}


class Moved:
    """The changes of counters since this object was made."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self._layer = layer
        self._before = layer.stats()

    def all(self) -> dict[str, int]:
        now = self._layer.stats()
        moved = {name: now[name] - self._before[name] for name in COUNTED}  # type: ignore[literal-required]
        return {name: count for name, count in moved.items() if count}

    def __getitem__(self, name: str) -> int:
        return self.all().get(name, 0)

    def of(self, *names: str) -> dict[str, int]:
        """Return some of the changes."""
        return {name: self[name] for name in names}


def state(stats: Stats) -> State:
    return {name: stats[name] for name in State.__annotations__}  # type: ignore[return-value,literal-required]


NOTHING: State = {
    "channels": 0,
    "queued_messages": 0,
    "pending_announcements": 0,
    "pending_operations": 0,
    "memberships": 0,
    "remembered_keys": 0,
    "listener": "off",
    "lease_age": None,
    "failing_tasks": 0,
}


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads switch so often that any code of more than one step is interrupted."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


async def elsewhere(processes: Processes, dsn: str, channel: str, messages: list[Message]) -> None:
    """Another process sends, so that nothing of it is counted here."""
    await processes.start(write, dsn, channel, messages).result()


# ---------------------------------------------------------------------- any time, anywhere


def test_stats_before_use_are_zero(migrated_dsn: str, observer: Observer) -> None:
    layer = new_layer(migrated_dsn)
    stats = layer.stats()
    assert list(stats) == list(Stats.__annotations__)
    assert not any(stats[name] for name in COUNTED)  # type: ignore[literal-required]
    assert state(stats) == NOTHING
    assert stats["mean_batch_size"] == 0.0
    assert json.loads(json.dumps(stats)) == stats
    rows = observer.execute(
        "SELECT 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert rows.fetchall() == []


async def test_stats_after_close_counters_continue(make_layer: MakeLayer) -> None:
    layer = make_layer()
    for n in range(1, 4):
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, number(n))
        assert await receive(layer, channel) == number(n)
        counted = Moved(layer)
        await layer.close()
        assert state(layer.stats()) == NOTHING
        assert counted.all() == {}
        assert layer.stats()["sent"] == layer.stats()["delivered"] == layer.stats()["received"] == n


async def test_stats_in_a_thread_without_a_loop_are_those_of_the_layer(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await layer.send(channel, number(1))
    await receive(layer, channel)
    assert (await asyncio.to_thread(layer.stats))["delivered"] == 1


FORKS = """
import asyncio, json, os, sys
from pg_layer import PostgresChannelLayer
from pg_layer._state.counters import COUNTED

layer = PostgresChannelLayer(dsn=os.environ["PG_LAYER_TEST_PROJECT_DSN"])

async def use(times):
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for _ in range(times):
        await layer.send(channel, {"type": "test"})
        await asyncio.wait_for(layer.receive(channel), 30)

def tell():
    stats = layer.stats()
    counted = sum(stats[name] for name in COUNTED)
    print(json.dumps([stats["sent"], stats["delivered"], counted, stats["memberships"]]))
    sys.stdout.flush()

asyncio.run(use(3))
pid = os.fork()
if pid == 0:
    tell()
    asyncio.run(use(2))
    tell()
    asyncio.run(layer.close())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
tell()
asyncio.run(layer.close())
"""


def test_stats_in_a_forked_child_begin_at_zero(migrated_dsn: str) -> None:
    lines = [json.loads(line) for line in succeeded(run(migrated_dsn, "-c", FORKS)).splitlines()]
    child_at_first, child, parent = lines
    assert child_at_first == [0, 0, 0, 0]
    assert child[:2] == [2, 2]
    assert parent[:2] == [3, 3]


# ---------------------------------------------------------------------- sending


async def test_sent_and_batches_count_messages_and_statements(make_layer: MakeLayer) -> None:
    layer = make_layer()
    moved = Moved(layer)
    for n in range(3):
        await layer.send("jobs", number(n))
    assert moved.all() == {"sent": 3, "batches": 3}
    assert await layer.send_many([("jobs", number(n)) for n in range(10)]) == [True] * 10
    assert moved.all() == {"sent": 13, "batches": 4}
    assert layer.stats()["mean_batch_size"] == 13 / 4
    await asyncio.gather(*(layer.send("jobs", number(n)) for n in range(50)))
    assert moved["sent"] == 63
    assert 4 < moved["batches"] < 4 + 50


async def test_group_sent_counts_messages_to_groups(make_layer: MakeLayer) -> None:
    layer = make_layer()
    for name in ("one", "two", "three"):
        await layer.group_add("room", name)
    moved = Moved(layer)
    await layer.group_send("room", number(1))
    await layer.group_send("nobody-is-here", number(1))
    await layer.group_send_many([("room", number(2)), ("room", number(3))])
    assert moved.all() == {"group_sent": 4, "batches": 3}


async def test_refused_full_counts_each_refused_message(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=2)
    moved = Moved(layer)
    for n in range(2):
        await layer.send("jobs", number(n))
    for n in range(3):
        with pytest.raises(ChannelFull):
            await layer.send("jobs", number(n))
    assert moved.all() == {"sent": 2, "refused_full": 3, "batches": 5}
    assert await layer.send_many([("jobs", number(1)), ("other", number(1))]) == [False, True]
    assert moved.all() == {"sent": 3, "refused_full": 4, "batches": 6}
    assert layer.stats()["mean_batch_size"] == 7 / 6


async def test_dropped_full_counts_group_messages_that_a_full_normal_channel_misses(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(channel_capacity={"small": 2})
    for name in ("small", "large"):
        await layer.group_add("room", name)
    moved = Moved(layer)
    for n in range(5):
        await layer.group_send("room", number(n))
    assert moved.all() == {"group_sent": 5, "batches": 5, "dropped_full": 3}


async def test_sent_does_not_count_invalid_calls(make_layer: MakeLayer) -> None:
    layer = make_layer()
    with pytest.raises(TypeError):
        await layer.send("no channel", number(1))
    assert Moved(layer).all() == {}
    assert not layer.stats()["batches"]


async def test_pending_operations_counts_those_behind_the_statement_in_flight(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(capacity=1000)
    await layer.send("jobs", number(0))
    with observer.transaction():
        observer.execute("LOCK TABLE pg_layer_message, pg_layer_membership")
        calls: list[Awaitable[None]] = [
            *(layer.send("jobs", number(n)) for n in range(10)),
            *(layer.group_add("room", f"channel-{n}") for n in range(5)),
        ]
        waiting = asyncio.gather(*calls)
        # Of each kind one is on its way.
        await until(lambda: layer.stats()["pending_operations"] == 13)
        assert layer.stats()["sent"] == 1
    await waiting
    assert layer.stats()["pending_operations"] == 0
    assert layer.stats()["sent"] == 11


# ---------------------------------------------------------------------- receiving


async def test_inline_messages_and_reads_count_small_and_large_messages(
    make_layer: MakeLayer, processes: Processes, migrated_dsn: str
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    moved = Moved(layer)
    await elsewhere(processes, migrated_dsn, channel, [number(1)])
    assert await receive(layer, channel) == number(1)
    assert moved.all() == {"received": 1, "delivered": 1, "inline_messages": 1}
    await elsewhere(processes, migrated_dsn, channel, [number(2, LARGE)])
    assert await receive(layer, channel) == number(2, LARGE)
    await until(lambda: moved["reads"] == 1)
    assert moved.all() == {"received": 2, "delivered": 2, "inline_messages": 1, "reads": 1}


async def test_received_counts_a_group_message_once_and_delivered_each_member(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in channels:
        await layer.group_add("room", channel)
    await listen(layer)
    moved = Moved(layer)
    await layer.group_send("room", number(1))
    for channel in channels:
        assert await receive(layer, channel) == number(1)
    assert moved.of("received", "delivered") == {"received": 1, "delivered": 3}


async def test_delivered_counts_each_job_once(make_layer: MakeLayer) -> None:
    layer = make_layer()
    moved = Moved(layer)
    for n in range(20):
        await layer.send("jobs", number(n))
    for n in range(20):
        assert await receive(layer, "jobs") == number(n)
    assert moved["delivered"] == 20
    assert moved["received"] >= 20  # some may have gone back and come again


async def test_dropped_full_counts_group_messages_that_a_full_member_misses(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(capacity=4)
    slow, quick = [await layer.new_channel() for _ in range(2)]
    for channel in (slow, quick):
        await layer.group_add("room", channel)
    await listen(layer)
    moved = Moved(layer)
    for n in range(10):
        await layer.group_send("room", number(n))
        assert await receive(layer, quick) == number(n)
    assert moved.of("received", "delivered", "dropped_full") == {
        "received": 10,
        "delivered": 10,
        "dropped_full": 6,
    }
    assert layer.stats()["queued_messages"] == 4


async def test_dropped_expired_counts_messages_that_expire_in_their_queue(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    moved = Moved(layer)
    for n in range(3):
        await layer.send(channel, number(n), expiry=0.2)
    await layer.send(channel, number(3))
    await until(lambda: layer.stats()["queued_messages"] == 4)
    alive = "SELECT 1 FROM pg_layer_message WHERE expires_at > clock_timestamp()"
    await until(lambda: len(observer.execute(alive).fetchall()) == 1)
    assert await receive(layer, channel) == number(3)
    assert moved.of("received", "delivered", "dropped_expired") == {
        "received": 4,
        "delivered": 1,
        "dropped_expired": 3,
    }


async def test_dropped_undecodable_counts_messages_that_cannot_be_decoded(
    make_layer: MakeLayer, processes: Processes, migrated_dsn: str
) -> None:
    layer = make_layer(symmetric_encryption_keys=["secret"])
    channel = await layer.new_channel()
    await listen(layer)
    moved = Moved(layer)
    await elsewhere(processes, migrated_dsn, channel, [number(n) for n in range(3)])
    await layer.send(channel, number(3))
    assert await receive(layer, channel) == number(3)
    assert moved.of("received", "delivered", "dropped_undecodable") == {
        "received": 4,
        "delivered": 1,
        "dropped_undecodable": 3,
    }


async def test_delivered_does_not_count_messages_put_back(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """So full that `receive()` waits for the row's end, and is cancelled there."""
    layer = make_layer(capacity=2)
    channel = await layer.new_channel()
    await listen(layer)
    delivered = Moved(layer)
    await layer.send(channel, number(1))
    await until(lambda: layer.stats()["queued_messages"] == 1)
    with observer.transaction():
        observer.execute("LOCK TABLE pg_layer_message")
        receiving = asyncio.create_task(layer.receive(channel))
        await until(lambda: layer.stats()["queued_messages"] == 0)
        receiving.cancel()
        await asyncio.wait((receiving,))
        assert receiving.cancelled()
    assert delivered["delivered"] == 0
    assert await receive(layer, channel) == number(1)
    assert delivered["delivered"] == 1


async def test_channels_and_memberships_follow_the_calls(make_layer: MakeLayer) -> None:
    layer = make_layer()
    channels = [await layer.new_channel() for _ in range(3)]
    await listen(layer)
    before = layer.stats()["channels"]
    for channel in channels:
        await layer.group_add("room", channel)
        await layer.group_add("other", channel)
    await layer.group_add("room", "jobs")  # not of this process
    stats = layer.stats()
    assert stats["memberships"] == 6
    assert stats["channels"] == before + 3
    await layer.group_send("room", number(1))
    await layer.group_send("room", number(2))
    await until(lambda: layer.stats()["queued_messages"] == 6)
    await receive(layer, channels[0])
    assert layer.stats()["queued_messages"] == 5
    await layer.group_discard("room", channels[0])
    assert layer.stats()["memberships"] == 5


# ---------------------------------------------------------------------- staying alive


async def test_listener_and_lease_age_follow_the_state(make_layer: MakeLayer) -> None:
    layer = make_layer()
    await layer.send("jobs", number(1))
    assert (layer.stats()["listener"], layer.stats()["lease_age"]) == ("off", None)
    await listen(layer)
    assert layer.stats()["listener"] == "listening"
    client = layer._loops.client
    client.lease_renewed(client.renewed_at - 1000)
    age = layer.stats()["lease_age"]
    assert age is not None
    assert age > 1000
    await layer.health()  # renews it
    renewed = layer.stats()["lease_age"]
    assert renewed is not None
    assert 0 <= renewed < 1000


async def test_listener_of_a_polling_layer_is_polling(make_layer: MakeLayer) -> None:
    layer = make_layer(poll_interval=0.05)
    await listen(layer)
    stats = layer.stats()
    assert stats["listener"] == "polling"
    assert stats["lease_age"] is not None


def test_listener_of_an_ended_loop_is_off(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn)
    asyncio.run(listen(layer))
    assert layer.stats()["listener"] == "off"
    asyncio.run(layer.close())


async def test_reconnects_counts_each_lost_connection(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    await listen(layer)
    assert layer.stats()["reconnects"] == 0
    for times in range(1, 4):
        killed = observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query ~* 'listen' AND pid <> pg_backend_pid()"
        ).fetchall()
        assert killed
        await until(lambda: layer.stats()["reconnects"] == times)  # noqa: B023
        await listen(layer)
    assert layer.stats()["reconnects"] == 3


def test_reconnects_another_main_engine_does_not_count(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn)
    for _ in range(3):
        asyncio.run(listen(layer))
    assert layer.stats()["reconnects"] == 0
    assert layer.stats()["delivered"] == 3
    asyncio.run(layer.close())


async def test_expired_leases_counts_each_expired_lease(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(lease=60, heartbeat=0.2)
    await listen(layer)
    assert layer.stats()["expired_leases"] == 0
    for times in range(1, 3):
        with observer.transaction():
            observer.execute("UPDATE pg_layer_client SET expires_at = now() - interval '1 second'")
            steady(observer)
        await until(lambda: layer.stats()["expired_leases"] == times)  # noqa: B023
        await listen(layer)
    assert layer.stats()["expired_leases"] == 2


async def test_ignored_notifications_counts_foreign_ones(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    moved = Moved(layer)
    for said in ("", "hello", "M 1 2 3"):
        observer.execute(
            "SELECT pg_notify(pg_layer_notification_channel(pg_layer_address('asgi', %s)), %s)",
            (channel, said),
        )
    await until(lambda: moved["ignored_notifications"] == 3)
    assert moved.of("received", "dropped_undecodable") == {"received": 0, "dropped_undecodable": 0}


NO_NOTIFY = """
    CREATE SCHEMA refusing;
    CREATE FUNCTION refusing.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN RAISE feature_not_supported USING MESSAGE = 'NOTIFY is not supported'; END $$;
"""


@pytest.fixture
def no_notify(observer: Observer) -> None:
    """The database refuses NOTIFY on all connections made from here on."""
    observer.execute(NO_NOTIFY.encode())
    find_first(observer, "refusing")


@pytest.mark.usefixtures("no_notify")
async def test_refused_notifications_counts_those_of_calls_and_pings(make_layer: MakeLayer) -> None:
    sender = make_layer()
    await sender.group_add("room", "jobs")
    moved = Moved(sender)
    await sender.send("jobs", number(1))
    await sender.group_send("room", number(2))
    expected = {"sent": 1, "group_sent": 1, "batches": 2}
    names = ("sent", "group_sent", "batches")
    assert moved.of(*names) == expected
    # Once it was refused the sender may be silent at once.
    assert 1 <= moved["refused_notifications"] <= 2
    layer = make_layer()
    for n in (1, 2):
        assert await receive(layer, "jobs") == number(n)
    assert moved.of(*names) == expected
    assert layer.stats()["refused_notifications"] == 0
    await layer.health()  # rings a ping
    assert layer.stats()["refused_notifications"] == 1
    assert layer.stats()["listener"] == "polling"


@pytest.mark.usefixtures("no_notify")
def test_refused_notifications_counts_those_of_synchronous_calls(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(lease=3600)
    with on_django(layer, default=postgres(migrated_dsn)):
        layer.sync.send("jobs", number(1))
        assert Moved(layer).all() == {}
        assert layer.stats()["refused_notifications"] == 1
        assert layer.stats()["sent"] == 1


# ---------------------------------------------------------------------- layer.sync


def test_counters_include_synchronous_calls(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(lease=3600, channel_capacity={"small": 1})
    with on_django(layer, default=postgres(migrated_dsn)):
        layer.sync.group_add("room", "small")
        moved = Moved(layer)
        layer.sync.send("jobs", number(1))
        layer.sync.send_many([("jobs", number(2)), ("jobs", number(3))])
        async_to_sync(layer.send)("jobs", number(4))
        assert moved.all() == {"sent": 4, "batches": 3}
        layer.sync.group_send("room", number(1))
        layer.sync.group_send_many([("room", number(2)), ("nobody", number(3))])
        assert moved.all() == {"sent": 4, "group_sent": 3, "batches": 5, "dropped_full": 1}
        with pytest.raises(ChannelFull):
            layer.sync.send("small", number(2))
        assert moved["refused_full"] == 1


# ---------------------------------------------------------------------- threads


@contextmanager
def owner_thread() -> Iterator[LoopThread]:
    """A thread with a lasting event loop, which the layer uses."""
    owner = LoopThread()
    try:
        yield owner
    finally:
        owner.stop()


def in_threads(work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


@pytest.mark.usefixtures("hasty_switches")
def test_delivered_in_threads_is_exact(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn, capacity=10 * TIMES, expiry=600)
    channels = [async_to_sync(layer.new_channel)() for _ in range(THREADS)]

    async def send_all() -> None:
        for channel in channels:
            assert all(await layer.send_many([(channel, number(n)) for n in range(TIMES)]))

    async def receive_all(channel: str) -> None:
        for n in range(TIMES):
            assert (await layer.receive(channel))["n"] == n

    with owner_thread() as owner:
        owner.do(listen(layer))
        moved = Moved(layer)
        owner.do(send_all())
        in_threads(lambda index: asyncio.run(receive_all(channels[index])))
        assert moved.of("sent", "received", "delivered") == dict.fromkeys(
            ("sent", "received", "delivered"), THREADS * TIMES
        )
        assert layer.stats()["queued_messages"] == 0
        owner.do(layer.close())


@pytest.mark.usefixtures("hasty_switches")
def test_sent_in_threads_is_exact(migrated_dsn: str, observer: Observer) -> None:
    """Send on the owner loop, through `async_to_sync`, and by `layer.sync`, all at once."""
    layer = PostgresChannelLayer(lease=3600, capacity=10_000)
    each = TIMES // 2

    async def send_all() -> None:
        await asyncio.gather(*(layer.send("jobs", number(n)) for n in range(each)))
        await asyncio.gather(*(layer.group_send("room", number(n)) for n in range(each)))

    def work(index: int) -> None:
        if index % 3 == 0:
            owner.do(send_all())
            return
        send: Callable[[str, Message], object] = layer.sync.send
        group_send: Callable[[str, Message], object] = layer.sync.group_send
        if index % 3 == 1:
            send, group_send = async_to_sync(layer.send), async_to_sync(layer.group_send)
        for n in range(each):
            send("jobs", number(n))
            group_send("room", number(n))
        connections.close_all()

    with on_django(layer, default=postgres(migrated_dsn)), owner_thread() as owner:
        layer.sync.group_add("room", "elsewhere")
        in_threads(work)
        stats = layer.stats()
        assert (stats["sent"], stats["group_sent"]) == (THREADS * each,) * 2
        rows = observer.execute(
            "SELECT address, count(*) FROM pg_layer_message GROUP BY 1"
        ).fetchall()
        found: dict[str, int] = dict(rows)
        # The group's own messages: left out where it is known that no client has a member.
        found.pop("asgi!@room", None)
        assert found == {"asgi!:jobs": THREADS * each, "asgi!:elsewhere": THREADS * each}


# ---------------------------------------------------------------------- in the table


def counters_of(observer: Observer, channel: str) -> dict[str, int]:
    row = observer.execute(
        "SELECT counters FROM pg_layer_client WHERE address = pg_layer_address('asgi', %s)",
        (channel,),
    ).fetchone()
    assert row is not None
    counters: dict[str, int] = row[0]
    return counters


async def test_counters_in_the_row_of_the_lease_are_those_of_the_client(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(heartbeat=0.1, lease=60)
    for _ in range(2):  # the second client's are its own
        channel = await layer.new_channel()
        for n in range(3):
            await layer.send(channel, number(n))
            await receive(layer, channel)

        await until(lambda: counters_of(observer, channel)["delivered"] == 3)  # noqa: B023
        counters = counters_of(observer, channel)
        assert set(counters) == {
            *COUNTED,
            "failing_tasks",
            "queued_messages",
            "without_notifications",
        }
        assert {name: counters[name] for name in ("sent", "received", "delivered")} == {
            "sent": 3,
            "received": 3,
            "delivered": 3,
        }
        assert all(type(value) is int for value in counters.values())
        await layer.close()
    assert layer.stats()["delivered"] == 6
