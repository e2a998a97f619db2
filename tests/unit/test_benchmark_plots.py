"""The benchmarks' drawings, from a file with any subset of the measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.report import Results, context
from benchmarks.scenarios import SCENARIOS, choose
from benchmarks.statistics import Outcome, Tally, quantiles

pytest.importorskip("matplotlib")

from benchmarks import plots
from benchmarks.canvas import colour_of

TITLES = ("pg_layer", "redis core", "redis pub/sub")
MEMBERS = choose(["growth-members"], "full")


def written(results: Results, folder: Path) -> Path:
    """Return the contents of a file that ``--json`` writes."""
    servers = {"postgres": {"server_version": "18.4", "fsync": "on"}}
    file = folder / "results.json"
    file.write_text(json.dumps(results.as_json(context({"rounds": 1, "scale": "full"}, servers))))
    return file


def sample_results() -> Results:
    """Return distributions, bars, a curve, failures, faults, and figures of zero or none."""
    latency, throughput, connections = (
        SCENARIOS[name] for name in ("latency", "throughput", "connections")
    )
    results = Results(["pg", "core", "pubsub"], [latency, throughput, connections, *MEMBERS])
    for times, layer in enumerate(results.layers, 1):
        ages = [times * (1 + index / 100) for index in range(500)]
        results.add(latency, layer, Outcome({"p50": 1.0, "p99": 2.0}, samples=quantiles(ages)))
        results.add(
            connections, layer, Outcome({"held": 3.0 * times, "peak": 4.0, "all joined": 0.0})
        )
    results.add(throughput, "pg", Outcome({"msg/s": 30_000.0}))
    results.add(throughput, "core", Outcome({"msg/s": 10_000.0}, Tally(lost=4)))
    results.add(throughput, "pubsub", Outcome(error="it broke"))
    for index, point in enumerate(MEMBERS):
        ours = {"send": 1.0 + index, "in database": 0.3, "rows": 4.0, "delivered p50": 2.0}
        theirs = {**ours, "in database": math.nan, "rows": math.nan, "delivered p50": float(index)}
        results.add(point, "pg", Outcome(ours))
        results.add(point, "core", Outcome(theirs, Tally(twice=index)))
        results.add(point, "pubsub", Outcome(theirs) if index < 3 else Outcome(error="it broke"))
    return results


def texts(file: Path) -> str:
    """Return all texts of a drawing. Fail if it is no SVG."""
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join(
        "".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")
    )


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, str]:
    """Return the texts of the sample's drawings, by name."""
    folder = tmp_path / "plots"
    assert plots.main([str(written(sample_results(), tmp_path)), str(folder)]) == 0
    return {file.name: texts(file) for file in folder.iterdir()}


def test_plots_name_the_layers_the_better_direction_and_the_server(
    drawn: dict[str, str],
) -> None:
    assert set(drawn) == {"latency.svg", "throughput.svg", "costs.svg", "growth-members.svg"}
    for said in drawn.values():
        assert all(title in said for title in TITLES)
        assert "better" in said
        assert "pg-layer" in said
        assert "fsync on" in said


def test_bars_show_ratios_faults_and_failures(drawn: dict[str, str]) -> None:
    said = drawn["throughput.svg"]
    assert "10,000  (3.00x)*" in said
    assert "failed" in said
    assert "3.00x" in drawn["costs.svg"]


def test_distributions_are_not_drawn_twice(drawn: dict[str, str]) -> None:
    title = SCENARIOS["latency"].title.split(",")[
        0
    ]  # of a long one, each line is a text of its own
    assert title in drawn["latency.svg"]
    assert title not in drawn["costs.svg"]


def test_curves_have_a_panel_for_each_figure(drawn: dict[str, str]) -> None:
    said = drawn["growth-members.svg"]
    for label in ("send, ms", "in database, ms", "rows", "delivered p50, ms"):
        assert f"{label}: lower is better" in said
    assert "100k" in said


def drawing(results: Results, folder: Path, name: str) -> str:
    files = plots.draw(json.loads(written(results, folder).read_text()), folder / "plots")
    return texts(next(file for file in files if file.name == name))


