"""Roles that only send, receive or watch. None of their privileges is superfluous."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pg_layer import ChannelFull, LayerUnavailable, PostgresChannelLayer
from pg_layer._db.queries import access, groups, lease, maintenance, send
from pg_layer._db.queries import receive as reading
from pg_layer._db.session import Session
from pg_layer._db.statement import Statement
from pg_layer._messages.rows import Key, KeyAt, Span
from pg_layer._state import log_events
from pg_layer._state.capacity import LowIds
from pg_layer._state.snapshot import Moment, Snapshot
from tests.conftest import MakeLayer, Observer
from tests.integration.test_sweeper import steady
from tests.logs import records
from tests.processes import listen, receive, until
from tests.project.commands import django, manage, succeeded

PERMISSIONS = (Path(__file__).parents[2] / "docs" / "reference" / "permissions.md").read_text(
    encoding="utf-8"
)
PASSWORD = "only for tests"

MakeRole = Callable[[str], str]
Operation = Callable[[Session], Awaitable[object]]


def grants_of(name: str) -> list[str]:
    """Return the statements of the documentation about a role."""
    blocks = re.findall(r"```sql\n(.*?)```", PERMISSIONS, re.DOTALL)
    [block] = [block for block in blocks if name in block]
    return [statement for statement in block.split(";") if statement.strip()]


@pytest.fixture
def make_role(migrated_dsn: str, observer: Observer) -> Iterator[MakeRole]:
    """Return a function that makes a role of the documentation, or one without privileges.

    The function returns the connection string of the role.
    """
    made = []

    def make(name: str) -> str:
        role = f"{name}_{observer.info.dbname}"
        observer.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                sql.Identifier(role), sql.Literal(PASSWORD)
            )
        )
        made.append(sql.Identifier(role))
        for grant in grants_of(name) if name != "nobody" else ():
            observer.execute(grant.replace(name, f'"{role}"').encode())
        return make_conninfo(migrated_dsn, user=role, password=PASSWORD)

    yield make
    for role in made:
        observer.execute(
            sql.SQL(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {}"
            ).format(sql.Literal(role.as_string(observer).strip('"')))
        )
        observer.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


@pytest.fixture
def sender_dsn(make_role: MakeRole) -> str:
    return make_role("layer_sender")


@pytest.fixture
def receiver_dsn(make_role: MakeRole) -> str:
    return make_role("layer_receiver")


async def numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


def number(n: int, size: int = 0) -> dict[str, Any]:
    return {"type": "test", "number": n, "pad": bytes(size)}


# ---------------------------------------------------------------------- roles that only send


async def test_sender_role_sends_in_every_way(make_layer: MakeLayer, sender_dsn: str) -> None:
    layer, sender = make_layer(), make_layer(dsn=sender_dsn)
    own, member = await layer.new_channel(), await layer.new_channel()
    for channel in (member, "members"):
        await layer.group_add("room", channel)
    await listen(layer)
    for n, size in enumerate((0, 10_000)):  # one by one
        for channel in (own, "jobs"):
            await sender.send(channel, number(n, size))
        await sender.group_send("room", number(n, size), exclude="specific.nobody!1")
    await asyncio.gather(*(sender.send(own, number(n)) for n in range(2, 30)))  # in batches
    await asyncio.gather(*(sender.send("jobs", number(n)) for n in range(2, 30)))
    await asyncio.gather(*(sender.group_send("room", number(n)) for n in range(2, 30)))
    pairs = [(number(n), number(n, 6000)) for n in (30, 32)]
    for small, large in pairs:
        assert (
            await sender.send_many([(own, small), ("jobs", small), (own, large), ("jobs", large)])
            == [True] * 4
        )
        assert await sender.group_send_many([("room", small), ("room", large)]) == [True] * 2
    expected = [*range(30), 30, 30, 32, 32]
    for channel in (own, "jobs", member, "members"):
        assert await numbers(layer, channel, len(expected)) == expected
    assert (await sender.health())["problems"] == []


async def test_sender_role_full_channel_raises_channel_full(
    make_layer: MakeLayer, sender_dsn: str
) -> None:
    sender = make_layer(dsn=sender_dsn, capacity=2)
    assert await sender.send_many([("jobs", number(n)) for n in range(3)]) == [True, True, False]
    with pytest.raises(ChannelFull):
        await sender.send("jobs", number(3))


async def test_sender_role_sends_from_sql(
    make_layer: MakeLayer, make_role: MakeRole, sender_dsn: str
) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await layer.group_add("room", "members")
    with psycopg.connect(sender_dsn) as caller:
        for n, size in enumerate((0, 10_000)):
            message = f'{{"type": "test", "number": {n}, "pad": "{"x" * size}"}}'
            for channel in (own, "jobs"):
                caller.execute("SELECT pg_layer_send(%s, %s)", (channel, message))
            caller.execute("SELECT pg_layer_group_send('room', %s)", (message,))
    for channel in (own, "jobs", member, "members"):
        assert await numbers(layer, channel, 2) == [0, 1]
    with (
        psycopg.connect(make_role("nobody")) as nobody,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        nobody.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")


async def test_sender_role_sends_in_transactions_of_django(
    make_layer: MakeLayer, sender_dsn: str
) -> None:
    layer = make_layer()
    await layer.group_add("room", "members")
    code = """
