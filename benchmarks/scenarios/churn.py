"""Channels that join and leave without a pause. At the end the right members must receive."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

from benchmarks.scenarios import bare
from benchmarks.scenarios.base import Run, Scenario, Sent, Sizes, Stage, cancel, message
from benchmarks.statistics import Figure, Outcome, Stream, Tally, rate, tally_channel

_CHECKS = 3
_TIMEOUT = 3.0
_SETTLE = 0.3
_LAST = "bench.last"
_CATCH_UP = 60.0


async def _churn(stage: Stage) -> Sent:
    channels = [await stage.layer.new_channel() for _ in range(stage.sizes.tasks)]
    groups = [f"bench.room.{index}" for index in range(stage.sizes.tasks)]
    await asyncio.gather(
        *map(stage.layer.group_add, groups, channels)
    )  # connections and statements exist
    await asyncio.gather(*map(stage.layer.group_discard, groups, channels))
    start = stage.board.start()
    end = start + int(stage.sizes.seconds * 1e9)

    async def come_and_go(group: str, channel: str) -> int:
        operations = 0
        while time.monotonic_ns() < end:
            await stage.layer.group_add(group, channel)
            await stage.layer.group_discard(group, channel)
            operations += 2
        return operations

    counts = await asyncio.gather(*map(come_and_go, groups, channels))
    # Some layers return before the server has applied the change. The clock stops when the last
    # join has taken effect.
    await stage.layer.group_add(_LAST, channels[0])
    await stage.layer.group_send(_LAST, message(0, 0, 0))
    await asyncio.wait_for(stage.layer.receive(channels[0]), _CATCH_UP)
    speed = rate(sum(counts), start, time.monotonic_ns())
    await stage.layer.group_discard(_LAST, channels[0])
    return Sent(figures={"ops/s": speed}, tally=await _check(stage, groups, channels))


async def _check(stage: Stage, groups: list[str], channels: list[str]) -> Tally:
    """Let every second channel join; a message to every group must reach exactly these."""
    streams = [Stream() for _ in channels]
    arrived = 0
    complete = asyncio.Event()

    async def read(channel: str, stream: Stream) -> None:
        nonlocal arrived
        while True:
            arrived += stream.see((await stage.layer.receive(channel))["n"])
            if arrived == len(staying) * _CHECKS:
                complete.set()

    staying = range(0, len(channels), 2)
    readers = [asyncio.ensure_future(read(*pair)) for pair in zip(channels, streams, strict=True)]
    try:
        for index in staying:
            await stage.layer.group_add(groups[index], channels[index])
        for number in range(_CHECKS):
            for group in groups:
                await stage.layer.group_send(group, message(0, number, 0))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(complete.wait(), _TIMEOUT)
        await asyncio.sleep(_SETTLE)
    finally:
        await cancel(readers)
    total = Tally()
    for index, stream in enumerate(streams):
        total += tally_channel({0: stream}, {0: _CHECKS if index in staying else 0})
    return total


def _none(sent: Sent, sizes: Sizes) -> int:
    return 0


def _summarise(run: Run) -> Outcome:
    return Outcome(figures=run.sent.figures, tally=run.sent.tally)


_SIZES = Sizes(seconds=5, processes=0, tasks=50)
CHURN = Scenario(
    name="churn",
    title="churn: group_add + group_discard, 50 concurrent, a group each",
    figures=(Figure("ops/s", "ops/s", "higher"),),
    scales={
        "full": _SIZES,
        "quick": replace(_SIZES, seconds=1.5),
        "tiny": replace(_SIZES, seconds=0.3, tasks=6),
    },
    send=_churn,
    receive=None,
    expected=_none,
    summarise=_summarise,
    bare=bare.CHURN,
    in_one_loop=True,
)
