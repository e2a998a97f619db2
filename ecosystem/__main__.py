"""The command line `python -m ecosystem`."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from benchmarks.servers import redis_server
from devtools.postgres import PostgresServer, PostgresServerError
from ecosystem.outcomes import Verdict, report
from ecosystem.run import ROOT, EcosystemError, Workplace
from ecosystem.suites import SUITES, Suite


def main(arguments: list[str] | None = None) -> int:
    """Run the suites, print a table and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ecosystem",
        description="Run the tests of other packages with PostgresChannelLayer.",
    )
    names = [suite.package for suite in SUITES]
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=ROOT / ".ecosystem", help="work here")
    options = parser.parse_args(arguments)
    unknown = set(options.packages) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    chosen = [suite for suite in SUITES if suite.package in (options.packages or names)]
    try:
        verdicts = _run(chosen, Workplace(options.folder))
    except (EcosystemError, PostgresServerError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(verdicts))
    return int(any(verdict.complaints for verdict in verdicts.values()))


def _run(suites: list[Suite], workplace: Workplace) -> dict[str, Verdict]:
    """Run each suite with its own layer and with this one, each in a new database."""
    with ExitStack() as stack:
        redis = ""
        if any(suite.needs_redis for suite in suites):
            if shutil.which("redis-server") is None:
                names = ", ".join(suite.package for suite in suites if suite.needs_redis)
                raise EcosystemError(
                    f"No redis-server found, with which {names} is compared. Install it"
                    " (apt-get install redis-server), or name other packages in ARGS."
                )
            redis = urlsplit(stack.enter_context(redis_server())).netloc
        workplace.prepare()
        server = stack.enter_context(PostgresServer(fsync=False, max_connections=200))
        verdicts = {}
        for number, suite in enumerate(suites):
            print(f"{suite.package} {suite.version}", file=sys.stderr, flush=True)
            (own, _), (outcomes, remains) = (
                workplace.test(
                    suite,
                    _database(server, f"suite{number}_{name}"),
                    redis=redis,
                    with_own_layer=name == "own",
                )
                for name in ("own", "pg_layer")
            )
            verdicts[suite.package] = Verdict(outcomes, own, suite.expected, remains)
        return verdicts


def _database(server: PostgresServer, name: str) -> str:
    """Create a database with the layer's tables and return its DSN."""
    dsn = server.create_database(name)
    with psycopg.connect(dsn) as connection:
        for file in sorted((ROOT / "migrations").glob("*.sql")):
            if not file.stem.endswith("_reverse"):
                connection.execute(file.read_bytes())
    return dsn


if __name__ == "__main__":
    sys.exit(main())
