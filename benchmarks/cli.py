"""The command line: selects layers and scenarios, runs them and writes the results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.ceiling import PLANS, Ceiling, line
from benchmarks.ceiling import measure as measure_ceilings
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.pgbench import CLIENTS, RATE, ROWS, beside, fill, find_pgbench
from benchmarks.report import Progress, Results, context, headline, load_average
from benchmarks.runner import Measurement
from benchmarks.scenarios import EVERY, SCENARIOS, SETS, choose
from benchmarks.scenarios.base import Scale, Scenario
from benchmarks.scenarios.growth import CURVES, POINTS
from benchmarks.servers import (
    PostgresObserver,
    Unavailable,
    database_for,
    observe,
    postgres_server,
    redis_server,
)
from benchmarks.signals import interrupt_on_signals
from benchmarks.statistics import Outcome

DSN_VARIABLE = "PG_LAYER_DSN"
#: The layers of a quick run.
QUICK_LAYERS = ("pg", "core", "pubsub", "bare")
LEFT_OUT_OF_QUICK = ("serial", "websockets-room", "connections", "neighbours")
LEGEND = (
    "{what}. 'vs': how many times better pg_layer is; above 1x ahead, below 1x behind."
    "\n'of': its share of what PostgreSQL does without a layer; 100% is as good."
    "\n* against a layer that lost, doubled or reordered messages. Compare within one run only."
)


@dataclass(frozen=True)
class Options:
    """The options of a run. ``dsn`` and ``redis`` name servers to use instead of new ones.

    ``big`` is the scale of pgbench's tables in the database of all measurements, 0 without them.
    """

    layers: Sequence[str]
    scenarios: Sequence[str] = tuple(SCENARIOS)
    rounds: int = 3
    scale: Scale = "full"
    dsn: str | None = None
    redis: str | None = None
    profile: str | None = None
    big: int = 0

    @property
    def pgbench_scale(self) -> int:
        """Return the scale of the application's tables, 0 if no scenario needs them."""
        return self.big or max(
            scenario.scales[self.scale].pgbench_scale for scenario in chosen(self)
        )

    def known(self) -> dict[str, object]:
        """Return the options as the results contain them."""
        known: dict[str, object] = {"rounds": self.rounds, "scale": self.scale}
        if self.big:
            known["big"] = {"rows": self.big * ROWS, "transactions/s": RATE, "clients": CLIENTS}
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Return the exit code.

    0: measured; 1: pg_layer failed, or lost, doubled or reordered messages; 2: nothing was
    measured; 130: interrupted.
    """
    interrupt_on_signals()
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.plots and not importlib.util.find_spec("matplotlib"):
        parser.error("--plots needs matplotlib: pip install -e '.[bench]'")
    scale: Scale = "tiny" if parsed.tiny else "quick" if parsed.quick else "full"
    options = Options(
        layers=parsed.layers or (QUICK_LAYERS if scale == "quick" else tuple(KINDS)),
        scenarios=parsed.scenarios or scenarios_of(scale),
        rounds=parsed.rounds or (3 if scale == "full" else 1),
        scale=scale,
        dsn=parsed.dsn,
        redis=parsed.redis,
        profile=parsed.profile,
        big=parsed.big_scale or (100 if parsed.big else 0),
    )
    try:  # Check before the measurements whether their results can be written.
        if parsed.json:
            check_file(Path(parsed.json))
        for folder in filter(None, (parsed.plots, options.profile)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            check_folder(Path(folder))
    except OSError as error:
        parser.error(f"cannot write there: {error}")
    load = load_average()
    results = Results([], chosen(options))
    ceilings: list[Ceiling] = []
    try:
        with available(options) as specs:
            if not specs:
                return 2
            results.layers = [spec.name for spec in specs]
            servers, durable = describe(specs), durability(specs)
            measure(options, specs, results, Progress())
            ceilings = find_ceilings(options, specs)
    except KeyboardInterrupt:  # the results so far are shown
        results.interrupted = True
    if not results.outcomes:
        print(
            "\nInterrupted before anything was measured."
            if results.interrupted
            else "Nothing to measure."
        )
        return 130 if results.interrupted else 2
    known = context(options.known(), servers, durable, load)
    head = headline(known) + traffic(options)
    parts = [
        head,
        results.as_table(),
        results.as_ratios(),
        results.as_ranges(),
        LEGEND.format(what=extent(results, options.rounds)),
    ]
    if ceilings:
        parts.append(
            "\n".join(["pgbench, without a layer, synchronous_commit off:", *map(line, ceilings)])
        )
    print("", *filter(None, parts), sep="\n\n")
    written = {**results.as_json(known), "ceilings": [asdict(ceiling) for ceiling in ceilings]}
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(written, indent=2) + "\n")
    if parsed.plots:
        from benchmarks.plots import draw

        draw(written, Path(parsed.plots))
    if results.interrupted:
        return 130
    return 1 if results.failed else 0


def check_file(file: Path) -> None:
    """Raise `OSError` if a file cannot be written. Do not change it."""
    check_folder(file.parent)
    if file.exists():
        file.open("a").close()


def check_folder(folder: Path) -> None:
    """Raise `OSError` if no file can be created in a folder."""
    tempfile.TemporaryFile(dir=folder).close()


def extent(results: Results, rounds: int) -> str:
    """Return in words how many rounds the medians cover."""
    if results.interrupted:
        return f"INTERRUPTED in round {results.round} of {rounds}; medians of what there is"
    return f"Medians of {rounds} round(s)"


def scenarios_of(scale: Scale) -> tuple[str, ...]:
    """Return the scenarios that run by default."""
    return tuple(name for name in SCENARIOS if scale != "quick" or name not in LEFT_OUT_OF_QUICK)


def chosen(options: Options) -> list[Scenario]:
    return choose(options.scenarios, options.scale)


def traffic(options: Options) -> str:
    """Return a line for the headline about traffic beside the measurements, or ""."""
    if not options.big:
        return ""
    rows = f"{options.big * ROWS:,} rows"
    return f"\nbeside it {rows} and {RATE} transactions/s of the application (pgbench)"


def measure(
    options: Options, specs: Sequence[LayerSpec], results: Results, progress: Progress
) -> None:
    """Measure in rounds: each visits all scenarios and, in each scenario, all layers in turn.

    Each round begins with another layer, so that no layer is always the first.
    """
    scenarios = chosen(options)
    width = max(len(scenario.name) for scenario in scenarios)
    planned = {scenario.name: playable(scenario, options.scale, specs) for scenario in scenarios}
    total = options.rounds * sum(map(len, planned.values()))
    done = 0
    for number in range(1, options.rounds + 1):
        results.round = number
        for scenario in scenarios:
            sizes = scenario.scales[options.scale]
            for spec in rotated(planned[scenario.name], number - 1):
                done += 1
                progress.begin(
                    f"measurement {done:>{len(str(total))}}/{total}  {scenario.name:<{width}}"
                    f" {KINDS[spec.name].title:<17}"
                )
                measurement = Measurement(
                    scenario,
                    spec,
                    sizes,
                    profile=options.profile,
                    on_progress=progress.update,
                )
                outcome = emptied(spec)
                if outcome is not None:
                    pass
                # A scenario with a scale of pgbench runs its own traffic.
                elif options.big and spec.database and not sizes.pgbench_scale:
                    outcome = beside(spec.database, measurement.run)
                else:
                    outcome = measurement.run()
                results.add(scenario, spec.name, outcome)
                progress.end(scenario, outcome)


def playable(scenario: Scenario, scale: Scale, specs: Sequence[LayerSpec]) -> Sequence[LayerSpec]:
    """Return the layers that the scenario can measure."""
    # `available` has reported a missing database of the application.
    alone = not scenario.scales[scale].pgbench_scale
    return [spec for spec in specs if scenario.roles(KINDS[spec.name]) and (alone or spec.database)]


def rotated(specs: Sequence[LayerSpec], places: int) -> Sequence[LayerSpec]:
    """Return the layers from index ``places`` on, followed by those before it."""
    start = places % len(specs) if specs else 0
    return [*specs[start:], *specs[:start]]


def emptied(spec: LayerSpec) -> Outcome | None:
    """Remove the data of the last measurement; return an outcome if that fails."""
    try:
        with observe(spec) as observer:
            observer.reset()
    # Whatever a layer did to its server, the other layers must still be measured.
    except Exception as error:
        return Outcome(error=f"the server could not be emptied: {error}")
    return None


def find_ceilings(options: Options, specs: Sequence[LayerSpec]) -> list[Ceiling]:
    """Return pgbench's results in the bare database; nothing without pgbench or that database."""
    addresses = [spec.address for spec in specs if KINDS[spec.name].played == "bare"]
    try:
        return measure_ceilings(addresses[0], PLANS[options.scale]) if addresses else []
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return []


