"""The public SQL functions: messages from psql, a trigger, another language."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from devtools.postgres import PostgresServer, find_binaries
from pg_layer import PostgresChannelLayer
from pg_layer._db.queries import all_statements
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.faults.conftest import migrate
from tests.faults.test_notify_refused import full_queue
from tests.processes import TIMEOUT, Message, listen, open_layer, receive
from tests.project.commands import django, manage, succeeded
from tests.project.communicators import WebsocketCommunicator
from tests.project.configured import configured

SEND = "SELECT pg_layer_send(%s, %s)"

Caller = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def caller(migrated_dsn: str) -> Iterator[Caller]:
    """Return a connection as `psql` has one: in autocommit until it begins a transaction."""
    with psycopg.connect(migrated_dsn, autocommit=True, application_name="caller") as connection:
        yield connection


def text(number: int | str, size: int = 0) -> str:
    """Return a message in JSON, padded."""
    return json.dumps({"type": "test", "number": number, **({"pad": "x" * size} if size else {})})


def send(caller: Caller, channel: str, message: str, **options: object) -> bool:
    """Call pg_layer_send with options by name."""
    [(is_accepted,)] = call(caller, "pg_layer_send", channel, message, **options)
    return bool(is_accepted)


def group_send(caller: Caller, group: str, message: str, **options: object) -> None:
    call(caller, "pg_layer_group_send", group, message, **options)


def call(
    caller: Caller, function: str, *values: object, **options: object
) -> list[tuple[Any, ...]]:
    names = sql.SQL(", ").join(
        [sql.Placeholder()] * len(values)
        + [sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder()) for name in options]
    )
    query = sql.SQL("SELECT {}({})").format(sql.Identifier(function), names)
    return caller.execute(query, [*values, *options.values()]).fetchall()


async def numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[Any]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def next_is(layer: PostgresChannelLayer, channel: str, number: int) -> None:
    """Check that no message waits in a channel, before or beside one that is sent now."""
    await layer.send(channel, {"number": number})
    assert await numbers(layer, channel, 1) == [number]


# ---------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("starts", ["listening", "later"])
async def test_sql_send_message_arrives(make_layer: MakeLayer, caller: Caller, starts: str) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await layer.group_add("room", "jobs")
    if starts == "listening":
        await listen(layer)
    for number in range(3):
        assert send(caller, own, text(number))
        assert send(caller, "mail", text(number))
        group_send(caller, "room", text(number))
    for channel in (own, member, "mail", "jobs"):
        assert await numbers(layer, channel, 3) == [0, 1, 2]
    # A message to an empty group or an unknown channel is no error, and reaches no channel.
    group_send(caller, "nobody.is.in.it", text(9))
    assert send(caller, "specific.nobody!1", text(9))


CONTENTS: list[Message] = [
    {"type": "test"},
    {"type": "Grüße.\N{SNOWMAN}", "ключ": "\U0001f600 \u2028 \x7f \x01", "": ""},
    {"type": "test", "deep": {"a": [1, [2, [{"b": [[], {}, None, True, False]}]]]}},
    {"type": "test", "numbers": [0, -1, 2**63 - 1, 2**64 - 1, -(2**63), 0.1, -2.5e-300, 1e-7, 3.0]},
    {"type": "test", "text": "\\ \" ' ; -- $$ $1 %s M 1 2 3 {}\t\r\n"},
    {"type": "test", "nested": {"__asgi_channel__": "only at the top these are reserved"}},
    *(
        {"type": "test", "pad": "é" * size}
        for size in (2700, 2785, 2790, 2795, 2800, 2805, 4000, 40_000)
    ),
    {"type": "test", "pad": "x" * 5_000_000},
]


@pytest.mark.parametrize("serializer_format", ["msgpack", "json"])
async def test_sql_send_json_content_arrives_unchanged(
    make_layer: MakeLayer, caller: Caller, serializer_format: str
) -> None:
    layer = make_layer(serializer_format=serializer_format)
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    for content in CONTENTS:
        message = json.dumps(content)
        send(caller, own, message)
        send(caller, "jobs", message)
        group_send(caller, "room", message)
        for channel in (own, "jobs", member):
            received = await receive(layer, channel)
            assert received == content
            assert json.dumps(received, sort_keys=True) == json.dumps(content, sort_keys=True)


async def test_sql_send_number_with_exponent_arrives_as_integer(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer()
    send(caller, "jobs", '{"type": "test", "number": 1.5e18}')
    [number] = await numbers(layer, "jobs", 1)
    assert (number, type(number)) == (1_500_000_000_000_000_000, int)


async def test_sql_send_in_database_of_another_encoding_arrives(postgres_dsn: str) -> None:
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute("DROP DATABASE IF EXISTS pg_layer_latin WITH (FORCE)")
        server.execute(
            "CREATE DATABASE pg_layer_latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
            " LOCALE_PROVIDER libc"
        )
        try:
            dsn = psycopg.conninfo.make_conninfo(postgres_dsn, dbname="pg_layer_latin")
            migrate(dsn)
            async with open_layer(dsn) as layer:
                channel = await layer.new_channel()
                with psycopg.connect(dsn, autocommit=True) as caller:
                    send(caller, channel, '{"type": "test", "text": "Grüße, naïve"}')
                assert await receive(layer, channel) == {"type": "test", "text": "Grüße, naïve"}
        finally:
            server.execute("DROP DATABASE pg_layer_latin WITH (FORCE)")


def psql(dsn: str, commands: str) -> str:
    """Return the output of the program for these commands."""
    arguments = [dsn, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]
    result = subprocess.run(
        [find_binaries() / "psql", *arguments],
        input=commands,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


async def test_sql_send_in_psql_arrives(make_layer: MakeLayer, migrated_dsn: str) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    command = f"""SELECT pg_layer_send('{channel}', '{{"type": "test", "text": "it''s me"}}')"""
    assert await asyncio.to_thread(psql, migrated_dsn, command) == "t\n"
    assert await receive(layer, channel) == {"type": "test", "text": "it's me"}


# ---------------------------------------------------------------------- transactions


def test_sql_send_first_message_of_a_database_has_its_boot(caller: Caller) -> None:
    """Without a boot, members that join after a failover would receive the message again."""
    assert send(caller, "jobs", text(1))
    assert caller.execute("SELECT boot > 0 FROM pg_layer_message").fetchall() == [(True,)]


async def test_sql_send_in_transaction_arrives_after_the_commit(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    with caller.transaction():
        send(caller, own, text(1))
        send(caller, "jobs", text(1))
        group_send(caller, "room", text(1))
        for channel in (own, "jobs", member):
            await next_is(layer, channel, 0)
    for channel in (own, "jobs", member):
        assert await numbers(layer, channel, 1) == [1]


@pytest.mark.parametrize("size", [0, 10_000])
async def test_sql_send_rolled_back_never_arrives(
    make_layer: MakeLayer, caller: Caller, size: int
) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)

    def send_all(number: int) -> None:
        send(caller, own, text(number, size))
        send(caller, "jobs", text(number, size))
        group_send(caller, "room", text(number, size))

    with caller.transaction():
        send_all(-1)
        raise psycopg.Rollback()
    with suppress(psycopg.errors.DivisionByZero), caller.transaction():
        send_all(-2)
        caller.execute("SELECT 1 / 0")
    with caller.transaction():
        send_all(1)
        with caller.transaction():
            send_all(-3)
            raise psycopg.Rollback()
        # The invalid call raises, and a savepoint keeps the rest of the transaction.
        with suppress(psycopg.errors.InvalidParameterValue), caller.transaction():
            send_all(-4)
            send(caller, "no name", text(-4))
        send_all(2)
    for channel in (own, "jobs", member):
        assert await numbers(layer, channel, 2) == [1, 2]
        await next_is(layer, channel, 3)


async def test_sql_send_messages_of_transaction_arrive_in_order(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer, sender = make_layer(capacity=1000), make_layer(capacity=1000)
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    sizes = (0, 10_000, 5_000, 0, 0, 100_000)
    counts = iter(range(10**6))

    def from_sql() -> None:
        number = next(counts)
        for channel in (own, "jobs"):
            send(caller, channel, text(number, sizes[number % len(sizes)]), capacity=1000)
        group_send(caller, "room", text(number, sizes[number % len(sizes)]))

    async def from_layer() -> None:
        number = next(counts)
        for channel in (own, "jobs"):
            await sender.send(channel, {"number": number, "pad": bytes(sizes[number % len(sizes)])})
        await sender.group_send("room", {"number": number})

    for _ in range(10):
        await from_layer()
        with caller.transaction():
            for _ in range(7):
                from_sql()
        from_sql()
    last = next(counts)
    for channel in (own, "jobs", member):
        assert await numbers(layer, channel, last) == list(range(last))


async def test_open_transaction_that_has_sent_blocks_no_other_call(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer, sender = make_layer(capacity=1000), make_layer(capacity=1000)
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    with caller.transaction():
        for number in range(0, 100, 2):
            send(caller, own, text(number))
            send(caller, "jobs", text(number))
            group_send(caller, "room", text(number))
            await sender.send(own, {"number": number + 1})
            await sender.send("jobs", {"number": number + 1})
            await sender.group_send("room", {"number": number + 1})
        for channel in (own, "jobs", member):
            assert await numbers(layer, channel, 50) == list(range(1, 100, 2))
    for channel in (own, "jobs", member):
        assert await numbers(layer, channel, 50) == list(range(0, 100, 2))
        await next_is(layer, channel, -1)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_sql_send_transaction_longer_than_lease_arrives(
    make_layer: MakeLayer, caller: Caller, observer: Observer, isolation: str
) -> None:
    """Its snapshot shows the client without the later renewals of its lease."""
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '1 second'"
    )
    caller.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
    caller.execute("SELECT expires_at FROM pg_layer_client")
    observer.execute("UPDATE pg_layer_client SET expires_at = 'infinity'")
    caller.execute("SELECT pg_sleep(1.1)")
    send(caller, own, text(1))
    group_send(caller, "room", text(1))
    caller.execute("COMMIT")
    for channel in (own, member):
        assert await numbers(layer, channel, 1) == [1]


async def test_sql_send_many_callers_at_once_arrive_in_order(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    layer = make_layer(capacity=10_000)
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)

    def work(caller_number: int) -> None:
        with psycopg.connect(migrated_dsn, autocommit=True) as caller:
            for start in range(0, 50, 5):
                with caller.transaction():
                    for number in range(start, start + 5):
                        message = text(f"{caller_number} {number}")
                        send(caller, own, message, capacity=10_000)
                        group_send(caller, "room", message)

    with ThreadPoolExecutor(6) as pool:
        sending = asyncio.gather(
            *(asyncio.to_thread(pool.submit(work, n).result) for n in range(6))
        )
        for channel in (own, member):
            received = [number.split() for number in await numbers(layer, channel, 300)]
            for n in range(6):
                assert [int(number) for who, number in received if who == str(n)] == list(range(50))
        await sending


# ---------------------------------------------------------------------- options


async def test_sql_send_other_prefix_is_not_received(make_layer: MakeLayer, caller: Caller) -> None:
    layer, other = make_layer(), make_layer(prefix="other-1.0_x")
    for each in (layer, other):
        await each.group_add("room", "members")
    send(caller, "jobs", text("other"), prefix="other-1.0_x")
    group_send(caller, "room", text("other"), prefix="other-1.0_x")
    send(caller, "jobs", text("default"))
    group_send(caller, "room", text("default"))
    for channel in ("jobs", "members"):
        assert await numbers(layer, channel, 1) == ["default"]
        assert await numbers(other, channel, 1) == ["other"]
        await next_is(layer, channel, 0)
        await next_is(other, channel, 0)


@pytest.mark.parametrize("size", [0, 10_000])
async def test_sql_group_send_excluded_member_receives_nothing(
    make_layer: MakeLayer, caller: Caller, size: int
) -> None:
    layer = make_layer()
    one, other = await layer.new_channel(), await layer.new_channel()
    for channel in (one, other, "jobs"):
        await layer.group_add("room", channel)
    await listen(layer)
    group_send(caller, "room", text(1, size), exclude=one)
    group_send(caller, "room", text(2, size), exclude="jobs")
    group_send(caller, "room", text(3, size), exclude="specific.somebody!else")
    group_send(caller, "room", text(4, size), exclude=None)
    assert await numbers(layer, one, 3) == [2, 3, 4]
    assert await numbers(layer, other, 4) == [1, 2, 3, 4]
    assert await numbers(layer, "jobs", 3) == [1, 3, 4]
    for channel in (one, other, "jobs"):
        await next_is(layer, channel, 5)


async def test_sql_send_expiry_counts_from_the_call(make_layer: MakeLayer, caller: Caller) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    with caller.transaction():
        for channel in (own, "jobs"):
            send(caller, channel, text("late"), expiry=0.05)
            send(caller, channel, text("in time"), expiry=1000)
        group_send(caller, "room", text("late"), expiry=0.05)
        group_send(caller, "room", text("in time"), expiry=1000)
        caller.execute("SELECT pg_sleep(0.1)")
    for channel in (own, "jobs", member):
        assert await numbers(layer, channel, 1) == ["in time"]
        await next_is(layer, channel, 0)


async def test_sql_send_to_full_channel_returns_false(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer()
    own = await layer.new_channel()
    for channel in (own, "jobs"):
        taken = caller.execute(
            "SELECT pg_layer_send(%s, jsonb_build_object('type', 'test', 'number', n),"
            " capacity => 3)"
            " FROM generate_series(0, 4) AS n",
            (channel,),
        ).fetchall()
        assert taken == [(True,)] * 3 + [(False,)] * 2
        assert not send(caller, channel, text(-1), capacity=2)
        assert send(caller, channel, text(3), capacity=4)
        assert await numbers(layer, channel, 4) == [0, 1, 2, 3]
    with caller.transaction():
        assert [send(caller, "default", text(n)) for n in range(101)] == [True] * 100 + [False]
    # The message is refused. The transaction can commit.
    assert await numbers(layer, "default", 100) == list(range(100))


async def test_sql_group_send_full_normal_channel_misses_message(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer(capacity=2)
    member = await layer.new_channel()
    for channel in (member, "jobs"):
        await layer.group_add("room", channel)
    await listen(layer)
    send(caller, "jobs", text(0))
    for number in (1, 2):
        group_send(caller, "room", text(number))
        assert await numbers(layer, member, 1) == [number]
    assert await numbers(layer, "jobs", 2) == [0, 1]
    await next_is(layer, "jobs", 3)


# ---------------------------------------------------------------------- what is refused

GOOD = '{"type": "test"}'
NESTED = '{"type": "test", "deep": ' + "[" * 200 + "]" * 200 + "}"
NAMES = [
    "",
    " ",
    "a b",
    "a\nb",
    "jobs\n",
    "é",
    "²",
    "a" * 100,
    "a'; DROP TABLE pg_layer_message; --",
    "%",
    None,
]
MESSAGES: dict[str | None, str] = {
    None: "a message must be a JSON object, not NULL",
    "null": "a message must be a JSON object, not null",
    "[1]": "a message must be a JSON object, not array",
    '"text"': "a message must be a JSON object, not string",
    "1": "a message must be a JSON object, not number",
    "{}": 'a message must have a "type"',
    '{"text": "no type"}': 'a message must have a "type"',
    '{"type": null}': 'a message must have a "type"',
    '{"type": 1}': 'a message must have a "type"',
    '{"type": ""}': 'a message must have a "type"',
    '{"type": "a", "__asgi_channel__": 1}': "the message has a key '__asgi_channel__'",
    '{"type": "a", "n": [{"m": 18446744073709551616}]}': "64 bits: 18446744073709551616",
    '{"type": "a", "n": -9223372036854775809}': "64 bits: -9223372036854775809",
    '{"type": "a", "n": 1e1000}': "64 bits: 1000000000",
    NESTED: "the message is nested too deeply",
    json.dumps({"type": "a", "pad": "x" * 2**23}): "bytes long; at most 8388608 are taken",
}
OPTIONS: list[tuple[str, object, str]] = [
    *(
        ("prefix", value, "no valid prefix")
        for value in ("", "a b", "a!", "a" * 51, "asgi\n", None)
    ),
    *(
        ("expiry", value, "expiry must be a number of seconds above 0")
        for value in (0, -1, 1_000_000_001, float("nan"), float("inf"), float("-inf"), None)
    ),
]


def refusal(caller: Caller, function: str, *values: object, **options: object) -> str:
    """Return the error of a call with an invalid argument. Check that nothing was written."""
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        call(caller, function, *values, **options)
    told = caught.value.diag
    assert told.sqlstate == "22023"
    assert told.message_primary is not None
    assert told.message_primary.startswith("pg_layer: ")
    assert told.message_primary.endswith(".")
    assert told.message_hint is not None  # the advice
    assert told.message_hint.endswith(".")
    assert len(told.message_primary) < 250
    assert caller.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    return told.message_primary


@pytest.fixture
async def _members(make_layer: MakeLayer) -> None:
    """A member of the group exists, which would receive the message."""
    layer = make_layer()
    await layer.group_add("room", await layer.new_channel())
    await layer.group_add("room", "jobs")


@pytest.mark.usefixtures("_members")
@pytest.mark.parametrize("name", [*NAMES, "a!b!c", "!a"], ids=repr)
def test_sql_send_invalid_name_raises(caller: Caller, name: str | None) -> None:
    shown = "NULL" if name is None else f"'{name.replace(chr(39), 2 * chr(39))}'"
    assert (
        refusal(caller, "pg_layer_send", name, GOOD)
        == f"pg_layer: {shown} is no valid name of a channel."
    )
    assert refusal(caller, "pg_layer_group_send", name, GOOD) == (
        f"pg_layer: {shown} is no valid name of a group."
    )
    if name is not None:  # no exclusion
        assert refusal(caller, "pg_layer_group_send", "room", GOOD, exclude=name) == (
            f"pg_layer: {shown} is no valid channel to exclude."
        )


@pytest.mark.usefixtures("_members")
def test_sql_group_send_name_of_a_specific_channel_raises(caller: Caller) -> None:
    assert "no valid name of a group" in refusal(
        caller, "pg_layer_group_send", "specific.a!1", GOOD
    )


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "a" * 99, "specific.a!" + "b" * 88, "a!"])
def test_sql_send_valid_name_is_accepted(caller: Caller, name: str) -> None:
    assert send(caller, name, GOOD)
    group_send(caller, name.replace("!", "."), GOOD, exclude=name)


@pytest.mark.usefixtures("_members")
@pytest.mark.parametrize(("message", "says"), MESSAGES.items(), ids=MESSAGES.values())
def test_sql_send_invalid_message_raises(caller: Caller, message: str | None, says: str) -> None:
    for function, name in (("pg_layer_send", "jobs"), ("pg_layer_group_send", "room")):
        assert says in refusal(caller, function, name, message)


@pytest.mark.usefixtures("_members")
@pytest.mark.parametrize(("option", "value", "says"), OPTIONS, ids=repr)
def test_sql_send_invalid_option_raises(
    caller: Caller, option: str, value: object, says: str
) -> None:
    for function, name in (("pg_layer_send", "jobs"), ("pg_layer_group_send", "room")):
        assert says in refusal(caller, function, name, GOOD, **{option: value})


@pytest.mark.parametrize("value", [0, -1, None])
def test_sql_send_invalid_capacity_raises(caller: Caller, value: int | None) -> None:
    says = "capacity must be at least 1, not " + ("NULL" if value is None else str(value))
    assert refusal(caller, "pg_layer_send", "jobs", GOOD, capacity=value) == f"pg_layer: {says}."


async def test_sql_send_deepest_and_longest_message_arrive(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    overhead = len('{"pad": "", "type": "test"}')
    for message in (
        NESTED.replace("[]", "1"),
        text("", 2**23 - overhead).replace('"number": "", ', ""),
    ):
        assert send(caller, channel, message)
        received = await receive(layer, channel)
        assert received == json.loads(message)
        # A consumer can send the message on.
        await layer.send(channel, received)
        assert await receive(layer, channel) == received


@pytest.mark.parametrize(
    "bad", ["{", "{'type': 'a'}", r'{"type": "\ud800"}', r'{"type": "\u0000"}']
)
def test_sql_send_invalid_json_is_refused_by_postgresql(caller: Caller, bad: str) -> None:
    with pytest.raises(psycopg.DataError):
        send(caller, "jobs", bad)


# ---------------------------------------------------------------------- where it is called from


async def test_sql_send_in_any_statement_arrives(make_layer: MakeLayer, caller: Caller) -> None:
    layer = make_layer(capacity=1000)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    count = 0

    async def arrives(more: int) -> None:
        nonlocal count
        assert await numbers(layer, channel, more) == list(range(count, count + more))
        count += more

    caller.execute("PREPARE mine (text, jsonb) AS SELECT pg_layer_send($1, $2)")
    for number in range(10):  # the last calls use a generic plan
        caller.execute(f"EXECUTE mine('{channel}', '{text(number)}')".encode())
    await arrives(10)
    caller.execute(
        f"""
        DO $$
        BEGIN
            FOR n IN 10 .. 14 LOOP
                PERFORM pg_layer_group_send(
                    'room', jsonb_build_object('type', 'test', 'number', n));
            END LOOP;
            BEGIN
                PERFORM pg_layer_send('{channel}', '{text(-1)}');
                RAISE EXCEPTION 'undone';
            EXCEPTION WHEN raise_exception THEN
                PERFORM pg_layer_send('{channel}', '{text(15)}');
            END;
        END $$
        """.encode()
    )
    await arrives(6)
    for isolation in ("REPEATABLE READ", "SERIALIZABLE"):
        caller.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
        send(caller, channel, text(count))
        caller.execute("COMMIT")
        await arrives(1)
    with caller.transaction(), caller.cursor() as cursor:
        cursor.executemany(SEND, [(channel, text(number)) for number in range(count, count + 20)])
    await arrives(20)
    caller.execute("CREATE TABLE log AS SELECT n FROM generate_series(38, 40) AS n")
    caller.execute(
        b"WITH gone AS (DELETE FROM log RETURNING n), sorted AS (SELECT n FROM gone ORDER BY n)"
        b" SELECT pg_layer_group_send("
        b"'room', jsonb_build_object('type', 'test', 'number', n)) FROM sorted"
    )
    await arrives(3)


def test_sql_send_in_read_only_transaction_raises(caller: Caller) -> None:
    caller.execute("BEGIN READ ONLY")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        send(caller, "jobs", GOOD)


@pytest.mark.parametrize("path", ["''", "elsewhere", "decoy, public", "pg_temp, decoy, public"])
async def test_sql_send_any_search_path_finds_the_tables(
    make_layer: MakeLayer, caller: Caller, path: str
) -> None:
    """The path may find other objects of the same names first."""
    layer = make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    caller.execute("CREATE SCHEMA elsewhere")
    caller.execute("CREATE SCHEMA decoy")
    for place in ("decoy", "pg_temp"):
        for table in ("message", "membership", "client", "lease_clock", "boot"):
            caller.execute(
                f"CREATE TABLE {place}.pg_layer_{table} (LIKE public.pg_layer_{table})".encode()
            )
    caller.execute(
        b"CREATE FUNCTION decoy.pg_layer_payload(text, jsonb, float8) RETURNS bytea LANGUAGE sql AS"
        b" 'SELECT NULL::bytea'"
    )
    caller.execute(f"SET search_path = {path}".encode())
    caller.execute("SELECT public.pg_layer_send(%s, %s)", (channel, text(1)))
    caller.execute("SELECT public.pg_layer_group_send('room', %s)", (text(2),))
    assert await numbers(layer, channel, 2) == [1, 2]
    assert caller.execute("SHOW search_path").fetchone() == (path.replace("''", '""'),)


async def test_sql_send_tables_in_another_schema_are_found(fresh_database: str) -> None:
    with psycopg.connect(fresh_database, autocommit=True) as caller:
        caller.execute('CREATE SCHEMA "the Layer"')
        caller.execute('SET search_path = "the Layer"')
        for file in sorted(MIGRATIONS.glob("0*.sql")):
            if not file.stem.endswith("_reverse"):
                caller.execute(file.read_bytes())
        caller.execute("SET search_path = public")
        dsn = psycopg.conninfo.make_conninfo(fresh_database, options='-csearch_path="the\\ Layer"')
        async with open_layer(dsn) as layer:
            channel = await layer.new_channel()
            caller.execute('SELECT "the Layer".pg_layer_send(%s, %s)', (channel, text(1)))
            assert await numbers(layer, channel, 1) == [1]


def test_functions_that_clients_call_set_search_path(caller: Caller) -> None:
    """Functions that use no tables, or that run once per message, do not set it."""
    called = {
        name
        for statement in all_statements()
        for name in re.findall(r"pg_layer_\w+(?=\()", statement.sql.decode())
    }
    unset = caller.execute(
        """
        SELECT array_agg(proname::text ORDER BY proname) FROM pg_proc
        WHERE proname = ANY (%s) AND array_to_string(proconfig, ' ') NOT LIKE '%%search_path=%%'
            OR proname = ANY (%s) AND proconfig IS NULL
        """,
        (list(called), list(called)),
    ).fetchone()
    assert unset == (
        [
            "pg_layer_address",
            "pg_layer_announce_marked",
            "pg_layer_group_send_one",
            "pg_layer_listen",
            "pg_layer_send_one",
            "pg_layer_unlisten",
        ],
    )


async def test_sql_send_objects_of_the_caller_are_not_used(
    make_layer: MakeLayer, caller: Caller
) -> None:
    """A role that fires a SECURITY DEFINER trigger cannot run code with the owner's rights."""
    layer = make_layer()
    await layer.group_add("room", "jobs")
    role = sql.Identifier(f"attacker_{caller.info.dbname}")
    caller.execute(
        b"""
        CREATE TABLE news (id integer);
        CREATE FUNCTION announce() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            PERFORM pg_layer_group_send(
                'room', jsonb_build_object('type', 'test', 'number', NEW.id));
            RETURN NULL;
        END $$;
        CREATE TRIGGER announce AFTER INSERT ON news FOR EACH ROW EXECUTE FUNCTION announce();
        """
    )
    caller.execute(sql.SQL("CREATE ROLE {0}; GRANT INSERT ON news TO {0}").format(role))
    try:
        caller.execute(
            sql.SQL("GRANT TEMPORARY ON DATABASE {} TO {}").format(
                sql.Identifier(caller.info.dbname), role
            )
        )
        caller.execute(sql.SQL("SET ROLE {}").format(role))
        caller.execute(
            b"""
            CREATE TEMPORARY TABLE pg_layer_membership (
                group_name text, address text, channel text, id bigint, present boolean,
                expires_at timestamptz, capacity integer);
            CREATE TEMPORARY TABLE pg_layer_message AS
                SELECT 'nothing'::text AS caught WITH NO DATA;
            CREATE FUNCTION pg_temp.pg_layer_payload(text, jsonb, float8) RETURNS bytea
                LANGUAGE sql AS
                'SELECT NULL::bytea';
            INSERT INTO news VALUES (7);
            """
        )
        assert await numbers(layer, "jobs", 1) == [7]
    finally:
        caller.execute(sql.SQL("RESET ROLE; DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(role))


async def test_sql_send_names_of_any_collation_are_compared_bytewise(
    make_layer: MakeLayer, caller: Caller
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    caller.execute(
        'CREATE TABLE names (a text COLLATE "POSIX", b text COLLATE "ucs_basic", c varchar(50))'
    )
    caller.execute("INSERT INTO names VALUES (%s, 'room', 'asgi')", (channel,))
    for number in range(3):
        for query in (
            "SELECT pg_layer_send(a, %s) FROM names",
            "SELECT pg_layer_send(a, %s, c COLLATE ucs_basic) FROM names",
            "SELECT pg_layer_group_send(b, %s) FROM names",
            "SELECT pg_layer_group_send(b, %s, c, exclude => 'a' || a) FROM names",
        ):
            caller.execute(query, (text(number),))
    assert await numbers(layer, channel, 12) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


# ------------------------------------------------------------ a server that takes no NOTIFY


@pytest.fixture(scope="module")
def small_queue() -> Iterator[PostgresServer]:
    settings = {"max_notify_queue_pages": 64, "max_prepared_transactions": 2}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        yield server


@pytest.fixture
def queue_dsn(small_queue: PostgresServer) -> Iterator[str]:
    """Return the DSN of a migrated database of that server."""
    small_queue.execute("SELECT pg_notification_queue_usage()")
    dsn = small_queue.create_database("layer")
    migrate(dsn)
    yield dsn
    small_queue.execute("DROP DATABASE layer WITH (FORCE)")


async def test_sql_send_full_notify_queue_transaction_commits(queue_dsn: str) -> None:
    async with open_layer(queue_dsn, heartbeat=1, lease=60) as layer:
        own, member = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("room", member)
        await listen(layer)
        with psycopg.connect(queue_dsn, autocommit=True) as caller:
            caller.execute("CREATE TABLE work (id integer)")
            with full_queue(queue_dsn):
                for number in range(3):
                    with caller.transaction():
                        caller.execute("INSERT INTO work VALUES (%s)", (number,))
                        send(caller, own, text(number, 6000 * number))
                        send(caller, "jobs", text(number))
                        group_send(caller, "room", text(number))
                send(caller, own, text(3))
                for channel, count in ((own, 4), ("jobs", 3), (member, 3)):
                    assert await numbers(layer, channel, count) == list(range(count))
            assert caller.execute("SELECT count(*) FROM work").fetchone() == (3,)
            assert caller.execute("SELECT current_setting('pg_layer.silent', true)").fetchone() != (
                "on",
            )
            send(caller, own, text(4))
            assert await numbers(layer, own, 1) == [4]


async def test_sql_send_silent_transaction_can_be_prepared(queue_dsn: str) -> None:
    async with open_layer(queue_dsn, heartbeat=1, lease=60) as layer:
        own = await layer.new_channel()
        await listen(layer)
        with psycopg.connect(queue_dsn, autocommit=True) as caller:
            caller.execute("BEGIN")
            send(caller, own, text(1))
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
                caller.execute("PREPARE TRANSACTION 'mine'")
            caller.execute("BEGIN")
            caller.execute("SET LOCAL pg_layer.silent = 'on'")
            send(caller, own, text(2))
            caller.execute("PREPARE TRANSACTION 'mine'")
            caller.execute("COMMIT PREPARED 'mine'")
        assert await numbers(layer, own, 1) == [2]


# ---------------------------------------------------------------------- the documentation

SQL_DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "reference" / "sql.md").read_text(
    encoding="utf-8"
)
IN_PSQL, DEFINER = re.findall(r"```sql\n(.*?)```", SQL_DOCUMENTATION, re.DOTALL)
MIGRATION, CONSUMER, FROM_PYTHON = re.findall(r"```python\n(.*?)```", SQL_DOCUMENTATION, re.DOTALL)
(SIGNATURES,) = re.findall(r"```\n(pg_layer_send.*?)```", SQL_DOCUMENTATION, re.DOTALL)
ARTICLE = {"type": "article.added", "id": 7, "title": "Hello"}

MODELS = """
from django.db import models

class Article(models.Model):
    title = models.TextField()
"""
INITIAL = """
from django.db import migrations, models

class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            name="Article",
            fields=[("id", models.BigAutoField(primary_key=True)), ("title", models.TextField())],
        )
    ]
"""
NEWS = {
    "INSTALLED_APPS": ["channels", "pg_layer", "news"],
    "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
}


@pytest.fixture
def news_dsn(fresh_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a database with the documentation's trigger, installed by its migration."""
    migrations = tmp_path / "news" / "migrations"
    migrations.mkdir(parents=True)
    for file, content in {
        migrations.parent / "__init__.py": "",
        migrations.parent / "models.py": MODELS,
        migrations / "__init__.py": "",
        migrations / "0001_initial.py": INITIAL,
        migrations / "0002_announce.py": MIGRATION,
    }.items():
        file.write_text(content, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "Applying news.0002_announce... OK" in succeeded(
        manage(fresh_database, "migrate", settings=NEWS)
    )
    return fresh_database


@asynccontextmanager
async def watching(count: int = 1) -> AsyncIterator[list[WebsocketCommunicator]]:
    """Connect browsers to the documentation's consumer."""
    names: dict[str, Any] = {}
    exec(CONSUMER, names)
    sockets = [WebsocketCommunicator(names["Articles"].as_asgi(), "/") for _ in range(count)]
    for socket in sockets:
        assert await socket.connect(timeout=TIMEOUT) == (True, None)
    yield sockets
    for socket in sockets:
        await socket.disconnect(timeout=TIMEOUT)


async def seen(sockets: list[WebsocketCommunicator]) -> list[str]:
    """Return the title that each browser shows next."""
    return [(await socket.receive_json_from(timeout=TIMEOUT))["title"] for socket in sockets]


async def test_documented_trigger_message_reaches_browsers(news_dsn: str) -> None:
    insert = """
from django.db import transaction
from news.models import Article

Article.objects.create(title="Hello")
with transaction.atomic():
    Article.objects.create(title="never")
    transaction.set_rollback(True)
with transaction.atomic():
    Article.objects.bulk_create([Article(title="Grüße"), Article(title="'; --")])
"""
    async with open_layer(news_dsn) as layer:
        with configured(layer):
            async with watching(2) as sockets:
                await asyncio.to_thread(django, news_dsn, insert, settings=NEWS)
                for title in ("Hello", "Grüße", "'; --"):
                    assert await seen(sockets) == [title] * 2
                with psycopg.connect(news_dsn) as importer:
                    importer.execute("INSERT INTO news_article (title) VALUES ('from psql')")
                    async with watching() as newcomers:  # a browser that connects later
                        importer.commit()
                        assert await seen(sockets + newcomers) == ["from psql"] * 3
    succeeded(await asyncio.to_thread(manage, news_dsn, "migrate", "news", "0001", settings=NEWS))
    with psycopg.connect(news_dsn) as importer:
        importer.execute("INSERT INTO news_article (title) VALUES ('in silence')")


async def test_documented_trigger_role_without_privileges_fires_it(news_dsn: str) -> None:
    with psycopg.connect(news_dsn, autocommit=True) as owner:
        role = sql.Identifier(f"importer_{owner.info.dbname}")
        owner.execute(sql.SQL("CREATE ROLE {0}; GRANT INSERT ON news_article TO {0}").format(role))
        try:
            async with open_layer(news_dsn) as layer:
                with configured(layer):
                    async with watching() as sockets:
                        with psycopg.connect(news_dsn, autocommit=True) as importer:
                            importer.execute(sql.SQL("SET ROLE {}").format(role))
                            insert = "INSERT INTO news_article (title) VALUES (%s)"
                            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                                importer.execute(insert, ("refused",))
                            owner.execute(DEFINER.encode())
                            importer.execute(insert, ("announced",))
                        assert await seen(sockets) == ["announced"]
        finally:
            owner.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


async def test_documented_calls_send_messages(make_layer: MakeLayer, migrated_dsn: str) -> None:
    layer = make_layer()
    await layer.group_add("articles", "watched")
    await asyncio.to_thread(psql, migrated_dsn, IN_PSQL)
    assert await receive(layer, "thumbnails") == {"type": "generate", "image": 7}
    assert await receive(layer, "watched") == ARTICLE
    await asyncio.to_thread(exec, FROM_PYTHON, {"DSN": migrated_dsn})
    assert await receive(layer, "watched") == ARTICLE


def test_documented_signatures_are_those_of_the_functions(caller: Caller) -> None:
    found = caller.execute(
        """
        SELECT format('%s(%s) RETURNS %s', proname, pg_get_function_arguments(oid),
            prorettype::regtype)
        FROM pg_proc WHERE proname IN ('pg_layer_send', 'pg_layer_group_send') ORDER BY proname DESC
        """
    ).fetchall()
    assert [
        line.replace("::text", "").replace("double precision", "float8") for (line,) in found
    ] == re.sub(r"\n +", " ", SIGNATURES).splitlines()


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_send_in_snapshot_older_than_a_lease_is_written(
    make_layer: MakeLayer, caller: Caller, observer: Observer, isolation: str
) -> None:
    layer = make_layer()
    own, member = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    await listen(layer)
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '0.5 seconds'"
    )
    caller.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
    caller.execute("SELECT count(*) FROM pg_layer_client")  # its snapshot
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '1 hour'"
    )
    caller.execute("SELECT pg_sleep(0.6)")
    send(caller, own, text(1))
    group_send(caller, "room", text(1))
    caller.execute(
        "SELECT pg_layer_send_batch('asgi', %s::text[], '{\"{}\", \"{}\"}', '{60,60}',"
        " '{9,9}', '{}', '{}',"
        " false, false)",
        ([own, own],),
    )
    caller.execute("COMMIT")
    assert await numbers(layer, own, 1) == [1]
    assert await numbers(layer, member, 1) == [1]
    assert (await receive(layer, own), await receive(layer, own)) == ({}, {})
