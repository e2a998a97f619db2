"""Channels that come one after the other: each joins the same group, and sends to it at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

from benchmarks.scenarios.base import (
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    cancel,
    message,
    pace,
    warm_up_message,
)
from benchmarks.scenarios.point import AGES
from benchmarks.statistics import Outcome, Stream, Tally, percentile, tally_channel

_LOBBY = "bench.lobby"
_TIMEOUT = 30.0
_SETTLE = 0.3


async def _send(stage: Stage) -> Sent:
    layer = stage.layer
    first = await layer.new_channel()
    await layer.group_add(_LOBBY, first)
    await layer.group_send(_LOBBY, warm_up_message())
    await layer.receive(first)  # connections and statements exist
    seen: dict[int, Stream] = {}
    ages: list[float] = []
    joins: list[asyncio.Future[None]] = []

    async def watch() -> None:
        while True:
            incoming = await layer.receive(first)
            seen.setdefault(incoming["s"], Stream()).see(incoming["n"])

    async def join(number: int, begun_ns: int) -> None:
        channel = await layer.new_channel()
        await layer.group_add(_LOBBY, channel)
        await layer.group_send(_LOBBY, message(number, 0, 0))
        while (await layer.receive(channel))["s"] != number:
            pass
        ages.append((time.monotonic_ns() - begun_ns) / 1e6)
        await layer.group_discard(_LOBBY, channel)

    async def begin(number: int, due_ns: int) -> None:
        joins.append(asyncio.ensure_future(join(number, due_ns)))

    watcher = asyncio.ensure_future(watch())
    try:
        stage.board.start()
        count = await pace(stage.sizes.seconds, stage.sizes.rate, begin)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*joins), _TIMEOUT)
        await asyncio.sleep(_SETTLE)
    finally:
        await cancel([watcher, *joins])
    # A channel that misses its own message counts like one whose message nobody received.
    tally = tally_channel(seen, dict.fromkeys(range(count), 1)) + Tally(lost=count - len(ages))
    figures = {"p50": percentile(ages, 50), "p99": percentile(ages, 99)}
    return Sent(figures=figures, tally=tally)


def _none(sent: Sent, sizes: Sizes) -> int:
    return 0


def _summarise(run: Run) -> Outcome:
    return Outcome(figures=run.sent.figures, tally=run.sent.tally)


_SIZES = Sizes(seconds=5, processes=0, rate=200)
JOINS = Scenario(
    name="joins",
    title="joins: 200 channels a second, each group_add + group_send to one group",
    figures=AGES,
    scales={
        "full": _SIZES,
        "quick": replace(_SIZES, seconds=1.5),
        "tiny": replace(_SIZES, seconds=0.3, rate=50),
    },
    send=_send,
    receive=None,
    expected=_none,
    summarise=_summarise,
    in_one_loop=True,
)
