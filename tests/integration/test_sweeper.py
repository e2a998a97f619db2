"""`manage.py pg_layer_sweep`, and sweeps by processes that receive."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer._config.options import load
from pg_layer._maintenance.sweeper import Sweeper
from pg_layer.management.commands._layer import ended_by_signals
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.processes import listen, receive, until
from tests.project.commands import (
    ROOT,
    Process,
    environment,
    eventually,
    manage,
    started,
    succeeded,
)

COMMAND = ("-m", "tests.project.manage", "pg_layer_sweep")

NOW = "clock_timestamp()"
PAST = "clock_timestamp() - interval '1 second'"
FUTURE = "clock_timestamp() + interval '1 hour'"


def sweep(dsn: str, *arguments: str, settings: dict[str, Any] | None = None) -> str:
    """Return the output of the command."""
    return succeeded(manage(dsn, "pg_layer_sweep", *arguments, settings=settings))


def refusal(dsn: str, *arguments: str, settings: dict[str, Any] | None = None) -> str:
    """Return the error message of the command, which must not be a traceback."""
    result = manage(dsn, "pg_layer_sweep", *arguments, settings=settings)
    assert result.returncode in (1, 2), result.stderr
    assert "Removed" not in result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def add_messages(
    observer: Observer,
    count: int,
    expires_at: str,
    address: str = "asgi!:old",
    kind: str = "message",
) -> None:
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, kind, channel, payload, expires_at)"
        f" SELECT '{address}', pg_current_xact_id(), 0, '{kind}', 'old', 'x', {expires_at}"
        f" FROM generate_series(1, {count}) AS n".encode()
    )


def add_memberships(
    observer: Observer, count: int, expires_at: str, address: str = "asgi!:old", id: int = 1
) -> None:
    """Insert membership rows: rows of the owner with the id 0, otherwise requests."""
    observer.execute(
        "INSERT INTO pg_layer_membership (group_name, address, channel, id, expires_at)"
        f" SELECT 'group-' || n, '{address}', 'old', {id}, {expires_at}"
        f" FROM generate_series(1, {count}) AS n".encode()
    )


def add_client(
    observer: Observer,
    client: str,
    expires_at: str,
    lease: float = 60,
    ended_at: str = "NULL",
    swept_at: str = "NULL",
) -> None:
    observer.execute(
        "INSERT INTO pg_layer_client (address, expires_at, lease, ended_at, swept_at)"
        f" VALUES ('asgi!{client}', {expires_at}, {lease}, {ended_at}, {swept_at})".encode()
    )


def steady(observer: Observer, prefix: str = "asgi", since: str = "1 hour") -> None:
    """Set the lease clock: leases have been renewed without a gap for ``since``, until now."""
    observer.execute(
        "INSERT INTO pg_layer_lease_clock AS l (prefix, boot, lease, renewed_at, steady_since)"
        " SELECT %s, pg_layer_current_boot(), 3600, clock_timestamp(),"
        " clock_timestamp() - %s::interval"
        " ON CONFLICT (prefix) DO UPDATE SET (boot, lease, renewed_at, steady_since)"
        " = (excluded.boot, excluded.lease, excluded.renewed_at, excluded.steady_since)",
        (prefix, since),
    )


def counts(observer: Observer) -> tuple[int, int, int]:
    """Return the numbers of messages, memberships and clients."""
    row = observer.execute(
        "SELECT (SELECT count(*) FROM pg_layer_message), (SELECT count(*)"
        " FROM pg_layer_membership),"
        " (SELECT count(*) FROM pg_layer_client)"
    ).fetchone()
    assert row is not None
    return (row[0], row[1], row[2])


# ---------------------------------------------------------------------- what is swept


def test_sweeper_removes_what_is_over_and_keeps_the_rest(
    migrated_dsn: str, observer: Observer
) -> None:
    steady(observer)
    day = "clock_timestamp() - interval '25 hours'"
    add_client(observer, "living", FUTURE)
    add_client(observer, "over", PAST)
    add_client(observer, "over-too", PAST)
    add_client(observer, "overdue", PAST, lease=7200)
    add_client(observer, "closed", PAST, ended_at=NOW)
    add_client(observer, "closed-before", day, ended_at=day)
    add_client(observer, "swept-before", day, swept_at=day)
    for address in (
        "asgi!:old",
        "asgi!living",
        "asgi!overdue",
        "asgi!@old",
        "other!:old",
        "asgi.!:old",
    ):
        add_messages(observer, 2, PAST, address)
        add_messages(observer, 3, FUTURE, address)
    for address in ("asgi!:old", "other!:old", "asgi.!:old"):
        add_memberships(observer, 3, PAST, address)
        add_memberships(observer, 2, FUTURE, address, id=2)
    # Owners delete their rows, and requests about their channels. An owner may be a day late.
    add_memberships(observer, 2, PAST, "asgi!living", id=0)
    add_memberships(observer, 2, PAST, "asgi!living", id=1)
    add_memberships(observer, 2, FUTURE, "asgi!living", id=2)
    add_memberships(observer, 5, day, "asgi!living", id=3)
    for address in (
        "asgi!over",
        "asgi!over-too",
    ):  # it may return, and receive its messages
        add_messages(observer, 5, FUTURE, address)
        add_messages(observer, 5, FUTURE, address, kind="add")
        add_memberships(observer, 5, "'infinity'", address, id=0)
    add_memberships(observer, 7, "'infinity'", "asgi!living-too", id=0)
    before = counts(observer)
    # Expired messages of all prefixes; requests of the own prefix.
    assert sweep(migrated_dsn, "--once", "--dry-run") == (
        "Would remove 12 messages, 18 memberships, 2 clients."
    )
    assert counts(observer) == before
    assert sweep(migrated_dsn, "--once") == "Removed 12 messages, 18 memberships, 2 clients."
    assert sweep(migrated_dsn, "--once") == "Removed 0 messages, 0 memberships, 0 clients."
    assert counts(observer) == (before[0] - 12, before[1] - 18, before[2] - 2)
    assert observer.execute(
        "SELECT address, count(*) FROM pg_layer_message GROUP BY 1 ORDER BY 1"
    ).fetchall() == [
        ("asgi!:old", 3),
        ("asgi!@old", 3),
        ("asgi!living", 3),
        ("asgi!over", 10),
        ("asgi!over-too", 10),
        ("asgi!overdue", 3),
        ("asgi.!:old", 3),
        ("other!:old", 3),
    ]
    # A client is remembered for a day.
    assert observer.execute(
        "SELECT address, swept_at IS NOT NULL FROM pg_layer_client ORDER BY 1"
    ).fetchall() == [
        ("asgi!closed", True),
        ("asgi!living", False),
        ("asgi!over", True),
        ("asgi!over-too", True),
        ("asgi!overdue", False),
    ]


def test_sweeper_lease_that_expired_in_an_outage_is_kept(
    migrated_dsn: str, observer: Observer
) -> None:
    """A lease is measured in time in which other clients have renewed leases, in this boot."""
    add_client(observer, "late", PAST)
    add_messages(observer, 5, FUTURE, "asgi!late")
    add_memberships(observer, 5, "'infinity'", "asgi!late", id=0)
    nothing, all_of_it = (
        f"Removed 0 messages, {count} memberships, 0 clients." for count in (0, 5)
    )
    assert sweep(migrated_dsn, "--once") == nothing  # no renewal is known
    steady(observer, since="50 seconds")  # shorter than its lease
    assert sweep(migrated_dsn, "--once") == nothing
    for change in (
        "boot = boot - 1",
        "renewed_at = renewed_at - interval '31 minutes'",  # the longest lease is an hour
    ):
        steady(observer)
        observer.execute(f"UPDATE pg_layer_lease_clock SET {change}".encode())
        assert sweep(migrated_dsn, "--once") == nothing
    steady(observer, "other")
    assert sweep(migrated_dsn, "--once") == nothing
    steady(observer)
    assert sweep(migrated_dsn, "--once") == all_of_it


def test_sweeper_requests_that_a_later_one_replaces_are_removed(
    migrated_dsn: str, observer: Observer
) -> None:
    """At no moment does a request count that a later one has replaced."""
    requests = [
        *(("joined", id, True) for id in (1, 2, 3)),
        *(("left", id, id < 3) for id in (1, 2, 3)),
        *(("back", id, id != 2) for id in (1, 2, 3)),
        ("never", 1, False),
    ]
    for group, id, present in requests:
        observer.execute(
            "INSERT INTO pg_layer_membership"
            " VALUES (%s, 'asgi!:jobs', 'jobs', %s, %s, 'infinity', 100)",
            (group, id, present),
        )

    def members() -> list[tuple[Any, ...]]:
        return observer.execute(
            "SELECT group_name, members FROM pg_layer_group ORDER BY 1"
        ).fetchall()

    assert members() == [("back", 1), ("joined", 1)]
    while observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() != (0, 0, 0):
        [(removed,)] = observer.execute(
            "SELECT memberships FROM pg_layer_sweep('asgi', 100, false, 0)"
        )
        assert removed > 0
        assert members() == [("back", 1), ("joined", 1)]
    assert observer.execute(
        "SELECT group_name, id FROM pg_layer_membership ORDER BY 1"
    ).fetchall() == [
        ("back", 3),
        ("joined", 3),
    ]


def test_sweeper_client_with_many_rows_is_swept_in_parts(
    migrated_dsn: str, observer: Observer
) -> None:
    steady(observer)
    for client in range(3):
        add_client(observer, f"over-{client}", PAST)
        add_memberships(observer, 25, "'infinity'", f"asgi!over-{client}", id=0)
    assert sweep(migrated_dsn, "--once", "--batch-size", "10") == (
        "Removed 0 messages, 75 memberships, 0 clients."
    )
    assert observer.execute(
        "SELECT count(*) FROM pg_layer_client WHERE swept_at IS NULL"
    ).fetchone() == (0,)


def test_sweeper_old_rows_are_removed_in_batches(migrated_dsn: str, observer: Observer) -> None:
    add_messages(observer, 20_000, FUTURE)
    add_messages(observer, 10, FUTURE, "asgi!:kept")
    observer.execute(
        f"UPDATE pg_layer_message SET expires_at = {PAST} WHERE address = 'asgi!:old'".encode()
    )
    observer.execute("CREATE TABLE batch (size bigint)")
    observer.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO batch SELECT count(*) FROM gone; RETURN NULL; END'"
    )
    observer.execute(
        "CREATE TRIGGER note AFTER DELETE ON pg_layer_message REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION note()"
    )
    assert sweep(migrated_dsn, "--once", "--batch-size", "1500") == (
        "Removed 20000 messages, 0 memberships, 0 clients."
    )
    assert counts(observer)[0] == 10
    sizes = [size for (size,) in observer.execute("SELECT size FROM batch WHERE size > 0")]
    assert sizes == [1500] * 13 + [500]


def test_sweeper_other_layers_are_not_swept(migrated_dsn: str, observer: Observer) -> None:
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer"},
            "other": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"prefix": "other"}},
        }
    }
    add_messages(observer, 3, PAST)
    add_memberships(observer, 3, PAST)
    add_messages(observer, 4, PAST, "other!:old")
    add_memberships(observer, 4, PAST, "other!:old")
    output = sweep(migrated_dsn, "--once", "--layer", "other", settings=settings)
    # Expired messages of all prefixes are deleted, in the order of their ends.
    assert output == "Removed 7 messages, 4 memberships, 0 clients."
    output = sweep(migrated_dsn, "--once", settings=settings)
    assert output == "Removed 0 messages, 3 memberships, 0 clients."


def test_sweeper_verbosity_controls_the_output(migrated_dsn: str, observer: Observer) -> None:
    add_messages(observer, 3, PAST)
    assert sweep(migrated_dsn, "--once", "-v", "0") == ""
    assert counts(observer)[0] == 0


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--interval", "0"], "'0' is not a number of seconds"),
        (["--interval", "-1"], "'-1' is not a number of seconds"),
        (["--interval", "nan"], "'nan' is not a number of seconds"),
        (["--interval", "inf"], "'inf' is not a number of seconds"),
        (["--interval", "soon"], "'soon' is not a number of seconds"),
        (["--interval", "1e18"], "'1e18' is not a number of seconds"),
        (["--batch-size", "0"], "'0' is not an integer from 1"),
        (["--batch-size", "many"], "'many' is not an integer from 1"),
        (["--batch-size", "1.5"], "'1.5' is not an integer from 1"),
        (["--batch-size", "99999999999"], "'99999999999' is not an integer from 1"),
    ],
)
def test_sweeper_invalid_value_raises(arguments: list[str], complaint: str) -> None:
    # In this process: the output of the parser does not depend on the project.
    from django.core.management.base import CommandError

    from pg_layer.management.commands.pg_layer_sweep import Command

    parser = Command().create_parser("manage.py", "pg_layer_sweep")
    with pytest.raises(CommandError) as caught:
        parser.parse_args(["--once", *arguments])
    assert complaint in str(caught.value)
    assert f"argument {arguments[0]}: " in str(caught.value)


def test_sweeper_invalid_value_on_the_command_line_fails(migrated_dsn: str) -> None:
    said = refusal(migrated_dsn, "--interval", "0")
    assert said.startswith("usage: manage.py pg_layer_sweep")
    assert said.endswith("argument --interval: '0' is not a number of seconds above 0")
    assert "--invterval" in refusal(migrated_dsn, "--invterval", "5")


def test_sweeper_unknown_layer_fails(migrated_dsn: str) -> None:
    assert refusal(migrated_dsn, "--once", "--layer", "jobs") == (
        "CommandError: CHANNEL_LAYERS has no channel layer 'jobs'."
    )


def test_sweeper_layer_of_another_backend_fails(migrated_dsn: str) -> None:
    settings = {"CHANNEL_LAYERS": {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}}
    assert refusal(migrated_dsn, "--once", settings=settings) == (
        "CommandError: The channel layer 'default' is not a pg_layer.PostgresChannelLayer."
    )


@pytest.mark.parametrize("option", ["--once", "--dry-run", "--interval=0.1"])
def test_sweeper_invalid_config_fails(migrated_dsn: str, option: str) -> None:
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"using": "nowhere"}}
        }
    }
    said = refusal(migrated_dsn, option, settings=settings)
    assert said.startswith("CommandError: ")
    assert "CONFIG['using'] must be an alias in DATABASES, not 'nowhere'" in said


@pytest.mark.parametrize("option", ["--once", "--dry-run"])
def test_sweeper_missing_tables_fails(fresh_database: str, option: str) -> None:
    said = refusal(fresh_database, option)
    assert said.startswith("CommandError: ")
    assert "manage.py migrate pg_layer" in said


@pytest.mark.parametrize("option", ["--once", "--dry-run"])
def test_sweeper_database_away_fails(migrated_dsn: str, option: str) -> None:
    gone = psycopg.conninfo.make_conninfo(migrated_dsn, dbname="not_there")
    said = refusal(gone, option)
    assert said.startswith("CommandError: ")
    assert "not_there" in said


# ---------------------------------------------------------------------- running on


@pytest.fixture
def processes_to_end() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, dsn: str, *arguments: str) -> Process:
    """Start the command. Return when it sweeps."""
    process = stack.enter_context(started(dsn, *COMMAND, *arguments))
    process.expect("Sweeping every")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("interval", ["0.05", "3600"])
def test_sweeper_signal_ends_it(
    migrated_dsn: str,
    observer: Observer,
    processes_to_end: ExitStack,
    number: signal.Signals,
    interval: str,
) -> None:
    add_messages(observer, 3, PAST)
    process = start(processes_to_end, migrated_dsn, "--interval", interval)
    assert process.expect("Removed") == "Removed 3 messages, 0 memberships, 0 clients."
    assert process.end(number) == 0
    assert process.errors == []
    assert process.output == [
        f"Sweeping every {interval} seconds.",
        "Removed 3 messages, 0 memberships, 0 clients.",
        "Stopped.",
    ]


def test_sweeper_with_interval_sweeps_repeatedly(
    migrated_dsn: str, observer: Observer, processes_to_end: ExitStack
) -> None:
    process = start(processes_to_end, migrated_dsn, "--interval", "0.1")
    for n in range(1, 4):
        add_messages(observer, n, NOW)
        assert process.expect("Removed") == f"Removed {n} messages, 0 memberships, 0 clients."
    [(connections,)] = observer.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'pg_layer'"
    ).fetchall()
    assert connections == 1
    assert process.end(signal.SIGTERM) == 0


def test_sweeper_pass_continues_where_the_last_one_ended(
    migrated_dsn: str, observer: Observer, processes_to_end: ExitStack
) -> None:
    """A part does not read deleted rows again. A full pass finds rows with ends in the past."""
    process = start(processes_to_end, migrated_dsn, "--interval", "0.1")
    add_messages(observer, 1, NOW)
    assert process.expect("Removed") == "Removed 1 messages, 0 memberships, 0 clients."
    add_messages(observer, 2, PAST + " - interval '1 hour'")
    for _ in range(3):
        add_messages(observer, 4, NOW)
        assert process.expect("Removed") == "Removed 4 messages, 0 memberships, 0 clients."
    assert process.end(signal.SIGTERM) == 0
    assert sweep(migrated_dsn, "--once") == "Removed 2 messages, 0 memberships, 0 clients."


def test_sweeper_full_pass_is_repeated(
    migrated_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pg_layer._db.queries.maintenance.FULL_PASS", 0.1)
    add_messages(observer, 3, NOW)
    with Sweeper(
        load({"dsn": migrated_dsn}), 1000, lambda swept: None, lambda error: None
    ) as sweeper:
        running = threading.Thread(target=sweeper.run, args=(0.05,))
        running.start()
        try:
            for end in (NOW, PAST, "'1960-01-01'", "'-infinity'"):
                add_messages(observer, 2, end)
                eventually(lambda: counts(observer)[0] == 0, "swept")
        finally:
            sweeper.stop()
            running.join()


def test_sweeper_verbosity_zero_prints_nothing(
    migrated_dsn: str, observer: Observer, processes_to_end: ExitStack
) -> None:
    add_messages(observer, 3, PAST)
    process = processes_to_end.enter_context(
        started(migrated_dsn, *COMMAND, "--interval", "0.1", "--verbosity", "0")
    )
    eventually(lambda: counts(observer)[0] == 0, "swept")
    assert process.end(signal.SIGTERM) == 0
    assert process.output == []
    assert process.errors == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_sweeper_signal_before_a_wait_ends_it(number: signal.Signals) -> None:
    """The signal is noticed without running Python code, which does not run during the wait."""
    before = signal.getsignal(number)
    calls: list[None] = []
    bell, ringer = socket.socketpair()
    with bell, ringer:
        with ended_by_signals(lambda: calls.append(None), ringer):
            signal.raise_signal(number)
            assert select.select([bell], [], [], 0)[0] == [bell]
        assert calls == [None]
        assert signal.getsignal(number) == before
        assert signal.set_wakeup_fd(-1) == -1


def test_sweeper_stopped_before_it_runs_returns(migrated_dsn: str) -> None:
    with Sweeper(
        load({"dsn": migrated_dsn}), 1000, lambda swept: None, lambda error: None
    ) as sweeper:
        sweeper.stop()
        sweeper.stop()
        sweeper.run(3600)
    sweeper.stop()


def test_sweeper_tables_created_later_are_swept(
    fresh_database: str, processes_to_end: ExitStack
) -> None:
    process = start(processes_to_end, fresh_database, "--interval", "0.1")
    eventually(lambda: bool(process.errors), "complained")
    assert "migrate pg_layer" in process.errors[0]
    with psycopg.connect(fresh_database, autocommit=True) as observer:
        for file in migrations():
            observer.execute(file.read_bytes())
        add_messages(observer, 3, PAST)
    assert process.expect("Removed") == "Removed 3 messages, 0 memberships, 0 clients."
    assert process.end(signal.SIGTERM) == 0


def migrations() -> list[Path]:
    return [file for file in sorted(MIGRATIONS.glob("*.sql")) if not file.stem.endswith("_reverse")]


def test_sweeper_continues_after_a_restart_of_the_database(processes_to_end: ExitStack) -> None:
    with PostgresServer(fsync=False) as server:
        for file in migrations():
            server.execute(file.read_text())
        add = (
            "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
            " VALUES ('asgi!:old', pg_current_xact_id(), 0, 'old', clock_timestamp())"
        )
        process = start(processes_to_end, server.dsn(), "--interval", "0.1")
        for _ in range(2):
            server.execute(add)
            assert process.expect("Removed") == "Removed 1 messages, 0 memberships, 0 clients."
            server.restart()
        server.execute(add)
        assert process.expect("Removed") == "Removed 1 messages, 0 memberships, 0 clients."
        seen = len(process.errors)
        server.stop()
        eventually(lambda: len(process.errors) > seen, "complained")
        server.start()
        server.execute(add)
        assert process.expect("Removed") == "Removed 1 messages, 0 memberships, 0 clients."
        assert process.end(signal.SIGTERM) == 0
    *errors, last = process.errors
    for line, following in pairwise(process.errors):
        assert (
            line.startswith("The sweep failed and will be repeated: ")
            or following != "The sweep works again."
        )
        assert "Check the settings" not in line
    assert errors
    assert last == "The sweep works again."


def test_sweeper_with_a_wrong_password_names_the_settings(
    migrated_dsn: str, processes_to_end: ExitStack
) -> None:
    dsn = make_conninfo(migrated_dsn, password="wrong")
    process = start(processes_to_end, dsn, "--interval", "0.1")
    eventually(lambda: len(process.errors) > 1, "complained")
    assert process.end(signal.SIGTERM) == 0
    for line in process.errors:
        assert line.endswith(" Check the settings of the database.")


def test_sweeper_whose_output_is_a_pipe_prints_at_once(
    migrated_dsn: str, observer: Observer
) -> None:
    """Python buffers what it prints into a pipe: a log would show nothing until the end."""
    add_messages(observer, 3, PAST)
    process = subprocess.Popen(
        [sys.executable, *COMMAND],
        cwd=ROOT,
        env={**environment(migrated_dsn), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Sweeping every 15 seconds.\n"
        assert process.stdout.readline().startswith("Removed 3 messages")
        process.terminate()
        assert process.wait() == 0


async def test_two_sweepers_beside_traffic_lose_no_message(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, processes_to_end: ExitStack
) -> None:
    sweepers = [
        processes_to_end.enter_context(
            started(migrated_dsn, *COMMAND, "--interval", "0.01", "--batch-size", "50")
        )
        for _ in range(2)
    ]
    for sweeper in sweepers:
        await asyncio.to_thread(sweeper.expect, "Sweeping every")
    sender, receiver = make_layer(capacity=1000), make_layer(capacity=1000)
    channel = await receiver.new_channel()
    await receiver.group_add("room", channel)
    count = 300

    async def send() -> None:
        for n in range(count):
            await sender.group_send("room", {"type": "test", "n": n})
            await sender.send("jobs", {"type": "test", "n": n})
            if n % 20 == 0:
                add_messages(observer, 100, NOW)
                add_memberships(observer, 3, PAST, f"asgi!:old-{n}")

    sending = asyncio.create_task(send())
    assert [(await receive(receiver, channel))["n"] for _ in range(count)] == list(range(count))
    assert [(await receive(receiver, "jobs"))["n"] for _ in range(count)] == list(range(count))
    await sending
    await until(
        lambda: observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (0, 0, 0)
    )
    for sweeper in sweepers:
        assert await asyncio.to_thread(sweeper.end, signal.SIGTERM) == 0
        assert sweeper.errors == []
    removed = [
        line for sweeper in sweepers for line in sweeper.output if line.startswith("Removed")
    ]
    assert sum(int(line.split()[1]) for line in removed) == count // 20 * 100
    assert sum(int(line.split()[3]) for line in removed) == count // 20 * 3
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == [(channel,)]


# ---------------------------------------------------------------------- serving processes


async def test_serving_processes_sweep_one_at_a_time(
    make_layer: MakeLayer, observer: Observer
) -> None:
    observer.execute("CREATE TABLE deletion (sweep xid8, began timestamptz, ended timestamptz)")
    observer.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$"
        " DECLARE _began timestamptz := clock_timestamp(); BEGIN"
        " IF EXISTS (SELECT FROM gone) THEN PERFORM pg_sleep(0.05);"
        " INSERT INTO deletion VALUES (pg_current_xact_id(), _began, clock_timestamp()); END IF;"
        " RETURN NULL; END $$"
    )
    observer.execute(
        "CREATE TRIGGER note AFTER DELETE ON pg_layer_membership REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION note()"
    )
    # Each layer is a client of its own, as a process would be.
    for _ in range(5):
        await listen(make_layer(lease=60, heartbeat=0.05, sweep_interval=0.01))
    for _ in range(4):
        add_memberships(observer, 5_000, PAST)
        await until(lambda: counts(observer)[1] == 0)
    spans: list[tuple[datetime, datetime]] = observer.execute(
        "SELECT began, ended FROM deletion ORDER BY began"
    ).fetchall()
    assert len(spans) >= 20
    assert [(ended, began) for (_, ended), (began, _) in pairwise(spans) if began < ended] == []


def test_serving_process_beside_another_sweep_does_not_sweep(
    migrated_dsn: str, observer: Observer
) -> None:
    add_memberships(observer, 3, PAST)
    counted = "SELECT messages, memberships, clients FROM pg_layer_sweep"
    with psycopg.connect(migrated_dsn) as first:
        swept = first.execute(f"{counted}('asgi', 1, true, 0)".encode()).fetchone()
        assert swept == (0, 1, 0)
        swept = observer.execute(f"{counted}('asgi', 10, true, 0)".encode()).fetchone()
        assert swept == (None,) * 3
        # A sweep of another prefix, or by the command, runs beside it.
        swept = observer.execute(f"{counted}('other', 10, true, 0)".encode()).fetchone()
        assert swept == (0, 0, 0)
        swept = observer.execute(f"{counted}('asgi', 10, false, 0)".encode()).fetchone()
        assert swept == (0, 2, 0)
    swept = observer.execute(f"{counted}('asgi', 10, true, 0)".encode()).fetchone()
    assert swept == (0, 0, 0)


async def test_serving_process_with_sweep_off_does_not_sweep(
    make_layer: MakeLayer, observer: Observer
) -> None:
    add_memberships(observer, 3, PAST)
    # Wait for ten heartbeats of the process.
    await listen(make_layer(lease=60, heartbeat=0.05, sweep_interval=0))
    lease = "SELECT max(expires_at) FROM pg_layer_client"
    for _ in range(10):
        before = observer.execute(lease.encode()).fetchone()
        await until(
            lambda before=before: (  # type: ignore[misc]
                observer.execute(lease.encode()).fetchone() != before
            )
        )
    assert counts(observer)[1] == 3


async def test_heartbeats_delete_expired_messages(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """They delete messages of all clients and prefixes, so that group messages do not pile up."""
    await listen(make_layer(lease=60, heartbeat=0.1, sweep_interval=0))
    for count in (1, 5_000):
        for address in ("asgi!@room", "other!:jobs"):
            add_messages(observer, count, NOW, address)
        expired = b"SELECT count(*) FROM pg_layer_message WHERE expires_at <= clock_timestamp()"
        await until(lambda: observer.execute(expired).fetchone() == (0,))  # noqa: B023
