"""CPU and memory of running processes with their descendants, and the limit of open files."""

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

#: Seconds by which the start of a process may differ between the system's record and its own.
_SAME_START = 5.0

#: Linux: the exact one of the CPU clocks of a process.
_CPUCLOCK_SCHED = 2


class Processes:
    """Processes and their descendants, looked up at each call. Without any, figures are NaN."""

    def __init__(self, roots: Sequence[psutil.Process]) -> None:
        self._roots = roots

    def cpu(self) -> float:
        """Return CPU seconds, user and system, including descendants that have ended."""
        if not self._roots:
            return math.nan
        total = 0.0
        for process in self._all():
            with suppress(
                psutil.NoSuchProcess
            ):  # it has ended meanwhile; its parent counts it among its children
                total += _cpu(process)
        return total

    def memory(self) -> float:
        """Return the bytes of memory in use. NaN if the processes belong to another user.

        On Linux a shared page is divided among its processes. Elsewhere each process counts it.
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
        """Return descendants first: one that ends meanwhile is then in its parent's account."""
        for root in self._roots:
            yield from reversed(root.children(recursive=True))
            yield root


def server_of(spec: LayerSpec) -> Processes:
    """Return the processes of the layer's server, or none if it runs on another machine."""
    find = {"postgres": _postmaster, "redis": _redis}.get(KINDS[spec.name].server)
    found = find(spec.address) if find else None
    return Processes([found] if found else [])


def raise_file_limit(wanted: int = 4096) -> None:
    """Raise the limit of open files as far as the system's hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _cpu(process: psutil.Process) -> float:
    """Return what a process and its ended children have used."""
    times = process.cpu_times()
    ended = times.children_user + times.children_system
    if sys.platform == "linux":
        # psutil reads hundredths of a second here, which is too coarse for the many processes of a
        # server. This is the result of clock_getcpuclockid(), which Python does not provide.
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
    """Return the process with this pid that started at this wall clock time.

    Return None if there is none, because it runs on another machine or in a container.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SAME_START
    except psutil.Error:
        return None
    return process if same else None