from channels.layers import get_channel_layer
from django.db import transaction

sync = get_channel_layer().sync

def send(n):
    message = {"type": "test", "number": n}
    sync.send("jobs", message)
    sync.send_many([("jobs", message), ("jobs", message)])
    sync.group_send("room", message)
    sync.group_send_many([("room", message), ("room", message)])

send(1)
with transaction.atomic():
    send(2)
"""
    await asyncio.to_thread(django, sender_dsn, code)
    for channel in ("jobs", "members"):
        assert await numbers(layer, channel, 6) == [1, 1, 1, 2, 2, 2]


ME = "specific.0123456789abcdef!1"
MY_ADDRESS = "asgi!0123456789abcdef"
REQUEST = (
    "SELECT pg_layer_request_memberships("
    "'asgi', '{room}', '{%s}', '{%s}', 60, '{1}', 10, false, false)"
)
NOT_FOR_SENDERS = [
    "SELECT payload FROM pg_layer_message",
    "SELECT excluded FROM pg_layer_message",
    "SELECT * FROM pg_layer_message",
    "INSERT INTO pg_layer_message (address, xid, boot, expires_at) VALUES ('x', '1', 0, 'infinity')"
    " RETURNING payload",
    "COPY pg_layer_message TO STDOUT",
    "UPDATE pg_layer_message SET address = 'mine'",
    "UPDATE pg_layer_message SET expires_at = 'infinity'",
    "DELETE FROM pg_layer_message",
    "TRUNCATE pg_layer_message",
    # Change memberships and forge control messages.
    "INSERT INTO pg_layer_membership VALUES ('room', 'x', 'y', 0, true, 'infinity')",
    "DELETE FROM pg_layer_membership",
    "INSERT INTO pg_layer_message (address, xid, boot, kind, expires_at)"
    " VALUES ('x', '1', 0, 'add', 'infinity')",
    "INSERT INTO pg_layer_client (address, expires_at, lease) VALUES ('x', 'infinity', 60)",
    "SELECT * FROM pg_layer_client",
    "UPDATE pg_layer_client SET expires_at = 'infinity'",
    "UPDATE pg_layer_lease_clock SET steady_since = '-infinity'",
    "INSERT INTO pg_layer_lease_clock VALUES ('x', 0, 60, now(), now())",
    "UPDATE pg_layer_boot SET boot = boot + 1",
    "DELETE FROM pg_layer_boot",
    f"SELECT pg_layer_begin_boot({10**15})",
    "SELECT nextval('pg_layer_message_id_seq')",
    f"SELECT pg_layer_renew('asgi', '{MY_ADDRESS}', 'h', 1, 60, 0, '{{}}', NULL, 0, 0, 0)",
    "SELECT pg_layer_claim('asgi', 'jobs', (SELECT min(address) FROM pg_layer_client), 99, 0, 1)",
    f"SELECT pg_layer_release('asgi', '{MY_ADDRESS}', NULL, '{{1}}', '{{1}}', '{{1}}')",
    f"SELECT pg_layer_delete('{MY_ADDRESS}', '{{1}}', '{{1}}', '{{1}}')",
    f"SELECT pg_layer_delete_received('{MY_ADDRESS}', pg_current_snapshot(), '{{}}')",
    REQUEST % (ME, "true"),
    REQUEST % (ME, "false"),
    REQUEST % ("jobs", "true"),
    f"SELECT pg_layer_write_memberships('{MY_ADDRESS}', 0, '{{room}}', '{{{ME}}}',"
    f" '{{NULL}}', '{{}}',"
    " '{}', '{}', '{}', '{}')",
    f"SELECT pg_layer_close('asgi', '{MY_ADDRESS}')",
    f"SELECT pg_layer_flush('asgi', '{MY_ADDRESS}')",
    "SELECT pg_layer_sweep('asgi', 10, false, 0)",
    "SELECT pg_layer_delete_expired(0, 10)",
    "CREATE FUNCTION pg_layer_send(text, jsonb) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
]
NOT_FOR_RECEIVERS = [
    "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
    " VALUES ('x', '1', 0, 'y', 'infinity')",
    *(
        f"UPDATE pg_layer_message SET {column} = {column}"
        for column in ("payload", "channel", "excluded", "kind", "expires_at", "sent_at")
    ),
    "UPDATE pg_layer_message SET id = DEFAULT",
    "TRUNCATE pg_layer_message",
    "SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')",
    "SELECT pg_layer_group_send('room', '{\"type\": \"test\"}')",
    "SELECT pg_layer_send_one('asgi', 'jobs', '{}', 60, 100, 0, true, false)",
    "SELECT pg_layer_send_batch('asgi', '{jobs}', '{\"{}\"}', '{60}', '{100}', NULL, NULL,"
    " true, false)",
    "SELECT pg_layer_group_send_one('asgi', 'room', '{}', 60, NULL, true)",
    "SELECT pg_layer_group_send_batch('asgi', '{room}', '{\"{}\"}', '{60}', '{NULL}', true, false)",
    REQUEST % (ME, "true"),
    REQUEST % (ME, "false"),
    f"SELECT pg_layer_flush('asgi', '{MY_ADDRESS}')",
    "ALTER TABLE pg_layer_message DISABLE TRIGGER ALL",
]


@pytest.mark.parametrize(
    ("name", "attempts"),
    [("layer_sender", NOT_FOR_SENDERS), ("layer_receiver", NOT_FOR_RECEIVERS)],
    ids=["sender", "receiver"],
)
async def test_role_statement_without_privilege_is_denied(
    make_layer: MakeLayer, make_role: MakeRole, observer: Observer, name: str, attempts: list[str]
) -> None:
    layer = make_layer()
    await layer.group_add("room", await layer.new_channel())
    await layer.group_add("room", "jobs")
    await layer.group_send("room", number(1))
    everything = (
        b"SELECT m.*, (SELECT count(*) FROM pg_layer_membership)"
        b" FROM pg_layer_message AS m ORDER BY id"
    )
    before = observer.execute(everything).fetchall()
    assert len(before) == 2
    with psycopg.connect(make_role(name), autocommit=True) as conn:
        permitted = [attempt for attempt in attempts if not is_refused(conn, attempt)]
    assert permitted == []
    assert observer.execute(everything).fetchall() == before


def is_refused(conn: psycopg.Connection[Any], attempt: str) -> bool:
    try:
        conn.execute(attempt.encode())
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


async def test_role_call_without_privilege_raises_layer_unavailable(
    make_layer: MakeLayer, sender_dsn: str, receiver_dsn: str
) -> None:
    layer, sender, receiver = make_layer(), make_layer(dsn=sender_dsn), make_layer(dsn=receiver_dsn)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for attempt in (
        sender.group_add("room", channel),
        sender.group_discard("room", channel),
        sender.flush(),
        receiver.send(channel, number(1)),
        receiver.send("jobs", number(1)),
        receiver.group_send("room", number(1)),
        receiver.group_add("room", channel),
        receiver.flush(),
    ):
        with pytest.raises(
            LayerUnavailable, match=r"permission denied for (table|sequence) pg_layer_"
        ):
            await attempt


# ---------------------------------------------------------------------- roles that only receive


async def test_receiver_role_receives(
    make_layer: MakeLayer, observer: Observer, receiver_dsn: str
) -> None:
    sender, receiver = make_layer(), make_layer(dsn=receiver_dsn)
    own, member = await receiver.new_channel(), await receiver.new_channel()
    for channel in (own, member, "jobs"):
        await receiver.group_add("room", channel)
    await receiver.group_discard("room", own)
    for n, size in enumerate((0, 10_000, 0, 100_000)):
        await sender.send(own, number(n, size))
        await sender.send("mail", number(n, size))
        await sender.group_send("room", number(n, size))
    for channel in (own, member, "mail", "jobs"):
        assert await numbers(receiver, channel, 4) == [0, 1, 2, 3]
    assert await receiver.group_count("room") == 2
    assert (await receiver.health())["problems"] == []
    left = b"SELECT FROM pg_layer_message WHERE address NOT LIKE '%!@%'"  # those of groups expire
    await until(lambda: observer.execute(left).fetchall() == [])
    await receiver.close()
    assert observer.execute("SELECT channel FROM pg_layer_membership").fetchall() == [("jobs",)]


async def test_receiver_role_workers_claim_and_release_jobs(
    make_layer: MakeLayer, receiver_dsn: str
) -> None:
    sender = make_layer(capacity=1000)
    workers = [make_layer(dsn=receiver_dsn, capacity=1000) for _ in range(2)]
    for n in range(100):
        await sender.send("jobs", number(n))
    done = await numbers(workers[0], "jobs", 30)  # it has claimed more jobs
    await workers[0].close()
    done += await numbers(workers[1], "jobs", 70)
    assert done == list(range(100))


def test_receiver_role_runs_the_sweeper(observer: Observer, receiver_dsn: str) -> None:
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, expires_at)"
        " VALUES ('asgi!:jobs', pg_current_xact_id(), 0, '-infinity');"
        "INSERT INTO pg_layer_membership"
        " VALUES ('room', 'asgi!gone', 'a.gone!1', 0, true, 'infinity');"
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        " VALUES ('asgi!gone', '-infinity', 60)"
    )
    steady(observer)
    for option in ("--dry-run", "--once"):
        succeeded(manage(receiver_dsn, "pg_layer_sweep", option, "--once"))
    for table in ("message", "membership"):
        assert observer.execute(f"SELECT count(*) FROM pg_layer_{table}".encode()).fetchone() == (
            0,
        )


async def test_user_role_calls_everything(
    make_layer: MakeLayer, make_role: MakeRole, observer: Observer
) -> None:
    dsn = make_role("layer_user")
    one, other = make_layer(dsn=dsn), make_layer(dsn=dsn)
    channel = await one.new_channel()
    await listen(one)
    await other.group_add("room", channel)
    await other.group_send("room", number(1))
    assert await numbers(one, channel, 1) == [1]
    await other.send("jobs", number(2))
    assert await numbers(one, "jobs", 1) == [2]
    await one.flush()
    await one.close()
    succeeded(await asyncio.to_thread(manage, dsn, "pg_layer_sweep", "--once"))
    await asyncio.to_thread(all_is_shown, dsn)
    shown = await asyncio.to_thread(
        django, dsn, ADMIN_LISTS, settings={"INSTALLED_APPS": ADMIN_APPS}
    )
    assert shown.split() == ["Client", "Group", "Message"]


# ---------------------------------------------------------------------- roles that only watch

ADMIN_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "pg_layer",
]
ADMIN_LISTS = """
from django.contrib import admin
from django.test import RequestFactory

