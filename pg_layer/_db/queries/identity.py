"""The identity of the tables behind a connection, to compare two connections."""

from __future__ import annotations

from typing import Any

from psycopg import Connection

from pg_layer._db.queries.maintenance import LOOK_TIMEOUT
from pg_layer._db.session import Session
from pg_layer._db.statement import Statement

# The start of the server tells a primary from its standbys, which share the system identifier.
# Before migrate the schema that the tables will be in counts. Any role may run this.
IDENTITY = Statement(
    """
    SELECT extract(epoch FROM pg_postmaster_start_time())::text,
        (SELECT oid FROM pg_database WHERE datname = current_database())::text,
        coalesce(to_regclass('pg_layer_message')::oid::text, current_schema())
    """
)


def identity(conn: Connection[Any]) -> tuple[str | None, ...]:
    """Return values that are equal for two connections if they lead to the same tables."""
    (row,) = Session(conn).execute_now(IDENTITY, timeout=LOOK_TIMEOUT)
    return tuple(row)
