"""A PostgreSQL server that is a child of this process."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, urlencode

from devtools.postgres import guard
from devtools.postgres.binaries import (
    PostgresServerError,
    clean_environment,
    find_binaries,
    run_as,
    server_user,
    temporary_folders,
    usable_binaries,
)

if TYPE_CHECKING:
    import psycopg

StopMode = Literal["smart", "fast", "immediate"]
Setting = str | int | float | bool
T = TypeVar("T")

HOST = "127.0.0.1"
SUPERUSER = "postgres"
CONFIG_FILE = "pg_layer_devtools.conf"
PASSWORD_FILE = "pg_layer_devtools.password"
STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# Below the range from which Linux takes ports of outgoing connections (32768 and up). Otherwise,
# while the server is down, a client that reconnects could be given the server's port and connect to
# itself.
PORTS = range(20000, 32000)


class PostgresServer:
    """A PostgreSQL server that is a child of this process.

    `binaries`, `version`: arguments of `find_binaries`, which the first start calls.
    `max_connections`, `fsync`, `settings`: the configuration. `settings` takes precedence over the
    other two, and ALTER SYSTEM over all of them.
    `data_dir`: the folder of the data. It is created if it is missing and kept, with its password.
    By default the data is in a temporary folder that `close` removes.
    `port`: the port on 127.0.0.1, by default a free one. It stays the same across restarts.
    `primary`: a running server. Start as a hot standby of it, from a new base backup.
    `timeout`: seconds that a start and a stop may take.

    Not thread-safe. In a forked child `stop` and `close` do nothing, because the server belongs to
    the parent.
    """

    def __init__(
        self,
        *,
        binaries: str | Path | None = None,
        version: str | None = None,
        max_connections: int = 200,
        fsync: bool = True,
        settings: Mapping[str, Setting] | None = None,
        data_dir: str | Path | None = None,
        port: int | None = None,
        primary: PostgresServer | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.timeout = timeout
        self.password: str = primary.password if primary else secrets.token_urlsafe(16)
        self._binaries_wanted = (
            primary.binaries if primary and binaries is None else binaries,
            version,
        )
        self._settings: dict[str, Setting] = {"max_connections": max_connections, "fsync": fsync}
        if not fsync:
            # It protects against torn pages, and without fsync a crash of the machine loses more.
            self._settings["full_page_writes"] = False
        self._settings |= dict(settings or {})
        self._data_dir = Path(data_dir).absolute() if data_dir is not None else None
        self._keep_data = data_dir is not None
        self._port = port
        self._primary = primary
        self._folder: Path | None = None
        self._binaries: Path | None = None
        self._user = server_user()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: guard.Guard | None = None
        self._owner = os.getpid()

    def __enter__(self) -> PostgresServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Properties

    @property
    def binaries(self) -> Path:
        """Return the folder of PostgreSQL's programs, which the server's user can run."""
        return self._known(self._binaries)

    @property
    def folder(self) -> Path:
        """Return the temporary folder of socket, log and data, writable for the server's user."""
        return self._known(self._folder)

    @property
    def data_dir(self) -> Path:
        return self._known(self._data_dir)

    @property
    def log_path(self) -> Path:
        return self.folder / "postgresql.log"

    @property
    def port(self) -> int:
        return self._known(self._port)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Return the pid of the postmaster. Raises `PostgresServerError` if it does not run."""
        if self._process is None or not self.running:
            raise PostgresServerError("the server is not running")
        return self._process.pid

    def dsn(self, dbname: str = "postgres", **params: str | int) -> str:
        """Return a URI over TCP with the password. `params` are more parameters of libpq."""
        login = f"{SUPERUSER}:{quote(self.password)}"
        query = f"?{urlencode(params)}" if params else ""
        return f"postgresql://{login}@{HOST}:{self.port}/{quote(dbname)}{query}"

    def socket_dsn(self, dbname: str = "postgres", **params: str | int) -> str:
        """Return a URI over the Unix socket, which needs no password."""
        query = urlencode({"host": str(self.folder), "port": self.port, **params})
        return f"postgresql://{SUPERUSER}@/{quote(dbname)}?{query}"

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the server's log, or "" if there is no log yet."""
        if self._folder is None or not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    # Actions

    def start(self) -> None:
        """Start the server and wait until it accepts connections. Create missing data.

        If the first start fails, all its files are removed.

        Raises `BinariesNotFound`, or `PostgresServerError` with the end of the log.
        """
        if self.running:
            raise PostgresServerError("the server is running already")
        first = self._folder is None
        try:
            if first:
                self._prepare()
            self._launch()
        except BaseException:
            if first:
                self.close()
            else:
                self._kill()
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep its data. Do nothing if the server does not run.

        "smart" waits until all clients have disconnected, and "fast" disconnects them. "immediate"
        is a crash: the next start performs a recovery.

        Raises `PostgresServerError` if the server still runs after `timeout` seconds.
        """
        if self._process is None or self._owner != os.getpid():
            return
        if self.running:
            self._process.send_signal(STOP_SIGNALS[mode])
        try:
            self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise self._failed(f"still runs {self.timeout:g} s after a {mode} stop") from None
        self._forget_process()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server and start it with the same data and port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop or kill the server and remove its files. `start` then creates a new server."""
        if self._owner != os.getpid():
            return
        try:
            self.stop("fast" if self._keep_data else "immediate")
        except PostgresServerError:
            pass
        finally:
            self._kill()
            if self._folder is not None:
                guard.remove(str(self._folder))
                self._folder = None
            if not self._keep_data:
                self._data_dir = None
            if self._guard is not None:
                self._guard.dismiss()
                self._guard = None

    def execute(self, statement: str, *, dbname: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement in autocommit as superuser and return its rows."""
        with _connect(self.socket_dsn(dbname)) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str) -> str:
        """Create a database and return its DSN."""
        from psycopg import sql

        with _connect(self.socket_dsn()) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run a program of the installation as the server's user and return its output.

        Raises `PostgresServerError` with the output if the program fails.
        """
        result = run_as(self._user, self.binaries / program, *arguments, cwd=self.folder)
        if result.returncode != 0:
            raise PostgresServerError(f"{program} failed:\n{result.stdout.strip()}")
        return result.stdout

    # Implementation

    def _known(self, value: T | None) -> T:
        if value is None:
            raise PostgresServerError("the server has not been started")
        return value

    def _failed(self, what: str) -> PostgresServerError:
        return PostgresServerError(f"the server {what}; its log ends with:\n{self.log_tail()}")

    def _prepare(self) -> None:
        """Create the folder, the guard and the data, which all outlive a restart."""
        found = find_binaries(*self._binaries_wanted)
        self._binaries = usable_binaries(found, self._user)
        parent = next(temporary_folders(), None)
        if parent is None:
            raise PostgresServerError(
                "there is no temporary folder with a path short enough for a Unix socket"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir=parent))
        self._own(self._folder)
        self._guard = guard.Guard(str(self._folder))
        if self._data_dir is None:
            self._data_dir = self._folder / "data"
        if (self._data_dir / "PG_VERSION").exists():
            self._recall_password()
            return
        if not self._data_dir.exists():
            self._data_dir.mkdir(mode=0o700, parents=True)
            self._own(self._data_dir)
        if self._primary is not None:
            self.run(
                *(
                    "pg_basebackup",
                    "--dbname",
                    self._primary.socket_dsn(),
                    "--pgdata",
                    self._data_dir,
                ),
                *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
            )
        else:
            self._initdb()

    def _initdb(self) -> None:
        password_file = self.folder / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.password)
        self._own(password_file)
        try:
            self.run(
                *(
                    "initdb",
                    "--pgdata",
                    self.data_dir,
                    "--username",
                    SUPERUSER,
                    "--pwfile",
                    password_file,
                ),
                *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
                *("--auth-local=trust", "--auth-host=scram-sha-256"),
            )
        finally:
            password_file.unlink()

    def _recall_password(self) -> None:
        """Use the password that is kept with the data, so that the DSN stays the same."""
        kept = self.data_dir / PASSWORD_FILE
        if self._primary is None and kept.exists():
            self.password = kept.read_text()

    def _keep_password(self) -> None:
        kept = self.data_dir / PASSWORD_FILE
        kept.touch(mode=0o600)
        kept.write_text(self.password)
        self._own(kept)
        self.execute(f"ALTER ROLE {SUPERUSER} PASSWORD '{self.password}'")

    def _launch(self) -> None:
        fixed_port = self._port
        for attempt in range(5):
            self._port = fixed_port or free_port()
            self._write_config()
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            self._spawn()
            if self._wait_until_ready():
                break
            log = self.log_path.read_bytes()[log_start:].decode(errors="replace")
            self._forget_process()
            # Another process took the port after free_port(), or children of a killed server run.
            fleeting = "pre-existing shared memory" in log or (
                fixed_port is None and "could not bind" in log
            )
            if not fleeting or attempt == 4:
                self._port = fixed_port
                raise self._failed("did not start")
            time.sleep(0.2 * attempt)
        if self._keep_data and self._primary is None:
            self._keep_password()

    def _write_config(self) -> None:
        # A separate file, rewritten at each start: a base backup copies the file of the primary.
        settings = self._settings | {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": str(self.folder),
        }
        config = self.data_dir / CONFIG_FILE
        config.write_text(
            "".join(f"{name} = {_quoted(value)}\n" for name, value in settings.items())
        )
        self._own(config)
        main = self.data_dir / "postgresql.conf"
        include = f"include_if_exists = '{CONFIG_FILE}'\n"
        if include not in main.read_text():
            with main.open("a") as file:
                file.write(f"\n{include}")

    def _spawn(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.binaries / "postgres"), "-D", str(self.data_dir)],
                user=self._user.uid if self._user else None,
                group=self._user.gid if self._user else None,
                extra_groups=[] if self._user else None,
                cwd=self.folder,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must not reach the server; this process stops it
            )
        signum = STOP_SIGNALS["fast" if self._keep_data else "immediate"]
        if self._guard is not None:
            self._guard.watch(self._process.pid, signum)

    def _wait_until_ready(self) -> bool:
        """Return True when the server accepts connections, False if it ended instead."""
        import psycopg

        deadline = time.monotonic() + self.timeout
        while self.running:
            try:
                _connect(self.socket_dsn(connect_timeout=5)).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise self._failed(f"is not ready after {self.timeout:g} s") from error
                time.sleep(0.02)  # the server does not signal that it is ready
            else:
                return True
        return False

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget_process()

    def _forget_process(self) -> None:
        self._process = None
        if self._guard is not None:
            self._guard.forget()

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)


def _connect(dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Connect in autocommit mode.

    Psycopg is imported here, because the command line prints its help without psycopg.
    """
    import psycopg

    return psycopg.connect(dsn, autocommit=True)


def free_port() -> int:
    """Return a port of the loopback address that is not in use at this moment."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise PostgresServerError(f"no free port among {PORTS.start}-{PORTS.stop - 1}")


def _quoted(value: Setting) -> str:
    """Return a value in the syntax of postgresql.conf."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value).replace("\\", "\\\\").replace("'", "''")
    return f"'{text}'"
