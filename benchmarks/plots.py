"""Drawings of results: latency, throughput and growth.

``python -m benchmarks.plots results.json FOLDER`` draws the file of ``--json``. Nothing is
measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.canvas import (
    STYLE,
    Results,
    colour_of,
    label_of,
    marker_of,
    number,
    page,
    short,
    thousands,
    wrapped,
)
from benchmarks.statistics import NOT_FILLED, percentile

_MARKED = (50, 99)
#: The ceiling without a layer. As a bar it would make the bars of the layers short, so it is a
#: line.
_CEILING = "bare"
#: Approximate inches: a character of a bar's label, and the narrowest axis of bars.
_CHARACTER = 0.068
_BARS_WIDTH = 2.4


def draw(results: Results, folder: Path, *, suffix: str = "svg") -> list[Path]:
    """Draw everything that the results have figures for; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    scenarios: Results = results["scenarios"]
    plain = {name: scenario for name, scenario in scenarios.items() if not scenario["curve"]}
    curves: dict[str, list[Results]] = {}
    for scenario in scenarios.values():
        if scenario["curve"]:
            curves.setdefault(scenario["curve"]["name"], []).append(scenario)
    drawings: list[tuple[str, Figure | None]] = []
    with matplotlib.rc_context(STYLE):
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
    """Draw for each scenario with samples which share of the messages arrived after which time."""
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
    with page(
        results,
        "How late messages arrive",
        "Further left is better. The marks are at 50 % and at 99 % of the messages.",
        layers={layer for _, lines in panels for layer, ages in lines.items() if ages},
        rows=len(panels),
        columns=1,
        height=2.6,
    ) as (figure, axes):
        for axis, (title, lines) in zip(axes, panels, strict=True):
            axis.set_title(wrapped(title, 90))
            for layer, ages in lines.items():
                shares = [100 * index / max(len(ages) - 1, 1) for index in range(len(ages))]
                axis.plot(
                    ages, shares, color=colour_of(layer), linewidth=2.2 if layer == "pg" else 1.6
                )
                marks = [percentile(ages, share) for share in _MARKED]
                axis.plot(marks, _MARKED, marker_of(layer), color=colour_of(layer), clip_on=False)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(thousands)
            axis.set_ylim(0, 101)
            axis.set_yticks([0, 50, 90, 99], ["0", "50", "90", "99 "])
            axis.set_ylabel("% arrived")
            axis.set_xlabel("milliseconds")
        return figure


# ---------------------------------------------------------------------- bars


