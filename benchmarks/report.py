"""The output: a table for the terminal, JSON, and progress meanwhile."""

from __future__ import annotations

import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from benchmarks.layers import KINDS
from benchmarks.scenarios.base import Scenario
from benchmarks.statistics import Figure, Outcome, Summary, Tally, ratio, summarise

_PACKAGES = (
    "pg-layer",
    "channels",
    "channels-redis",
    "channels-postgres",
    "redis",
    "hiredis",
    "psycopg",
    "psycopg-pool",
    "Django",
)

#: A machine with a larger load average per core is too busy for measurements.
_BUSY = 0.5

#: Six layers side by side stay within 160 columns.
_CELL = 18


@dataclass
class Results:
    """All outcomes of a run: scenario name -> layer name -> one outcome for each round.

    ``round`` is the number of the current or last round.
    """

    layers: Sequence[str]
    scenarios: Sequence[Scenario]
    outcomes: dict[str, dict[str, list[Outcome]]] = field(default_factory=dict)
    round: int = 0
    interrupted: bool = False

    def add(self, scenario: Scenario, layer: str, outcome: Outcome) -> None:
        self.outcomes.setdefault(scenario.name, {}).setdefault(layer, []).append(outcome)

    def summary(self, scenario: Scenario, layer: str) -> Summary:
        return summarise(self.outcomes.get(scenario.name, {}).get(layer, []), scenario.figures)

    @property
    def failed(self) -> bool:
        """Return whether pg_layer failed or lost, doubled or reordered a message."""
        own = [outcome for layers in self.outcomes.values() for outcome in layers.get("pg", [])]
        return any(outcome.error is not None or outcome.tally for outcome in own)

    def ratios(self, scenario: Scenario, figure: Figure) -> dict[str, float]:
        """Return pg_layer's lead over each other layer, empty for figures without direction."""
        if "pg" not in self.layers or figure.better is None:
            return {}
        own = self.summary(scenario, "pg").figures[figure.name]
        return {
            layer: ratio(own, self.summary(scenario, layer).figures[figure.name], figure.better)
            for layer in self.layers
            if layer != "pg"
        }

    def as_json(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole run for JSON, with null for NaN."""
        scenarios = {}
        for scenario in self.scenarios:
            layers = {
                layer: {
                    "median": asdict(self.summary(scenario, layer)),
                    "rounds": [asdict(outcome) for outcome in outcomes],
                }
                for layer, outcomes in self.outcomes.get(scenario.name, {}).items()
            }
            scenarios[scenario.name] = {
                "title": scenario.title,
                "curve": asdict(scenario.curve) if scenario.curve else None,
                "figures": [asdict(figure) for figure in scenario.figures],
                "layers": layers,
                "ratios": {
                    figure.name: self.ratios(scenario, figure) for figure in scenario.figures
                },
            }
        plain = _plain({**context, "layers": {name: KINDS[name].title for name in self.layers}})
        return {**plain, "interrupted": self.interrupted, "scenarios": _plain(scenarios)}

    def as_table(self) -> str:
        """Return a line for each figure with all layers, followed by what went wrong."""
        rows = [["scenario", "", *(KINDS[layer].title for layer in self.layers)]]
        for scenario in self._measured:
            summaries = [self.summary(scenario, layer) for layer in self.layers]
            for index, figure in enumerate(scenario.figures):
                name = scenario.name if index == 0 else ""
                cells = [_number(summary.figures[figure.name]) for summary in summaries]
                rows.append([name, figure.label, *cells])
            rows += _wrap(["", "faults", *(faults(summary) for summary in summaries)])
            if any(notes := [notes_of(summary) for summary in summaries]):
                rows += _wrap(["", "notes", *notes])
        return _align(rows)

    def as_ratios(self) -> str:
        """Return pg_layer's lead over each other layer, and its share of the bare measurement.

        Return "" if pg_layer is the only layer.
        """
        others = [layer for layer in self.layers if layer != "pg"] if "pg" in self.layers else []
        if not others:
            return ""
        bare = {layer for layer in others if KINDS[layer].played == "bare"}
        rows = [
            [
                "pg_layer",
                "",
                *(f"{'of' if layer in bare else 'vs'} {KINDS[layer].title}" for layer in others),
            ]
        ]
        for scenario in self._measured:
            tallies = {layer: self.summary(scenario, layer).tally for layer in others}
            lines = []
            for figure in scenario.figures:
                if not (ratios := self.ratios(scenario, figure)):
                    continue
                cells = [
                    _times(ratios[layer], tallies[layer], share=layer in bare) for layer in others
                ]
                lines.append([figure.label, *cells])
            rows += _named(scenario, lines)
        return _align(rows) if len(rows) > 1 else ""

    def as_ranges(self) -> str:
        """Return the lowest and highest values of the rounds, or "" without several rounds."""
        rows = [["range", "", *(KINDS[layer].title for layer in self.layers)]]
        for scenario in self._measured:
            measured = self.outcomes[scenario.name]
            lines = [
                [figure.label, *(_range(measured.get(layer, []), figure) for layer in self.layers)]
                for figure in scenario.figures
            ]
            rows += _named(scenario, lines)
        return _align(rows) if len(rows) > 1 else ""

    @property
    def _measured(self) -> list[Scenario]:
        return [scenario for scenario in self.scenarios if scenario.name in self.outcomes]


def faults(summary: Summary) -> str:
    """Return what must not happen in words: losses, copies, disorder, failed rounds."""
    tally: Tally = summary.tally
    counts = (
        (tally.lost, "lost"),
        (tally.twice, "twice"),
        (tally.disorder, "disorder"),
        (tally.stray, "stray"),
    )
    words = [f"{count:,} {name}" for count, name in counts if count]
    words += [f"{len(summary.errors)} failed"] if summary.errors else []
    if not any(not math.isnan(value) for value in summary.figures.values()) and not words:
        return "not run"
    return ", ".join(words) or "none"


def notes_of(result: Summary | Outcome) -> str:
    """Return other notes in words: full channels, messages that were given up, and others."""
    return ", ".join(f"{value:,.0f} {name}" for name, value in result.notes.items() if value)


def load_average() -> list[float] | None:
    """Return the load averages of 1, 5 and 15 minutes, or None if the system has none."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except OSError:
        return None


def context(
    options: Mapping[str, Any],
    servers: Mapping[str, Mapping[str, str]],
    durability: Mapping[str, str] | None = None,
    load_at_start: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return what is needed to judge the figures: machine, versions, settings, options.

    ``durability``: how durable the writes of each layer are.
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "servers": {name: dict(settings) for name, settings in servers.items()},
        "durability": dict(durability or {}),
        "load average": {"start": load_at_start, "end": load_average()},
        "options": dict(options),
    }


def headline(context: Mapping[str, Any]) -> str:
    """Return the context as the lines above the table."""
    machine = context["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in context["packages"].items())
    servers = "; ".join(
        f"{name} "
        + ", ".join(v if k == "server_version" else f"{k} {v}" for k, v in settings.items())
        for name, settings in context["servers"].items()
    )
    first = f"{machine['cores']} x {machine['cpu']}, Python {machine['python']}, {packages}"
    return "\n".join(filter(None, [first, servers, _durability(context), *_load(context)]))


def _durability(context: Mapping[str, Any]) -> str:
    titles: dict[str, list[str]] = {}
    for layer, durability in context["durability"].items():
        titles.setdefault(durability, []).append(KINDS[layer].title)
    words = [f"{', '.join(names)}: {durability}" for durability, names in titles.items()]
    return f"the layers' own writes: {'; '.join(words)}" if words else ""


def _load(context: Mapping[str, Any]) -> list[str]:
    """Return the load of the machine, with a warning if it was high before the run."""
    loads, cores = context["load average"], context["machine"]["cores"] or 1
    if not loads["start"] or not loads["end"]:
        return []
    start, end = loads["start"][0], loads["end"][0]
    lines = [f"load average (1 minute): {start:.2f} at the start, {end:.2f} at the end"]
    if start > _BUSY * cores:
        lines.append(
            "WARNING: the machine was busy with something else when the run began;"
            " the figures are lower, and differ more, than on an idle one."
        )
    return lines


class Progress:
    """Progress output: a changing line on a terminal, otherwise a line for each measurement."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._label = ""

    def begin(self, label: str) -> None:
        self._label = label
        self._draw("")

    def update(self, deliveries: int) -> None:
        if deliveries:
            self._draw(f"{deliveries:,} delivered")

    def end(self, scenario: Scenario, outcome: Outcome) -> None:
        figures = ", ".join(
            f"{_number(outcome.figures[f.name])} {f.label}"
            for f in scenario.figures
            if outcome.figures
        )
        wrong = faults(Summary(outcome.figures, outcome.tally, {}, [])) if outcome.tally else ""
        line = "; ".join(
            part for part in (outcome.error or figures, wrong, notes_of(outcome)) if part
        )
        print(
            f"\r\x1b[K{self._label}: {line}" if self._live else f"{self._label}: {line}",
            file=self._stream,
            flush=True,
        )

    def _draw(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[K{self._label} … {text}", end="", file=self._stream, flush=True)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _short(value: float) -> str:
    """Return a figure with three digits."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{float(f'{value / unit:.3g}'):g}{name}"
    return f"{float(f'{value:.3g}'):g}"


def _range(outcomes: Sequence[Outcome], figure: Figure) -> str:
    values = [outcome.figures.get(figure.name, math.nan) for outcome in outcomes]
    values = [value for value in values if not math.isnan(value)]
    return f"{_short(min(values))} … {_short(max(values))}" if len(values) > 1 else "-"


def _named(scenario: Scenario, lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows below the scenario's name, without rows that are empty but for a label."""
    kept = [line for line in lines if any(cell != "-" for cell in line[1:])]
    return [[scenario.name if index == 0 else "", *line] for index, line in enumerate(kept)]


def _times(value: float, tally: Tally, *, share: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return (f"{value:.0%}" if share else f"{value:.2f}x") + ("*" if tally else "")


def _wrap(row: Sequence[str]) -> list[list[str]]:
    """Return a row, with cells that are wider than a column continued below."""
    cells = [textwrap.wrap(cell, _CELL) for cell in row]
    return [list(line) for line in zip_longest(*cells, fillvalue="")]


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        texts = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