for model, page in admin.site._registry.items():
    if model._meta.app_label == "pg_layer":
        list(page.get_queryset(RequestFactory().get("/")))
        print(model.__name__)
"""


def all_is_shown(dsn: str) -> None:
    assert succeeded(manage(dsn, "pg_layer_status")).startswith("ok\n")
    assert "no issues" in succeeded(manage(dsn, "check", "--database", "default"))


def test_watcher_role_sees_the_status(observer: Observer, make_role: MakeRole) -> None:
    dsn = make_role("layer_watcher")
    observer.execute("INSERT INTO pg_layer_last_sweep VALUES ('asgi', clock_timestamp())")
    all_is_shown(dsn)
    observer.execute(
        "DELETE FROM pg_layer_last_sweep"
    )  # the check then reads the first use of the layer
    assert "no issues" in succeeded(manage(dsn, "check", "--database", "default"))
    with psycopg.connect(dsn, autocommit=True) as conn:
        for attempt in ("SELECT payload FROM pg_layer_message", "DELETE FROM pg_layer_client"):
            assert is_refused(conn, attempt)
        role = conn.info.user
    observer.execute(f'GRANT SELECT ON pg_layer_message TO "{role}"'.encode())
    assert len(django(dsn, ADMIN_LISTS, settings={"INSTALLED_APPS": ADMIN_APPS}).split()) == 3


def test_commands_without_privileges_report_the_denial(
    observer: Observer, make_role: MakeRole
) -> None:
    dsn = make_role("nobody")
    refused = "The database refused the call: permission denied for table pg_layer_"
    results = [
        manage(dsn, "pg_layer_status"),
        manage(dsn, "pg_layer_sweep", "--once"),
        manage(dsn, "check", "--database", "default"),
    ]
    for result in results:
        said = result.stdout + result.stderr
        assert refused in said
        assert "CONTEXT" not in said
        assert "PL/pgSQL" not in said
        assert "could not be reached" not in said
    assert "(pg_layer.W004)" in results[-1].stderr
    assert "HINT: Grant the role what docs/reference/permissions.md names" in results[-1].stderr


async def test_receive_without_privileges_logs_and_waits(
    make_layer: MakeLayer, make_role: MakeRole, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make_layer(dsn=make_role("nobody"))
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
    refusal, *_ = await until(lambda: records(caplog, log_events.RECEIVING_REFUSED))
    # The reason is PostgreSQL's own message, without its context.
    assert re.search(r"permission denied for (table|sequence) pg_layer_", refusal.getMessage())
    assert "CONTEXT" not in refusal.getMessage()
    assert not waiting.done()
    waiting.cancel()
    await until(waiting.done)


async def test_receive_another_refusal_is_logged_and_is_the_reason(
    make_layer: MakeLayer,
    make_role: MakeRole,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After the first mend the log and the health name what else is missing."""
    layer = make_layer(dsn=make_role("layer_user"))
    role = f'"layer_user_{observer.info.dbname}"'
    tables = ("pg_layer_client", "pg_layer_lease_clock")
    for table in tables:
        observer.execute(f"REVOKE ALL ON {table} FROM {role}".encode())
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))

    def named() -> list[str]:
        said = [record.getMessage() for record in records(caplog, log_events.RECEIVING_REFUSED)]
        return [table for each in said for table in tables if each.endswith(f"table {table}")]

    [first] = await until(named)
    [second] = {*tables} - {first}
    observer.execute(f"GRANT ALL ON {first} TO {role}".encode())
    await until(lambda: len(named()) > 1)
    assert named() == [first, second]
    problems = (await layer.health())["problems"]
    assert f"Not connected: permission denied for table {second}" in problems
    observer.execute(f"GRANT ALL ON {second} TO {role}".encode())
    await until(lambda: records(caplog, log_events.DATABASE_BACK))
    assert named() == [first, second]
    waiting.cancel()
    await until(waiting.done)


