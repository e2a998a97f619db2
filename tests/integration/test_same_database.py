"""The alias of a layer's ``dsn``, by what the servers say; and `layer.sync` without Django."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import transaction
from psycopg.conninfo import conninfo_to_dict

from pg_layer import LayerUnavailable, PostgresChannelLayer
from pg_layer._db import same_database
from pg_layer._db.same_database import alias_of
from tests.conftest import Observer
from tests.integration.test_checks import check, layers, nowhere
from tests.integration.test_django import SQLITE, postgres
from tests.integration.test_sync import number, on_django, received, waiting
from tests.processes import new_layer
from tests.project.commands import ROOT, SLOW_STEPS, TIMEOUT


def otherwise(dsn: str) -> dict[str, Any]:
    """Return an entry of DATABASES for the same database with another text for the host."""
    host = conninfo_to_dict(dsn)["host"]
    return {
        **postgres(dsn),
        "HOST": "localhost" if host == "127.0.0.1" else f"{host},{host}",
        "OPTIONS": {"options": "-c TimeZone=Asia/Tokyo -c DateStyle=German"},
    }


def test_alias_with_another_text_for_the_host_is_found(
    migrated_dsn: str, fresh_database: str, observer: Observer
) -> None:
    layer, reader = new_layer(migrated_dsn), new_layer(migrated_dsn)
    with on_django(
        layer,
        default=SQLITE,
        unreachable=postgres(nowhere(migrated_dsn)),
        other=otherwise(fresh_database),
        events=otherwise(migrated_dsn),
    ):
        assert alias_of(layer.config) == "events"
        with transaction.atomic(using="events"):
            layer.sync.send("jobs", number(1))
            assert waiting(observer) == 0
            transaction.set_rollback(True, using="events")
        assert waiting(observer) == 0
        layer.sync.send("jobs", number(2))
        assert received(reader, "jobs", 1) == [2]
    asyncio.run(reader.close())


def test_alias_with_another_search_path_is_not_found(migrated_dsn: str, observer: Observer) -> None:
    observer.execute("CREATE SCHEMA shop")
    layer = new_layer(migrated_dsn)
    shop = {**otherwise(migrated_dsn), "OPTIONS": {"options": "-c search_path=shop"}}
    with (
        on_django(layer, default=SQLITE, shop=shop),
        pytest.raises(ImproperlyConfigured) as caught,
    ):
        alias_of(layer.config)
    assert str(caught.value) == (
        "pg_layer: no alias in DATABASES leads to the database and the search_path of"
        " CONFIG['dsn'], and layer.sync runs on one of Django's connections. The aliases of"
        " PostgreSQL databases are: 'shop'. Add an alias to DATABASES for the same database and"
        " search_path as in CONFIG['dsn']."
    )


def test_alias_without_a_postgresql_database_is_told_so(migrated_dsn: str) -> None:
    layer = new_layer(nowhere(migrated_dsn))
    with (
        on_django(layer, default=SQLITE),
        pytest.raises(ImproperlyConfigured, match="DATABASES has no alias of a PostgreSQL"),
    ):
        layer.sync.send("jobs", number(1))


def test_alias_of_an_unreachable_dsn_raises_layer_unavailable(migrated_dsn: str) -> None:
    layer = new_layer(nowhere(migrated_dsn))
    with on_django(layer, default=postgres(migrated_dsn)):
        with pytest.raises(LayerUnavailable):
            layer.sync.send("jobs", number(1))
        with pytest.raises(LayerUnavailable):
            alias_of(layer.config)


def test_alias_is_not_looked_up_on_an_event_loop(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn)

    async def send() -> None:
        layer.sync.send("jobs", number(1))

    with (
        on_django(layer, default=otherwise(migrated_dsn)),
        pytest.raises(SynchronousOnlyOperation),
    ):
        asyncio.run(send())


def test_alias_that_servers_confirmed_needs_no_further_connection(
    migrated_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, second = new_layer(migrated_dsn), new_layer(migrated_dsn)
    with on_django(layer, default=SQLITE, events=otherwise(migrated_dsn)):
        assert alias_of(layer.config) == "events"
        monkeypatch.delattr(same_database, "connected_now")
        assert alias_of(second.config) == "events"


def test_check_names_one_database_in_two_texts(migrated_dsn: str) -> None:
    settings = layers(default={"dsn": migrated_dsn}) | {
        "DATABASES": {"default": SQLITE, "events": otherwise(migrated_dsn)}
    }
    assert check(migrated_dsn, "--database", "events", settings=settings) == []
    settings |= layers(default={"dsn": migrated_dsn}, second={"using": "events"})
    assert check(migrated_dsn, settings=settings) == []
    message, hint = check(migrated_dsn, "--database", "events", settings=settings)
    assert message.startswith("CHANNEL_LAYERS['second']: (pg_layer.W003) It is the same layer as")
    assert "'prefix'" in hint


# ---------------------------------------------------------------------- without Django


def script(code: str, *arguments: str) -> str:
    """Return the output of a script in a process without Django's settings."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "DJANGO" not in name},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert (result.returncode, SLOW_STEPS.sub("", result.stderr)) == (0, "")
    return result.stdout.strip()


