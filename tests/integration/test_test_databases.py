"""Layers in the test databases of projects, without any set-up."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import Observer
from tests.integration.test_django import postgres
from tests.integration.test_testing_support import IMPORTS, run, run_suite
from tests.integration.test_testing_support import test_databases as find_test_databases
from tests.project.commands import TIMEOUT, django
from tests.project.commands import run as run_project

find_test_databases.__test__ = False  # type: ignore[attr-defined]
# Each test runs a suite in one to three processes, one of them twice.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * TIMEOUT)]

SPAWNING = """
import multiprocessing

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    execute_from_command_line()
"""
# `AppConfig.ready` of this app uses the layer before a test database exists: it sends, and becomes
# a member of a group, which needs a listening connection.
EARLY_APP = """
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.apps import AppConfig

class EarlyConfig(AppConfig):
    name = "early"

    def ready(self):
        layer = get_channel_layer()
        async_to_sync(layer.send)("early", {"type": "early"})
        async_to_sync(layer.group_add)("early", async_to_sync(layer.new_channel)())
"""
SUITE = """
class FirstTests({base}):
    def test_1_view_sends(self):
        async_to_sync(get_channel_layer().send)("jobs", say(1))

    def test_2_group_has_a_member(self):
        layer = get_channel_layer()
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())

    async def test_3_reader_is_left_behind(self):
        layer = get_channel_layer()
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_send("room", say(2))
        assert await asyncio.wait_for(layer.receive(channel), {timeout}) == say(2)
        asyncio.create_task(layer.receive(channel))
        await asyncio.sleep(0)

class SecondTests({base}):
    def test_1_job_is_received(self):
        layer = get_channel_layer()
        async_to_sync(layer.send)("others", say(3))
        assert async_to_sync(layer.receive)("others") == say(3)

    def test_2_member_is_counted(self):
        layer = get_channel_layer()
        layer.sync.group_add("hall", async_to_sync(layer.new_channel)())
        assert layer.sync.group_count("hall") == 1