# ---------------------------------------------------------------------- every privilege is needed

LIVE, MINE = "asgi!live", "asgi!mine"
PREFIX = "asgi"
BEGIN = Statement("BEGIN")
KEEP_LOW_IDS = Statement("SELECT pg_layer_keep_low_ids(ARRAY['asgi!mine'], 5000)")
KEY = Key(1, 1, 1)
MOMENT = Moment(1, Snapshot("1:1:"))
MARKED = send.Unannounced(1, 1, 1, LIVE, "a.live!1", "message", None, b"{}")


async def begin_a_later_boot(session: Session) -> None:
    """Begin a boot like that of a promoted standby whose clock is behind."""
    await reading.position(session, 0)
    await reading.position(session, 10**15)


def _renew(session: Session, address: str) -> Awaitable[object]:
    return lease.renew(session, PREFIX, address, "host", 1, 60, 9, {}, "1", 0, 0, 0, [address], 0)


SENDING: list[Operation] = [
    operation
    for own in (True, False)
    for quiet in (True, False)
    for operation in (
        lambda s, own=own, quiet=quiet: send.send_one(
            s, PREFIX, "jobs", b"{}", 60, 100, "asgi!:jobs", 0, own=own, quiet=quiet
        ),
        lambda s, own=own, quiet=quiet: send.send_one(
            s, PREFIX, "a.live!1", b"{}", 60, 100, LIVE, None, own=own, quiet=quiet
        ),
        lambda s, own=own, quiet=quiet: send.send_batch(
            *(s, PREFIX, ["jobs"] * 2, [b"{}"] * 2, [60] * 2, [2] * 2, LowIds([], [])),
            own=own,
            quiet=quiet,
        ),
        lambda s, own=own: send.group_send_one(
            s, PREFIX, "room", b"{}", 60, None, own=own, quiet=False
        ),
        lambda s, own=own, quiet=quiet: send.group_send_batch(
            *(s, PREFIX, ["room", "empty"], [b"{}"] * 2, [60] * 2, [None] * 2), own=own, quiet=quiet
        ),
        lambda s: send.announce(s, [MARKED]),
    )
]
RECEIVING: list[Operation] = [
    lambda s: _renew(s, MINE),
    lambda s: _renew(s, LIVE),
    lambda s: s.execute(KEEP_LOW_IDS),
    begin_a_later_boot,
    lambda s: reading.raise_fence(s, MINE, 1),
    lambda s: reading.read(s, [Span(MINE, 1, 1, False, 1, 9)]),
    lambda s: reading.read_keys(s, [KeyAt(MINE, 1, 1, 1, False, 1)]),
    lambda s: reading.new_keys(s, [MINE], [0], MOMENT),
    lambda s: reading.new_in_group(s, "asgi!@room", 0, MOMENT, 1, 9),
    lambda s: reading.marked_keys(s, [MINE], 0, MOMENT),
    lambda s: reading.claim(s, PREFIX, "jobs", LIVE, 9, 0, 9),
    lambda s: reading.release(s, PREFIX, LIVE, 9, [KEY]),
    lambda s: reading.delete(s, MINE, [KEY]),
    lambda s: reading.delete_received(s, MINE, MOMENT, []),
    lambda s: groups.write(
        s,
        LIVE,
        9,
        groups.OwnRows([("room", "a.live!1", None)], [("b", "a.live!1")], [("c", "a.live!1", 9)]),
    ),
    lambda s: groups.request(s, PREFIX, [("room", "jobs", True, 1)], 60, own=True, quiet=False),
    lambda s: groups.request(s, PREFIX, [("room", "jobs", False, 1)], 60, own=False, quiet=True),
    lambda s: groups.group_channels(s, PREFIX, "room"),
    lambda s: lease.close(s, lease.Closing(PREFIX, LIVE, [KEY])),
    lambda s: maintenance.sweep(s, PREFIX, 9, maintenance.START),
    lambda s: maintenance.delete_expired(s, maintenance.START, 9),
]
LOOKING: list[Operation] = [
    lambda s, statement=statement, values=values: s.execute(  # type: ignore[misc]
        statement, *values
    )
    for statement, values in (
        (maintenance.CLIENTS, (PREFIX, 9)),
        (maintenance.CLIENT_COUNTS, (PREFIX,)),
        (maintenance.GROUPS, (PREFIX, 9)),
        (maintenance.CHANNELS, (PREFIX, 9)),
        (maintenance.TABLE_SIZES, (maintenance.TABLES,)),
        (maintenance.LAST_SWEEP, (PREFIX,)),
        (maintenance.FIRST_USE, (PREFIX,)),
    )
]


