"""The routers of docs/how-to/routers.md, and a layer with a database of its own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.project.commands import django, manage, succeeded

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "routers.md"
TABLES = "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'pg_layer_%'"


@pytest.fixture(autouse=True)
def routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routers of the page, as the module `routers_of_the_page`."""
    blocks = re.findall(r"```python\n(class .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "routers_of_the_page.py").write_text("\n\n".join(blocks))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def events(fresh_database: str) -> Iterator[str]:
    """A second database on the same server."""
    name = f"events_{secrets.token_hex(4)}"
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield make_conninfo(fresh_database, dbname=name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def database(dsn: str) -> dict[str, object]:
    """Return an entry of DATABASES for a connection string."""
    parts = conninfo_to_dict(dsn)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
    entry = {key: parts.get(name, "") for key, name in names.items()}
    return {"ENGINE": "django.db.backends.postgresql", "PORT": parts["port"], **entry}


def count(dsn: str, query: str) -> Any:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def test_router_of_the_layer_keeps_its_tables_in_its_database(
    fresh_database: str, events: str
) -> None:
    settings = {
        "DATABASES": {"default": database(fresh_database), "events": database(events)},
        "DATABASE_ROUTERS": ["routers_of_the_page.LayerRouter"],
        "CHANNEL_LAYERS": {
            "default": {
                "BACKEND": "pg_layer.PostgresChannelLayer",
                "CONFIG": {"using": "events"},
            }
        },
    }
    for alias in ("default", "events"):
        succeeded(manage(fresh_database, "migrate", "--database", alias, settings=settings))
    assert count(fresh_database, TABLES) == 0
    assert count(events, TABLES) > 0
    code = """
from channels.layers import get_channel_layer
from django.db import transaction
with transaction.atomic():
    get_channel_layer().sync.send("jobs", {"type": "job"})
    transaction.set_rollback(True)
"""
    django(fresh_database, code, settings=settings)
    # A transaction on another alias does not take the message back.
    assert count(events, "SELECT count(*) FROM pg_layer_message") == 1


def test_router_with_a_replica_leaves_the_layers_tables_to_the_primary(
    fresh_database: str, events: str
) -> None:
    settings = {
        "DATABASES": {"default": database(fresh_database), "replica": database(events)},
        "DATABASE_ROUTERS": ["routers_of_the_page.ReplicaRouter"],
    }
    for alias in ("default", "replica"):
        succeeded(manage(fresh_database, "migrate", "--database", alias, settings=settings))
    assert count(events, TABLES) == 0
    code = """
from channels.layers import get_channel_layer
from pg_layer.models import Message
get_channel_layer().sync.send("jobs", {"type": "job"})
print(Message.objects.count(), Message.objects.all().db)
"""
    assert django(fresh_database, code, settings=settings) == "1 default"
