"""``manage.py pg_layer_sweep`` as its users run it: a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from devtools.postgres import PostgresServer
from tests.conftest import MakeLayer
from tests.project.commands import run

AGED = """
    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
    SELECT 'asgi!:old', 1, 'old', 'x', now() - interval '1 hour' FROM generate_series(1, %s)
"""
LEFT_BEHIND = """
    INSERT INTO pg_layer_client (inbox, expires_at) VALUES ('asgi!dead', now() - interval '1 minute'),
        ('asgi!forgotten', now() - interval '2 days'), ('asgi!alive', now() + interval '1 hour');
    INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at) VALUES
        ('room', 'asgi!dead', 'specific.dead!1', 'infinity'),
        ('room', 'asgi!alive', 'specific.alive!1', 'infinity'),
        ('room', 'asgi!alive', 'specific.alive!2', now() - interval '1 minute');
    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at) VALUES
        ('asgi!dead', 1, 'specific.dead!1', 'x', now() + interval '1 hour'),
        ('asgi!alive', 1, 'specific.alive!1', 'x', now() + interval '1 hour'),
        ('other!dead', 1, 'specific.dead!1', 'x', now() - interval '1 hour')
"""


def sweep(dsn: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(dsn, "-m", "tests.project.manage", "pg_layer_sweep", *options)


@contextmanager
def sweeping(dsn: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A sweeper that has said that it sweeps."""
    command = [sys.executable, "-u", "-m", "tests.project.manage", "pg_layer_sweep", *options]
    environment = {
        **os.environ,
        "PG_LAYER_TEST_PROJECT_DSN": dsn,
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            hear(process, "Sweeping every")
            yield process
        finally:
            process.kill()


def hear(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if what in line:
            return line
    raise AssertionError(f"The sweeper ended without saying {what!r}.")


def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(query).fetchall()


def execute(dsn: str, query: str, *values: object) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute(query, values or None)


def test_it_removes_what_is_over_and_nothing_else(migrated_dsn: str) -> None:
    execute(migrated_dsn, LEFT_BEHIND)
    execute(migrated_dsn, AGED, 3)
    result = sweep(migrated_dsn, "--once")
    assert (result.returncode, result.stdout) == (0, "Removed 4 messages, 2 memberships, 1 clients.\n")
    assert rows(migrated_dsn, "SELECT inbox FROM pg_layer_message ORDER BY 1") == [
        ("asgi!alive",),
        ("other!dead",),
    ]
    assert rows(migrated_dsn, "SELECT channel FROM pg_layer_membership") == [("specific.alive!1",)]
    assert rows(migrated_dsn, "SELECT inbox FROM pg_layer_client ORDER BY 1") == [
        ("asgi!alive",),
        ("asgi!dead",),
    ]


def test_a_dry_run_says_it_and_does_nothing(migrated_dsn: str) -> None:
    execute(migrated_dsn, LEFT_BEHIND)
    result = sweep(migrated_dsn, "--dry-run")
    assert (result.returncode, result.stdout) == (0, "Would remove 1 messages, 2 memberships, 1 clients.\n")
    assert rows(migrated_dsn, "SELECT count(*) FROM pg_layer_message") == [(3,)]


def test_much_is_removed_in_batches(migrated_dsn: str) -> None:
    execute(migrated_dsn, AGED, 20_000)
    result = sweep(migrated_dsn, "--once", "--batch-size", "3000")
    assert result.stdout == "Removed 20000 messages, 0 memberships, 0 clients.\n"
    assert rows(migrated_dsn, "SELECT count(*) FROM pg_layer_message") == [(0,)]


def test_what_somebody_else_holds_is_left_for_the_next_time(migrated_dsn: str) -> None:
    execute(migrated_dsn, AGED, 2)
    with psycopg.connect(migrated_dsn) as conn:
        conn.execute("SELECT FROM pg_layer_message ORDER BY id LIMIT 1 FOR UPDATE")
        assert "Removed 1 messages" in sweep(migrated_dsn, "--once").stdout
    assert "Removed 1 messages" in sweep(migrated_dsn, "--once").stdout


def test_verbosity_0_says_nothing(migrated_dsn: str) -> None:
    execute(migrated_dsn, AGED, 1)
    result = sweep(migrated_dsn, "--once", "--verbosity", "0")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert rows(migrated_dsn, "SELECT count(*) FROM pg_layer_message") == [(0,)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_in_order(migrated_dsn: str, number: signal.Signals) -> None:
    with sweeping(migrated_dsn) as process:
        process.send_signal(number)
        hear(process, "Stopped.")
        assert process.wait(20) == 0


def test_two_at_once_share_the_work(migrated_dsn: str) -> None:
    with (
        sweeping(migrated_dsn, "--interval", "0.05") as one,
        sweeping(migrated_dsn, "--interval", "0.05") as two,
    ):
        execute(migrated_dsn, AGED, 5000)
        with psycopg.connect(migrated_dsn, autocommit=True) as conn:
            while conn.execute("SELECT count(*) FROM pg_layer_message").fetchone() != (0,):
                pass
        for process in (one, two):
            process.send_signal(signal.SIGTERM)
        total = 0
        for process in (one, two):
            assert process.stdout is not None
            total += sum(int(line.split()[1]) for line in process.stdout if line.startswith("Removed"))
            assert process.wait(20) == 0
    assert total == 5000


def test_it_waits_out_a_restart_of_the_database() -> None:
    with PostgresServer(fsync=False) as server:
        dsn = server.create_database("swept")
        assert run(dsn, "-m", "tests.project.manage", "migrate").returncode == 0
        with sweeping(dsn, "--interval", "0.05") as process:
            server.stop()
            hear(process, "Could not sweep, trying again")
            server.start()
            execute(dsn, AGED, 7)
            assert hear(process, "Removed").startswith("Removed 7 messages")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--interval", "0"], "'0' is not a number of seconds above 0"),
        (["--interval", "soon"], "'soon' is not a number of seconds above 0"),
        (["--batch-size", "0"], "'0' is not a number from 1 on"),
        (["--layer", "other"], "There is no channel layer 'other' in CHANNEL_LAYERS."),
    ],
)
def test_misuse_is_told(migrated_dsn: str, options: list[str], complaint: str) -> None:
    result = sweep(migrated_dsn, *options)
    assert result.returncode != 0
    assert complaint in result.stderr


def test_missing_tables_are_told(fresh_database: str) -> None:
    result = sweep(fresh_database, "--once")
    assert result.returncode == 1
    assert "python manage.py migrate pg_layer" in result.stderr


async def test_serving_processes_sweep_by_themselves(migrated_dsn: str, make_layer: MakeLayer) -> None:

    execute(migrated_dsn, AGED, 10)
    layer = make_layer(sweep_interval=0.1, heartbeat=0.1)
    receiving = asyncio.create_task(layer.receive(await layer.new_channel()))
    async with await psycopg.AsyncConnection.connect(migrated_dsn, autocommit=True) as conn:
        left = None
        while left != (0, ""):
            cursor = await conn.execute("SELECT count(*), pg_sleep(0.02)::text FROM pg_layer_message")
            left = await cursor.fetchone()
    receiving.cancel()
