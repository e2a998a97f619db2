"""The protocols of ``docs/protocols.md`` in arbitrary interleavings, with a real PostgreSQL.

The environment variables PG_LAYER_MODEL_EXAMPLES and PG_LAYER_MODEL_STEPS set how many
interleavings are tried, and how long they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import cast

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devtools.postgres import PostgresServer
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._receive import listener
from tests.integration.protocol_world import (
    GROUPS,
    JOBS,
    Database,
    Immediate,
    ManualConnection,
    Transaction,
    World,
    Writer,
    listening_session,
    run_now,
)

MIGRATIONS = Path(__file__).parents[2] / "migrations"
EXAMPLES = int(os.environ.get("PG_LAYER_MODEL_EXAMPLES", "100"))
STEPS = int(os.environ.get("PG_LAYER_MODEL_STEPS", "40"))

_numbers = count(1)
small, index = st.integers(0, 2), st.integers(0, 7)
sizes = st.sampled_from([10, 10, 2_500, 6_000])
groups = st.sampled_from(GROUPS[:2])


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A database on a server that allows prepared transactions."""
    with PostgresServer(fsync=False, settings={"max_prepared_transactions": 10}) as server:
        dsn = server.create_database("model")
        with psycopg.connect(dsn) as connection:
            for file in sorted(MIGRATIONS.glob("*.sql")):
                if not file.stem.endswith("_reverse"):
                    connection.execute(file.read_bytes())
        database = Database(dsn)
        yield database
        database.close()


