"""`pg_layer.testing` in the test suites of projects, run by Django's runner and by pytest."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.components import require
from tests.conftest import Observer
from tests.project.commands import ROOT, TIMEOUT, django, environment

RUNNERS = ["django", "pytest"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * TIMEOUT)]

PYTEST_INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""

IMPORTS = """
import asyncio
import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import connection, transaction
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings
from pg_layer import PostgresChannelLayer
from pg_layer.models import Client, Membership, Message
from pg_layer.testing import Sent, captured_messages, reset_layers

def say(n):
    return {"type": "say", "n": n}
"""


def run(
    folder: Path,
    dsn: str,
    *arguments: str,
    settings: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
) -> str:
    """Run `python` in development mode; return its output and its exit status."""
    everything = environment(dsn, settings) | (environ or {})
    if find_spec("daphne") is None:
        # Imported by channels.testing, for a class that these tests do not need.
        stand_in = folder / "stand_in" / "daphne"
        stand_in.mkdir(parents=True, exist_ok=True)
        (stand_in / "__init__.py").touch()
        (stand_in / "testing.py").write_text("DaphneProcess = None")
        everything["PYTHONPATH"] = f"{stand_in.parent}:{everything.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", *arguments],
        cwd=ROOT,
        env=everything,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=4 * TIMEOUT,
    )
    return f"{result.stdout}\nstatus {result.returncode}"


def run_suite(
    runner: str,
    folder: Path,
    dsn: str,
    suite: str,
    settings: dict[str, Any] | None = None,
    *options: str,
    plugin: bool = True,
    environ: dict[str, str] | None = None,
) -> str:
    """Run a suite in the test project, its tests in their order.

    ``options``: of pytest. ``plugin``: whether pg_layer's plugin for pytest is on.
    """
    (folder / "test_suite.py").write_text(IMPORTS + textwrap.dedent(suite))
    if runner == "django":
        arguments = ["-m", "tests.project.manage", "test", "--noinput", str(folder)]
    else:
        (folder / "pytest.ini").write_text(PYTEST_INI)
        options += () if plugin else ("-p", "no:pg_layer")
        options += ("-p", "no:randomly", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"))
        arguments = ["-m", "pytest", *options, str(folder)]
    return run(folder, dsn, *arguments, settings=settings, environ=environ)


def test_databases(observer: Observer) -> list[str]:
    """The test databases made from the observer's that are still there."""
    query = (
        "SELECT datname FROM pg_database WHERE datname LIKE 'test\\_' || current_database() || '%'"
    )
    return [name for (name,) in observer.execute(query)]


test_databases.__test__ = False  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- the demo's tests


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["-m", "example.manage", "test", "example", "--noinput", "--shuffle"], "Ran 6 tests"),
        (
            ["-m", "example.manage", "test", "example", "--noinput", "--parallel", "2"],
            "Ran 6 tests",
        ),
        (["-m", "pytest", "-p", "no:cacheprovider", "example"], "8 passed"),
    ],
    ids=["Django", "Django in parallel", "pytest"],
)
def test_tests_of_the_demo_pass_and_leave_no_database(
    tmp_path: Path, observer: Observer, migrated_dsn: str, arguments: list[str], count: str
) -> None:
    environ = {"PG_LAYER_DSN": migrated_dsn, "DJANGO_SETTINGS_MODULE": "example.settings"}
    output = run(tmp_path, migrated_dsn, *arguments, environ=environ)
    assert output.endswith("status 0"), output
    assert count in output
    assert "arning" not in output, output
    assert test_databases(observer) == []


# ---------------------------------------------------------------------- what was sent