def test_bars_show_the_ceiling_as_a_number(tmp_path: Path) -> None:
    """The ceiling is not a bar, because the other bars would become too short."""
    throughput = SCENARIOS["throughput"]
    results = Results(["pg", "bare"], [throughput])
    results.add(throughput, "pg", Outcome({"msg/s": 10.0}))
    results.add(throughput, "bare", Outcome({"msg/s": 90_000.0}))
    said = drawing(results, tmp_path, "throughput.svg")
    assert "bare psycopg: 90,000" in said
    assert "20k" not in said  # nor does the axis reach as far


def test_bars_name_a_scenario_with_several_figures_once(drawn: dict[str, str]) -> None:
    assert drawn["costs.svg"].count("connections: a process whose") == 1


def test_legend_names_only_layers_that_are_shown(tmp_path: Path) -> None:
    throughput, connections = SCENARIOS["throughput"], SCENARIOS["connections"]
    results = Results(["pg", "memory"], [throughput, connections])
    for layer in results.layers:
        results.add(throughput, layer, Outcome({"msg/s": 10.0}))
    results.add(connections, "pg", Outcome({"held": 3.0, "peak": 4.0, "all joined": 0.5}))
    assert "in memory" in drawing(results, tmp_path, "throughput.svg")
    assert "in memory" not in drawing(results, tmp_path, "costs.svg")


def test_bars_of_figures_that_are_not_compared_have_no_ratio(tmp_path: Path) -> None:
    """Only one of the three figures of `neighbours` is compared with another layer."""
    neighbours = SCENARIOS["neighbours"]
    results = Results(["pg", "core"], [neighbours])
    for layer, speed in (("pg", 100.0), ("core", 80.0)):
        figures = {figure.name: speed for figure in neighbours.figures}
        results.add(neighbours, layer, Outcome(figures))
    assert drawing(results, tmp_path, "throughput.svg").count("(1.25x)") == 1  # of three


def test_curves_name_a_point_that_could_not_be_filled(tmp_path: Path) -> None:
    points = choose(["growth-waiting"], "full")[:2]
    results = Results(["pg", "core"], points)
    for layer in results.layers:
        results.add(points[0], layer, Outcome({"msg/s": 9.0, "p50": 1.0, "p99": 1.0}))
    results.add(points[1], "pg", Outcome({"msg/s": 9.0, "p50": 1.0, "p99": 1.0}))
    results.add(
        points[1],
        "core",
        Outcome(error="send: TimeoutError: could not be filled: messages: only 3"),
    )
    said = drawing(results, tmp_path, "growth-waiting.svg")
    assert "redis core, 1k: could not be filled" in said
    assert "pg_layer, 1k" not in said


def test_plots_of_the_same_results_are_the_same_files(tmp_path: Path) -> None:
    results = json.loads(written(sample_results(), tmp_path).read_text())
    first, second = (plots.draw(results, tmp_path / name) for name in ("first", "second"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_plots_with_png_option_writes_png_files(tmp_path: Path) -> None:
    assert plots.main([str(written(sample_results(), tmp_path)), str(tmp_path), "--png"]) == 0
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_figures_are_no_files(tmp_path: Path) -> None:
    results = Results(["pg"], [SCENARIOS["latency"], *MEMBERS])
    for point in MEMBERS:
        results.add(point, "pg", Outcome(error="it broke"))
    assert plots.draw(json.loads(written(results, tmp_path).read_text()), tmp_path / "plots") == []


def test_layers_have_the_same_colour_in_all_plots(tmp_path: Path) -> None:
    """The colour does not depend on the other layers in the plot."""
    results = Results(["core"], [SCENARIOS["throughput"]])
    results.add(SCENARIOS["throughput"], "core", Outcome({"msg/s": 1.0}))
    (alone,) = plots.draw(json.loads(written(results, tmp_path).read_text()), tmp_path / "alone")
    together = plots.draw(
        json.loads(written(sample_results(), tmp_path).read_text()), tmp_path / "all"
    )
    assert (
        len({colour_of(layer) for layer in ("pg", "core", "pubsub", "postgres", "memory", "bare")})
        == 6
    )
    for file in (alone, *together):
        assert colour_of("core").lower() in file.read_text().lower()