@contextmanager
def available(options: Options) -> Iterator[list[LayerSpec]]:
    """Yield the layers that can run here with running servers; report what is missing."""
    starters: Mapping[str, Callable[[], object]] = {
        "postgres": lambda: stack.enter_context(postgres_server(options.dsn)),
        "redis": lambda: stack.enter_context(redis_server(options.redis)),
        "": lambda: "this process",
    }
    addresses: dict[str, str | None] = {}
    specs = []

    def address(server: str) -> str | None:
        if server not in addresses:
            try:
                addresses[server] = str(starters[server]())
            except Unavailable as reason:
                print(reason, file=sys.stderr)
                addresses[server] = None
        return addresses[server]

    with ExitStack() as stack:
        for name in options.layers:
            kind = KINDS[name]
            if not kind.installed:
                print(
                    f"{kind.title}: {kind.requires} is not installed: pip install -e '.[bench]'",
                    file=sys.stderr,
                )
                continue
            if (found := address(kind.server)) is None:
                continue
            try:
                if kind.server == "postgres" and name != "pg":
                    found = stack.enter_context(database_for(kind, found))
            except Unavailable as reason:
                print(reason, file=sys.stderr)
            else:
                specs.append(LayerSpec(name, found))
        if specs and options.pgbench_scale:
            specs = _with_application(specs, options, address("postgres"))
        yield specs


