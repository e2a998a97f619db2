"""A PgBouncer in front of a PostgreSQL server. By default it runs in transaction mode."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

import psycopg
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer, guard
from devtools.postgres.binaries import clean_environment, run_as, server_user, temporary_folders
from devtools.postgres.server import HOST, SUPERUSER, free_port

SETTINGS = """
[databases]
* = host={host} port={server_port}

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
pool_mode = {mode}
auth_type = scram-sha-256
auth_file = {folder}/users.txt
admin_users = {user}
logfile = {folder}/pgbouncer.log
max_client_conn = 200
default_pool_size = {pool_size}
server_login_retry = 0.1
"""


class PgBouncer:
    """One PgBouncer, a child of this process.

    ``max_prepared_statements``: None leaves the setting out, for versions before 1.21.
    ``pool_size``: the server connections that all clients share. With few of them, the next
    transaction of a client often runs on another one.
    """

    def __init__(
        self,
        program: str,
        server: PostgresServer,
        *,
        max_prepared_statements: int | None = None,
        pool_size: int = 4,
        mode: Literal["transaction", "session"] = "transaction",
    ) -> None:
        self._program = program
        self._server = server
        self._max_prepared_statements = max_prepared_statements
        self._pool_size = pool_size
        self._mode = mode
        self._user = server_user()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: guard.Guard | None = None
        self.port = 0

    def __enter__(self) -> PgBouncer:
        try:
            self._prepare()
            self.start()
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

    def dsn(self, direct: str) -> str:
        """Return the DSN of the target of ``direct``, through this pooler."""
        return make_conninfo(direct, host=HOST, port=self.port)

    def start(self) -> None:
        """Start the process. Return when it accepts connections."""
        assert self._folder is not None
        self._process = subprocess.Popen(
            [self._program, "--quiet", str(self._folder / "pgbouncer.ini")],
            user=self._user.uid if self._user else None,
            group=self._user.gid if self._user else None,
            extra_groups=[] if self._user else None,
            cwd=self._folder,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._guard is not None:
            self._guard.watch(self._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.show("VERSION")
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._folder / "pgbouncer.log"
                    text = log.read_text() if log.exists() else ""
                    raise RuntimeError(f"PgBouncer did not start:\n{text}") from error
                time.sleep(0.02)  # nothing announces that it is ready
            else:
                return

    def stop(self) -> None:
        """End the process at once, with all connections.

        It is killed, because the signal for an immediate shutdown depends on the version.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._guard is not None:
            self._guard.forget()

    def show(self, what: str) -> list[tuple[object, ...]]:
        """Return the answer to a SHOW of the administration console."""
        dsn = self.dsn(self._server.dsn("pgbouncer"))
        # The console supports only the simple query protocol, and no transactions.
        with psycopg.Connection.connect(dsn, autocommit=True, connect_timeout=5) as connection:
            result = connection.pgconn.exec_(f"SHOW {what}".encode())
            return [
                tuple(
                    (result.get_value(row, column) or b"").decode()
                    for column in range(result.nfields)
                )
                for row in range(result.ntuples)
            ]

    def close(self) -> None:
        """End the process and remove its folder."""
        self.stop()
        if self._folder is not None:
            guard.remove(str(self._folder))
            self._folder = None
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None

    def _prepare(self) -> None:
        self._folder = folder = Path(tempfile.mkdtemp(prefix="pgb-", dir=next(temporary_folders())))
        self._guard = guard.Guard(str(folder))
        self.port = free_port()
        settings = SETTINGS.format(
            host=HOST,
            server_port=self._server.port,
            port=self.port,
            folder=folder,
            user=SUPERUSER,
            pool_size=self._pool_size,
            mode=self._mode,
        )
        if self._max_prepared_statements is not None:
            settings += f"max_prepared_statements = {self._max_prepared_statements}\n"
        (folder / "pgbouncer.ini").write_text(settings)
        (folder / "users.txt").write_text(f'"{SUPERUSER}" "{self._server.password}"\n')
        for path in (folder / "users.txt", folder / "pgbouncer.ini", folder):
            path.chmod(0o700 if path.is_dir() else 0o600)
            if self._user is not None:
                os.chown(path, self._user.uid, self._user.gid)


def version(program: str) -> tuple[int, ...]:
    """Return the version of that PgBouncer."""
    words = run_as(server_user(), program, "--version").stdout.split()
    return tuple(int(part) for part in words[1].split("."))
