"""Fixtures for the whole suite: a PostgreSQL server, and databases in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer

DSN_VARIABLE = "PG_LAYER_TEST_DSN"


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
    name = f"pg_layer_test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield make_conninfo(postgres_dsn, dbname=name)
    finally:
        with psycopg.connect(postgres_dsn, autocommit=True) as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )
