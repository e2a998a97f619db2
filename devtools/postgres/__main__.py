"""The command line `python -m devtools.postgres`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from types import FrameType

from devtools.postgres import PostgresServer, PostgresServerError


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run a server until SIGINT or SIGTERM. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m devtools.postgres",
        description="Run a temporary PostgreSQL server until interrupted.",
    )
    parser.add_argument(
        "--pg-version", metavar="MAJOR", help="major version of PostgreSQL, such as 16"
    )
    parser.add_argument("--port", type=int, help="port on 127.0.0.1; a free one by default")
    parser.add_argument(
        "--data-dir", help="keep data and password in this folder; default: a temporary folder"
    )
    parser.add_argument(
        "--no-fsync", action="store_true", help="faster; the data is lost if the machine crashes"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a line of postgresql.conf"
    )
    options = parser.parse_args(arguments)
    settings = {}
    for setting in options.set:
        name, found, value = setting.partition("=")
        if not found:
            parser.error(f"--set {setting}: NAME=VALUE expected")
        settings[name] = value
    if importlib.util.find_spec("psycopg") is None:
        print("psycopg is needed: pip install 'psycopg[binary]'", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    server = PostgresServer(
        version=options.pg_version,
        port=options.port,
        data_dir=options.data_dir,
        fsync=not options.no_fsync,
        settings=settings,
    )
    try:
        with server:
            print(server.dsn(), flush=True)
            print(f"log: {server.log_path}", file=sys.stderr, flush=True)
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
            print(f"The server stopped unexpectedly:\n{server.log_tail()}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except PostgresServerError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
