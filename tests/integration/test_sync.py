"""``layer.sync``: plain functions on Django's own connection, in its transactions."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import Error, OperationalError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_layer import ChannelFull, LayerUnavailable, NotMigrated, PostgresChannelLayer
from pg_layer.aliases import alias_of
from tests.conftest import Observer
from tests.integration.test_django import SQLITE, postgres
from tests.integration.test_threads import hubs
from tests.processes import new_layer, receive
from tests.project.commands import eventually
from tests.project.configured import configured

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def layer(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """A layer on Django's default database."""
    layer = PostgresChannelLayer(capacity=1000, lease=3600)
    with on_django(layer, default=postgres(migrated_dsn)):
        yield layer


@pytest.fixture
def reader(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Another process's, as far as it can tell."""
    layer = new_layer(migrated_dsn, capacity=1000)
    yield layer
    asyncio.run(layer.close())


@contextmanager
def on_django(layer: PostgresChannelLayer, **databases: dict[str, Any]) -> Iterator[None]:
    """The layer is Django's, with these DATABASES, whose connections are closed in the end."""
    with configured(layer, DATABASES=databases, ROOT_URLCONF=__name__, SECRET_KEY="x"):
        apps.populate([])  # Django warns of who queries a database before that
        yield
        connections.close_all()
        for alias in databases:  # or the next test would be given these
            with suppress(AttributeError):
                del connections[alias]
        asyncio.run(layer.close())


def number(n: int) -> dict[str, Any]:
    return {"type": "test", "number": n}


def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """The next messages; those are all that wait in the channel."""

    async def read() -> list[int]:
        numbers = [(await receive(layer, channel))["number"] for _ in range(count)]
        more = asyncio.create_task(layer.receive(channel))
        await asyncio.wait((more,), timeout=0.05)
        assert not more.done(), more.result()
        more.cancel()
        return numbers

    return asyncio.run(read())


def joined(layer: PostgresChannelLayer, group: str) -> str:
    """A channel of the layer in a group."""

    async def join() -> str:
        channel = await layer.new_channel()
        await layer.group_add(group, channel)
        return channel

    return asyncio.run(join())


def waiting(observer: Observer) -> int:
    """How many messages others can see."""
    row = observer.execute("SELECT count(*) FROM pg_layer_message WHERE kind = 'message'").fetchone()
    assert row is not None
    return int(row[0])


# ---------------------------------------------------------------------- outside of transactions


def test_everything_outside_of_a_transaction_is_there_at_once(
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


def test_a_channel_of_this_process_joins_and_hears(layer: PostgresChannelLayer) -> None:
    channel = asyncio.run(layer.new_channel())
    layer.sync.group_add("room", channel)
    layer.sync.group_send("room", number(1))
    assert received(layer, channel, 1) == [1]
    layer.sync.group_discard("room", channel)
    layer.sync.group_send("room", number(2))
    assert received(layer, channel, 0) == []


def test_a_full_channel(layer: PostgresChannelLayer, reader: PostgresChannelLayer) -> None:
    for n in range(1000):
        layer.sync.send("jobs", number(n))
    with pytest.raises(ChannelFull, match="jobs"):
        layer.sync.send("jobs", number(-1))
    assert layer.sync.send_many([("jobs", number(-2)), ("other", number(0)), ("jobs", number(-3))]) == [
        False,
        True,
        False,
    ]
    layer.sync.group_add("room", "jobs")
    assert layer.sync.group_send_many([("room", number(-4)), ("nobody", number(-5))]) == [False, True]
    assert received(reader, "jobs", 1000) == list(range(1000))
    layer.sync.send("jobs", number(7))
    assert received(reader, "jobs", 1) == [7]


def test_it_is_encrypted_where_the_layer_is(migrated_dsn: str, observer: Observer) -> None:
    layer = PostgresChannelLayer(symmetric_encryption_keys=["secret"])
    with on_django(layer, default=postgres(migrated_dsn)):
        layer.sync.send("jobs", {"type": "a secret", "number": 1})
        [(payload,)] = observer.execute("SELECT payload FROM pg_layer_message").fetchall()
        assert b"secret" not in payload
        assert received(layer, "jobs", 1) == [1]


def test_what_is_wrong_is_said_before_anything_is_sent(
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
            "no alias 'nowhere' .* are: default",
            lambda: sync.send("jobs", {}, using="nowhere"),
        ),
    ]
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()
    assert waiting(observer) == 0


def test_how_it_is_shown() -> None:
    layer = PostgresChannelLayer(
        dsn="host=h password=Sup3r", prefix="mine", symmetric_encryption_keys=["S3cret"]
    )
    shown = repr(layer.sync)
    assert shown.startswith("Sync(Config(dsn='password=*** host=h'")
    assert "prefix='mine'" in shown
    assert "Sup3r" not in shown
    assert "S3cret" not in shown


# ---------------------------------------------------------------------- transactions


def test_a_message_leaves_when_its_transaction_commits(
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


def test_a_message_never_leaves_a_transaction_that_is_rolled_back(
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


def test_nor_a_savepoint_that_is(layer: PostgresChannelLayer, reader: PostgresChannelLayer) -> None:
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


def test_what_is_sent_on_commit_comes_after_what_was_sent_before_it(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer
) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: layer.sync.send("jobs", number(3)))
        layer.sync.send("jobs", number(1))
        transaction.on_commit(lambda: layer.sync.send("jobs", number(4)))
        layer.sync.send("jobs", number(2))
    assert received(reader, "jobs", 4) == [1, 2, 3, 4]


def test_a_full_channel_leaves_the_transaction_as_it_is(
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


def test_a_transaction_that_is_broken_says_so(layer: PostgresChannelLayer, observer: Observer) -> None:
    with transaction.atomic():
        with pytest.raises(Error), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
        with pytest.raises(Error, match="current transaction is aborted"):
            layer.sync.send("jobs", number(1))
        transaction.set_rollback(True)
    with transaction.atomic():
        with pytest.raises(ZeroDivisionError), transaction.atomic(savepoint=False):
            raise ZeroDivisionError
        with pytest.raises(TransactionManagementError):
            layer.sync.send("jobs", number(1))
    assert waiting(observer) == 0


def test_without_autocommit_it_is_the_commit_that_sends(
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


def test_the_users_transaction_is_as_durable_as_he_wants_it(layer: PostgresChannelLayer) -> None:
    with transaction.atomic():
        layer.sync.send("jobs", number(1))
        layer.sync.send_many([("jobs", number(1)), ("jobs", number(1))])
        layer.sync.group_send("room", number(2))
        layer.sync.group_add("room", "jobs")
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == ("on",)
    layer.sync.send("jobs", number(3))
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchone() == ("on",)


def test_there_is_no_second_connection_and_no_thread(layer: PostgresChannelLayer, observer: Observer) -> None:
    def backends() -> list[Any]:
        return observer.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() ORDER BY pid"
        ).fetchall()

    connection.ensure_connection()
    before = backends()
    threads = threading.active_count()
    layer.sync.send("jobs", number(1))
    layer.sync.group_add("room", "jobs")
    with transaction.atomic():
        layer.sync.group_send("room", number(2))
        assert layer.sync.group_count("room") == 1
    assert backends() == before
    assert threading.active_count() == threads


def test_a_channel_of_this_process_stays_in_its_group_before_anybody_receives(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(lease=2, heartbeat=0.5)

    def lease() -> float:
        [(ends,)] = observer.execute("SELECT extract(epoch FROM expires_at) FROM pg_layer_client").fetchall()
        return float(ends)

    def renewed() -> None:
        before = lease()
        eventually(lambda: lease() > before, "the lease is renewed")
        assert layer.sync.group_count("room") == 1

    with on_django(layer, default=postgres(migrated_dsn)):
        channel = asyncio.run(layer.new_channel())
        layer.sync.group_add("room", channel)
        renewed()
        layer.sync.group_send("room", number(1))
        asyncio.run(layer.send("jobs", number(0)))  # by a loop that ends with it
        renewed()
        layer.sync.group_send("room", number(2))
        assert async_to_sync(layer.receive)(channel) == number(1)  # so does this one
        renewed()
        assert received(layer, channel, 1) == [2]
        eventually(lambda: not hubs(), "who serves keeps the lease by itself")
        # A loop that was gone as well, and a thread that takes over from it.
        async_to_sync(layer.send)("jobs", number(3))
        renewed()


def test_sending_in_a_transaction_costs_one_round_trip_more(
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
    assert round_trips(lambda: layer.sync.send("jobs", number(1))) == without + 1
    assert round_trips(lambda: layer.sync.group_send("room", number(1))) == without + 1
    assert round_trips(lambda: layer.sync.send_many([("jobs", number(n)) for n in range(9)])) == without + 1


def test_who_watches_queries_sees_those_of_the_layer(layer: PostgresChannelLayer) -> None:
    seen: list[str] = []

    def watch(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        seen.append(sql)
        return execute(sql, *rest)

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


def test_the_readmes_example(layer: PostgresChannelLayer, reader: PostgresChannelLayer) -> None:
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


def test_atomic_requests(migrated_dsn: str, reader: PostgresChannelLayer) -> None:
    layer = PostgresChannelLayer()
    with on_django(layer, default={**postgres(migrated_dsn), "ATOMIC_REQUESTS": True}):
        client = Client(raise_request_exception=False, headers={"host": "localhost"})
        assert client.get("/", {"dsn": migrated_dsn, "fail": "1"}).status_code == 500
        assert received(reader, "jobs", 0) == []
        assert client.get("/", {"dsn": migrated_dsn}).content == b"0"  # not before the request has ended
        assert received(reader, "jobs", 1) == [1]


# ---------------------------------------------------------------------- which connection


def test_a_dsn_finds_its_alias(migrated_dsn: str, fresh_database: str, reader: PostgresChannelLayer) -> None:
    layer = new_layer(migrated_dsn)
    with on_django(layer, default=postgres(fresh_database), lite=SQLITE, events=postgres(migrated_dsn)):
        with transaction.atomic(using="events"), transaction.atomic():
            layer.sync.send("jobs", number(1))
            transaction.set_rollback(True)  # of the default one, which has nothing to do with it
        assert received(reader, "jobs", 1) == [1]


def test_a_dsn_that_no_alias_points_to(migrated_dsn: str, fresh_database: str) -> None:
    layer = new_layer(migrated_dsn)
    with on_django(layer, default=postgres(fresh_database), lite=SQLITE):
        with pytest.raises(
            ImproperlyConfigured, match=r"search_path.* Set CONFIG\['using'\].*using='default'"
        ):
            layer.sync.send("jobs", number(1))
        with pytest.raises(ImproperlyConfigured, match=r"'lite'.*is sqlite"):
            layer.sync.send("jobs", number(1), using="lite")
        with pytest.raises(NotMigrated):
            layer.sync.send("jobs", number(1), using="default")
        with pytest.raises(NotMigrated), transaction.atomic():
            layer.sync.send("jobs", number(1), using="default")


def test_a_dsn_never_finds_the_alias_of_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(dsn: str, parameters: str) -> bool:
        layer = new_layer(dsn)
        options = conninfo_to_dict(parameters)
        alias = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": options.pop("dbname", ""),
            "HOST": options.pop("host", ""),
            "OPTIONS": options,
        }
        with on_django(layer, events=alias, default=SQLITE), suppress(ImproperlyConfigured):
            return alias_of(layer.config) == "events"
        return False

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


def test_using_names_another_alias(
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


def test_on_an_event_loops_own_thread_it_is_refused(layer: PostgresChannelLayer) -> None:
    async def send() -> None:
        with pytest.raises(SynchronousOnlyOperation):
            layer.sync.send("jobs", number(1))
        # Where synchronous code belongs, it works.
        await asyncio.to_thread(send_and_close)

    def send_and_close() -> None:
        layer.sync.send("jobs", number(2))
        connections.close_all()

    asyncio.run(send())
    assert received(layer, "jobs", 1) == [2]


def test_threads_send_at_once_each_in_its_order(
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
        assert [n for n in numbers if n // 1000 == thread] == [1000 * thread + n for n in range(100)]


# ---------------------------------------------------------------------- what goes wrong


def kill(observer: Observer) -> None:
    """The backend of Django's connection of this thread ends, and that is known to have happened."""
    pid = connection.connection.info.backend_pid
    observer.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def test_a_connection_that_was_lost_meanwhile_is_opened_anew(
    layer: PostgresChannelLayer, reader: PostgresChannelLayer, observer: Observer
) -> None:
    for n in range(5):
        layer.sync.send("jobs", number(n))
        kill(observer)
    layer.sync.send("jobs", number(5))
    assert received(reader, "jobs", 6) == list(range(6))


def test_a_connection_that_is_lost_within_a_transaction_is_djangos_affair(
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


def test_a_database_that_is_away(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(send_timeout=0.5)
    with (
        on_django(layer, default={**postgres(migrated_dsn), "PORT": "1"}),
        pytest.raises(LayerUnavailable, match="could not be reached"),
    ):
        layer.sync.send("jobs", number(1))