"""


def run_tests(
    how: str,
    folder: Path,
    dsn: str,
    suite: str,
    *,
    is_early: bool = False,
    settings: dict[str, Any] | None = None,
) -> str:
    """Run a suite without pg_layer's plugin. Return the output and the exit status.

    ``how``: a runner and its options. ``is_early``: use the layer in `AppConfig.ready`.
    """
    settings = dict(settings or {})
    environ = {}
    if is_early:
        settings["INSTALLED_APPS"] = ["channels", "pg_layer", "early"]
        app = folder / "path" / "early"
        app.mkdir(parents=True, exist_ok=True)
        (app / "__init__.py").touch()
        (app / "apps.py").write_text(EARLY_APP)
        environ["PYTHONPATH"] = str(app.parent)
    if how == "pytest":
        return run_suite("pytest", folder, dsn, suite, settings, plugin=False, environ=environ)
    if how == "pytest -n 2":
        options = ("-n", "2")
        return run_suite(
            "pytest", folder, dsn, suite, settings, *options, plugin=False, environ=environ
        )
    (folder / "test_suite.py").write_text(IMPORTS + textwrap.dedent(suite))
    (folder / "spawning.py").write_text(SPAWNING)
    arguments = {
        "django": ["-m", "tests.project.manage", "test"],
        "django --parallel": ["-m", "tests.project.manage", "test", "--parallel", "2"],
        "django --parallel, spawn": [str(folder / "spawning.py"), "test", "--parallel", "2"],
        "django --keepdb": ["-m", "tests.project.manage", "test", "--keepdb"],
    }[how]
    environ["PYTHONPATH"] = f"{environ.get('PYTHONPATH', '')}:{Path.cwd()}"
    return run(
        folder, dsn, *arguments, "--noinput", str(folder), settings=settings, environ=environ
    )


HOW = ["django", "django --parallel", "django --parallel, spawn", "pytest", "pytest -n 2"]


@pytest.mark.parametrize("base", ["TestCase", "TransactionTestCase"])
@pytest.mark.parametrize("how", HOW)
def test_test_database_is_dropped_without_any_set_up(
    tmp_path: Path, migrated_dsn: str, observer: Observer, how: str, base: str
) -> None:
    suite = SUITE.format(base=base, timeout=TIMEOUT)
    output = run_tests(how, tmp_path, migrated_dsn, suite)
    assert output.endswith("status 0"), output
    assert "arning" not in output, output
    assert find_test_databases(observer) == []
    assert observer.execute("SELECT FROM pg_layer_message").fetchall() == []
    assert observer.execute("SELECT FROM pg_layer_client").fetchall() == []


@pytest.mark.parametrize("how", [*HOW, "django --keepdb"])
def test_layer_used_before_the_test_database_exists_leaves_the_real_one(
    tmp_path: Path, migrated_dsn: str, observer: Observer, how: str
) -> None:
    suite = SUITE.format(base="TransactionTestCase", timeout=TIMEOUT)
    # The second run with --keepdb creates no database.
    for _ in range(2 if how == "django --keepdb" else 1):
        output = run_tests(how, tmp_path, migrated_dsn, suite, is_early=True)
        assert output.endswith("status 0"), output
        assert "arning" not in output, output
    left = find_test_databases(observer)
    for name in left:
        observer.execute(f'DROP DATABASE "{name}"')
    assert bool(left) == (how == "django --keepdb")
    channels = observer.execute("SELECT DISTINCT channel FROM pg_layer_message WHERE channel <> ''")
    assert channels.fetchall() == [("early",)]
    groups = observer.execute("SELECT DISTINCT group_name FROM pg_layer_membership").fetchall()
    assert set(groups) <= {("early",)}


@pytest.mark.parametrize("how", ["django", "pytest"])
def test_test_database_is_dropped_while_other_loops_run_or_have_stopped(
    tmp_path: Path, migrated_dsn: str, observer: Observer, how: str
) -> None:
    output = run_tests(
        how,
        tmp_path,
        migrated_dsn,
        f"""
        import threading

        def receive(layer):
            async def main():
                channel = await layer.new_channel()
                await layer.group_add("room", channel)
                await layer.group_send("room", say(1))
                assert await asyncio.wait_for(layer.receive(channel), {TIMEOUT}) == say(1)
            return main()

        class LoopTests(TransactionTestCase):
            def test_1_loop_runs_in_another_thread(self):
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, daemon=True).start()
                work = receive(PostgresChannelLayer(prefix="running"))
                asyncio.run_coroutine_threadsafe(work, loop).result({TIMEOUT})

            def test_2_loop_has_stopped(self):
                self.__class__.loop = loop = asyncio.new_event_loop()
                self.__class__.layer = PostgresChannelLayer(prefix="stopped")
                loop.run_until_complete(receive(self.layer))

            def test_3_stopped_loop_runs_again(self):
                self.loop.run_until_complete(receive(self.layer))
                self.loop.run_until_complete(self.layer.close())
                self.loop.close()

            def test_4_loop_has_been_closed(self):
                self.__class__.layer = layer = PostgresChannelLayer(prefix="closed")
                asyncio.run(receive(layer))
        """,
    )
    assert output.endswith("status 0"), output
    assert find_test_databases(observer) == []


def test_test_database_is_dropped_on_the_thread_of_a_running_loop(
    migrated_dsn: str, observer: Observer
) -> None:
    """As with the synchronous API of Playwright, whose loop runs while tests do."""
    output = django(
        migrated_dsn,
        f"""
import asyncio, os
os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
from django.db import connection
from django.test.utils import setup_databases, setup_test_environment, teardown_databases
from pg_layer import PostgresChannelLayer

async def main():
    setup_test_environment()
    layer = PostgresChannelLayer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    before = setup_databases(0, False)
    try:
        await layer.receive(channel)
    except Exception as error:
        print(type(error).__name__)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {{"type": "say"}})
    print(await asyncio.wait_for(layer.receive(channel), {TIMEOUT}))
    reader = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    teardown_databases(before, 0)
    print(type((await asyncio.gather(reader, return_exceptions=True))[0]).__name__)
    connection.close()

