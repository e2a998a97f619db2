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


async def test_sessions_of_the_layer_outlast_what_a_database_sets(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The server would cut an idle listener again and again."""
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
            pass  # as it should be: else nothing is tested
        else:
            raise AssertionError("The server keeps idle sessions.")
    await sender.group_send("room", numbered(1))
    assert (await receive(layer, channel))["number"] == 1
    assert layer.stats()["reconnects"] == 0


# ---------------------------------------------------------------------- statement_timeout

SLOW = """
CREATE SEQUENCE attempts;
GRANT ALL ON attempts TO public;
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('attempts'), pg_sleep(60);
    RETURN coalesce(NEW, OLD);
END $$;
CREATE TRIGGER slow BEFORE INSERT OR DELETE ON pg_layer_message FOR EACH ROW EXECUTE FUNCTION be_slow();
"""
WORDS = "statement_timeout of the role"


@pytest.fixture
def impatient(observer: Observer) -> Observer:
    """The role has a statement_timeout, and each message written or deleted takes longer."""
    [(name, role)] = observer.execute("SELECT current_database(), current_user").fetchall()
    observer.execute(
        f'ALTER ROLE "{role}" IN DATABASE "{name}" SET statement_timeout = 2000'.encode()
    )
    observer.execute(SLOW.encode())
    return observer


def attempts(observer: Observer) -> int:
    """How many statements have begun: a sequence outlives those that were undone."""
    [(count,)] = observer.execute("SELECT last_value FROM attempts WHERE is_called").fetchall()
    return int(count)


async def test_send_that_exceeds_statement_timeout_is_not_repeated_and_says_so(
    make_layer: MakeLayer, impatient: Observer
) -> None:
    layer = make_layer(send_timeout=20)
    with pytest.raises(LayerUnavailable, match=WORDS) as caught:
        await layer.send("jobs", numbered(1))
    assert type(caught.value) is LayerUnavailable  # the server has undone it
    assert attempts(impatient) == 1


def test_synchronous_send_that_exceeds_statement_timeout_is_not_repeated_and_says_so(
    migrated_dsn: str, impatient: Observer
) -> None:
    layer = PostgresChannelLayer(send_timeout=20)
    with on_django(layer, default=postgres(migrated_dsn)):
        with pytest.raises(LayerUnavailable, match=WORDS) as caught:
            layer.sync.send("jobs", numbered(1))
        assert type(caught.value) is LayerUnavailable
    assert attempts(impatient) == 1


def test_sweep_that_exceeds_statement_timeout_is_not_repeated_and_says_so(
    migrated_dsn: str, impatient: Observer
) -> None:
    impatient.execute("SET session_replication_role = replica")  # without the trigger
    impatient.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
    impatient.execute("UPDATE pg_layer_message SET expires_at = '2000-01-01'")
    sweeper = Sweeper(load({"dsn": migrated_dsn}), 1000, lambda swept: None, lambda error: None)
    with sweeper, pytest.raises(LayerUnavailable, match=WORDS):
        sweeper.run_once()
    assert attempts(impatient) == 1


async def test_send_that_an_administrator_cancels_is_repeated(
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
