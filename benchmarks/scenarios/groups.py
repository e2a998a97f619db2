"""group_send to members in two processes: deliveries a second, and their latency."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from benchmarks.board import Window, warm_up
from benchmarks.scenarios import bare
from benchmarks.scenarios.base import (
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    do_many,
    message,
    pace,
    read_all,
    tally_receipts,
    warm_up_message,
)
from benchmarks.scenarios.point import AGES
from benchmarks.statistics import Figure, Outcome, percentile, quantiles, rate

GROUP = "bench.room"


async def _receive(stage: Stage, *, ages: bool) -> None:
    async def member(index: int) -> str:
        channel = await stage.layer.new_channel()
        await stage.layer.group_add(GROUP, channel)
        return channel

    channels = await do_many(member, stage.sizes.channels(stage.index), "members")
    await read_all(stage, channels, ages=ages)


async def receive_timed(stage: Stage) -> None:
    await _receive(stage, ages=True)


async def receive_untimed(stage: Stage) -> None:
    await _receive(stage, ages=False)


async def warm_up_group(stage: Stage) -> None:
    board, processes = stage.board, range(stage.sizes.processes)
    before = -1

    async def send() -> None:
        # One of each task. Send more only if nothing arrives any more, because a large group would
        # be overloaded.
        nonlocal before
        heard = sum(board.warmed(process) for process in processes)
        if heard == before or before < 0:
            tasks = range(stage.sizes.tasks)
            await asyncio.gather(*(stage.layer.group_send(GROUP, warm_up_message()) for _ in tasks))
        before = heard

    await warm_up(board, [stage.sizes.channels(process) for process in processes], send)


def to_all_members(sent: Sent, sizes: Sizes) -> int:
    return sent.total * sum(sizes.channels(process) for process in range(sizes.processes))


def group_window(stage: Stage) -> Window:
    """Return the messages that the slowest process has received for all its members."""
    board, sizes = stage.board, stage.sizes
    channels = [sizes.channels(process) for process in range(sizes.processes)]
    return Window(
        sizes.window,
        lambda: min(board.delivered(process) // count for process, count in enumerate(channels)),
        timeout=2 + sum(channels) / 10_000,  # a message to so many takes seconds
    )


async def send_flat_out(stage: Stage) -> Sent:
    await warm_up_group(stage)
    layer, sizes = stage.layer, stage.sizes
    sent = Sent([0] * sizes.tasks)
    end = stage.board.start() + int(sizes.seconds * 1e9)

    async def sender(index: int, window: Window) -> None:
        number = 0
        while True:
            await window.take()
            if (now := time.monotonic_ns()) >= end:
                return
            await layer.group_send(GROUP, message(index, number, now))
            number += 1
            sent.by_sender[index] = number

    async with group_window(stage) as window:
        await asyncio.gather(*(sender(index, window) for index in range(sizes.tasks)))
        sent.notes["written off"] = window.written_off
    return sent


async def _send_paced(stage: Stage) -> Sent:
    await warm_up_group(stage)
    layer = stage.layer

    async def send(number: int, sent_ns: int) -> None:
        await layer.group_send(GROUP, message(0, number, sent_ns))

    stage.board.start()
    return Sent([await pace(stage.sizes.seconds, stage.sizes.rate, send)])


def _summarise_fan_out(run: Run) -> Outcome:
    return Outcome(
        figures={"deliveries/s": rate(run.deliveries, run.start_ns, run.latest_ns)},
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.sent.notes,
    )


def _summarise_latency(run: Run) -> Outcome:
    ages = run.ages_ms
    return Outcome(
        figures={"p50": percentile(ages, 50), "p99": percentile(ages, 99)},
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.pace_notes,
        samples=quantiles(ages),
    )


_FAN_OUT = Sizes(seconds=5, processes=2, members=250, tasks=10, window=100)
FAN_OUT = Scenario(
    name="fan-out",
    title="fan-out: group_send to 2 processes x 250 members",
    figures=(Figure("deliveries/s", "deliveries/s", "higher"),),
    scales={
        "full": _FAN_OUT,
        "quick": replace(_FAN_OUT, seconds=1.5),
        "tiny": replace(_FAN_OUT, seconds=0.3, members=5, tasks=3, window=10),
    },
    send=send_flat_out,
    receive=receive_untimed,
    expected=to_all_members,
    summarise=_summarise_fan_out,
    bare=bare.FAN_OUT,
    in_one_loop=True,
)

_LATENCY = Sizes(seconds=10, processes=2, members=100, rate=20)
FAN_OUT_LATENCY = Scenario(
    name="fan-out-latency",
    title="fan-out latency: 2 processes x 100 members, 20 group_send/s",
    figures=AGES,
    scales={
        "full": _LATENCY,
        "quick": replace(_LATENCY, seconds=2),
        "tiny": replace(_LATENCY, seconds=0.3, members=5),
    },
    send=_send_paced,
    receive=receive_timed,
    expected=to_all_members,
    summarise=_summarise_latency,
    bare=bare.LATENCY,
    in_one_loop=True,
)