def captured(dsn: str, code: str, **config: Any) -> None:
    """Run code in a process of the test project; it must complain of nothing."""
    layers = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": config}}
    layers["memory"] = {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    prepared = (
        f"{IMPORTS}\nlayer = get_channel_layer()\n{textwrap.dedent(code)}\nconnection.close()"
    )
    assert django(dsn, prepared, settings={"CHANNEL_LAYERS": layers}) == ""


def addresses(observer: Observer) -> list[str]:
    """Return the addresses of all messages, in the order of sending."""
    rows = observer.execute("SELECT address FROM pg_layer_message ORDER BY id").fetchall()
    return [address for (address,) in rows]


def test_captured_messages_returns_them_in_the_order_of_sending(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        with transaction.atomic():
            specific = async_to_sync(layer.new_channel)()
            with captured_messages(groups=["a", "b"], channels=["jobs", specific]) as sent:
                layer.sync.group_send("b", say(1))
                layer.sync.send("jobs", say(2))
                layer.sync.send("others", say(0))
                layer.sync.group_send("others", say(0))
                three = [("b", say(3)), ("a", say(4)), ("others", say(0))]
                layer.sync.group_send_many(three, exclude=specific)
                layer.sync.send(specific, say(5))
                layer.sync.send_many([("jobs", say(6)), ("others", say(0)), (specific, say(7))])
                layer.sync.group_send("a", {"type": "say", "data": b"x" * 100_000}, exclude="jobs")
                assert sent == []
            assert sent == [
                Sent(say(1), group="b"),
                Sent(say(2), channel="jobs"),
                Sent(say(3), group="b", exclude=specific),
                Sent(say(4), group="a", exclude=specific),
                Sent(say(5), channel=specific),
                Sent(say(6), channel="jobs"),
                Sent(say(7), channel=specific),
                Sent({"type": "say", "data": b"x" * 100_000}, group="a", exclude="jobs"),
            ]
        """,
    )


def test_captured_messages_omits_those_of_a_savepoint_rolled_back(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        with transaction.atomic():
            with captured_messages(groups=["room"], channels=["jobs"]) as sent:
                layer.sync.group_send("room", say(1))
                try:
                    with transaction.atomic():
                        layer.sync.group_send("room", say(0))
                        with transaction.atomic():
                            layer.sync.send("jobs", say(0))
                        raise LookupError
                except LookupError:
                    pass
                with transaction.atomic():
                    layer.sync.send("jobs", say(2))
            assert sent == [Sent(say(1), group="room"), Sent(say(2), channel="jobs")]
        """,
    )


def test_captured_messages_nested_blocks_capture_their_own_messages(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        with transaction.atomic():
            layer.sync.group_send("room", say(0))
            layer.sync.send("jobs", say(0))
            with captured_messages(groups=["room"], channels=["jobs"]) as outer:
                layer.sync.send("jobs", say(1))
                with captured_messages(groups=["room"], channels=["jobs"]) as inner:
                    layer.sync.group_send("room", say(2))
                    layer.sync.send("jobs", say(3))
                    assert layer.sync.group_count("room") == 2
            layer.sync.group_send("room", say(0))
            assert inner == [Sent(say(2), group="room"), Sent(say(3), channel="jobs")]
            assert outer == [Sent(say(1), channel="jobs"), *inner]
        """,
    )


def test_captured_messages_normal_channel_in_a_group_has_its_own_message(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        with transaction.atomic():
            layer.sync.group_add("room", "jobs")
            with captured_messages(groups=["room"], channels=["jobs"]) as sent:
                layer.sync.group_send("room", say(1))
            assert sent == [Sent(say(1), group="room"), Sent(say(1), channel="jobs")]
            specific = async_to_sync(layer.new_channel)()
            layer.sync.group_add("hall", specific)
            with captured_messages(groups=["hall"], channels=[specific]) as sent:
                layer.sync.group_send("hall", say(2))
                layer.sync.send(specific, say(3))
            assert sent == [Sent(say(2), group="hall"), Sent(say(3), channel=specific)]
        """,
    )


def test_captured_messages_encrypted_and_sent_by_sql_are_decoded(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        with transaction.atomic(), captured_messages(groups=["room"], channels=["jobs"]) as sent:
            layer.sync.group_send("room", say(1))
            layer.sync.send("jobs", say(2))
        assert sent == [Sent(say(1), group="room"), Sent(say(2), channel="jobs")]
        """,
        prefix="mine",
        symmetric_encryption_keys=["secret"],
    )
    captured(
        migrated_dsn,
        """
        capture = captured_messages(groups=["room"])
        with transaction.atomic(), capture as sent, connection.cursor() as cursor:
            cursor.execute("SELECT pg_layer_group_send('room', %s)", ['{"type": "say", "n": 1}'])
        assert sent == [Sent(say(1), group="room")]
        """,
    )


def test_captured_messages_with_short_lease_and_expiry_are_complete(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        def rows():
            with connection.cursor() as cursor:
                cursor.execute("SELECT clock_timestamp(), pg_sleep(0.05)")
                cursor.fetchall()

        with transaction.atomic(), captured_messages(groups=["room"], channels=["jobs"]) as sent:
            rows()
            layer.sync.group_send("room", say(1))
            layer.sync.send("jobs", say(2))
            rows()
        assert sent == [Sent(say(1), group="room"), Sent(say(2), channel="jobs")]
        """,
        lease=0.02,
        heartbeat=0.008,
        group_expiry=0.02,
        expiry=0.02,
    )


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_captured_messages_in_a_transaction_has_those_of_asynchronous_calls(
    migrated_dsn: str, observer: Observer, isolation: str
) -> None:
    """They use other connections, which do not see the transaction."""
    observer.execute(
        "INSERT INTO pg_layer_lease_clock (prefix, boot, lease, renewed_at, steady_since)"
        " VALUES ('asgi', pg_layer_current_boot(), 3600, now(), now() - interval '2 hours')"
    )
    captured(
        migrated_dsn,
        f"""
        connection.ensure_connection()
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_isolation = '{isolation}'")
        with transaction.atomic():
            assert Message.objects.count() == 0
            with captured_messages(groups=["room"], channels=["jobs"]) as sent:
                layer.sync.group_send("room", say(1))
                async_to_sync(layer.group_send)("room", say(2))
                layer.sync.send("jobs", say(3))
                async_to_sync(layer.send_many)([("jobs", say(4)), ("others", say(0))])
                async_to_sync(layer.group_send)("others", say(0))
                assert layer.sync.group_count("room") == 1
                assert async_to_sync(layer.group_count)("room") == 1
            assert sent == [
                Sent(say(1), group="room"),
                Sent(say(2), group="room"),
                Sent(say(3), channel="jobs"),
                Sent(say(4), channel="jobs"),
            ]
            transaction.set_rollback(True)
        async_to_sync(layer.close)()
        """,
    )
    assert addresses(observer) == ["asgi!@room", "asgi!:jobs", "asgi!:others"]
    assert observer.execute("SELECT FROM pg_layer_membership").fetchall() == []


def test_captured_messages_in_a_test_case_has_those_of_a_view_with_async_to_sync(
    tmp_path: Path, migrated_dsn: str
) -> None:
    suite = """
        class ViewTests(TestCase):
            def test_it(self):
                with captured_messages(groups=["room"]) as sent:
                    async_to_sync(get_channel_layer().group_send)("room", say(1))
                assert sent == [Sent(say(1), group="room")]
    """
    for runner in RUNNERS:
        output = run_suite(runner, tmp_path, migrated_dsn, suite)
        assert output.endswith("status 0"), output


def test_captured_messages_member_locked_by_the_transaction_raises(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        from django.db import OperationalError
        from pg_layer import testing

        testing.OUTSIDE_LOCK_TIMEOUT = 1
        with pytest.raises(OperationalError, match="lock timeout"), transaction.atomic():
            with captured_messages(groups=["room"]):
                Membership.objects.all().delete()
        """,
    )


def test_captured_messages_outside_of_transactions_returns_committed_ones(
    migrated_dsn: str, observer: Observer
) -> None:
    captured(
        migrated_dsn,
        """
        with captured_messages(groups=["room"], channels=["jobs"]) as sent:
            layer.sync.group_send("room", say(1))
            async_to_sync(layer.group_send)("room", say(2))
            async_to_sync(layer.send)("jobs", say(3))
            try:
                with transaction.atomic():
                    layer.sync.group_send("room", say(0))
                    raise LookupError
            except LookupError:
                pass
        assert sent == [
            Sent(say(1), group="room"), Sent(say(2), group="room"), Sent(say(3), channel="jobs")
        ]
        async_to_sync(layer.close)()
        """,
    )
    assert addresses(observer) == ["asgi!@room", "asgi!@room", "asgi!:jobs"]  # until they expire
    assert observer.execute("SELECT FROM pg_layer_membership").fetchall() == []
    assert observer.execute("SELECT FROM pg_layer_client").fetchall() == []


def test_captured_messages_error_in_the_block_is_raised_unchanged(
    migrated_dsn: str, observer: Observer
) -> None:
    captured(
        migrated_dsn,
        """
        with pytest.raises(LookupError), captured_messages(groups=["room"]) as sent:
            layer.sync.group_send("room", say(1))
            raise LookupError
        assert sent == []
        with pytest.raises(LookupError), transaction.atomic(), captured_messages(groups=["room"]):
            with pytest.raises(Exception, match="division by zero"), connection.cursor() as cursor:
                cursor.execute("SELECT 1 / 0")
            raise LookupError
        """,
    )
    assert addresses(observer) == ["asgi!@room"]
    for table in ("membership", "client"):
        assert observer.execute(f"SELECT FROM pg_layer_{table}").fetchall() == []


def test_captured_messages_failing_leaves_no_member(migrated_dsn: str, observer: Observer) -> None:
    captured(
        migrated_dsn,
        """
        from pg_layer import PgLayerError

        with pytest.raises(PgLayerError, match="not encrypted"), captured_messages(groups=["room"]):
            with connection.cursor() as cursor:
                cursor.execute('SELECT pg_layer_group_send(%s, %s)', ["room", '{"type": "plain"}'])

        add, added = layer.sync.group_add, []

        def add_one(*arguments, **options):
            if added:
                raise LookupError
            added.append(add(*arguments, **options))

        layer.sync.group_add = add_one
        with pytest.raises(LookupError), captured_messages(groups=["room", "hall"]):
            raise AssertionError
        assert added
        """,
        symmetric_encryption_keys=["key"],
    )
    assert addresses(observer) == ["asgi!@room"]
    for table in ("membership", "client"):
        assert observer.execute(f"SELECT FROM pg_layer_{table}").fetchall() == []


def test_captured_messages_group_without_other_members_is_not_skipped(
    migrated_dsn: str, observer: Observer
) -> None:
    """If leases have been renewed without a gap, messages to empty groups are not written."""
    observer.execute(
        "INSERT INTO pg_layer_lease_clock (prefix, boot, lease, renewed_at, steady_since)"
        " VALUES ('asgi', pg_layer_current_boot(), 3600, now(), now() - interval '2 hours')"
    )
    captured(
        migrated_dsn,
        """
        with transaction.atomic():
            layer.sync.group_send("room", say(0))
            assert not Message.objects.exists()
            with captured_messages(groups=["room"]) as sent:
                layer.sync.group_send("room", say(1))
            assert sent == [Sent(say(1), group="room")]
            assert not Membership.objects.exists()
            assert layer.sync.group_count("room") == 0
        """,
    )


def test_captured_messages_wrong_arguments_raise(migrated_dsn: str) -> None:
    captured(
        migrated_dsn,
        """
        def refuses(error, part, **arguments):
            with pytest.raises(error, match=part), captured_messages(**arguments):
                raise AssertionError

        from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
        from django.utils.connection import ConnectionDoesNotExist

        refuses(TypeError, "groups must be a list of names, not a str", groups="room")
        refuses(ValueError, "needs groups or channels")
        refuses(TypeError, "Group name must be a valid unicode string", groups=["a room"])
        refuses(TypeError, "Channel name must be a valid unicode string", channels=["a channel"])
        what = "'memory'] is a InMemoryChannelLayer: captured_messages.* needs a pg_layer.Post"
        refuses(ImproperlyConfigured, what, groups=["room"], layer="memory")
        refuses(ConnectionDoesNotExist, "'nowhere' doesn't exist", groups=["room"], using="nowhere")
        refuses(ImproperlyConfigured, "'nothing'] does not exist", groups=["room"], layer="nothing")

        async def main():
            refuses(SynchronousOnlyOperation, "async context", groups=["room"])

        asyncio.run(main())
        """,
    )


# ---------------------------------------------------------------------- clean layers

LEFTOVERS = """
class LeftoverTests({base}):
    def setUp(self):
        self.addCleanup(reset_layers)

    def test_1_leaves_things_behind(self):
        layer = get_channel_layer()
        async_to_sync(layer.send)("jobs", say(1))
        async_to_sync(layer.group_add)("room", "jobs")
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())

    def test_2_finds_nothing(self):
        assert get_channel_layer().sync.group_channels("room") == []
        assert not Message.objects.exists()
        assert not Membership.objects.exists()
        assert not Client.objects.filter(ended_at=None).exists()

    async def test_3_leaves_a_reader_behind(self):
        layer = get_channel_layer()
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_send("room", say(1))
        assert await asyncio.wait_for(layer.receive(channel), {timeout}) == say(1)
        asyncio.create_task(layer.receive(channel))
        await asyncio.sleep(0)

    def test_4_finds_nothing_again(self):
        self.test_2_finds_nothing()

    def test_5_cleans_up_with_the_layer(self):
        layer = get_channel_layer()
        self.addCleanup(async_to_sync(layer.send), "jobs", say(2))

    def test_6_finds_nothing_again(self):
        self.test_2_finds_nothing()

    def test_7_holds_locks_in_its_transaction(self):
        layer = get_channel_layer()
        channel = async_to_sync(layer.new_channel)()
        async_to_sync(layer.group_add)("room", channel)
        with transaction.atomic():
            layer.sync.group_send("room", say(1))
            layer.sync.group_discard("room", channel)
            layer.sync.send("jobs", say(2))

    def test_8_finds_nothing_again(self):
        self.test_2_finds_nothing()

    @override_settings(CHANNEL_LAYERS={{"default": {{"BACKEND": "pg_layer.PostgresChannelLayer"}}}})
    def test_9_has_a_layer_of_its_own(self):
        async_to_sync(get_channel_layer().send)("jobs", say(3))
"""


@pytest.mark.parametrize("base", ["TestCase", "TransactionTestCase"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_reset_layers_each_test_begins_with_clean_layers(
    tmp_path: Path, migrated_dsn: str, observer: Observer, runner: str, base: str
) -> None:
    suite = LEFTOVERS.format(base=base, timeout=TIMEOUT)
    output = run_suite(runner, tmp_path, migrated_dsn, suite, plugin=False)
    assert output.endswith("status 0"), output
    assert test_databases(observer) == []


@pytest.mark.parametrize(
    "mark", ["django_db", "django_db(transaction=True)", "usefixtures('transactional_db')"]
)
def test_plugin_each_test_begins_with_clean_layers(
    tmp_path: Path, migrated_dsn: str, observer: Observer, mark: str
) -> None:
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        f"""
        pytestmark = pytest.mark.{mark}

        def test_1_leaves_things_behind():
            layer = get_channel_layer()
            async_to_sync(layer.send)("jobs", say(1))
            async_to_sync(layer.group_add)("room", "jobs")

        def test_2_finds_nothing():
            assert get_channel_layer().sync.group_channels("room") == []
            assert not Message.objects.exists()
            assert not Client.objects.filter(ended_at=None).exists()

        @pytest.fixture
        async def member():
            layer = get_channel_layer()
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            yield channel
            await layer.group_send("room", say(2))

        async def test_3_has_a_fixture_that_uses_the_layer(member):
            layer = get_channel_layer()
            await layer.group_send("room", say(1))
            assert await asyncio.wait_for(layer.receive(member), {TIMEOUT}) == say(1)

        async def test_4_asks_the_database_from_async_code():
            assert await Message.objects.acount() == 0
            assert await get_channel_layer().group_count("room") == 0
        """,
    )
    assert output.endswith("status 0"), output
    assert "4 passed" in output
    assert test_databases(observer) == []


@pytest.mark.parametrize("runner", RUNNERS)
def test_reset_layers_layer_by_dsn_is_closed_and_keeps_its_messages(
    tmp_path: Path, migrated_dsn: str, observer: Observer, runner: str
) -> None:
    layers = {
        "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"dsn": migrated_dsn}}
    }
    output = run_suite(
        runner,
        tmp_path,
        migrated_dsn,
        """
        class DsnTests(TestCase):
            def test_it(self):
                self.addCleanup(reset_layers)
                async_to_sync(get_channel_layer().send)("jobs", say(1))
        """,
        settings={"CHANNEL_LAYERS": layers},
    )
    assert output.endswith("status 0"), output
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == [("jobs",)]
    assert observer.execute("SELECT FROM pg_layer_client WHERE ended_at IS NULL").fetchall() == []


def test_plugin_test_without_the_layers_database_is_an_error_that_names_the_mark(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        """
        def test_it():
            async_to_sync(get_channel_layer().send)("jobs", say(1))

        def test_without_the_layer():
            pass
        """,
    )
    assert "2 passed, 1 error" in output
    assert "mark the test: @pytest.mark.django_db(transaction=True)." in output
    # Nothing was flushed: the messages might belong to another test or project.
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == [("jobs",)]


def test_plugin_test_without_a_mark_in_the_test_database_is_accepted_and_leaves_nothing(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    """An earlier test has made the test database, so the real one cannot be reached."""
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        """
        @pytest.mark.django_db
        def test_1_makes_the_test_database():
            assert not Message.objects.exists()

        def test_2_sends_without_a_mark():
            async_to_sync(get_channel_layer().send)("jobs", say(1))

        @pytest.mark.django_db
        def test_3_finds_nothing():
            assert not Message.objects.exists()
        """,
    )
    assert output.endswith("status 0"), output
    assert "3 passed" in output
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == []
    assert test_databases(observer) == []


# The fixture is as in the documentation of pytest-django.
EXISTING_DATABASE = """
    @pytest.fixture(scope="session")
    def django_db_setup():
        pass

    @pytest.mark.django_db
    def test_it():
        async_to_sync(get_channel_layer().send)("jobs", say(2))
        {last}

    def test_layer_was_closed():
        assert not get_channel_layer()._loops.is_used
"""


@pytest.mark.parametrize(
    ("last", "channels"),
    [("", ["theirs", "jobs"]), ("reset_layers(['default'])", [])],
    ids=["by the plugin", "named"],
)
def test_reset_in_an_existing_database_flushes_only_if_it_is_named(
    tmp_path: Path, migrated_dsn: str, observer: Observer, last: str, channels: list[str]
) -> None:
    """Live processes may use that database: their messages and memberships must not vanish."""
    observer.execute("SELECT pg_layer_send('theirs', %s)", ['{"type": "say", "n": 1}'])
    suite = EXISTING_DATABASE.replace("{last}", last)
    output = run_suite("pytest", tmp_path, migrated_dsn, suite)
    assert output.endswith("status 0"), output
    assert "2 passed" in output
    found = observer.execute("SELECT channel FROM pg_layer_message ORDER BY id").fetchall()
    assert [channel for (channel,) in found] == channels


def test_reset_layers_in_an_existing_database_not_named_raises(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    suite = EXISTING_DATABASE.replace("{last}", "reset_layers()")
    output = run_suite("pytest", tmp_path, migrated_dsn, suite)
    assert "1 failed, 1 passed" in output, output
    assert "call reset_layers(databases=['default'])." in output
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == [("jobs",)]


def test_reset_layers_on_another_database_names_databases_and_flushes_nothing(
    tmp_path: Path, migrated_dsn: str, fresh_database: str, observer: Observer
) -> None:
    parameters = conninfo_to_dict(migrated_dsn)
    databases = {
        alias: {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": conninfo_to_dict(dsn)["dbname"],
            **{
                name.upper(): parameters.get(name, "")
                for name in ("user", "password", "host", "port")
            },
        }
        for alias, dsn in (("default", fresh_database), ("events", migrated_dsn))
    }
    layers = {
        "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"using": "events"}}
    }
    suite = """
        class EventTests(TransactionTestCase):
            databases = {names}
            def test_it(self):
                self.addCleanup(reset_layers, self.databases)
                async_to_sync(get_channel_layer().send)("jobs", say(1))
    """
    settings = {"CHANNEL_LAYERS": layers, "DATABASES": databases}
    output = run_suite(
        "django", tmp_path, fresh_database, suite.replace("{names}", '"__all__"'), settings
    )
    assert output.endswith("status 0"), output
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == []

    output = run_suite(
        "django", tmp_path, fresh_database, suite.replace("{names}", '["default"]'), settings
    )
    assert output.endswith("status 1"), output
    assert "no test database: events. Name it in `databases` of the test case" in output
    # It was the real one indeed.
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == [("jobs",)]


def run_without_other_plugins(folder: Path, dsn: str) -> str:
    """Run pytest with pg_layer's plugin alone, in a project without settings of Django."""
    (folder / "pytest.ini").write_text("[pytest]")
    return run(
        folder,
        dsn,
        *("-m", "pytest", "-p", "pg_layer", "-p", "no:cacheprovider"),
        *("-c", str(folder / "pytest.ini"), str(folder)),
        environ={"DJANGO_SETTINGS_MODULE": "missing", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def test_plugin_in_a_project_without_the_layer_imports_nothing(
    tmp_path: Path, migrated_dsn: str
) -> None:
    """A `conftest.py` that replaces modules, as gevent does, must be the first to import them."""
    (tmp_path / "conftest.py").write_text(
        """
import sys

FORBIDDEN = {"asgiref", "asyncio", "channels", "django", "pg_layer", "psycopg", "ssl"}
at_start = FORBIDDEN & sys.modules.keys()
"""
    )
    (tmp_path / "test_nothing.py").write_text(
        """
import sys
from conftest import FORBIDDEN, at_start

def test_nothing(request):
    assert request.config.pluginmanager.hasplugin("pg_layer")
    assert at_start == set()

def test_nothing_was_imported_after_a_test():
    assert FORBIDDEN & sys.modules.keys() == set()
"""
    )
    output = run_without_other_plugins(tmp_path, migrated_dsn)
    assert "2 passed" in output, output


@pytest.mark.gevent
def test_plugin_in_a_project_patched_by_gevent_leaves_pytest_working(
    tmp_path: Path, migrated_dsn: str
) -> None:
    require("gevent", find_spec("gevent"), "Python's module gevent is not installed")
    (tmp_path / "conftest.py").write_text("from gevent import monkey; monkey.patch_all()")
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    output = run_without_other_plugins(tmp_path, migrated_dsn)
    assert "1 passed" in output, output
    assert output.endswith("status 0"), output


def test_plugin_closes_layers_that_were_used_before_the_tests(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    """The first test is not blamed for them."""
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        """
        async_to_sync(get_channel_layer().send)("jobs", say(1))

        def test_it():
            assert not get_channel_layer()._loops.is_used
        """,
    )
    assert output.endswith("status 0"), output
    assert observer.execute("SELECT channel FROM pg_layer_message").fetchall() == [("jobs",)]


def test_plugin_on_the_thread_of_a_running_loop_resets_layers(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    """As with the synchronous API of Playwright, whose loop runs while tests do."""
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        """
        from asyncio import events

        @pytest.fixture(scope="session", autouse=True)
        def running_loop():
            loop = asyncio.new_event_loop()
            events._set_running_loop(loop)
            yield
            events._set_running_loop(None)
            loop.close()

        def send():
            asyncio.run(get_channel_layer().send("jobs", say(1)))

        @pytest.mark.parametrize("n", range(2))
        @pytest.mark.django_db
        def test_it(n):
            import threading

            assert Message.objects.count() == 0
            thread = threading.Thread(target=send)
            thread.start()
            thread.join()
        """,
        environ={"DJANGO_ALLOW_ASYNC_UNSAFE": "true"},
    )
    assert output.endswith("status 0"), output
    assert test_databases(observer) == []


def test_plugin_thread_of_sync_to_async_that_stays_busy_is_an_error(
    tmp_path: Path, migrated_dsn: str
) -> None:
    """Without a limit pytest would wait for ever."""
    output = run_suite(
        "pytest",
        tmp_path,
        migrated_dsn,
        """
        import threading
        import pg_layer_pytest
        from asgiref.sync import sync_to_async

        pg_layer_pytest.CLOSE_TIMEOUT = 0.1
        begun, released = threading.Event(), threading.Event()

        def wait():
            begun.set()
            released.wait()

        @pytest.mark.django_db
        async def test_1_does_not_wait_for_its_function():
            await get_channel_layer().send("jobs", say(1))
            waiting = asyncio.ensure_future(sync_to_async(wait)())
            await asyncio.to_thread(begun.wait)
            waiting.cancel()

        def test_2_releases_it():
            released.set()
        """,
    )
    assert "2 passed, 1 error" in output, output
    assert "Make the test wait for it." in output


def test_testing_module_imports_without_pytest() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None; "
        "import pg_layer.testing; pg_layer.testing.reset_layers()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT)
