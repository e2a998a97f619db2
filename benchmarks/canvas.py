"""Shared parts of the drawings: colours, headline, legend, footnote and number formats."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

#: The content that ``--json`` writes, or a part of it.
Results = Mapping[str, Any]

#: The palette of Okabe and Ito, which colour-blind readers can distinguish. A layer has the same
#: colour in all drawings.
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
_WIDTH = 8.0  # inches; 800 pixels wide at 100 dots an inch
_FOOT = 0.75
_HEAD = 0.95
#: Settings of matplotlib.
STYLE: Any = {
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
    "svg.fonttype": "none",  # text stays text, so that the files are small and can be searched
    "svg.hashsalt": "pg_layer",  # the same results produce the same file
}


@contextmanager
def page(
    results: Results,
    title: str,
    hint: str,
    *,
    layers: Collection[str],
    rows: int,
    columns: int,
    height: float,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels, a headline, a legend of the layers and a footnote."""
    hint = wrapped(hint, 105)
    head = _HEAD + 0.16 * hint.count("\n")
    total = rows * height + head + _FOOT
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
        Line2D([], [], color=colour_of(layer), marker=marker_of(layer), linewidth=2, label=label)
        for layer, label in results["layers"].items()
        if layer in layers
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - (head - 0.35) / total),
        ncols=max(len(handles), 1),
        frameon=False,
        fontsize=9,
        borderaxespad=0,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    figure.text(0.012, 0.1 / total, _footnote(results), fontsize=7.5, color="#666666", va="bottom")


def _footnote(results: Results) -> str:
    """Return machine, versions and settings, without which figures mean nothing."""
    machine, options = results["machine"], results["options"]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    servers = "; ".join(
        f"{name} "
        + ", ".join(v if k == "server_version" else f"{k} {v}" for k, v in settings.items())
        for name, settings in results["servers"].items()
    )
    text = (
        f"{results['date'][:10]}, {options['scale']} run, median of {options['rounds']} round(s),"
        f" {machine['cores']} x {machine['cpu']}, {machine['system']}, Python {machine['python']};"
        f" {packages}; {servers}"
    )
    return wrapped(text, 150)


def colour_of(layer: str) -> str:
    return _COLOURS.get(layer, _OTHER_COLOUR)


def marker_of(layer: str) -> str:
    return _MARKERS.get(layer, "X")


def label_of(figure: Results) -> str:
    name, unit = figure["name"], figure["unit"]
    return str(unit) if name == unit else f"{name}, {unit}"


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def short(value: float) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


thousands = FuncFormatter(lambda value, position: short(value))
