"""Processes that fork: pre-forking servers, worker pools, `multiprocessing`."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from tests.conftest import Observer
from tests.integration.test_django import postgres
from tests.processes import Link, Process, Processes, listen, open_layer, until
from tests.project.commands import run, succeeded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def forking(migrated_dsn: str) -> Any:
    """Runs one of the programs, which must succeed without warnings."""

    def run_program(name: str) -> dict[str, Any]:
        output = succeeded(run(migrated_dsn, "-m", "tests.project.forks", name))
        result: dict[str, Any] = json.loads(output)
        return result

    return run_program


def assert_different(clients: list[str]) -> None:
    assert all(clients)
    assert len(set(clients)) == len(clients)


def test_fork_before_use_makes_different_clients(forking: Any) -> None:
    result = forking("before_use")
    assert_different(result["clients"])


def test_fork_after_use_makes_a_new_client_in_the_child_only(forking: Any) -> None:
    result = forking("after_use")
    assert_different(result["clients"])
    assert result["again"] == result["clients"][0]  # the parent is still the same client


def test_fork_while_the_parent_receives_keeps_its_connections_and_messages(forking: Any) -> None:
    result = forking("while_receiving")
    assert_different(result["clients"])
    assert result["numbers"] == [1, 2, 3]
    assert 2 <= result["connections"] <= 3
    assert result["kept"], "a child disturbed its parent's connections"


def test_fork_after_synchronous_use_keeps_the_connections_and_the_order(forking: Any) -> None:
    result = forking("after_sync_use")
    assert_different(result["clients"])
    assert 2 <= result["connections"] <= 3  # a process with members listens
    assert result["kept"], "a child disturbed its parent's connections"
    assert result["numbers"][0] == -1
    assert sorted(result["numbers"]) == list(range(-1, 250))
    for first in range(0, 250, 50):  # each process in its order
        own = [n for n in result["numbers"] if first <= n < first + 50]
        assert own == sorted(own)


def test_fork_children_that_close_leave_the_parent_unchanged(forking: Any) -> None:
    result = forking("children_that_leave_in_order")
    assert result["idle"] == [None, None]
    assert_different(result["clients"])
    assert result["kept"], "a child disturbed its parent's connections"
    assert result["numbers"] == [1, 2]


def test_fork_close_in_a_child_leaves_the_parent_open(forking: Any) -> None:
    assert forking("a_childs_close") == {"numbers": [1], "is_alone": True}


def test_fork_receive_in_a_child_on_a_channel_of_its_parent_raises(forking: Any) -> None:
    result = forking("foreign_channels")
    assert result["outcome"].startswith("TypeError: ")
    assert "another process" in result["outcome"]
    assert result["numbers"] == [1]


def test_fork_of_a_child_makes_a_third_client(forking: Any) -> None:
    result = forking("grandchildren")
    assert len(result["clients"]) == 3
    assert_different(result["clients"])


def test_multiprocessing_children_are_different_clients(forking: Any, observer: Observer) -> None:
    result = forking("with_multiprocessing")
    assert_different(result["clients"])
    assert result["statuses"] == [0, 0]


def test_multiprocessing_children_that_end_leave_no_lease(forking: Any) -> None:
    result = forking("multiprocessing_ends")
    assert_different(result["clients"])
    assert result["left"] == []
    assert result["parent"]
    assert result["statuses"] == [0, 0, 0, 3, 0]


def test_fork_while_threads_send_loses_no_message(forking: Any) -> None:
    assert forking("while_threads_send") == {"numbers": list(range(12))}


async def hear_room_and_jobs(link: Link, dsn: str) -> None:
    """A server with two consumers in a room and one worker."""
    async with open_layer(dsn, capacity=100_000) as layer:
        channels = [await layer.new_channel() for _ in range(2)]
        for channel in channels:
            await layer.group_add("room", channel)
        await listen(layer)

        async def read(channel: str) -> None:
            while True:
                link.say((channel, (await layer.receive(channel))["n"]))

        reading = [asyncio.create_task(read(channel)) for channel in (*channels, "jobs")]
        link.say("ready")
        await link.hear()
        for task in reading:
            task.cancel()


async def test_forked_task_workers_sending_in_transactions_lose_and_double_nothing(
    migrated_dsn: str, processes: Processes, observer: Observer
) -> None:
    servers = [processes.start(hear_room_and_jobs, migrated_dsn) for _ in range(2)]
    for server in servers:
        assert await server.hear() == "ready"
    settings = {
        "DATABASES": {
            "default": {
                **postgres(migrated_dsn),
                "OPTIONS": {"application_name": "pg_layer_test_parent"},
            }
        },
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"capacity": 100_000}}
        },
    }
    arguments = ("-m", "tests.project.forks", "tasks_in_transactions")
    output = await asyncio.to_thread(
        lambda: succeeded(run(migrated_dsn, *arguments, settings=settings))
    )
    assert json.loads(output)["connections"] <= 4  # Django's own, one a process

    tasks = [n for first in range(1000, 5000, 1000) for n in range(first, first + 400, 2)]
    committed = [n + 1 for n in tasks if n % 10]
    room, jobs = sorted([*tasks, *committed]), sorted([0, *committed])
    heard: list[list[tuple[str, int]]] = [[], []]

    async def hear(server: Process[None], said: list[tuple[str, int]]) -> None:
        while True:
            said.append(await server.hear())

    hearing = [asyncio.create_task(hear(*pair)) for pair in zip(servers, heard, strict=True)]
    await until(lambda: sum(map(len, heard)) >= 4 * len(room) + len(jobs))
    for task in hearing:
        task.cancel()
    assert sorted(n for said in heard for channel, n in said if channel == "jobs") == jobs
    for said in heard:
        for channel in {channel for channel, _ in said} - {"jobs"}:
            numbers = [n for name, n in said if name == channel]
            assert sorted(numbers) == room
            for first in range(1000, 5000, 1000):  # each worker in its order
                assert [n for n in numbers if first <= n < first + 1000] == [
                    n for n in room if first <= n < first + 1000
                ]
