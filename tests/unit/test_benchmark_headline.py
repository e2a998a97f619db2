"""The text above the benchmarks' tables: the facts that a reader needs to judge the figures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import context, headline

DURABILITY = {"pg": "lazily", "core": "no persistence", "pubsub": "no persistence"}


def known(start: float | None) -> dict[str, Any]:
    found = context(
        {},
        {"postgres": {"server_version": "18"}},
        DURABILITY,
        None if start is None else [start] * 3,
    )
    found["machine"]["cores"] = 4
    found["load average"]["end"] = [3.0, 2.0, 1.0]
    return found


def test_headline_names_the_durability_of_the_writes() -> None:
    assert known(0.0)["durability"] == DURABILITY
    line = "the layers' own writes: pg_layer: lazily; redis core, redis pub/sub: no persistence"
    assert line in headline(known(0.0)).splitlines()


@pytest.mark.parametrize(("load", "busy"), [(2.0, False), (2.01, True)])
def test_headline_of_a_busy_machine_has_a_warning(load: float, busy: bool) -> None:
    words = headline(known(load))
    assert (
        f"load average (1 minute): {load:.2f} at the start, 3.00 at the end" in words.splitlines()
    )
    assert ("WARNING: the machine was busy" in words) == busy


def test_headline_without_a_load_average_omits_it() -> None:
    assert "load average" not in headline(known(None))
