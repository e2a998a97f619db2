"""``python -m benchmarks.old_snapshot``: the cost of a transaction that is held open.

PostgreSQL cannot remove a dead row that the oldest snapshot may still see. Rows of messages are
deleted soon, so one forgotten transaction keeps all of them. Many messages go through one inbox,
without and with such a transaction in turn. Paced messages follow, for the latency. The sizes of
table and index are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psycopg

from benchmarks.layers import CAPACITY, configure_django
from benchmarks.servers import postgres_server

CHANNELS = 100
PACED, RATE = 1000, 200
SIZES = """
    SELECT pg_table_size('pg_layer_message') / 1e6, pg_indexes_size('pg_layer_message') / 1e6
"""


def receive(pipe: Connection, dsn: str) -> None:
    """Read one inbox: count the messages of each run, report the last time and the ages."""
    asyncio.run(_receive(pipe, dsn))


async def _receive(pipe: Connection, dsn: str) -> None:
    from pg_layer import PostgresChannelLayer

    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY)
    channels = [await layer.new_channel() for _ in range(CHANNELS)]
    count, ages, wanted = 0, [], 0
    done = asyncio.Event()

    async def read(channel: str) -> None:
        nonlocal count
        while True:
            message = await layer.receive(channel)
            count += 1
            ages.append(time.monotonic_ns() - message["t"])
            if count == wanted:
                done.set()

    readers = [asyncio.create_task(read(channel)) for channel in channels]
    pipe.send(channels)
    while wanted := await asyncio.to_thread(pipe.recv):
        count, ages = 0, []
        done.clear()
        pipe.send("ready")
        await done.wait()
        pipe.send((time.monotonic(), statistics.median(ages) / 1e6))
    for reader in readers:
        reader.cancel()
    await layer.close()


async def _flood(layer: Any, channels: list[str], messages: int) -> None:
    async def send(channel: str) -> None:
        for _ in range(messages // CHANNELS):
            await layer.send(channel, {"type": "x", "t": time.monotonic_ns(), "p": "x" * 60})

    await asyncio.gather(*map(send, channels))


async def _pace(layer: Any, channels: list[str], messages: int) -> None:
    due = time.monotonic()
    for _ in range(messages):
        await layer.send(channels[0], {"type": "x", "t": time.monotonic_ns(), "p": "x" * 60})
        due += 1 / RATE
        await asyncio.sleep(max(0.0, due - time.monotonic()))


@contextmanager
def held_snapshot(dsn: str) -> Iterator[None]:
    """A transaction that has taken a snapshot and stays open."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_layer_client")
        yield


async def measure(
    dsn: str, pipe: Connection, channels: list[str], messages: int
) -> tuple[float, float]:
    """Return messages a second, and the median latency of paced messages in ms."""
    from pg_layer import PostgresChannelLayer

    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY)
    found = []
    for work, count in ((_flood, messages), (_pace, PACED)):
        pipe.send(count)
        pipe.recv()
        start = time.monotonic()
        await work(layer, channels, count)
        end, latency = pipe.recv()
        found.append((count / (end - start), latency))
    await layer.close()
    return found[0][0], found[1][1]


def main() -> None:
    """Print a line for each run and the ratios of the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.old_snapshot", description=__doc__)
    parser.add_argument(
        "--messages", type=int, default=1_000_000, help="through one inbox in each run"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dsn", help="use this PostgreSQL server")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {"free": [], "under an old snapshot": []}
    with postgres_server(options.dsn) as dsn:
        configure_django(dsn)
        here, there = multiprocessing.get_context("spawn").Pipe()
        reader = multiprocessing.get_context("spawn").Process(
            target=receive, args=(there, dsn), daemon=True
        )
        reader.start()
        channels = here.recv()
        with psycopg.connect(dsn, autocommit=True) as observer:
            for _ in range(options.rounds):
                for name, runs in results.items():
                    if name == "free":
                        runs.append(asyncio.run(measure(dsn, here, channels, options.messages)))
                    else:
                        with held_snapshot(dsn):
                            runs.append(asyncio.run(measure(dsn, here, channels, options.messages)))
                    speed, latency = runs[-1]
                    table, index = observer.execute(SIZES).fetchone() or (0, 0)
                    print(
                        f"{name:22} {speed:9,.0f} msg/s  p50 {latency:.2f} ms"
                        f"  table {table:.0f} MB, index {index:.0f} MB",
                        flush=True,
                    )
        here.send(0)
        reader.join(10)
    (free, held) = results.values()
    speeds = [statistics.median(speed for speed, _ in runs) for runs in (free, held)]
    latencies = [statistics.median(latency for _, latency in runs) for runs in (free, held)]
    print(
        f"throughput under it: {speeds[1] / speeds[0]:.0%};"
        f" latency p50: {latencies[1] / latencies[0]:.2f}x"
    )


if __name__ == "__main__":
    main()
