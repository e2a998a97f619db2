"""The layer in a Django project: settings, migrations, models, test databases and the wheel.

Each test runs commands and code of the test project, in separate processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.components import missing
from tests.conftest import Observer
from tests.project.commands import ROOT, TIMEOUT, django, manage, succeeded

Settings = dict[str, Any]

BACKEND = "pg_layer.PostgresChannelLayer"
SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}

TALK = """
import asyncio
from channels.layers import get_channel_layer

async def talk(layer):
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.send(channel, {"type": "test", "n": 1})
    await layer.group_send("room", {"type": "test", "n": 2})
    numbers = [(await asyncio.wait_for(layer.receive(channel), 30))["n"] for _ in range(2)]
    await layer.send("left.behind", {"type": "test"})
    await layer.close()
    return numbers
"""


def channel_layers(**config: Any) -> Settings:
    return {"CHANNEL_LAYERS": {"default": {"BACKEND": BACKEND, "CONFIG": config}}}


def databases(**aliases: Settings) -> Settings:
    return {"DATABASES": aliases}


def postgres(dsn: str) -> Settings:
    """Return an entry of DATABASES for the DSN."""
    parameters = conninfo_to_dict(dsn)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parameters["dbname"],
        "USER": parameters["user"],
        "PASSWORD": parameters["password"],
        "HOST": parameters["host"],
        "PORT": parameters["port"],
    }


def left_behind(dsn: str) -> list[str]:
    """Return the channels of the messages that wait in a database, without group messages.

    A group message stays until it expires, even if all members have received it.
    """
    with psycopg.connect(dsn) as conn:
        rows = conn.execute("SELECT channel FROM pg_layer_message WHERE address NOT LIKE '%!@%'")
        return [channel for (channel,) in rows]


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "layers",
    [
        {"default": {"BACKEND": BACKEND}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {}}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {"using": "default"}}},
        {
            "default": {
                "BACKEND": "pg_layer.layer.PostgresChannelLayer",
                "CONFIG": {"prefix": "mine"},
            }
        },
    ],
    ids=["no CONFIG", "an empty CONFIG", "using", "the module's path"],
)
def test_layer_with_default_config_uses_the_default_database(
    migrated_dsn: str, layers: Settings
) -> None:
    code = f"{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert django(migrated_dsn, code, settings={"CHANNEL_LAYERS": layers}) == "[1, 2]"
    assert left_behind(migrated_dsn) == ["left.behind"]


def test_layer_with_using_uses_the_database_of_that_alias(migrated_dsn: str) -> None:
    settings = databases(default=SQLITE, events=postgres(migrated_dsn)) | channel_layers(
        using="events"
    )
    code = f"{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert django(migrated_dsn, code, settings=settings) == "[1, 2]"
    assert left_behind(migrated_dsn) == ["left.behind"]


@pytest.mark.parametrize("other", [{}, {"default": SQLITE}], ids=["no database", "SQLite"])
def test_layer_with_dsn_uses_that_database(migrated_dsn: str, other: Settings) -> None:
    settings = databases(**other) | channel_layers(dsn=migrated_dsn)
    code = f"{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert django(migrated_dsn, code, settings=settings) == "[1, 2]"
    assert left_behind(migrated_dsn) == ["left.behind"]


def test_layer_uses_the_options_of_the_django_database(migrated_dsn: str) -> None:
    database = {
        **postgres(migrated_dsn),
        "OPTIONS": {"application_name": "mine", "isolation_level": 4},
    }
    code = f"""{TALK}
from django.db import connection

def count():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mine'")
        return cursor.fetchone()[0]

async def main():
    layer = get_channel_layer()
    await layer.send("jobs", {{"type": "test"}})
    print(count())
    await layer.receive("jobs")
    await layer.close()
    for _ in range(500):  # the backend ends a moment after its connection
        if count() == 1:
            break
        await asyncio.sleep(0.01)
    print(count())
    connection.close()

os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
asyncio.run(main())
"""
    output = django(migrated_dsn, f"import os\n{code}", settings=databases(default=database))
    # While the layer is open: its connection and Django's. After it is closed: Django's.
    assert output.split() == ["2", "1"]


def test_two_layers_with_different_prefixes_in_one_database_are_isolated(migrated_dsn: str) -> None:
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": BACKEND},
            "other": {"BACKEND": BACKEND, "CONFIG": {"prefix": "other", "capacity": 1}},
        }
    }
    code = f"""{TALK}
async def main():
    one, other = get_channel_layer(), get_channel_layer("other")
    assert one is get_channel_layer("default")
    assert other is get_channel_layer("other") and one is not other
    await one.send("jobs", {{"type": "test", "n": 1}})
    await other.send("jobs", {{"type": "test", "n": 2}})
    print((await one.receive("jobs"))["n"], (await other.receive("jobs"))["n"])
    await one.close()
    await other.close()

