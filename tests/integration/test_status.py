"""`manage.py pg_layer_status`: the status of a working layer, and its problems."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from pg_layer._config.options import load
from pg_layer._db.pool import connection_kwargs
from pg_layer._maintenance import status_text
from pg_layer._state.status import ChannelStatus, Status, in_words
from pg_layer.management.commands import pg_layer_status
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.faults.test_notify_refused import full_queue
from tests.integration.test_django import postgres
from tests.integration.test_sweeper import steady
from tests.processes import Processes, listen, read
from tests.project.commands import ROOT, environment, eventually, manage, run, started
from tests.project.configured import configured

COMMAND = ("-m", "tests.project.manage", "pg_layer_status")
OPERATIONS = (ROOT / "docs/how-to/operations.md").read_text(encoding="utf-8")
WITHOUT_RICH = f"""
import sys
sys.modules["rich"] = None
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", *{COMMAND[2:]!r}, *sys.argv[1:]])
"""


def sweep(observer: Observer, age: str = "0 seconds", prefix: str = "asgi") -> None:
    observer.execute(
        "INSERT INTO pg_layer_last_sweep VALUES (%s, clock_timestamp() - %s::interval)"
        " ON CONFLICT (prefix) DO UPDATE SET swept_at = excluded.swept_at",
        (prefix, age),
    )


def add_client(
    observer: Observer, client: str, expires: str, ended: str | None = None, **counters: int
) -> None:
    """Insert a client whose lease expires after ``expires``. ``ended``: it ended so long ago."""
    observer.execute(
        "INSERT INTO pg_layer_client"
        " (address, host, pid, expires_at, lease, ended_at, counters) VALUES"
        " ('asgi!' || %s, 'host-of-' || %s, 77, clock_timestamp() + %s::interval, 60,"
        " clock_timestamp() - %s::interval, %s)",
        (client, client, expires, ended, json.dumps(counters)),
    )


def look(dsn: str, *arguments: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the command's JSON, and check that the exit status agrees with it."""
    result = manage(dsn, COMMAND[2], "--json", *arguments, settings=settings)
    assert result.stderr == ""
    shown: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (0 if shown["ok"] else 1)
    assert shown["ok"] == (shown["problems"] == [])
    return shown


def read_text(dsn: str, *arguments: str) -> tuple[int, list[str]]:
    """Return the exit status of the command, and the lines that it prints."""
    result = manage(dsn, COMMAND[2], *arguments)
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


# ---------------------------------------------------------------------- all is well


async def test_status_of_a_working_layer_is_ok(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, processes: Processes
) -> None:
    sweep(observer)
    other = processes.start(read, migrated_dsn, 1)
    far = await other.hear()
    layer = make_layer()
    await listen(layer)
    near = [await layer.new_channel() for _ in range(3)]
    for channel in [*near, far, "jobs"]:
        await layer.group_add("room", channel)
    await layer.group_add("alone", far)
    for n in range(4):
        await layer.send("jobs", {"type": "test", "n": n})
    await layer.send("letters", {"type": "test"})
    stranger = make_layer(prefix="other")
    await stranger.send("jobs", {"type": "test"})
    await stranger.group_add("room", "jobs")

    # Their leases are longer than in the command's own configuration.
    shown = look(migrated_dsn)
    assert shown["ok"]
    clients = shown["clients"]
    assert (clients["live"], clients["overdue"], clients["ended"]) == (2, 0, 0)
    assert {(client["host"], client["pid"]) for client in clients["list"]} == {
        (socket.gethostname(), os.getpid()),
        (socket.gethostname(), other.pid),
    }
    for client in clients["list"]:
        assert 0 <= client["lease_age"] < 3600
        assert client["lease_age"] + client["lease_left"] == pytest.approx(3600)
    assert shown["groups"] == {
        "count": 2,
        "members": 6,
        "list": [
            {"name": "room", "members": 5, "addresses": 3},
            {"name": "alone", "members": 1, "addresses": 1},
        ],
    }
    channels = shown["channels"]
    assert (channels["count"], channels["waiting"]) == (2, 5)
    assert [(each["name"], each["waiting"]) for each in channels["list"]] == [
        ("jobs", 4),
        ("letters", 1),
    ]
    assert channels["list"][0]["oldest_age"] >= channels["list"][1]["oldest_age"] > 0
    assert shown["drops"] == {
        "dropped_full": 0,
        "dropped_expired": 0,
        "dropped_undecodable": 0,
        "refused_full": 0,
    }
    assert [table["name"] for table in shown["tables"]] == [
        "pg_layer_message",
        "pg_layer_membership",
        "pg_layer_client",
        "pg_layer_lease_clock",
        "pg_layer_boot",
        "pg_layer_low_id",
        "pg_layer_last_sweep",
    ]
    for table in shown["tables"]:
        assert table["size"] > 0
        assert table["index_size"] > 0
    assert 0 <= shown["notify_queue_usage"] < 0.5
    assert shown["last_sweep_age"] >= 0

    await layer.send(far, {"type": "test"})
    await other.result()
    after = look(migrated_dsn)
    assert (after["clients"]["live"], after["clients"]["ended"]) == (1, 1)
    assert after["ok"]


def test_status_lists_the_first_of_many(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    for n in range(12):
        add_client(observer, f"client{n:02}", "1 minute")
        for member in range(n + 1):
            observer.execute(
                "INSERT INTO pg_layer_membership VALUES (%s, %s, %s, 0, true, 'infinity')",
                (f"group{n}", f"asgi!client{n:02}", f"specific.client{n:02}!{member}"),
            )
            observer.execute("SELECT pg_layer_send(%s, %s)", (f"jobs{n}", '{"type": "test"}'))
    for arguments, count in (([], 10), (["--top", "3"], 3), (["--top", "100"], 12)):
        shown = look(migrated_dsn, *arguments)
        assert len(shown["clients"]["list"]) == count
        assert shown["clients"]["live"] == 12
        groups, channels = shown["groups"], shown["channels"]
        assert [(each["name"], each["members"]) for each in groups["list"]] == [
            (f"group{n}", n + 1) for n in range(11, 11 - count, -1)
        ]
        assert (groups["count"], groups["members"]) == (12, 78)
        assert [(each["name"], each["waiting"]) for each in channels["list"]] == [
            (f"jobs{n}", n + 1) for n in range(11, 11 - count, -1)
        ]
        assert (channels["count"], channels["waiting"]) == (12, 78)


def test_status_ignores_expired_and_ended_rows(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "gone", "-1 hour", "1 hour")
    observer.execute(
        "INSERT INTO pg_layer_membership"
        " VALUES ('room', 'asgi!gone', 'a.gone!1', 0, true, 'infinity')"
    )
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
        " VALUES ('asgi!:jobs', pg_current_xact_id(), 0, 'jobs', clock_timestamp())"
    )
    shown = look(migrated_dsn)
    assert shown["groups"] == {"count": 0, "members": 0, "list": []}
    assert shown["channels"] == {"count": 0, "waiting": 0, "list": []}
    clients = shown["clients"]
    assert (clients["live"], clients["overdue"], clients["ended"]) == (0, 0, 1)
    assert clients["list"] == []


