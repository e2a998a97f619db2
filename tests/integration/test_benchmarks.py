"""The benchmark harness on pg_layer, in sizes that say nothing about speed but all about delivery."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pgbench import beside
from benchmarks.scenarios import SCENARIOS
from benchmarks.statistics import Outcome
from devtools.postgres.binaries import BINARIES_VARIABLE

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def results(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one tiny run of everything wrote as JSON."""
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--layers", "pg"]
    command += ["--dsn", postgres_dsn, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    written: dict[str, Any] = json.loads(file.read_text())
    written["stdout"] = done.stdout
    return written


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_message_arrives_once_and_in_order(results: dict[str, Any], name: str) -> None:
    (outcome,) = results["scenarios"][name]["layers"]["pg"]["rounds"]
    assert outcome["error"] is None
    assert outcome["tally"] == {"lost": 0, "twice": 0, "disorder": 0, "stray": 0}
    assert set(outcome["figures"]) == {figure.name for figure in SCENARIOS[name].figures}
    least = {"cost": -math.inf, "dead": -1.0}  # noise may turn a cost into a gain; vacuum leaves no dead row
    assert all(value > least.get(figure, 0.0) for figure, value in outcome["figures"].items())
    assert not outcome["notes"].get("processes killed")


def test_connections_do_not_grow_with_consumers(results: dict[str, Any]) -> None:
    (outcome,) = results["scenarios"]["connections"]["layers"]["pg"]["rounds"]
    assert outcome["figures"]["peak"] <= 5


def test_says_what_it_ran_on(results: dict[str, Any]) -> None:
    assert results["servers"]["postgres"]["fsync"] in ("on", "off")
    assert results["machine"]["cores"] >= 1
    assert "pg-layer" in results["packages"]
    assert all(name in results["stdout"] for name in SCENARIOS)


def test_measures_beside_the_transactions_of_an_application(postgres_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--layers", "pg", "--scenarios", "latency"]
    command += ["--big", "--big-scale", "1", "--dsn", postgres_dsn, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["options"]["big"] == {"rows": 100_000, "transactions/s": 200, "clients": 2}
    assert "100,000 rows and 200 transactions/s of the application" in done.stdout
    (outcome,) = written["scenarios"]["latency"]["layers"]["pg"]["rounds"]
    assert outcome["error"] is None
    assert outcome["notes"]["transactions beside"] > 0


def test_failure_of_what_runs_beside_is_the_outcome(migrated_dsn: str) -> None:
    outcome = beside(migrated_dsn, lambda: Outcome({"p50": 1.0}))
    assert outcome.figures == {}
    assert outcome.error is not None
    assert outcome.error.startswith("pgbench: ")
    assert "pgbench_branches" in outcome.error


@pytest.mark.parametrize("chosen", [["--scenarios", "neighbours"], ["--scenarios", "latency", "--big"]])
def test_says_how_to_get_pgbench(postgres_dsn: str, tmp_path: Path, chosen: list[str]) -> None:
    for program in ("postgres", "initdb"):
        (tmp_path / program).touch(mode=0o755)
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--layers", "pg", "--dsn", postgres_dsn, *chosen]
    environment = {**os.environ, BINARIES_VARIABLE: str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "No pgbench found. It comes with PostgreSQL" in done.stderr
    assert "left out" in done.stderr


def test_refuses_unknown_names() -> None:
    command = [sys.executable, "-m", "benchmarks", "--scenarios", "sleep"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "unknown: 'sleep'; choose from latency" in done.stderr
