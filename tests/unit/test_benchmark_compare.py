"""The comparison of two source trees: the measurements that run, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Comparison, Failure, main
from benchmarks.compared.points import ON_DEMAND, POINTS, choose


def result(**values: float) -> dict[str, Any]:
    """Return the result of one measurement: figures of one kind, in milliseconds."""
    readings = [{"what": what, "unit": "ms", "value": value} for what, value in values.items()]
    return {"readings": readings}


def table(comparison: Comparison) -> list[list[str]]:
    """Return the cells of each line below the head of the table."""
    lines = [line for line in comparison.as_markdown().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_choose_without_names_leaves_out_what_runs_on_demand() -> None:
    """A run of default length has neither the endurance runs nor the scenarios of `benchmarks`."""
    chosen = {point.partition("/")[0] for point in choose([])}
    assert chosen.isdisjoint(ON_DEMAND)
    assert chosen | set(ON_DEMAND) == {point.partition("/")[0] for point in POINTS}


def test_choose_scenario_yields_its_points_only() -> None:
    """`processes` is not `processes-live`. A point can be named alone. Names keep their order."""
    assert choose(["receivers/16", "processes"]) == [
        "receivers/16",
        *(f"processes/{count}" for count in (1, 4, 16, 64)),
    ]


def test_choose_unknown_name_raises_value_error() -> None:
    """A misspelt scenario ends the run before a server is started."""
    with pytest.raises(ValueError, match="unknown: receiver;"):
        choose(["receiver"])


def test_comparison_several_rounds_shows_medians_ranges_and_quotient() -> None:
    """The median of each tree, with the lowest and the highest round; after divided by before."""
    comparison = Comparison(["latency/one"])
    for before, after in ((2.0, 1.0), (8.0, 5.0), (4.0, 3.0)):
        comparison.results["latency/one"]["before"].append(result(p50=before))
        comparison.results["latency/one"]["after"].append(result(p50=after))
    assert table(comparison) == [["`latency/one`", "p50: ms", "4 (2 to 8)", "3 (1 to 5)", "0.75"]]


def test_comparison_figure_of_one_tree_has_no_quotient() -> None:
    """A fault in one tree only has its own line, without a figure for the other tree."""
    comparison = Comparison(["latency/one"])
    comparison.results["latency/one"]["before"].append(result(p50=2.0, FAULT=7.0))
    comparison.results["latency/one"]["after"].append(result(p50=2.0))
    assert table(comparison)[1] == ["", "FAULT: ms", "7", "-", "-"]


def test_comparison_failed_measurement_is_named_below_the_table() -> None:
    """The last line of the traceback gives the reason for the missing figure."""
    comparison = Comparison(["latency/one"])
    comparison.failures.append(Failure("latency/one", "after", "Traceback\nTimeoutError: too late"))
    last = comparison.as_markdown().splitlines()[-1]
    assert last == "- FAILED: `latency/one`, after: TimeoutError: too late"


def test_main_folder_without_package_is_an_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder that holds no source tree is refused before anything is measured."""
    with pytest.raises(SystemExit):
        main(["--before", str(tmp_path)])
    assert f"no pg_layer in {tmp_path}" in capsys.readouterr().err