ALL_CALLS = """
import logging, sys
from pg_layer import ChannelFull, PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1], capacity=3)
sync = layer.sync
sync.group_add("room", "jobs")
sync.group_add("room", "other")
print(sync.group_count("room"), sorted(sync.group_channels("room")))
sync.group_discard("room", "other")
print(sync.group_channels("room"))
logging.getLogger("pg_layer").setLevel("ERROR")  # a full channel is logged
sync.send("jobs", {"type": "test", "number": 1}, expiry=50)
sync.group_send("room", {"type": "test", "number": 2})
print(sync.send_many([("jobs", {"type": "test", "number": 3}), ("jobs", {"type": "test"})]))
print(sync.group_send_many([("room", {"type": "test"}), ("nobody", {"type": "test"})]))
try:
    sync.send("jobs", {"type": "test"})
except ChannelFull:
    print("full")
"""


def test_sync_in_a_script_runs_on_a_connection_of_the_layer(migrated_dsn: str) -> None:
    assert script(ALL_CALLS, migrated_dsn).splitlines() == [
        "2 ['jobs', 'other']",
        "['jobs']",
        "[True, False]",
        "[False, True]",
        "full",
    ]
    reader = PostgresChannelLayer(dsn=migrated_dsn)
    try:
        assert received(reader, "jobs", 3) == [1, 2, 3]
    finally:
        asyncio.run(reader.close())


CONFIGURED = """
import sys
from django.conf import settings
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1])
layer.sync.send("jobs", {"type": "test", "number": 1})
settings.configure(USE_TZ=True)
layer.sync.send("jobs", {"type": "test", "number": 2})
print(layer.sync.group_count("room"))
"""


def test_sync_in_a_script_with_settings_but_no_databases_sends(
    migrated_dsn: str, observer: Observer
) -> None:
    assert script(CONFIGURED, migrated_dsn) == "0"
    assert waiting(observer) == 2


REFUSED = """
import asyncio, sys
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from pg_layer import LayerUnavailable, PostgresChannelLayer

async def on_loop():
    PostgresChannelLayer(dsn=sys.argv[1]).sync.send("jobs", {"type": "test"})

for call in (
    lambda: PostgresChannelLayer().sync.send("jobs", {"type": "test"}),
    lambda: asyncio.run(PostgresChannelLayer(using="events").send("jobs", {"type": "test"})),
    lambda: PostgresChannelLayer(dsn=sys.argv[1]).sync.group_count("room", using="events"),
    lambda: PostgresChannelLayer(dsn=sys.argv[2], send_timeout=1).sync.group_count("room"),
    lambda: asyncio.run(on_loop()),
):
    try:
        call()
    except (ImproperlyConfigured, SynchronousOnlyOperation, LayerUnavailable) as error:
        print(type(error).__name__, str(error)[:70])
"""


def test_sync_in_a_script_says_what_is_missing(migrated_dsn: str) -> None:
    missing = "ImproperlyConfigured pg_layer: the database '{}' is an alias in DATABASES, and"
    told = script(REFUSED, migrated_dsn, nowhere(migrated_dsn)).splitlines()
    assert [
        line.startswith(missing.format(alias))
        for line, alias in zip(told, ("default", "events", "events"), strict=False)
    ] == [True] * 3
    assert told[3].startswith("LayerUnavailable The database could not be reached")
    assert told[4].startswith("SynchronousOnlyOperation You cannot call this from an async context")
