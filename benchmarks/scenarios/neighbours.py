"""The effect of a fixed load of the layer on the application's own transactions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import psycopg

from benchmarks.board import warm_up
from benchmarks.layers import KINDS
from benchmarks.pgbench import Pgbench, Report, checkpoint
from benchmarks.scenarios.base import (
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    message,
    pace,
    read_all,
    send_retrying,
    tally_receipts,
    warm_up_message,
)
from benchmarks.statistics import Figure, Outcome, percentile

GROUP = "bench.room"
#: The sender of messages to the group. The sender to a channel has the channel's index plus one.
_TO_GROUP = 0
#: pgbench ends the load. It also needs time to connect, and is waited for at most so long.
_TIMEOUT = 30.0
#: All tables in the database except the application's.
_LEFT_BEHIND = r"""
    SELECT coalesce(sum(n_dead_tup), 0), coalesce(sum(pg_total_relation_size(relid)), 0) / 1e6
    FROM pg_stat_user_tables WHERE relname NOT LIKE 'pgbench\_%'
"""


async def _receive(stage: Stage) -> None:
    channels = [await stage.layer.new_channel() for _ in range(stage.sizes.members)]
    for channel in channels:
        await stage.layer.group_add(GROUP, channel)
    await read_all(stage, channels, ages=True, announce=channels)


async def _send(stage: Stage) -> Sent:
    database = stage.spec.database
    if database is None:
        raise ValueError("this scenario needs the application's database")
    channels = [channel for peer in stage.peers for channel in peer]
    await _warm_up(stage, channels)
    sent = Sent([0] * (1 + len(channels)))
    enough = asyncio.Event()
    # Before each half. Otherwise only the half after a checkpoint would log whole pages.
    await asyncio.to_thread(checkpoint, database)
    alone = await _transactions(database, stage.sizes)
    await asyncio.to_thread(checkpoint, database)
    load = asyncio.ensure_future(_carry(stage, channels, sent, enough))
    try:
        loaded = await _transactions(database, stage.sizes)
        carried = _carried(stage)
        enough.set()
        await load
    finally:
        load.cancel()
    left = await asyncio.to_thread(_left_behind, stage)
    sent.figures = {**_costs(alone, loaded), "carried": carried, **left}
    return sent


async def _warm_up(stage: Stage, channels: Sequence[str]) -> None:
    async def send() -> None:
        to_channels = (stage.layer.send(channel, warm_up_message()) for channel in channels)
        await asyncio.gather(stage.layer.group_send(GROUP, warm_up_message()), *to_channels)

    await warm_up(stage.board, [stage.sizes.members] * stage.sizes.processes, send)


async def _transactions(database: str, sizes: Sizes) -> Report:
    """Run the application at full speed."""

    def run() -> Report:
        with Pgbench(database, clients=sizes.clients, seconds=sizes.seconds) as pgbench:
            return pgbench.report()

    return await asyncio.to_thread(run)


async def _carry(stage: Stage, channels: Sequence[str], sent: Sent, enough: asyncio.Event) -> None:
    """Send the load: messages to the group, and to each channel by one of the tasks."""
    layer, sizes = stage.layer, stage.sizes
    paced = partial(pace, sizes.seconds + _TIMEOUT, enough=enough.is_set)

    async def to_group(number: int, sent_ns: int) -> None:
        await layer.group_send(GROUP, message(_TO_GROUP, number, sent_ns))
        sent.by_sender[_TO_GROUP] += 1

    async def to_channel(task: int, number: int, sent_ns: int) -> None:
        own = range(task, len(channels), sizes.tasks)
        index = own[number % len(own)]
        body = message(1 + index, sent.by_sender[1 + index], sent_ns)
        full = await send_retrying(partial(layer.send, channels[index], body))
        sent.by_sender[1 + index] += 1
        sent.notes["full"] = sent.notes.get("full", 0) + full

    stage.board.start()
    await asyncio.gather(
        paced(sizes.group_rate, to_group),
        *(
            paced(sizes.rate / sizes.tasks, partial(to_channel, task))
            for task in range(sizes.tasks)
        ),
    )


def _carried(stage: Stage) -> float:
    """Return the percentage of due deliveries that have arrived."""
    sizes = stage.sizes
    seconds = (time.monotonic_ns() - stage.board.start_ns) / 1e9
    due = (sizes.rate + sizes.group_rate * sizes.processes * sizes.members) * seconds
    return 100 * stage.board.deliveries / due


def _costs(alone: Report, loaded: Report) -> dict[str, float]:
    return {
        "tx/s": loaded.per_second,
        "p50": percentile(loaded.latencies_ms, 50),
        "p99": percentile(loaded.latencies_ms, 99),
        "cost": 100 * (1 - loaded.per_second / alone.per_second) if alone.per_second else math.nan,
        "alone": alone.per_second,
    }


def _left_behind(stage: Stage) -> dict[str, float]:
    """Return the server's statistics of the layer's tables, if it has tables."""
    if KINDS[stage.spec.name].server != "postgres":
        return {"dead": math.nan, "left": math.nan}
    with psycopg.connect(stage.spec.address) as connection:
        row = connection.execute(_LEFT_BEHIND).fetchone()
    dead, megabytes = row or (math.nan, math.nan)
    return {"dead": float(dead), "left": float(megabytes)}


def _expected(sent: Sent, sizes: Sizes) -> int:
    to_group = sent.by_sender[_TO_GROUP]
    return to_group * sizes.processes * sizes.members + sent.total - to_group


def _summarise(run: Run) -> Outcome:
    def sent(process: int, channel: int) -> dict[int, int]:
        own = 1 + process * run.sizes.members + channel
        return {_TO_GROUP: run.sent.by_sender[_TO_GROUP], own: run.sent.by_sender[own]}

    return Outcome(
        figures={**run.sent.figures, "messages p99": percentile(run.ages_ms, 99)},
        tally=tally_receipts(run, sent),
        notes=run.pace_notes,
    )


_SIZES = Sizes(
    seconds=10,
    processes=2,
    members=50,
    tasks=10,
    rate=500,
    group_rate=20,
    clients=2,
    pgbench_scale=100,
)
NEIGHBOURS = Scenario(
    name="neighbours",
    title="neighbours: the application's transactions"
    " beside 500 msg/s and 20 group_send/s to 2 x 50 members",
    figures=(
        Figure("tx/s", "tx/s", "higher"),
        Figure("p50", "ms", "lower"),
        Figure("p99", "ms", "lower"),
        Figure("cost", "%", "lower"),
        Figure("alone", "tx/s", None),
        Figure("carried", "%", None),
        Figure("messages p99", "ms", "lower"),
        Figure("dead", "rows", "lower"),
        Figure("left", "MB", "lower"),
    ),
    scales={
        "full": _SIZES,
        "quick": replace(_SIZES, seconds=3, pgbench_scale=10),
        "tiny": replace(
            _SIZES,
            seconds=1,
            members=5,
            tasks=2,
            rate=50,
            group_rate=10,
            clients=1,
            pgbench_scale=1,
        ),
    },
    send=_send,
    receive=_receive,
    expected=_expected,
    summarise=_summarise,
)
