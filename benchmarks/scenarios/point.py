"""Latency from one sender to one channel, and throughput of many senders and channels."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from benchmarks.board import Window, warm_up
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
from benchmarks.statistics import Figure, Outcome, Tally, percentile, quantiles, rate

AGES = (Figure("p50", "ms", "lower"), Figure("p99", "ms", "lower"))


async def _receive(stage: Stage, *, ages: bool) -> None:
    channels = [await stage.layer.new_channel() for _ in range(stage.sizes.members)]
    await read_all(stage, channels, ages=ages, announce=channels)


async def warm_up_channels(stage: Stage) -> None:
    async def send() -> None:
        # All at once, like the measured messages, so that a pool of connections is filled before
        # them.
        await asyncio.gather(
            *(stage.layer.send(channel, warm_up_message()) for channel in stage.peers[0])
        )

    await warm_up(stage.board, [len(stage.peers[0])], send)


def one_each(sent: Sent, sizes: Sizes) -> int:
    return sent.total


async def receive_timed(stage: Stage) -> None:
    await _receive(stage, ages=True)


async def _send_paced(stage: Stage) -> Sent:
    await warm_up_channels(stage)
    stage.board.start()
    sent = Sent([0])
    await pace_channel(stage, sent, 0)
    return sent


async def pace_channel(stage: Stage, sent: Sent, index: int) -> None:
    """Send at a pace from the sender of that index to that channel; note it in ``sent``."""
    layer, channel, body = stage.layer, stage.peers[0][index], "x" * stage.sizes.payload
    full = 0

    async def send(number: int, sent_ns: int) -> None:
        nonlocal full
        full += await send_retrying(
            partial(layer.send, channel, message(index, number, sent_ns, body))
        )

    sent.by_sender[index] = await pace(stage.sizes.seconds, stage.sizes.rate, send)
    sent.notes["full"] = sent.notes.get("full", 0) + full


def _summarise_latency(run: Run) -> Outcome:
    ages = run.ages_ms
    return Outcome(
        figures={"p50": percentile(ages, 50), "p99": percentile(ages, 99)},
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.pace_notes,
        samples=quantiles(ages),
    )


async def _receive_untimed(stage: Stage) -> None:
    await _receive(stage, ages=False)


async def _send_flat_out(stage: Stage) -> Sent:
    await warm_up_channels(stage)
    sent = Sent([0] * stage.sizes.tasks)
    await flood_channels(stage, sent)
    return sent


async def flood_channels(stage: Stage, sent: Sent, *, timed: bool = True) -> None:
    """Send from each task to the channel of its index without a pause; note it in ``sent``.

    With a window, no more than that are in flight. Without ``timed``, ages are not measured.
    """
    layer, sizes, body = stage.layer, stage.sizes, "x" * stage.sizes.payload
    channels: list[str] = stage.peers[0]
    full = 0
    end = stage.board.start() + int(sizes.seconds * 1e9)

    async def sender(index: int, window: Window | None) -> None:
        nonlocal full
        channel = channels[index]
        number = 0
        while True:
            if window is not None:
                await window.take()
            if (now := time.monotonic_ns()) >= end:
                return
            outgoing = message(index, number, now if timed else 0, body)
            full += await send_retrying(partial(layer.send, channel, outgoing))
            number += 1
            sent.by_sender[index] = number

    async with AsyncExitStack() as stack:
        window = None
        if sizes.window:
            window = await stack.enter_async_context(
                Window(sizes.window, lambda: stage.board.deliveries)
            )
        await asyncio.gather(*(sender(index, window) for index in range(sizes.tasks)))
    sent.notes["full"] = full
    if window is not None:
        sent.notes["written off"] = window.written_off


def tally_own_channels(run: Run) -> Tally:
    """Return the tally if each sender sends to the channel of its index."""
    return tally_receipts(run, lambda process, channel: {channel: run.sent.by_sender[channel]})


def _summarise_throughput(run: Run) -> Outcome:
    return Outcome(
        figures={"msg/s": rate(run.deliveries, run.start_ns, run.latest_ns)},
        tally=tally_own_channels(run),
        notes=run.sent.notes,
    )


_LATENCY = Sizes(seconds=10, rate=200)
LATENCY = Scenario(
    name="latency",
    title="latency: one sender, one receiver process, 200 msg/s",
    figures=AGES,
    scales={
        "full": _LATENCY,
        "quick": replace(_LATENCY, seconds=2),
        "tiny": replace(_LATENCY, seconds=0.3),
    },
    send=_send_paced,
    receive=receive_timed,
    expected=one_each,
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
        "quick": replace(_THROUGHPUT, seconds=1.5),
        "tiny": replace(_THROUGHPUT, seconds=0.3, members=5, tasks=5),
    },
    send=_send_flat_out,
    receive=_receive_untimed,
    expected=one_each,
    summarise=_summarise_throughput,
    bare=bare.THROUGHPUT,
    in_one_loop=True,
)

_SERIAL = replace(_THROUGHPUT, members=1, tasks=1)
SERIAL = replace(
    THROUGHPUT,
    name="serial",
    title="serial: one sender in a row in one process to one channel in another, 100 B",
    scales={
        "full": _SERIAL,
        "quick": replace(_SERIAL, seconds=1.5),
        "tiny": replace(_SERIAL, seconds=0.3),
    },
    bare=bare.SERIAL,
)
