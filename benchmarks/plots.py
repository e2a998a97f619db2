"""Drawings of results: how late messages arrive, how many a second, and what happens as things grow.

``python -m benchmarks.plots results.json FOLDER`` draws what ``--json`` wrote. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.statistics import percentile

Results = Mapping[str, Any]

#: Okabe and Ito's palette, which the colour-blind can tell apart; a layer has the same colour everywhere.
_COLOURS = {
    "pg": "#0072B2",
    "core": "#D55E00",
    "pubsub": "#E69F00",
    "postgres": "#009E73",
    "memory": "#56B4E9",
    "bare": "#555555",
}
_OTHER_COLOUR = "#CC79A7"
_MARKERS = {"pg": "o", "core": "s", "pubsub": "^", "postgres": "D", "memory": "v", "bare": "P"}
_MARKED = (50, 99)
_WIDTH = 8.0  # inches; 800 pixels wide at 100 dots an inch
_FOOT = 0.75
_HEAD = 0.95
_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "pg_layer",  # the same results make the same file
}


def draw(results: Results, folder: Path, *, suffix: str = "svg") -> list[Path]:
    """Draw all that the results have figures for; returns the files. ``suffix``: svg or png."""
    folder.mkdir(parents=True, exist_ok=True)
    scenarios: Results = results["scenarios"]
    plain = {name: scenario for name, scenario in scenarios.items() if not scenario["curve"]}
    curves: dict[str, list[Any]] = {}
    for scenario in scenarios.values():
        if scenario["curve"]:
            curves.setdefault(scenario["curve"]["name"], []).append(scenario)
    drawings: list[tuple[str, Figure | None]] = []
    with matplotlib.rc_context(_STYLE):
        drawings.append(("latency", _latency(results, plain)))
        for name, better in (("throughput", "higher"), ("costs", "lower")):
            drawings.append((name, _bars(results, plain, better)))
        drawings += [(name, _growth(results, points)) for name, points in curves.items()]
        files = []
        for name, figure in drawings:
            if figure is not None:
                files.append(folder / f"{name}.{suffix}")
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(files[-1], dpi=100, metadata=metadata)
    return files


# ---------------------------------------------------------------------- how late


def _latency(results: Results, scenarios: Results) -> Figure | None:
    """For each scenario with samples: which share of the messages had arrived after how long."""
    panels = []
    for scenario in scenarios.values():
        lines = {
            layer: sorted(age for outcome in measured["rounds"] for age in outcome["samples"])
            for layer, measured in scenario["layers"].items()
        }
        if any(lines.values()):
            panels.append((scenario["title"], lines))
    if not panels:
        return None
    with _page(
        results,
        "How late messages arrive",
        "Further left is better. The marks are at 50 % and at 99 % of the messages.",
        rows=len(panels),
        columns=1,
        height=2.6,
    ) as (figure, axes):
        for axis, (title, lines) in zip(axes, panels, strict=True):
            axis.set_title(_wrapped(title, 90))
            for layer, ages in lines.items():
                shares = [100 * index / max(len(ages) - 1, 1) for index in range(len(ages))]
                axis.plot(ages, shares, color=_colour(layer), linewidth=2.2 if layer == "pg" else 1.6)
                marks = [percentile(ages, share) for share in _MARKED]
                axis.plot(marks, _MARKED, _marker(layer), color=_colour(layer), clip_on=False)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(_thousands)
            axis.set_ylim(0, 101)
            axis.set_yticks([0, 50, 90, 99], ["0", "50", "90", "99 "])
            axis.set_ylabel("% arrived")
            axis.set_xlabel("milliseconds")
        return figure


# ---------------------------------------------------------------------- bars


def _bars(results: Results, scenarios: Results, better: str) -> Figure | None:
    """A panel for each figure of which more, or less, is better; beside the bars how far pg_layer is ahead.

    What the distribution of latencies shows already is left out.
    """
    panels = [
        (scenario, figure)
        for scenario in scenarios.values()
        for figure in scenario["figures"]
        if figure["better"] == better
        and scenario["layers"]
        and not any(outcome["samples"] for of in scenario["layers"].values() for outcome in of["rounds"])
    ]
    if not panels:
        return None
    more = "Longer bars are better" if better == "higher" else "Shorter bars are better"
    with _page(
        results,
        "How much gets through" if better == "higher" else "What it takes",
        f"{more}. In brackets: how many times better pg_layer is; below 1x it is behind. "
        "* it lost, doubled or reordered some.",
        rows=-(-len(panels) // 2),
        columns=2,
        height=1.05 + 0.27 * len(results["layers"]),
    ) as (figure, axes):
        for axis, (scenario, shown) in zip(axes, panels, strict=False):
            _bar_panel(axis, results, scenario, shown)
        return figure


def _bar_panel(axis: Axes, results: Results, scenario: Results, figure: Results) -> None:
    layers = [layer for layer in results["layers"] if layer in scenario["layers"]]
    values = [_median(scenario, layer, figure) for layer in layers]
    longest = max((value for value in values if math.isfinite(value)), default=1) or 1
    axis.set_title(_wrapped(scenario["title"], 40), fontsize=9)
    axis.barh(
        range(len(layers)),
        [value if math.isfinite(value) else 0 for value in values],
        color=[_colour(layer) for layer in layers],
        height=0.72,
    )
    for index, (layer, value) in enumerate(zip(layers, values, strict=True)):
        axis.text(
            (value if math.isfinite(value) else 0) + longest * 0.015,
            index,
            _bar_label(scenario, layer, figure, value),
            va="center",
            fontsize=8.5,
        )
    axis.set_yticks(range(len(layers)), [results["layers"][layer] for layer in layers])
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.42)
    axis.set_xlabel(_label(figure))
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(_thousands)
    axis.locator_params(axis="x", nbins=4)


def _bar_label(scenario: Results, layer: str, figure: Results, value: float) -> str:
    if not math.isfinite(value):
        return "failed" if scenario["layers"][layer]["median"]["errors"] else "none"
    ratio = scenario["ratios"].get(figure["name"], {}).get(layer)
    faulty = any(scenario["layers"][layer]["median"]["tally"].values())
    label = _number(value) + (f"  ({ratio:.2f}x)" if ratio is not None else "")
    return f"{label}*" if faulty else label


# ---------------------------------------------------------------------- growth


def _growth(results: Results, points: Sequence[Results]) -> Figure | None:
    """A panel for each figure, a line for each layer, both axes logarithmic."""
    points = sorted(points, key=lambda point: int(point["curve"]["x"]))
    xs = [int(point["curve"]["x"]) for point in points]
    panels = [
        (figure, lines)
        for figure in points[0]["figures"]
        if any((lines := {layer: _line(points, layer, figure) for layer in results["layers"]}).values())
    ]
    if not panels:
        return None
    columns = min(len(panels), 2)
    with _page(
        results,
        f"Growth: {points[0]['curve']['axis']}",
        "Both axes are logarithmic. A line ends where its layer failed or was stopped; "
        "a hollow mark: some were lost, doubled or reordered.",
        rows=-(-len(panels) // columns),
        columns=columns,
        height=2.5,
    ) as (figure, axes):
        for axis, (shown, lines) in zip(axes, panels, strict=False):
            _growth_panel(axis, shown, lines, xs)
            axis.set_xlabel(points[0]["curve"]["axis"])
        return figure


#: Of each point that has a figure: x, the figure, and whether messages went astray.
Line = Sequence[tuple[int, float, bool]]


def _line(points: Sequence[Results], layer: str, figure: Results) -> Line:
    line = []
    for point in points:
        if layer in point["layers"] and math.isfinite(value := _median(point, layer, figure)):
            faulty = any(point["layers"][layer]["median"]["tally"].values())
            line.append((int(point["curve"]["x"]), value, faulty))
    return line


def _growth_panel(axis: Axes, figure: Results, lines: Mapping[str, Line], xs: Sequence[int]) -> None:
    for layer, line in [*lines.items()][::-1]:  # the first one, pg_layer, on top of the others
        colour = _colour(layer)
        axis.plot([x for x, _, _ in line], [y for _, y, _ in line], color=colour, linewidth=1.8)
        for x, y, faulty in line:
            axis.plot(x, y, _marker(layer), color=colour, markerfacecolor="white" if faulty else colour)
    better = "higher is better" if figure["better"] == "higher" else "lower is better"
    axis.set_title(f"{_label(figure)}: {better}")
    _scale(axis.set_xscale, xs)
    axis.set_xticks(xs, [_short(x) for x in xs])
    axis.xaxis.set_minor_locator(NullLocator())
    values = [y for line in lines.values() for _, y, _ in line]
    _scale(axis.set_yscale, values)
    low, high = min(values), max(values)
    # Values that hardly differ would otherwise fill the panel, and look like much.
    top = max(high * 2, low * 5) or 1
    axis.set_ylim(low / 2 if low > 0 else -min([value for value in values if value > 0] or [1]) / 3, top)
    if 0 < top < 100 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(_thousands)
    axis.yaxis.set_minor_locator(NullLocator())


def _scale(choose: Callable[..., None], values: Sequence[float]) -> None:
    """Logarithmic, with a place for zero if there is one."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        choose("log")
    elif positive:
        choose("symlog", linthresh=min(positive), linscale=0.5)