def _with_application(
    specs: Sequence[LayerSpec], options: Options, dsn: str | None
) -> list[LayerSpec]:
    """Return the layers with the application's tables, or without if these are unavailable.

    Return no layer if all scenarios need these tables.
    """
    if dsn is not None:
        try:
            find_pgbench()
            print(
                f"filling pgbench's tables: {options.pgbench_scale * ROWS:,} rows", file=sys.stderr
            )
            fill(dsn, options.pgbench_scale)
        except Unavailable as reason:
            print(reason, file=sys.stderr)
        else:
            return [replace(spec, database=dsn) for spec in specs]
    print("What is measured with pgbench is left out.", file=sys.stderr)
    if options.big or all(
        scenario.scales[options.scale].pgbench_scale for scenario in chosen(options)
    ):
        return []
    return list(specs)


def describe(specs: Sequence[LayerSpec]) -> dict[str, dict[str, str]]:
    """Describe the servers of the layers."""
    servers: dict[str, dict[str, str]] = {}
    for spec in specs:
        if server := KINDS[spec.name].server:
            with observe(spec) as observer:
                servers[server] = observer.describe()
        if spec.database and "postgres" not in servers:
            with closing(PostgresObserver(spec.database)) as database:
                servers["postgres"] = database.describe()
    return servers


def durability(specs: Sequence[LayerSpec]) -> dict[str, str]:
    """Return how durable the writes of each layer are."""
    found: dict[str, str] = {}
    for spec in specs:
        with observe(spec) as observer:
            found[spec.name] = KINDS[spec.name].durability or observer.durability()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run pg_layer beside other layers in one run, taking turns round by round.",
        epilog="Scenarios: "
        + "; ".join(scenario.title for scenario in SCENARIOS.values())
        + f". Growth: {', '.join(CURVES)}, or a single point, such as {next(iter(POINTS))}.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round of four layers, within three minutes"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a smoke test of the harness; its figures mean nothing"
    )
    parser.add_argument(
        "--rounds", type=_count, metavar="N", help="default 3; with --quick or --tiny 1"
    )
    parser.add_argument(
        "--layers",
        type=_names(KINDS),
        metavar="NAME,...",
        help=f"{', '.join(KINDS)}; default all, with --quick {', '.join(QUICK_LAYERS)}",
    )
    parser.add_argument(
        "--scenarios",
        type=_names([*EVERY, *SETS], listed=_similar),
        metavar="NAME,...",
        help=f"{', '.join([*SCENARIOS, *SETS])}; default all but growth,"
        f" with --quick also without {', '.join(LEFT_OUT_OF_QUICK)}",
    )
    parser.add_argument(
        "--dsn",
        default=os.environ.get(DSN_VARIABLE),
        help=f"a PostgreSQL server to use, by default {DSN_VARIABLE} from the environment;"
        " a database is made on it and dropped afterwards",
    )
    parser.add_argument(
        "--redis",
        type=_redis_url,
        metavar="URL",
        help="a Redis server to use; its database must be empty",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write all rounds, medians and ratios to FILE"
    )
    parser.add_argument(
        "--plots", metavar="FOLDER", help="draw the results into FOLDER, as SVG files"
    )
    parser.add_argument(
        "--big",
        action="store_true",
        help="measure everything in a database with 10,000,000 rows of an application (pgbench),"
        f" which runs {RATE} transactions a second meanwhile",
    )
    parser.add_argument(
        "--big-scale",
        type=_count,
        metavar="N",
        help="the same with N times 100,000 rows; --big has 100",
    )
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="run each process under cProfile (slows all layers down)",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _redis_url(text: str) -> str:
    if not text.startswith(("redis://", "rediss://", "unix://")):
        raise argparse.ArgumentTypeError(
            f"must be a URL such as redis://127.0.0.1:6379/0, not {text!r}"
        )
    return text


def _similar(unknown: Sequence[str]) -> Collection[str]:
    """Return the names to suggest: points of the curves in question, or all but points."""
    curves = {curve for curve in (name.partition("/")[0] for name in unknown) if curve in CURVES}
    return [point.name for curve in CURVES if curve in curves for point in CURVES[curve]] or [
        *SCENARIOS,
        *SETS,
    ]


def _names(
    allowed: Collection[str], *, listed: Callable[[Sequence[str]], Collection[str]] | None = None
) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names. Its error lists the names of ``listed``."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            choices = listed(unknown) if listed else allowed
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown) or text!r}; choose from {', '.join(choices)}"
            )
        return names

    return parse
