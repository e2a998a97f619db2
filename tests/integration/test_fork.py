"""Processes that fork: pre-forking servers, worker pools, `multiprocessing`."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.conftest import Observer
from tests.project.commands import run, succeeded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def forking(migrated_dsn: str) -> Any:
    """Runs one of the programs; it must end well and complain of nothing."""

    def run_program(name: str) -> dict[str, Any]:
        output = succeeded(run(migrated_dsn, "-m", "tests.project.forks", name))
        result: dict[str, Any] = json.loads(output)
        return result

    return run_program


def assert_different(clients: list[str]) -> None:
    assert all(clients)
    assert len(set(clients)) == len(clients)


def test_fork_before_use(forking: Any) -> None:
    result = forking("before_use")
    assert_different(result["clients"])


def test_fork_after_use(forking: Any) -> None:
    result = forking("after_use")
    assert_different(result["clients"])
    assert result["again"] == result["clients"][0]  # the parent is who it was


def test_fork_while_the_parent_receives(forking: Any) -> None:
    result = forking("while_receiving")
    assert_different(result["clients"])
    assert result["numbers"] == [1, 2, 3]
    assert 2 <= result["connections"] <= 3
    assert result["kept"], "a child disturbed its parent's connections"


def test_fork_after_synchronous_use(forking: Any) -> None:
    result = forking("after_sync_use")
    assert_different(result["clients"])
    assert result["connections"] == 1
    assert result["kept"], "a child disturbed its parent's connections"
    assert result["numbers"][0] == -1
    assert sorted(result["numbers"]) == list(range(-1, 250))
    for first in range(0, 250, 50):  # each process in its order
        own = [n for n in result["numbers"] if first <= n < first + 50]
        assert own == sorted(own)


def test_children_that_end_in_order_leave_the_parent_alone(forking: Any) -> None:
    result = forking("children_that_leave_in_order")
    assert result["idle"] == [None, None]
    assert_different(result["clients"])
    assert result["kept"], "a child disturbed its parent's connections"
    assert result["numbers"] == [1, 2]


def test_close_in_a_child_closes_the_child_only(forking: Any) -> None:
    assert forking("a_childs_close") == {"numbers": [1], "is_alone": True}


def test_a_child_cannot_receive_on_its_parents_channels(forking: Any) -> None:
    result = forking("foreign_channels")
    assert result["outcome"].startswith("TypeError: ")
    assert "another process" in result["outcome"]
    assert result["numbers"] == [1]


def test_grandchildren(forking: Any) -> None:
    result = forking("grandchildren")
    assert len(result["clients"]) == 3
    assert_different(result["clients"])


def test_children_of_multiprocessing(forking: Any, observer: Observer) -> None:
    result = forking("with_multiprocessing")
    assert_different(result["clients"])
    assert result["statuses"] == [0, 0]


def test_fork_while_threads_send(forking: Any) -> None:
    assert forking("while_threads_send") == {"numbers": list(range(12))}
