"""Throw-away PostgreSQL servers for tests, demo and benchmarks.

    with PostgresServer() as server:
        psycopg.connect(server.dsn())

A server lives in a temporary folder of its own, listens on the loopback address and on a Unix socket, and
goes with everything it wrote when it is closed, or when the process that started it dies in whatever way.

`python -m devtools.postgres` runs one until it is interrupted.
"""

from devtools.postgres.binaries import BinariesNotFound, PostgresServerError, find_binaries
from devtools.postgres.server import PostgresServer, StopMode

__all__ = ["BinariesNotFound", "PostgresServer", "PostgresServerError", "StopMode", "find_binaries"]