asyncio.run(main())
"""
    assert django(migrated_dsn, code, settings=settings) == "1 2"


COMPLAIN = """
import asyncio
from channels.layers import get_channel_layer

def complain(work):
    try:
        print("No error, but", work())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"capactiy": 5}, "unknown option 'capactiy'. Did you mean 'capacity'?"),
        ({"hosts": ["localhost"]}, "'hosts' in CONFIG is an option of channels_redis"),
        ({"capacity": "many"}, "CONFIG['capacity'] must be an integer"),
        ({"using": "default", "dsn": "dbname=x"}, "must not have both 'dsn' and 'using'"),
    ],
)
def test_get_channel_layer_with_a_bad_config_names_the_option(
    migrated_dsn: str, config: Settings, complaint: str
) -> None:
    code = f"{COMPLAIN}\ncomplain(get_channel_layer)"
    output = django(migrated_dsn, code, settings=channel_layers(**config))
    assert output.startswith("ImproperlyConfigured: ")
    assert complaint in output


@pytest.mark.parametrize(
    ("using", "complaint"),
    [
        ("nowhere", "must be an alias in DATABASES, not 'nowhere'"),
        ("lite", "'lite' has the ENGINE"),
    ],
    ids=["missing", "SQLite"],
)
def test_layer_with_a_wrong_alias_names_it_at_the_first_use(
    migrated_dsn: str, using: str, complaint: str
) -> None:
    """The layer does not check the alias earlier, because DATABASES may still change."""
    databases_ = databases(default=postgres(migrated_dsn), lite=SQLITE)
    settings = databases_ | channel_layers(using=using, send_timeout=1)
    code = f"""{COMPLAIN}
layer = get_channel_layer()

async def use(work):
    try:
        return await asyncio.wait_for(work, 5)
    finally:
        await layer.close()

complain(lambda: asyncio.run(use(layer.send("jobs", {{"type": "test"}}))))
complain(lambda: asyncio.run(use(layer.group_send("room", {{"type": "test"}}))))
complain(lambda: asyncio.run(use(layer.group_add("room", "some.channel"))))
complain(lambda: asyncio.run(use(layer.flush())))
complain(lambda: asyncio.run(use(layer.receive("jobs"))))
"""
    lines = django(migrated_dsn, code, settings=settings).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("ImproperlyConfigured: ")
        assert complaint in line


# ---------------------------------------------------------------------- migrations and models


def database_objects(dsn: str) -> list[str]:
    """Return the names of pg_layer's tables, indexes, sequences and functions in a database."""
    with psycopg.connect(dsn) as conn:
        rows = conn.execute(
            "SELECT relname FROM pg_class WHERE relname LIKE 'pg\\_layer%'"
            " UNION ALL SELECT oid::regprocedure::text FROM pg_proc"
            " WHERE proname LIKE 'pg\\_layer%'"
            " ORDER BY 1"
        )
        return [name for (name,) in rows]


def test_migrate_to_zero_and_back_restores_all_objects(fresh_database: str) -> None:
    succeeded(manage(fresh_database, "migrate", "-v", "0"))
    there = database_objects(fresh_database)
    assert {"pg_layer_client", "pg_layer_membership", "pg_layer_message"} < set(there)
    succeeded(manage(fresh_database, "migrate", "-v", "0", "pg_layer", "zero"))
    assert database_objects(fresh_database) == []
    succeeded(manage(fresh_database, "migrate", "-v", "0", "pg_layer"))
    assert database_objects(fresh_database) == there
    code = f"{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert django(fresh_database, code) == "[1, 2]"


def test_sqlmigrate_prints_the_sql(migrated_dsn: str) -> None:
    """Administrators ask for the SQL if the application may not run ``migrate``."""
    output = succeeded(manage(migrated_dsn, "sqlmigrate", "pg_layer", "0001"))
    assert "CREATE TABLE pg_layer_message" in output
    assert "CREATE FUNCTION pg_layer_send_batch" in output


@pytest.mark.parametrize("field", ["AutoField", "BigAutoField", "SmallAutoField"])
def test_makemigrations_detects_no_changes(migrated_dsn: str, field: str) -> None:
    settings = {"DEFAULT_AUTO_FIELD": f"django.db.models.{field}"}
    output = succeeded(
        manage(migrated_dsn, "makemigrations", "--check", "--dry-run", settings=settings)
    )
    assert output == "No changes detected"


