"""The scenarios by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.scenarios import (
    churn,
    connections,
    groups,
    growth,
    joins,
    neighbours,
    point,
    sync,
    websockets,
    workers,
)
from benchmarks.scenarios.base import Scale, Scenario

#: The default scenarios of a run.
SCENARIOS: Mapping[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        point.LATENCY,
        point.THROUGHPUT,
        point.SERIAL,
        groups.FAN_OUT,
        groups.FAN_OUT_LATENCY,
        churn.CHURN,
        joins.JOINS,
        sync.SYNC,
        sync.NATIVE_SYNC,
        workers.WORKERS,
        websockets.WEBSOCKETS,
        websockets.WEBSOCKETS_ROOM,
        connections.CONNECTIONS,
        neighbours.NEIGHBOURS,
    )
}

#: These and each point of each curve.
EVERY: Mapping[str, Scenario] = {**SCENARIOS, **growth.POINTS}

#: Names that mean several scenarios.
SETS = ("all", "growth", *growth.CURVES)


def choose(names: Sequence[str], scale: Scale) -> list[Scenario]:
    """Return the scenarios of these names, each once. Raise KeyError for an unknown name.

    A curve means those of its points that a run of this scale includes. "growth" means all curves,
    and "all" means all scenarios and curves.
    """
    chosen: dict[str, Scenario] = {}
    for name in names:
        if name in EVERY:
            chosen[name] = EVERY[name]
            continue
        if name == "all":
            chosen.update(SCENARIOS)
        for curve in growth.CURVES if name in ("all", "growth") else (name,):
            chosen.update((point.name, point) for point in growth.points_of(curve, scale))
    return list(chosen.values())
