"""The benchmark harness on pg_layer, in sizes that say nothing about speed but all about delivery."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ceiling import PLANS, SCRIPTS, find_pgbench
from benchmarks.layers import KINDS
from benchmarks.scenarios import SCENARIOS
from tests.components import require_executable, require_module

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(400)


def run_tiny(dsn: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What one tiny run wrote as JSON, and its standard output."""
    file = folder / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--tiny", *arguments, "--dsn", dsn, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode in (0, 1), done.stderr
    written: dict[str, Any] = json.loads(file.read_text())
    written["stdout"] = done.stdout
    return written


@pytest.fixture(scope="module")
def results(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What everything yields that needs no more than PostgreSQL."""
    return run_tiny(postgres_dsn, tmp_path_factory.mktemp("benchmarks"), "--layers", "pg,memory,bare")


@pytest.mark.parametrize("layer", ["pg", "memory", "bare"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_message_arrives_once_and_in_order(results: dict[str, Any], name: str, layer: str) -> None:
    if SCENARIOS[name].roles(KINDS[layer]) is None:
        assert layer not in results["scenarios"][name]["layers"]
        return
    (outcome,) = results["scenarios"][name]["layers"][layer]["rounds"]
    assert outcome["error"] is None
    assert outcome["tally"] == {"lost": 0, "twice": 0, "disorder": 0, "stray": 0}
    assert set(outcome["figures"]) == {figure.name for figure in SCENARIOS[name].figures}
    assert all(value > 0 for value in outcome["figures"].values())
    assert not outcome["notes"].get("processes killed")


def test_connections_do_not_grow_with_consumers(results: dict[str, Any]) -> None:
    (outcome,) = results["scenarios"]["connections"]["layers"]["pg"]["rounds"]
    assert outcome["figures"]["peak"] <= 5


def test_pgbench_shows_what_the_server_can_do(results: dict[str, Any]) -> None:
    if find_pgbench() is None:
        assert results["ceilings"] == []
        return
    found = [(ceiling["title"], ceiling["clients"]) for ceiling in results["ceilings"]]
    assert found == [(script.title, clients) for script in SCRIPTS for clients in PLANS["tiny"].clients]
    for ceiling, script in zip(results["ceilings"], SCRIPTS, strict=True):
        assert ceiling["error"] is None
        assert ceiling["transactions_per_second"] > 0
        assert ceiling["rows_per_second"] == ceiling["transactions_per_second"] * script.rows
        assert ceiling["title"] in results["stdout"]


@pytest.mark.redis
def test_other_layers_are_set_up_so_that_they_work(postgres_dsn: str, tmp_path: Path) -> None:
    require_executable("redis-server", component="redis")
    for module in ("redis", "channels_redis", "channels_postgres"):
        require_module(module, component="redis")
    layers = ("core", "pubsub", "postgres")
    arguments = ("--layers", ",".join(layers), "--scenarios", "latency,churn")
    results = run_tiny(postgres_dsn, tmp_path, *arguments)
    assert set(results["servers"]) == {"postgres", "redis"}
    for scenario in ("latency", "churn"):
        for layer in layers:
            (outcome,) = results["scenarios"][scenario]["layers"][layer]["rounds"]
            assert outcome["error"] is None
            assert all(value > 0 for value in outcome["figures"].values())
    assert results["ceilings"] == []


def test_says_what_it_ran_on(results: dict[str, Any]) -> None:
    assert results["servers"]["postgres"]["fsync"] in ("on", "off")
    assert results["machine"]["cores"] >= 1
    assert "pg-layer" in results["packages"]
    assert all(name in results["stdout"] for name in SCENARIOS)


def test_refuses_unknown_names() -> None:
    command = [sys.executable, "-m", "benchmarks", "--scenarios", "sleep"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "unknown: 'sleep'; choose from latency" in done.stderr
