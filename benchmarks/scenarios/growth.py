"""Growth: a series of measurements in which one size is ten times larger each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.scenarios import growth_fanout, growth_idle, growth_load
from benchmarks.scenarios.base import Scale, Scenario

#: The points of each curve, the smallest first.
CURVES: Mapping[str, Sequence[Scenario]] = {
    points[0].name.partition("/")[0]: points
    for points in (
        growth_fanout.MEMBERS,
        growth_fanout.PROCESSES,
        growth_fanout.GROUPS,
        growth_load.TASKS,
        growth_load.SIZE,
        growth_load.WAITING,
        growth_idle.IDLE,
    )
}

POINTS: Mapping[str, Scenario] = {
    point.name: point for points in CURVES.values() for point in points
}


def points_of(curve: str, scale: Scale) -> Sequence[Scenario]:
    """Return the points of a run of this scale: all, all but the largest, or the two smallest."""
    points = CURVES[curve]
    return {"full": points, "quick": points[:-1], "tiny": points[:2]}[scale]