asyncio.run(main())
""",
    )
    assert output.splitlines() == ["TypeError", "{'type': 'say'}", "LayerUnavailable"]
    assert find_test_databases(observer) == []
    assert observer.execute("SELECT FROM pg_layer_message").fetchall() == []
    assert observer.execute("SELECT FROM pg_layer_client WHERE ended_at IS NULL").fetchall() == []


def test_layer_outside_of_tests_is_not_closed_by_such_statements(migrated_dsn: str) -> None:
    """A project may create a database for each tenant, or empty one, in a running server."""
    name = f"{conninfo_to_dict(migrated_dsn)['dbname']}_tenant"
    output = django(
        migrated_dsn,
        f"""
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.core.management import call_command
from django.db import connection
layer = get_channel_layer()
async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
client = layer._loops.client
with connection._nodb_cursor() as cursor:
    cursor.execute('CREATE DATABASE "{name}"')
    cursor.execute('DROP DATABASE "{name}"')
with connection.cursor() as cursor:
    cursor.execute("TRUNCATE pg_layer_message")
print(layer._loops.client is client, layer._loops.is_used)
connection.close()
""",
    )
    assert output == "True True"


@pytest.mark.parametrize("is_test", [False, True])
def test_layer_in_a_process_that_has_sent_mail_is_closed_in_tests_only(
    migrated_dsn: str, is_test: bool
) -> None:
    """The backend "locmem" makes `mail.outbox`, which else only tests have."""
    name = f"{conninfo_to_dict(migrated_dsn)['dbname']}_tenant"
    output = django(
        migrated_dsn,
        f"""
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.conf import settings
from django.core import mail
from django.db import connection
from django.test.utils import setup_test_environment, teardown_test_environment
setup_test_environment()
if not {is_test}:
    teardown_test_environment()
    settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
mail.send_mail("subject", "text", "a@example.org", ["b@example.org"])
layer = get_channel_layer()
async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
client = layer._loops.client
with connection._nodb_cursor() as cursor:
    cursor.execute('CREATE DATABASE "{name}"')
    cursor.execute('DROP DATABASE "{name}"')
print(len(mail.outbox), layer._loops.client is client)
async_to_sync(layer.close)()
""",
    )
    assert output == f"1 {not is_test}"


def test_django_begins_although_the_driver_of_an_alias_is_missing(migrated_dsn: str) -> None:
    """Only the commands that use that database need it."""
    databases = {
        "default": postgres(migrated_dsn),
        "legacy": {"ENGINE": "missing_backend", "NAME": "x"},
        "nameless": {"ENGINE": "missing_backend"},
    }
    output = django(
        migrated_dsn,
        """
from django.db import connections
from pg_layer._runtime.databases_of_tests import is_test_database
print([is_test_database(alias) for alias in connections])
connections.settings["legacy"]["NAME"] = "test_x"
connections.settings["added"] = {"NAME": "y"}
print([is_test_database(alias) for alias in connections])
""",
        settings={"DATABASES": databases},
    )
    assert output.splitlines() == ["[False, False, False]", "[False, True, False, False]"]


def test_wrapper_of_the_project_ends_with_its_block(migrated_dsn: str) -> None:
    """Also if the connection opens inside of the block."""
    output = django(
        migrated_dsn,
        """
from django.db import connection
from django.test.utils import setup_test_environment
setup_test_environment()

def note(execute, sql, *arguments):
    print(sql)
    return execute(sql, *arguments)

def run(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)

with connection.execute_wrapper(note):
    run("SELECT 1")
run("SELECT 2")
print(len(connection.execute_wrappers))
connection.close()
""",
    )
    assert output.splitlines() == ["SELECT 1", "1"]


def test_statement_of_django_runs_although_a_blocked_loop_cannot_close_the_layer(
    migrated_dsn: str, observer: Observer
) -> None:
    result = run_project(
        migrated_dsn,
        "-c",
        """
import django; django.setup()
import asyncio, threading
from channels.layers import get_channel_layer
from django.test.utils import setup_databases, setup_test_environment, teardown_databases

