"""``layer.sync`` during faults of the network, the server and pools, and under locks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic
from typing import Any

import psycopg
import pytest
from django.db import NotSupportedError, connection, connections, transaction
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_layer import LayerUnavailable, NotMigrated, OutcomeUnknown, PostgresChannelLayer
from pg_layer._db.errors import is_permanent
from tests.conftest import Observer
from tests.faults.proxy import Proxy
from tests.integration.test_django import postgres
from tests.integration.test_sync import number, on_django, shown, waiting
from tests.processes import terminate_backends
from tests.stand_ins import find_first


@pytest.fixture
def layer(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Return a layer on Django's default database, with a long ``send_timeout``."""
    layer = PostgresChannelLayer(send_timeout=20)
    with on_django(layer, default=postgres(migrated_dsn)):
        yield layer


@contextmanager
def locked(dsn: str, table: str) -> Iterator[psycopg.Connection]:
    """Lock the table until the connection is rolled back, at the latest at the end."""
    with psycopg.connect(dsn) as holder:
        holder.execute(sql.SQL("LOCK TABLE {}").format(sql.Identifier(table)))
        yield holder
        holder.rollback()


def until_blocked(observer: Observer, count: int = 1) -> None:
    """Wait until ``count`` statements wait for a lock."""
    until(observer, "wait_event_type = 'Lock'", count)


def until_idle(observer: Observer) -> None:
    """Wait until only the observer executes a statement."""
    until(observer, "state = 'active'", 1)


def until(observer: Observer, condition: str, count: int) -> None:
    """Wait until the condition holds for ``count`` connections of this database."""
    query = (
        f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {condition}"
    )
    deadline = monotonic() + 20
    while observer.execute(query.encode()).fetchone() != (count,):
        assert monotonic() < deadline
        observer.execute("SELECT pg_sleep(0.01)")


