"""A scenario of ``python -m benchmarks`` with the tree's layer instead of the installed one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.compared.base import Reading, Result, Setting

#: In shorter measurements the smallest sizes of the harness are used.
_TINY = 1.0


def existing(setting: Setting, *, scenario: str) -> Result:
    """Run one round with the sizes of ``--quick``."""
    scale = "--tiny" if setting.seconds < _TINY else "--quick"
    with tempfile.TemporaryDirectory(prefix="pg_layer_compare_") as folder:
        file = Path(folder, "results.json")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks", "--layers", "pg", "--rounds", "1", scale),
                *("--scenarios", scenario, "--dsn", setting.dsn, "--json", str(file)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if not file.exists():
            raise RuntimeError(done.stderr)
        found = json.loads(file.read_text())["scenarios"][scenario]
    (outcome,) = found["layers"]["pg"]["rounds"]
    if outcome["error"]:
        raise RuntimeError(outcome["error"])
    names = {figure["name"]: figure["unit"] for figure in found["figures"]}
    readings = [
        Reading(name if name != names[name] else "", names[name], value)
        for name, value in outcome["figures"].items()
        if name in names and value is not None
    ]
    faults = [Reading("FAULT", name, count) for name, count in outcome["tally"].items() if count]
    return Result(readings + faults)
