"""The scenarios, by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.scenarios import churn, connections, groups, neighbours, point, sync, websockets, workers
from benchmarks.scenarios.base import Scenario

SCENARIOS: Mapping[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        point.LATENCY,
        point.THROUGHPUT,
        groups.FAN_OUT,
        groups.FAN_OUT_LATENCY,
        churn.CHURN,
        sync.SYNC,
        sync.NATIVE_SYNC,
        workers.WORKERS,
        websockets.WEBSOCKETS,
        websockets.WEBSOCKETS_ROOM,
        connections.CONNECTIONS,
        neighbours.NEIGHBOURS,
    )
}
