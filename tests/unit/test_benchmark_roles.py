"""The roles of the benchmarks: kinds of layers, tasks of one event loop, roles without a layer."""

from __future__ import annotations

import asyncio
import inspect
import logging
from dataclasses import replace
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ceiling, cli, pgbench, servers, worker
from benchmarks.board import Board
from benchmarks.ceiling import Ceiling, line, transactions_per_second
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.bare import Record
from benchmarks.scenarios.base import Roles, Run, Scenario, Sizes, Stage, message
from benchmarks.statistics import Outcome, Tally

PGBENCH = """\
transaction type: /tmp/script.sql
number of transactions actually processed: 3405
latency average = 1.174 ms
initial connection time = 4.521 ms
tps = 3407.262319 (without initial connection time)
"""


@pytest.mark.parametrize("name", ["pg", "core", "pubsub", "postgres"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_roles_of_layers_of_many_processes_are_those_of_the_scenario(
    scenario: Scenario, name: str
) -> None:
    assert scenario.roles(KINDS[name]) == Roles(scenario.send, scenario.receive)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_roles_of_a_memory_layer_need_no_thread_and_no_server(scenario: Scenario) -> None:
    roles = scenario.roles(KINDS["memory"])
    assert (roles is not None) == scenario.in_one_loop
    assert roles is None or inspect.iscoroutinefunction(roles.send)
    assert not SCENARIOS["connections"].in_one_loop


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_roles_of_the_bare_layer_are_those_that_the_scenario_names(scenario: Scenario) -> None:
    roles = scenario.roles(KINDS["bare"])
    assert roles == scenario.bare
    assert roles != Roles(scenario.send, scenario.receive)
    assert roles is None or (roles.receive is None) == (scenario.receive is None)


def test_part_of_a_scenario_without_roles_raises() -> None:
    part = worker.Part("receive", 0, "connections", LayerSpec("bare", ""), Sizes(0))
    with pytest.raises(ValueError, match="connections cannot be played with bare"):
        _ = part.roles


@pytest.mark.parametrize("name", ["latency", "throughput", "serial", "fan-out", "churn"])
def test_play_all_reports_what_sender_and_receivers_report(name: str) -> None:
    scenario = SCENARIOS[name]
    sizes = scenario.scales["tiny"]
    board = Board(sizes.processes)
    part = worker.Part("all", 0, name, LayerSpec("memory", "this process"), sizes)
    ours, theirs = Pipe()

    async def run() -> tuple[Any, list[Any]]:
        stage = Stage(part.spec, KINDS["memory"].create(""), sizes, board)
        playing = asyncio.ensure_future(worker.play_all(stage, part.roles, theirs))
        word, sent = await asyncio.to_thread(ours.recv)
        assert word == "report"
        while board.deliveries < scenario.expected(sent, sizes) and not playing.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        board.stop()
        await asyncio.wait_for(playing, 20)
        return sent, [ours.recv()[1] for _ in range(sizes.processes)]

    sent, receipts = asyncio.run(run())
    outcome: Outcome = scenario.summarise(
        Run(sizes, sent, receipts, board.deliveries, board.start_ns, board.latest_ns)
    )
    assert outcome.tally == Tally()
    assert all(value > 0 for value in outcome.figures.values())
    assert len(receipts) == sizes.processes


async def test_play_all_raises_the_error_of_a_receiver() -> None:
    async def broken(stage: Stage) -> None:
        raise RuntimeError("no such channel")

    part = worker.Part(
        "all", 0, "latency", LayerSpec("memory", ""), SCENARIOS["latency"].scales["tiny"]
    )
    stage = Stage(part.spec, KINDS["memory"].create(""), part.sizes, Board(1))
    roles = replace(part.roles, receive=broken)
    _, theirs = Pipe()
    with pytest.raises(RuntimeError, match="no such channel"):
        await asyncio.wait_for(worker.play_all(stage, roles, theirs), 20)


def test_end_with_ends_the_process_when_its_parent_has_ended() -> None:
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=worker.end_with, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert process.is_alive()
    ours.close()
    process.join(60)
    assert process.exitcode == 1


def _stage(members: int) -> Stage:
    return Stage(
        LayerSpec("bare", ""), KINDS["bare"].create(""), Sizes(1, members=members), Board(1)
    )


def test_record_of_a_bare_row_for_all_counts_each_member() -> None:
    stage = _stage(3)
    record = Record(stage, for_all=True)
    record.take(message(0, -1, 0))
    assert (stage.board.warmed(0), stage.board.deliveries) == (1, 0)
    for number in (0, 2, 2):
        record.take(message(0, number, 0))
    assert stage.board.deliveries == 6
    assert [streams[0].tally(3) for streams in record.receipt.streams] == [
        Tally(lost=1, twice=1)
    ] * 3


def test_record_of_a_bare_row_for_one_channel_counts_that_channel() -> None:
    stage = _stage(2)
    record = Record(stage, for_all=False, ages=True, log=True)
    record.take(message(1, 0, 0))
    assert stage.board.deliveries == 1
    assert record.receipt.streams[0] == {}
    assert record.receipt.streams[1][1].tally(1) == Tally()
    assert record.receipt.log == [(1, 0)]
    assert len(record.receipt.ages) == 1


def test_emptied_without_a_server_returns_a_failed_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "_TIMEOUT", 0.0)
    outcome = cli.emptied(LayerSpec("pg", "host=127.0.0.1 port=1"))
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.startswith("the server could not be emptied: ")
    assert cli.emptied(LayerSpec("memory", "this process")) is None


def test_first_few_filter_passes_three_records_of_each_logger() -> None:
    shown = worker.FirstFew()
    records = [logging.LogRecord(name, logging.ERROR, "", 0, "", None, None) for name in "aaaaab"]
    assert [shown.filter(record) for record in records] == [True] * 3 + [False] * 2 + [True]


def test_ceilings_without_a_database_have_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ceiling, "find_pgbench", lambda: "pgbench")
    found = ceiling.measure("host=127.0.0.1 port=1", ceiling.Plan(1, [1, 2]))
    assert [(one.title, one.clients) for one in found] == [
        (script.title, clients) for script in ceiling.SCRIPTS for clients in (1, 2)
    ]
    assert all(one.error and "connection" in one.error for one in found)


def test_ceilings_without_pgbench_raise_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgbench, "find_binaries", lambda: Path("/nowhere"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(servers.Unavailable, match="No pgbench found"):
        ceiling.measure("", ceiling.PLANS["tiny"])


def test_pgbench_report_yields_transactions_per_second() -> None:
    assert transactions_per_second(PGBENCH) == 3407.262319


def test_pgbench_report_without_tps_raises() -> None:
    with pytest.raises(ValueError, match="reported no tps: pgbench: error: relation"):
        transactions_per_second("pgbench: error: relation does not exist")


def test_ceilings_line_names_rates_or_the_error() -> None:
    words = " ".join(line(Ceiling("insert 100 rows", 4, 1_500.4, 150_040.0)).split())
    assert words == "pgbench insert 100 rows 4 clients 1,500 transactions/s 150,040 rows/s"
    broken = line(Ceiling("insert", 1, error="it broke"))
    assert " ".join(broken.split()) == "pgbench insert 1 client it broke"
