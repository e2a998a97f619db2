"""The servers of a soak, the network paths to them and the folder of the books."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psycopg
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer, StopMode
from devtools.postgres.guard import Guard
from devtools.postgres.server import free_port
from tests.faults.proxy import Proxy

DATABASE = "soak"
HOST = "127.0.0.1"
MIGRATIONS = Path(__file__).parents[1] / "migrations"
TIMEOUT = 60.0  # seconds


class Cluster:
    """A server and, at times, a standby that replaces it.

    The server has one of two ports and the standby has the other one. A DSN names both ports and
    connects to the server that accepts writes. Only one thread at a time may use a cluster.
    """

    def __init__(self) -> None:
        port = free_port()
        self.ports = (port, next(p for p in iter(free_port, None) if p != port))
        self.server = self._make(port)
        self.standby: PostgresServer | None = None
        self._old: PostgresServer | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="soak-", dir=tempfile.gettempdir()))
        self._guard = Guard(str(self.folder))

    def __enter__(self) -> Cluster:
        try:
            self.server.start()
            self.server.create_database(DATABASE)
            with psycopg.connect(self.server.dsn(DATABASE)) as connection:
                for file in sorted(MIGRATIONS.glob("*.sql")):
                    if not file.stem.endswith("_reverse"):
                        connection.execute(file.read_bytes())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers and remove all files of the servers and the processes."""
        if self.standby is not None:
            self.standby.close()
        self.server.close()
        self.remove_old()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._guard.dismiss()

    def dsn_by(self, ports: tuple[int, ...]) -> str:
        """Return a DSN of the server that tries these ports in order."""
        return make_conninfo(
            self.server.dsn(DATABASE),
            host=",".join(HOST for _ in ports),
            port=",".join(map(str, ports)),
            target_session_attrs="read-write",
        )

    def dsn_of_port(self, port: int) -> str:
        """Return a DSN of one port. Either server may have that port."""
        return make_conninfo(self.server.dsn(DATABASE), port=port)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        """Run a statement on the server and return its rows."""
        return self.server.execute(statement, dbname=DATABASE)

    def stop(self, mode: StopMode) -> None:
        """Stop the server. `start` starts it again."""
        self.server.stop(mode)

    def start(self) -> None:
        """Start the server that was stopped."""
        self.server.start()

    # A standby

    def add_standby(self) -> None:
        """Start a standby that streams from the server."""
        (port,) = set(self.ports) - {self.server.port}
        self.standby = self._make(port, self.server)
        self.standby.start()

    def catch_up(self) -> None:
        """Wait until the standby has all that the server has committed so far."""
        # Also flushes what was committed with synchronous_commit = off.
        ((lsn,),) = self.query("SELECT pg_logical_emit_message(true, 'soak', 'so far')")
        self._wait_for(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'")

    def cut_off(self) -> None:
        """Stop the replication from the server to the standby."""
        standby = self._standby()
        standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        standby.execute("SELECT pg_reload_conf()")
        self._wait_for("SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def promote(self) -> None:
        """Promote the standby, which replaces the stopped server."""
        standby = self._standby()
        if standby.execute("SELECT pg_promote()") != [(True,)]:
            raise RuntimeError("The standby was not promoted.")
        self._old, self.server, self.standby = self.server, standby, None

    def remove_old(self) -> None:
        """Remove the server that was replaced."""
        old, self._old = self._old, None
        if old is not None:
            old.close()

    def _standby(self) -> PostgresServer:
        if self.standby is None:
            raise RuntimeError("There is no standby.")
        return self.standby

    def _wait_for(self, question: str) -> None:
        """Query the standby until the answer is true. Raises `TimeoutError`."""
        deadline = time.monotonic() + TIMEOUT
        while self._standby().execute(question) != [(True,)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The standby does not satisfy: {question}")
            time.sleep(0.02)

    def _make(self, port: int, primary: PostgresServer | None = None) -> PostgresServer:
        # With fsync, as in production, so that a crash loses only what it may lose.
        return PostgresServer(
            fsync=True,
            max_connections=200,
            settings={"wal_keep_size": "256MB"},
            port=port,
            primary=primary,
        )


class Network:
    """A network path to both ports of a cluster that can be interrupted."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._proxies = [Proxy(cluster.dsn_of_port(port)) for port in cluster.ports]

    def __enter__(self) -> Network:
        for proxy in self._proxies:
            proxy.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for proxy in self._proxies:
            proxy.__exit__(kind, error, trace)

    def dsn(self) -> str:
        """Return the DSN of the cluster through this network."""
        ports = [psycopg.conninfo.conninfo_to_dict(p.dsn())["port"] for p in self._proxies]
        return self._cluster.dsn_by(tuple(int(str(port)) for port in ports))

    def cut(self) -> None:
        """Close all connections on both sides. New connections work."""
        for proxy in self._proxies:
            proxy.cut()

    def swallow(self) -> None:
        """Stop forwarding without closing connections."""
        for proxy in self._proxies:
            proxy.swallow()

    def let_go(self, *, revive: bool) -> None:
        """Forward again. Without ``revive`` only new connections work."""
        for proxy in self._proxies:
            proxy.let_go(revive=revive)