async def refused(session: Session, operations: list[Operation]) -> int:
    """Return the number of operations that fail without a privilege. None has an effect."""
    count = 0
    for operation in operations:
        await session.execute(BEGIN)
        try:
            await operation(session)
        except psycopg.errors.InsufficientPrivilege:
            count += 1
        finally:
            await session.settle()
    return count


@pytest.mark.parametrize(
    ("name", "operations", "count"),
    [
        ("layer_sender", SENDING, 21),
        ("layer_receiver", RECEIVING, 29),
        ("layer_watcher", LOOKING, 8),
    ],
    ids=["sender", "receiver", "watcher"],
)
async def test_role_without_any_one_privilege_is_denied_something(
    make_role: MakeRole, observer: Observer, name: str, operations: list[Operation], count: int
) -> None:
    observer.execute(
        "DELETE FROM pg_layer_boot;"  # as after a crash
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        " VALUES ('asgi!live', 'infinity', 60);"
        "INSERT INTO pg_layer_membership"
        " VALUES ('room', 'asgi!live', 'a.live!1', 0, true, 'infinity', NULL),"
        " ('room', 'asgi!:jobs', 'jobs', 1, true, 'infinity', 100);"
        "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
        " VALUES ('asgi!:jobs', pg_current_xact_id(), 0, 'jobs', 'infinity')"
    )
    dsn = make_role(name)
    granted = observer.execute(
        """
        SELECT format('%%s%%s ON %%s %%s', a.privilege_type, a.of,
                      CASE a.relkind WHEN 'S' THEN 'SEQUENCE' ELSE '' END, a.relname),
            a.grantee::regrole::text
        FROM (
            SELECT c.relkind, c.relname, '' AS of, (aclexplode(c.relacl)).* FROM pg_class AS c
            UNION ALL
            SELECT c.relkind, c.relname, format(' (%%I)', t.attname), (aclexplode(t.attacl)).*
            FROM pg_attribute AS t JOIN pg_class AS c ON c.oid = t.attrelid
        ) AS a WHERE a.grantee::regrole::text LIKE %s
        """,
        (f"{name}%",),
    ).fetchall()
    assert len(granted) == count
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        session = Session(conn)
        assert await refused(session, operations) == 0
        for privilege, role in granted:
            observer.execute(f"REVOKE {privilege} FROM {role}".encode())
            assert await refused(session, operations) > 0, privilege
            observer.execute(f"GRANT {privilege} TO {role}".encode())