def _bars(results: Results, scenarios: Results, better: str) -> Figure | None:
    """Draw a panel for each figure that has a better direction, with pg_layer's lead.

    A scenario with several panels has one title and its own rows. Figures that the distribution of
    latencies shows are left out.
    """
    cells: list[_Cell | None] = []
    for scenario in scenarios.values():
        sampled = any(
            outcome["samples"] for of in scenario["layers"].values() for outcome in of["rounds"]
        )
        figures = [figure for figure in scenario["figures"] if figure["better"] == better]
        if sampled or not figures or not scenario["layers"]:
            continue
        if len(figures) == 1:
            cells.append((scenario, figures[0], wrapped(scenario["title"], 34)))
            continue
        cells += [None] * (len(cells) % 2)
        titles = [wrapped(scenario["title"], 85), *[""] * (len(figures) - 1)]
        cells += [(scenario, figure, title) for figure, title in zip(figures, titles, strict=True)]
        cells += [None] * (len(cells) % 2)
    if not cells:
        return None
    more = "Longer bars are better" if better == "higher" else "Shorter bars are better"
    with page(
        results,
        "How much gets through" if better == "higher" else "What it takes",
        f"{more}. In brackets: how many times better pg_layer is; below 1x it is behind. "
        "* it lost, doubled or reordered some. Whiskers: the lowest and the highest of the rounds. "
        "A dashed line: what PostgreSQL does without a layer.",
        layers={layer for cell in cells if cell for layer in cell[0]["layers"]},
        rows=-(-len(cells) // 2),
        columns=2,
        height=1.2 + 0.27 * len(results["layers"]),
    ) as (figure, axes):
        for axis, cell in zip(axes, cells, strict=False):
            if cell is not None:
                _bar_panel(axis, results, *cell)
        return figure


#: A scenario, one of its figures, and the title above.
_Cell = tuple[Results, Results, str]


def _bar_panel(
    axis: Axes, results: Results, scenario: Results, figure: Results, title: str
) -> None:
    measured = [layer for layer in results["layers"] if layer in scenario["layers"]]
    layers = [layer for layer in measured if layer != _CEILING] or measured
    values = [_median(scenario, layer, figure) for layer in layers]
    widths = [
        max(value, 0) if math.isfinite(value) else 0 for value in values
    ]  # a negative value is noise
    longest = max(widths, default=1) or 1
    axis.set_title(title, fontsize=9)
    axis.barh(
        range(len(layers)),
        widths,
        color=[colour_of(layer) for layer in layers],
        height=0.72,
    )
    limit = longest
    for index, (layer, value, width) in enumerate(zip(layers, values, widths, strict=True)):
        low, high = _range(scenario, layer, figure)
        if low < high:
            whisker = [[max(width - low, 0)], [max(high - width, 0)]]
            axis.errorbar(width, index, xerr=whisker, color="#222222", linewidth=1, capsize=2.5)
        end = max(width, high)
        label = _bar_label(scenario, layer, figure, value)
        axis.text(
            end + longest * 0.025,
            index,
            label,
            va="center",
            fontsize=8.5,
            bbox={
                "facecolor": "white",
                "edgecolor": "none",
                "pad": 0.5,
            },  # the dashed line stays behind the bars
        )
        # Space for the label, whose width does not depend on the length of the axis.
        limit = max(limit, end / (1 - min(len(label) * _CHARACTER / _BARS_WIDTH + 0.03, 0.7)))
    caption = label_of(figure)
    if _CEILING in measured and _CEILING not in layers:
        ceiling = _median(scenario, _CEILING, figure)
        caption += (
            f"\n{results['layers'][_CEILING]}: {_bar_label(scenario, _CEILING, figure, ceiling)}"
        )
        if ceiling <= limit:
            axis.axvline(
                ceiling, color=colour_of(_CEILING), linewidth=1, linestyle="--", zorder=0.5
            )
    axis.set_yticks(range(len(layers)), [results["layers"][layer] for layer in layers])
    axis.invert_yaxis()
    axis.set_xlim(0, limit)
    axis.set_xlabel(caption, fontsize=9, loc="left")
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(thousands)
    axis.locator_params(axis="x", nbins=4)


def _bar_label(scenario: Results, layer: str, figure: Results, value: float) -> str:
    if not math.isfinite(value):
        return "failed" if scenario["layers"][layer]["median"]["errors"] else "n/a"
    ratios = scenario["ratios"].get(figure["name"], {})
    ratio = ratios.get(layer)
    faulty = any(scenario["layers"][layer]["median"]["tally"].values())
    label = number(value) + (f"  ({ratio:.2f}x)" if ratio is not None else "")
    return f"{label}*" if faulty else label


# ---------------------------------------------------------------------- growth


def _growth(results: Results, points: Sequence[Results]) -> Figure | None:
    """Draw a panel for each figure and a line for each layer, with logarithmic axes."""
    points = sorted(points, key=lambda point: int(point["curve"]["x"]))
    xs = [int(point["curve"]["x"]) for point in points]
    unfilled = {
        layer: x for layer in results["layers"] if (x := _unfilled(points, layer)) is not None
    }
    panels = [
        (figure, lines)
        for figure in points[0]["figures"]
        if any(
            (lines := {layer: _line(points, layer, figure) for layer in results["layers"]}).values()
        )
    ]
    if not panels:
        return None
    columns = min(len(panels), 2)
    with page(
        results,
        f"Growth: {points[0]['curve']['axis']}",
        "Both axes are logarithmic. A line ends where its layer failed or was stopped; "
        "a hollow mark: some were lost, doubled or reordered.",
        layers={layer for _, lines in panels for layer, line in lines.items() if line}
        | unfilled.keys(),
        rows=-(-len(panels) // columns),
        columns=columns,
        height=2.5,
    ) as (figure, axes):
        for axis, (shown, lines) in zip(axes, panels, strict=False):
            _growth_panel(axis, shown, lines, xs)
            for row, (layer, x) in enumerate(unfilled.items()):
                text = f"{results['layers'][layer]}, {short(x)}: {NOT_FILLED}"
                place = (0.98, 0.03 + 0.08 * row)
                axis.text(
                    *place,
                    text,
                    color=colour_of(layer),
                    fontsize=7.5,
                    ha="right",
                    transform=axis.transAxes,
                )
            axis.set_xlabel(points[0]["curve"]["axis"])
        return figure


def _unfilled(points: Sequence[Results], layer: str) -> int | None:
    """Return the first x at which the waiting messages were not stored in time."""
    for point in points:
        errors = point["layers"][layer]["median"]["errors"] if layer in point["layers"] else []
        if any(NOT_FILLED in error for error in errors):
            return int(point["curve"]["x"])
    return None


#: For each point with a figure: x, the figure, and whether messages were lost or doubled.
Line = Sequence[tuple[int, float, bool]]


def _line(points: Sequence[Results], layer: str, figure: Results) -> Line:
    line = []
    for point in points:
        if layer in point["layers"] and math.isfinite(value := _median(point, layer, figure)):
            faulty = any(point["layers"][layer]["median"]["tally"].values())
            line.append((int(point["curve"]["x"]), value, faulty))
    return line


def _growth_panel(
    axis: Axes, figure: Results, lines: Mapping[str, Line], xs: Sequence[int]
) -> None:
    for layer, line in [*lines.items()][::-1]:  # pg_layer, the first one, above the others
        colour = colour_of(layer)
        axis.plot([x for x, _, _ in line], [y for _, y, _ in line], color=colour, linewidth=1.8)
        for x, y, faulty in line:
            axis.plot(
                x, y, marker_of(layer), color=colour, markerfacecolor="white" if faulty else colour
            )
    better = "higher is better" if figure["better"] == "higher" else "lower is better"
    axis.set_title(f"{label_of(figure)}: {better}")
    _scale(axis.set_xscale, xs)
    axis.set_xticks(xs, [short(x) for x in xs])
    axis.xaxis.set_minor_locator(NullLocator())
    values = [y for line in lines.values() for _, y, _ in line]
    _scale(axis.set_yscale, values)
    low, high = min(values), max(values)
    # Otherwise values that hardly differ would fill the panel and appear very different.
    top = max(high * 2, low * 5) or 1
    axis.set_ylim(
        low / 2 if low > 0 else -min([value for value in values if value > 0] or [1]) / 3, top
    )
    if 0 < top < 100 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(thousands)
    axis.yaxis.set_minor_locator(NullLocator())


def _scale(choose: Callable[..., None], values: Sequence[float]) -> None:
    """Scale an axis logarithmically, with a place for zero if a value is zero."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        choose("log")
    elif positive:
        choose("symlog", linthresh=min(positive), linscale=0.5)


def _range(scenario: Results, layer: str, figure: Results) -> tuple[float, float]:
    """Return the lowest and highest figure of the rounds, or two zeros without figures."""
    found = [
        outcome["figures"].get(figure["name"]) for outcome in scenario["layers"][layer]["rounds"]
    ]
    values = [max(float(value), 0) for value in found if value is not None]
    return min(values, default=0), max(values, default=0)


def _median(scenario: Results, layer: str, figure: Results) -> float:
    value = scenario["layers"][layer]["median"]["figures"].get(figure["name"])
    return math.nan if value is None else float(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description="Draw results again."
    )
    parser.add_argument(
        "results", type=Path, metavar="FILE", help="what python -m benchmarks --json wrote"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the drawings go")
    parser.add_argument("--png", action="store_true", help="PNG files in place of SVG")
    parsed = parser.parse_args(arguments)
    results = json.loads(parsed.results.read_text())
    for file in draw(results, parsed.folder, suffix="png" if parsed.png else "svg"):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
