"""The cost of idle consumers: memory, connections, queries."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from contextlib import suppress
from dataclasses import replace

import psutil

from benchmarks.probe import probe
from benchmarks.scenarios.base import (
    Curve,
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    cancel,
    do_many,
    message,
    pace,
)
from benchmarks.statistics import Figure, Outcome, Stream, Tally, fell_behind, percentile

_RATE = 20
_WARM_UP_LIMIT = 20.0
_TIMEOUT = 3.0


class _Consumers:
    """Loops in ``receive()``, one for each channel, and what they received."""

    def __init__(self, stage: Stage) -> None:
        self.channels: list[str] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.warm = False
        self.ages: list[int] = []
        self._layer = stage.layer
        self._streams: list[Stream] = []
        self._sent: list[int] = []

    async def add(self, count: int) -> None:
        """Add so many loops. Each of them waits when this returns."""
        new = await do_many(lambda index: self._layer.new_channel(), count, "channels")
        for channel in new:
            stream = Stream()
            self.channels.append(channel)
            self._streams.append(stream)
            self._sent.append(0)
            self.tasks.append(asyncio.ensure_future(self._consume(channel, stream)))
        await asyncio.sleep(0.1)

    async def _consume(self, channel: str, stream: Stream) -> None:
        while True:
            incoming = await self._layer.receive(channel)
            if incoming["n"] < 0:
                self.warm = True
                continue
            now = time.monotonic_ns()
            if stream.see(incoming["n"]):
                self.ages.append(now - incoming["t"])

    async def send(self, index: int, sent_ns: int) -> None:
        number = self._sent[index]
        self._sent[index] += 1
        await self._layer.send(self.channels[index], message(0, number, sent_ns))

    def check(self) -> None:
        """Raise the error of a failed consumer."""
        for task in self.tasks:
            if task.done():
                task.result()

    @property
    def outstanding(self) -> int:
        return sum(self._sent) - len(self.ages)

    @property
    def tally(self) -> Tally:
        balances = (
            stream.tally(sent) for stream, sent in zip(self._streams, self._sent, strict=True)
        )
        return sum(balances, Tally())


async def _idle(stage: Stage) -> Sent:
    """One consumer that has received a message; idle consumers; then messages to any of them."""
    count, seconds = stage.sizes.members, stage.sizes.seconds
    _allow_many_files()
    consumers = _Consumers(stage)
    with probe(stage.spec) as server:
        try:
            await consumers.add(1)
            await _warm_up(stage, consumers)
            before = _memory()
            await consumers.add(count)
            await asyncio.sleep(stage.sizes.settle)
            memory = (_memory() - before) / count / 1024 if count else math.nan
            connections = await asyncio.to_thread(server.connections)
            commands, since = await asyncio.to_thread(server.commands), time.monotonic()
            await asyncio.sleep(seconds)
            commands = await asyncio.to_thread(server.commands) - commands
            rate = commands / (time.monotonic() - since)
            consumers.check()
            choose = random.Random(count).randrange
            await pace(
                seconds, _RATE, lambda number, sent_ns: consumers.send(choose(count + 1), sent_ns)
            )
            await _arrival(consumers)
            consumers.check()
        finally:
            await cancel(consumers.tasks)
    ages = [age / 1e6 for age in consumers.ages]
    return Sent(
        figures={
            "memory": memory,
            "held": connections,
            "at rest": rate,
            "p50": percentile(ages, 50),
        },
        notes={"fell behind": int(fell_behind(ages))},
        tally=consumers.tally,
    )


async def _warm_up(stage: Stage, consumers: _Consumers) -> None:
    limit = time.monotonic() + _WARM_UP_LIMIT
    while not consumers.warm:
        if time.monotonic() > limit:
            raise TimeoutError(f"no message reached the consumer in {_WARM_UP_LIMIT:g} s")
        consumers.check()
        await stage.layer.send(consumers.channels[0], message(0, -1, 0))
        await asyncio.sleep(0.25)


async def _arrival(consumers: _Consumers) -> None:
    limit = time.monotonic() + _TIMEOUT
    while consumers.outstanding:
        if time.monotonic() > limit:
            return
        await asyncio.sleep(0.01)


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _allow_many_files() -> None:
    """Limit the connections. A layer with one for each consumer fails at this limit."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _none(sent: Sent, sizes: Sizes) -> int:
    return 0


def _summarise(run: Run) -> Outcome:
    return Outcome(figures=run.sent.figures, tally=run.sent.tally, notes=run.sent.notes)


def _consumers(count: int) -> Scenario:
    # PostgreSQL's sessions may count a transaction ten seconds late, so a shorter pause counts too
    # many.
    sizes = Sizes(seconds=5, processes=0, members=count, settle=11)
    return Scenario(
        name=f"growth-idle/{count}",
        title=f"growth: a process with {count:,} consumers that wait, and one that hears",
        figures=(
            Figure("memory", "kB a consumer", "lower"),
            Figure("held", "connections", "lower"),
            Figure("at rest", "queries/s", "lower"),
            Figure("p50", "ms", "lower"),
        ),
        scales={
            "full": sizes,
            "quick": replace(sizes, seconds=1, settle=1.5),
            "tiny": replace(sizes, seconds=0.3, settle=0.1),
        },
        send=_idle,
        receive=None,
        expected=_none,
        summarise=_summarise,
        curve=Curve("growth-idle", "idle consumers", count),
    )


IDLE = [_consumers(count) for count in (0, 100, 1_000, 10_000)]
