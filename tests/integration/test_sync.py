"""``layer.sync``: plain functions on Django's connection, in its transactions."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import DatabaseError, Error, OperationalError, connection, connections, transaction
from django.db.backends.utils import CursorWrapper
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponse
from django.test import Client, SimpleTestCase
from django.urls import path
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_layer import (
    ChannelFull,
    LayerUnavailable,
    NotMigrated,
    OutcomeUnknown,
    PostgresChannelLayer,
)
from pg_layer._config.databases import alias_by_settings
from pg_layer._db.statement import (
    BOOLS,
    BYTEAS,
    FLOAT8S_OR_NULL,
    INT8S_OR_NULL,
    TEXTS,
    Statement,
    Type,
)
from pg_layer._state import capacity as room
from tests.conftest import Observer
from tests.faults.conftest import migrate
from tests.integration.test_django import SQLITE, postgres
from tests.integration.test_threads import background_threads
from tests.processes import new_layer, receive, terminate_backends
from tests.project.commands import eventually
from tests.project.configured import configured

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def layer(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Return a layer on Django's default database."""
    layer = PostgresChannelLayer(capacity=1000, lease=3600)
    with on_django(layer, default=postgres(migrated_dsn)):
        yield layer


@pytest.fixture
def reader(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Return a layer that receives as another process would."""
    layer = new_layer(migrated_dsn, capacity=1000)
    yield layer
    asyncio.run(layer.close())


@contextmanager
def on_django(layer: PostgresChannelLayer, **databases: dict[str, Any]) -> Iterator[None]:
    """Configure Django with the layer and these DATABASES. Close both at the end."""
    with configured(layer, DATABASES=databases, ROOT_URLCONF=__name__, SECRET_KEY="x"):
        apps.populate([])  # Django warns of queries before the apps are ready
        try:
            yield
        finally:
            asyncio.run(layer.close())


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each send counts the waiting messages, from the low-water id of the last one."""
    monkeypatch.setattr(room, "LOW_ID_AGE", 0.0)
    monkeypatch.setattr(room, "CREDIT_AGE", -1.0)


def number(n: int) -> dict[str, Any]:
    return {"type": "test", "number": n}


def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Receive ``count`` messages, and assert that no other one waits in the channel."""

    async def read() -> list[int]:
        numbers = [(await receive(layer, channel))["number"] for _ in range(count)]
        more = asyncio.create_task(layer.receive(channel))
        await asyncio.wait((more,), timeout=0.05)
        assert not more.done(), more.result()
        more.cancel()
        return numbers

    return asyncio.run(read())


def joined(layer: PostgresChannelLayer, group: str) -> str:
    """Return a new channel of the layer that is in the group."""

    async def join() -> str:
        channel = await layer.new_channel()
        await layer.group_add(group, channel)
        return channel

    return asyncio.run(join())


def waiting(observer: Observer) -> int:
    """Return the number of committed messages."""
    row = observer.execute(
        "SELECT count(*) FROM pg_layer_message WHERE kind = 'message'"
    ).fetchone()
    assert row is not None
    return int(row[0])


# ---------------------------------------------------------------------- outside of transactions


def test_calls_outside_of_transactions_take_effect_at_once(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    member = joined(reader, "room")
    other = asyncio.run(reader.new_channel())
    layer.sync.send("jobs", number(1))
    assert received(reader, "jobs", 1) == [1]
    layer.sync.group_send("room", number(2))
    assert received(reader, member, 1) == [2]

    layer.sync.group_add("room", other)
    assert sorted(layer.sync.group_channels("room")) == sorted([member, other])
    assert layer.sync.group_count("room") == 2
    layer.sync.group_send("room", number(3), exclude=member)
    assert received(reader, other, 1) == [3]
    layer.sync.group_discard("room", other)
    assert layer.sync.group_channels("room") == [member]
    layer.sync.group_send("room", number(4))
    assert received(reader, member, 1) == [4]
    assert received(reader, other, 0) == []

    messages = [(channel, number(n)) for n in range(10) for channel in ("jobs", member)]
    assert layer.sync.send_many(messages) == [True] * 20
    assert received(reader, "jobs", 10) == received(reader, member, 10) == list(range(10))
    assert layer.sync.group_send_many(("room", number(n)) for n in range(10)) == [True] * 10
    assert received(reader, member, 10) == list(range(10))
    assert layer.sync.send_many([]) == layer.sync.group_send_many([]) == []


def test_group_add_of_an_own_channel_receives_group_messages(layer: PostgresChannelLayer) -> None:
    channel = asyncio.run(layer.new_channel())
    layer.sync.group_add("room", channel)
    layer.sync.group_send("room", number(1))
    assert received(layer, channel, 1) == [1]
    layer.sync.group_discard("room", channel)
    layer.sync.group_send("room", number(2))
    assert received(layer, channel, 0) == []


def test_send_to_a_full_channel_raises_channel_full(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    for n in range(1000):
        layer.sync.send("jobs", number(n))
    with pytest.raises(ChannelFull, match="jobs"):
        layer.sync.send("jobs", number(-1))
    assert layer.sync.send_many(
        [("jobs", number(-2)), ("other", number(0)), ("jobs", number(-3))]
    ) == [
        False,
        True,
        False,
    ]
    layer.sync.group_add("room", "jobs")
    assert layer.sync.group_send_many([("room", number(-4)), ("nobody", number(-5))]) == [
        False,
        True,
    ]
    assert received(reader, "jobs", 1000) == list(range(1000))
    layer.sync.send("jobs", number(7))
    assert received(reader, "jobs", 1) == [7]


def test_send_with_encryption_keys_stores_encrypted_payloads(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(symmetric_encryption_keys=["secret"])
    with on_django(layer, default=postgres(migrated_dsn)):
        layer.sync.send("jobs", {"type": "a secret", "number": 1})
        [(payload,)] = observer.execute("SELECT payload FROM pg_layer_message").fetchall()
        assert b"secret" not in payload
        assert received(layer, "jobs", 1) == [1]


def test_call_with_a_wrong_argument_raises_before_anything_is_sent(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    sync = layer.sync
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "Channel name", lambda: sync.send("no channel", {})),
        (TypeError, "Group name", lambda: sync.group_send("no!group", {})),
        (TypeError, "dict", lambda: sync.send("jobs", "text")),  # type: ignore[arg-type]
        (ValueError, "expiry .* above 0, .* not 0", lambda: sync.send("jobs", {}, expiry=0)),
        (TypeError, "expiry .* not str", lambda: sync.group_send("room", {}, expiry="1")),  # type: ignore[arg-type]
        (TypeError, "Channel name", lambda: sync.group_send("room", {}, exclude="no channel")),
        (TypeError, "Item 1 .* pair", lambda: sync.send_many([("jobs", {}), "jobs"])),  # type: ignore[list-item]
        (TypeError, "pairs, not dict", lambda: sync.send_many({"jobs": {}})),  # type: ignore[dict-item]
        (TypeError, "Channel name", lambda: sync.send_many([("jobs", {}), ("no channel", {})])),
        (ValueError, "100001 messages", lambda: sync.send_many([("jobs", {})] * 100_001)),
        (
            ImproperlyConfigured,
            "no alias 'nowhere' .* are: 'default'",
            lambda: sync.send("jobs", {}, using="nowhere"),
        ),
    ]
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()
    assert waiting(observer) == 0


def test_repr_hides_passwords_and_keys() -> None:
    layer = PostgresChannelLayer(
        dsn="host=h password=Sup3r", prefix="mine", symmetric_encryption_keys=["S3cret"]
    )
    shown = repr(layer.sync)
    assert shown.startswith("Sync(Config(dsn='password=*** host=h'")
    assert "prefix='mine'" in shown
    assert "Sup3r" not in shown
    assert "S3cret" not in shown


# ---------------------------------------------------------------------- transactions


def test_send_in_a_transaction_is_received_after_the_commit(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    member = joined(reader, "room")
    with transaction.atomic():
        layer.sync.send("jobs", number(1))
        layer.sync.group_send("room", number(2))
        with transaction.atomic():
            layer.sync.send_many([("jobs", number(3)), (member, number(4))])
            layer.sync.group_send_many([("room", number(5))])
        assert waiting(observer) == 0
        assert received(reader, member, 0) == []
    assert received(reader, "jobs", 2) == [1, 3]
    assert received(reader, member, 3) == [2, 4, 5]


def test_send_in_a_transaction_rolled_back_is_never_received(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    member = joined(reader, "room")
    other = asyncio.run(reader.new_channel())
    with suppress(ZeroDivisionError), transaction.atomic():
        layer.sync.send("jobs", number(1))
        layer.sync.group_add("room", other)
        layer.sync.group_discard("room", member)
        layer.sync.group_send("room", number(2))
        raise ZeroDivisionError
    assert layer.sync.group_channels("room") == [member]
    with transaction.atomic():
        layer.sync.group_send("room", number(3))
        layer.sync.send("jobs", number(4))
    assert received(reader, "jobs", 1) == [4]
    assert received(reader, member, 1) == [3]
    assert received(reader, other, 0) == []


def test_group_count_in_a_strict_transaction_counts_the_members_it_sends_to(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    member = joined(reader, "room")
    # The snapshot of the transaction sees a lease that is about to end, but not its renewal.
    ends = observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '0.5 s'"
        " RETURNING expires_at"
    ).fetchone()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert layer.sync.group_count("room") == 1
        observer.execute(
            "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '1 hour'"
        )
        observer.execute("SELECT pg_sleep_until(%s)", ends)
        assert layer.sync.group_count("room") == 1
        assert layer.sync.group_channels("room") == [member]
        cursor.execute("SELECT sum(members) FROM pg_layer_group")
        assert cursor.fetchone() == (1,)
        layer.sync.group_send("room", number(1))
    assert received(reader, member, 1) == [1]


def test_send_in_a_savepoint_rolled_back_is_never_received(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    member = joined(reader, "room")
    with transaction.atomic():
        layer.sync.send("jobs", number(1))
        with suppress(ZeroDivisionError), transaction.atomic():
            layer.sync.send("jobs", number(2))
            layer.sync.group_send("room", number(3))
            raise ZeroDivisionError
        savepoint = transaction.savepoint()
        layer.sync.group_send("room", number(4))
        transaction.savepoint_rollback(savepoint)
        layer.sync.group_send("room", number(5))
        layer.sync.send("jobs", number(6))
    assert received(reader, "jobs", 2) == [1, 6]
    assert received(reader, member, 1) == [5]


def test_send_in_on_commit_is_received_after_the_transactions_messages(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: layer.sync.send("jobs", number(3)))
        layer.sync.send("jobs", number(1))
        transaction.on_commit(lambda: layer.sync.send("jobs", number(4)))
        layer.sync.send("jobs", number(2))
    assert received(reader, "jobs", 4) == [1, 2, 3, 4]


def test_channel_full_in_a_transaction_does_not_abort_it(
    migrated_dsn: str, reader: PostgresChannelLayer
) -> None:
    layer = PostgresChannelLayer(capacity=1)
    with on_django(layer, default=postgres(migrated_dsn)):
        with transaction.atomic():
            layer.sync.send("jobs", number(1))
            with pytest.raises(ChannelFull):
                layer.sync.send("jobs", number(2))
            layer.sync.send("other", number(3))
        assert received(reader, "jobs", 1) == [1]
        assert received(reader, "other", 1) == [3]


def test_send_in_an_aborted_transaction_raises_djangos_error(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    with transaction.atomic():
        layer.sync.send("jobs", number(0))
        with pytest.raises(Error), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
        with pytest.raises(Error, match="current transaction is aborted"):
            layer.sync.send("jobs", number(1))
        transaction.set_rollback(True)
    with transaction.atomic():
        layer.sync.send("jobs", number(0))
        with pytest.raises(ZeroDivisionError), transaction.atomic(savepoint=False):
            raise ZeroDivisionError
        with pytest.raises(TransactionManagementError):
            layer.sync.send("jobs", number(1))
    assert waiting(observer) == 0


def test_send_without_autocommit_is_received_after_the_commit(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    transaction.set_autocommit(False)
    layer.sync.send("jobs", number(1))
    assert waiting(observer) == 0
    transaction.rollback()
    layer.sync.send("jobs", number(2))
    transaction.commit()
    transaction.set_autocommit(True)
    assert received(reader, "jobs", 1) == [2]


def shown(setting: str) -> str:
    """Return a setting of Django's connection."""
    with connection.cursor() as cursor:
        cursor.execute(f"SHOW {setting}")
        return str(cursor.fetchone()[0])


def test_send_in_a_transaction_unknown_to_django_is_part_of_it(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    layer.sync.send("jobs", number(1))
    with connection.connection.transaction():
        for n in (2, 3):
            layer.sync.send("jobs", number(n))
        assert shown("synchronous_commit") == "on"
        assert waiting(observer) == 1
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        layer.sync.send("jobs", number(4))
        assert shown("synchronous_commit") == "on"
        with pytest.raises(Error):
            cursor.execute("SELECT 1 / 0")
        with pytest.raises(Error, match="current transaction is aborted"):
            layer.sync.send("jobs", number(5))
        cursor.execute("ROLLBACK")
    layer.sync.send("jobs", number(6))
    assert received(reader, "jobs", 4) == [1, 2, 3, 6]


def test_send_in_a_pipeline_is_received(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    layer.sync.send("jobs", number(1))
    with connection.connection.pipeline():
        layer.sync.send("jobs", number(2))
    with transaction.atomic():
        layer.sync.send("jobs", number(3))
        with connection.connection.pipeline():
            layer.sync.send("jobs", number(4))
            assert layer.sync.send_many([("jobs", number(5)), ("jobs", number(6))]) == [True, True]
    assert received(reader, "jobs", 6) == [1, 2, 3, 4, 5, 6]


def test_send_in_a_transaction_keeps_synchronous_commit(layer: PostgresChannelLayer) -> None:
    with transaction.atomic():
        layer.sync.send("jobs", number(1))
        layer.sync.send_many([("jobs", number(1)), ("jobs", number(1))])
        layer.sync.group_send("room", number(2))
        layer.sync.group_add("room", "jobs")
        assert shown("synchronous_commit") == "on"
    layer.sync.send("jobs", number(3))
    assert shown("synchronous_commit") == "on"


def test_calls_open_no_connection_and_start_no_event_loop(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    def backends() -> list[Any]:
        return observer.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() ORDER BY pid"
        ).fetchall()

    connection.ensure_connection()
    before = backends()
    layer.sync.send("jobs", number(1))
    layer.sync.group_add("room", "jobs")
    with transaction.atomic():
        layer.sync.group_send("room", number(2))
        assert layer.sync.group_count("room") == 1
    assert backends() == before
    assert not background_threads()


def test_group_add_of_an_own_channel_without_a_loop_renews_the_lease(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(lease=2, heartbeat=0.5)

    def lease() -> float:
        """Return when the lease ends; 0 before there is one."""
        query = "SELECT coalesce(max(extract(epoch FROM expires_at)), 0) FROM pg_layer_client"
        return float(observer.execute(query).fetchall()[0][0])

    def renewed() -> None:
        before = lease()
        eventually(lambda: lease() > before, "the lease is renewed")
        assert layer.sync.group_count("room") == 1

    with on_django(layer, default=postgres(migrated_dsn)):
        channel = asyncio.run(layer.new_channel())
        layer.sync.group_add("room", channel)
        renewed()
        layer.sync.group_send("room", number(1))
        asyncio.run(layer.send("jobs", number(0)))  # on a loop that ends with the call
        renewed()
        layer.sync.group_send("room", number(2))
        assert async_to_sync(layer.receive)(channel) == number(1)
        layer.sync.group_add("room", channel)  # the loop that received has ended
        renewed()
        assert received(layer, channel, 1) == [2]
        eventually(lambda: not background_threads(), "the receiving loop renews the lease itself")
        # The receiving loop has ended: a thread renews the lease in its place.
        async_to_sync(layer.send)("jobs", number(3))
        renewed()


def test_send_in_a_transaction_costs_one_round_trip_and_one_announcement(
    layer: PostgresChannelLayer, observer: Observer, tmp_path: Path
) -> None:
    observer.execute("CREATE TABLE note (text text)")

    def round_trips(*calls: Callable[[], object]) -> int:
        with (tmp_path / "trace").open("w+") as trace:
            connection.connection.pgconn.trace(trace.fileno())
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("INSERT INTO note VALUES ('x')")
                for call in calls:
                    call()
            connection.connection.pgconn.untrace()
            trace.seek(0)
            return trace.read().count("ReadyForQuery")

    connection.ensure_connection()
    without = round_trips()
    one = partial(layer.sync.send, "jobs", number(1))
    assert round_trips(one) == without + 2
    assert round_trips(partial(layer.sync.group_send, "room", number(1))) == without + 2
    assert (
        round_trips(partial(layer.sync.send_many, [("jobs", number(n)) for n in range(9)]))
        == without + 2
    )
    # One announcement for the whole transaction.
    assert round_trips(one, one, one) == without + 4


def test_execute_wrapper_sees_the_layers_statements(layer: PostgresChannelLayer) -> None:
    seen: list[str] = []

    def watch(execute: Callable[..., Any], query: str, *rest: Any) -> Any:
        seen.append(query)
        return execute(query, *rest)

    with connection.execute_wrapper(watch):
        layer.sync.send("jobs", number(1))
        layer.sync.send_many([("jobs", number(2)), ("other", number(3))])
        with transaction.atomic():
            layer.sync.group_send_many([("room", number(4)), ("room", number(5))])
    assert [name for text in seen for name in re.findall(r"pg_layer_\w*send_\w+", text)] == [
        "pg_layer_send_one",
        "pg_layer_send_batch",
        "pg_layer_group_send_batch",
    ]
    assert received(layer, "jobs", 2) == [1, 2]


def test_readme_example_announces_after_the_commit(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    (example,) = re.findall(
        r"```python\n(from channels.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(example, names)
    member = joined(reader, "news")

    class Article:
        pk = 7
        saves = 0

        def save(self) -> None:
            self.saves += 1
            assert connection.in_atomic_block

    article = Article()
    names["publish"](article)
    assert article.saves == 1
    assert asyncio.run(receive(reader, member)) == {"type": "article.published", "id": 7}


def test_patched_cursors_see_or_refuse_the_layers_statements(
    layer: PostgresChannelLayer, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnlyInTransactions(SimpleTestCase):
        def runTest(self) -> None:
            with pytest.raises(AssertionError, match="not allowed"):
                layer.sync.send("jobs", number(0))

    layer.sync.send("jobs", number(1))
    result = unittest.TestResult()
    unittest.TestSuite([OnlyInTransactions()]).run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    assert waiting(observer) == 1

    seen: list[str] = []

    def watching(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            seen.append(where)
            return function(*args, **kwargs)

        return watch

    wrapper = connections["default"]
    places = ((wrapper, "cursor"), (type(wrapper), "make_cursor"), (CursorWrapper, "execute"))
    for place, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, watching(name, getattr(place, name)))
            layer.sync.send("jobs", number(2))
        layer.sync.send("jobs", number(3))
    assert seen == ["cursor", "make_cursor", "execute"]
    assert waiting(observer) == 7


def test_cursor_factory_of_the_project_runs_the_layers_statements(
    migrated_dsn: str, observer: Observer
) -> None:
    seen: list[str] = []

    class Seeing(psycopg.ClientCursor[Any]):
        def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(query)
            return super().execute(query, *args, **kwargs)

    layer = PostgresChannelLayer()
    with on_django(
        layer, default={**postgres(migrated_dsn), "OPTIONS": {"cursor_factory": Seeing}}
    ):
        connection.ensure_connection()
        seen.clear()
        for n in range(3):
            layer.sync.send("jobs", number(n))
    assert len(seen) == waiting(observer) == 3


# ---------------------------------------------------------------------- requests


def committing(request: HttpRequest) -> HttpResponse:
    from channels.layers import get_channel_layer

    layer = get_channel_layer()
    assert isinstance(layer, PostgresChannelLayer)
    layer.sync.send("jobs", number(1))
    if "fail" in request.GET:
        raise ZeroDivisionError
    with psycopg.connect(make_conninfo(request.GET["dsn"])) as observer:
        row = observer.execute("SELECT count(*) FROM pg_layer_message").fetchone()
    return HttpResponse(str(row[0] if row else None))


urlpatterns = [path("", committing)]


def test_send_in_atomic_requests_is_received_after_the_request(
    migrated_dsn: str, reader: PostgresChannelLayer
) -> None:
    layer = PostgresChannelLayer()
    with on_django(layer, default={**postgres(migrated_dsn), "ATOMIC_REQUESTS": True}):
        client = Client(raise_request_exception=False, headers={"host": "localhost"})
        assert client.get("/", {"dsn": migrated_dsn, "fail": "1"}).status_code == 500
        assert received(reader, "jobs", 0) == []
        assert (
            client.get("/", {"dsn": migrated_dsn}).content == b"0"
        )  # other connections see the message only after the request
        assert received(reader, "jobs", 1) == [1]


# ---------------------------------------------------------------------- which connection


def test_send_with_djangos_pool_uses_a_connection_of_it(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer()
    options = {"pool": {"min_size": 1, "max_size": 1}}
    with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": options}):
        wrapper: Any = connections["default"]
        layer.sync.send("jobs", number(1))  # this call opens the pool
        assert wrapper.pool.get_stats()["requests_num"] == 1
        assert waiting(observer) == 1
        wrapper.close()
        wrapper.close_pool()


def test_dsn_of_a_database_in_databases_uses_its_alias(
    migrated_dsn: str, fresh_database: str, reader: PostgresChannelLayer
) -> None:
    layer = new_layer(migrated_dsn)
    with on_django(
        layer, default=postgres(fresh_database), lite=SQLITE, events=postgres(migrated_dsn)
    ):
        with transaction.atomic(using="events"), transaction.atomic():
            layer.sync.send("jobs", number(1))
            transaction.set_rollback(True)  # rolls back the other alias only
        assert received(reader, "jobs", 1) == [1]


def test_dsn_without_an_alias_raises_improperly_configured(
    migrated_dsn: str, fresh_database: str
) -> None:
    layer = new_layer(migrated_dsn)
    with on_django(layer, default=postgres(fresh_database), lite=SQLITE):
        with pytest.raises(
            ImproperlyConfigured, match=r"search_path.* Add an alias to DATABASES for the same"
        ):
            layer.sync.send("jobs", number(1))
        with pytest.raises(ImproperlyConfigured, match=r"'lite'.*is sqlite"):
            layer.sync.send("jobs", number(1), using="lite")
        with pytest.raises(NotMigrated):
            layer.sync.send("jobs", number(1), using="default")
        with pytest.raises(NotMigrated), transaction.atomic():
            layer.sync.send("jobs", number(1), using="default")


def test_dsn_of_another_place_does_not_match_the_alias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(dsn: str, parameters: str) -> bool:
        layer = new_layer(dsn)
        options = conninfo_to_dict(parameters)
        alias = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": options.pop("dbname", ""),
            "HOST": options.pop("host", ""),
            "OPTIONS": options,
        }
        with on_django(layer, events=alias, default=SQLITE):
            return alias_by_settings(layer.config) == "events"

    lay = r"options='-c search_path=lay,\\ public -c statement_timeout=5s'"
    assert found("service=prod", "service=prod")
    assert not found("service=prod", "service=shop")
    assert not found("service=prod", "host=h dbname=d")
    assert not found("host=h dbname=d", "service=prod host=h dbname=d")
    assert found(f"host=h dbname=d {lay}", "host=h dbname=d options=--search-path=lay,public")
    assert found("host=h dbname=d", "host=h dbname=d options='-c statement_timeout=5s'")
    assert not found("host=h dbname=d options=-csearch_path=lay", "host=h dbname=d")
    assert not found("host=h dbname=d", f"host=h dbname=d {lay}")
    assert not found(f"host=h dbname=d {lay}", "host=h dbname=d options='-c search_path=shop'")
    monkeypatch.setenv("PGSERVICE", "prod")
    assert found("service=prod dbname=d", "dbname=d")
    assert not found("service=shop dbname=d", "dbname=d")
    monkeypatch.setenv("PGOPTIONS", "-c search_path=lay")
    assert found("dbname=d options=-csearch_path=lay", "dbname=d")
    assert not found("dbname=d options=-csearch_path=shop", "dbname=d")


def test_using_runs_the_call_on_that_alias(
    migrated_dsn: str, fresh_database: str, reader: PostgresChannelLayer
) -> None:
    layer = PostgresChannelLayer()
    with on_django(layer, default=postgres(fresh_database), events=postgres(migrated_dsn)):
        channel = asyncio.run(reader.new_channel())
        layer.sync.group_add("room", channel, using="events")
        with transaction.atomic(using="events"):
            layer.sync.send("jobs", number(1), using="events")
            layer.sync.group_send("room", number(2), using="events")
            layer.sync.send_many([("jobs", number(3))], using="events")
            layer.sync.group_send_many([("room", number(4))], using="events")
        assert layer.sync.group_count("room", using="events") == 1
        assert layer.sync.group_channels("room", using="events") == [channel]
        assert received(reader, "jobs", 2) == [1, 3]
        assert received(reader, channel, 2) == [2, 4]
        layer.sync.group_discard("room", channel, using="events")
        assert layer.sync.group_count("room", using="events") == 0


def test_dsn_lookup_skips_aliases_with_wrong_settings(
    migrated_dsn: str, fresh_database: str, reader: PostgresChannelLayer
) -> None:
    layer = new_layer(migrated_dsn)
    broken = {
        "broken": {"ENGINE": "no.such.engine"},
        "nameless": {**postgres(fresh_database), "NAME": ""},
    }
    with on_django(
        layer, default=postgres(fresh_database), **broken, events=postgres(migrated_dsn)
    ):
        layer.sync.send("jobs", number(1))
        assert received(reader, "jobs", 1) == [1]


def test_using_an_empty_alias_raises_improperly_configured(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    with pytest.raises(ImproperlyConfigured, match="''"):
        layer.sync.send("jobs", number(1), using="")
    assert waiting(observer) == 0


@pytest.mark.usefixtures("looking")
def test_known_capacities_of_two_databases_are_separate(
    migrated_dsn: str, fresh_database: str, observer: Observer
) -> None:
    migrate(fresh_database)
    layer = PostgresChannelLayer(capacity=10)
    with (
        psycopg.connect(fresh_database, autocommit=True) as events,
        on_django(layer, default=postgres(migrated_dsn), events=postgres(fresh_database)),
    ):
        events.execute("SELECT setval('pg_layer_message_id_seq', 1000000)")
        accepted = 0
        for _ in range(20):
            layer.sync.send("jobs", number(1), using="events")
            events.execute("DELETE FROM pg_layer_message")
            with suppress(ChannelFull):
                layer.sync.send("jobs", number(1))
                accepted += 1
        assert accepted == waiting(observer) == 10


def begin_a_boot(observer: Observer) -> None:
    """Restore the state after a crash that makes the server draw the same ids again."""
    observer.execute("TRUNCATE pg_layer_message RESTART IDENTITY")
    observer.execute("TRUNCATE pg_layer_boot")


@pytest.mark.usefixtures("looking")
def test_known_capacity_after_a_new_boot_is_counted_again(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    observer.execute("SELECT setval('pg_layer_message_id_seq', 1000000)")
    for n in range(5):
        layer.sync.send("jobs", number(n))
        observer.execute("DELETE FROM pg_layer_message")
    begin_a_boot(observer)
    layer.sync.send("jobs", number(0))  # this call notices the boot
    assert sum(layer.sync.send_many([("jobs", number(n)) for n in range(1000)])) == 999
    with pytest.raises(ChannelFull):
        layer.sync.send("jobs", number(0))


@pytest.mark.usefixtures("looking")
def test_full_channel_after_a_new_boot_refuses_the_second_message(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(capacity=5)
    with on_django(layer, default=postgres(migrated_dsn)):
        observer.execute("SELECT setval('pg_layer_message_id_seq', 1000000)")
        for n in range(5):
            layer.sync.send("jobs", number(n))
            observer.execute("DELETE FROM pg_layer_message")
        kill(observer)
        begin_a_boot(observer)
        observer.execute("SELECT pg_layer_begin_boot(0)")
        for _ in range(5):
            observer.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
        layer.sync.send("jobs", number(5))
        with pytest.raises(ChannelFull):
            layer.sync.send("jobs", number(6))


@pytest.mark.usefixtures("looking")
def test_known_capacity_after_a_reconnect_is_kept(layer: PostgresChannelLayer) -> None:
    layer.sync.send("jobs", number(0))
    before = layer._loops.client.known_capacities["default"]
    for n in range(3):
        connections.close_all()
        layer.sync.send("jobs", number(n))
        assert layer._loops.client.known_capacities["default"] is before


def test_assume_role_applies_to_the_layers_own_connections(
    migrated_dsn: str, observer: Observer
) -> None:
    name = f"the owner of {observer.info.dbname}"
    role = sql.Identifier(name)
    layer = PostgresChannelLayer()
    observer.execute(sql.SQL("CREATE ROLE {}").format(role))
    try:
        with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": {"assume_role": name}}):
            with pytest.raises(LayerUnavailable, match="permission denied"):
                layer.sync.send("jobs", number(1))
            with pytest.raises(LayerUnavailable, match="permission denied"):
                asyncio.run(layer.send("jobs", number(1)))
            for kind in (sql.SQL("TABLES"), sql.SQL("SEQUENCES")):
                observer.execute(
                    sql.SQL("GRANT ALL ON ALL {} IN SCHEMA public TO {}").format(kind, role)
                )
            layer.sync.send("jobs", number(1))
            asyncio.run(layer.send("jobs", number(2)))
            assert received(layer, "jobs", 2) == [1, 2]
    finally:
        observer.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_send_on_the_thread_of_an_event_loop_names_the_asynchronous_call(
    layer: PostgresChannelLayer,
) -> None:
    async def send() -> None:
        with pytest.raises(SynchronousOnlyOperation, match=r"await layer\.group_send\(\.\.\.\)"):
            layer.sync.send("jobs", number(1))
        # In a thread without an event loop the call works.
        await asyncio.to_thread(send_and_close)

    def send_and_close() -> None:
        layer.sync.send("jobs", number(2))
        connections.close_all()

    asyncio.run(send())
    assert received(layer, "jobs", 1) == [2]


def test_sends_of_each_thread_are_received_in_order(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    def send(thread: int) -> None:
        for n in range(100):
            layer.sync.send("jobs", number(1000 * thread + n))
        connections.close_all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))
    numbers = received(reader, "jobs", 800)
    for thread in range(8):
        assert [n for n in numbers if n // 1000 == thread] == [
            1000 * thread + n for n in range(100)
        ]


def test_send_on_another_threads_connection_raises_djangos_error(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    layer.sync.send("jobs", number(1))
    wrapper = connections["default"]

    def send() -> None:
        connections["default"] = wrapper
        with pytest.raises(
            DatabaseError, match="created in a thread can only be used in that same thread"
        ):
            layer.sync.send("jobs", number(2))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send).result()
    assert waiting(observer) == 1


def test_send_in_a_child_forked_during_a_send_succeeds(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    layer.sync.send("jobs", number(1))
    connections.close_all()
    (known,) = layer._loops.client.known_capacities.values()
    with known._lock:  # another thread holds it during a send
        child = os.fork()
        if not child:
            signal.alarm(10)
            layer.sync.send("jobs", number(2))
            os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert waiting(observer) == 2


def test_close_removes_own_channels_from_their_groups(layer: PostgresChannelLayer) -> None:
    channel = asyncio.run(layer.new_channel())
    layer.sync.group_add("room", channel)
    assert layer.sync.group_channels("room") == [channel]
    asyncio.run(layer.close())
    assert layer.sync.group_channels("room") == []


# ---------------------------------------------------------------------- prepared statements


def prepared() -> list[str]:
    """Return the layer's functions in the prepared statements of Django's connection."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT substring(statement FROM 'pg_layer_[a-z]+_[a-z]+\\w*') AS function"
            " FROM pg_prepared_statements ORDER BY 1"
        )
        return [str(row[0]) for row in cursor.fetchall()]


@pytest.mark.parametrize("has_handler", [True, False], ids=["handler", "generator"])
def test_listen_on_djangos_connection_receives_notifications(
    layer: PostgresChannelLayer, observer: Observer, has_handler: bool
) -> None:
    heard: list[str] = []
    with connection.cursor() as cursor:
        cursor.execute("LISTEN mine")
    conn = connection.connection
    if has_handler:
        conn.add_notify_handler(lambda notify: heard.append(notify.payload))
    for n in range(3):
        layer.sync.group_count("room")
        observer.execute(f"NOTIFY mine, '{n}'".encode())
        layer.sync.send("jobs", number(n))
        if has_handler:
            assert heard == [str(m) for m in range(n + 1)]
    if not has_handler:
        heard += [notify.payload for notify in conn.notifies(timeout=20, stop_after=3)]
    assert heard == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ZeroDivisionError, ZeroDivisionError), (OperationalError, OutcomeUnknown)],
)
def test_send_during_which_a_notify_handler_fails_is_not_repeated(
    layer: PostgresChannelLayer,
    observer: Observer,
    raised: type[Exception],
    expected: type[Exception],
) -> None:
    """psycopg calls handlers during the statement, and leaves its answer unread if one raises."""
    layer.sync.send("jobs", number(1))
    with connection.cursor() as cursor:
        cursor.execute("LISTEN mine")

    def fail(notify: psycopg.Notify) -> None:
        raise raised from psycopg.errors.SerializationFailure()

    connection.connection.add_notify_handler(fail)
    observer.execute("NOTIFY mine")
    with pytest.raises(expected):
        layer.sync.send("jobs", number(2))
    assert waiting(observer) == 2
    assert shown("server_version_num")


@pytest.mark.parametrize("forget", ["DISCARD ALL", "DEALLOCATE ALL"])
def test_send_after_prepared_statements_were_discarded_succeeds(
    migrated_dsn: str, reader: PostgresChannelLayer, forget: str
) -> None:
    """psycopg prepares the layer's statements if the project's OPTIONS ask for it."""
    layer = PostgresChannelLayer()
    options = {"prepare_threshold": 5, "server_side_binding": True}
    member = joined(reader, "room")
    with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": options}):
        for n in range(7):
            layer.sync.group_send("room", number(n))
        assert prepared() == ["pg_layer_group_send_one"]
        with connection.cursor() as cursor:
            cursor.execute(forget)
        with transaction.atomic():
            layer.sync.group_send("room", number(7))
        for n in range(8, 20):
            layer.sync.group_send("room", number(n))
    assert received(reader, member, 20) == list(range(20))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"pool": {"min_size": 1, "max_size": 1}}, id="pool"),
    ],
)
def test_send_with_djangos_defaults_prepares_no_statement(
    migrated_dsn: str, options: dict[str, Any]
) -> None:
    layer = PostgresChannelLayer()
    with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": options}):
        for n in range(10):
            layer.sync.group_send("room", number(n))
        assert prepared() == []
        wrapper: Any = connections["default"]
        wrapper.close()
        if wrapper.pool:
            wrapper.close_pool()


# ---------------------------------------------------------------------- what goes wrong


def kill(observer: Observer) -> None:
    """End the backend of Django's connection of this thread, and wait until it has ended."""
    pid = connection.connection.info.backend_pid
    assert terminate_backends(observer, f"pid = {pid}")


def test_send_on_a_connection_closed_while_idle_connects_again(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    for n in range(5):
        layer.sync.send("jobs", number(n))
        kill(observer)
    layer.sync.send("jobs", number(5))
    assert received(reader, "jobs", 6) == list(range(6))


def test_send_on_a_connection_lost_in_a_transaction_raises_djangos_error(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    with transaction.atomic():
        layer.sync.send("jobs", number(1))
        kill(observer)
        with pytest.raises(OperationalError):
            layer.sync.send("jobs", number(2))
        transaction.set_rollback(True)
    layer.sync.send("jobs", number(3))
    assert received(reader, "jobs", 1) == [3]


def lose(observer: Observer, is_closed: bool) -> None:
    """Lose Django's connection so that psycopg knows that it is closed."""
    if is_closed:
        connection.connection.close()
    else:
        kill(observer)
        with pytest.raises(OperationalError), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    assert connection.connection.closed


@pytest.mark.parametrize("is_used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("is_closed", [False, True], ids=["terminated", "closed"])
def test_send_on_a_connection_known_to_be_lost_connects_again(
    layer: PostgresChannelLayer,
    reader: PostgresChannelLayer,
    observer: Observer,
    is_used: bool,
    is_closed: bool,
) -> None:
    sends: list[Callable[[str, dict[str, Any]], None]] = [
        layer.sync.send,
        layer.sync.group_send,
        layer.sync.send,
    ]
    for n, send in enumerate(sends):
        connection.close()  # each call gets a new connection
        connection.ensure_connection()
        if is_used:
            layer.sync.group_count("room")
        lose(observer, is_closed)
        send("jobs", number(n))
        assert shown("server_version_num")
    assert received(reader, "jobs", 2) == [0, 2]


@pytest.mark.parametrize("is_used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("is_closed", [False, True], ids=["terminated", "closed"])
def test_send_in_a_transaction_on_a_connection_known_to_be_lost_raises(
    layer: PostgresChannelLayer, observer: Observer, is_used: bool, is_closed: bool
) -> None:
    for call in (layer.sync.send, layer.sync.group_send):
        with transaction.atomic():
            if is_used:
                layer.sync.group_count("room")  # psycopg begins the transaction
                layer.sync.group_count("room")
            lose(observer, is_closed)
            with pytest.raises(OperationalError):
                call("jobs", number(1))
            transaction.set_rollback(True)
        assert waiting(observer) == 0
        connection.close()


def test_send_while_the_database_is_down_raises_layer_unavailable(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(send_timeout=0.5)
    with (
        on_django(layer, default={**postgres(migrated_dsn), "PORT": "1"}),
        pytest.raises(LayerUnavailable, match="could not be reached"),
    ):
        layer.sync.send("jobs", number(1))


@pytest.mark.parametrize(
    ("type", "items"),
    [
        (TEXTS, ["", "NULL", "null", " a ", 'b"c', "d\\e", "f,g", "{h}", "é\n", None]),
        (BYTEAS, [b"", b"\x00\xff\\", b'"', None]),
        (INT8S_OR_NULL, [-(2**63), 2**63 - 1, 0, None]),
        (FLOAT8S_OR_NULL, [0.1, -1e300, float("inf"), None]),
        (BOOLS, [True, False, None]),
        (TEXTS, []),
    ],
)
def test_parameters_lists_arrive_as_arrays_unchanged(
    layer: PostgresChannelLayer, type: Type, items: list[object]
) -> None:
    statement = Statement("SELECT $1", type)
    with connection.cursor() as cursor:
        cursor.execute(statement.cursor_sql, statement.parameters([items]))
        [(array,)] = cursor.fetchall()
    assert array == items
