"""``manage.py runworker thumbnails``: Channels' worker processes, started as in production."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import until
from tests.project.commands import Process, started


@pytest.fixture
def jobs(observer: Observer) -> Callable[[], dict[int, int]]:
    """Return a function: the jobs done so far, and by which process. No job is done twice."""
    observer.execute("CREATE TABLE job (number integer, pid integer)")

    def done() -> dict[int, int]:
        rows = observer.execute("SELECT number, pid FROM job").fetchall()
        assert len({number for number, _ in rows}) == len(rows), "a job was done twice"
        return dict(rows)

    return done


@pytest.fixture
def start_worker(migrated_dsn: str) -> Iterator[Callable[[], Process]]:
    """Yield a function that starts a worker process."""
    with ExitStack() as stack:

        def start() -> Process:
            return stack.enter_context(
                started(
                    migrated_dsn,
                    # Channels' own way to run a SyncConsumer in a worker causes this warning.
                    *(
                        "-W",
                        "ignore:async_to_sync was passed a non-async-marked callable:UserWarning",
                    ),
                    *("-m", "tests.project.manage", "runworker", "thumbnails"),
                )
            )

        yield start


def receiving_pids(observer: Observer) -> set[int]:
    """Return the process ids that have a lease."""
    rows = observer.execute("SELECT pid FROM pg_layer_client WHERE expires_at > clock_timestamp()")
    return {pid for (pid,) in rows}


async def send_jobs(layer: PostgresChannelLayer, numbers: range) -> None:
    await asyncio.gather(
        *(
            layer.send("thumbnails", {"type": "thumbnails.make", "number": number})
            for number in numbers
        )
    )


async def test_two_workers_share_the_jobs(
    make_layer: MakeLayer,
    start_worker: Callable[[], Process],
    jobs: Callable[[], dict[int, int]],
    observer: Observer,
) -> None:
    layer = make_layer(capacity=10_000)
    workers = [start_worker(), start_worker()]
    pids = {worker.pid for worker in workers}
    await until(lambda: receiving_pids(observer) == pids)
    sent = range(0)
    for turn in count():
        batch = range(100 * turn, 100 * (turn + 1))
        await send_jobs(layer, batch)
        sent = range(batch.stop)
        await until(lambda sent=sent: len(jobs()) == len(sent))  # type: ignore[misc]
        if set(jobs().values()) == pids:
            break
    assert sorted(jobs()) == list(sent)
    for worker in workers:
        worker.end(signal.SIGTERM)
        assert worker.errors == []


async def test_jobs_sent_before_a_worker_starts_are_done(
    make_layer: MakeLayer,
    start_worker: Callable[[], Process],
    jobs: Callable[[], dict[int, int]],
) -> None:
    layer = make_layer()
    await send_jobs(layer, range(30))
    worker = start_worker()
    await until(lambda: len(jobs()) == 30)
    assert jobs() == dict.fromkeys(range(30), worker.pid)


async def test_sigint_ends_a_worker_without_errors_and_without_lost_jobs(
    make_layer: MakeLayer,
    start_worker: Callable[[], Process],
    jobs: Callable[[], dict[int, int]],
    observer: Observer,
) -> None:
    layer = make_layer()
    worker = start_worker()
    await send_jobs(layer, range(10))
    await until(lambda: len(jobs()) == 10)
    assert receiving_pids(observer) == {worker.pid}
    assert worker.end(signal.SIGINT) == 0
    assert worker.errors == []
    assert not receiving_pids(observer)
    # Later jobs are for the next worker.
    await send_jobs(layer, range(10, 20))
    successor = start_worker()
    await until(lambda: len(jobs()) == 20)
    assert {number for number, pid in jobs().items() if pid == successor.pid} == set(range(10, 20))


async def test_sigterm_ends_a_worker_and_its_jobs_go_to_the_other_worker(
    make_layer: MakeLayer,
    start_worker: Callable[[], Process],
    jobs: Callable[[], dict[int, int]],
    observer: Observer,
) -> None:
    layer = make_layer()
    first, second = start_worker(), start_worker()
    await until(lambda: receiving_pids(observer) == {first.pid, second.pid})
    await send_jobs(layer, range(50))
    await until(lambda: len(jobs()) == 50)
    # Channels' worker has no handler of SIGTERM: the signal has its default effect.
    assert first.end(signal.SIGTERM) == -signal.SIGTERM
    await send_jobs(layer, range(50, 100))
    await until(lambda: len(jobs()) == 100)
    assert {jobs()[number] for number in range(50, 100)} == {second.pid}
