"""What running processes have cost, with all their descendants; and how many files one may open."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import psutil
import psycopg

from benchmarks.layers import KINDS, LayerSpec

#: How far apart a process's start may be by the system's account and by its own.
_SAME_START = 5.0

#: Linux: the exact one among the CPU clocks of a process.
_CPUCLOCK_SCHED = 2


class Processes:
    """Some processes and their descendants, looked at again with each call. Without any, all is NaN."""

    def __init__(self, roots: Sequence[psutil.Process]) -> None:
        self._roots = roots

    def cpu(self) -> float:
        """CPU seconds so far, user and system, those of descendants that have ended included."""
        if not self._roots:
            return math.nan
        total = 0.0
        for process in self._all():
            with suppress(
                psutil.NoSuchProcess
            ):  # ended meanwhile: its parent has it among its children
                total += _cpu(process)
        return total

    def memory(self) -> float:
        """Bytes of memory in use; a page that several processes share is split among them, where the
        system tells (Linux), and else counted for each. NaN if the processes are somebody else's.
        """
        if not self._roots:
            return math.nan
        total = 0.0
        for process in self._all():
            try:
                known = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                return math.nan
            total += getattr(known, "pss", known.rss)
        return total

    def _all(self) -> Iterator[psutil.Process]:
        """Descendants first: what ends while we look is then still seen in its parent's account."""
        for root in self._roots:
            yield from reversed(root.children(recursive=True))
            yield root


def server_of(spec: LayerSpec) -> Processes:
    """The processes of the layer's database or Redis; none if they do not run on this machine."""
    find = {"postgres": _postmaster, "redis": _redis}.get(KINDS[spec.name].server)
    found = find(spec.address) if find else None
    return Processes([found] if found else [])


def raise_file_limit(wanted: int = 4096) -> None:
    """Let this process open so many files, as far as the system's hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _cpu(process: psutil.Process) -> float:
    """What one process has used so far, and its children that have ended."""
    times = process.cpu_times()
    ended = times.children_user + times.children_system
    if sys.platform == "linux":
        # psutil reads hundredths of a second there, too coarse for the many processes of a server. This is
        # what clock_getcpuclockid() returns, which Python does not have.
        with suppress(OSError):
            return time.clock_gettime(~process.pid << 3 | _CPUCLOCK_SCHED) + ended
    return times.user + times.system + ended


def _postmaster(dsn: str) -> psutil.Process | None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT pid, extract(epoch FROM backend_start)::float8 FROM pg_stat_activity"
            " WHERE pid = pg_backend_pid()"
        ).fetchone()
        backend = local_process(int(row[0]), float(row[1])) if row else None
        return backend.parent() if backend else None


def _redis(url: str) -> psutil.Process | None:
    import redis

    with redis.Redis.from_url(url) as client:
        known = client.info("server")
    return local_process(int(known["process_id"]), time.time() - float(known["uptime_in_seconds"]))


def local_process(pid: int, started: float) -> psutil.Process | None:
    """The process with this number, which began at this time of the wall clock.

    None if there is no such process: it runs on another machine, or in a container.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SAME_START
    except psutil.Error:
        return None
    return process if same else None
