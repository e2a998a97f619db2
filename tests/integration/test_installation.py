"""What a project is told that has not installed the app, or not in a PostgreSQL database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_django import BACKEND, SQLITE, channel_layers, databases, postgres
from tests.project.commands import django, manage, run, succeeded

Settings = dict[str, Any]

CONSTRUCT = """
import django
django.setup()
from channels.layers import get_channel_layer
from pg_layer import PostgresChannelLayer

for _ in range(2):
    PostgresChannelLayer(dsn="dbname=x")
    get_channel_layer()
"""


def reported(dsn: str, settings: Settings) -> str:
    """Return what a process logs that creates layers."""
    result = run(dsn, "-c", CONSTRUCT, settings=settings)
    assert result.returncode == 0, result.stderr
    return result.stderr


# ---------------------------------------------------------------------- INSTALLED_APPS


@pytest.mark.parametrize("config", [{}, {"dsn": "dbname=x"}], ids=["using", "dsn"])
def test_layer_without_the_app_logs_one_warning(migrated_dsn: str, config: Settings) -> None:
    settings = {"INSTALLED_APPS": ["channels"], **channel_layers(**config)}
    (line,) = reported(migrated_dsn, settings).splitlines()
    assert line.startswith('[app_missing] INSTALLED_APPS does not name "pg_layer": ')
    assert "run `python manage.py migrate pg_layer`" in line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"INSTALLED_APPS": ["channels", "pg_layer.apps.PgLayerConfig"]},
        # A script that uses Django's ORM, and creates its layer itself.
        {"INSTALLED_APPS": [], "CHANNEL_LAYERS": {}},
    ],
    ids=["app", "config", "script"],
)
def test_layer_of_an_installed_app_or_a_script_logs_nothing(
    migrated_dsn: str, settings: Settings
) -> None:
    assert reported(migrated_dsn, settings) == ""


def test_layer_without_the_app_works_on_existing_tables(migrated_dsn: str) -> None:
    code = """
import logging
logging.getLogger("pg_layer").setLevel("ERROR")
from channels.layers import get_channel_layer
get_channel_layer().sync.send("jobs", {"type": "test"})
print("sent")
"""
    assert django(migrated_dsn, code, settings={"INSTALLED_APPS": ["channels"]}) == "sent"


# ---------------------------------------------------------------------- migrate


def migrated(dsn: str, settings: Settings, *arguments: str) -> list[str]:
    """Return what `migrate` says of the layer."""
    output = succeeded(manage(dsn, "migrate", *arguments, settings=settings))
    return [line.strip() for line in output.splitlines() if "has created no tables" in line]


def test_migrate_of_sqlite_says_that_it_creates_nothing(
    fresh_database: str, tmp_path: Path
) -> None:
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    other = {**SQLITE, "NAME": str(tmp_path / "other.sqlite3")}
    settings = databases(default=lite, other=other, events=postgres(fresh_database))
    settings |= channel_layers(using="events")
    assert migrated(fresh_database, settings) == [
        "pg_layer has created no tables in the database 'default', which is sqlite: the channel"
        " layer needs PostgreSQL. Run `python manage.py migrate pg_layer --database events`."
    ]
    # Only when the migration is applied.
    assert migrated(fresh_database, settings) == []
    assert migrated(fresh_database, settings, "pg_layer", "zero") == []
    assert len(migrated(fresh_database, settings, "pg_layer")) == 1
    assert migrated(fresh_database, settings, "--database", "other", "-v", "0") == []
    assert migrated(fresh_database, settings, "--database", "events") == []


def test_migrate_of_sqlite_alone_says_what_is_missing(migrated_dsn: str, tmp_path: Path) -> None:
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    in_memory = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    for layers in (channel_layers(dsn=migrated_dsn), {"CHANNEL_LAYERS": in_memory}):
        (tmp_path / "db.sqlite3").unlink(missing_ok=True)
        (line,) = migrated(migrated_dsn, databases(default=lite) | layers)
        assert line.endswith("needs PostgreSQL. DATABASES has no alias of a PostgreSQL database.")


def test_migrate_of_a_layer_on_sqlite_fails(tmp_path: Path) -> None:
    """The check refuses the settings before anything is applied."""
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    settings = databases(default=lite) | {"CHANNEL_LAYERS": {"default": {"BACKEND": BACKEND}}}
    result = manage("", "migrate", settings=settings)
    assert result.returncode == 1
    assert "(pg_layer.E002)" in result.stderr
    assert "DATABASES has no alias of a PostgreSQL database." in result.stderr
