"""Fixtures for the whole suite: a PostgreSQL server and databases."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.processes import Processes, new_layer
from tests.project.commands import SLOW_STEPS

DSN_VARIABLE = "PG_LAYER_TEST_DSN"
MIGRATIONS = Path(__file__).parents[1] / "migrations"

Observer = psycopg.Connection[tuple[Any, ...]]


# asyncio's debug mode logs slow steps on a busy machine. Tests that expect no warnings must not
# see them.
logging.getLogger("asyncio").addFilter(lambda record: not SLOW_STEPS.match(record.getMessage()))

# On a busy machine examples take long. Tests do not assert times.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

# These modules take minutes. If one begins last, the other workers have nothing to do meanwhile.
LONG_MODULES = (
    "test_protocol_model",
    "test_membership_agreement",
    "test_stopping",
    "test_cancelled_receive",
    "test_costs",
    "test_plans",
)


def pytest_configure(config: pytest.Config) -> None:
    """Turn off pg_layer's plugin: tests of this suite close their layers themselves."""
    config.pluginmanager.unregister(name="pg_layer")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long modules. Keep the random order otherwise."""
    items.sort(key=lambda item: item.path.stem not in LONG_MODULES)


class MakeLayer(Protocol):
    """A function that creates a layer on the test's database with options of CONFIG."""

    def __call__(self, **options: object) -> PostgresChannelLayer: ...


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """Yield the DSN of a server that may create databases.

    PG_LAYER_TEST_DSN names it. Without that variable a server is started for this run.
    """
    given = os.environ.get(DSN_VARIABLE)
    if given:
        yield given
        return
    with PostgresServer(fsync=False, max_connections=200) as server:
        yield server.dsn()


@pytest.fixture
def fresh_database(postgres_dsn: str) -> Iterator[str]:
    """Yield the DSN of an empty database, which is dropped with all its connections."""
    yield from _database(postgres_dsn)


@pytest.fixture(scope="session")
def migrated_template(postgres_dsn: str) -> Iterator[str]:
    """Yield the name of a template database with pg_layer's tables."""
    for dsn in _database(postgres_dsn):
        with psycopg.connect(dsn) as connection:
            for file in sorted(MIGRATIONS.glob("*.sql")):
                if not file.stem.endswith("_reverse"):
                    connection.execute(file.read_bytes())
            name = connection.info.dbname
        yield name


@pytest.fixture
def migrated_dsn(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """Yield the DSN of a database that contains only pg_layer's tables."""
    yield from _database(postgres_dsn, migrated_template)


@pytest.fixture
def observer(migrated_dsn: str) -> Iterator[Observer]:
    """Yield a connection to the test's database in autocommit, to read the layer's tables."""
    with psycopg.connect(migrated_dsn, autocommit=True, application_name="observer") as connection:
        yield connection


@pytest.fixture
async def make_layer(migrated_dsn: str) -> AsyncIterator[MakeLayer]:
    """Yield a function that creates layers; close them at the end of the test."""
    layers: list[PostgresChannelLayer] = []

    def make(**options: object) -> PostgresChannelLayer:
        layer = new_layer(**{"dsn": migrated_dsn, **options})  # type: ignore[arg-type]
        layers.append(layer)
        return layer

    yield make
    for layer in layers:
        await layer.close()


@pytest.fixture
async def processes(migrated_dsn: str) -> AsyncIterator[Processes]:
    """Yield a runner of async functions in processes, which end before the database does."""
    started = Processes()
    yield started
    started.close()


def _database(postgres_dsn: str, template: str = "template1") -> Iterator[str]:
    name = f"pg_layer_test_{secrets.token_hex(6)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
        sql.Identifier(name), sql.Identifier(template)
    )
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        # Before PostgreSQL 15 this was the only strategy. Without fsync it is faster; a server that
        # PG_LAYER_TEST_DSN names probably has fsync.
        if connection.info.server_version >= 150000 and DSN_VARIABLE not in os.environ:
            create += sql.SQL(" STRATEGY file_copy")
        connection.execute(create)
    try:
        yield make_conninfo(postgres_dsn, dbname=name)
    finally:
        with psycopg.connect(postgres_dsn, autocommit=True) as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )
