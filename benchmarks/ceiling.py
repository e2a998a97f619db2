"""``python -m benchmarks.ceiling``: the capacity of the server itself, measured by pgbench.

It runs the statements that a layer depends on: single inserts that notify, batches that notify
once, and deletes by key. They run in the tables of the bare measurements, on several connections
and without Python. No session listens.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.layers import KINDS
from benchmarks.pgbench import find_pgbench
from benchmarks.scenarios.base import Scale
from benchmarks.servers import Unavailable, database_for, postgres_server

BATCH = 100
_OVERHEAD_LIMIT = 60.0
#: Rows that the deletes need for each second of the other scripts. pgbench stops when all rows are
#: deleted.
_ROWS_A_SECOND = 100_000

# The size of the scenarios' messages. The planner makes a constant of it.
_PAYLOAD = "decode(repeat('78', 140), 'hex')"
_EXPIRES_AT = "clock_timestamp() + interval '60 s'"

_ONE = f"""
INSERT INTO bare_message AS m (inbox, nonce, payload, expires_at)
VALUES ('bare_' || :client_id, 1, {_PAYLOAD}, {_EXPIRES_AT})
RETURNING pg_notify(m.inbox, m.id || ' ' || encode(m.payload, 'base64'));
"""
_MANY = f"""
WITH written AS (
    INSERT INTO bare_message (inbox, nonce, payload, expires_at)
    SELECT 'bare_' || :client_id, 1, {_PAYLOAD}, {_EXPIRES_AT} FROM generate_series(1, {BATCH})
    RETURNING id
)
SELECT pg_notify('bare_' || :client_id, min(id) || ' ' || max(id)) FROM written;
"""
_DELETE = f"""
\\set first :position + 1
\\set position :position + {BATCH}
DELETE FROM bare_message WHERE inbox = 'bare_' || :client_id AND id BETWEEN :first AND :position;
"""
_FILL = f"""
INSERT INTO bare_message (inbox, id, nonce, payload, expires_at) OVERRIDING SYSTEM VALUE
SELECT 'bare_' || client, id, 1, {_PAYLOAD}, {_EXPIRES_AT}
FROM generate_series(0, %s - 1) AS client, generate_series(1, %s) AS id
"""


@dataclass(frozen=True)
class Script:
    """One kind of transaction.

    ``consumes``: it deletes rows that must exist before, and each client its own.
    """

    title: str
    text: str
    rows: int
    consumes: bool = False


SCRIPTS = (
    Script("insert a row and notify with it", _ONE, 1),
    Script(f"insert {BATCH} rows and notify once", _MANY, BATCH),
    Script(f"delete the oldest {BATCH} by key", _DELETE, BATCH, consumes=True),
)


@dataclass(frozen=True)
class Plan:
    """How long each script runs, and with which numbers of clients."""

    seconds: int
    clients: Sequence[int]


PLANS: Mapping[Scale, Plan] = {
    "full": Plan(5, (1, 4, 16)),
    "quick": Plan(1, (1, 8)),
    "tiny": Plan(1, (2,)),
}


@dataclass(frozen=True)
class Ceiling:
    """The result of one script. ``error`` is the reason if there is none."""

    title: str
    clients: int
    transactions_per_second: float | None = None
    rows_per_second: float | None = None
    error: str | None = None


def measure(
    dsn: str, plan: Plan, on_result: Callable[[Ceiling], None] = lambda ceiling: None
) -> list[Ceiling]:
    """Run every script in the bare database at ``dsn``.

    Raises `Unavailable` without pgbench.
    """
    program = find_pgbench()
    found = []
    for script in SCRIPTS:
        for clients in plan.clients:
            found.append(_measure(program, dsn, script, clients, plan.seconds))
            on_result(found[-1])
    return found


def _measure(program: str, dsn: str, script: Script, clients: int, seconds: int) -> Ceiling:
    try:
        speed = _speed(program, dsn, script, clients, seconds)
    except (OSError, ValueError, psycopg.Error, subprocess.SubprocessError) as error:
        return Ceiling(script.title, clients, error=str(error))
    return Ceiling(script.title, clients, speed, speed * script.rows)


def _speed(program: str, dsn: str, script: Script, clients: int, seconds: int) -> float:
    transactions = max(seconds * _ROWS_A_SECOND // script.rows // clients, 1)  # for each client
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE bare_message")
        if script.consumes:
            connection.execute(_FILL, (clients, transactions * script.rows))
    with tempfile.NamedTemporaryFile("w", prefix="pg_layer_bench_", suffix=".sql") as file:
        file.write(script.text)
        file.flush()
        length = ["-t", str(transactions)] if script.consumes else ["-T", str(seconds)]
        command = [program, "-n", "-M", "prepared", "-f", file.name, "-D", "position=0", *length]
        command += ["-c", str(clients), "-j", str(min(clients, os.cpu_count() or 1))]
        return transactions_per_second(_run(command, dsn, seconds))


def _run(command: Sequence[str], dsn: str, seconds: int) -> str:
    parameters: dict[str, Any] = dict(conninfo_to_dict(dsn))
    options = f"{parameters.pop('options', '')} -c synchronous_commit=off"  # like the layer
    password = parameters.pop("password", None)  # the password must not be on a command line
    environment = {**os.environ, "PGOPTIONS": options, "LC_ALL": "C"}
    if password is not None:
        environment["PGPASSWORD"] = str(password)
    done = subprocess.run(
        [*command, make_conninfo(**parameters)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + _OVERHEAD_LIMIT,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"pgbench: {done.stderr.strip()[-300:]}")
    return done.stdout


def transactions_per_second(output: str) -> float:
    """Return the rate that pgbench reports, without the time to connect.

    Raises `ValueError` if it reports none.
    """
    found = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    if found is None:
        raise ValueError(f"pgbench reported no tps: {output.strip()[-300:]}")
    return float(found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each result.

    Return exit code 1 if a result is missing and 2 without pgbench.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="of each run (default: 5)")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16"
    )
    parser.add_argument("--dsn", help="use this PostgreSQL server")
    options = parser.parse_args(arguments)
    try:
        with postgres_server(options.dsn) as server, database_for(KINDS["bare"], server) as dsn:
            found = measure(
                dsn, Plan(options.seconds, options.clients), lambda ceiling: print(line(ceiling))
            )
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 2
    return 1 if any(ceiling.error for ceiling in found) else 0


def line(ceiling: Ceiling) -> str:
    """Return one result as a line of text."""
    plural = "s" if ceiling.clients > 1 else " "
    what = f"pgbench  {ceiling.title:<32} {ceiling.clients:>3} client{plural}"
    if ceiling.error is not None:
        return f"{what}  {ceiling.error}"
    speeds = (
        (ceiling.transactions_per_second, "transactions/s"),
        (ceiling.rows_per_second, "rows/s"),
    )
    return "  ".join([what, *(f"{speed:>9,.0f} {unit}" for speed, unit in speeds)])


if __name__ == "__main__":
    sys.exit(main())
