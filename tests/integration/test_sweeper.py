"""`manage.py pg_layer_sweep`, and the sweeping that serving processes do by themselves."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devtools.postgres import PostgresServer
from pg_layer.config import load
from pg_layer.management.commands._layer import ended_by_signals
from pg_layer.sweeper import Sweeper
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.processes import listen, receive, until
from tests.project.commands import Process, eventually, manage, started, succeeded

COMMAND = ("-m", "tests.project.manage", "pg_layer_sweep")

PAST = "clock_timestamp() - interval '1 second'"
FUTURE = "clock_timestamp() + interval '1 hour'"


def sweep(dsn: str, *arguments: str, settings: dict[str, Any] | None = None) -> str:
    """The output of the command."""
    return succeeded(manage(dsn, "pg_layer_sweep", *arguments, settings=settings))


def refusal(dsn: str, *arguments: str, settings: dict[str, Any] | None = None) -> str:
    """What the command says when it refuses to work; no traceback."""
    result = manage(dsn, "pg_layer_sweep", *arguments, settings=settings)
    assert result.returncode in (1, 2), result.stderr
    assert "Removed" not in result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def add_messages(
    observer: Observer, count: int, expires_at: str, inbox: str = "asgi!:old", kind: str = "message"
) -> None:
    observer.execute(
        "INSERT INTO pg_layer_message (inbox, nonce, kind, channel, payload, expires_at)"
        f" SELECT '{inbox}', n, '{kind}', 'old', 'x', {expires_at}"
        f" FROM generate_series(1, {count}) AS n".encode()
    )


def add_memberships(observer: Observer, count: int, expires_at: str, inbox: str = "asgi!:old") -> None:
    observer.execute(
        "INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at)"
        f" SELECT 'group-' || n, '{inbox}', 'old', {expires_at}"
        f" FROM generate_series(1, {count}) AS n".encode()
    )


def add_client(observer: Observer, client: str, expires_at: str) -> None:
    observer.execute(
        f"INSERT INTO pg_layer_client (inbox, expires_at) VALUES ('asgi!{client}', {expires_at})".encode()
    )


def counts(observer: Observer) -> tuple[int, int, int]:
    """How many messages, memberships and clients there are."""
    row = observer.execute(
        "SELECT (SELECT count(*) FROM pg_layer_message), (SELECT count(*) FROM pg_layer_membership),"
        " (SELECT count(*) FROM pg_layer_client)"
    ).fetchone()
    assert row is not None
    return (row[0], row[1], row[2])


# ---------------------------------------------------------------------- what is swept


def test_it_removes_what_is_over_and_keeps_what_lives(migrated_dsn: str, observer: Observer) -> None:
    add_client(observer, "living", FUTURE)
    add_client(observer, "lapsed", PAST)
    add_client(observer, "forgotten", "clock_timestamp() - interval '25 hours'")
    for inbox in ("asgi!:old", "asgi!living", "other!:old", "asgi.!:old"):
        add_messages(observer, 2, PAST, inbox)
        add_messages(observer, 3, FUTURE, inbox)
        add_memberships(observer, 2, PAST, inbox)
    for inbox in ("asgi!lapsed", "asgi!forgotten"):  # nobody will read or renew what they left
        add_messages(observer, 5, FUTURE, inbox)
        add_messages(observer, 5, FUTURE, inbox, kind="join")
        add_memberships(observer, 5, "'infinity'", inbox)
    add_memberships(observer, 7, "'infinity'", "asgi!living-too")
    before = counts(observer)
    assert sweep(migrated_dsn, "--once", "--dry-run") == (
        "Would remove 24 messages, 14 memberships, 1 clients."
    )
    assert counts(observer) == before
    assert sweep(migrated_dsn, "--once") == "Removed 24 messages, 14 memberships, 1 clients."
    assert sweep(migrated_dsn, "--once") == "Removed 0 messages, 0 memberships, 0 clients."
    assert counts(observer) == (before[0] - 24, before[1] - 14, before[2] - 1)
    assert observer.execute(
        "SELECT inbox, count(*) FROM pg_layer_message WHERE inbox LIKE 'asgi!%' GROUP BY 1 ORDER BY 1"
    ).fetchall() == [("asgi!:old", 3), ("asgi!living", 3)]
    # A client is remembered for a day, so that nothing is written for it.
    assert observer.execute("SELECT inbox FROM pg_layer_client ORDER BY 1").fetchall() == [
        ("asgi!lapsed",),
        ("asgi!living",),
    ]


def test_aged_rows_go_in_batches(migrated_dsn: str, observer: Observer) -> None:
    add_messages(observer, 20_000, FUTURE)
    add_messages(observer, 10, FUTURE, "asgi!:kept")
    observer.execute(f"UPDATE pg_layer_message SET expires_at = {PAST} WHERE inbox = 'asgi!:old'".encode())
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


def test_only_the_named_layer_is_swept(migrated_dsn: str, observer: Observer) -> None:
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer"},
            "other": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"prefix": "other"}},
        }
    }
    add_messages(observer, 3, PAST)
    add_messages(observer, 4, PAST, "other!:old")
    output = sweep(migrated_dsn, "--once", "--layer", "other", settings=settings)
    assert output == "Removed 4 messages, 0 memberships, 0 clients."
    output = sweep(migrated_dsn, "--once", settings=settings)
    assert output == "Removed 3 messages, 0 memberships, 0 clients."


def test_verbosity(migrated_dsn: str, observer: Observer) -> None:
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
        (["--batch-size", "0"], "'0' is not a number from 1"),
        (["--batch-size", "many"], "'many' is not a number from 1"),
        (["--batch-size", "1.5"], "'1.5' is not a number from 1"),
        (["--batch-size", "99999999999"], "'99999999999' is not a number from 1"),
    ],
)
def test_invalid_values(arguments: list[str], complaint: str) -> None:
    # In this process: what the parser says does not depend on the project.
    from django.core.management.base import CommandError

    from pg_layer.management.commands.pg_layer_sweep import Command

    parser = Command().create_parser("manage.py", "pg_layer_sweep")
    with pytest.raises(CommandError) as caught:
        parser.parse_args(["--once", *arguments])
    assert complaint in str(caught.value)
    assert f"argument {arguments[0]}: " in str(caught.value)


def test_invalid_values_on_the_command_line(migrated_dsn: str) -> None:
    said = refusal(migrated_dsn, "--interval", "0")
    assert said.startswith("usage: manage.py pg_layer_sweep")
    assert said.endswith("argument --interval: '0' is not a number of seconds above 0")
    assert "--invterval" in refusal(migrated_dsn, "--invterval", "5")


def test_a_layer_that_does_not_exist(migrated_dsn: str) -> None:
    assert refusal(migrated_dsn, "--once", "--layer", "jobs") == (
        "CommandError: There is no channel layer 'jobs' in CHANNEL_LAYERS."
    )


def test_a_layer_that_is_another(migrated_dsn: str) -> None:
    settings = {"CHANNEL_LAYERS": {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}}
    assert refusal(migrated_dsn, "--once", settings=settings) == (
        "CommandError: The channel layer 'default' is no pg_layer.PostgresChannelLayer."
    )


@pytest.mark.parametrize("option", ["--once", "--dry-run", "--interval=0.1"])
def test_a_bad_config(migrated_dsn: str, option: str) -> None:
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"using": "nowhere"}}
        }
    }
    said = refusal(migrated_dsn, option, settings=settings)
    assert said.startswith("CommandError: ")
    assert "CONFIG['using'] must be an alias in DATABASES, not 'nowhere'" in said


@pytest.mark.parametrize("option", ["--once", "--dry-run"])
def test_tables_that_are_missing(fresh_database: str, option: str) -> None:
    said = refusal(fresh_database, option)
    assert said.startswith("CommandError: ")
    assert "manage.py migrate pg_layer" in said


@pytest.mark.parametrize("option", ["--once", "--dry-run"])
def test_a_database_that_is_away(migrated_dsn: str, option: str) -> None:
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
    """The command, once it sweeps."""
    process = stack.enter_context(started(dsn, *COMMAND, *arguments))
    process.expect("Sweeping every")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("interval", ["0.05", "3600"])
def test_signals_end_it(
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


def test_it_sweeps_again_and_again(
    migrated_dsn: str, observer: Observer, processes_to_end: ExitStack
) -> None:
    process = start(processes_to_end, migrated_dsn, "--interval", "0.1")
    for n in range(1, 4):
        add_messages(observer, n, PAST)
        assert process.expect("Removed") == f"Removed {n} messages, 0 memberships, 0 clients."
    [(connections,)] = observer.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'pg_layer'"
    ).fetchall()
    assert connections == 1
    assert process.end(signal.SIGTERM) == 0


def test_silence(migrated_dsn: str, observer: Observer, processes_to_end: ExitStack) -> None:
    add_messages(observer, 3, PAST)
    process = processes_to_end.enter_context(
        started(migrated_dsn, *COMMAND, "--interval", "0.1", "--verbosity", "0")
    )
    eventually(lambda: counts(observer)[0] == 0, "swept")
    assert process.end(signal.SIGTERM) == 0
    assert process.output == []
    assert process.errors == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_a_wait_that_is_about_to_begin(number: signal.Signals) -> None:
    """That it has come is known without a step of Python, which takes none while it waits."""
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


def test_a_signal_that_comes_late(migrated_dsn: str) -> None:
    with Sweeper(load({"dsn": migrated_dsn}), 1000, lambda swept: None, lambda error: None) as sweeper:
        sweeper.stop()
        sweeper.stop()
        sweeper.run(3600)
    sweeper.stop()


def test_tables_that_come_later(fresh_database: str, processes_to_end: ExitStack) -> None:
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


def test_it_outlives_a_restart_of_the_database(processes_to_end: ExitStack) -> None:
    with PostgresServer(fsync=False) as server:
        for file in migrations():
            server.execute(file.read_text())
        add = (
            "INSERT INTO pg_layer_message (inbox, nonce, channel, expires_at)"
            " VALUES ('asgi!:old', 1, 'old', clock_timestamp())"
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
    for line in process.errors:
        assert line.startswith("Could not sweep, trying again: ")


async def test_two_sweepers_do_no_harm_while_traffic_flows(
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
                add_messages(observer, 100, PAST)
                add_memberships(observer, 3, PAST, f"asgi!:old-{n}")

    sending = asyncio.create_task(send())
    assert [(await receive(receiver, channel))["n"] for _ in range(count)] == list(range(count))
    assert [(await receive(receiver, "jobs"))["n"] for _ in range(count)] == list(range(count))
    await sending
    await until(lambda: observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (0, 0, 0))
    for sweeper in sweepers:
        assert await asyncio.to_thread(sweeper.end, signal.SIGTERM) == 0
        assert sweeper.errors == []
    removed = [line for sweeper in sweepers for line in sweeper.output if line.startswith("Removed")]
    assert sum(int(line.split()[1]) for line in removed) == count // 20 * 100
    assert sum(int(line.split()[3]) for line in removed) == count // 20 * 3
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == [(channel,)]


# ---------------------------------------------------------------------- serving processes


async def test_serving_processes_sweep_one_at_a_time(make_layer: MakeLayer, observer: Observer) -> None:
    observer.execute("CREATE TABLE deletion (sweep xid8, began timestamptz, ended timestamptz)")
    observer.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$"
        " DECLARE _began timestamptz := clock_timestamp(); BEGIN"
        " IF EXISTS (SELECT FROM gone WHERE channel = 'old') THEN PERFORM pg_sleep(0.05);"
        " INSERT INTO deletion VALUES (pg_current_xact_id(), _began, clock_timestamp()); END IF;"
        " RETURN NULL; END $$"
    )
    observer.execute(
        "CREATE TRIGGER note AFTER DELETE ON pg_layer_message REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION note()"
    )
    # As many processes would: each layer is a client of its own.
    for _ in range(5):
        await listen(make_layer(lease=60, heartbeat=0.05, sweep_interval=0.01))
    for _ in range(4):
        add_messages(observer, 5_000, PAST)
        await until(lambda: counts(observer)[0] == 0)
    spans: list[tuple[datetime, datetime]] = observer.execute(
        "SELECT began, ended FROM deletion ORDER BY began"
    ).fetchall()
    assert len(spans) >= 20
    assert [(ended, began) for (_, ended), (began, _) in pairwise(spans) if began < ended] == []


def test_a_sweep_by_a_serving_process_leaves_it_to_one_that_sweeps(
    migrated_dsn: str, observer: Observer
) -> None:
    add_messages(observer, 3, PAST)
    with psycopg.connect(migrated_dsn) as first:
        assert first.execute(
            "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 1, true, null, null)"
        ).fetchone() == (1, 0, 0)
        assert (
            observer.execute(
                "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 10, true, null, null)"
            ).fetchone()
            == (None,) * 3
        )
        # Of another prefix, or by the command: beside it.
        assert observer.execute(
            "SELECT messages, memberships, clients FROM pg_layer_sweep('other', 10, true, null, null)"
        ).fetchone() == (0, 0, 0)
        assert observer.execute(
            "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 10, false, null, null)"
        ).fetchone() == (2, 0, 0)
    assert observer.execute(
        "SELECT messages, memberships, clients FROM pg_layer_sweep('asgi', 10, true, null, null)"
    ).fetchone() == (0, 0, 0)


async def test_serving_processes_do_not_sweep_if_told_so(make_layer: MakeLayer, observer: Observer) -> None:
    add_messages(observer, 3, PAST)
    # Busy with other layers' tables, and with its own heartbeat: ten of them pass.
    await listen(make_layer(lease=60, heartbeat=0.05, sweep_interval=0))
    lease = "SELECT max(expires_at) FROM pg_layer_client"
    for _ in range(10):
        before = observer.execute(lease.encode()).fetchone()
        await until(lambda before=before: observer.execute(lease.encode()).fetchone() != before)  # type: ignore[misc]
    # Its own may not be deleted yet.
    expired = b"SELECT count(*) FROM pg_layer_message WHERE expires_at <= clock_timestamp()"
    assert observer.execute(expired).fetchone() == (3,)
