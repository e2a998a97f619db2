"""A process is stopped, as by SIGSTOP or by a hypervisor, for longer than its lease, and goes on.

Other processes renew their leases meanwhile, so that the lease of the stopped one is over, and a
sweep removes what it left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.faults.readers import lists, numbered, readers_of
from tests.logs import event_of
from tests.processes import PATIENCE, Link, Process, Processes, listen, open_layer, until
from tests.project.commands import manage, succeeded

LEASE = 3.0
# The sweeps are those that a test runs.
SHORT_LEASE: dict[str, object] = {
    "lease": LEASE,
    "heartbeat": 0.5,
    "sweep_interval": 0,
    "expiry": 3600,
    "capacity": 1000,
}
TOLD: dict[str, object] = {"on_disconnect": "database.lost", "on_reconnect": "database.back"}
LARGE = 20_000  # bytes; more than a notification can carry


class Found(NamedTuple):
    """What the process found out, by its channels in the order of their names."""

    numbers: list[list[int]]
    told: list[list[str]]
    events: list[str | None]
    expired_leases: int
    memberships: int


class Warnings(logging.Handler):
    """Collects the events of the warnings that the layer logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.events: list[str | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("pg_layer"):
            self.events.append(event_of(record))


async def be_stopped(link: Link, dsn: str, options: dict[str, object]) -> Found:
    """Read three channels, two of them in "room". Say the channels; return what was found.

    The test says the last number to wait for.
    """
    handler = Warnings()
    logging.getLogger().addHandler(handler)
    async with open_layer(dsn, **options) as layer:
        channels = [await layer.new_channel() for _ in range(3)]
        own, kept, banned = channels
        await listen(layer)
        for channel in (kept, banned):
            await layer.group_add("room", channel)
        async with readers_of(layer, *channels) as readers:
            link.say(channels)
            while (last := await link.hear()) is not None:
                await readers.reached(last, own, kept, patience=20)
                link.say(last)
            stats = dict(layer.stats())
            found = Found(
                numbers=[readers.numbers[channel] for channel in channels],
                told=[readers.other[channel] for channel in channels],
                events=handler.events,
                expired_leases=int(str(stats.get("expired_leases", 0))),
                memberships=int(str(stats["memberships"])),
            )
    logging.getLogger().removeHandler(handler)
    return found


@contextlib.contextmanager
def stopped(process: Process[Found]) -> Iterator[None]:
    """The process is stopped while the block runs."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


async def lease_is_over(layer: PostgresChannelLayer, members: int) -> None:
    """Return when the stopped process no longer counts, so that "room" has so many members."""
    deadline = time.monotonic() + PATIENCE
    while await layer.group_count("room") != members:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def sweep(dsn: str) -> None:
    """Run the sweeper once."""
    succeeded(await asyncio.to_thread(manage, dsn, "pg_layer_sweep", "--once"))


async def start(
    processes: Processes, dsn: str, **options: object
) -> tuple[Process[Found], str, str, str]:
    """The process that a test stops, and its channels: one in no group, and two in "room"."""
    named = make_conninfo(dsn, application_name="stopped")
    process = processes.start(be_stopped, named, {**SHORT_LEASE, **TOLD, **options})
    own, kept, banned = await process.hear()
    return process, own, kept, banned


async def found_after(process: Process[Found], last: int) -> Found:
    """What it has found out when that number has arrived."""
    process.say(last)
    assert await process.hear() == last
    process.say(None)
    return await process.result()


# --------------------------------------------------------------- stopped for longer than the lease


@pytest.mark.parametrize("sweeps", [False, True], ids=["no sweep", "sweep"])
async def test_process_stopped_for_longer_than_its_lease_notices_the_gap_once(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, sweeps: bool
) -> None:
    """It logs one warning, counts the gap, and sends each consumer the two messages about it."""
    other = make_layer(**SHORT_LEASE)
    mine = await other.new_channel()
    await listen(other)
    await other.group_add("room", mine)
    process, own, kept, banned = await start(processes, migrated_dsn)
    assert await other.group_count("room") == 3
    await other.send(own, numbered(0))
    await other.group_send("room", numbered(0))
    process.say(0)
    assert await process.hear() == 0
    with stopped(process):
        await lease_is_over(other, members=1)
        if sweeps:
            await sweep(migrated_dsn)
    await lists(other, "room", mine, kept, banned)
    await other.send(own, numbered(1))
    await other.group_send("room", numbered(1))
    found = await found_after(process, 1)
    assert found.numbers == [[0, 1], [0, 1], [0, 1]]
    assert found.told == [["database.lost", "database.back"]] * 3
    assert found.events == [log_events.LEASE_EXPIRED]
    assert found.expired_leases == 1
    assert found.memberships == 2


@pytest.mark.parametrize(
    ("size", "options"),
    [(0, {}), (LARGE, {}), (0, {"poll_interval": 0.1})],
    ids=["small", "large", "polling"],
)
async def test_process_stopped_for_longer_than_its_lease_receives_what_has_not_expired(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    size: int,
    options: dict[str, object],
) -> None:
    """Nothing was swept. Messages were sent before and after its lease was over."""
    other = make_layer(**SHORT_LEASE)
    mine = await other.new_channel()
    await listen(other)
    await other.group_add("room", mine)
    process, own, *_ = await start(processes, migrated_dsn, **options)

    async def send(numbers: range) -> None:
        for number in numbers:
            await other.send(own, numbered(number, size))
            await other.group_send("room", numbered(number, size))

    await send(range(10))
    with stopped(process):
        await send(range(10, 20))
        await lease_is_over(other, members=1)
        await send(range(20, 30))
    await send(range(30, 40))
    found = await found_after(process, 39)
    assert found.numbers == [list(range(40))] * 3


@pytest.mark.parametrize(
    ("size", "options"),
    [(0, {}), (LARGE, {}), (0, {"poll_interval": 0.1})],
    ids=["small", "large", "polling"],
)
async def test_process_stopped_and_swept_receives_its_groups_messages_that_have_not_expired(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    size: int,
    options: dict[str, object],
) -> None:
    """Group messages were sent before its lease was over, afterwards, and after the sweep.

    Another process has a member, so that they were kept. Messages to channels of the stopped
    process itself may have been swept.
    """
    other = make_layer(**SHORT_LEASE)
    mine = await other.new_channel()
    await listen(other)
    await other.group_add("room", mine)
    process, own, *_ = await start(processes, migrated_dsn, **options)

    async def send(numbers: range) -> None:
        for number in numbers:
            await other.group_send("room", numbered(number, size))

    await send(range(10))
    with stopped(process):
        await send(range(10, 20))
        await lease_is_over(other, members=1)
        await send(range(20, 30))
        await sweep(migrated_dsn)
        await send(range(30, 40))
    await send(range(40, 50))
    await other.send(own, numbered(49))
    found = await found_after(process, 49)
    assert found.numbers == [[49], list(range(50)), list(range(50))]


async def test_only_reader_stopped_for_longer_than_its_lease_loses_nothing(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, processes: Processes
) -> None:
    """No other process renews, so the lease does not end: a sweep removes nothing."""
    sender = make_layer(**SHORT_LEASE)
    process, own, kept, banned = await start(processes, migrated_dsn)

    async def send(numbers: range) -> None:
        for number in numbers:
            await sender.send(own, numbered(number, LARGE))
            await sender.group_send("room", numbered(number, LARGE))

    await send(range(10))
    with stopped(process):
        await send(range(10, 20))
        over = (
            b"SELECT 1 FROM pg_layer_client WHERE expires_at < clock_timestamp() - interval '1 s'"
        )
        await until(lambda: observer.execute(over).fetchone())
        await sweep(migrated_dsn)
        await lists(sender, "room", kept, banned)
        await send(range(20, 30))
    await send(range(30, 40))
    found = await found_after(process, 39)
    assert found.numbers == [list(range(40))] * 3
    assert found.memberships == 2


async def test_process_stopped_for_less_than_its_lease_notices_no_gap(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """It receives everything, logs nothing and tells its consumers nothing."""
    other = make_layer(**SHORT_LEASE)
    mine = await other.new_channel()
    await listen(other)
    await other.group_add("room", mine)
    process, own, *_ = await start(processes, migrated_dsn, lease=3600)
    with stopped(process):
        for number in range(20):
            await other.send(own, numbered(number, LARGE))
            await other.group_send("room", numbered(number, LARGE))
        await sweep(migrated_dsn)
    found = await found_after(process, 19)
    assert found.numbers == [list(range(20))] * 3
    assert found.told == [[], [], []]
    assert found.events == []
    assert found.expired_leases == 0


# --------------------------------------------------------------- discarded while it was stopped


@pytest.mark.parametrize(
    "when", ["before the lease is over", "before the sweep", "after the sweep"]
)
@pytest.mark.parametrize("way", ["listening", "disconnected", "polling"])
async def test_channel_discarded_while_its_process_was_stopped_stays_discarded(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    processes: Processes,
    when: str,
    way: str,
) -> None:
    """Another process removes a channel of the stopped one from the group.

    Then the lease is over, and a sweep runs. When the process goes on, it writes its memberships
    again; the removed one is not among them. Its connections may have been lost meanwhile.
    """
    other = make_layer(**SHORT_LEASE)
    mine = await other.new_channel()
    await listen(other)
    await other.group_add("room", mine)
    options: dict[str, object] = {"poll_interval": 0.1} if way == "polling" else {}
    process, own, kept, banned = await start(processes, migrated_dsn, **options)
    await lists(other, "room", mine, kept, banned)
    with stopped(process):
        if way == "disconnected":
            observer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'stopped'"
            )
        if when == "before the lease is over":
            await other.group_discard("room", banned)
        await lease_is_over(other, members=1)
        if when == "before the sweep":
            await other.group_discard("room", banned)
        await sweep(migrated_dsn)
        if when == "after the sweep":
            await other.group_discard("room", banned)
        await other.group_send("room", numbered(0))
    deadline = time.monotonic() + PATIENCE
    while kept not in await other.group_channels("room"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    for number in range(1, 20):
        await other.group_send("room", numbered(number))
    for channel in (own, banned):
        await other.send(channel, numbered(19))
    process.say(19)
    assert await process.hear() == 19
    await lists(other, "room", mine, kept, patience=10)
    process.say(None)
    found = await process.result()
    assert found.numbers[2] == [19]
    assert [number for number in found.numbers[1] if number] == list(range(1, 20))
    assert found.memberships == 1
