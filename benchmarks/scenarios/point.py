"""One sender to one channel: how late a message arrives; many senders to many channels: how many arrive."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

from benchmarks.board import warm_up
from benchmarks.scenarios import bare
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
from benchmarks.statistics import Figure, Outcome, percentile, rate

AGES = (Figure("p50", "ms", "lower"), Figure("p99", "ms", "lower"))


async def _receive(stage: Stage, *, ages: bool) -> None:
    channels = [await stage.layer.new_channel() for _ in range(stage.sizes.members)]
    await read_all(stage, channels, ages=ages, announce=channels)


async def _warm_up(stage: Stage) -> None:
    async def send() -> None:
        for channel in stage.peers[0]:
            await stage.layer.send(channel, warm_up_message())

    await warm_up(stage.board, [len(stage.peers[0])], send)


def _direct(sent: Sent, sizes: Sizes) -> int:
    return sent.total


async def _receive_timed(stage: Stage) -> None:
    await _receive(stage, ages=True)


async def _send_paced(stage: Stage) -> Sent:
    await _warm_up(stage)
    layer, channel = stage.layer, stage.peers[0][0]
    full = 0

    async def send(number: int, sent_ns: int) -> None:
        nonlocal full
        full += await send_retrying(partial(layer.send, channel, message(0, number, sent_ns)))

    stage.board.start()
    count = await pace(stage.sizes.seconds, stage.sizes.rate, send)
    return Sent([count], notes={"full": full})


def _summarise_latency(run: Run) -> Outcome:
    ages = run.ages_ms
    return Outcome(
        figures={"p50": percentile(ages, 50), "p99": percentile(ages, 99)},
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.sent.notes,
    )


async def _receive_untimed(stage: Stage) -> None:
    await _receive(stage, ages=False)


async def _send_flat_out(stage: Stage) -> Sent:
    await _warm_up(stage)
    layer = stage.layer
    channels: list[str] = stage.peers[0]
    sent = Sent([0] * stage.sizes.tasks)
    full = 0
    end = stage.board.start() + int(stage.sizes.seconds * 1e9)

    async def sender(index: int) -> None:
        nonlocal full
        channel = channels[index]
        number = 0
        while (now := time.monotonic_ns()) < end:
            body = message(index, number, now)
            full += await send_retrying(partial(layer.send, channel, body))
            number += 1
            sent.by_sender[index] = number

    await asyncio.gather(*(sender(index) for index in range(stage.sizes.tasks)))
    sent.notes["full"] = full
    return sent


def _summarise_throughput(run: Run) -> Outcome:
    tally = tally_receipts(run, lambda process, channel: {channel: run.sent.by_sender[channel]})
    return Outcome(
        figures={"msg/s": rate(run.deliveries - tally.twice, run.start_ns, run.latest_ns)},
        tally=tally,
        notes=run.sent.notes,
    )


_LATENCY = Sizes(seconds=10, rate=200)
LATENCY = Scenario(
    name="latency",
    title="latency: one sender, one receiver process, 200 msg/s",
    figures=AGES,
    scales={
        "full": _LATENCY,
        "quick": replace(_LATENCY, seconds=3),
        "tiny": replace(_LATENCY, seconds=0.3),
    },
    send=_send_paced,
    receive=_receive_timed,
    expected=_direct,
    summarise=_summarise_latency,
    bare=bare.LATENCY,
    in_one_loop=True,
)

_THROUGHPUT = Sizes(seconds=5, members=100, tasks=100)
THROUGHPUT = Scenario(
    name="throughput",
    title="throughput: 100 concurrent senders in one process to 100 channels in another, 100 B",
    figures=(Figure("msg/s", "msg/s", "higher"),),
    scales={
        "full": _THROUGHPUT,
        "quick": replace(_THROUGHPUT, seconds=2),
        "tiny": replace(_THROUGHPUT, seconds=0.3, members=5, tasks=5),
    },
    send=_send_flat_out,
    receive=_receive_untimed,
    expected=_direct,
    summarise=_summarise_throughput,
    bare=bare.THROUGHPUT,
    in_one_loop=True,
)
