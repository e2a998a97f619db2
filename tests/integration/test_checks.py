"""`manage.py check`: its messages about the settings, and about each named database."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import pg_layer
from tests.conftest import Observer
from tests.integration.test_django import BACKEND, SQLITE, postgres
from tests.project.commands import ROOT, django, environment, manage, succeeded

Settings = dict[str, Any]

SOUND = "System check identified no issues (0 silenced)."
DATABASE = ("--database", "default")


def layers(**configs: object) -> Settings:
    """CHANNEL_LAYERS with these entries, each with its CONFIG."""
    return {
        "CHANNEL_LAYERS": {
            alias: {"BACKEND": BACKEND, "CONFIG": config} for alias, config in configs.items()
        }
    }


def check(dsn: str, *arguments: str, settings: Settings | None = None) -> list[str]:
    """Return the output of `manage.py check`: a line for each message, and one for its hint."""
    result = manage(dsn, "check", "--fail-level", "WARNING", *arguments, settings=settings)
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        assert (result.stdout.strip(), result.stderr) == (SOUND, "")
        return []
    lines = result.stderr.splitlines()
    return [line.strip() for line in lines if "(pg_layer." in line or "HINT: " in line]


def nowhere(dsn: str) -> str:
    """Return a connection string without a server behind it."""
    return make_conninfo(dsn, host="127.0.0.1", port="1")


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"CHANNEL_LAYERS": {"default": {"BACKEND": BACKEND}}},
        {
            "CHANNEL_LAYERS": {
                "default": {"BACKEND": "pg_layer.layer.PostgresChannelLayer", "CONFIG": {}}
            }
        },
        layers(default={}, other={"prefix": "other"}),
        # Not ours: Channels has its own words for them.
        {"CHANNEL_LAYERS": {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}},
        {"CHANNEL_LAYERS": {"default": {"BACKEND": "no.such.Layer"}}},
        {"CHANNEL_LAYERS": {"default": {}}},
        {"CHANNEL_LAYERS": {}},
    ],
)
def test_check_sound_settings_reports_nothing(migrated_dsn: str, settings: Settings) -> None:
    assert check(migrated_dsn, settings=settings) == []
    assert check(migrated_dsn, *DATABASE, settings=settings) == []


def test_check_without_database_opens_no_connection(migrated_dsn: str) -> None:
    assert check(nowhere(migrated_dsn)) == []


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"capactiy": 5}, "CONFIG has an unknown option 'capactiy'. Did you mean 'capacity'?"),
        ({"capacity": "many"}, "CONFIG['capacity'] must be an integer"),
        ({"using": "default", "dsn": "dbname=x"}, "CONFIG must not have both 'dsn' and 'using'"),
        (["capacity"], "CONFIG must be a dict of options by name, not list."),
        (None, "CONFIG must be a dict of options by name, not NoneType."),
    ],
)
def test_check_invalid_config_is_e001(migrated_dsn: str, config: object, complaint: str) -> None:
    for arguments in ((), DATABASE):
        message, hint = check(migrated_dsn, *arguments, settings=layers(default={}, jobs=config))
        assert message.startswith("CHANNEL_LAYERS['jobs']: (pg_layer.E001) ")
        assert complaint in message
        assert "docs/reference/options.md" in hint


@pytest.mark.parametrize(
    ("using", "complaint"),
    [
        ("nowhere", "must be an alias in DATABASES, not 'nowhere'"),
        ("lite", "'lite' has the ENGINE"),
    ],
    ids=["missing", "SQLite"],
)
def test_check_unusable_database_is_e002(migrated_dsn: str, using: str, complaint: str) -> None:
    settings = layers(default={"using": using}) | {
        "DATABASES": {"default": postgres(migrated_dsn), "lite": SQLITE}
    }
    for arguments in ((), DATABASE, ("--database", "lite")):
        message, hint = check(migrated_dsn, *arguments, settings=settings)
        assert message.startswith("CHANNEL_LAYERS['default']: (pg_layer.E002) CONFIG['using'] ")
        assert complaint in message
        assert "'dsn'" in hint


def test_check_misspelt_backend_is_e003(migrated_dsn: str) -> None:
    settings = {"CHANNEL_LAYERS": {"default": {"BACKEND": "pg_layer.PostgresLayer"}}}
    message, hint = check(migrated_dsn, settings=settings)
    assert (
        message
        == "CHANNEL_LAYERS['default']: (pg_layer.E003) BACKEND is not a channel layer of pg_layer: "
        + ("'pg_layer.PostgresLayer'.")
    )
    assert hint == "HINT: Set it to 'pg_layer.PostgresChannelLayer'."


def test_migrate_with_an_error_in_the_settings_fails(migrated_dsn: str) -> None:
    result = manage(migrated_dsn, "migrate", settings=layers(default={"capactiy": 5}))
    assert result.returncode == 1
    assert "pg_layer.E001" in result.stderr


def test_check_two_layers_of_one_prefix_is_w003(migrated_dsn: str) -> None:
    settings = layers(first={}, apart={"prefix": "apart"}, second={"expiry": 5})
    message, hint = check(migrated_dsn, settings=settings)
    assert message == (
        "CHANNEL_LAYERS['second']: (pg_layer.W003) It is the same layer as 'first': "
        "the same database and the same prefix."
    )
    assert "'prefix'" in hint
    same = layers(first={}, second={"dsn": migrated_dsn})
    assert "(pg_layer.W003)" in check(migrated_dsn, settings=same)[0]


def test_check_unread_keys_is_w005(migrated_dsn: str) -> None:
    entry = {"BACKEND": BACKEND, "CONFIG": {}, "TEST_CONFIG": {}}
    assert check(migrated_dsn, settings={"CHANNEL_LAYERS": {"default": entry}}) == []
    wrong = {"CHANNEL_LAYERS": {"default": {**entry, "CONFGI": {"capacity": 5}, "capacity": 5}}}
    message, hint = check(migrated_dsn, settings=wrong)
    assert message == (
        "CHANNEL_LAYERS['default']: (pg_layer.W005) "
        "Channels ignores these keys: 'CONFGI', 'capacity'."
    )
    assert "belong in CONFIG" in hint


TENANT_TYPES = {
    "HAS_MULTI_TYPE_TENANTS": True,
    "PUBLIC_SCHEMA_NAME": "shared",
    "TENANT_TYPES": {"shared": {"APPS": ["pg_layer"]}, "shop": {"APPS": ["channels"]}},
}


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("TENANT_APPS", {"TENANT_APPS": ["channels", "pg_layer"]}),
        (
            "TENANT_APPS",
            {"TENANT_APPS": ["pg_layer.apps.PgLayerConfig"], "SHARED_APPS": ["pg_layer"]},
        ),
        (
            "TENANT_TYPES['shop']['APPS']",
            TENANT_TYPES
            | {"TENANT_TYPES": {"shared": {"APPS": []}, "shop": {"APPS": ["pg_layer"]}}},
        ),
    ],
    ids=["alone", "beside SHARED_APPS", "types"],
)
def test_check_app_in_tenant_apps_is_e004(
    migrated_dsn: str, where: str, settings: Settings
) -> None:
    message, hint = check(migrated_dsn, settings=settings)
    assert message.startswith(
        f"?: (pg_layer.E004) pg_layer is in {where}, so each tenant has its own tables."
    )
    assert hint.endswith("only: see docs/how-to/tenants.md.")


@pytest.mark.parametrize(
    "settings",
    [{"SHARED_APPS": ["pg_layer"], "TENANT_APPS": ["channels"]}, TENANT_TYPES],
    ids=["apps", "types"],
)
def test_check_app_in_shared_apps_reports_nothing(migrated_dsn: str, settings: Settings) -> None:
    assert check(migrated_dsn, settings=settings) == []


def test_check_imported_psycopg2_is_w009(migrated_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("import psycopg2.extras\n")
    apps = {"INSTALLED_APPS": ["channels", "pg_layer", "shop"]}
    command = [sys.executable, "-m", "tests.project.manage", "check"]
    variables = environment(migrated_dsn, apps) | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert result.returncode == 0
    assert "?: (pg_layer.W009) psycopg2 is imported in this process, and Django uses" in (
        result.stderr
    )
    # Installed, and not imported.
    assert importlib.util.find_spec("psycopg2") is not None
    assert check(migrated_dsn) == []


def test_psycopg2_beside_psycopg_3_is_not_what_django_uses(migrated_dsn: str) -> None:
    """The reason for W009: what a project that used psycopg2 meets after the installation."""
    code = """