class Protocols(RuleBasedStateMachine):
    """Clients, writers, transactions and faults in one world."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.database, next(_numbers))
        self.is_started = False

    @initialize(heard_at_once=st.lists(st.booleans(), min_size=2, max_size=3))
    def start(self, heard_at_once: list[bool]) -> None:
        self.world.start(heard_at_once)
        self.world.make_steady()
        self.is_started = True

    def _process(self, number: int) -> int:
        return number % len(self.world.processes)

    def _writer(self, number: int) -> Writer:
        return self.world.writers[number % len(self.world.writers)]

    def _transaction(self, number: int, is_inside: bool) -> Transaction | None:
        open_ones = [each for each in self.world.transactions if each.prepared is None]
        return open_ones[number % len(open_ones)] if is_inside and open_ones else None

    # ------------------------------------------------------------------ sending

    @rule(
        writer=small,
        messages=st.lists(st.tuples(groups, sizes), min_size=1, max_size=4),
        is_inside=st.booleans(),
        is_refused=st.sampled_from([False, False, False, True]),
    )
    def group_send(
        self, writer: int, messages: list[tuple[str, int]], is_inside: bool, is_refused: bool
    ) -> None:
        transaction = self._transaction(writer, is_inside)
        self.world.write(
            transaction.writer if transaction else self._writer(writer),
            [(group, None) for group, _ in messages],
            [size for _, size in messages],
            transaction,
            is_refused=is_refused,
        )

    @rule(
        writer=small,
        messages=st.lists(st.tuples(small, st.integers(0, 1), sizes), min_size=1, max_size=4),
        is_inside=st.booleans(),
        is_refused=st.sampled_from([False, False, False, True]),
    )
    def send(
        self, writer: int, messages: list[tuple[int, int, int]], is_inside: bool, is_refused: bool
    ) -> None:
        transaction = self._transaction(writer, is_inside)
        channels = [
            self.world.processes[self._process(number)].channels[channel]
            for number, channel, _ in messages
        ]
        self.world.write(
            transaction.writer if transaction else self._writer(writer),
            [(None, channel) for channel in channels],
            [size for _, _, size in messages],
            transaction,
            is_refused=is_refused,
        )

    @rule(writer=small, count=st.integers(1, 3), is_inside=st.booleans())
    def send_jobs(self, writer: int, count: int, is_inside: bool) -> None:
        transaction = self._transaction(writer, is_inside)
        self.world.write(
            transaction.writer if transaction else self._writer(writer),
            [(None, JOBS)] * count,
            [10] * count,
            transaction,
        )

    @rule(writer=small)
    def announce(self, writer: int) -> None:
        self.world.announce(self._writer(writer))

    @rule(writer=small)
    def die_before_announcing(self, writer: int) -> None:
        self._writer(writer).unannounced.clear()

    # ------------------------------------------------------------------ transactions

    @precondition(lambda self: len(self.world.transactions) < 3)
    @rule(writer=small, is_quiet=st.booleans())
    def begin(self, writer: int, is_quiet: bool) -> None:
        self.world.begin(self._writer(writer), is_quiet=is_quiet)

    @precondition(lambda self: self.world.transactions)
    @rule(number=small, is_announced=st.booleans())
    def commit(self, number: int, is_announced: bool) -> None:
        transactions = self.world.transactions
        transaction = transactions[number % len(transactions)]
        self.world.commit(transaction, is_announced=is_announced and transaction.prepared is None)

    @precondition(lambda self: self.world.transactions)
    @rule(number=small)
    def roll_back(self, number: int) -> None:
        transactions = self.world.transactions
        self.world.roll_back(transactions[number % len(transactions)])

    @precondition(lambda self: any(t.is_quiet and not t.prepared for t in self.world.transactions))
    @rule()
    def prepare(self) -> None:
        self.world.prepare(
            next(t for t in self.world.transactions if t.is_quiet and not t.prepared)
        )

    # ------------------------------------------------------------------ memberships

    @rule(
        number=small,
        changes=st.lists(
            st.tuples(groups, st.integers(0, 1), st.booleans()), min_size=1, max_size=3
        ),
    )
    def change(self, number: int, changes: list[tuple[str, int, bool]]) -> None:
        process = self.world.processes[self._process(number)]
        if process.change is None or process.change.done():
            self.world.change(process, changes)

    @rule(
        writer=small,
        number=small,
        group=st.sampled_from(GROUPS),
        channel=st.integers(0, 1),
        added=st.booleans(),
        is_inside=st.booleans(),
    )
    def request(
        self, writer: int, number: int, group: str, channel: int, added: bool, is_inside: bool
    ) -> None:
        transaction = self._transaction(writer, is_inside)
        self.world.request(
            transaction.writer if transaction else self._writer(writer),
            self.world.processes[self._process(number)],
            group,
            channel,
            added,
            transaction,
        )

    # ------------------------------------------------------------------ progress

    @rule(number=small, count=st.integers(1, 12))
    def answer(self, number: int, count: int) -> None:
        self.world.processes[self._process(number)].answer(count)

    @rule(number=small, count=st.sampled_from([1, 2, 1_000]))
    def hear(self, number: int, count: int) -> None:
        self.world.processes[self._process(number)].listener.hear(count)
        self.world.settle()

    @rule(number=small)
    def receive(self, number: int) -> None:
        self.world.processes[self._process(number)].receive()
        self.world.settle()

    @rule(number=small)
    def want_job(self, number: int) -> None:
        self.world.processes[self._process(number)].want_job()
        self.world.settle()

    @rule(number=small)
    def stop_waiting(self, number: int) -> None:
        self.world.processes[self._process(number)].stop_waiting()

    @rule(seconds=st.sampled_from([0.06, 0.6, 3.0, 10.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule()
    def rest(self) -> None:
        self.world.rest()

    # ------------------------------------------------------------------ faults

    @rule(
        number=small,
        call=index,
        is_executed=st.booleans(),
        is_late=st.booleans(),
        comes_later=st.booleans(),
    )
    def lose_answer(
        self, number: int, call: int, is_executed: bool, is_late: bool, comes_later: bool
    ) -> None:
        process = self.world.processes[self._process(number)]
        if process.calls:
            process.lose_call(
                call, is_executed=is_executed, is_late=is_late, comes_later=comes_later
            )
            self.world.settle()

    @rule(number=small, call=index)
    def execute(self, number: int, call: int) -> None:
        """Make the server execute a statement. Its answer does not arrive yet."""
        calls = self.world.processes[self._process(number)].calls
        if calls:
            calls[call % len(calls)].execute()

    @precondition(lambda self: self.world.late)
    @rule(number=index)
    def execute_late(self, number: int) -> None:
        self.world.execute_late(number)

    @rule(number=small)
    def lose_connection(self, number: int) -> None:
        self.world.processes[self._process(number)].lose_listener()
        self.world.settle()

    @precondition(lambda self: self.world.messages)
    @rule(number=st.integers(0, 50))
    def expire(self, number: int) -> None:
        message = self.world.messages[-1 - number % len(self.world.messages)]
        if message.committed and message.serial:
            self.world.expire(message)

    @rule()
    def sweep(self) -> None:
        self.world.sweep()

    @rule()
    def let_leases_be_steady(self) -> None:
        self.world.make_steady()

    @rule(number=small)
    def end_lease(self, number: int) -> None:
        self.world.end_lease(self.world.processes[self._process(number)])

    @rule()
    def reach_the_disk(self) -> None:
        self.world.set_checkpoint()

    @rule(is_undone=st.booleans())
    def crash(self, is_undone: bool) -> None:
        self.world.crash(is_undone=is_undone)

    # ------------------------------------------------------------------ invariants

    @invariant()
    def each_row_is_dispatched_once_and_in_order(self) -> None:
        self.world.check_rows()

    @invariant()
    def each_message_is_received_once(self) -> None:
        self.world.check_received()

    def teardown(self) -> None:
        try:
            if self.is_started:
                self.world.finish()
                self.world.check_end()
        finally:
            self.world.close()


@pytest.fixture
def world(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with two processes at rest."""
    monkeypatch.setattr(listener, "AsyncConnection", ManualConnection)
    monkeypatch.setattr(listener, "Session", listening_session)
    world = World(database, next(_numbers))
    try:
        world.start([False, False])
        yield world
    finally:
        world.close()