def test_models_match_the_tables(migrated_dsn: str) -> None:
    code = """
from django.apps import apps
from django.db import connection

for model in apps.get_app_config("pg_layer").get_models():
    with connection.cursor() as cursor:
        table = connection.introspection.get_table_description(cursor, model._meta.db_table)
        key = connection.introspection.get_primary_key_columns(cursor, model._meta.db_table)
    # PostgreSQL does not know whether the columns of a view may be null.
    columns = {(column.name, model._meta.managed and column.null_ok) for column in table}
    fields = {(field.column, field.null) for field in model._meta.concrete_fields if field.column}
    pk = model._meta.pk_fields
    has_key = [field.column for field in pk] == key
    print(model.__name__, columns ^ fields, has_key, list(model.objects.all()))
"""
    assert django(migrated_dsn, code).splitlines() == [
        "Message {('xid', False)} False []",  # Django has no field for its type
        "Membership set() True []",
        "Group set() False []",
        "Client set() True []",
        "LeaseClock set() True []",
        "LowId set() True []",
        "LastSweep set() True []",
    ]


def test_check_reports_no_issues(migrated_dsn: str) -> None:
    output = succeeded(
        manage(migrated_dsn, "check", "--database", "default", "--fail-level", "WARNING")
    )
    assert output == "System check identified no issues (0 silenced)."


def test_django_flush_empties_the_tables(migrated_dsn: str, observer: Observer) -> None:
    observer.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (1,)
    succeeded(manage(migrated_dsn, "flush", "--no-input"))
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)


FILL = """
import asyncio, os
from django.core.management import call_command
from django.db import connection
from channels.layers import get_channel_layer
from pg_layer import models

os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
call_command("migrate", verbosity=0)

async def fill(layer):
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_add("room", "jobs")
    await layer.group_send("room", {"type": "test"})
    with connection.cursor() as cursor:
        for table in ("group", "client", "membership", "message", "lease_clock"):
            cursor.execute(f"SELECT count(*) > 0 FROM pg_layer_{table}")
            assert cursor.fetchone() == (True,), table
"""


@pytest.mark.parametrize(
    "arguments",
    [[], ["--all"], ["--natural-primary", "--natural-foreign"]],
    ids=lambda arguments: " ".join(arguments) or "plain",
)
def test_dumpdata_with_members_leaves_the_tables_out(
    fresh_database: str, tmp_path: Path, arguments: list[str]
) -> None:
    """The dump can be loaded, while the layer is in use. It has the rows of other models."""
    dump = tmp_path / "dump.json"
    code = f"""{FILL}
async def run():
    layer = get_channel_layer()
    await fill(layer)
    before = await layer.group_count("room")
    call_command("dumpdata", *{arguments!r}, output={str(dump)!r}, verbosity=0)
    call_command("loaddata", {str(dump)!r}, verbosity=0)
    print(before, await layer.group_count("room"))
    call_command("dumpdata", "pg_layer")
    for model in (models.Message, models.Membership, models.Client, models.Group):
        assert list(model.objects.iterator()) == list(model.objects.all()) != [], model
        assert list(model.objects.iterator(chunk_size=1)) == list(model.objects.all()), model
    await layer.close()
    connection.close()

asyncio.run(run())
"""
    settings = {"INSTALLED_APPS": ["django.contrib.contenttypes", "channels", "pg_layer"]}
    assert django(fresh_database, code, settings=settings).splitlines() == ["2 2", "[]"]
    dumped = {row["model"] for row in json.loads(dump.read_text())}
    assert dumped == {"contenttypes.contenttype"}


def test_serialized_rollback_with_members_leaves_the_tables_out(fresh_database: str) -> None:
    """What the test runner saves after `migrate` is loaded again after the tables are flushed."""
    code = f"""{FILL}
async def run():
    layer = get_channel_layer()
    await fill(layer)
    saved = connection.creation.serialize_db_to_string()
    print(saved)
    await layer.close()
    call_command("flush", interactive=False, verbosity=0)
    connection.creation.deserialize_db_from_string(saved)
    print(models.Message.objects.count(), models.Client.objects.count())
    connection.close()

asyncio.run(run())
"""
    assert django(fresh_database, code).splitlines() == ["[]", "0 0"]


def test_sqlflush_names_the_tables_and_not_the_view(migrated_dsn: str) -> None:
    output = succeeded(manage(migrated_dsn, "sqlflush"))
    assert '"pg_layer_message"' in output
    assert '"pg_layer_membership"' in output
    assert "pg_layer_group" not in output