import psycopg2.extras
from django.db import ProgrammingError, connection

with connection.cursor() as cursor:
    try:
        cursor.execute("SELECT %s", [psycopg2.extras.Json({})])
    except ProgrammingError as error:
        print(error)
"""
    assert "cannot adapt type 'Json'" in django(migrated_dsn, code)


# ---------------------------------------------------------------------- tables


ADVICE = """
from channels.layers import get_channel_layer
from pg_layer import NotMigrated
from asgiref.sync import async_to_sync
from django.db import connection

connection.vendor  # imported here, and not on an event loop that complains of the time it takes
for alias in ("default", "events", "dsn", "nowhere"):
    layer = get_channel_layer(alias)
    calls = [async_to_sync(layer.send)]
    if alias != "nowhere":
        calls.append(layer.sync.send)
    for call in calls:
        try:
            call("jobs", {"type": "test"})
        except NotMigrated as error:
            print(str(error).partition("out of date: ")[2])
    async_to_sync(layer.close)()
try:
    get_channel_layer().sync.send("jobs", {"type": "test"}, using="events")
except NotMigrated as error:
    print(str(error).partition("out of date: ")[2])
"""


def test_not_migrated_names_the_command_for_each_layer(fresh_database: str) -> None:
    other = make_conninfo(fresh_database, dbname="template1")
    third = make_conninfo(fresh_database, dbname="postgres")
    settings = layers(
        default={}, events={"using": "events"}, dsn={"dsn": other}, nowhere={"dsn": third}
    )
    settings["DATABASES"] = {"default": postgres(fresh_database), "events": postgres(other)}
    migrate = "run `python manage.py migrate pg_layer"
    add_alias = "add an alias to DATABASES for the database of CONFIG['dsn']"
    expected = [
        *[f"{migrate}`."] * 2,
        *[f"{migrate} --database events`."] * 4,
        f"{add_alias}, and {migrate} --database <alias>`.",
        f"{migrate} --database events`.",
    ]
    assert django(fresh_database, ADVICE, settings=settings).splitlines() == expected
    settings["INSTALLED_APPS"] = ["channels"]
    add_app = 'add "pg_layer" to INSTALLED_APPS'
    advice = f"import logging; logging.getLogger('pg_layer').setLevel('ERROR')\n{ADVICE}"
    told = django(fresh_database, advice, settings=settings).splitlines()
    assert told[0] == f"{add_app}, and {expected[0]}"
    assert told[6] == f"{add_app}, {expected[6]}"


def test_not_migrated_names_an_alias_that_may_be_the_dsn(fresh_database: str) -> None:
    """The error may be raised on an event loop, where no server can be asked."""
    settings = layers(default={"dsn": fresh_database}) | {
        "DATABASES": {
            "default": SQLITE,
            "other": postgres(make_conninfo(fresh_database, dbname="postgres")),
            "events": {**postgres(fresh_database), "HOST": "db.example"},
        }
    }
    code = """
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from pg_layer import NotMigrated

