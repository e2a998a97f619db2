"""Normal channels with competing readers, and the end of a process: closed, exited or killed."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import msgpack  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import (
    TIMEOUT,
    Link,
    Process,
    Processes,
    listen,
    open_layer,
    receive,
    until,
    write,
)


def count_rows(observer: Observer, table: str, condition: str = "true") -> int:
    row = observer.execute(
        f"SELECT count(*) FROM pg_layer_{table} WHERE {condition}".encode()
    ).fetchone()
    assert row is not None
    return int(row[0])


def count_leases(observer: Observer) -> int:
    return count_rows(observer, "client", "expires_at > clock_timestamp()")


def new_jobs(numbers: Iterable[int]) -> list[dict[str, object]]:
    return [{"number": n, "blob": bytes(random.choice((10, 10, 10, 6000)))} for n in numbers]


async def work(link: Link, dsn: str, receivers: int, seconds: float) -> None:
    """Report the number of each job, until the test sends an object. Runs in a process.

    A job takes up to ``seconds``.
    """
    async with open_layer(dsn) as layer:

        async def work_on() -> None:
            while True:
                number = (await layer.receive("jobs"))["number"]
                link.say(number)
                if seconds:
                    await asyncio.sleep(random.random() * seconds)

        await listen(layer)
        link.say("ready")
        tasks = [asyncio.create_task(work_on()) for _ in range(receivers)]
        await link.hear()
        for task in tasks:
            task.cancel()


async def all_ready(workers: Iterable[Process[None]]) -> None:
    for worker in workers:
        assert await worker.hear() == "ready"


async def collect_numbers(worker: Process[None], found: list[int]) -> None:
    """Append each number that the worker reports to ``found``."""
    while True:
        found.append(await worker.hear())


async def collect_all_jobs(workers: list[Process[None]], sent: int) -> list[int]:
    """Return the numbers that the workers report.

    That is: until all jobs are done, and for 0.3 s more, to see a job that is done twice.
    """
    found: list[int] = []
    tasks = [asyncio.create_task(collect_numbers(worker, found)) for worker in workers]
    with suppress(TimeoutError):
        await until(lambda: len(set(found)) >= sent or any(task.done() for task in tasks))
    await asyncio.wait(tasks, timeout=0.3)
    for task in tasks:
        task.cancel()
    return found


# ---------------------------------------------------------------------- competing


@pytest.mark.parametrize(
    ("receivers", "seconds"), [(1, 0.0), (4, 0.0), (2, 0.02)], ids=["quick", "many at once", "slow"]
)
async def test_three_workers_receive_each_job_once(
    migrated_dsn: str, processes: Processes, receivers: int, seconds: float
) -> None:
    workers = [processes.start(work, migrated_dsn, receivers, seconds) for _ in range(3)]
    await all_ready(workers)
    writers = [
        processes.start(
            write, migrated_dsn, "jobs", new_jobs(range(start, start + 200)), capacity=1000
        )
        for start in (0, 200)
    ]
    found = await collect_all_jobs(workers, 400)
    for writer in writers:
        await writer.result()
    assert Counter(found) == Counter(range(400))


@pytest.mark.parametrize("listens", ["listening", "later"])
async def test_single_reader_receives_jobs_in_order(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, listens: str
) -> None:
    layer = make_layer(capacity=1000)
    if listens == "later":
        for job in new_jobs(range(100)):
            await layer.send("jobs", job)
    worker = processes.start(work, migrated_dsn, 1, 0.002)
    await all_ready([worker])
    for job in new_jobs(range(100, 300) if listens == "later" else range(300)):
        await layer.send("jobs", job)
    assert [await worker.hear() for _ in range(300)] == list(range(300))


async def test_readers_of_several_normal_channels_in_one_process_receive_their_jobs(
    make_layer: MakeLayer,
) -> None:
    layer, sender = make_layer(), make_layer()
    names = [f"jobs-{n}" for n in range(20)]
    receivers = [asyncio.create_task(receive(layer, name)) for name in names]
    for name in names:
        await sender.send(name, {"for": name})
    assert await asyncio.gather(*receivers) == [{"for": name} for name in names]


# ---------------------------------------------------------------------- claimed and not received


async def work_with_cancellations(link: Link, dsn: str) -> None:
    """Report the number of each job, and cancel most receives at some moment.

    Runs in a process, which at the end receives no more, but stays alive.
    """
    async with open_layer(dsn) as layer:

        async def work_on() -> None:
            for _ in range(100):
                task = asyncio.create_task(layer.receive("jobs"))
                for _ in range(random.choice((0, 1, 2, 3, 5, 8))):
                    await asyncio.sleep(0)
                if random.random() < 0.5:
                    await asyncio.wait({task}, timeout=random.random() * 0.01)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    link.say((await task)["number"])

        await listen(layer)
        link.say("ready")
        await asyncio.gather(*(work_on() for _ in range(3)))
        await link.hear()


async def test_jobs_claimed_for_cancelled_receives_go_to_another_worker(
    migrated_dsn: str, processes: Processes
) -> None:
    unsteady = [processes.start(work_with_cancellations, migrated_dsn) for _ in range(2)]
    steady = processes.start(work, migrated_dsn, 1, 0.005)
    await all_ready([*unsteady, steady])
    writer = processes.start(write, migrated_dsn, "jobs", new_jobs(range(400)), capacity=1000)
    found = await collect_all_jobs([*unsteady, steady], 400)
    await writer.result()
    assert Counter(found) == Counter(range(400))


async def test_jobs_claimed_and_released_many_times_keep_their_order(
    make_layer: MakeLayer,
) -> None:
    # Try all moments around a release: many channels at once, each with a single reader.
    layer, sender = make_layer(), make_layer()
    await listen(layer)

    async def use(name: str) -> list[int]:
        found = []
        for number in range(10):
            task = asyncio.create_task(layer.receive(name))
            await asyncio.sleep(random.random() * 0.01)
            sending = asyncio.create_task(sender.send(name, {"number": number}))
            await asyncio.wait({task}, timeout=random.random() * 0.01)
            task.cancel()
            with suppress(asyncio.CancelledError):
                found.append((await task)["number"])
            await sending
            await asyncio.sleep(random.choice((0, 0.05)) + random.random() * 0.01)
        while len(found) < 10:
            found.append((await receive(layer, name))["number"])
        return found

    for found in await asyncio.gather(*(use(f"jobs-{n}") for n in range(40))):
        assert found == list(range(10))


async def test_job_claimed_without_an_answer_is_released_after_a_reconnect(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    first = make_layer(dsn=make_conninfo(migrated_dsn, application_name="first"))
    second, sender = make_layer(), make_layer()
    channel = await first.new_channel()
    await sender.send("jobs", {"number": 0})
    assert await receive(first, "jobs") == {"number": 0}
    # Put the next job where a claim moves it if the connection breaks before the answer: at the
    # address of the first worker, which does not expect it.
    await sender.send("jobs", {"number": 1})
    observer.execute(
        "UPDATE pg_layer_message"
        " SET address = pg_layer_address('asgi', %s), xid = pg_current_xact_id()"
        " WHERE address = 'asgi!:jobs'",
        (channel,),
    )
    observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'first'"
    )
    assert await receive(second, "jobs") == {"number": 1}


# ---------------------------------------------------------------------- closed or exited


async def work_and_close(link: Link, dsn: str, rounds: int) -> None:
    """Open a layer, work for a moment and close it, many times. Runs in a process."""
    for _ in range(rounds):
        async with open_layer(dsn) as layer:

            async def work_on(layer: PostgresChannelLayer = layer) -> None:
                while True:
                    link.say((await layer.receive("jobs"))["number"])

            tasks = [asyncio.create_task(work_on()) for _ in range(3)]
            await asyncio.sleep(random.random() * 0.06)
            for task in tasks:
                task.cancel()
            if random.random() < 0.5:
                await asyncio.sleep(random.random() * 0.06)
    link.say("ready")
    await link.hear()


async def test_close_at_any_moment_releases_claimed_jobs(
    migrated_dsn: str, processes: Processes
) -> None:
    unsteady = processes.start(work_and_close, migrated_dsn, 40)
    writer = processes.start(write, migrated_dsn, "jobs", new_jobs(range(1000)), capacity=2000)
    found: list[int] = []
    while (said := await unsteady.hear()) != "ready":
        found.append(said)
    steady = processes.start(work, migrated_dsn, 1, 0.0)
    await all_ready([steady])
    found += await collect_all_jobs([steady], 1000 - len(set(found)))
    await writer.result()
    assert Counter(found) == Counter(range(1000))


async def test_close_removes_own_memberships_and_unread_messages(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    await layer.group_add("room", channel)
    await other.group_add("room", await other.new_channel())
    await layer.group_add("room", "jobs")
    await layer.send(channel, {"type": "unread"})
    await layer.close()
    assert count_leases(observer) == 1
    # What remains: the member of the other process, and the normal channel, which has no owner.
    assert count_rows(observer, "membership") == 2
    assert count_rows(observer, "message") == 0
    await other.group_send("room", {"type": "x"})
    assert count_rows(observer, "message", "address IN ('asgi!@room', 'asgi!:jobs')") == 2
    await layer.close()
    assert count_leases(observer) == 1


@pytest.mark.parametrize("ending", ["close", "exit"])
async def test_close_while_a_transaction_changes_its_memberships_does_not_wait(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, ending: str
) -> None:
    """The client releases its jobs and removes its rows, at ``close()`` and at exit.

    The membership requests of the transaction, which commits later, do not count.
    """
    layer = make_layer()
    held, free = [await layer.new_channel() for _ in range(2)]
    await listen(layer)
    for channel in (held, free):
        await layer.group_add("room", channel)
    with psycopg.connect(migrated_dsn) as other:
        # What layer.sync executes in a transaction that is still open.
        other.execute(
            "SELECT pg_layer_request_memberships('asgi', ARRAY['room', 'room'], ARRAY[%s, %s],"
            " ARRAY[false, true], NULL, ARRAY[100, 100], 30, false, true)",
            [held, free],
        )
        for _ in range(3):
            await layer.send("jobs", {"type": "work"})
        claimed = (
            "UPDATE pg_layer_message SET address = pg_layer_address('asgi', %s)"
            " WHERE channel = 'jobs'"
        )
        observer.execute(claimed.encode(), [held])
        if ending == "close":
            await layer.close()
        else:
            layer._loops.close_at_exit()
        assert count_rows(observer, "message", "address = 'asgi!:jobs'") == 3
        assert count_leases(observer) == 0
        assert count_rows(observer, "membership") == 0
    # The transaction has committed: its membership requests are about a closed client.
    assert await make_layer().group_count("room") == 0


async def test_close_removes_memberships_added_by_other_processes(
    make_layer: MakeLayer, observer: Observer
) -> None:
    # The layer polls rarely: it has not read the control message yet when it closes.
    layer, other = make_layer(poll_interval=3600), make_layer()
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await until(lambda: count_leases(observer))
    await other.group_add("room", channel)
    receiving.cancel()
    assert await other.group_channels("room") == [channel]
    await layer.close()
    assert await other.group_channels("room") == []
    assert count_rows(observer, "membership") == count_rows(observer, "message") == 0


async def test_messages_to_a_closed_client_are_accepted_and_expire(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    await layer.close()
    await sender.send(channel, {"type": "late"}, expiry=0.1)
    await asyncio.gather(*(sender.send(channel, {"type": "late"}, expiry=0.1) for _ in range(10)))
    # The heartbeat of any process deletes them.
    await listen(make_layer(heartbeat=0.1, sweep_interval=0))
    await until(lambda: count_rows(observer, "message") == 0)


async def test_layer_closed_can_be_used_again(make_layer: MakeLayer) -> None:
    layer = make_layer()
    for number in range(3):
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.send(channel, {"number": number})
        assert await receive(layer, channel) == {"number": number}
        await layer.group_send("room", {"number": -number})
        assert await receive(layer, channel) == {"number": -number}
        await layer.close()
        with pytest.raises(TypeError):
            await layer.receive(channel)


ENDS_NORMALLY = """
import asyncio, sys
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1])

