"""The application beside the layer: pgbench's tables and transactions in the same database."""

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

#: Accounts in one unit of pgbench's scale.
ROWS = 100_000
#: The traffic beside each measurement of a run with ``--big``.
CLIENTS, RATE = 2, 200

_HELP = (
    "No pgbench found. It comes with PostgreSQL: pip install -e '.[bench]',"
    " or the system's package (apt-get install postgresql, brew install postgresql)."
)
_TIMEOUT = 30.0
_AT_MOST = 3600


class Broken(Exception):
    """pgbench failed; the message gives the reason."""


@dataclass(frozen=True)
class Report:
    """The result of a pgbench. ``latencies_ms`` counts each transaction from its due time."""

    transactions: int
    per_second: float
    latencies_ms: Sequence[float]


def find_pgbench() -> str:
    """Return the program, next to the server's programs or on the path.

    Raises ``Unavailable``, whose message names the packages to install.
    """
    with suppress(BinariesNotFound):
        program = find_binaries() / "pgbench"
        if os.access(program, os.X_OK):
            return str(program)
    if (found := shutil.which("pgbench")) is None:
        raise Unavailable(_HELP)
    return found


def fill(dsn: str, scale: int) -> None:
    """Create pgbench's tables, with ``scale`` times 100,000 accounts, and flush them to disk.

    Raises ``Unavailable`` without pgbench or if it fails.
    """
    target, environment = _target(dsn)
    # Generate on this side, not in the server ("G"): COPY ... FREEZE is faster and leaves no work
    # for vacuum.
    command = [find_pgbench(), "-i", "-q", "-I", "dtgvp", "-s", str(scale), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pgbench could not fill its tables: {_complaint(done.stderr)}")
    checkpoint(dsn)


def checkpoint(dsn: str) -> None:
    """Flush all written pages, so that the next measurement does not pay for them.

    Do nothing without the right to order a checkpoint.
    """
    with (
        psycopg.connect(dsn, autocommit=True) as connection,
        suppress(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("CHECKPOINT")


class Pgbench:
    """pgbench in the background: ``clients`` at full speed, or ``rate`` transactions a second.

    It works for ``seconds``, at most until the ``with`` block ends or its process dies. It removes
    its files.
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
        """Wait until all clients have connections. Raises ``Broken`` if they get none."""
        end = time.monotonic() + _TIMEOUT
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while self._connected(connection) < self._clients:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise Broken(f"its clients did not connect: {_complaint(self._said())}")
                time.sleep(0.02)  # pgbench does not report them

    def stop(self) -> None:
        """Stop pgbench early, as if its time were over. The clients must be connected."""
        self._process.send_signal(
            signal.SIGALRM
        )  # pgbench uses this signal itself for the end of its time

    def report(self) -> Report:
        """Wait for its end and return its result. Raises ``Broken`` if it failed."""
        try:
            code = self._process.wait(self._seconds + _TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Broken(f"still runs {_TIMEOUT:g} s after its time") from None
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
                start_new_session=True,  # only this process handles Ctrl-C
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
    """Measure while pgbench loads the database like an application.

    The notes contain the number of its transactions. If pgbench fails, the outcome has the error.
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
    """Parse the final report of pgbench. Raises ``Broken`` if the report is incomplete."""
    transactions = re.search(
        r"^number of transactions actually processed: (\d+)", text, re.MULTILINE
    )
    per_second = re.search(r"^tps = ([\d.]+) ", text, re.MULTILINE)
    if transactions is None or per_second is None or "Run was aborted" in text:
        raise Broken(_complaint(text))
    return Report(int(transactions[1]), float(per_second[1]), latencies_ms)


def parse_log(lines: Iterable[str]) -> list[float]:
    """Return the milliseconds of each transaction: the third word of its line.

    That word is no number if a transaction failed or was skipped. Such transactions are left out.
    """
    words = (line.split() for line in lines)
    return [int(word[2]) / 1000 for word in words if len(word) > 2 and word[2].isdigit()]


def _target(dsn: str) -> tuple[str, dict[str, str]]:
    """Return a DSN without password for the public command line, and the environment with it."""
    known = conninfo_to_dict(dsn)
    password = known.pop("password", None)
    secret = {} if password is None else {"PGPASSWORD": str(password)}
    known["application_name"] = "pgbench"
    return make_conninfo("", **known), {**os.environ, **secret, "LC_ALL": "C"}


def _complaint(text: str) -> str:
    lines = text.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error:" in line), lines[-1])
