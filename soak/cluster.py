"""The servers of a soak, the ways that lead to them, and the folder of the processes' books."""

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
PATIENCE = 60.0


class Cluster:
    """A server, and now and then a standby that takes its place.

    One of two ports is the server's, the other one is the standby's. A DSN names both, and leads to
    the one that can be written to. One thread at a time may use it.
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
        """End the servers and remove all that they and the processes left."""
        if self.standby is not None:
            self.standby.close()
        self.server.close()
        self.remove_old()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._guard.dismiss()

    def dsn_by(self, ports: tuple[int, ...]) -> str:
        """A DSN that leads to the server by these ports, in the order of `ports`."""
        return make_conninfo(
            self.server.dsn(DATABASE),
            host=",".join(HOST for _ in ports),
            port=",".join(map(str, ports)),
            target_session_attrs="read-write",
        )

    def dsn_of_port(self, port: int) -> str:
        """A DSN of one port, whatever is there."""
        return make_conninfo(self.server.dsn(DATABASE), port=port)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        """Run a statement on the server."""
        return self.server.execute(statement, dbname=DATABASE)

    def stop(self, mode: StopMode) -> None:
        """Stop the server; `start` starts it again."""
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
        """Return when the standby has all that the server has committed so far."""
        # It also writes to disk what was committed without waiting for that.
        ((lsn,),) = self.query("SELECT pg_logical_emit_message(true, 'soak', 'so far')")
        self._wait_for(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'")

    def cut_off(self) -> None:
        """From here on the standby hears nothing of the server."""
        standby = self._standby()
        standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        standby.execute("SELECT pg_reload_conf()")
        self._wait_for("SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def promote(self) -> None:
        """Have the standby take the place of the server, which was stopped."""
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
        """Ask the standby until it says yes."""
        deadline = time.monotonic() + PATIENCE
        while self._standby().execute(question) != [(True,)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The standby still says no to: {question}")
            time.sleep(0.02)

    def _make(self, port: int, primary: PostgresServer | None = None) -> PostgresServer:
        # It syncs as in production, and what a crash may lose is lost.
        return PostgresServer(
            fsync=True,
            max_connections=200,
            settings={"wal_keep_size": "256MB"},
            port=port,
            primary=primary,
        )


class Network:
    """A way to both ports of a cluster that can be broken."""

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
        """The cluster's DSN by this way."""
        ports = [psycopg.conninfo.conninfo_to_dict(p.dsn())["port"] for p in self._proxies]
        return self._cluster.dsn_by(tuple(int(str(port)) for port in ports))

    def cut(self) -> None:
        """Close all connections, on both sides. New ones work."""
        for proxy in self._proxies:
            proxy.cut()

    def swallow(self) -> None:
        """Forward nothing any more and close nothing."""
        for proxy in self._proxies:
            proxy.swallow()

    def let_go(self, *, revive: bool) -> None:
        """Forward again. Not ``revive``: only for connections still to come."""
        for proxy in self._proxies:
            proxy.let_go(revive=revive)