async def main():
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.send(channel, {})
    await layer.receive(channel)
    receivers = [asyncio.create_task(layer.receive("jobs")) for _ in range(4)]
    await asyncio.wait(receivers, return_when=asyncio.FIRST_COMPLETED)
    for receiver in receivers:
        if receiver.done():
            print(receiver.result()["number"])
    if sys.argv[2] == "exit":
        sys.exit(3)

asyncio.run(main())
"""


@pytest.mark.parametrize("ending", ["return", "exit"])
async def test_process_ending_without_close_releases_jobs_and_removes_its_rows(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, ending: str
) -> None:
    layer = make_layer()
    for number in range(5):
        await layer.send("jobs", {"number": number})
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-X", "dev", "-c", ENDS_NORMALLY, migrated_dsn, ending],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.returncode == (3 if ending == "exit" else 0)
    assert not re.search("Traceback|Warning|never retrieved|was destroyed", ended.stderr)
    assert count_leases(observer) == 0
    assert count_rows(observer, "membership") == 0
    done = [int(line) for line in ended.stdout.split()]
    rest = [(await receive(layer, "jobs"))["number"] for _ in range(5 - len(done))]
    assert sorted(done + rest) == list(range(5))


# ---------------------------------------------------------------------- kill -9


async def test_jobs_not_claimed_by_a_killed_worker_go_to_another(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    killed, survivor = (processes.start(work, migrated_dsn, 1, 0.0) for _ in range(2))
    await all_ready([killed, survivor])
    [[killed_address]] = observer.execute(
        "SELECT address FROM pg_layer_client WHERE pid = %s", (killed.pid,)
    ).fetchall()
    writer = processes.start(write, migrated_dsn, "jobs", new_jobs(range(500)), capacity=1000)
    found: list[int] = []
    while len(found) < 50:
        found.append(await killed.hear())
    killed.kill()
    with suppress(Exception):
        while True:
            found.append(await killed.hear())
    await writer.result()
    await until(lambda: count_rows(observer, "message", "address = 'asgi!:jobs'") == 0)
    claimed_numbers = {
        msgpack.unpackb(payload)["number"]
        for (payload,) in observer.execute(
            "SELECT payload FROM pg_layer_message WHERE address = %s AND channel = 'jobs'",
            (killed_address,),
        )
    }
    others = set(range(500)) - set(found) - claimed_numbers
    rest = await collect_all_jobs([survivor], len(others))
    assert not [number for number, times in Counter(found + rest).items() if times > 1]
    # The worker may have received one job and been killed before it reported it.
    assert len(others - set(rest)) <= 1


async def join_and_stay(link: Link, /, dsn: str, **options: object) -> None:
    """Join a group, and stay until the test sends an object. Runs in a process."""
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", channel)
        link.say(channel)
        await link.hear()


@pytest.mark.parametrize("group_expiry", [86400, None])
async def test_members_of_a_killed_process_are_not_counted_after_its_lease_and_are_swept(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    group_expiry: float | None,
) -> None:
    layer = make_layer(group_expiry=group_expiry)
    killed = processes.start(
        join_and_stay, migrated_dsn, lease=2, heartbeat=0.4, group_expiry=group_expiry
    )
    living = processes.start(
        join_and_stay, migrated_dsn, lease=2, heartbeat=0.4, group_expiry=group_expiry
    )
    channel, other = await killed.hear(), await living.hear()
    assert sorted(await layer.group_channels("room")) == sorted([channel, other])
    killed.kill()
    await layer.send(channel, {"number": 0})
    [[address]] = observer.execute(
        "SELECT address FROM pg_layer_message WHERE channel = %s", (channel,)
    ).fetchall()
    await until(lambda: count_rows(observer, "client", "expires_at <= clock_timestamp()") == 1)
    # The lease is over when the living process has renewed its own for a whole lease.
    deadline = time.monotonic() + TIMEOUT
    while (members := await layer.group_channels("room")) != [other]:
        assert sorted(members) == sorted([channel, other])
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)

    # Messages to its channels are still written, and expire.
    condition = f"address = '{address}'"
    await layer.send(channel, {"number": 1})
    assert count_rows(observer, "message", f"channel = '{channel}'") == 2
    assert count_rows(observer, "membership", condition) == 1

    # The living process keeps its lease, and a sweep does not touch it. Messages stay until they
    # expire: a process that was only stopped would receive them.
    observer.execute("SELECT pg_layer_sweep('asgi', 1000, false, 0)")
    assert count_rows(observer, "message", f"channel = '{channel}'") == 2
    assert count_rows(observer, "membership", condition) == 0
    assert count_rows(observer, "client", f"{condition} AND swept_at IS NOT NULL") == 1
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == [(other,)]
    await layer.group_send("room", {"number": 5})
    assert await layer.group_count("room") == 1


async def test_client_swept_after_its_lease_expired_writes_its_memberships_again(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    layer, sender = make_layer(lease=20, heartbeat=1), make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    with psycopg.connect(migrated_dsn) as connection:  # one transaction: no heartbeat comes between
        connection.execute(
            "UPDATE pg_layer_client SET expires_at = clock_timestamp() - interval '1 second'"
        )
        connection.execute(
            "UPDATE pg_layer_lease_clock SET steady_since = steady_since - interval '1 day'"
        )
        connection.execute("SELECT pg_layer_sweep('asgi', 1000, false, 0)")
        assert connection.execute("SELECT FROM pg_layer_membership").rowcount == 0
    await sender.group_send("room", {"number": 0})
    await until(
        lambda: count_rows(
            observer, "client", "expires_at > clock_timestamp() AND swept_at IS NULL"
        )
    )
    await until(lambda: count_rows(observer, "membership") == 1)
    assert layer.stats()["expired_leases"] == 1
    await sender.group_send("room", {"number": 1})
    # The first one was sent when the table had no members.
    assert (await receive(layer, channel))["number"] == 1
