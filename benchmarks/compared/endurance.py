"""5,000 messages a second for minutes: growth of the table and of the latency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from multiprocessing.connection import Connection

import psycopg

from benchmarks.compared.base import Reading, Result, Room, Setting, percentiles
from benchmarks.compared.children import CAPACITY, GROUP, Children, message
from benchmarks.statistics import percentile
from pg_layer import PostgresChannelLayer

RATE = 5_000
_TICK = 0.01
#: One message of so many contains the time.
_TIMED = 10
_INTERVALS = 20


def endurance(setting: Setting, *, held: bool) -> Result:
    """Send half of the messages to a group with two members and half to two channels.

    ``held``: beside an open transaction, because of which autovacuum cannot remove rows.
    """
    series: list[dict[str, float]] = []
    intervals: list[list[float]] = []
    with (
        Children() as children,
        psycopg.connect(setting.dsn, autocommit=True) as observer,
        _snapshot(setting.dsn) if held else nullcontext(),
    ):
        room = Room(children, observer, setting.dsn, 2)
        sender = children.start(_send, setting.dsn, room.channels, setting.endurance)
        start = time.monotonic()
        for interval in range(1, _INTERVALS + 1):
            due = start + interval * setting.endurance / _INTERVALS
            time.sleep(max(0.0, due - time.monotonic()))
            intervals.append(room.ages())
            series.append(
                {
                    "seconds": time.monotonic() - start,
                    "table, MB": room.table_megabytes(),
                    "p50, ms": percentile(intervals[-1], 50),
                    "p99, ms": percentile(intervals[-1], 99),
                }
            )
        to_group, direct, seconds = sender.receive()
        room.sent_to_group(to_group)
        room.sent(direct)
        readings = room.missing()
    tenth = _INTERVALS // 10
    sizes = [point["table, MB"] for point in series]
    readings += [
        Reading("sent", "messages/s", (to_group + direct) / seconds),
        *percentiles("first tenth", chain(*intervals[:tenth]), 50, 99),
        *percentiles("last tenth", chain(*intervals[-tenth:]), 50, 99),
        Reading("table after a tenth", "MB", sizes[tenth - 1]),
        Reading("table after half", "MB", sizes[_INTERVALS // 2 - 1]),
        Reading("table at the end", "MB", sizes[-1]),
        Reading("table at most", "MB", max(sizes)),
    ]
    return Result(readings, series)


async def _send(pipe: Connection, dsn: str, channels: list[str], seconds: float) -> None:
    """Send the due messages every 10 ms, all at once; continue when they are sent."""
    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY)
    start = time.monotonic()
    sent = 0

    async def one(number: int) -> None:
        body = message(number, 0 if number // 2 % _TIMED else time.monotonic_ns())
        if number % 2:
            await layer.group_send(GROUP, body)
        else:
            await layer.send(channels[number // 2 % len(channels)], body)

    while (passed := time.monotonic() - start) < seconds:
        due = int((passed + _TICK) * RATE)
        await asyncio.gather(*(one(number) for number in range(sent, due)))
        sent = due
        await asyncio.sleep(max(0.0, start + passed + _TICK - time.monotonic()))
    pipe.send((sent // 2, sent - sent // 2, time.monotonic() - start))
    await layer.close()


@contextmanager
def _snapshot(dsn: str) -> Iterator[None]:
    """Hold a transaction whose snapshot keeps all rows that are deleted from now on."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1")
        yield