def test_renewal_announcement_in_the_socket_is_new_when_it_is_heard(world: World) -> None:
    """A snapshot that sees an unheard message must not become ``S`` before its ping is heard."""
    process, writer = world.processes[0], world.writers[0]
    world.write(writer, [(None, process.channels[0])], [10], None)
    world.advance(20.0)
    process.answer_only("pg_layer_renew")
    process.listener.hear(1)
    process.receive()
    assert process.received[process.channels[0]] == [1]
    world.finish()
    world.check_end()


def test_membership_requested_before_an_own_add_begins_at_the_request(
    world: World,
) -> None:
    """The request is applied after the own add. A message was sent between the two."""
    process, writer = world.processes[0], world.writers[0]
    world.request(writer, process, "a", 1, True, None)
    world.write(writer, [("a", None)], [10], None)
    world.change(process, [("a", 1, True)])
    world.finish()
    world.check_end()
    assert process.received[process.channels[1]] == [1]


def test_renewal_repeated_first_ping_does_not_move_s(world: World) -> None:
    """The first run is committed, its answer is lost, and its ping is heard.

    The snapshot of the second run sees a message that was not heard yet.
    """
    process, writer = world.processes[0], world.writers[0]
    world.advance(20.0)
    (renewal,) = (
        n for n, call in enumerate(process.calls) if "pg_layer_renew" in call.statement.sql.decode()
    )
    process.lose_call(renewal, is_executed=True, is_late=False, comes_later=False)
    process.listener.hear(1)
    world.settle()
    world.advance(1.0)  # the renewal is repeated
    world.write(writer, [(None, process.channels[0])], [10], None)
    process.answer_only("pg_layer_renew")
    world.rest()
    process.receive()
    assert process.received[process.channels[0]] == [1]
    world.finish()
    world.check_end()


def test_catch_up_marked_row_that_s_has_passed_is_received(world: World) -> None:
    """The connection is lost, and so is the announcement of a marked row."""
    process, writer = world.processes[0], world.writers[0]
    world.write(writer, [(None, process.channels[0])], [10], None, is_refused=True)
    world.advance(20.0)
    world.rest()
    process.lose_listener()
    world.settle()
    world.announce(writer)
    world.advance(2.0)
    world.rest()
    process.receive()
    assert process.received[process.channels[0]] == [1]
    world.finish()
    world.check_end()


@pytest.mark.parametrize("is_refused", [False, True], ids=["announced", "marked"])
def test_membership_message_sent_before_it_began_is_not_received(
    world: World, is_refused: bool
) -> None:
    """A catch-up after the first group_add reads older rows; a marked one is announced late."""
    process, writer = world.processes[0], world.writers[0]
    world.write(writer, [("a", None)], [10], None, is_refused=is_refused)
    world.change(process, [("a", 0, True)])
    world.rest()
    process.lose_listener()
    world.settle()
    world.advance(2.0)
    world.rest()
    world.announce(writer)
    world.write(writer, [("a", None)], [10], None)
    world.rest()
    process.receive()
    assert process.received[process.channels[0]] == [2]
    world.finish()
    world.check_end()


def test_catch_up_group_added_while_it_begins_is_read(world: World) -> None:
    """The addresses are collected after the snapshot was taken.

    So a message that is sent after a group_add has returned is either not visible in the
    snapshot, or at one of these addresses.
    """
    process, writer = world.processes[0], world.writers[0]
    process.lose_listener()
    world.settle()
    world.advance(20.0)
    process.answer_only("pg_layer_renew")  # the heartbeat: a catch-up begins without a connection
    world.change(process, [("a", 0, True)])
    process.answer_only("pg_layer_write_memberships")
    assert process.change is not None
    assert process.change.done()
    world.write(writer, [("a", None)], [10], None)
    for text in ("pg_layer_position", "BEGIN", "pg_current_snapshot()"):
        process.answer_only(text)
    world.rest()
    process.receive()
    assert process.received[process.channels[0]] == [1]
    world.finish()
    world.check_end()


