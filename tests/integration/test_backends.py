"""Projects whose database backend is not Django's own, and has keys of its own in `OPTIONS`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.components import require_module
from tests.integration.test_django import TALK, databases, left_behind, postgres
from tests.project.commands import django, manage, run, succeeded

Settings = dict[str, Any]

BOTH_WAYS = f"""{TALK}
from django.db import connection

layer = get_channel_layer()
print(asyncio.run(talk(layer)))
layer.sync.send("sync", {{"type": "test"}})
connection.close()
"""


def keyed(dsn: str) -> Settings:
    """Return settings for the test project's own backend."""
    database = postgres(dsn)
    return databases(
        default={
            **database,
            "ENGINE": "tests.project.keyed_backend",
            "PASSWORD": "",
            "TOKEN": database["PASSWORD"],
            "OPTIONS": {"MAX_CONNS": 4, "recycle_after": 60},
        }
    )


def geventpool(dsn: str) -> Settings:
    """Return settings for django-db-geventpool."""
    engine = "django_db_geventpool.backends.postgresql_psycopg3"
    require_module(f"{engine}.base", component="geventpool")
    options = {"MAX_CONNS": 4, "REUSE_CONNS": 2}
    return databases(
        default={**postgres(dsn), "ENGINE": engine, "CONN_MAX_AGE": 0, "OPTIONS": options}
    )


def works_everywhere(dsn: str, settings: Settings, code: str) -> None:
    """Assert that calls of both kinds, the sweeper, the checks and the status work."""
    # `migrate` makes the checks of the database, too.
    assert "pg_layer.0001_initial... OK" in succeeded(manage(dsn, "migrate", settings=settings))
    assert django(dsn, code, settings=settings) == "[1, 2]"
    assert sorted(left_behind(dsn)) == ["left.behind", "sync"]
    succeeded(manage(dsn, "pg_layer_sweep", "--once", settings=settings))
    assert "no issues" in succeeded(
        manage(dsn, "check", "--database", "default", settings=settings)
    )
    assert succeeded(manage(dsn, "pg_layer_status", settings=settings)).startswith("ok\n")


def test_backend_with_own_options_connects_in_every_part_of_the_layer(fresh_database: str) -> None:
    """The keys are no options of libpq's, and the password is the one that the backend hands on."""
    works_everywhere(fresh_database, keyed(fresh_database), BOTH_WAYS)


@pytest.mark.geventpool
def test_geventpool_backend_connects_in_every_part_of_the_layer(fresh_database: str) -> None:
    works_everywhere(
        fresh_database, geventpool(fresh_database), f"{BOTH_WAYS}\nconnection.closeall()"
    )


GREENLETS = """
from gevent import monkey

monkey.patch_all()

import django
import gevent

django.setup()

from channels.layers import get_channel_layer
from django.db import connection, transaction

layer = get_channel_layer()

def request(n):
    layer.sync.group_send("room", {"type": "test"})
    with transaction.atomic():
        layer.sync.send("jobs", {"type": "test", "n": n})
    connection.close()

gevent.joinall([gevent.spawn(request, n) for n in range(10)], raise_error=True)
connection.closeall()
"""


@pytest.mark.geventpool
def test_layer_sync_in_greenlets_sends(migrated_dsn: str) -> None:
    succeeded(run(migrated_dsn, "-c", GREENLETS, settings=geventpool(migrated_dsn)))
    assert left_behind(migrated_dsn) == ["jobs"] * 10