def test_status_adds_up_drops_of_live_clients(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute", dropped_full=3, dropped_expired=1, sent=100)
    add_client(
        observer, "two", "1 minute", dropped_full=4, refused_full=2**40, dropped_undecodable=5
    )
    add_client(observer, "gone", "-1 minute", "1 minute", dropped_full=1000)
    assert look(migrated_dsn)["drops"] == {
        "dropped_full": 7,
        "dropped_expired": 1,
        "dropped_undecodable": 5,
        "refused_full": 2**40,
    }


def test_status_ignores_counters_that_are_not_numbers(
    migrated_dsn: str, observer: Observer
) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute", dropped_full=3)
    odd = ('{"dropped_full": "x"}', '{"dropped_full": 1e30}', '{"dropped_full": 1.5}', "[]", "7")
    for number, counters in enumerate(odd):
        observer.execute(
            "INSERT INTO pg_layer_client (address, expires_at, lease, counters) VALUES"
            " ('asgi!' || %s::text, clock_timestamp() + interval '1 minute', 60, %s)",
            (f"odd{number}", counters),
        )
    assert look(migrated_dsn)["drops"]["dropped_full"] == 3
    assert "Dropped by live clients: dropped_full 3" in "\n".join(read_text(migrated_dsn)[1])


def test_status_lease_without_end_is_unknown(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute")
    observer.execute("UPDATE pg_layer_client SET expires_at = 'infinity'")
    shown = look(migrated_dsn)
    [client] = shown["clients"]["list"]
    assert shown["ok"]
    assert (client["lease_age"], client["lease_left"]) == (None, None)
    [line] = [line for line in read_text(migrated_dsn)[1] if "host-of-one" in line]
    assert re.search(r"unknown +for ever", line)


def test_status_shows_dead_rows(migrated_dsn: str, observer: Observer) -> None:
    observer.execute("ALTER TABLE pg_layer_message SET (autovacuum_enabled = false)")
    observer.execute(
        "SELECT pg_layer_send('jobs', '{\"type\": \"test\"}') FROM generate_series(1, 50)"
    )
    observer.execute("DELETE FROM pg_layer_message WHERE id % 5 > 0")
    observer.execute("SELECT pg_stat_force_next_flush()")
    observer.execute("SELECT 1")

    def rows() -> tuple[int, int]:
        [table] = [
            each for each in look(migrated_dsn)["tables"] if each["name"] == "pg_layer_message"
        ]
        return table["rows"], table["dead_rows"]

    eventually(lambda: rows() == (10, 40), "counted")


# ---------------------------------------------------------------------- connections


def test_status_counts_connections_of_a_client(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute")
    add_client(observer, "two", "1 minute")
    config = load({"dsn": migrated_dsn})
    with (
        psycopg.connect(**connection_kwargs(config, "pool", "one")) as first,
        psycopg.connect(**connection_kwargs(config, "listen", "one")),
        psycopg.connect(**connection_kwargs(config, "pool")),
    ):
        assert first.execute("SHOW application_name").fetchone() == ("pg_layer one",)
        shown = look(migrated_dsn)["clients"]["list"]
        assert {client["id"]: client["connections"] for client in shown} == {"one": 2, "two": 0}


async def test_status_counts_connections_of_a_layer(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, processes: Processes
) -> None:
    sweep(observer)
    other = processes.start(read, migrated_dsn, 1)
    await other.hear()
    layer = make_layer()
    await listen(layer)
    await asyncio.gather(*(layer.send("jobs", {"type": "test"}) for _ in range(20)))
    rows = observer.execute(
        "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'pg_layer%' GROUP BY 1"
    ).fetchall()
    clients = look(migrated_dsn)["clients"]["list"]
    assert {(f"pg_layer {client['id']}", client["connections"]) for client in clients} == set(rows)
    assert len(rows) == 2
    for _, connections in rows:
        assert 2 <= connections <= 3


@pytest.mark.parametrize("option", ["dsn", "listen_dsn"])
def test_status_connections_with_another_name_are_unknown(
    migrated_dsn: str, observer: Observer, option: str
) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute")
    named = make_conninfo(migrated_dsn, application_name="mine")
    config = {"dsn": migrated_dsn, option: named}
    settings = {
        "CHANNEL_LAYERS": {
            "default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": config}
        }
    }
    role: Any = "pool" if option == "dsn" else "listen"
    assert connection_kwargs(load(config), role, "one")["application_name"] == "mine"
    [client] = look(migrated_dsn, settings=settings)["clients"]["list"]
    assert client["connections"] is None
    result = manage(migrated_dsn, COMMAND[2], settings=settings)
    [line] = [line for line in result.stdout.splitlines() if "host-of-one" in line]
    assert line.split()[-2:] == ["?", "one"]


# ---------------------------------------------------------------------- all is not well


def use(observer: Observer, age: str, prefix: str = "asgi") -> None:
    """Insert what a process has left that has used the layer ``age`` ago, and ended."""
    add_client(observer, f"of-{prefix}", "-1 minute", "0 minutes")
    observer.execute(
        "UPDATE pg_layer_client SET address = %s || '!one',"
        " started_at = clock_timestamp() - %s::interval WHERE address = 'asgi!of-' || %s",
        (prefix, age, prefix),
    )


NEVER = "The tables have never been swept: run manage.py pg_layer_sweep."


async def test_status_without_a_sweep_within_an_hour_of_the_first_use_is_ok(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    use(observer, "3 hours", prefix="other")
    assert look(migrated_dsn)["ok"]  # right after the installation
    await listen(make_layer())
    await make_layer().send("jobs", {"type": "test"})
    assert look(migrated_dsn)["ok"]
    use(observer, "59 minutes")
    status, lines = read_text(migrated_dsn)
    assert (status, lines[0]) == (0, "ok")
    assert "Last sweep: never" in lines


def test_status_without_a_sweep_an_hour_after_the_first_use_is_a_problem(
    migrated_dsn: str, observer: Observer
) -> None:
    use(observer, "61 minutes")
    shown = look(migrated_dsn)
    assert shown["last_sweep_age"] is None
    assert shown["problems"] == [NEVER]
    status, lines = read_text(migrated_dsn)
    assert (status, lines[0]) == (1, f"problem: {NEVER}")
    assert "Last sweep: never" in lines
    assert look(migrated_dsn, "--sweep-age", "8000")["ok"]


def test_status_without_a_sweep_counts_a_message_as_use(
    migrated_dsn: str, observer: Observer
) -> None:
    """A process that only sends has no client in the table."""
    observer.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
    assert look(migrated_dsn)["ok"]
    observer.execute("UPDATE pg_layer_message SET sent_at = sent_at - interval '61 minutes'")
    assert look(migrated_dsn)["problems"] == [NEVER]


def test_status_without_a_sweep_in_a_restored_database_counts_its_use_there(
    migrated_dsn: str, observer: Observer
) -> None:
    """The rows are of last month. The first renewal after the restore finds a gap."""
    use(observer, "30 days")
    steady(observer, since="31 days")
    assert look(migrated_dsn)["problems"] == [NEVER]
    steady(observer, since="59 minutes")
    assert look(migrated_dsn)["ok"]
    steady(observer, since="61 minutes")
    assert look(migrated_dsn)["problems"] == [NEVER]


def test_status_old_sweep_is_a_problem(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer, "19 minutes")
    sweep(observer, "0 minutes", prefix="other")
    assert look(migrated_dsn)["ok"]
    assert not look(migrated_dsn, "--sweep-age", "1100")["ok"]
    sweep(observer, "125 minutes")
    shown = look(migrated_dsn)
    assert shown["problems"] == ["The last sweep was 2 h 5 min ago: run manage.py pg_layer_sweep."]
    assert shown["last_sweep_age"] == pytest.approx(7500, abs=100)
    assert look(migrated_dsn, "--sweep-age", "8000")["ok"]


def test_status_after_a_sweep_is_ok(migrated_dsn: str) -> None:
    assert manage(migrated_dsn, "pg_layer_sweep", "--once").returncode == 0
    assert look(migrated_dsn)["ok"]
    status, lines = read_text(migrated_dsn)
    assert (status, lines[0]) == (0, "ok")


def test_status_overdue_leases_are_a_problem(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "live", "1 minute")
    add_client(observer, "ended", "-2 hours", "2 hours")
    assert look(migrated_dsn)["ok"]
    add_client(observer, "late", "-150 seconds")
    add_client(observer, "later", "-30 seconds")
    shown = look(migrated_dsn)
    clients = shown["clients"]
    assert (clients["live"], clients["overdue"], clients["ended"]) == (1, 2, 1)
    assert [client["id"] for client in clients["list"]] == ["late", "later", "live"]
    assert clients["list"][0]["lease_left"] == pytest.approx(-150, abs=100)
    assert shown["problems"] == [
        "Overdue leases: 2 (process 77 on host-of-late, process 77 on host-of-later)."
    ]
    assert look(migrated_dsn, "--top", "1")["problems"] == [
        "Overdue leases: 2 (process 77 on host-of-late, ...)."
    ]
    # No client has renewed a lease meanwhile: the database may have been unavailable.
    assert manage(migrated_dsn, "pg_layer_sweep", "--once").returncode == 0
    assert look(migrated_dsn)["clients"]["overdue"] == 2
    # When their leases are over, a sweep removes their rows, and they have ended.
    steady(observer)
    assert manage(migrated_dsn, "pg_layer_sweep", "--once").returncode == 0
    after = look(migrated_dsn)
    assert not any("Overdue" in problem for problem in after["problems"])
    clients = after["clients"]
    assert (clients["overdue"], clients["ended"], clients["lost"]) == (0, 3, 2)


def test_status_lost_clients_are_a_problem_for_an_hour(
    migrated_dsn: str, observer: Observer
) -> None:
    """A sweep removes the lease of a process that is blocked. The process may still be blocked."""
    sweep(observer)
    for client, swept in (("new", "59 minutes"), ("old", "61 minutes"), ("closed", "1 minute")):
        ended = "1 minute" if client == "closed" else None
        add_client(observer, client, "-2 hours", ended)
        observer.execute(
            "UPDATE pg_layer_client SET swept_at = clock_timestamp() - %s::interval"
            " WHERE address = 'asgi!' || %s::text",
            (swept, client),
        )
    shown = look(migrated_dsn)
    assert (shown["clients"]["ended"], shown["clients"]["lost"]) == (3, 1)
    [problem] = shown["problems"]
    assert problem.startswith("Clients lost within 1 h: 1 (process 77 on host-of-new).")
    assert "0 overdue, 3 ended within a day, 1 lost within an hour" in "\n".join(
        read_text(migrated_dsn)[1]
    )


def test_status_client_without_notifications_is_a_problem(
    migrated_dsn: str, observer: Observer
) -> None:
    sweep(observer)
    add_client(observer, "a-listens", "1 minute", without_notifications=0)
    add_client(observer, "b-polls", "1 minute", without_notifications=1)
    add_client(observer, "c-older", "1 minute")
    add_client(observer, "d-ended", "1 minute", "1 minute", without_notifications=1)
    shown = look(migrated_dsn, "--top", "1")
    [client] = shown["clients"]["list"]
    assert (client["host"], client["has_notifications"]) == ("host-of-b-polls", False)
    assert shown["clients"]["polling"] == 1
    [problem] = shown["problems"]
    assert "polling: 1 (process 77 on host-of-b-polls)." in problem
    assert "listen_dsn" in problem
    [line] = [line for line in read_text(migrated_dsn)[1] if "  host-of-b-polls" in line]
    assert "no: polls" in line


def test_status_full_channel_is_a_problem(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    config = {"dsn": migrated_dsn, "channel_capacity": {"jobs": 3, "other": 3}}
    backend = {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": config}
    settings = {"CHANNEL_LAYERS": {"default": backend}}
    for channel, count in (("jobs", 3), ("other", 2), ("many", 5)):
        for _ in range(count):
            observer.execute("SELECT pg_layer_send(%s, %s)", (channel, '{"type": "test"}'))
    shown = look(migrated_dsn, "--top", "1", settings=settings)
    [channel] = shown["channels"]["list"]
    assert (channel["name"], channel["waiting"], channel["capacity"]) == ("many", 5, 100)
    [problem] = shown["problems"]
    assert problem.startswith("Full normal channels: 1 (jobs (3 of 3)). Start more workers")


async def test_status_lists_a_client_with_members_or_a_listener(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    sweep(observer)
    for listens in (True, False):
        layer = make_layer()
        await layer.send("jobs", {"type": "test"})
        assert look(migrated_dsn)["clients"]["list"] == []
        channel = await layer.new_channel()
        if listens:
            await listen(layer)
        else:
            await layer.group_add("room", channel)
        [client] = look(migrated_dsn)["clients"]["list"]
        assert (client["host"], client["pid"]) == (socket.gethostname(), os.getpid())
        await layer.close()


def test_status_full_notify_queue_is_a_problem() -> None:
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        migrate(server.dsn())
        with psycopg.connect(server.dsn(), autocommit=True) as observer:
            sweep(observer)
        assert look(server.dsn())["ok"]
        with full_queue(server.dsn()):
            shown = look(server.dsn())
            assert 0.5 < shown["notify_queue_usage"] <= 1
            [problem] = shown["problems"]
            assert re.match(r"\d+% of NOTIFY's queue is used", problem)


def migrate(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        for file in sorted(MIGRATIONS.glob("*.sql")):
            if not file.stem.endswith("_reverse"):
                connection.execute(file.read_bytes())


def test_status_by_call_command_raises_for_problems(migrated_dsn: str, observer: Observer) -> None:
    use(observer, "2 hours")
    layer = PostgresChannelLayer()
    with configured(layer, DATABASES={"default": postgres(migrated_dsn)}):
        apps.populate([])
        shown = StringIO()
        with pytest.raises(CommandError, match="The tables have never been swept") as raised:
            call_command(pg_layer_status.Command(), stdout=shown)
        assert raised.value.returncode == 1
        assert shown.getvalue().startswith("problem: The tables have never been swept")
        sweep(observer)
        call_command(pg_layer_status.Command(), stdout=StringIO())


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "JSON"])
def test_status_unreachable_database_is_a_problem(
    migrated_dsn: str, fresh_database: str, arguments: list[str]
) -> None:
    gone = make_conninfo(migrated_dsn, dbname="not_there")
    for dsn, complaint in ((gone, "not_there"), (fresh_database, "migrate pg_layer")):
        result = manage(dsn, COMMAND[2], *arguments)
        assert (result.returncode, result.stderr) == (1, "")
        [line] = result.stdout.splitlines()
        assert complaint in line
        if arguments:
            shown = json.loads(line)
            assert shown == {"ok": False, "problems": [shown["problems"][0]]}
        else:
            assert line.startswith("problem: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--top", "0"], "'0' is not an integer from 1"),
        (["--watch", "0"], "'0' is not a number of seconds"),
        (["--sweep-age", "soon"], "'soon' is not a number of seconds"),
        (["--layer", "jobs"], "CommandError: CHANNEL_LAYERS has no channel layer 'jobs'."),
    ],
)
def test_status_invalid_arguments_are_refused(
    migrated_dsn: str, arguments: list[str], complaint: str
) -> None:
    result = manage(migrated_dsn, COMMAND[2], *arguments)
    assert result.returncode != 0
    assert result.stdout == ""
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------- as text


def fill(observer: Observer) -> None:
    sweep(observer)
    add_client(observer, "one", "1 minute", dropped_full=3)
    observer.execute(
        "UPDATE pg_layer_client SET host = E'\\x1b[31mred\\n[bold]' WHERE address = 'asgi!one'"
    )
    observer.execute(
        "INSERT INTO pg_layer_membership"
        " VALUES ('room', 'asgi!one', 'a.one!1', 0, true, 'infinity')"
    )
    observer.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")


PARTS = [
    "ok",
    "Clients: 1 live, 0 overdue, 0 ended within a day",
    "?[31mred?[bold]",
    "77",
    "Groups: 1, with 1 members",
    "room",
    "Normal channels with a backlog: 1, with 1 messages",
    "jobs",
    "dropped_full 3, dropped_expired 0, dropped_undecodable 0, refused_full 0",
    "pg_layer_membership",
    "NOTIFY's queue: 0.00% used",
    "Last sweep: ",
]


@pytest.mark.parametrize("has_rich", [True, False], ids=["rich", "without rich"])
def test_status_text_and_tables_have_equal_content(
    migrated_dsn: str, observer: Observer, has_rich: bool
) -> None:
    fill(observer)
    start = COMMAND if has_rich else ("-c", WITHOUT_RICH)
    result = subprocess.run(
        [sys.executable, "-X", "dev", *start, "--force-color"],
        cwd=ROOT,
        env={**environment(migrated_dsn), "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("━" in result.stdout) == has_rich
    text = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
    assert "\x1b" not in text
    for part in PARTS:
        assert part in text
    assert text.startswith("ok\n")


def test_status_without_a_terminal_is_plain_text(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    with_it = run(migrated_dsn, *COMMAND)
    without_it = run(migrated_dsn, "-c", WITHOUT_RICH)
    for result in (with_it, without_it):
        assert (result.returncode, result.stderr) == (0, "")
        assert "\x1b" not in result.stdout
        for part in PARTS:
            assert part in result.stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400 * 3 + 4 * 3600 + 59, "3 d 4 h"),
    ],
)
def test_in_words_uses_the_two_largest_units(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_in_bytes_uses_the_largest_unit() -> None:
    assert [
        status_text._in_bytes(size) for size in (0, 1023, 1024, 5 * 2**20, 3 * 2**30, 2**41)
    ] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "5 MiB",
        "3 GiB",
        "2.0 TiB",
    ]


# ---------------------------------------------------------------------- the documentation


def keys(shown: Any, path: str = "") -> Iterator[str]:
    if isinstance(shown, dict):
        for name, value in shown.items():
            yield f"{path}{name}"
            yield from keys(value, f"{path}{name}.")
    elif isinstance(shown, list) and shown and isinstance(shown[0], dict):
        yield from keys(shown[0], path[:-1] + "[].")


def test_status_json_keys_are_documented(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    told = [
        key
        for key in keys(look(migrated_dsn))
        if key not in ("clients", "groups", "channels", "drops")
    ]
    documented = re.findall(r"^\| `([\w.\[\]]+)` \|", OPERATIONS.split("### JSON")[1], re.MULTILINE)
    assert sorted(documented) == sorted(told)


def test_status_options_are_documented() -> None:
    (usage,) = re.findall(r"manage\.py pg_layer_status (\[.*?)```", OPERATIONS, re.DOTALL)
    from pg_layer.management.commands.pg_layer_status import Command

    parser = Command().create_parser("manage.py", "pg_layer_status")
    own = {"--layer", "--json", "--watch", "--top", "--sweep-age"}
    assert set(re.findall(r"\[(--[\w-]+)", usage)) == own
    assert own <= {option for action in parser._actions for option in action.option_strings}


def test_as_dict_contains_all_fields() -> None:
    status = Status(
        clients=[],
        live_clients=1,
        overdue_clients=2,
        ended_clients=3,
        lost=["process 5 on a"],
        lost_clients=2,
        polling_clients=1,
        groups=[],
        all_groups=4,
        all_members=5,
        channels=[],
        all_channels=6,
        all_waiting=7,
        full_channels=[ChannelStatus("jobs", 7, 1.0, 7)],
        drops={"dropped_full": 8},
        failing_tasks=10,
        tables=[],
        notify_queue_usage=0.51,
        last_sweep_age=9.0,
        first_use_age=None,
        role_problems=[],
    )
    assert status.as_dict(10) == {
        "ok": False,
        "problems": status.problems(10),
        "clients": {"live": 1, "overdue": 2, "ended": 3, "lost": 2, "polling": 1, "list": []},
        "groups": {"count": 4, "members": 5, "list": []},
        "channels": {"count": 6, "waiting": 7, "list": []},
        "drops": {"dropped_full": 8},
        "failing_tasks": 10,
        "tables": [],
        "notify_queue_usage": 0.51,
        "last_sweep_age": 9.0,
    }
    assert len(status.problems(10)) == 6
    assert len(status.problems(8)) == 7


# ---------------------------------------------------------------------- again and again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [["0.05"], ["3600"], []], ids=["often", "seldom", "by default"])
def test_watch_ends_with_a_signal(
    migrated_dsn: str, observer: Observer, number: signal.Signals, seconds: list[str]
) -> None:
    sweep(observer)
    with started(migrated_dsn, *COMMAND, "--watch", *seconds) as process:
        process.expect("ok")
        process.expect("pg_layer_last_sweep")
        if seconds == ["0.05"]:
            process.expect("ok")
            sweep(observer, "1 hour")
            process.expect("problem: The last sweep was 1 h")
        assert process.end(number) == 0
    assert process.errors == []


def test_watch_without_a_terminal_prints_times(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    begun = datetime.now().astimezone().replace(microsecond=0)
    with started(migrated_dsn, *COMMAND, "--watch", "0.05") as process:
        for _ in range(2):
            looked = datetime.fromisoformat(process.expect("T"))
            assert begun <= looked <= datetime.now().astimezone()
            assert process.expect("") == "ok"
            process.expect("pg_layer_last_sweep")
        assert process.end(signal.SIGTERM) == 0
    assert process.errors == []


def test_watch_json_prints_a_line_each_time(migrated_dsn: str, observer: Observer) -> None:
    sweep(observer)
    with started(migrated_dsn, *COMMAND, "--watch", "0.05", "--json") as process:
        assert json.loads(process.expect("{"))["ok"] is True
        sweep(observer, "1 hour")
        assert json.loads(process.expect('"ok": false'))["problems"]
        assert process.end(signal.SIGTERM) == 0
    assert process.errors == []


def test_watch_continues_during_an_outage() -> None:
    with PostgresServer(fsync=False) as server:
        migrate(server.dsn())
        with psycopg.connect(server.dsn(), autocommit=True) as observer:
            sweep(observer)
        with started(server.dsn(), *COMMAND, "--watch", "0.05") as process:
            process.expect("ok")
            server.stop()
            process.expect("problem: The database could not be reached")
            server.start()
            process.expect("ok")
            assert process.end(signal.SIGTERM) == 0
        assert process.errors == []


@contextmanager
def on_a_terminal(dsn: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    popen = subprocess.Popen(
        [sys.executable, "-X", "dev", *arguments],
        cwd=ROOT,
        env={**environment(dsn), "COLUMNS": "120", "LINES": "12", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield popen, ours
    finally:
        popen.kill()
        popen.wait()
        os.close(ours)


@pytest.mark.parametrize("has_rich", [True, False], ids=["rich", "without rich"])
def test_watch_on_a_terminal_repaints_the_first_lines(
    migrated_dsn: str, observer: Observer, has_rich: bool
) -> None:
    fill(observer)
    start = COMMAND if has_rich else ("-c", WITHOUT_RICH)
    with on_a_terminal(migrated_dsn, *start, "--watch", "0.05") as (popen, terminal):
        seen = b""
        while seen.count(b"\x1b[H\x1b[2J") < 3:
            seen += os.read(terminal, 65536)
        popen.send_signal(signal.SIGTERM)
        while True:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
        assert popen.wait() == 0
    frame = seen.decode().split("\x1b[H\x1b[2J")[1]
    assert "Traceback" not in seen.decode()
    assert frame.count("\n") == 11
    assert ("━" in frame) == has_rich
    assert re.sub(r"\x1b\[[\d;]*m", "", frame).startswith("ok\r\n")


def test_status_extra_is_documented(tmp_path: Path) -> None:
    assert re.search(r'^status = \["rich', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "pg-layer[status]" in OPERATIONS
