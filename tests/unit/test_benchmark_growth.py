"""Growth curves: the points that a run visits, and the parts that need no server."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import pytest

from benchmarks.board import Board
from benchmarks.layers import LayerSpec
from benchmarks.scenarios import EVERY, SCENARIOS, choose, growth_fanout, growth_load
from benchmarks.scenarios.base import Receipt, Run, Sent, Sizes, Stage, do_many, message, read_all
from benchmarks.scenarios.growth import CURVES
from benchmarks.statistics import Stream, Tally, quantiles


class InMemory:
    """The part of a layer that these tests need: queues."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[dict[str, Any]]] = {}

    def queue(self, channel: str) -> asyncio.Queue[dict[str, Any]]:
        return self.queues.setdefault(channel, asyncio.Queue())

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        self.queue(channel).put_nowait(message)

    async def receive(self, channel: str) -> dict[str, Any]:
        return await self.queue(channel).get()


class Batching(InMemory):
    """A layer that takes many at once, and a limited number in a channel."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    async def send_many(self, messages: list[tuple[str, dict[str, Any]]]) -> list[bool]:
        taken = []
        for channel, body in messages:
            taken.append(self.queue(channel).qsize() < self.capacity)
            if taken[-1]:
                await self.send(channel, body)
        return taken


def stage(layer: InMemory, sizes: Sizes) -> Stage:
    return Stage(LayerSpec("any", ""), cast(Any, layer), sizes, Board(1))


@pytest.mark.parametrize("name", CURVES)
def test_curve_points_share_one_axis_and_the_same_figures(name: str) -> None:
    points = CURVES[name]
    curves = [point.curve for point in points if point.curve]
    assert len(curves) == len(points)
    assert [point.name for point in points] == [f"{name}/{curve.x}" for curve in curves]
    assert {curve.name for curve in curves} == {name}
    assert len({curve.axis for curve in curves}) == 1
    xs = [curve.x for curve in curves]
    assert xs == sorted(set(xs))
    assert len({tuple(point.figures) for point in points}) == 1
    assert all(set(point.scales) == {"full", "quick", "tiny"} for point in points)


def test_choose_default_scenarios_has_no_curve() -> None:
    assert not any(scenario.curve for scenario in choose(tuple(SCENARIOS), "quick"))


def test_choose_names_yields_scenarios_curves_and_points() -> None:
    chosen = choose(["growth-members/1000", "latency", "growth-members", "latency"], "tiny")
    assert [scenario.name for scenario in chosen] == [
        "growth-members/1000",
        "latency",
        "growth-members/10",
        "growth-members/100",
    ]
    assert choose(["all"], "full") == list(EVERY.values())
    assert choose(["growth"], "full") == [scenario for scenario in EVERY.values() if scenario.curve]
    assert choose(["growth-idle"], "quick") == list(CURVES["growth-idle"])[:-1]
    with pytest.raises(KeyError):
        choose(["growth-nothing"], "full")


@pytest.mark.parametrize(
    ("count", "shares"), [(10, [3, 3, 2, 2]), (100, [25] * 4), (3, [1, 1, 1, 0])]
)
def test_sizes_with_a_spread_divide_channels_among_processes(count: int, shares: list[int]) -> None:
    sizes = Sizes(seconds=1, processes=4, spread=count)
    assert [sizes.channels(process) for process in range(4)] == shares


def test_sizes_without_a_spread_give_each_process_all_members() -> None:
    assert [Sizes(seconds=1, processes=2, members=7).channels(process) for process in range(2)] == [
        7,
        7,
    ]


async def test_do_many_runs_at_most_at_once_calls() -> None:
    running = most = 0

    async def do(index: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return index

    assert sorted(await do_many(do, 50, "things", at_once=7)) == list(range(50))
    assert most == 7
    assert await do_many(do, 0, "things") == []


async def test_do_many_beyond_its_time_limit_raises() -> None:
    async def do(index: int) -> None:
        if index >= 3:
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"members: only 3 of 9 within 0\.05 s"):
        await do_many(do, 9, "members", at_once=2, time_limit=0.05)


async def test_do_many_raises_the_first_error() -> None:
    async def do(index: int) -> None:
        raise ConnectionError("no")

    with pytest.raises(ConnectionError, match="no"):
        await do_many(do, 9, "members")


async def test_read_all_counts_second_copies_as_faults_only() -> None:
    layer = InMemory()
    for number in (0, 1, 1, 0):
        await layer.send("c", message(0, number, 1))
    receipts: list[Receipt] = []
    given = stage(layer, Sizes(seconds=1))
    given.report = receipts.append
    given.board.stop()
    await read_all(given, ["c"], ages=True)
    assert given.board.deliveries == 2
    assert len(receipts[0].ages) == 2
    assert receipts[0].streams[0][0].tally(2) == Tally(twice=2)


async def test_read_all_keeps_ages_of_timed_messages_only() -> None:
    layer = InMemory()
    for number, sent_ns in enumerate((0, 1, 0)):
        await layer.send("c", message(0, number, sent_ns))
    receipts: list[Receipt] = []
    given = stage(layer, Sizes(seconds=1))
    given.report = receipts.append
    given.board.stop()  # at once; the existing figures are read
    await read_all(given, ["c"], ages=True)
    assert given.board.deliveries == 3
    assert len(receipts[0].ages) == 1
    assert receipts[0].streams[0][0].tally(3) == Tally()


@pytest.mark.parametrize("layer", [InMemory(), Batching(5_000)])
async def test_fill_writes_the_waiting_messages_to_separate_channels(layer: InMemory) -> None:
    given = stage(layer, Sizes(seconds=1, waiting=7_001))
    await growth_load._fill(given)
    assert Counter({name: queue.qsize() for name, queue in layer.queues.items()}) == {
        "bench.waiting.0": 5_000,
        "bench.waiting.1": 2_001,
    }
    assert await growth_load._look(given) == Tally()


async def test_fill_of_a_full_channel_raises() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.waiting\.0 is full already"):
        await growth_load._fill(stage(Batching(99), Sizes(seconds=1, waiting=100)))


async def test_look_without_a_waiting_message_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growth_load, "_LOOK_LIMIT", 0.05)
    given = stage(InMemory(), Sizes(seconds=1, waiting=100))
    with pytest.raises(RuntimeError, match="no message waited"):
        await growth_load._look(given)
    await given.layer.send("bench.waiting.0", message(0, 0, 0))
    assert await growth_load._look(given) == Tally(lost=9)


def test_summarise_groups_counts_messages_by_channel() -> None:
    """Two tasks have two channels. The sender is ``task * 2 + channel``.

    The second channel of each task missed its last message.
    """
    sizes = Sizes(seconds=1, members=2, groups=4, tasks=2)
    heard = [{0: Stream(next=3), 2: Stream(next=1)}, {1: Stream(next=4), 3: Stream(next=1)}]
    run = Run(sizes, Sent([3, 4, 1, 2]), [Receipt(heard)], 9, 1, 1_000_000_001)
    outcome = growth_fanout._summarise_groups(run)
    assert outcome.tally == Tally(lost=1)
    assert outcome.figures["msg/s"] == pytest.approx(9)


def test_quantiles_keep_the_ends_and_the_order() -> None:
    values = [float(n) for n in range(1000, 0, -1)]
    cut = quantiles(values, 100)
    assert len(cut) == 101
    assert (cut[0], cut[-1]) == (1.0, 1000.0)
    assert cut[50] == pytest.approx(500, abs=1)
    assert cut == sorted(cut)
    assert quantiles([]) == []
    assert quantiles([0.123456], 2) == [0.1235] * 3
