"""The names of all measurements: a scenario and a point of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.compared.base import Measure
from benchmarks.compared.endurance import endurance
from benchmarks.compared.existing import existing
from benchmarks.compared.groups import cpu, latency, processes, receivers
from benchmarks.compared.restore import restore
from benchmarks.compared.transactions import paced, unpaced

_PROCESSES = (1, 4, 16, 64)
_EXISTING = (
    *(
        "latency",
        "throughput",
        "serial",
        "fan-out",
        "fan-out-latency",
        "churn",
        "sync",
        "native-sync",
    ),
    *("workers", "websockets", "websockets-room", "connections"),
)

#: Measurements that run only if they are named.
ON_DEMAND = ("processes-stopped", "processes-live", "restore", "endurance", "existing")

POINTS: Mapping[str, Measure] = {
    **{f"processes/{n}": partial(processes, count=n, state="gone") for n in _PROCESSES},
    **{f"processes-stopped/{n}": partial(processes, count=n, state="stopped") for n in _PROCESSES},
    **{f"processes-live/{n}": partial(processes, count=n, state="live") for n in _PROCESSES},
    **{f"transactions/{n}": partial(unpaced, clients=n) for n in (16, 64)},
    "transactions/paced": partial(paced, clients=16),
    **{f"receivers/{n}": partial(receivers, count=n) for n in (4, 16)},
    **{f"cpu/{n}": partial(cpu, count=n) for n in (1, 4, 16)},
    "latency/one": partial(latency, count=1, members=1, rate=100),
    "latency/fan-out": partial(latency, count=2, members=100, rate=20),
    "restore/200000": partial(restore, memberships=200_000),
    "endurance/free": partial(endurance, held=False),
    "endurance/held": partial(endurance, held=True),
    **{f"existing/{name}": partial(existing, scenario=name) for name in _EXISTING},
}


def choose(names: Sequence[str]) -> list[str]:
    """Return the points of these scenarios or points; by default all but those on demand.

    Raise ``ValueError`` for an unknown name.
    """
    scenarios = dict.fromkeys(point.partition("/")[0] for point in POINTS)
    wanted = names or [name for name in scenarios if name not in ON_DEMAND]
    if unknown := [name for name in wanted if name not in {*POINTS, *scenarios}]:
        known = ", ".join([*scenarios, *POINTS])
        raise ValueError(f"unknown: {', '.join(unknown)}; choose from {known}")
    return [
        point
        for name in dict.fromkeys(wanted)
        for point in POINTS
        if point == name or point.partition("/")[0] == name
    ]
