"""Counters: exact on any thread, the values of `stats()`, and their documentation."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._state.counters import COUNTED, Counters, Counts, State, Stats, make_stats

THREADS = 8
TIMES = 2000

DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "monitoring.md").read_text(
    encoding="utf-8"
)

NOTHING = State(
    channels=0,
    queued_messages=0,
    pending_announcements=0,
    pending_operations=0,
    memberships=0,
    remembered_keys=0,
    listener="off",
    lease_age=None,
    failing_tasks=0,
)


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads switch so often that any code of more than one step is interrupted."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class SlowName(str):
    """A name whose look-up takes several steps, between which another thread may run."""

    def __hash__(self) -> int:
        return super().__hash__()


def counts(**some: int) -> Counts:
    return cast(Counts, {**dict.fromkeys(COUNTED, 0), **some})


# ---------------------------------------------------------------------- counting


def test_counters_begin_at_zero() -> None:
    assert Counters().read() == counts()


@given(st.lists(st.tuples(st.sampled_from(COUNTED), st.integers(0, 1000))))
def test_add_increases_one_counter(events: list[tuple[str, int]]) -> None:
    counters, expected = Counters(), Counter[str]()
    for name, count in events:
        if name == "delivered":
            for _ in range(count):
                counters.delivered()
        else:
            counters.add(name, count)
        expected[name] += count
        assert counters[name] == expected[name]
    assert counters.read() == counts(**expected)


def test_read_changes_no_counter() -> None:
    counters = Counters()
    counters.delivered()
    assert [counters.read()["delivered"] for _ in range(100)] == [1] * 100


def test_read_result_does_not_change_later() -> None:
    counters = Counters()
    read = counters.read()
    counters.add("sent")
    counters.delivered()
    assert read == counts()


def test_add_unknown_name_raises() -> None:
    with pytest.raises(KeyError):
        Counters().add("sendt")


def test_since_returns_the_increase() -> None:
    counters = Counters()
    counters.add("sent", 3)
    counters.delivered()
    before = counters.read()
    counters.add("sent", 2)
    counters.delivered()
    assert counters.since(before) == counts(sent=2, delivered=1)


@pytest.mark.usefixtures("hasty_switches")
def test_add_in_threads_loses_no_count_during_reads() -> None:
    counters = Counters()
    seen: list[Counts] = []
    is_over = Event()

    def read() -> None:
        while not is_over.is_set():
            seen.append(counters.read())

    def count(seed: int) -> None:
        names = [*map(SlowName, COUNTED), *["delivered"] * len(COUNTED)] * TIMES
        random.Random(seed).shuffle(names)
        for name in names:
            if name == "delivered":
                counters.delivered()
            else:
                counters.add(name)

    reader = Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(count, range(THREADS)))
    is_over.set()
    reader.join()
    expected = dict.fromkeys(COUNTED, THREADS * TIMES)
    expected["delivered"] *= 1 + len(COUNTED)
    assert counters.read() == expected
    assert len(seen) > 1
    for name in COUNTED:
        values = [read[name] for read in seen]  # type: ignore[literal-required]
        assert values == sorted(values)


# ---------------------------------------------------------------------- values of `stats()`


def test_make_stats_joins_counters_and_state() -> None:
    state = State(
        channels=1,
        queued_messages=2,
        pending_announcements=3,
        pending_operations=4,
        memberships=5,
        remembered_keys=6,
        listener="polling",
        lease_age=0.5,
        failing_tasks=0,
    )
    counted = counts(**{name: number for number, name in enumerate(COUNTED, start=10)})
    stats = make_stats(counted, state)
    assert {name: stats[name] for name in COUNTED} == counted  # type: ignore[literal-required]
    assert {name: stats[name] for name in state} == state  # type: ignore[literal-required]
    assert set(stats) == set(Stats.__annotations__)
    assert json.loads(json.dumps(stats)) == stats


@pytest.mark.parametrize(
    ("counted", "mean"),
    [
        (counts(), 0.0),
        (counts(batches=1, sent=1), 1.0),
        (counts(batches=2, sent=1, group_sent=6, refused_full=2), 4.5),
    ],
)
def test_make_stats_computes_the_mean_batch_size(counted: Counts, mean: float) -> None:
    assert make_stats(counted, NOTHING)["mean_batch_size"] == mean


# ---------------------------------------------------------------------- its documentation


def documented_keys(heading: str) -> list[str]:
    section = DOCUMENT.split(f"### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_documented_counters_are_complete() -> None:
    assert documented_keys("Counters") == list(COUNTED)


def test_documented_state_is_complete() -> None:
    assert documented_keys("State") == [*State.__annotations__, "mean_batch_size"]


@pytest.mark.parametrize("kind", [Counts, State])
def test_docstrings_name_every_key(kind: type) -> None:
    named = re.findall(r"``(\w+)``[:,]", str(kind.__doc__))
    assert named == list(kind.__annotations__)
