"""The layer in a project with django-tenants: a schema for each tenant, and a shared one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.components import require_module
from tests.integration.test_checks import check
from tests.integration.test_django import TALK, databases, postgres
from tests.project.commands import django, manage, succeeded

Settings = dict[str, Any]

MODELS = """
from django.db import models
from django_tenants.models import DomainMixin, TenantMixin

class Customer(TenantMixin):
    name = models.CharField(max_length=100)
    auto_create_schema = True

class Domain(DomainMixin):
    pass
"""
SHARED = ["django_tenants", "customers", "channels"]
TENANTS = ["django.contrib.contenttypes"]
ADD_CUSTOMER = """
from customers.models import Customer

Customer(schema_name="acme", name="Acme").save(verbosity=0)
"""
TALK_AS_TENANT = f"""{TALK}
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django_tenants.utils import schema_context
from pg_layer import NotMigrated

layer = get_channel_layer()

@sync_to_async
def send():
    with schema_context("acme"):
        layer.sync.group_send("room", {{"type": "test", "n": 3}})
        with transaction.atomic():
            layer.sync.group_send("room", {{"type": "test", "n": 4}})
            layer.sync.send(channel, {{"type": "test", "n": 5}})
        layer.sync.group_add("room", "jobs")
        assert layer.sync.group_count("room") == 2
        with connection.cursor() as cursor:
            cursor.execute("SHOW search_path")
            assert "acme" in cursor.fetchone()[0]
    connection.set_schema("acme", include_public=False)
    try:
        layer.sync.send("jobs", {{"type": "test"}})
    except NotMigrated:
        print("not migrated")
    connection.close()

async def main():
    global channel
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await send()
    numbers = [(await asyncio.wait_for(layer.receive(channel), 30))["n"] for _ in range(3)]
    await layer.group_send("room", {{"type": "test", "n": 6}})
    for name in (channel, "jobs"):
        numbers.append((await asyncio.wait_for(layer.receive(name), 30))["n"])
    await layer.close()
    return numbers

with schema_context("acme"):
    print(asyncio.run(main()))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an app with the tenants' models into Python's path."""
    require_module("django_tenants", component="tenants")
    (tmp_path / "customers" / "migrations").mkdir(parents=True)
    for name, text in (("", ""), ("migrations", "")):
        (tmp_path / "customers" / name / "__init__.py").write_text(text)
    (tmp_path / "customers" / "models.py").write_text(MODELS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def tenants(dsn: str, *, public: str = "public") -> Settings:
    options = {} if public == "public" else {"options": f"-c search_path={public}"}
    shared = [*SHARED, "pg_layer"]
    return databases(
        default={**postgres(dsn), "ENGINE": "django_tenants.postgresql_backend", "OPTIONS": options}
    ) | {
        "DATABASE_ROUTERS": ["django_tenants.routers.TenantSyncRouter"],
        "TENANT_MODEL": "customers.Customer",
        "TENANT_DOMAIN_MODEL": "customers.Domain",
        "PUBLIC_SCHEMA_NAME": public,
        "SHARED_APPS": shared,
        "TENANT_APPS": TENANTS,
        "INSTALLED_APPS": [*shared, *TENANTS],
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
    }


def schemas_with_tables(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as conn:
        rows = conn.execute(
            "SELECT schemaname FROM pg_tables WHERE tablename = 'pg_layer_message' ORDER BY 1"
        )
        return [schema for (schema,) in rows]


@pytest.mark.tenants
@pytest.mark.parametrize("public", ["public", "shared"])
def test_tenants_with_a_shared_layer_send_and_receive(
    fresh_database: str, project: None, public: str
) -> None:
    settings = tenants(fresh_database, public=public)
    with psycopg.connect(fresh_database) as conn:
        conn.execute(f"CREATE SCHEMA IF NOT EXISTS {public}".encode())
    succeeded(manage(fresh_database, "makemigrations", "customers", "-v0", settings=settings))
    succeeded(manage(fresh_database, "migrate_schemas", "-v0", settings=settings))
    assert django(fresh_database, ADD_CUSTOMER, settings=settings) == ""
    assert (
        django(fresh_database, TALK_AS_TENANT, settings=settings) == "not migrated\n[3, 4, 5, 6, 6]"
    )
    succeeded(manage(fresh_database, "pg_layer_sweep", "--once", settings=settings))
    assert check(fresh_database, "--database", "default", settings=settings) == []
    assert schemas_with_tables(fresh_database) == [public]


@pytest.mark.tenants
def test_tenants_with_tables_of_their_own_can_drop_them(fresh_database: str, project: None) -> None:
    """`migrate_schemas` removes the tables of tenants that had the layer in TENANT_APPS."""
    settings = tenants(fresh_database)
    wrong = settings | {"TENANT_APPS": [*TENANTS, "pg_layer"]}
    succeeded(manage(fresh_database, "makemigrations", "customers", "-v0", settings=settings))
    assert "(pg_layer.E004)" in manage(fresh_database, "migrate_schemas", settings=wrong).stderr
    unchecked = ("migrate_schemas", "--skip-checks", "-v0")
    succeeded(manage(fresh_database, *unchecked, settings=wrong))
    assert django(fresh_database, ADD_CUSTOMER, settings=wrong) == ""
    assert schemas_with_tables(fresh_database) == ["acme", "public"]
    succeeded(manage(fresh_database, *unchecked, "--tenant", "pg_layer", "zero", settings=wrong))
    assert schemas_with_tables(fresh_database) == ["public"]
    succeeded(manage(fresh_database, "migrate_schemas", "-v0", settings=settings))
    assert schemas_with_tables(fresh_database) == ["public"]
    assert (
        django(fresh_database, TALK_AS_TENANT, settings=settings) == "not migrated\n[3, 4, 5, 6, 6]"
    )
