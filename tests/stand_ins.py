"""Functions that replace PostgreSQL's own, such as a ``pg_notify`` that refuses."""

from __future__ import annotations

from psycopg import sql

from tests.conftest import Observer


def find_first(observer: Observer, schema: str) -> None:
    """Make later connections and the layer's functions find objects in a schema first.

    Some functions of the layer have a ``search_path`` of their own, which is changed as well.
    """
    path = sql.SQL("{}, pg_catalog, public").format(sql.Identifier(schema))
    database = sql.Identifier(observer.info.dbname)
    observer.execute(sql.SQL("ALTER DATABASE {} SET search_path = {}").format(database, path))
    functions = observer.execute(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'pg\\_layer\\_%'"
        " AND array_to_string(proconfig, ' ') LIKE '%search\\_path=%'"
    ).fetchall()
    for (function,) in functions:
        observer.execute(f"ALTER FUNCTION {function} SET search_path = ".encode() + path.as_bytes())
