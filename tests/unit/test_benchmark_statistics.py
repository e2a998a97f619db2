"""The benchmarks' arithmetic: the reported figures must follow from the measurements."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.board import Board, Window, warm_up
from benchmarks.cli import rotated
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.report import Results, faults
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.base import pace
from benchmarks.statistics import (
    Figure,
    Outcome,
    Stream,
    Summary,
    Tally,
    fell_behind,
    median,
    percentile,
    rate,
    ratio,
    summarise,
    tally_channel,
    tally_competing,
)

SPEED = Figure("msg/s", "msg/s", "higher")


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.5),
        ([float(n) for n in range(101)], 99, 99.0),
        ([1.0, 2.0], 0, 1.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_percentile_interpolates_between_values(
    values: list[float], percent: float, expected: float
) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize("percent", [-1, 100.1])
def test_percentile_out_of_range_raises(percent: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], percent)


def test_median_ignores_rounds_without_a_figure() -> None:
    assert median([math.nan, 1.0, 3.0]) == 2.0
    assert math.isnan(median([math.nan]))


@pytest.mark.parametrize(
    ("ages", "behind"),
    [
        ([float(n) for n in range(100)], True),
        ([5.0] * 50 + [30.0] * 50, True),
        ([30.0] * 50 + [5.0] * 50, False),
        ([30.0] * 50 + [80.0] * 50, False),  # not even three times as old
        ([1.0] * 50 + [19.0] * 50, False),  # nothing to speak of
        ([1.0] * 96 + [900.0] * 4, False),  # a stall at the end of the tenth
        ([1.0] * 40 + [900.0] * 9, False),  # too few
        ([], False),
    ],
)
def test_fell_behind_of_growing_ages_is_true(ages: list[float], behind: bool) -> None:
    assert fell_behind(ages) is behind


def test_ratio_is_how_many_times_better() -> None:
    assert ratio(20, 10, "higher") == 2
    assert ratio(2, 1, "lower") == 0.5
    assert ratio(0, 10, "higher") == 0
    assert math.isnan(ratio(10, 0, "higher"))
    assert math.isnan(ratio(math.nan, 1, "lower"))
    assert math.isnan(ratio(1, -2, "lower"))
    assert math.isnan(ratio(-2, 1, "lower"))


def test_rate_is_per_second_and_0_without_time() -> None:
    assert rate(100, 1_000_000_000, 3_000_000_000) == 50
    assert rate(0, 0, 10) == 0
    assert rate(5, 10, 10) == 0
    assert rate(5, 10, 0) == 0


@given(
    sent=st.integers(0, 12),
    arrived=st.lists(st.integers(0, 14), max_size=40),
)
def test_stream_tally_equals_that_of_a_full_count(sent: int, arrived: list[int]) -> None:
    stream = Stream()
    new = [number for number in arrived if stream.see(number)]
    tally = stream.tally(sent)
    assert new == list(dict.fromkeys(arrived))

    counts = Counter(arrived)
    firsts = [number for index, number in enumerate(arrived) if number not in arrived[:index]]
    assert tally.lost == sum(1 for number in range(sent) if number not in counts)
    assert tally.twice == sum(count - 1 for count in counts.values())
    assert tally.stray == sum(1 for number in counts if number >= sent)
    assert tally.disorder == sum(
        1
        for index, number in enumerate(firsts)
        if any(earlier > number for earlier in firsts[:index])
    )


@given(st.integers(0, 50), st.randoms(use_true_random=False))
def test_stream_complete_in_any_order_has_no_loss(count: int, shuffler: random.Random) -> None:
    numbers = list(range(count))
    shuffler.shuffle(numbers)
    stream = Stream()
    for number in numbers:
        stream.see(number)
    tally = stream.tally(count)
    assert (tally.lost, tally.twice, tally.stray) == (0, 0, 0)
    assert bool(tally.disorder) == (numbers != sorted(numbers))


def test_tally_channel_counts_silent_and_foreign_senders() -> None:
    heard, foreign = Stream(), Stream()
    heard.see(0)
    foreign.see(0)
    assert tally_channel({1: heard, 9: foreign}, {1: 2, 2: 3}) == Tally(lost=1 + 3, stray=1)


def test_tally_competing_readers_that_share_all_numbers_is_empty() -> None:
    readers = [[(0, 0), (0, 2)], [(0, 1), (1, 0)]]
    assert tally_competing(readers, {0: 3, 1: 1}) == Tally()


def test_tally_competing_counts_lost_double_and_reordered_messages() -> None:
    readers = [[(0, 0), (0, 2), (0, 1)], [(0, 1), (0, 7)]]
    assert tally_competing(readers, {0: 4}) == Tally(lost=1, twice=1, disorder=1, stray=1)


def test_tally_adds_up_and_is_true_if_it_has_a_fault() -> None:
    assert sum([Tally(1, 2, 3, 4), Tally(1, 1, 1, 1)], Tally()) == Tally(2, 3, 4, 5)
    assert not Tally()
    assert all([Tally(lost=1), Tally(twice=1), Tally(disorder=1), Tally(stray=1)])


def test_summarise_takes_medians_of_rounds_and_adds_faults() -> None:
    outcomes = [
        Outcome({"msg/s": 10}, Tally(lost=1), {"full": 2}),
        Outcome({"msg/s": 30}, Tally(twice=2), {"full": 3}),
        Outcome(error="no message came"),
        Outcome({"msg/s": 20}),
    ]
    summary = summarise(outcomes, [SPEED])
    assert summary.figures == {"msg/s": 20}
    assert summary.tally == Tally(lost=1, twice=2)
    assert summary.notes == {"full": 5}
    assert summary.errors == ["no message came"]


def test_faults_returns_words_for_each_kind() -> None:
    assert faults(Summary({"msg/s": 1.0}, Tally(), {}, [])) == "none"
    assert (
        faults(Summary({"msg/s": 1.0}, Tally(lost=1200, disorder=3), {}, []))
        == "1,200 lost, 3 disorder"
    )
    assert faults(Summary({"msg/s": math.nan}, Tally(), {}, ["broken"])) == "1 failed"
    assert faults(Summary({"msg/s": math.nan}, Tally(), {}, [])) == "not run"


def test_results_as_table_has_a_column_for_each_layer() -> None:
    latency, throughput = SCENARIOS["latency"], SCENARIOS["throughput"]
    results = Results(["pg", "core"], [latency, throughput])
    results.add(latency, "pg", Outcome({"p50": 0.5, "p99": 2.0}))
    results.add(latency, "core", Outcome({"p50": 1.0, "p99": 2.0}, Tally(lost=4)))
    results.add(throughput, "pg", Outcome({"msg/s": 30_000.0}, notes={"full": 7, "written off": 0}))
    results.add(throughput, "core", Outcome(error="it broke"))

    lines = [line.split() for line in results.as_table().splitlines()]
    assert ["latency", "p50", "ms", "0.50", "1"] in lines
    assert ["faults", "none", "4", "lost"] in lines
    assert ["throughput", "msg/s", "30,000", "-"] in lines
    assert ["faults", "none", "1", "failed"] in lines
    assert ["notes", "7", "full"] in lines
    ratios = [line.split() for line in results.as_ratios().splitlines()]
    assert ["latency", "p50", "ms", "2.00x*"] in ratios
    assert ["p99", "ms", "1.00x*"] in ratios
    assert not any("throughput" in line for line in ratios)
    assert not results.failed

    written = json.loads(json.dumps(results.as_json({"machine": "any"}), allow_nan=False))
    assert written["layers"] == {"pg": "pg_layer", "core": "redis core"}
    assert written["scenarios"]["latency"]["ratios"] == {"p50": {"core": 2.0}, "p99": {"core": 1.0}}
    assert written["scenarios"]["latency"]["layers"]["core"]["median"]["tally"]["lost"] == 4
    assert written["scenarios"]["throughput"]["layers"]["core"]["median"]["figures"] == {
        "msg/s": None
    }
    assert written["scenarios"]["throughput"]["layers"]["core"]["rounds"][0]["error"] == "it broke"


def test_results_as_ratios_show_the_share_of_bare_psycopg() -> None:
    latency, throughput = SCENARIOS["latency"], SCENARIOS["throughput"]
    results = Results(["pg", "memory", "bare"], [latency, throughput])
    results.add(latency, "pg", Outcome({"p50": 2.0, "p99": 4.0}))
    results.add(latency, "memory", Outcome({"p50": 1.0, "p99": 1.0}))
    results.add(latency, "bare", Outcome({"p50": 1.0, "p99": 4.0}))
    results.add(throughput, "pg", Outcome({"msg/s": 300.0}))
    results.add(throughput, "bare", Outcome({"msg/s": 400.0}, Tally(lost=1)))

    ratios = [line.split() for line in results.as_ratios().splitlines()]
    assert ["pg_layer", "vs", "in", "memory", "of", "bare", "psycopg"] in ratios
    assert ["latency", "p50", "ms", "0.50x", "50%"] in ratios
    assert ["p99", "ms", "0.25x", "100%"] in ratios
    assert ["throughput", "msg/s", "-", "75%*"] in ratios
    assert ["faults", "none", "not", "run", "1", "lost"] in [
        x.split() for x in results.as_table().splitlines()
    ]


def test_results_as_ranges_show_the_lowest_and_the_highest_round() -> None:
    latency, throughput = SCENARIOS["latency"], SCENARIOS["throughput"]
    results = Results(["pg", "core"], [latency, throughput])
    results.add(latency, "pg", Outcome({"p50": 0.5, "p99": 2.0}))
    assert results.as_ranges() == ""
    for speed in (18_892.0, 16_000.4, 1_250_000.0):
        results.add(throughput, "pg", Outcome({"msg/s": speed}))
    results.add(throughput, "core", Outcome({"msg/s": 100.0}))
    results.add(throughput, "core", Outcome(error="it broke"))
    lines = results.as_ranges().splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["throughput", "msg/s", "16k", "…", "1.25M", "-"]
    ]


def test_results_as_ratios_omit_figures_of_one_layer_only() -> None:
    latency, throughput = SCENARIOS["latency"], SCENARIOS["throughput"]
    results = Results(["pg", "core"], [latency, throughput])
    results.add(latency, "pg", Outcome({"p50": 1.0, "p99": 2.0}))
    results.add(throughput, "pg", Outcome({"msg/s": 1.0}))
    assert results.as_ratios() == ""
    results.add(latency, "core", Outcome({"p50": math.nan, "p99": 2.0}))
    lines = results.as_ratios().splitlines()
    assert [line.split() for line in lines[2:]] == [["latency", "p99", "ms", "1.00x"]]


def test_results_figures_that_are_not_compared_have_no_ratio() -> None:
    neighbours = SCENARIOS["neighbours"]
    results = Results(["pg", "core"], [neighbours])
    for layer in results.layers:
        results.add(neighbours, layer, Outcome({figure.name: 1.0 for figure in neighbours.figures}))
    ratios = results.as_json({})["scenarios"]["neighbours"]["ratios"]
    assert {name for name, against in ratios.items() if not against} == {"alone", "carried"}
    assert "alone" in results.as_table()
    assert "alone" not in results.as_ratios()
    assert "p99" in results.as_ratios()


def test_rotated_each_round_begins_with_another_layer() -> None:
    specs = [LayerSpec(name, "") for name in "abc"]
    rounds = ["".join(spec.name for spec in rotated(specs, places)) for places in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_results_without_another_layer_have_no_ratios() -> None:
    assert Results(["pg"], list(SCENARIOS.values())).as_ratios() == ""
    assert Results(["core", "bare"], list(SCENARIOS.values())).as_ratios() == ""


def test_results_tables_of_all_layers_fit_into_160_columns() -> None:
    results = Results(list(KINDS), list(SCENARIOS.values()))
    for scenario in SCENARIOS.values():
        for layer in KINDS:
            figures = {figure.name: 12_345_678.0 for figure in scenario.figures}
            faults = Tally(1_234_567, 1_234_567, 1_234_567, 1_234_567)
            results.add(
                scenario, layer, Outcome(figures, faults, {"written off": 1_234_567, "full": 1e6})
            )
            results.add(scenario, layer, Outcome(figures))
    for table in (results.as_table(), results.as_ratios(), results.as_ranges()):
        assert max(len(line) for line in table.splitlines()) <= 160
    text = " ".join(results.as_table().split())
    for words in ("1,234,567 lost,", "1,234,567 twice,", "1,234,567 stray", "1,234,567 written"):
        assert text.count(words) == len(SCENARIOS) * len(KINDS)


@pytest.mark.parametrize(
    "outcome", [Outcome({"msg/s": 1.0}, Tally(twice=1)), Outcome(error="it broke")]
)
def test_results_with_a_fault_of_pg_layer_failed(outcome: Outcome) -> None:
    results = Results(["pg"], [SCENARIOS["throughput"]])
    results.add(SCENARIOS["throughput"], "pg", outcome)
    assert results.failed


def test_board_counts_by_reader() -> None:
    board = Board(2)
    board.deliver(0, 5)
    board.deliver(1, 7)
    board.deliver(1, 9, 5)
    board.warm(1)
    assert (board.delivered(0), board.delivered(1), board.deliveries) == (1, 6, 7)
    assert (board.warmed(0), board.warmed(1)) == (0, 1)
    assert board.latest_ns == 9
    assert not board.stopped
    board.stop()
    assert board.stopped
    assert Board(0).latest_ns == 0


async def test_warm_up_repeats_until_each_reader_has_heard() -> None:
    board = Board(1)
    calls = 0

    async def send() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            board.warm(0)

    await warm_up(board, [1], send)
    assert calls == 2


async def test_warm_up_beyond_its_time_limit_raises() -> None:
    async def send() -> None:
        pass

    with pytest.raises(TimeoutError, match=r"\[0\] of \[1\]"):
        await warm_up(Board(1), [1], send, time_limit=0.01)


async def test_window_full_waits_for_arrivals() -> None:
    arrived = 0
    async with Window(2, lambda: arrived) as window:
        await window.take()
        await window.take()
        third = asyncio.ensure_future(window.take())
        assert third not in (await asyncio.wait([third], timeout=0.05))[0]
        arrived = 1
        await asyncio.wait_for(third, 5)
        assert window.written_off == 0


async def test_window_writes_off_messages_that_never_arrive() -> None:
    async with Window(2, lambda: 0, timeout=0.02) as window:
        for _ in range(4):
            await asyncio.wait_for(window.take(), 5)
        assert window.written_off >= 2


async def test_pace_with_enough_sent_ends() -> None:
    sent: list[int] = []

    async def send(number: int, sent_ns: int) -> None:
        sent.append(number)

    assert await pace(600, 1000, send, enough=lambda: len(sent) == 3) == 3
    assert sent == [0, 1, 2]
