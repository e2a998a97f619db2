"""Sessions: statements on a connection, and what happens to the next one after a failure."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from psycopg import AsyncConnection, errors

from pg_layer import PostgresChannelLayer
from pg_layer._db import session as session_module
from pg_layer._db.session import Session
from pg_layer._db.statement import BYTEA, FLOAT8, INT4, INT8S, TEXT, TEXTS, Statement
from tests.conftest import MakeLayer, Observer
from tests.processes import until

TIMEOUT = 20.0
ECHO = Statement("SELECT $1, $2, $3, $4", TEXT, INT4, FLOAT8, BYTEA)
ARRAYS = Statement("SELECT $1, $2", TEXTS, INT8S)
LENGTH = Statement("SELECT octet_length($1), $1", BYTEA)
NUMBER = Statement("SELECT $1", INT4)
WAIT = Statement("SELECT 'waited' FROM pg_advisory_xact_lock_shared(7)")
BEGIN = Statement("BEGIN")
WRONG = Statement("SELECT 1 / $1", INT4)
DEALLOCATE = Statement("DEALLOCATE ALL")
PREPARED = Statement("SELECT count(*) FROM pg_prepared_statements")
# A deferred trigger runs at the commit, when the server has sent the result of the statement.
ENDING_AT_THE_COMMIT = (
    "CREATE TEMP TABLE sent (id integer)",
    """
    CREATE FUNCTION pg_temp.end_backend() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_terminate_backend(pg_backend_pid());
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE CONSTRAINT TRIGGER at_the_commit AFTER INSERT ON sent DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION pg_temp.end_backend()
    """,
)


@pytest.fixture(params=[True, False], ids=["prepared", "not prepared"])
async def session(postgres_dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    conn: AsyncConnection[Any] = await AsyncConnection.connect(postgres_dsn, autocommit=True)
    session = Session(conn, can_prepare=request.param)
    yield session
    session.close()


@pytest.fixture
def lock(postgres_dsn: str) -> Any:
    """A connection with the lock for which WAIT waits."""
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(7)")
        yield conn


def unlock(lock: psycopg.Connection[Any]) -> None:
    lock.execute("SELECT pg_advisory_unlock(7)")


async def waiting(session: Session) -> asyncio.Task[Any]:
    """Return the task of a statement that waits in the server."""
    task = asyncio.create_task(session.execute(WAIT))
    pid = session.conn.info.backend_pid
    async with await AsyncConnection.connect(
        session.conn.info.dsn, password=session.conn.info.password
    ) as conn:
        await conn.set_autocommit(True)
        while True:
            cursor = await conn.execute(
                "SELECT 1 FROM pg_locks WHERE pid = %s AND locktype = 'advisory' AND NOT granted",
                (pid,),
            )
            if await cursor.fetchone():
                return task


async def test_execute_returns_the_values_that_were_sent(session: Session) -> None:
    assert await session.execute(ECHO, "ü", -7, 0.1, b"\0\xff") == [("ü", -7, 0.1, b"\0\xff")]
    assert await session.execute(ECHO, None, None, None, None) == [(None, None, None, None)]
    assert await session.execute(ARRAYS, ["a", ""], [1, 2**63 - 1]) == [(["a", ""], [1, 2**63 - 1])]
    assert await session.execute(ARRAYS, [], []) == [([], [])]


async def test_execute_with_more_data_than_a_socket_buffers_returns_it(session: Session) -> None:
    data = bytes(range(256)) * 2**16
    assert await session.execute(LENGTH, data) == [(len(data), data)]


async def test_execute_repeated_prepares_the_statement_once(session: Session) -> None:
    for n in range(3):
        assert await session.execute(NUMBER, n) == [(n,)]
    [(count,)] = await session.execute(PREPARED)
    assert count == (2 if session.can_prepare else 0)


async def test_execute_failing_raises_and_the_next_statement_runs(session: Session) -> None:
    with pytest.raises(errors.DivisionByZero) as caught:
        await session.execute(WRONG, 0)
    assert caught.value.sqlstate == "22012"
    assert session.is_reusable
    assert await session.execute(NUMBER, 1) == [(1,)]


async def test_execute_with_too_few_values_raises_and_sends_nothing(session: Session) -> None:
    with pytest.raises(ValueError, match="argument"):
        await session.execute(ECHO, "one")
    assert session.is_reusable
    assert await session.execute(NUMBER, 1) == [(1,)]


async def test_execute_cancelled_is_reusable_after_settle(
    session: Session, lock: psycopg.Connection[Any]
) -> None:
    task = await waiting(session)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not session.is_reusable
    settling = asyncio.create_task(session.settle())
    unlock(lock)
    await asyncio.wait_for(settling, TIMEOUT)
    assert session.is_reusable
    assert await session.execute(NUMBER, 1) == [(1,)]


@pytest.mark.parametrize("turns", range(6))
async def test_execute_cancelled_when_the_answer_arrives_is_reusable_after_settle(
    session: Session, lock: psycopg.Connection[Any], turns: int
) -> None:
    task = await waiting(session)
    unlock(lock)
    # The answer is here before the loop polls. The loop reads it in the step of the
    # cancellation, before it, or after it.
    assert select.select([session.fileno()], [], [], TIMEOUT)[0]
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=TIMEOUT)
    assert done
    if not session.is_reusable:
        await asyncio.wait_for(session.settle(), TIMEOUT)
    assert session.is_reusable
    assert await session.execute(NUMBER, 1) == [(1,)]


async def test_settle_rolls_back_the_transaction_of_a_cancelled_caller(
    session: Session, lock: psycopg.Connection[Any]
) -> None:
    await session.execute(BEGIN)
    assert not session.is_reusable
    task = await waiting(session)
    task.cancel()
    await asyncio.wait({task})
    unlock(lock)
    await asyncio.wait_for(session.settle(), TIMEOUT)
    assert session.is_reusable


async def test_settle_rolls_back_a_failed_transaction(session: Session) -> None:
    await session.execute(BEGIN)
    with pytest.raises(errors.DivisionByZero):
        await session.execute(WRONG, 0)
    assert not session.is_reusable
    await session.settle()
    assert session.is_reusable


async def test_execute_on_a_terminated_backend_raises_the_servers_reason(
    session: Session, lock: psycopg.Connection[Any]
) -> None:
    task = await waiting(session)
    fd = session.fileno()
    lock.execute("SELECT pg_terminate_backend(%s)", (session.conn.info.backend_pid,))
    with pytest.raises(errors.AdminShutdown):
        await asyncio.wait_for(task, TIMEOUT)
    assert not session.is_reusable
    # The loop does not watch the file descriptor any more: the next socket may get its number.
    assert not asyncio.get_running_loop().remove_reader(fd)
    with pytest.raises(psycopg.OperationalError):
        await session.execute(NUMBER, 1)


async def test_execute_on_a_backend_that_ends_at_the_commit_raises_a_lost_connection(
    session: Session,
) -> None:
    """The result is here, so that the transaction may be committed.

    With the server's reason the error would count as one without effect, and the statement would
    be repeated: a message would be sent twice.
    """
    for sql in ENDING_AT_THE_COMMIT:
        await session.execute(Statement(sql))
    with pytest.raises(psycopg.OperationalError) as caught:
        await session.execute(Statement("INSERT INTO pg_temp.sent VALUES (1) RETURNING id"))
    assert caught.value.sqlstate is None
    assert session.is_closed


async def test_idle_session_notices_that_the_server_closed_the_connection(
    session: Session, lock: psycopg.Connection[Any]
) -> None:
    await session.execute(NUMBER, 1)
    assert not session.has_hung_up
    lock.execute("SELECT pg_terminate_backend(%s, 10000)", (session.conn.info.backend_pid,))
    await until(lambda: session.has_hung_up)
    session.close()
    assert session.has_hung_up


@pytest.mark.parametrize("way", ["close", "cut"])
async def test_execute_on_a_connection_closed_meanwhile_raises(
    session: Session, lock: psycopg.Connection[Any], way: str
) -> None:
    task = await waiting(session)
    if way == "cut":
        threading.Thread(target=session.cut).start()
    else:
        session.close()
    with pytest.raises(psycopg.OperationalError):
        await asyncio.wait_for(task, TIMEOUT)
    assert not session.is_reusable
    session.cut()
    session.close()


async def test_execute_of_a_deallocated_statement_prepares_it_again(session: Session) -> None:
    assert await session.execute(NUMBER, 1) == [(1,)]
    await session.execute(DEALLOCATE)
    if session.can_prepare:
        with pytest.raises(errors.InvalidSqlStatementName):
            await session.execute(NUMBER, 2)
    assert await session.execute(NUMBER, 3) == [(3,)]


async def test_execute_runs_on_any_event_loop(session: Session) -> None:
    def elsewhere(n: int) -> list[tuple[Any, ...]]:
        return asyncio.run(session.execute(NUMBER, n))

    for n in range(3):
        assert await asyncio.to_thread(elsewhere, n) == [(n,)]
        assert await session.execute(NUMBER, n) == [(n,)]


async def test_layer_whose_prepared_statements_were_deallocated_goes_on(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """They are gone after `DISCARD ALL`, or if a function now returns another type."""
    layer: PostgresChannelLayer = make_layer()
    channel = await layer.new_channel()
    await layer.send(channel, {"n": 0})
    assert await asyncio.wait_for(layer.receive(channel), TIMEOUT) == {"n": 0}
    engine = layer._loops.main_engine
    assert engine is not None

    async def deallocate(session: Session) -> None:
        await session.execute(DEALLOCATE)

    await engine.connections.run(deallocate, timeout=TIMEOUT)
    for n in range(1, 4):
        await layer.send(channel, {"n": n})
        assert await asyncio.wait_for(layer.receive(channel), TIMEOUT) == {"n": n}


# ---------------------------------------------------------------------- blocking statements


def test_execute_now_returns_rows_and_raises_errors(postgres_dsn: str) -> None:
    data = bytes(range(256)) * 2**14
    with closing(psycopg.connect(postgres_dsn, autocommit=True)) as conn:
        assert Session(conn).execute_now(LENGTH, data) == [(len(data), data)]
        with pytest.raises(errors.DivisionByZero):
            Session(conn).execute_now(WRONG, 0)
        assert Session(conn).execute_now(NUMBER, 1) == [(1,)]


def test_execute_now_raises_after_its_timeout(
    postgres_dsn: str, lock: psycopg.Connection[Any]
) -> None:
    with (
        closing(psycopg.connect(postgres_dsn, autocommit=True)) as conn,
        pytest.raises(psycopg.OperationalError, match="did not answer in time"),
    ):
        Session(conn).execute_now(WAIT, timeout=0.1)


def test_execute_now_counts_preparing_towards_its_timeout(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Mock(monotonic=Mock(return_value=0.0))
    monkeypatch.setattr(session_module, "time", clock)

    class Slow(Session):
        """A session in which the preparation of a statement takes the whole timeout."""

        def _send(self, statement: Statement, parameters: list[bytes | None]) -> None:
            clock.monotonic.return_value = 20.0
            super()._send(statement, parameters)

    with (
        closing(psycopg.connect(postgres_dsn, autocommit=True)) as conn,
        pytest.raises(psycopg.OperationalError, match="did not answer in time"),
    ):
        Slow(conn, can_prepare=True).execute_now(NUMBER, 1, timeout=20)


def test_execute_now_interrupted_waits_for_the_short_timeout_only(
    postgres_dsn: str, lock: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "INTERRUPTED_TIMEOUT", 0.1)
    interrupt, writer = socket.socketpair()
    with interrupt, writer, closing(psycopg.connect(postgres_dsn, autocommit=True)) as conn:
        writer.send(b".")
        with pytest.raises(psycopg.OperationalError, match="did not answer in time"):
            Session(conn).execute_now(WAIT, timeout=3600, interrupt=interrupt)
