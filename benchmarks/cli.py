"""The command line: which layers and scenarios, how often, and where the results go."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.ceiling import PLANS, Ceiling, line
from benchmarks.ceiling import measure as measure_ceilings
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.report import Progress, Results, context, headline
from benchmarks.runner import Measurement
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.base import Scale, Scenario
from benchmarks.servers import Unavailable, database_for, observe, postgres_server, redis_server
from benchmarks.statistics import Outcome

DSN_VARIABLE = "PG_LAYER_DSN"
#: What a reader in a hurry waits for.
QUICK_LAYERS = ("pg", "core", "pubsub", "bare")
LEGEND = (
    "Medians of {rounds} round(s). 'vs': how many times better pg_layer is; above 1x ahead, below 1x behind."
    "\n'of': its share of what PostgreSQL does without a layer; 100% is as good."
    "\n* against a layer that lost, doubled or reordered messages. Compare within one run only."
)


@dataclass(frozen=True)
class Options:
    """One run. ``dsn`` and ``redis`` name servers to use instead of those started for the run."""

    layers: Sequence[str]
    scenarios: Sequence[str] = tuple(SCENARIOS)
    rounds: int = 3
    scale: Scale = "full"
    dsn: str | None = None
    redis: str | None = None
    profile: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: measured; 1: pg_layer failed, or lost, doubled or reordered something; 2: nothing ran."""
    parsed = _parser().parse_args(arguments)
    scale: Scale = "tiny" if parsed.tiny else "quick" if parsed.quick else "full"
    options = Options(
        layers=parsed.layers or (QUICK_LAYERS if scale == "quick" else tuple(KINDS)),
        scenarios=parsed.scenarios,
        rounds=parsed.rounds or (3 if scale == "full" else 1),
        scale=scale,
        dsn=parsed.dsn,
        redis=parsed.redis,
        profile=parsed.profile,
    )
    if options.profile:
        Path(options.profile).mkdir(parents=True, exist_ok=True)
    with available(options) as specs:
        if not specs:
            return 2
        results, servers = Results([spec.name for spec in specs], chosen(options)), describe(specs)
        ceilings: list[Ceiling] = []
        with suppress(KeyboardInterrupt):  # what has been measured is still shown
            measure(options, specs, results, Progress())
            ceilings = find_ceilings(options, specs)
    known = context({"rounds": options.rounds, "scale": options.scale}, servers)
    parts = [headline(known), results.as_table(), results.as_ratios(), LEGEND.format(rounds=options.rounds)]
    parts.append("\n".join(map(line, ceilings)))
    print("", *filter(None, parts), sep="\n\n")
    if parsed.json:
        written = {**results.as_json(known), "ceilings": [asdict(ceiling) for ceiling in ceilings]}
        Path(parsed.json).write_text(json.dumps(written, indent=2) + "\n")
    return 1 if results.failed else 0


def chosen(options: Options) -> list[Scenario]:
    return [SCENARIOS[name] for name in options.scenarios]


def measure(options: Options, specs: Sequence[LayerSpec], results: Results, progress: Progress) -> None:
    """Every round visits every scenario, and in it every layer, one right after the other."""
    for number in range(1, options.rounds + 1):
        for scenario in chosen(options):
            for spec in specs:
                if scenario.roles(KINDS[spec.name]) is None:
                    continue
                progress.begin(
                    f"round {number}/{options.rounds}  {scenario.name:<16} {KINDS[spec.name].title:<17}"
                )
                measurement = Measurement(
                    scenario,
                    spec,
                    scenario.scales[options.scale],
                    profile=options.profile,
                    on_progress=progress.update,
                )
                outcome = emptied(spec) or measurement.run()
                results.add(scenario, spec.name, outcome)
                progress.end(scenario, outcome)


def emptied(spec: LayerSpec) -> Outcome | None:
    """Throw away what the last measurement left on the layer's server; an outcome if that cannot be done."""
    try:
        with observe(spec) as observer:
            observer.reset()
    except Exception as error:  # whatever the layer has done to its server, the others are still measured
        return Outcome(error=f"the server could not be emptied: {error}")
    return None


def find_ceilings(options: Options, specs: Sequence[LayerSpec]) -> list[Ceiling]:
    """What pgbench reaches in the database of the bare measurements; nothing where either is missing."""
    addresses = [spec.address for spec in specs if KINDS[spec.name].played == "bare"]
    try:
        return measure_ceilings(addresses[0], PLANS[options.scale]) if addresses else []
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return []


@contextmanager
def available(options: Options) -> Iterator[list[LayerSpec]]:
    """The layers that can run here, with their servers up; says what is missing and how to get it."""
    starters: Mapping[str, Callable[[], object]] = {
        "postgres": lambda: stack.enter_context(postgres_server(options.dsn)),
        "redis": lambda: stack.enter_context(redis_server(options.redis)),
        "": lambda: "this process",
    }
    addresses: dict[str, str | None] = {}
    specs = []
    with ExitStack() as stack:
        for name in options.layers:
            kind = KINDS[name]
            if not kind.installed:
                print(
                    f"{kind.title}: {kind.requires} is not installed: pip install -e '.[bench]'",
                    file=sys.stderr,
                )
                continue
            if kind.server not in addresses:
                try:
                    addresses[kind.server] = str(starters[kind.server]())
                except Unavailable as reason:
                    print(reason, file=sys.stderr)
                    addresses[kind.server] = None
            if address := addresses[kind.server]:
                try:
                    if kind.server == "postgres" and name != "pg":
                        address = stack.enter_context(database_for(kind, address))
                except Unavailable as reason:
                    print(reason, file=sys.stderr)
                else:
                    specs.append(LayerSpec(name, address))
        yield specs


def describe(specs: Sequence[LayerSpec]) -> dict[str, dict[str, str]]:
    """The servers behind the layers."""
    servers: dict[str, dict[str, str]] = {}
    for spec in specs:
        if server := KINDS[spec.name].server:
            with observe(spec) as observer:
                servers[server] = observer.describe()
    return servers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run pg_layer beside other layers in one run, taking turns round by round.",
        epilog="Scenarios: " + "; ".join(scenario.title for scenario in SCENARIOS.values()) + ".",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round of four layers, within three minutes"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a smoke test of the harness; its figures mean nothing"
    )
    parser.add_argument("--rounds", type=_count, metavar="N", help="default 3; with --quick or --tiny 1")
    parser.add_argument(
        "--layers",
        type=_names(KINDS),
        metavar="NAME,...",
        help=f"{', '.join(KINDS)}; default all, with --quick {', '.join(QUICK_LAYERS)}",
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