# ------------------------------------------------------------ reports of missing privileges

GRANTED = """
    SELECT a.privilege_type, a.of, CASE a.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE '' END || a.relname
    FROM (
        SELECT c.relkind, c.relname, '' AS of, (aclexplode(c.relacl)).* FROM pg_class AS c
        UNION ALL
        SELECT c.relkind, c.relname, t.attname, (aclexplode(t.attacl)).*
        FROM pg_attribute AS t JOIN pg_class AS c ON c.oid = t.attrelid
    ) AS a WHERE a.grantee = %s::regrole
"""


def lacking(dsn: str) -> str:
    """Return the reported problems of the role's privileges."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        fault = access.privileges(conn)
    return "" if fault is None else str(fault)


def advised(said: str) -> bytes:
    """Return the statements that a problem advises."""
    return said.split("As the owner: ")[1].split(". See docs/")[0].encode()


def problems(dsn: str) -> list[str]:
    shown: list[str] = json.loads(manage(dsn, "pg_layer_status", "--json").stdout)["problems"]
    return shown


@pytest.mark.parametrize("name", ["layer_user", "layer_sender", "layer_receiver"])
def test_role_that_lacks_any_privilege_is_reported(
    make_role: MakeRole, observer: Observer, name: str
) -> None:
    dsn = make_role(name)
    role = f'"{name}_{observer.info.dbname}"'
    assert lacking(dsn) == ""
    for privilege, column, relation in observer.execute(GRANTED, (role,)).fetchall():
        listed = f" ({column})" if column else ""
        observer.execute(f"REVOKE {privilege}{listed} ON {relation} FROM {role}".encode())
        kind = {"layer_user": "do all", "layer_sender": "send", "layer_receiver": "receive"}[name]
        said = lacking(dsn)
        assert said.startswith(f"The role {role[1:-1]} lacks privileges to {kind}"), (
            privilege,
            relation,
        )
        assert f"{privilege}{listed} ON {relation}." in said
        assert f"GRANT {privilege}{listed} ON {relation} TO " in said
        observer.execute(f"GRANT {privilege}{listed} ON {relation} TO {role}".encode())
    assert lacking(dsn) == ""


@pytest.mark.parametrize("name", ["layer_user", "layer_sender", "layer_receiver"])
def test_role_that_lacks_a_table_is_advised_all_that_it_needs(
    make_role: MakeRole, observer: Observer, name: str
) -> None:
    """A role that lost a whole table works again after the advised statements."""
    dsn = make_role(name)
    role = f'"{name}_{observer.info.dbname}"'
    for table in maintenance.TABLES:
        before = sorted(map(str, observer.execute(GRANTED, (role,)).fetchall()))
        observer.execute(f"REVOKE ALL ON {table} FROM {role}".encode())
        if said := lacking(dsn):
            observer.execute(advised(said))
        assert sorted(map(str, observer.execute(GRANTED, (role,)).fetchall())) == before, table


def test_roles_that_do_less_or_combine_kinds_are_not_reported(
    make_role: MakeRole, observer: Observer
) -> None:
    assert lacking(make_role("nobody")) == ""
    watcher = make_role("layer_watcher")
    assert lacking(watcher) == ""
    role = f'"layer_watcher_{observer.info.dbname}"'
    observer.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
    assert lacking(watcher) == ""
    for name in ("layer_sender", "layer_receiver"):
        for grant in grants_of(name):
            observer.execute(grant.replace(name, role).encode())
        assert lacking(watcher) == ""
    observer.execute(f"REVOKE DELETE ON pg_layer_boot FROM {role}".encode())
    assert "to receive: DELETE ON pg_layer_boot." in lacking(watcher)


def test_functions_without_execute_privilege_are_reported(
    make_role: MakeRole, observer: Observer
) -> None:
    dsn, watcher = make_role("layer_user"), make_role("layer_watcher")
    observer.execute("INSERT INTO pg_layer_last_sweep VALUES ('asgi', clock_timestamp())")
    observer.execute("REVOKE EXECUTE ON FUNCTION pg_layer_sweepable FROM PUBLIC")
    assert "EXECUTE ON FUNCTION pg_layer_sweepable(text)." in lacking(dsn)
    result = manage(dsn, "check", "--database", "default")
    assert "(pg_layer.W008) The role layer_user_" in result.stderr
    assert (
        "HINT: As the owner: GRANT EXECUTE ON FUNCTION pg_layer_sweepable(text) TO layer_user_"
        in result.stderr
    )
    assert [
        "EXECUTE ON FUNCTION pg_layer_sweepable(text)." in problem for problem in problems(dsn)
    ] == [True]
    observer.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC")
    said = lacking(dsn)
    assert ": EXECUTE ON ALL FUNCTIONS IN SCHEMA public." in said
    observer.execute(advised(said))
    assert lacking(dsn) == ""
    [problem] = problems(watcher)
    assert "permission denied for function pg_layer_" in problem
    assert "Grant the role what docs/reference/permissions.md names." in problem


def test_schema_without_usage_privilege_is_reported(
    make_role: MakeRole, observer: Observer
) -> None:
    """PostgreSQL reports that there are no tables. `migrate` would not help."""
    dsn = make_role("layer_user")
    observer.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    refused = "The database refused the call: permission denied for schema public"
    result = manage(dsn, "check", "--database", "default")
    assert (
        f"(pg_layer.W004) The tables of pg_layer could not be checked. {refused}" in result.stderr
    )
    assert "W001" not in result.stderr
    assert "HINT: Grant the role what docs/reference/permissions.md names" in result.stderr
    assert problems(dsn) == [f"{refused}. Grant the role what docs/reference/permissions.md names."]


def test_row_level_security_that_applies_to_the_role_is_reported(
    make_role: MakeRole, observer: Observer
) -> None:
    dsn, owner = make_role("layer_user"), make_role("nobody")
    role = f'"nobody_{observer.info.dbname}"'
    observer.execute("INSERT INTO pg_layer_last_sweep VALUES ('asgi', clock_timestamp())")
    for table in maintenance.TABLES:
        observer.execute(f"ALTER TABLE {table} OWNER TO {role}".encode())
    observer.execute(f"GRANT SELECT ON pg_layer_group TO {role}".encode())
    all_is_shown(dsn)
    observer.execute("ALTER TABLE pg_layer_client ENABLE ROW LEVEL SECURITY")
    observer.execute("ALTER TABLE pg_layer_message ENABLE ROW LEVEL SECURITY")
    result = manage(dsn, "check", "--database", "default")
    assert "(pg_layer.W007) Row-level security applies to the role layer_user_" in result.stderr
    assert " on pg_layer_message, pg_layer_client: rows that it needs" in result.stderr
    assert (
        "HINT: As the owner: ALTER TABLE pg_layer_message DISABLE ROW LEVEL SECURITY; ALTER"
        in result.stderr
    )
    assert [problem.startswith("Row-level security applies") for problem in problems(dsn)] == [True]
    for unaffected in (owner, make_conninfo(observer.info.dsn, password=observer.info.password)):
        all_is_shown(unaffected)
    observer.execute("ALTER TABLE pg_layer_message FORCE ROW LEVEL SECURITY")
    assert [" on pg_layer_message: rows" in problem for problem in problems(owner)] == [True]
    observer.execute("ALTER TABLE pg_layer_message DISABLE ROW LEVEL SECURITY")
    all_is_shown(owner)
    observer.execute(f"ALTER ROLE {role.replace('nobody', 'layer_user')} BYPASSRLS".encode())
    all_is_shown(dsn)


# ---------------------------------------------------------------------- what privileges cannot do


@pytest.mark.parametrize("keys", [None, ["a key"]], ids=["plain", "encrypted"])
async def test_role_that_may_only_connect_listens_and_notifies(
    make_layer: MakeLayer, make_role: MakeRole, keys: list[str] | None
) -> None:
    layer = make_layer(symmetric_encryption_keys=keys)
    channel = await layer.new_channel()
    await listen(layer)
    with psycopg.connect(make_role("nobody"), autocommit=True) as nobody:
        address = "pg_layer_notification_channel(pg_layer_address('asgi', %s))"
        nobody.execute(f"SELECT pg_layer_listen(ARRAY[{address}])".encode(), (channel,))
        await layer.send(channel, {"type": "secret", "text": "attack at dawn"})
        assert (await receive(layer, channel))["text"] == "attack at dawn"
        [heard] = nobody.notifies(timeout=30, stop_after=1)
        payload = base64.b64decode(heard.payload.rpartition(" ")[2])
        assert (b"attack at dawn" in payload) == (keys is None)
        forged = base64.b64encode(b'{"type": "forged"}').decode()
        letter, boot, xid, *_ = heard.payload.split(" ")
        nobody.execute(
            f"SELECT pg_notify({address}, %s)".encode(),
            (channel, f"{letter} {boot} {xid} {channel} 1000000 4102444800 * {forged}"),
        )
        await layer.send(channel, {"type": "genuine"})
        received = await receive(layer, channel)
    assert received == {"type": "forged" if keys is None else "genuine"}
