"""Settings of a role or a database that would end or hinder the layer's sessions."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from pg_layer import LayerUnavailable, PostgresChannelLayer
from pg_layer._config.options import load
from pg_layer._maintenance.sweeper import Sweeper
from tests.conftest import MakeLayer, Observer
from tests.faults.readers import numbered
from tests.integration.test_django import postgres
from tests.integration.test_sync import on_django
from tests.processes import listen, receive, until

SETTINGS = {
    "idle_session_timeout": "'1s'",
    "default_transaction_isolation": "serializable",
}


async def test_sessions_outlast_the_idle_session_timeout_of_the_database(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """Without the layer's own settings the server would cut an idle listener again and again."""
    [(name,)] = observer.execute("SELECT current_database()").fetchall()
    for setting, value in SETTINGS.items():
        observer.execute(f'ALTER DATABASE "{name}" SET {setting} = {value}'.encode())
    layer, sender = make_layer(heartbeat=20), make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    with psycopg.connect(migrated_dsn, autocommit=True) as other:
        assert other.execute("SHOW idle_session_timeout").fetchone() == ("1s",)
        await asyncio.sleep(2.5)  # longer than the server lets a session be idle
        try:
            other.execute("SELECT 1")
        except psycopg.OperationalError:
            pass  # as expected: otherwise the test would prove nothing
        else:
            raise AssertionError("The server keeps idle sessions.")
    await sender.group_send("room", numbered(1))
    assert (await receive(layer, channel))["number"] == 1
    assert layer.stats()["reconnects"] == 0


# ---------------------------------------------------------------------- statement_timeout

SLOW_TRIGGER = """
CREATE SEQUENCE attempts;
GRANT ALL ON attempts TO public;
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('attempts'), pg_sleep(60);
    RETURN coalesce(NEW, OLD);
END $$;
CREATE TRIGGER slow BEFORE INSERT OR DELETE ON pg_layer_message
    FOR EACH ROW EXECUTE FUNCTION be_slow();
"""
EXPECTED_ERROR = "statement_timeout of the role"


@pytest.fixture
def short_timeout(observer: Observer) -> Observer:
    """Set a statement_timeout of the role that each INSERT or DELETE of a message exceeds."""
    [(name, role)] = observer.execute("SELECT current_database(), current_user").fetchall()
    observer.execute(
        f'ALTER ROLE "{role}" IN DATABASE "{name}" SET statement_timeout = 2000'.encode()
    )
    observer.execute(SLOW_TRIGGER.encode())
    return observer


def attempts(observer: Observer) -> int:
    """Return how many statements have begun.

    The sequence also counts statements that were rolled back.
    """
    [(count,)] = observer.execute("SELECT last_value FROM attempts WHERE is_called").fetchall()
    return int(count)


async def test_send_exceeding_statement_timeout_raises_its_cause_and_is_not_repeated(
    make_layer: MakeLayer, short_timeout: Observer
) -> None:
    layer = make_layer(send_timeout=20)
    with pytest.raises(LayerUnavailable, match=EXPECTED_ERROR) as caught:
        await layer.send("jobs", numbered(1))
    # Not OutcomeUnknown: the server has rolled the statement back.
    assert type(caught.value) is LayerUnavailable
    assert attempts(short_timeout) == 1


def test_sync_send_exceeding_statement_timeout_raises_its_cause_once(
    migrated_dsn: str, short_timeout: Observer
) -> None:
    layer = PostgresChannelLayer(send_timeout=20)
    with on_django(layer, default=postgres(migrated_dsn)):
        with pytest.raises(LayerUnavailable, match=EXPECTED_ERROR) as caught:
            layer.sync.send("jobs", numbered(1))
        assert type(caught.value) is LayerUnavailable
    assert attempts(short_timeout) == 1


def test_sweep_exceeding_statement_timeout_raises_its_cause_once(
    migrated_dsn: str, short_timeout: Observer
) -> None:
    short_timeout.execute("SET session_replication_role = replica")  # without the trigger
    short_timeout.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
    short_timeout.execute("UPDATE pg_layer_message SET expires_at = '2000-01-01'")
    sweeper = Sweeper(load({"dsn": migrated_dsn}), 1000, lambda swept: None, lambda error: None)
    with sweeper, pytest.raises(LayerUnavailable, match=EXPECTED_ERROR):
        sweeper.run_once()
    assert attempts(short_timeout) == 1


async def test_send_cancelled_by_an_administrator_is_repeated(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(send_timeout=20)
    with psycopg.connect(migrated_dsn) as holder:
        holder.execute("LOCK TABLE pg_layer_message")
        sending = asyncio.create_task(layer.send("jobs", numbered(1)))
        cancel = (
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await until(lambda: observer.execute(cancel.encode()).fetchall())
        holder.rollback()
    await sending
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (1,)
