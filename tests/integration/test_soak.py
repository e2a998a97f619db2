"""Short soaks: they run, find no broken promise and leave nothing behind.

A soak starts twenty processes and expects messages in time, so these tests run one at a time and
beside no other: `make test JOBS=0 ARGS="-m soak"`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import until

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 100.0  # seconds for a server and twenty processes to start on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(240)]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path short enough for the socket of a server."""
    folder = Path("/tmp", f"soak-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        for process in of(folder):
            process.kill()
        shutil.rmtree(folder)


def start(temporary: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "soak", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def of(temporary: Path) -> list[psutil.Process]:
    """Return the processes of a soak: their environment or command names its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            known = [process.environ().get("TMPDIR", ""), *process.cmdline()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(temporary) in text for text in known):
            found.append(process)
    return found


async def nothing_left(temporary: Path) -> None:
    await until(lambda: not of(temporary))
    # A copy of PostgreSQL's programs may remain if the server's user cannot run the original.
    assert [
        name for name in os.listdir(temporary) if not name.startswith("pg-layer-postgres-")
    ] == []


async def test_soak_short_run_keeps_all_promises(temporary: Path) -> None:
    soak = start(temporary, "--seconds", "20", "--seed", "7")
    said, _ = soak.communicate(timeout=200)
    assert soak.returncode == 0, said
    assert "--seed 7" in said
    assert "All promises kept." in said
    # Messages were sent and received, and faults were injected.
    tables = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    for kind in ("specific", "group", "normal", "single"):
        assert int(tables[kind][1]) > 0, said
        assert int(tables[kind][5]) > 0, said
    assert any(line.endswith(" s") for line in said.splitlines()), said
    assert int(said.partition("order within a group: ")[2].split()[0]) > 0, said
    await nothing_left(temporary)


async def test_soak_one_kind_of_fault_keeps_all_promises(temporary: Path) -> None:
    """The option --only limits the faults; no other faults are injected."""
    kind = "standby promoted"
    soak = start(temporary, "--seconds", "8", "--seed", "3", "--only", kind)
    said, _ = soak.communicate(timeout=200)
    assert soak.returncode == 0, said
    _, _, table = said.partition("\nfault ")
    faults = table.partition("\n\n")[0].splitlines()[1:]
    assert faults, said
    assert all(line.startswith(kind) for line in faults), said
    await nothing_left(temporary)


async def test_soak_unknown_kind_of_fault_is_refused(temporary: Path) -> None:
    """The error lists the kinds that exist."""
    soak = start(temporary, "--only", "earthquake")
    said, _ = soak.communicate(timeout=60)
    assert soak.returncode == 2, said
    assert "standby promoted" in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_soak_interrupted_leaves_nothing_behind(
    temporary: Path, signum: signal.Signals
) -> None:
    soak = start(temporary, "--seconds", "600")
    await until(
        lambda: any(b'["Got",' in book.read_bytes() for book in temporary.glob("*/books/*.book")),
        START_TIMEOUT,
    )
    assert len(of(temporary)) > 10
    os.killpg(soak.pid, signum)  # a terminal also signals all processes of the group
    said, _ = soak.communicate(timeout=100)
    assert soak.returncode == 130, said
    assert "interrupted" in said.splitlines()
    assert "Traceback" not in said, said
    await nothing_left(temporary)
