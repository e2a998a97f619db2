"""A process is stopped for longer than its lease, by SIGSTOP or a hypervisor, and continues.

Other processes renew their leases meanwhile. So the lease of the stopped process is over,
and a sweep removes its rows.
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
from tests.faults.readers import numbered, readers_of, wait_for_members
from tests.logs import event_of
from tests.processes import TIMEOUT, Link, Process, Processes, listen, open_layer, until
from tests.project.commands import manage, succeeded

pytestmark = pytest.mark.slow

LEASE = 3.0
# No process sweeps by itself.
SHORT_LEASE: dict[str, object] = {
    "lease": LEASE,
    "heartbeat": 0.5,
    "sweep_interval": 0,
    "expiry": 3600,
    "capacity": 1000,
}
NOTICES: dict[str, object] = {"on_disconnect": "database.lost", "on_reconnect": "database.back"}
LARGE = 20_000  # bytes; more than a notification can carry


class Report(NamedTuple):
    """The observations of the process. Lists have an item for each channel."""

    numbers: list[list[int]]
    notices: list[list[str]]
    events: list[str | None]
    expired_leases: int
    memberships: int


class WarningCollector(logging.Handler):
    """A handler that collects the events of the warnings that the layer logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.events: list[str | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("pg_layer"):
            self.events.append(event_of(record))


async def read_and_report(link: Link, dsn: str, options: dict[str, object]) -> Report:
    """Read three channels, two of them in "room", and report the observations.

    The test sends the last number to wait for. Runs in a process.
    """
    handler = WarningCollector()
    logging.getLogger().addHandler(handler)
    async with open_layer(dsn, **options) as layer:
        channels = [await layer.new_channel() for _ in range(3)]
        own, kept, removed = channels
        await listen(layer)
        for channel in (kept, removed):
            await layer.group_add("room", channel)
        async with readers_of(layer, *channels) as readers:
            link.say(channels)
            while (last := await link.hear()) is not None:
                await readers.reached(last, own, kept, timeout=20)
                link.say(last)
            stats = dict(layer.stats())
            report = Report(
                numbers=[readers.numbers[channel] for channel in channels],
                notices=[readers.other[channel] for channel in channels],
                events=handler.events,
                expired_leases=int(str(stats.get("expired_leases", 0))),
                memberships=int(str(stats["memberships"])),
            )
    logging.getLogger().removeHandler(handler)
    return report


@contextlib.contextmanager
def stopped(process: Process[Report]) -> Iterator[None]:
    """Keep the process stopped while the block runs."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


async def lease_is_over(layer: PostgresChannelLayer, members: int) -> None:
    """Return when the stopped process is not counted: "room" has ``members`` members."""
    deadline = time.monotonic() + TIMEOUT
    while await layer.group_count("room") != members:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def sweep(dsn: str) -> None:
    """Run the sweeper once."""
    succeeded(await asyncio.to_thread(manage, dsn, "pg_layer_sweep", "--once"))


async def start_process(
    processes: Processes, dsn: str, **options: object
) -> tuple[Process[Report], str, str, str]:
    """Start the process that a test stops.

    Return its channels: one in no group, and two in "room".
    """
    named = make_conninfo(dsn, application_name="stopped")
    process = processes.start(read_and_report, named, {**SHORT_LEASE, **NOTICES, **options})
    own, kept, removed = await process.hear()
    return process, own, kept, removed


async def report_after(process: Process[Report], last: int) -> Report:
    """Return the report of the process after the number ``last`` has arrived."""
    process.say(last)
    assert await process.hear() == last
    process.say(None)
    return await process.result()


# --------------------------------------------------------------- stopped for longer than the lease


@pytest.mark.parametrize("sweeps", [False, True], ids=["no sweep", "sweep"])
async def test_process_stopped_longer_than_its_lease_notices_the_gap_once(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, sweeps: bool
) -> None:
    """It logs one warning, counts the gap, and sends each consumer the two notices."""
    other = make_layer(**SHORT_LEASE)
    other_member = await other.new_channel()
    await listen(other)
    await other.group_add("room", other_member)
    process, own, kept, removed = await start_process(processes, migrated_dsn)
    assert await other.group_count("room") == 3
    await other.send(own, numbered(0))
    await other.group_send("room", numbered(0))
    process.say(0)
    assert await process.hear() == 0
    with stopped(process):
        await lease_is_over(other, members=1)
        if sweeps:
            await sweep(migrated_dsn)
    await wait_for_members(other, "room", other_member, kept, removed)
    await other.send(own, numbered(1))
    await other.group_send("room", numbered(1))
    report = await report_after(process, 1)
    assert report.numbers == [[0, 1], [0, 1], [0, 1]]
    assert report.notices == [["database.lost", "database.back"]] * 3
    assert report.events == [log_events.LEASE_EXPIRED]
    assert report.expired_leases == 1
    assert report.memberships == 2


@pytest.mark.parametrize(
    ("size", "options"),
    [(0, {}), (LARGE, {}), (0, {"poll_interval": 0.1})],
    ids=["small", "large", "polling"],
)
async def test_process_stopped_longer_than_its_lease_receives_unexpired_messages(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    size: int,
    options: dict[str, object],
) -> None:
    """Messages were sent before and after its lease was over. No sweep has run."""
    other = make_layer(**SHORT_LEASE)
    other_member = await other.new_channel()
    await listen(other)
    await other.group_add("room", other_member)
    process, own, *_ = await start_process(processes, migrated_dsn, **options)

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
    report = await report_after(process, 39)
    assert report.numbers == [list(range(40))] * 3


@pytest.mark.parametrize(
    ("size", "options"),
    [(0, {}), (LARGE, {}), (0, {"poll_interval": 0.1})],
    ids=["small", "large", "polling"],
)
async def test_process_stopped_and_swept_receives_unexpired_group_messages(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    size: int,
    options: dict[str, object],
) -> None:
    """Group messages were sent before its lease was over, afterwards, and after the sweep.

    Another process has a member, so that they were stored. Messages to channels of the stopped
    process itself may have been swept.
    """
    other = make_layer(**SHORT_LEASE)
    other_member = await other.new_channel()
    await listen(other)
    await other.group_add("room", other_member)
    process, own, *_ = await start_process(processes, migrated_dsn, **options)

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
    report = await report_after(process, 49)
    assert report.numbers == [[49], list(range(50)), list(range(50))]


async def test_only_reader_stopped_longer_than_its_lease_loses_nothing(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, processes: Processes
) -> None:
    """No other process renews, so the lease is not over. A sweep removes nothing."""
    sender = make_layer(**SHORT_LEASE)
    process, own, kept, removed = await start_process(processes, migrated_dsn)

    async def send(numbers: range) -> None:
        for number in numbers:
            await sender.send(own, numbered(number, LARGE))
            await sender.group_send("room", numbered(number, LARGE))

    await send(range(10))
    with stopped(process):
        await send(range(10, 20))
        expired_lease = (
            b"SELECT 1 FROM pg_layer_client WHERE expires_at < clock_timestamp() - interval '1 s'"
        )
        await until(lambda: observer.execute(expired_lease).fetchone())
        await sweep(migrated_dsn)
        await wait_for_members(sender, "room", kept, removed)
        await send(range(20, 30))
    await send(range(30, 40))
    report = await report_after(process, 39)
    assert report.numbers == [list(range(40))] * 3
    assert report.memberships == 2


async def test_process_stopped_shorter_than_its_lease_notices_no_gap(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """It receives everything, logs nothing and sends its consumers no notices."""
    other = make_layer(**SHORT_LEASE)
    other_member = await other.new_channel()
    await listen(other)
    await other.group_add("room", other_member)
    process, own, *_ = await start_process(processes, migrated_dsn, lease=3600)
    with stopped(process):
        for number in range(20):
            await other.send(own, numbered(number, LARGE))
            await other.group_send("room", numbered(number, LARGE))
        await sweep(migrated_dsn)
    report = await report_after(process, 19)
    assert report.numbers == [list(range(20))] * 3
    assert report.notices == [[], [], []]
    assert report.events == []
    assert report.expired_leases == 0


# --------------------------------------------------------------- discarded while it was stopped


@pytest.mark.parametrize(
    "when", ["before the lease is over", "before the sweep", "after the sweep"]
)
@pytest.mark.parametrize("mode", ["listening", "disconnected", "polling"])
async def test_channel_discarded_while_its_process_was_stopped_stays_discarded(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    processes: Processes,
    when: str,
    mode: str,
) -> None:
    """Another process removes a channel of the stopped process from the group.

    Then the lease is over, and a sweep runs. When the process continues, it writes its memberships
    again, without the removed one. Its connections may have been lost meanwhile.
    """
    other = make_layer(**SHORT_LEASE)
    other_member = await other.new_channel()
    await listen(other)
    await other.group_add("room", other_member)
    options: dict[str, object] = {"poll_interval": 0.1} if mode == "polling" else {}
    process, own, kept, removed = await start_process(processes, migrated_dsn, **options)
    await wait_for_members(other, "room", other_member, kept, removed)
    with stopped(process):
        if mode == "disconnected":
            observer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'stopped'"
            )
        if when == "before the lease is over":
            await other.group_discard("room", removed)
        await lease_is_over(other, members=1)
        if when == "before the sweep":
            await other.group_discard("room", removed)
        await sweep(migrated_dsn)
        if when == "after the sweep":
            await other.group_discard("room", removed)
        await other.group_send("room", numbered(0))
    deadline = time.monotonic() + TIMEOUT
    while kept not in await other.group_channels("room"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    for number in range(1, 20):
        await other.group_send("room", numbered(number))
    # The process waits for the message to `own`, which is dispatched last.
    for channel in (removed, own):
        await other.send(channel, numbered(19))
    process.say(19)
    assert await process.hear() == 19
    await wait_for_members(other, "room", other_member, kept, timeout=10)
    process.say(None)
    report = await process.result()
    assert report.numbers[2] == [19]
    assert [number for number in report.numbers[1] if number] == list(range(1, 20))
    assert report.memberships == 1
