"""The benchmarks' readings about processes."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.resources import Processes, local_process, raise_file_limit


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that uses 0.2 s of CPU and 50 MB when it reads a line, then prints a line."""
    code = """
import sys, time
sys.stdin.readline()
held = bytearray(b"x") * 50_000_000
while time.process_time() < 0.2:
    pass
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process


def test_processes_count_descendants_while_they_run_and_afterwards(
    child: subprocess.Popen[str],
) -> None:
    ours = Processes([psutil.Process()])
    before = ours.cpu(), ours.memory()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "ready\n"
    assert ours.cpu() - before[0] > 0.1
    assert ours.memory() - before[1] > 40e6
    child.communicate()
    assert child.returncode == 0
    assert ours.cpu() - before[0] > 0.1


BURN = """
import time
while time.process_time() < 0.3: pass
print(time.process_time(), flush=True)
input()
"""


def test_processes_cpu_equals_that_of_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        used = float(child.stdout.readline())
        assert Processes([psutil.Process(child.pid)]).cpu() == pytest.approx(used, abs=0.2)
        child.communicate("done\n")


def test_processes_empty_list_has_no_cost() -> None:
    assert math.isnan(Processes([]).cpu())
    assert math.isnan(Processes([]).memory())


def test_local_process_compares_the_pid_and_the_start_time() -> None:
    own = psutil.Process()
    assert local_process(own.pid, own.create_time()) == own
    assert local_process(own.pid, own.create_time() - 3600) is None
    assert local_process(2**22 + 1, own.create_time()) is None


def test_raise_file_limit_raises_it_and_never_lowers_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_file_limit(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, before[1])
        raise_file_limit(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
