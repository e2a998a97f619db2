"""``python -m benchmarks.compare --before PATH``: compare two source trees of pg_layer.

Each tree has its own PostgreSQL server, with ``fsync`` on, and for each measurement a new database
with the tables of its own migrations. Every round visits all measurements and, in each measurement,
both trees in turn. The table shows the medians of the rounds, and the lowest and highest values.

Both trees run in this interpreter, with its libraries and the harness of this tree. Only
``pg_layer`` and its migrations differ. They are copied when the run begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cli import check_file
from benchmarks.compared.points import ON_DEMAND, POINTS, choose
from benchmarks.report import context, headline, load_average
from benchmarks.servers import PostgresObserver
from benchmarks.signals import interrupt_on_signals
from devtools.postgres import PostgresServer

ROOT = Path(__file__).parents[1]
TREES = ("before", "after")
#: 64 receiving processes have three connections each.
_CONNECTIONS = 300
#: Replaces a missing figure.
_NONE = "-"
#: Seconds that a measurement may take in addition to the sending of an endurance run.
_TIMEOUT = 900.0

#: (what, unit) -> the values of all rounds
Values = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Tree:
    """A source tree. The folder ``stage`` contains its ``pg_layer`` with the migrations inside."""

    name: str
    stage: Path
    server: str


@dataclass(frozen=True)
class Failure:
    """A measurement without a result; the message gives the reason."""

    point: str
    tree: str
    why: str


class Comparison:
    """The results of all rounds, by point and tree: the parsed JSON of each round."""

    def __init__(self, points: Sequence[str]) -> None:
        self.results: dict[str, dict[str, list[dict[str, Any]]]] = {
            point: {tree: [] for tree in TREES} for point in points
        }
        self.failures: list[Failure] = []

    def values(self, point: str, tree: str) -> Values:
        found: Values = {}
        for result in self.results[point][tree]:
            for reading in result["readings"]:
                key = (reading["what"], reading["unit"])
                found.setdefault(key, []).append(reading["value"])
        return found

    def as_markdown(self) -> str:
        """Return a line for each figure: medians, ranges of the rounds and the ratio."""
        lines = ["| | | before | after | after / before |", "|---|---|---|---|---|"]
        for point in self.results:
            before, after = (self.values(point, tree) for tree in TREES)
            name = f"`{point}`"
            for what, unit in dict.fromkeys([*before, *after]):
                old, new = before.get((what, unit), []), after.get((what, unit), [])
                label = f"{what}: {unit}" if what else unit
                cells = [name, label, _cell(old), _cell(new), _quotient(old, new)]
                lines.append(f"| {' | '.join(cells)} |")
                name = ""
        if self.failures:
            lines.append("")
        for failure in self.failures:
            why = failure.why.splitlines()[-1]
            lines.append(f"- FAILED: `{failure.point}`, {failure.tree}: {why}")
        return "\n".join(lines)

    def as_json(self, known: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **known,
            "points": {
                point: {
                    "rounds": rounds,
                    "medians": {
                        tree: {
                            f"{what}: {unit}": statistics.median(values)
                            for (what, unit), values in self.values(point, tree).items()
                        }
                        for tree in TREES
                    },
                }
                for point, rounds in self.results.items()
            },
            "failures": [vars(failure) for failure in self.failures],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the trees. Return the exit code.

    0: measured; 1: a measurement failed; 130: interrupted.
    """
    interrupt_on_signals()
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        points = choose(list(filter(None, options.scenarios.split(","))))
        if options.json:
            check_file(Path(options.json))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    load = load_average()
    comparison = Comparison(points)
    servers: dict[str, dict[str, str]] = {}
    interrupted = False
    try:
        with _trees({"before": options.before, "after": options.after}) as trees:
            with closing(PostgresObserver(trees[0].server)) as observer:
                servers["postgres"] = observer.describe()
            _measure(comparison, trees, options)
    except KeyboardInterrupt:  # the results so far are shown
        interrupted = True
    names = ("rounds", "seconds", "endurance_seconds")
    known = context({name: getattr(options, name) for name in names}, servers, load_at_start=load)
    print(headline(known), comparison.as_markdown(), sep="\n\n")
    if options.json:
        written = {**comparison.as_json(known), "interrupted": interrupted}
        Path(options.json).write_text(json.dumps(written, indent=2) + "\n")
    if interrupted:
        return 130
    return 1 if comparison.failures else 0


