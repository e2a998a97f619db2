"""Invalid calls raise the right error and write nothing. Configuration errors name the cause."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_layer import (
    InvalidMessage,
    LayerUnavailable,
    MessageTooLarge,
    NotMigrated,
    OutcomeUnknown,
    PostgresChannelLayer,
)
from pg_layer._state import log_events
from pg_layer.layer import MAX_PREFIX
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.logs import records
from tests.processes import Message, Processes, listen, open_layer, read, receive, until


def assert_database_untouched(observer: Observer) -> None:
    """Assert that no row was ever written and that the layer has no connection."""
    tables = "SELECT count(*) FROM pg_layer_{}"
    for table in ("message", "membership", "client"):
        assert observer.execute(tables.format(table).encode()).fetchone() == (0,)
    assert observer.execute(
        "SELECT last_value FROM pg_sequences WHERE sequencename = 'pg_layer_message_id_seq'"
    ).fetchall() == [(None,)]
    assert observer.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    ).fetchone() == (0,)


# ---------------------------------------------------------------------- names

BAD_NAMES: list[Any] = [
    123,
    None,
    b"name",
    ["name"],
    "",
    "x" * 100,
    "a b",
    "a\n",
    "a\0",
    "ä",
    "٣",
    "a/b",
    "a:b",
    "a'b",
    "%s",
    "\ud800",
]
BAD_CHANNELS = [*BAD_NAMES, "a!b!c", "!", "!a", "a!ä", "a!b\n"]
BAD_GROUPS = [*BAD_NAMES, "a!b", "a!"]


async def test_channel_name_invalid_raises_and_writes_nothing(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    for name in BAD_CHANNELS:
        for attempt in (
            layer.send(name, {"type": "x"}),
            layer.receive(name),
            layer.group_add("room", name),
            layer.group_discard("room", name),
        ):
            with pytest.raises(TypeError, match="Channel name"):
                await attempt
    assert_database_untouched(observer)


async def test_group_name_invalid_raises_and_writes_nothing(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    for name in BAD_GROUPS:
        for attempt in (
            layer.group_send(name, {"type": "x"}),
            layer.group_add(name, "channel"),
            layer.group_discard(name, "channel"),
        ):
            with pytest.raises(TypeError, match="Group name"):
                await attempt
    assert_database_untouched(observer)


async def test_new_channel_with_an_invalid_prefix_raises() -> None:
    layer = PostgresChannelLayer(dsn="dbname=never-connected-to")
    bad: list[Any] = ["a b", "a!b", "x" * 100, "ä", 7, None]
    for prefix in bad:
        with pytest.raises(TypeError):
            await layer.new_channel(prefix)


async def test_new_channel_accepts_a_prefix_of_max_prefix_and_refuses_a_longer_one() -> None:
    """A prefix is refused at once, or never.

    The names of one prefix grow with the serial number. Channels allows 99 characters.
    """
    layer = PostgresChannelLayer(dsn="dbname=never-connected-to")
    layer._loops.client._serial = 16**10
    assert len(await layer.new_channel("p" * MAX_PREFIX)) < 100
    with pytest.raises(TypeError, match=r"must have at most 60 characters\.$"):
        await layer.new_channel("p" * (MAX_PREFIX + 1))


async def test_receive_on_a_channel_of_another_process_raises(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader = processes.start(read, migrated_dsn, 1)
    channel = await reader.hear()
    with pytest.raises(TypeError, match=re.escape(channel)):
        await layer.receive(channel)
    # The same holds for the channel of a client that never existed.
    with pytest.raises(TypeError, match="another process"):
        await layer.receive("specific.0123456789abcdef!1")
    await layer.send(channel, {"type": "undisturbed"})
    assert await reader.result() == [{"type": "undisturbed"}]


# ---------------------------------------------------------------------- messages


def circular_message() -> Message:
    message: Message = {"list": []}
    message["list"].append(message)
    return message


def nested_message(levels: int) -> Message:
    message: Message = {}
    for _ in range(levels):
        message = {"in": message}
    return message


BAD_MESSAGES: list[Any] = [
    [1],
    "text",
    None,
    {"a": {1, 2}},
    {"a": datetime.now()},
    {"a": [Decimal("1.0")]},
    {"a": UUID(int=0)},
    {"a": object()},
    {"a": iter([1])},
    {"a": 2**64},
    {"a": {"b": -(2**63) - 1}},
    {1: "a"},
    {"a": [{"b": {2: "c"}}]},
    {b"a": 1},
    {"a": "\ud800"},
    {"\udfff": 1},
    circular_message(),
    nested_message(1000),
    {"__asgi_channel__": "x"},
]
BAD_IN_JSON: list[Any] = [{"a": b"bytes"}, {"a": float("nan")}, {"a": [float("inf")]}]


@pytest.mark.parametrize(
    ("serializer_format", "messages"),
    [("msgpack", BAD_MESSAGES), ("json", BAD_MESSAGES + BAD_IN_JSON)],
    ids=["msgpack", "json"],
)
async def test_message_invalid_raises_and_writes_nothing(
    make_layer: MakeLayer, observer: Observer, serializer_format: str, messages: list[Any]
) -> None:
    layer = make_layer(serializer_format=serializer_format)
    for message in messages:
        for attempt in (layer.send("channel", message), layer.group_send("room", message)):
            with pytest.raises(InvalidMessage) as refused:
                await attempt
            assert isinstance(refused.value, TypeError)
            assert isinstance(refused.value, ValueError)
    assert_database_untouched(observer)


async def test_message_too_large_raises_and_writes_nothing(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(max_message_size=1000)
    for attempt in (
        layer.send("channel", {"a": "x" * 1000}),
        layer.group_send("room", {"a": ["y"] * 500}),
        make_layer().send("channel", {"a": bytes(8 * 1024 * 1024)}),
    ):
        with pytest.raises(MessageTooLarge):
            await attempt
    assert_database_untouched(observer)


async def test_messages_invalid_among_concurrent_sends_leave_the_others_unharmed(
    make_layer: MakeLayer,
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    messages: list[Any] = [{"number": n} if n % 3 else {"number": {n}} for n in range(30)]
    outcomes = await asyncio.gather(
        *(sender.send(channel, message) for message in messages), return_exceptions=True
    )
    assert [outcome is None for outcome in outcomes] == [bool(n % 3) for n in range(30)]
    assert [await receive(layer, channel) for _ in range(20)] == [
        m for m in messages if m["number"].__class__ is int
    ]


async def test_message_changed_after_send_has_begun_arrives_unchanged(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    message: Message = {"list": [1]}
    sending = asyncio.create_task(layer.send(channel, message))
    await asyncio.sleep(0)
    message["list"].append(2)
    await sending
    assert message == {"list": [1, 2]}
    received = await receive(layer, channel)
    assert received == {"list": [1]}


async def test_group_message_changed_by_one_receiver_is_unchanged_for_the_next(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    channels = [await layer.new_channel() for _ in range(2)]
    for channel in channels:
        await layer.group_add("room", channel)
    await layer.group_send("room", {"list": []})
    first = await receive(layer, channels[0])
    first["list"].append("mine")
    assert await receive(layer, channels[1]) == {"list": []}


# ---------------------------------------------------------------------- without tables


async def test_layer_without_tables_raises_an_error_that_names_the_command(
    fresh_database: str,
) -> None:
    async with open_layer(fresh_database) as layer:
        channel = await layer.new_channel()
        for attempt in (
            layer.send(channel, {"type": "x"}),
            layer.group_send("room", {"type": "x"}),
            layer.group_add("room", channel),
            layer.group_discard("room", channel),
            layer.flush(),
            asyncio.gather(*(layer.send(channel, {"type": "x"}) for _ in range(10))),
        ):
            with pytest.raises(NotMigrated, match=r"manage\.py migrate pg_layer"):
                await attempt


async def test_receiver_without_tables_logs_once_and_starts_after_the_migration(
    fresh_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(fresh_database) as layer:
        channel = await layer.new_channel()
        receiving = asyncio.create_task(layer.receive(channel))
        jobs = asyncio.create_task(layer.receive("jobs"))

        def refusals() -> list[logging.LogRecord]:
            return records(caplog, log_events.RECEIVING_REFUSED)

        await until(refusals)
        await asyncio.wait({receiving, jobs}, timeout=1)  # it tries again and again meanwhile
        assert len(refusals()) == 1
        assert "manage.py migrate pg_layer" in refusals()[0].getMessage()
        assert not receiving.done()
        with psycopg.connect(fresh_database) as connection:
            for file in sorted(MIGRATIONS.glob("0001_[0-9]_*.sql")):
                connection.execute(file.read_bytes())
        await layer.send(channel, {"type": "at last"})
        await layer.send("jobs", {"type": "as well"})
        assert await asyncio.wait_for(receiving, 60) == {"type": "at last"}
        assert await asyncio.wait_for(jobs, 60) == {"type": "as well"}


# ---------------------------------------------------------------------- without a database

PASSWORD = "correct-horse-battery-staple"


@contextmanager
def silent_server() -> Iterator[int]:
    """Yield a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()


@contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port on which no process listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def assert_every_call_is_unavailable(layer: PostgresChannelLayer) -> None:
    """Assert that each call raises LayerUnavailable, without the password in any text.

    A receive continues to wait.
    """
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    attempts = (
        layer.send(channel, {"type": "x"}),
        layer.group_send("room", {"type": "x"}),
        layer.group_add("room", channel),
        layer.group_discard("room", channel),
        layer.flush(),
    )
    errors = await asyncio.wait_for(asyncio.gather(*attempts, return_exceptions=True), 30)
    *_, discarded, _ = errors
    # A discard that has begun is applied in the owner's memory: its outcome may be unknown.
    assert type(discarded) in (LayerUnavailable, OutcomeUnknown)
    assert {type(error) for error in errors if error is not discarded} == {LayerUnavailable}
    for error in errors:
        assert isinstance(error, LayerUnavailable)
        text = "".join(traceback.format_exception(error)) + repr(error)
        assert PASSWORD not in text
    assert not receiving.done()
    receiving.cancel()


@pytest.mark.parametrize("unreachable_server", [closed_port, silent_server])
async def test_calls_to_an_unreachable_server_raise_layer_unavailable_without_password(
    unreachable_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with unreachable_server() as port:
        dsn = f"postgresql://somebody:{PASSWORD}@127.0.0.1:{port}/somewhere"
        async with open_layer(dsn, send_timeout=0.5) as layer:
            await assert_every_call_is_unavailable(layer)
            assert PASSWORD not in repr(layer)
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"password": PASSWORD}, {"dbname": "pg_layer_no_such_database"}],
    ids=["password", "database"],
)
async def test_login_refused_raises_the_reason_without_the_password(
    postgres_dsn: str, wrong: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    dsn = make_conninfo(postgres_dsn, **wrong)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    password = str(conninfo_to_dict(dsn)["password"])
    async with open_layer(dsn, send_timeout=0.5) as layer:
        await assert_every_call_is_unavailable(layer)
        with pytest.raises(
            LayerUnavailable,
            match=r"^The database refused the connection: .*(password authentication failed"
            r"|does not exist)",
        ) as refused:
            await layer.send("jobs", {"type": "x"})
    assert password not in "".join(traceback.format_exception(refused.value)) + caplog.text


# ---------------------------------------------------------------------- two layers in one database


async def test_layers_with_different_prefixes_in_one_database_are_isolated(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    names = ("app", "app2", "app.x", "ap")
    layers = {prefix: make_layer(prefix=prefix) for prefix in names}
    readers = {prefix: processes.start(read, migrated_dsn, 2, prefix=prefix) for prefix in names}
    channels = {prefix: await reader.hear() for prefix, reader in readers.items()}
    for prefix, layer in layers.items():
        await layer.group_add("room", channels[prefix])
        await layer.group_send("room", {"from": prefix})
        for other in names:  # with another prefix, the channel has no reader
            await layer.send(channels[other], {"directly from": prefix})
        await layer.send("jobs", {"for": prefix})
    for prefix, reader in readers.items():
        assert await reader.result() == [{"from": prefix}, {"directly from": prefix}]
    await layers["app"].flush()
    for prefix in names[1:]:
        assert await receive(layers[prefix], "jobs") == {"for": prefix}
    await listen(layers["app"])
    receiving = asyncio.create_task(layers["app"].receive("jobs"))
    await asyncio.wait({receiving}, timeout=0.2)
    assert not receiving.done()
    receiving.cancel()
