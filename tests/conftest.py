"""Fixtures for the whole suite: a PostgreSQL server, and databases in it."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

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


# On a busy machine they would stand among the warnings that tests look for.
logging.getLogger("asyncio").addFilter(lambda record: not SLOW_STEPS.match(record.getMessage()))


class MakeLayer(Protocol):
    """Makes a layer on the test's database, with these options of CONFIG."""

    def __call__(self, **options: object) -> PostgresChannelLayer: ...


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """The DSN of a server that may create databases: PG_LAYER_TEST_DSN, or one started for this run."""
    given = os.environ.get(DSN_VARIABLE)
    if given:
        yield given
        return
    with PostgresServer(fsync=False, max_connections=200) as server:
        yield server.dsn()


@pytest.fixture
def fresh_database(postgres_dsn: str) -> Iterator[str]:
    """The DSN of an empty database, dropped afterwards together with whoever is still connected."""
    yield from _database(postgres_dsn)


@pytest.fixture(scope="session")
def migrated_template(postgres_dsn: str) -> Iterator[str]:
    """The name of a database with pg_layer's tables, to make others from."""
    for dsn in _database(postgres_dsn):
        with psycopg.connect(dsn) as connection:
            for file in sorted(MIGRATIONS.glob("*.sql")):
                if not file.stem.endswith("_reverse"):
                    connection.execute(file.read_bytes())
            name = connection.info.dbname
        yield name


@pytest.fixture
def migrated_dsn(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """The DSN of a database that holds pg_layer's tables and nothing else."""
    yield from _database(postgres_dsn, migrated_template)


@pytest.fixture
def observer(migrated_dsn: str) -> Iterator[Observer]:
    """A connection to that database in autocommit, to look behind the scenes."""
    with psycopg.connect(migrated_dsn, autocommit=True, application_name="observer") as connection:
        yield connection


@pytest.fixture
async def make_layer(migrated_dsn: str) -> AsyncIterator[MakeLayer]:
    """Makes layers on that database, and closes them in the end."""
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
    """Runs async functions in processes of their own, which end with the test and before its database."""
    started = Processes()
    yield started
    started.close()


def _database(postgres_dsn: str, template: str = "template1") -> Iterator[str]:
    name = f"pg_layer_test_{secrets.token_hex(6)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
        sql.Identifier(name), sql.Identifier(template)
    )
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        # As all did before, and quicker without fsync: not on a server that is given.
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