def _measure(comparison: Comparison, trees: Sequence[Tree], options: argparse.Namespace) -> None:
    total = options.rounds * len(comparison.results) * len(trees)
    done = 0
    for number in range(options.rounds):
        for point, results in comparison.results.items():
            for tree in trees if number % 2 == 0 else reversed(trees):
                done += 1
                start = time.monotonic()
                try:
                    result = _run(point, tree, options.seconds, options.endurance_seconds)
                except RuntimeError as error:
                    comparison.failures.append(Failure(point, tree.name, str(error)))
                    summary = f"FAILED\n{error}"
                else:
                    results[tree.name].append(result)
                    summary = ", ".join(map(_text, result["readings"]))
                took = time.monotonic() - start
                print(
                    f"{done}/{total} {point} {tree.name} ({took:.0f} s): {summary}",
                    file=sys.stderr,
                    flush=True,
                )


def _run(point: str, tree: Tree, seconds: float, endurance: float) -> dict[str, Any]:
    """Measure in a new process that imports the tree's pg_layer and this tree's harness."""
    module = [sys.executable, "-m", "benchmarks.compared"]
    # The current folder comes first in the path of the new process and of its children.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    process = subprocess.Popen(
        [*module, point, tree.server, str(seconds), str(endurance)],
        cwd=tree.stage,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, so that all its processes can be killed
    )
    with process:
        try:
            output, errors = process.communicate(timeout=_TIMEOUT + endurance)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"not done after {error.timeout:g} s") from None
            raise
    if process.returncode:
        raise RuntimeError(errors.strip() or f"exit code {process.returncode}")
    result: dict[str, Any] = json.loads(output)
    return result


@contextmanager
def _trees(paths: Mapping[str, Path]) -> Iterator[list[Tree]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pg_layer_compare_")))
        trees = []
        for name, path in paths.items():
            stage = folder / name
            _copy(path, stage / "pg_layer")
            server = stack.enter_context(PostgresServer(fsync=True, max_connections=_CONNECTIONS))
            trees.append(Tree(name, stage, server.dsn()))
        yield trees


def _copy(tree: Path, package: Path) -> None:
    """Copy the package of the tree with its migrations to the place of the package's imports."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_source(tree), package, ignore=ignore)
    if not (package / "migrations").exists():
        shutil.copytree(tree / "migrations", package / "migrations", ignore=ignore)


def _source(tree: Path) -> Path:
    for source in (tree / "pg_layer", tree / "src" / "pg_layer"):
        if (source / "__init__.py").exists():
            return source
    raise ValueError(f"no pg_layer in {tree}")


def _tree(text: str) -> Path:
    path = Path(text).absolute()
    try:
        _source(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    scenarios = dict.fromkeys(point.partition("/")[0] for point in POINTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Measure two source trees of pg_layer in one run, taking turns.",
        epilog=f"Scenarios: {', '.join(scenarios)}. Points: {', '.join(POINTS)}.",
    )
    parser.add_argument("--before", type=_tree, required=True, metavar="PATH", help="a source tree")
    parser.add_argument("--after", type=_tree, default=ROOT, metavar="PATH", help="default: this")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--scenarios",
        default="",
        metavar="NAME,...",
        help=f"scenarios or points; default all but {', '.join(ON_DEMAND)}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="how long each part of a measurement sends (default 5); below 1: a smoke test",
    )
    parser.add_argument(
        "--endurance-seconds",
        type=float,
        default=600.0,
        help="the same for endurance (default 600)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all rounds and the medians to FILE")
    return parser


def _text(reading: Mapping[str, Any]) -> str:
    return f"{reading['what']} {_number(reading['value'])} {reading['unit']}".strip()


def _cell(values: Iterable[float]) -> str:
    known = sorted(values)
    if not known:
        return _NONE
    text = _number(statistics.median(known))
    return text if len(known) == 1 else f"{text} ({_number(known[0])} to {_number(known[-1])})"


def _quotient(before: Sequence[float], after: Sequence[float]) -> str:
    if not before or not after or statistics.median(before) <= 0:
        return _NONE
    return f"{statistics.median(after) / statistics.median(before):.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
