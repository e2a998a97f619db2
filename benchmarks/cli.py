"""The command line: which layers and scenarios, how often, and where the results go."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.layers import KINDS, LayerSpec
from benchmarks.pgbench import CLIENTS, RATE, ROWS, beside, fill, find_pgbench
from benchmarks.report import Progress, Results, context, headline
from benchmarks.runner import Measurement
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.base import Scale, Scenario
from benchmarks.servers import PostgresObserver, Unavailable, observe, postgres_server, redis_server

DSN_VARIABLE = "PG_LAYER_DSN"
LEGEND = (
    "Medians of {rounds} round(s). 'vs': how many times better pg_layer is; above 1x ahead, below 1x behind."
    "\n* against a layer that lost, doubled or reordered messages. Compare within one run only."
)


@dataclass(frozen=True)
class Options:
    """One run. ``dsn`` and ``redis`` name servers to use instead of those started for the run.

    ``big`` is the scale of the pgbench tables beside which everything is measured, 0 for none.
    """

    layers: Sequence[str] = tuple(KINDS)
    scenarios: Sequence[str] = tuple(SCENARIOS)
    rounds: int = 3
    scale: Scale = "full"
    dsn: str | None = None
    redis: str | None = None
    profile: str | None = None
    big: int = 0

    @property
    def pgbench_scale(self) -> int:
        """Of the application's tables, 0 if nothing asks for them."""
        return self.big or max(SCENARIOS[name].scales[self.scale].pgbench_scale for name in self.scenarios)

    def known(self) -> dict[str, object]:
        """What the results say of them."""
        known: dict[str, object] = {"rounds": self.rounds, "scale": self.scale}
        if self.big:
            known["big"] = {"rows": self.big * ROWS, "transactions/s": RATE, "clients": CLIENTS}
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: measured; 1: pg_layer failed, or lost, doubled or reordered something; 2: nothing ran."""
    parsed = _parser().parse_args(arguments)
    scale: Scale = "tiny" if parsed.tiny else "quick" if parsed.quick else "full"
    options = Options(
        layers=parsed.layers,
        scenarios=parsed.scenarios,
        rounds=parsed.rounds or (3 if scale == "full" else 1),
        scale=scale,
        dsn=parsed.dsn,
        redis=parsed.redis,
        profile=parsed.profile,
        big=parsed.big_scale or (100 if parsed.big else 0),
    )
    if options.profile:
        Path(options.profile).mkdir(parents=True, exist_ok=True)
    with available(options) as specs:
        if not specs:
            return 2
        results, servers = Results([spec.name for spec in specs], chosen(options)), describe(specs)
        with suppress(KeyboardInterrupt):  # what has been measured is still shown
            measure(options, specs, results, Progress())
    known = context(options.known(), servers)
    print(
        f"\n{headline(known)}{traffic(options)}\n\n{results.as_table()}\n\n{LEGEND.format(rounds=options.rounds)}"
    )
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(results.as_json(known), indent=2) + "\n")
    return 1 if results.failed else 0


def chosen(options: Options) -> list[Scenario]:
    return [SCENARIOS[name] for name in options.scenarios]


def traffic(options: Options) -> str:
    """A line for the headline about what runs beside the measurements, if anything does."""
    if not options.big:
        return ""
    return f"\nbeside it {options.big * ROWS:,} rows and {RATE} transactions/s of the application (pgbench)"


def measure(options: Options, specs: Sequence[LayerSpec], results: Results, progress: Progress) -> None:
    """Every round visits every scenario, and in it every layer, one right after the other."""
    for number in range(1, options.rounds + 1):
        for scenario in chosen(options):
            sizes = scenario.scales[options.scale]
            for spec in specs:
                if sizes.pgbench_scale and spec.database is None:
                    continue  # it has been said why
                with observe(spec) as observer:
                    observer.reset()
                progress.begin(
                    f"round {number}/{options.rounds}  {scenario.name:<16} {KINDS[spec.name].title:<14}"
                )
                measurement = Measurement(
                    scenario,
                    spec,
                    sizes,
                    profile=options.profile,
                    on_progress=progress.update,
                )
                if options.big and spec.database and not sizes.pgbench_scale:  # else it has its own traffic
                    outcome = beside(spec.database, measurement.run)
                else:
                    outcome = measurement.run()
                results.add(scenario, spec.name, outcome)
                progress.end(scenario, outcome)


@contextmanager
def available(options: Options) -> Iterator[list[LayerSpec]]:
    """The layers that can run here, with their servers up; says what is missing and how to get it."""
    starters: Mapping[str, Callable[[], object]] = {
        "postgres": lambda: stack.enter_context(postgres_server(options.dsn)),
        "redis": lambda: stack.enter_context(redis_server(options.redis)),
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
            if found := address(kind.server):
                specs.append(LayerSpec(name, found))
        if specs and options.pgbench_scale:
            specs = _with_application(specs, options, address("postgres"))
        yield specs


def _with_application(specs: Sequence[LayerSpec], options: Options, dsn: str | None) -> list[LayerSpec]:
    """The layers with the application's tables beside them; without, where these cannot be had.

    No layer at all then, if nothing is to be measured without them.
    """
    if dsn is not None:
        try:
            find_pgbench()
            print(f"filling pgbench's tables: {options.pgbench_scale * ROWS:,} rows", file=sys.stderr)
            fill(dsn, options.pgbench_scale)
        except Unavailable as reason:
            print(reason, file=sys.stderr)
        else:
            return [replace(spec, database=dsn) for spec in specs]
    print("What is measured with pgbench is left out.", file=sys.stderr)
    if options.big or all(scenario.scales[options.scale].pgbench_scale for scenario in chosen(options)):
        return []
    return list(specs)


def describe(specs: Sequence[LayerSpec]) -> dict[str, dict[str, str]]:
    """The servers behind the layers."""
    servers = {}
    for spec in specs:
        with observe(spec) as observer:
            servers[KINDS[spec.name].server] = observer.describe()
        if spec.database and "postgres" not in servers:
            with closing(PostgresObserver(spec.database)) as database:
                servers["postgres"] = database.describe()
    return servers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run pg_layer beside channels_redis in one run, taking turns round by round.",
        epilog="Scenarios: " + "; ".join(scenario.title for scenario in SCENARIOS.values()) + ".",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round of everything, within three minutes"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a smoke test of the harness; its figures mean nothing"
    )
    parser.add_argument("--rounds", type=_count, metavar="N", help="default 3; with --quick or --tiny 1")
    parser.add_argument(
        "--layers", type=_names(KINDS), default=tuple(KINDS), metavar="NAME,...", help=", ".join(KINDS)
    )
    parser.add_argument(
        "--scenarios",
        type=_names(SCENARIOS),
        default=tuple(SCENARIOS),
        metavar="NAME,...",
        help=", ".join(SCENARIOS),
    )
    parser.add_argument(
        "--dsn",
        default=os.environ.get(DSN_VARIABLE),
        help=f"a PostgreSQL server to use, by default {DSN_VARIABLE} from the environment;"
        " a database is made on it and dropped afterwards",
    )
    parser.add_argument("--redis", metavar="URL", help="a Redis server to use; its database must be empty")
    parser.add_argument("--json", metavar="FILE", help="write all rounds, medians and ratios to FILE")
    parser.add_argument(
        "--big",
        action="store_true",
        help="measure everything in a database with 10,000,000 rows of an application (pgbench), whose"
        f" {RATE} transactions a second run beside",
    )
    parser.add_argument(
        "--big-scale", type=_count, metavar="N", help="the same with N times 100,000 rows; --big has 100"
    )
    parser.add_argument(
        "--profile", metavar="FOLDER", help="run each process under cProfile (slows all layers down)"
    )
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _names(allowed: Mapping[str, object]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown) or text!r}; choose from {', '.join(allowed)}"
            )
        return names

    return parse