# ---------------------------------------------------------------------- what all have in common


@contextmanager
def _page(
    results: Results, title: str, hint: str, *, rows: int, columns: int, height: float
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels, a headline, a legend of the layers, and below what it was measured on."""
    total = rows * height + _HEAD + _FOOT
    hint = _wrapped(hint, 115)
    head = _HEAD + 0.16 * hint.count("\n")
    below_head = (0, _FOOT / total, 1, 1 - (head + _FOOT) / total)
    layout = ConstrainedLayoutEngine(rect=below_head, h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(_WIDTH, total), layout=layout)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
    yield figure, axes
    for axis in axes:
        if not axis.has_data():
            axis.set_axis_off()
    figure.text(0.012, 1 - 0.12 / total, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.42 / total, hint, fontsize=9.5, color="#444444", va="top")
    handles = [
        Line2D([], [], color=_colour(layer), marker=_marker(layer), linewidth=2, label=label)
        for layer, label in results["layers"].items()
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - (head - 0.35) / total),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        borderaxespad=0,
    )
    figure.text(0.012, 0.1 / total, _footnote(results), fontsize=7.5, color="#666666", va="bottom")


def _footnote(results: Results) -> str:
    """Machine, versions and settings: figures mean nothing without."""
    machine, options = results["machine"], results["options"]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    servers = "; ".join(
        f"{name} " + ", ".join(v if k == "server_version" else f"{k} {v}" for k, v in settings.items())
        for name, settings in results["servers"].items()
    )
    text = (
        f"{results['date'][:10]}, {options['scale']} run, median of {options['rounds']} round(s),"
        f" {machine['cores']} x {machine['cpu']}, {machine['system']}, Python {machine['python']};"
        f" {packages}; {servers}"
    )
    return _wrapped(text, 150)


def _median(scenario: Results, layer: str, figure: Results) -> float:
    value = scenario["layers"][layer]["median"]["figures"].get(figure["name"])
    return math.nan if value is None else float(value)


def _colour(layer: str) -> str:
    return _COLOURS.get(layer, _OTHER_COLOUR)


def _marker(layer: str) -> str:
    return _MARKERS.get(layer, "X")


def _label(figure: Results) -> str:
    name, unit = figure["name"], figure["unit"]
    return str(unit) if name == unit else f"{name}, {unit}"


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _short(value: float) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


_thousands = FuncFormatter(lambda value, position: _short(value))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw results again.")
    parser.add_argument("results", type=Path, metavar="FILE", help="what python -m benchmarks --json wrote")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the drawings go")
    parser.add_argument("--png", action="store_true", help="PNG files in place of SVG")
    parsed = parser.parse_args(arguments)
    results = json.loads(parsed.results.read_text())
    for file in draw(results, parsed.folder, suffix="png" if parsed.png else "svg"):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