def test_restart_announced_row_that_is_not_read_yet_is_not_deleted(world: World) -> None:
    """After a crash of the server the client deletes received rows, and no others."""
    process, writer = world.processes[0], world.writers[0]
    world.write(writer, [(None, process.channels[0])], [6_000], None)
    process.listener.hear(1)
    world.settle()
    assert process.calls
    world.crash(is_undone=False)
    world.advance(0.2)  # the listener connects again before the read is repeated
    world.rest()
    world.finish()
    world.check_end()


def test_claim_reader_waiting_for_dispatch_leaves_jobs_to_others(world: World) -> None:
    """Dispatch waits for a row to be read, so the claimed job is not in the channel queue yet.

    The reader still waits, but another claim would take more jobs than it needs.
    """
    process, other = world.processes
    writer = world.writers[0]
    process.want_job()
    world.rest()
    world.write(writer, [(None, process.channels[0])], [6_000], None)
    process.listener.hear(1)  # the row must be read, and no answer comes
    world.settle()
    world.write(writer, [(None, JOBS)] * 40, [10] * 40, None)
    process.listener.hear(10)
    world.settle()
    for _ in range(20):
        if any("pg_layer_claim" in call.statement.sql.decode() for call in process.calls):
            process.answer_only("pg_layer_claim")
    assert process.queue.holds_jobs(JOBS)
    other.want_job()
    world.settle()
    while other.calls:
        other.answer(1)
    assert len(other.received[JOBS]) == 1
    world.finish()
    world.check_end()


def test_claim_passing_over_a_locked_job_gets_it_at_the_next_heartbeat(world: World) -> None:
    """The claim of another process is rolled back: no announcement of the job follows."""
    process, other = world.processes
    writer = world.writers[0]
    process.want_job()
    world.rest()
    world.write(writer, [(None, JOBS)], [10], None)
    world.begin(writer, is_quiet=True)
    (transaction,) = world.transactions
    client = other.client
    session = cast(Session, Immediate(transaction.wire))
    claim = queries.claim(session, world.prefix, JOBS, client.address, client.fence, 0, 1)
    assert len(run_now(claim)) == 1
    world.rest()
    world.roll_back(transaction)
    world.rest()
    assert process.received[JOBS] == []
    world.advance(20.0)
    world.rest()
    assert process.received[JOBS] == [1]
    world.finish()
    world.check_end()


def test_claim_answer_lost_ping_before_the_catch_up_does_not_move_s(
    world: World,
) -> None:
    """A claim's connection is lost and a ping is heard in one iteration of the loop.

    The catch-up has not begun then. The snapshot of the ping sees the claimed job, which only
    the catch-up can read.
    """
    process, writer = world.processes[0], world.writers[0]
    process.want_job()
    world.rest()
    world.write(writer, [(None, JOBS)], [10], None)
    process.listener.hear(10)
    world.settle()
    (claim,) = (call for call in process.calls if "pg_layer_claim" in call.statement.sql.decode())
    claim.execute()
    world.advance(20.0)
    (renewal,) = (call for call in process.calls if "pg_layer_renew" in call.statement.sql.decode())
    renewal.execute()
    claim.fail(is_late=True)
    renewal.finish()
    world.loop.call_soon(process.listener.hear, 10)  # after the next step of both tasks
    world.settle()
    world.rest()
    assert process.received[JOBS] == [1]
    world.finish()
    world.check_end()


def test_release_outcome_unknown_keeps_the_idle_reader(world: World) -> None:
    """Heartbeats pass before the process knows which jobs were released.

    If the reader were dropped, another reader of the channel would claim jobs meanwhile. Its
    release would replace the first one.
    """
    process, writer = world.processes[0], world.writers[0]

    def answer_all() -> None:
        """Stop waiting when a claim is answered, so that its jobs are released after a moment."""
        while process.calls:
            if "pg_layer_claim" in process.calls[0].statement.sql.decode():
                process.stop_waiting()
            process.answer(1)
        world.advance(0.06)

    process.want_job()
    world.rest()
    world.write(writer, [(None, JOBS)], [10], None)
    process.listener.hear(10)
    world.settle()
    answer_all()
    process.lose_call(0, is_executed=False, is_late=True, comes_later=False)
    world.settle()
    assert process.client.releasing
    for _ in range(2):
        process.owner.receiver.jobs.forget_idle()
    world.write(writer, [(None, JOBS)], [10], None)
    process.want_job()
    world.settle()
    answer_all()
    answer_all()
    world.finish()
    world.check_end()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_protocols_any_interleaving_keeps_their_invariants(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message is lost, doubled or out of order."""
    monkeypatch.setattr(listener, "AsyncConnection", ManualConnection)
    monkeypatch.setattr(listener, "Session", listening_session)
    Protocols.database = database
    run_state_machine_as_test(
        Protocols,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
