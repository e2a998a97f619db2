"""The application beside the layer: pgbench's tables in the same database, and its transactions on them."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.servers import Unavailable
from benchmarks.statistics import Outcome
from devtools.postgres import BinariesNotFound, find_binaries
from devtools.postgres.guard import Guard

#: Accounts in a unit of pgbench's scale.
ROWS = 100_000
#: The traffic beside each measurement of a run with ``--big``.
CLIENTS, RATE = 2, 200

_HELP = (
    "No pgbench found. It comes with PostgreSQL: pip install -e '.[bench]', or your system's package"
    " (apt-get install postgresql, brew install postgresql)."
)
_PATIENCE = 30.0
_AT_MOST = 3600


class Broken(Exception):
    """pgbench did not do its work; the message says why."""


@dataclass(frozen=True)
class Report:
    """What one pgbench did. ``latencies_ms`` has all its transactions, each from when it was due."""

    transactions: int
    per_second: float
    latencies_ms: Sequence[float]


def find_pgbench() -> str:
    """The program: beside the server's own, or on the path. Raises ``Unavailable``, saying how to get it."""
    with suppress(BinariesNotFound):
        program = find_binaries() / "pgbench"
        if os.access(program, os.X_OK):
            return str(program)
    if (found := shutil.which("pgbench")) is None:
        raise Unavailable(_HELP)
    return found


def fill(dsn: str, scale: int) -> None:
    """Make pgbench's tables anew, with ``scale`` times 100,000 accounts, and wait until they are on the disk.

    Raises ``Unavailable`` if there is no pgbench, or if it fails.
    """
    target, environment = _target(dsn)
    # From here, not by the server ("G"): COPY ... FREEZE is the faster way, and leaves vacuum nothing to do.
    command = [find_pgbench(), "-i", "-q", "-I", "dtgvp", "-s", str(scale), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pgbench could not fill its tables: {_complaint(done.stderr)}")
    checkpoint(dsn)


def checkpoint(dsn: str) -> None:
    """Have all written pages on the disk, so that what is measured next does not pay for them.

    Who may not order a checkpoint goes without.
    """
    with (
        psycopg.connect(dsn, autocommit=True) as connection,
        suppress(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("CHECKPOINT")


class Pgbench:
    """pgbench in the background: ``clients`` flat out, or ``rate`` transactions a second in all.

    It works for ``seconds``, at the longest until the ``with`` block is left or its process dies, and leaves
    nothing behind.
    """

    def __init__(self, dsn: str, *, clients: int, seconds: float, rate: float = 0) -> None:
        self._dsn = dsn
        self._clients = clients
        self._seconds = max(math.ceil(seconds), 1)
        self._rate = rate
        self._stack = ExitStack()

    def __enter__(self) -> Pgbench:
        with ExitStack() as stack:
            self._folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="pg_layer_pgbench_"))
            )
            guard = Guard(str(self._folder))
            stack.callback(guard.dismiss)
            self._process = self._start()
            guard.watch(self._process.pid, signal.SIGTERM)
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def wait_until_connected(self) -> None:
        """Until all clients have their connections. Raises ``Broken`` if they do not get them."""
        end = time.monotonic() + _PATIENCE
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while self._connected(connection) < self._clients:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise Broken(f"its clients did not connect: {_complaint(self._said())}")
                time.sleep(0.02)  # nothing announces them

    def stop(self) -> None:
        """Have it stop early, as if its time were up; only once the clients are connected."""
        self._process.send_signal(signal.SIGALRM)  # which it sets itself for the end of its time

    def report(self) -> Report:
        """Wait until it is done, and say what it did. Raises ``Broken`` if it failed."""
        try:
            code = self._process.wait(self._seconds + _PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"still runs {_PATIENCE:g} s after its time") from None
        if code:
            raise Broken(f"exit code {code}: {_complaint(self._said())}")
        lines = (
            line for log in self._folder.glob("log.*") for line in log.read_text().splitlines()
        )
        return parse_report(self._said(), parse_log(lines))

    def _start(self) -> subprocess.Popen[bytes]:
        target, environment = _target(self._dsn)
        command = [find_pgbench(), "-c", str(self._clients), "-T", str(self._seconds), "-l"]
        command += ["--log-prefix", str(self._folder / "log")]
        command += ["-R", str(self._rate)] if self._rate else []
        with self._output.open("wb") as output:
            return subprocess.Popen(
                [*command, target],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for us to act on
            )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _connected(self, connection: psycopg.Connection) -> int:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'pgbench'"
        ).fetchone()
        return int(row[0]) if row else 0

    @property
    def _output(self) -> Path:
        return self._folder / "output"

    def _said(self) -> str:
        return self._output.read_text(errors="replace")


def beside(dsn: str, measure: Callable[[], Outcome]) -> Outcome:
    """Measure while pgbench keeps the database as busy as an application would.

    The notes say how many transactions that were; if pgbench fails, that is the outcome's error.
    """
    try:
        with Pgbench(dsn, clients=CLIENTS, rate=RATE, seconds=_AT_MOST) as traffic:
            traffic.wait_until_connected()
            outcome = measure()
            traffic.stop()
            report = traffic.report()
    except Broken as error:
        return Outcome(error=f"pgbench: {error}")
    return replace(outcome, notes={**outcome.notes, "transactions beside": report.transactions})


def parse_report(text: str, latencies_ms: Sequence[float]) -> Report:
    """What pgbench prints in the end. Raises ``Broken`` if that is not all of it."""
    transactions = re.search(
        r"^number of transactions actually processed: (\d+)", text, re.MULTILINE
    )
    per_second = re.search(r"^tps = ([\d.]+) ", text, re.MULTILINE)
    if transactions is None or per_second is None or "Run was aborted" in text:
        raise Broken(_complaint(text))
    return Report(int(transactions[1]), float(per_second[1]), latencies_ms)


def parse_log(lines: Iterable[str]) -> list[float]:
    """The milliseconds each transaction took, from the third word of its line; others are left out.

    That word is no number where a transaction failed or was skipped.
    """
    words = (line.split() for line in lines)
    return [int(word[2]) / 1000 for word in words if len(word) > 2 and word[2].isdigit()]


def _target(dsn: str) -> tuple[str, dict[str, str]]:
    """The connection without its password, for the command line, which everybody can read; and the rest."""
    known = conninfo_to_dict(dsn)
    password = known.pop("password", None)
    secret = {} if password is None else {"PGPASSWORD": str(password)}
    known["application_name"] = "pgbench"
    return make_conninfo("", **known), {**os.environ, **secret, "LC_ALL": "C"}


def _complaint(text: str) -> str:
    lines = text.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error:" in line), lines[-1])
