"""The benchmark harness, in sizes that measure no speed but check every delivery."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from benchmarks.ceiling import PLANS, SCRIPTS
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.pgbench import beside, find_pgbench
from benchmarks.probe import probe
from benchmarks.scenarios import SCENARIOS, choose
from benchmarks.scenarios.base import Scenario
from benchmarks.servers import Unavailable, redis_server
from benchmarks.statistics import Outcome
from devtools.postgres.binaries import BINARIES_VARIABLE
from tests.components import require_executable, require_module

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def run(dsn: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the JSON of a tiny run, and its standard output as "stdout"."""
    file = folder / "results.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--tiny",
        *arguments,
        "--dsn",
        dsn,
        "--json",
        str(file),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=350, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    written: dict[str, Any] = json.loads(file.read_text())
    written["stdout"] = done.stdout
    return written


@pytest.fixture(scope="module")
def results(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of all scenarios that only need PostgreSQL."""
    return run(postgres_dsn, tmp_path_factory.mktemp("benchmarks"), "--layers", "pg,memory,bare")


@pytest.fixture(scope="module")
def growth(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of the two smallest points of each curve."""
    folder = tmp_path_factory.mktemp("growth")
    return run(postgres_dsn, folder, "--layers", "pg", "--scenarios", "growth")


@pytest.mark.parametrize("layer", ["pg", "memory", "bare"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_every_message_arrives_once_and_in_order(
    results: dict[str, Any], name: str, layer: str
) -> None:
    if SCENARIOS[name].roles(KINDS[layer]) is None:
        assert layer not in results["scenarios"][name]["layers"]
        return
    (outcome,) = results["scenarios"][name]["layers"][layer]["rounds"]
    assert outcome["error"] is None
    assert outcome["tally"] == {"lost": 0, "twice": 0, "disorder": 0, "stray": 0}
    assert set(outcome["figures"]) == {figure.name for figure in SCENARIOS[name].figures}
    # Noise may make a cost negative. Vacuum may leave no dead row.
    least = {"cost": -math.inf, "dead": -1.0}
    assert all(value > least.get(figure, 0.0) for figure, value in outcome["figures"].items())
    assert not outcome["notes"].get("processes killed")


@pytest.mark.parametrize("point", choose(["growth"], "tiny"), ids=lambda point: point.name)
def test_growth_loses_nothing_and_fills_each_curve(growth: dict[str, Any], point: Scenario) -> None:
    (outcome,) = growth["scenarios"][point.name]["layers"]["pg"]["rounds"]
    assert outcome["error"] is None
    assert outcome["tally"] == {"lost": 0, "twice": 0, "disorder": 0, "stray": 0}
    missing = {name for name, value in outcome["figures"].items() if value is None}
    assert missing == ({"memory"} if point.name == "growth-idle/0" else set())
    assert set(outcome["figures"]) == {figure.name for figure in point.figures}
    assert point.curve is not None
    assert growth["scenarios"][point.name]["curve"]["x"] == point.curve.x


@pytest.mark.parametrize("members", [10, 100])
def test_growth_group_message_is_one_row_for_any_number_of_members(
    growth: dict[str, Any], members: int
) -> None:
    (outcome,) = growth["scenarios"][f"growth-members/{members}"]["layers"]["pg"]["rounds"]
    assert outcome["figures"]["rows"] == 1
    assert outcome["figures"]["in database"] > 0


def test_results_latencies_have_their_distribution(results: dict[str, Any]) -> None:
    (outcome,) = results["scenarios"]["latency"]["layers"]["pg"]["rounds"]
    samples = outcome["samples"]
    assert len(samples) == 201
    assert samples == sorted(samples)
    assert samples[100] == pytest.approx(outcome["figures"]["p50"], rel=0.2)


def test_probe_counts_other_sessions_and_not_itself(migrated_dsn: str) -> None:
    spec = LayerSpec("pg", migrated_dsn)
    with probe(spec) as server:

        def own() -> float:
            before = server.commands()
            server.connections()
            server.rows()
            server.group_send_ms("bench.nobody")
            return server.commands() - before

        # At least one of three readings: the counter includes the server's own vacuuming.
        assert 0 in [own() for _ in range(3)]
        before = server.commands()
        assert server.connections() == 0
        with psycopg.connect(migrated_dsn, autocommit=True) as other:
            assert server.connections() == 1
            for _ in range(20):
                other.execute("SELECT 1")
            other.execute("SELECT pg_stat_force_next_flush()")
        assert server.commands() - before >= 20


def test_probe_counts_the_rows_of_a_message(migrated_dsn: str) -> None:
    with probe(LayerSpec("pg", migrated_dsn)) as server, psycopg.connect(migrated_dsn) as other:
        before = server.rows()
        other.execute("SELECT pg_layer_send('bench', '{\"type\": \"a\"}')")
        assert server.rows() - before == 1


@pytest.mark.redis
def test_probe_redis_counts_other_connections_and_not_itself() -> None:
    redis = pytest.importorskip("redis")
    with ExitStack() as stack:
        try:
            url = stack.enter_context(redis_server())
        except Unavailable as reason:
            pytest.skip(str(reason))
        server = stack.enter_context(probe(LayerSpec("core", url)))
        before = server.commands()
        assert server.connections() == 0
        assert server.commands() == before
        other = stack.enter_context(closing(redis.Redis.from_url(url)))
        for _ in range(20):
            other.ping()
        assert server.connections() == 1
        assert server.commands() - before >= 20


def test_scenario_connections_do_not_grow_with_consumers(results: dict[str, Any]) -> None:
    (outcome,) = results["scenarios"]["connections"]["layers"]["pg"]["rounds"]
    assert outcome["figures"]["peak"] <= 5


def test_ceilings_pgbench_results_are_complete(results: dict[str, Any]) -> None:
    try:
        find_pgbench()
    except Unavailable:
        assert results["ceilings"] == []
        return
    found = [(ceiling["title"], ceiling["clients"]) for ceiling in results["ceilings"]]
    assert found == [
        (script.title, clients) for script in SCRIPTS for clients in PLANS["tiny"].clients
    ]
    for ceiling, script in zip(results["ceilings"], SCRIPTS, strict=True):
        assert ceiling["error"] is None
        assert ceiling["transactions_per_second"] > 0
        assert ceiling["rows_per_second"] == ceiling["transactions_per_second"] * script.rows
        assert ceiling["title"] in results["stdout"]


@pytest.mark.redis
def test_scenario_other_layers_work(postgres_dsn: str, tmp_path: Path) -> None:
    require_executable("redis-server", component="redis")
    for module in ("redis", "channels_redis", "channels_postgres"):
        require_module(module, component="redis")
    layers = ("core", "pubsub", "postgres")
    arguments = ("--layers", ",".join(layers), "--scenarios", "latency,churn")
    results = run(postgres_dsn, tmp_path, *arguments)
    assert set(results["servers"]) == {"postgres", "redis"}
    for scenario in ("latency", "churn"):
        for layer in layers:
            (outcome,) = results["scenarios"][scenario]["layers"][layer]["rounds"]
            assert outcome["error"] is None
            assert all(value > 0 for value in outcome["figures"].values())
    assert results["ceilings"] == []


def test_results_describe_server_and_machine(results: dict[str, Any]) -> None:
    assert results["servers"]["postgres"]["fsync"] in ("on", "off")
    assert results["machine"]["cores"] >= 1
    assert "pg-layer" in results["packages"]
    assert all(name in results["stdout"] for name in SCENARIOS)


def test_big_measures_beside_transactions_of_an_application(
    postgres_dsn: str, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--tiny",
        "--layers",
        "pg",
        "--scenarios",
        "latency",
    ]
    command += ["--big", "--big-scale", "1", "--dsn", postgres_dsn, "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["options"]["big"] == {"rows": 100_000, "transactions/s": 200, "clients": 2}
    assert "100,000 rows and 200 transactions/s of the application" in done.stdout
    (outcome,) = written["scenarios"]["latency"]["layers"]["pg"]["rounds"]
    assert outcome["error"] is None
    assert outcome["notes"]["transactions beside"] > 0


def test_beside_failed_pgbench_is_the_outcome(migrated_dsn: str) -> None:
    outcome = beside(migrated_dsn, lambda: Outcome({"p50": 1.0}))
    assert outcome.figures == {}
    assert outcome.error is not None
    assert outcome.error.startswith("pgbench: ")
    assert "pgbench_branches" in outcome.error


@pytest.mark.parametrize(
    "chosen", [["--scenarios", "neighbours"], ["--scenarios", "latency", "--big"]]
)
def test_command_line_missing_pgbench_says_how_to_get_it(
    postgres_dsn: str, tmp_path: Path, chosen: list[str]
) -> None:
    for program in ("postgres", "initdb"):
        (tmp_path / program).touch(mode=0o755)
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--tiny",
        "--layers",
        "pg",
        "--dsn",
        postgres_dsn,
        *chosen,
    ]
    environment = {**os.environ, BINARIES_VARIABLE: str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "No pgbench found. It comes with PostgreSQL" in done.stderr
    assert "left out" in done.stderr


def test_command_line_unknown_scenario_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "--scenarios", "sleep"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "unknown: 'sleep'; choose from latency" in done.stderr