def in_thread(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    """Return the future of a call in a thread. The thread closes its connections after it."""

    def run() -> Any:
        try:
            return call()
        finally:
            connections.close_all()

    return pool.submit(run)


# ---------------------------------------------------------------------- lost connections


def test_send_whose_answer_is_lost_is_not_repeated(migrated_dsn: str, observer: Observer) -> None:
    layer = PostgresChannelLayer(send_timeout=20)
    with Proxy(migrated_dsn) as proxy, on_django(layer, default=postgres(proxy.dsn())):

        def send() -> None:
            with pytest.raises(OutcomeUnknown):
                layer.sync.send("jobs", number(1))
            assert connection.connection is None  # Django connects again

        with locked(migrated_dsn, "pg_layer_message") as holder, ThreadPoolExecutor(1) as pool:
            sending = in_thread(pool, send)
            until_blocked(observer)
            proxy.cut()
            sending.result()
            holder.rollback()
        until_idle(observer)
        assert waiting(observer) == 1


def test_send_on_a_backend_that_ends_at_the_commit_is_not_repeated(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    """The server's reason comes after the result: the transaction may be committed."""
    observer.execute("CREATE SEQUENCE attempts")  # a rollback does not undo its values
    observer.execute(
        """
        CREATE FUNCTION end_backend() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('attempts');
            PERFORM pg_terminate_backend(pg_backend_pid());
            RETURN NULL;
        END
        $$
        """
    )
    # A deferred trigger runs at the commit, when the server has sent the result.
    observer.execute(
        """
        CREATE CONSTRAINT TRIGGER at_the_commit AFTER INSERT ON pg_layer_message
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION end_backend()
        """
    )
    with pytest.raises(OutcomeUnknown):
        layer.sync.send("jobs", number(1))
    assert observer.execute("SELECT last_value FROM attempts").fetchone() == (1,)
    assert connection.connection is None  # Django connects again


def test_group_add_whose_answer_is_lost_is_repeated(migrated_dsn: str, observer: Observer) -> None:
    layer = PostgresChannelLayer(send_timeout=20)
    with Proxy(migrated_dsn) as proxy, on_django(layer, default=postgres(proxy.dsn())):
        with locked(migrated_dsn, "pg_layer_membership") as holder, ThreadPoolExecutor(1) as pool:
            joining = in_thread(pool, lambda: layer.sync.group_add("room", "jobs"))
            until_blocked(observer)
            proxy.cut()
            until_blocked(observer, 2)
            holder.rollback()
            joining.result()
        assert layer.sync.group_channels("room") == ["jobs"]


def test_send_with_a_pool_of_dead_connections_succeeds(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer()
    options = {"pool": {"min_size": 5, "max_size": 5}}
    with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": options}):
        wrapper: Any = connections["default"]
        wrapper.pool.open(wait=True)
        terminate_backends(observer, "datname = current_database() AND pid <> pg_backend_pid()")
        layer.sync.send("jobs", number(1))
        assert waiting(observer) == 1
        wrapper.close()
        wrapper.close_pool()


# ---------------------------------------------------------------------- limits of time


def test_send_that_exceeds_send_timeout_leaves_django_a_new_connection(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(send_timeout=0.5)
    with on_django(layer, default=postgres(migrated_dsn)):
        layer.sync.send("jobs", number(1))
        with locked(migrated_dsn, "pg_layer_message"):
            with pytest.raises(LayerUnavailable):
                layer.sync.send("jobs", number(2))
            assert shown("server_version_num")
            until_blocked(observer)  # the server does not notice that the client has closed


def test_send_in_a_transaction_is_not_limited_by_send_timeout(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(send_timeout=0.1)
    with on_django(layer, default=postgres(migrated_dsn)):

        def send() -> None:
            with transaction.atomic():
                layer.sync.send("jobs", number(1))

        with locked(migrated_dsn, "pg_layer_message") as holder, ThreadPoolExecutor(1) as pool:
            sending = in_thread(pool, send)
            until_blocked(observer)
            observer.execute("SELECT pg_sleep(0.5)")
            assert not sending.done()
            holder.rollback()
            sending.result()
        assert waiting(observer) == 1


def test_send_to_a_silent_server_ends_after_connect_timeout(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(send_timeout=1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        place = {"PORT": port, "OPTIONS": {"connect_timeout": 2}}
        with on_django(layer, default={**postgres(migrated_dsn), **place}):
            begun_at = monotonic()
            with pytest.raises(LayerUnavailable, match="could not be reached"):
                layer.sync.send("jobs", number(1))
            assert monotonic() - begun_at < 20  # psycopg's default is 130 seconds


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"PASSWORD": "wrong", "USER": "nobody"}, "authentication|does not exist|pg_hba"),
        ({"NAME": "no_such_database"}, "does not exist"),
    ],
    ids=["user", "database"],
)
def test_send_with_wrong_credentials_raises_without_another_attempt(
    migrated_dsn: str, wrong: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PostgresChannelLayer(send_timeout=3600)

    def never(seconds: float) -> None:
        raise AssertionError("It is tried again.")

    with on_django(layer, default={**postgres(migrated_dsn), **wrong}):
        with monkeypatch.context() as patch:
            patch.setattr("time.sleep", never)
            with pytest.raises(LayerUnavailable, match=why):
                layer.sync.send("jobs", number(1))
        with pytest.raises(LayerUnavailable, match=why):
            asyncio.run(asyncio.wait_for(layer.send("jobs", number(1)), 60))


def refused_by(dsn: str, **place: str) -> psycopg.OperationalError:
    """Return the error of a connection attempt to a database that does not exist."""
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(make_conninfo(dsn, **{"dbname": "no_such_database", **place}))
    return caught.value


def test_permanent_error_of_several_hosts_requires_all_to_refuse(
    migrated_dsn: str,
) -> None:
    with Proxy(migrated_dsn) as proxy, socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # connections to this port are refused
        there, also_there = (
            conninfo_to_dict(migrated_dsn)["port"],
            conninfo_to_dict(proxy.dsn())["port"],
        )
        away = unheard.getsockname()[1]
        for ports, expected in (
            (f"{there}", True),
            (f"{away}", False),
            (f"{there},{also_there}", True),
            (f"{away},{there}", False),
            (f"{there},{away}", False),
        ):
            hosts = ",".join(["127.0.0.1"] * len(ports.split(",")))
            assert is_permanent(refused_by(migrated_dsn, host=hosts, port=ports)) is expected, ports


async def test_permanent_error_of_one_host_requires_one_address_to_refuse(
    migrated_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that listens on IPv4 only refuses the IPv6 address of ``localhost``."""

    def addresses(host: str, port: Any, **options: Any) -> Any:
        return [(0, 0, 0, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    error = refused_by(migrated_dsn, host="localhost")
    assert "127.0.0.2" in str(error)
    assert is_permanent(error)


@pytest.mark.parametrize("count", [1, 2])
def test_permanent_error_includes_a_missing_password(count: int) -> None:
    text = (
        'connection to server at "127.0.0.1", port 5432 failed: fe_sendauth: no password supplied'
    )
    lines = [f"- host: 'h{n}', port: '5432', hostaddr: '127.0.0.1': {text}" for n in range(count)]
    told = (
        [text, "Multiple connection attempts failed. All failures were:", *lines]
        if count > 1
        else [text]
    )
    assert is_permanent(psycopg.OperationalError("\n".join(told)))


# ---------------------------------------------------------------------- a server without NOTIFY


@pytest.fixture
def refusing(layer: PostgresChannelLayer, observer: Observer) -> None:
    """Let the server refuse NOTIFY, as servers without it do."""
    observer.execute("CREATE SCHEMA refusing")
    observer.execute("CREATE TABLE note (text text)")
    observer.execute(
        "CREATE FUNCTION refusing.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE feature_not_supported USING MESSAGE = 'NOTIFY is not supported'; END $$"
    )
    find_first(observer, "refusing")


def noted() -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO note VALUES ('x')")


def notes(observer: Observer) -> int:
    return len(observer.execute("SELECT FROM note").fetchall())


@pytest.mark.usefixtures("refusing")
def test_send_while_notify_is_refused_writes_without_notify(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    layer.sync.send("jobs", number(1))
    layer.sync.send_many([("jobs", number(2)), ("other", number(3))])
    assert waiting(observer) == 3
    # Counted once: the second call does not notify while an announcement is pending.
    assert layer.stats()["refused_notifications"] == 1


def ids(observer: Observer) -> list[int]:
    """Return the ids of the waiting jobs, in the order of sending."""
    return [
        id
        for (id,) in observer.execute(
            "SELECT id FROM pg_layer_message WHERE channel = 'jobs' ORDER BY 1"
        )
    ]


@pytest.mark.usefixtures("refusing")
def test_transaction_while_notify_is_refused_is_announced_later(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    """The next write announces what could not be announced after the commit."""
    with transaction.atomic():
        noted()
        layer.sync.send("jobs", number(1))
        layer.sync.group_send("room", number(2))
        noted()
        layer.sync.send_many([("jobs", number(3)), ("jobs", number(4))])
    assert notes(observer) == 2
    assert waiting(observer) == 4
    observer.execute("DROP FUNCTION refusing.pg_notify")
    with psycopg.connect(
        observer.info.dsn, password=observer.info.password, autocommit=True
    ) as listener:
        listener.execute(
            "SELECT pg_layer_listen(ARRAY["
            "pg_layer_notification_channel(pg_layer_address('asgi', 'jobs'))])"
        )
        with transaction.atomic():
            layer.sync.send("jobs", number(5))
        first, _, _, last = ids(observer)
        heard = [notify.payload for notify in listener.notifies(timeout=20, stop_after=2)]
        assert heard == [f"J {first}", f"J {last}"]


@pytest.mark.usefixtures("refusing")
def test_manual_transaction_after_a_refused_one_does_not_notify(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    """Django does not report the commit of such a transaction: the call must notify inside."""
    connection.ensure_connection()
    with connection.connection.transaction(force_rollback=True):
        noted()
        with pytest.raises(NotSupportedError):
            layer.sync.send("jobs", number(0))
    assert notes(observer) == 0
    with connection.connection.transaction():
        noted()
        layer.sync.send("jobs", number(1))
        layer.sync.group_send("room", number(2))
        noted()
        layer.sync.send_many([("jobs", number(3)), ("jobs", number(4))])
    assert notes(observer) == 2
    assert waiting(observer) == 4


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_transaction_after_a_refusal_outside_does_not_notify(
    layer: PostgresChannelLayer, observer: Observer, is_async: bool
) -> None:
    if is_async:
        asyncio.run(layer.send("jobs", number(1)))
    else:
        layer.sync.send("jobs", number(1))
    with transaction.atomic():
        noted()
        layer.sync.send("jobs", number(2))
    with connection.connection.transaction():
        noted()
        layer.sync.send("jobs", number(3))
    assert notes(observer) == 2
    assert waiting(observer) == 3


@pytest.mark.usefixtures("refusing")
def test_pipeline_after_a_refusal_does_not_notify(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    layer.sync.send("jobs", number(0))
    with transaction.atomic(), connection.connection.pipeline():
        noted()
        layer.sync.send("jobs", number(1))
        layer.sync.group_send("room", number(2))
        assert layer.sync.send_many([("jobs", number(3)), ("jobs", number(4))]) == [True, True]
        noted()
        layer.sync.group_add("room", "jobs")
    assert notes(observer) == 2
    assert waiting(observer) == 5
    assert layer.sync.group_channels("room") == ["jobs"]


# ---------------------------------------------------------------------- tables that are missing


def test_missing_tables_raise_not_migrated_in_every_transaction(fresh_database: str) -> None:
    layer = PostgresChannelLayer()
    with on_django(layer, default=postgres(fresh_database)):
        with pytest.raises(NotMigrated):
            layer.sync.send("jobs", number(1))
        with pytest.raises(NotMigrated), transaction.atomic():
            layer.sync.send("jobs", number(1))
    for _ in range(2):  # with a new connection, then with an existing one
        with on_django(layer, default={**postgres(fresh_database), "AUTOCOMMIT": False}):
            with pytest.raises(NotMigrated):
                layer.sync.send("jobs", number(1))
            transaction.rollback()
            with pytest.raises(NotMigrated):
                layer.sync.send("jobs", number(1))
            transaction.rollback()


def test_outdated_tables_raise_not_migrated(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    observer.execute("ALTER TABLE pg_layer_message RENAME COLUMN marked TO unmarked")
    with pytest.raises(NotMigrated):
        layer.sync.send("jobs", number(1))
    with pytest.raises(NotMigrated), transaction.atomic():
        layer.sync.send("jobs", number(1))
