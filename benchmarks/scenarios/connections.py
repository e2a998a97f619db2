"""A process whose many consumers connect at the same time: the number of its connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.scenarios.base import Run, Scenario, Sent, Sizes, Stage, cancel, message
from benchmarks.servers import observe
from benchmarks.statistics import Figure, Outcome, Stream, Tally

_MEMBERS_OF_A_GROUP = 10
_ROUNDS = 3
_TIMEOUT = 20.0
_SETTLE = 0.5
_SAMPLE = 0.05


async def _consume(stage: Stage) -> Sent:
    consumers = stage.sizes.members
    groups = [f"bench.room.{index}" for index in range(-(-consumers // _MEMBERS_OF_A_GROUP))]
    streams = [Stream() for _ in range(consumers)]
    ready = arrived = 0

    async def consumer(index: int) -> None:
        nonlocal ready, arrived
        channel = await stage.layer.new_channel()
        await stage.layer.group_add(groups[index // _MEMBERS_OF_A_GROUP], channel)
        ready += 1
        while True:
            arrived += streams[index].see((await stage.layer.receive(channel))["n"])

    with observe(stage.spec) as observer:
        before = observer.connections()
        peak = before

        watched = False

        async def watch() -> None:
            nonlocal peak
            while not watched:
                peak = max(peak, await asyncio.to_thread(observer.connections))
                await asyncio.sleep(_SAMPLE)

        watching = asyncio.ensure_future(watch())
        start = stage.board.start()
        tasks = [asyncio.ensure_future(consumer(index)) for index in range(consumers)]
        try:
            await _until(lambda: ready >= consumers, tasks)
            seconds = (time.monotonic_ns() - start) / 1e9
            await asyncio.sleep(_SETTLE)
            for number in range(_ROUNDS):
                for group in groups:
                    await stage.layer.group_send(group, message(0, number, 0))
            await _until(lambda: arrived >= consumers * _ROUNDS, tasks)
            await asyncio.sleep(_SETTLE)
            watched = True
            await watching
            held = observer.connections()
        finally:
            await cancel([watching, *tasks])
    total = sum((stream.tally(_ROUNDS) for stream in streams), Tally())
    figures = {"held": held - before, "peak": max(peak, held) - before, "all joined": seconds}
    return Sent(figures=figures, tally=total)


async def _until(reached: Callable[[], bool], tasks: Sequence[asyncio.Future[None]]) -> None:
    """Wait for a condition with a limit. Raise the error of a failed consumer."""
    end = time.monotonic() + _TIMEOUT
    while not reached() and time.monotonic() < end:
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)


def _none(sent: Sent, sizes: Sizes) -> int:
    return 0


def _summarise(run: Run) -> Outcome:
    return Outcome(figures=run.sent.figures, tally=run.sent.tally)


_SIZES = Sizes(seconds=0, processes=0, members=1000)
CONNECTIONS = Scenario(
    name="connections",
    title="connections: a process whose 1,000 consumers connect at once, each in a group",
    figures=(
        Figure("held", "connections", "lower"),
        Figure("peak", "connections", "lower"),
        Figure("all joined", "s", "lower"),
    ),
    scales={"full": _SIZES, "quick": _SIZES, "tiny": replace(_SIZES, members=30)},
    send=_consume,
    receive=None,
    expected=_none,
    summarise=_summarise,
)