def test_migrate_on_sqlite_creates_nothing(migrated_dsn: str, tmp_path: Path) -> None:
    """The same holds in a project that has SQLite only, and a layer with a dsn."""
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    settings = databases(default=postgres(migrated_dsn), lite=lite)
    before = database_objects(migrated_dsn)
    for target in ([], ["pg_layer", "zero"], []):
        arguments = ["migrate", "-v", "0", "--database", "lite", *target]
        succeeded(manage(migrated_dsn, *arguments, settings=settings))
    assert database_objects(migrated_dsn) == before
    code = """
from django.db import connections
print(connections["lite"].introspection.table_names())
"""
    assert django(migrated_dsn, code, settings=settings) == "['django_migrations']"
    # A project that has SQLite only, and a layer with a dsn.
    only = databases(default=lite) | channel_layers(dsn=migrated_dsn)
    succeeded(manage(migrated_dsn, "migrate", "-v", "0", settings=only))
    code = f"{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert django(migrated_dsn, code, settings=only) == "[1, 2]"


# ---------------------------------------------------------------------- test databases


def test_layer_uses_a_database_renamed_before_the_first_use(
    fresh_database: str, migrated_dsn: str
) -> None:
    """Test runners rename the database in this way when the layer already exists."""
    name = conninfo_to_dict(migrated_dsn)["dbname"]
    code = f"""{TALK}
from django.db import connections

layer = get_channel_layer()
connections["default"].settings_dict["NAME"] = {name!r}
print(asyncio.run(talk(layer)))
"""
    assert django(fresh_database, code) == "[1, 2]"
    assert left_behind(migrated_dsn) == ["left.behind"]


@pytest.mark.parametrize(
    "arguments", [[], ["--parallel", "2"]], ids=["in one process", "in parallel"]
)
def test_django_test_runner_works_and_leaves_no_database(
    migrated_dsn: str, arguments: list[str]
) -> None:
    result = manage(migrated_dsn, "test", "tests.project.suite", "--noinput", *arguments)
    assert result.returncode == 0, result.stderr
    assert "Ran 5 tests" in result.stderr
    assert "Warning" not in result.stderr, result.stderr
    assert left_behind(migrated_dsn) == []
    with psycopg.connect(migrated_dsn) as conn:
        rows = conn.execute(
            "SELECT datname FROM pg_database"
            " WHERE datname LIKE 'test\\_' || current_database() || '%'"
        ).fetchall()
    drop_databases(migrated_dsn, [name for (name,) in rows])
    assert rows == []


def drop_databases(dsn: str, names: list[str]) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        for name in names:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# ---------------------------------------------------------------------- the wheel


@pytest.mark.slow
def test_wheel_installed_in_a_clean_environment_works(fresh_database: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "pg_layer_pytest.py"):
        shutil.copy(ROOT / name, source)
    for name in ("pg_layer", "migrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    [wheel] = tmp_path.glob("*.whl")

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "pg_layer/py.typed",
        "pg_layer/management/commands/pg_layer_sweep.py",
        "pg_layer/migrations/0001_initial.py",
    } < names
    assert {Path(name).name for name in names if name.endswith(".sql")} == {
        path.name for path in (ROOT / "migrations").glob("*.sql")
    }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pg_layer").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "pg_layer",
        "pg_layer_pytest.py",
    }

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip(sys.executable, "--python", str(python), "install", str(wheel))
    (tmp_path / "project.py").write_text((ROOT / "tests/project/settings.py").read_text())

    def project(*arguments: str) -> str:
        return succeeded(
            subprocess.run(
                [python, "-X", "dev", *arguments],
                cwd=tmp_path,
                env={
                    **{
                        name: value
                        for name, value in os.environ.items()
                        if not name.startswith("PYTHON")
                    },
                    "DJANGO_SETTINGS_MODULE": "project",
                    "PG_LAYER_TEST_PROJECT_DSN": fresh_database,
                    # Its formatter belongs to the tests, which are not installed there.
                    "PG_LAYER_TEST_PROJECT_SETTINGS": json.dumps({"LOGGING": {}}),
                },
                capture_output=True,
                text=True,
                timeout=2 * TIMEOUT,
            )
        )

    assert str(environment) in project("-c", "import pg_layer; print(pg_layer.__file__)")
    project("-m", "django", "migrate", "-v", "0")
    assert project("-m", "django", "makemigrations", "--check") == "No changes detected"
    assert project("-m", "django", "pg_layer_sweep", "--once").startswith("Removed 0 messages")
    talk = f"import django; django.setup()\n{TALK}\nprint(asyncio.run(talk(get_channel_layer())))"
    assert project("-c", talk) == "[1, 2]"


def pip(python: str, *arguments: str) -> None:
    result = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        capture_output=True,
        text=True,
    )
    if "No matching distribution found" in result.stderr or "Could not fetch URL" in result.stderr:
        missing(
            "package-index", f"pip cannot reach a package index: {result.stderr.strip()[-300:]}"
        )
    assert result.returncode == 0, result.stderr
