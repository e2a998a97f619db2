"""Temporary PostgreSQL servers for tests, the demo and benchmarks.

    with PostgresServer() as server:
        psycopg.connect(server.dsn())

A server has its own temporary folder and listens on the loopback address and on a Unix socket. The
server and its files are removed when it is closed or when the process that started it ends, even by
SIGKILL.

`python -m devtools.postgres` runs a server until it is interrupted.
"""

from devtools.postgres.binaries import BinariesNotFound, PostgresServerError, find_binaries
from devtools.postgres.server import PostgresServer, StopMode

__all__ = ["BinariesNotFound", "PostgresServer", "PostgresServerError", "StopMode", "find_binaries"]