try:
    async_to_sync(get_channel_layer().send)("jobs", {"type": "test"})
except NotMigrated as error:
    print(str(error).partition("out of date: ")[2])
"""
    assert django(fresh_database, code, settings=settings) == (
        "check that 'events' in DATABASES is the database of CONFIG['dsn'],"
        " and run `python manage.py migrate pg_layer --database events`."
    )


def test_check_missing_tables_is_w001(fresh_database: str) -> None:
    assert check(fresh_database) == []
    message, hint = check(fresh_database, *DATABASE)
    assert message == (
        "CHANNEL_LAYERS['default']: (pg_layer.W001) "
        "The tables of pg_layer are missing or out of date."
    )
    assert hint == "HINT: Run `python manage.py migrate pg_layer`."


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE pg_layer_client DROP COLUMN counters",
        "DROP VIEW pg_layer_group",
        "DROP TABLE pg_layer_last_sweep",
        "DROP TABLE pg_layer_boot",
        "ALTER TABLE pg_layer_message DROP COLUMN marked",
        "DROP FUNCTION pg_layer_sweepable",
        "ALTER FUNCTION pg_layer_claim RENAME TO pg_layer_claimed",
    ],
)
def test_check_outdated_tables_is_w001(migrated_dsn: str, observer: Observer, change: str) -> None:
    assert check(migrated_dsn, *DATABASE) == []
    observer.execute(change.encode())
    assert "(pg_layer.W001)" in check(migrated_dsn, *DATABASE)[0]


def test_migrate_of_an_empty_database_reports_nothing(fresh_database: str) -> None:
    # `migrate` does not warn of tables that it creates.
    assert "pg_layer.0001_initial... OK" in succeeded(manage(fresh_database, "migrate"))
    assert check(fresh_database, *DATABASE) == []


def test_check_examines_only_named_databases(migrated_dsn: str, fresh_database: str) -> None:
    databases = {
        "DATABASES": {"default": postgres(migrated_dsn), "events": postgres(fresh_database)}
    }
    settings = databases | layers(default={}, events={"using": "events"})
    assert check(migrated_dsn, *DATABASE, settings=settings) == []
    message, hint = check(migrated_dsn, "--database", "events", settings=settings)
    assert message.startswith("CHANNEL_LAYERS['events']: (pg_layer.W001)")
    assert hint == "HINT: Run `python manage.py migrate pg_layer --database events`."
    both = check(migrated_dsn, *DATABASE, "--database", "events", settings=settings)
    assert both == [message, hint]


def test_check_dsn_uses_the_alias_of_its_database(migrated_dsn: str, fresh_database: str) -> None:
    databases = {
        "DATABASES": {"default": postgres(migrated_dsn), "events": postgres(fresh_database)}
    }
    settings = databases | layers(default={"dsn": fresh_database})
    assert check(migrated_dsn, *DATABASE, settings=settings) == []
    assert "(pg_layer.W001)" in check(migrated_dsn, "--database", "events", settings=settings)[0]
    alone = {"DATABASES": {"default": postgres(migrated_dsn)}} | layers(
        default={"dsn": fresh_database}
    )
    assert check(migrated_dsn, settings=alone) == []
    message, hint = check(migrated_dsn, *DATABASE, settings=alone)
    assert message.startswith(
        "CHANNEL_LAYERS['default']: (pg_layer.W006) No alias in DATABASES leads to "
    )
    assert message.endswith("The aliases of PostgreSQL databases are: 'default'.")
    assert hint.startswith("HINT: Add an alias")


@pytest.mark.parametrize("command", ["check", "migrate"])
def test_check_unreachable_database_is_w004(migrated_dsn: str, command: str) -> None:
    result = manage(nowhere(migrated_dsn), command, *DATABASE)
    assert (
        "(pg_layer.W004) The tables of pg_layer could not be checked. The database could"
        in result.stderr
    )
    if command == "check":
        assert result.returncode == 0
        assert "Traceback" not in result.stderr
        message, hint = check(nowhere(migrated_dsn), *DATABASE)
        assert "pg_layer.W004" in message
        assert "reached" in hint
    password = conninfo_to_dict(migrated_dsn).get("password")
    assert not password or str(password) not in result.stderr


def test_check_refused_login_names_the_setting(migrated_dsn: str) -> None:
    message, hint = check(make_conninfo(migrated_dsn, dbname="pg_layer_nowhere"), *DATABASE)
    assert "(pg_layer.W004)" in message
    assert "The database refused the connection: " in message
    assert hint == (
        "HINT: Check the user, the password and the name of the database in DATABASES['default']."
    )


# ---------------------------------------------------------------------- sweeping


def is_warned_of_sweeping(dsn: str) -> bool:
    found = check(dsn, *DATABASE)
    assert found == [] or "(pg_layer.W002)" in found[0]
    return bool(found)


def test_check_old_sweep_is_w002(migrated_dsn: str, observer: Observer) -> None:
    set_sweep = (
        "INSERT INTO pg_layer_last_sweep VALUES (%s, clock_timestamp() - %s::interval)"
        " ON CONFLICT (prefix) DO UPDATE SET swept_at = excluded.swept_at"
    )
    observer.execute(set_sweep, ("asgi", "23 hours"))
    assert not is_warned_of_sweeping(migrated_dsn)
    observer.execute(set_sweep, ("asgi", "25 hours"))
    observer.execute(set_sweep, ("other", "1 second"))
    message, hint = check(migrated_dsn, *DATABASE)
    assert "(pg_layer.W002) The tables of pg_layer have not been swept for a day." in message
    assert "manage.py pg_layer_sweep" in hint
    succeeded(manage(migrated_dsn, "pg_layer_sweep", "--once"))
    assert not is_warned_of_sweeping(migrated_dsn)


ADD_CLIENT = (
    "INSERT INTO pg_layer_client (address, started_at, expires_at, lease)"
    " VALUES (%s || '!' || md5(random()::text), clock_timestamp() - %s::interval, 'infinity', 60)"
)
ADD_MESSAGE = (
    "INSERT INTO pg_layer_message (address, xid, boot, sent_at, expires_at) VALUES"
    " (%s || '!:jobs', pg_current_xact_id(), 0,"
    " clock_timestamp() - %s::interval, clock_timestamp())"
)


@pytest.mark.parametrize("use", [ADD_CLIENT, ADD_MESSAGE], ids=["received", "sent"])
def test_check_no_sweep_a_day_after_the_first_use_is_w002(
    migrated_dsn: str, observer: Observer, use: str
) -> None:
    # Not a fault in a database that was made a moment ago, such as one for tests.
    assert not is_warned_of_sweeping(migrated_dsn)
    observer.execute(use.encode(), ("other", "25 hours"))
    observer.execute(use.encode(), ("asgi", "23 hours"))
    assert not is_warned_of_sweeping(migrated_dsn)
    observer.execute(use.encode(), ("asgi", "25 hours"))
    assert is_warned_of_sweeping(migrated_dsn)


def test_check_closes_its_connection(migrated_dsn: str, observer: Observer) -> None:
    check(migrated_dsn, *DATABASE)
    with psycopg.connect(migrated_dsn, dbname="postgres", autocommit=True) as other:
        name = conninfo_to_dict(migrated_dsn)["dbname"]
        observer.close()
        other.execute(f"ALTER DATABASE {name} RENAME TO {name}_renamed".encode())
        other.execute(f"ALTER DATABASE {name}_renamed RENAME TO {name}".encode())


# ---------------------------------------------------------------------- documentation


def test_checks_each_id_is_documented_and_has_a_hint() -> None:
    code = (Path(pg_layer.__file__).parent / "checks.py").read_text(encoding="utf-8")
    ids = re.findall(r'id="(pg_layer\.[EW]\d{3})"', code)
    assert len(ids) == code.count("hint=") == len(set(ids))
    documented = re.findall(
        r"^\| `(pg_layer\.\w+)` \| (?:settings|database) \| \S.+ \| \S.+ \|$",
        (ROOT / "docs/reference/checks.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert documented == sorted(ids)