setup_test_environment()
before = setup_databases(0, False)
loop, layer = asyncio.new_event_loop(), get_channel_layer()
thread = threading.Thread(target=loop.run_forever, daemon=True)
thread.start()

async def use():
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "say"})
    await layer.receive(channel)

async def end():
    await layer.close()

asyncio.run_coroutine_threadsafe(use(), loop).result()
released = threading.Event()
loop.call_soon_threadsafe(released.wait)
teardown_databases(before, 0)
print("dropped")
released.set()
asyncio.run_coroutine_threadsafe(end(), loop).result()
loop.call_soon_threadsafe(loop.stop)
thread.join()
loop.close()
""",
    )
    assert result.stdout.split() == ["dropped"], result.stderr
    assert "[close_failed] Could not close a layer before Django" in result.stderr
    assert "code in that thread blocks it" in result.stderr
    assert find_test_databases(observer) == []


def test_database_changed_while_the_layer_is_used_is_logged_outside_of_tests(
    migrated_dsn: str, fresh_database: str
) -> None:
    """All its consumers get an error, and nothing else would say why."""
    first, second = (conninfo_to_dict(dsn)["dbname"] for dsn in (migrated_dsn, fresh_database))
    code = f"""
import django; django.setup()
import asyncio
from channels.layers import get_channel_layer
from django.db import connections
from django.test.utils import setup_test_environment

async def main():
    layer = get_channel_layer()
    reader = asyncio.create_task(layer.receive(await layer.new_channel()))
    await layer.send("jobs", {{"type": "job"}})
    connections.settings["default"]["NAME"] = {second!r}
    assert await layer.new_channel()
    print(type((await asyncio.gather(reader, return_exceptions=True))[0]).__name__)
    await layer.close()
"""
    result = run_project(migrated_dsn, "-c", f"{code}\nasyncio.run(main())")
    assert result.stdout.split() == ["LayerUnavailable"], result.stderr
    assert "[database_changed] NAME of the layer's database in DATABASES" in result.stderr
    assert f"has changed from {first!r} to {second!r}" in result.stderr
    code += "\nsetup_test_environment()\nasyncio.run(main())"
    result = run_project(migrated_dsn, "-c", code)
    assert (result.stdout.split(), result.stderr) == (["LayerUnavailable"], "")


@pytest.mark.parametrize("how", ["django", "pytest"])
def test_layer_is_closed_before_its_tables_are_truncated(
    tmp_path: Path, migrated_dsn: str, how: str
) -> None:
    output = run_tests(
        how,
        tmp_path,
        migrated_dsn,
        """
        from pg_layer._runtime.databases_of_tests import used_layers

        used = []

        def note(execute, sql, *arguments):
            if sql.startswith("TRUNCATE"):
                used.append(bool(used_layers()))
            return execute(sql, *arguments)

        class FirstTests(TransactionTestCase):
            serialized_rollback = True

            def test_it(self):
                connection.execute_wrappers.append(note)
                async_to_sync(get_channel_layer().send)("jobs", say(1))

        class SecondTests(TransactionTestCase):
            def test_it(self):
                assert used == [False]
        """,
    )
    assert output.endswith("status 0"), output


def test_loop_of_a_pytest_session_serves_all_tests(
    tmp_path: Path, migrated_dsn: str, observer: Observer
) -> None:
    output = run_tests(
        "pytest",
        tmp_path,
        migrated_dsn,
        f"""
        pytestmark = [
            pytest.mark.django_db(transaction=True), pytest.mark.asyncio(loop_scope="session"),
        ]

        @pytest.mark.parametrize("n", range(3))
        async def test_it(n):
            layer = get_channel_layer()
            assert await layer.group_channels("room") == []
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            await layer.group_send("room", say(n))
            assert await asyncio.wait_for(layer.receive(channel), {TIMEOUT}) == say(n)
        """,
    )
    assert output.endswith("status 0"), output
    assert "3 passed" in output
    assert find_test_databases(observer) == []
