"""What other packages expect of a layer: attributes, options that code changes, own types."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import re
import uuid
from pathlib import Path
from typing import Any

import channels.exceptions
import msgpack  # type: ignore[import-untyped]
import pytest
from django.core.exceptions import ImproperlyConfigured

from pg_layer import ChannelFull, InvalidMessage, MessageTooLarge, PostgresChannelLayer
from pg_layer._state import log_events
from pg_layer.testing import InMemoryChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.logs import records
from tests.processes import UNHURRIED, listen, receive

Message = dict[str, Any]


async def accepted(layer: PostgresChannelLayer, channel: str, limit: int = 60) -> int:
    """Return how many messages a channel accepts until it is full."""
    for number in range(limit):
        try:
            await layer.send(channel, {"number": number})
        except ChannelFull:
            return number
    return limit


def on_both(*classes: type[PostgresChannelLayer]) -> pytest.MarkDecorator:
    """Run a test with each class of a project, and with its twin in memory."""
    pairs = [
        (each, type(f"{each.__name__}InMemory", (each, InMemoryChannelLayer), {}))
        for each in classes
    ]
    return pytest.mark.parametrize("layer_class", [each for pair in pairs for each in pair])


# --- Attributes


def test_layer_has_the_attributes_of_the_specification_and_of_other_layers() -> None:
    layer = PostgresChannelLayer(
        dsn="dbname=x", prefix="chat", expiry=7, group_expiry=None, capacity=5
    )
    assert layer.ChannelFull is channels.exceptions.ChannelFull
    assert layer.MessageTooLarge is channels.exceptions.MessageTooLarge
    assert layer.extensions == ["groups", "flush"]
    assert (layer.prefix, layer.expiry, layer.group_expiry, layer.capacity) == ("chat", 7, None, 5)
    assert layer.channel_capacity == ()


async def test_client_prefix_is_the_part_of_channel_names_of_this_process() -> None:
    layer = PostgresChannelLayer(dsn="dbname=x")
    channel = await layer.new_channel()
    assert channel.startswith(f"specific.{layer.client_prefix}!")


def test_prefix_cannot_be_changed() -> None:
    layer = PostgresChannelLayer(dsn="dbname=x")
    with pytest.raises(AttributeError):
        layer.prefix = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expiry", 0),
        ("expiry", "60"),
        ("group_expiry", -1),
        ("capacity", 0),
        ("capacity", 2.5),
        ("channel_capacity", {"a*": 0}),
        ("channel_capacity", [(re.compile("a"), "5")]),
        ("channel_capacity", 5),
    ],
)
def test_attribute_set_to_an_invalid_value_raises_and_changes_nothing(
    name: str, value: object
) -> None:
    layer = PostgresChannelLayer(dsn="dbname=x", channel_capacity={"b": 3})
    before = repr(layer)
    with pytest.raises(ImproperlyConfigured, match=rf"CONFIG\['{name}'\]"):
        setattr(layer, name, value)
    assert repr(layer) == before
    assert (layer.get_capacity("b"), layer.get_capacity("a")) == (3, 100)


# --- Options that code changes


async def test_expiry_set_on_the_layer_applies_to_later_messages(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    layer.expiry = 1000
    await layer.send("jobs", {})
    await layer.send_many([("jobs", {})])
    rows = observer.execute(
        "SELECT extract(epoch FROM expires_at - sent_at)::int FROM pg_layer_message"
    ).fetchall()
    assert rows == [(1000,), (1000,)]


async def test_group_expiry_set_on_the_layer_applies_to_later_memberships(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(**UNHURRIED)
    await layer.group_add("before", await layer.new_channel())
    layer.group_expiry = None
    await layer.group_add("own", await layer.new_channel())
    await layer.group_add("foreign", "jobs")
    rows = observer.execute(
        "SELECT group_name, expires_at IS NULL OR expires_at = 'infinity'"
        " FROM pg_layer_membership ORDER BY group_name"
    ).fetchall()
    assert rows == [("before", False), ("foreign", True), ("own", True)]


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_capacity_set_on_the_layer_applies_to_later_sends(
    make_layer: MakeLayer, name: str | None
) -> None:
    """Also directly after sends that have left a credit for the channel."""
    layer = make_layer(**UNHURRIED, capacity=1000)
    await listen(layer)
    channel = name or await layer.new_channel()
    await layer.send(channel, {"number": -1})
    layer.capacity = 3
    assert await accepted(layer, channel) == 2
    layer.capacity = 5
    assert await accepted(layer, channel) == 2


async def test_capacity_set_on_the_layer_applies_to_group_messages_of_a_known_channel(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(**UNHURRIED)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    layer.capacity = 2
    for number in range(5):
        await layer.group_send("room", {"number": number})
    while layer.stats()["dropped_full"] < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert [(await receive(layer, channel))["number"] for _ in range(2)] == [0, 1]


@pytest.mark.parametrize(
    "capacities",
    [
        {"jobs*": 2, "job*": 50},
        [(re.compile("jobs"), 2), (re.compile("job"), 50), (re.compile("jobs"), 40)],
    ],
    ids=["dict", "compiled"],
)
async def test_channel_capacity_set_on_the_layer_applies(
    make_layer: MakeLayer, capacities: Any
) -> None:
    layer = make_layer(capacity=7)
    layer.channel_capacity = capacities
    assert [await accepted(layer, name) for name in ("jobs1", "job", "other")] == [2, 50, 7]
    # As in Channels' base class: compiled, and for `get_capacity` to iterate over.
    found = next(capacity for pattern, capacity in layer.channel_capacity if pattern.match("jobs1"))
    assert found == 2
    layer.channel_capacity = layer.compile_capacities({"o*": 9})
    assert layer.get_capacity("other") == 9


@pytest.mark.parametrize("value", [[1, 2], [("a", 1, 2)], [(["x"], 1)], "jobs", 5])
async def test_channel_capacity_set_to_nonsense_is_refused(
    make_layer: MakeLayer, value: Any
) -> None:
    layer = make_layer(channel_capacity={"jobs": 2})
    with pytest.raises(ImproperlyConfigured, match="channel_capacity"):
        layer.channel_capacity = value
    assert layer.get_capacity("jobs") == 2


class Halved(PostgresChannelLayer):
    def get_capacity(self, channel: str) -> int:
        return super().get_capacity(channel) // 2 if channel != "broken" else 0


@contextlib.asynccontextmanager
async def opened(layer: PostgresChannelLayer) -> Any:
    try:
        yield layer
    finally:
        await layer.close()


@on_both(Halved)
async def test_get_capacity_overridden_counts_for_channels_and_groups(
    migrated_dsn: str, layer_class: type[PostgresChannelLayer]
) -> None:
    async with opened(layer_class(dsn=migrated_dsn, capacity=10, **UNHURRIED)) as layer:
        assert await accepted(layer, "jobs") == 5
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        for number in range(8):
            await layer.group_send("room", {"number": number})
        while layer.stats()["dropped_full"] < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(ImproperlyConfigured, match=r"get_capacity.* not 0, for channel broken"):
            await layer.send("broken", {})


# --- Own types


PAGE = Path(__file__).parents[2] / "docs/how-to/own-types.md"
EXAMPLE: dict[str, Any] = {}
exec(PAGE.read_text().split("```python\n# project/layers.py")[1].split("```")[0], EXAMPLE)
OwnTypes: type[PostgresChannelLayer] = EXAMPLE["ProjectChannelLayer"]


class ByExtension(PostgresChannelLayer):
    """Own types as extension types of msgpack."""

    def serialize(self, message: Message) -> bytes:
        packed: bytes = msgpack.packb(message, default=self._pack, datetime=True)
        return packed

    @staticmethod
    def _pack(value: object) -> msgpack.ExtType:
        assert isinstance(value, uuid.UUID)
        return msgpack.ExtType(1, value.bytes)

    def deserialize(self, payload: bytes) -> Message:
        message: Message = msgpack.unpackb(
            payload, timestamp=3, ext_hook=lambda code, data: uuid.UUID(bytes=data)
        )
        return message


@on_both(OwnTypes, ByExtension)
@pytest.mark.parametrize(
    "options", [{}, {"symmetric_encryption_keys": ["secret"]}], ids=["plain", "encrypted"]
)
async def test_own_types_arrive_by_every_way_of_sending(
    migrated_dsn: str, layer_class: type[PostgresChannelLayer], options: Message
) -> None:
    """Each member of a group gets values of its own."""
    message = {
        "type": "test",
        "at": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
        "ids": [uuid.UUID(int=5)],
    }
    async with opened(layer_class(dsn=migrated_dsn, **options, **UNHURRIED)) as layer:
        one, two = [await layer.new_channel() for _ in range(2)]
        for channel in (one, two):
            await layer.group_add("room", channel)
        await layer.send("jobs", message)
        await layer.send_many([("jobs", message)])
        await layer.group_send("room", message)
        await layer.group_send_many([("room", message)])
        received = [await receive(layer, name) for name in ("jobs", "jobs", one, one, two, two)]
        assert received == [message] * 6
        assert len({id(each["ids"]) for each in received}) == 6


@on_both(OwnTypes)
async def test_own_types_may_be_encrypted_and_the_size_limit_applies(
    migrated_dsn: str, layer_class: type[PostgresChannelLayer]
) -> None:
    keys = ["secret"]
    layer = layer_class(dsn=migrated_dsn, symmetric_encryption_keys=keys, max_message_size=100)
    async with opened(layer):
        with pytest.raises(MessageTooLarge):
            await layer.send("jobs", {"id": uuid.UUID(int=5), "text": "x" * 100})
        with pytest.raises(InvalidMessage, match=r'message\["a"\] is of type'):
            await layer.send("jobs", {"a": object()})
        with pytest.raises(InvalidMessage, match=r"Item 1: .*must be a dict"):
            await layer.send_many([("jobs", {}), ("jobs", [uuid.UUID(int=5)])])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ("text", "not str"),
        (b"", "not no bytes"),
        (b"\x00", "not other bytes"),
        (None, "not NoneType"),
        (b"[1]", "not other bytes"),
    ],
)
async def test_serialize_returning_what_readers_cannot_tell_apart_raises(
    result: Any, says: str
) -> None:
    class Wrong(PostgresChannelLayer):
        def serialize(self, message: Message) -> bytes:
            return result  # type: ignore[no-any-return]

    with pytest.raises(TypeError, match=rf"serialize\(\) must return .*{says}"):
        await Wrong(dsn="dbname=x").send("jobs", {})


class Failing(PostgresChannelLayer):
    def deserialize(self, payload: bytes) -> Message:
        message = super().deserialize(payload)
        if "raise" in message:
            raise ValueError(message)
        return message if "list" not in message else [message]  # type: ignore[return-value]


@on_both(Failing)
async def test_deserialize_that_fails_skips_the_message_and_logs_no_content(
    migrated_dsn: str, caplog: pytest.LogCaptureFixture, layer_class: type[PostgresChannelLayer]
) -> None:
    caplog.set_level(logging.ERROR, logger="pg_layer")
    async with opened(layer_class(dsn=migrated_dsn, **UNHURRIED)) as layer:
        await layer.send("jobs", {"raise": "secret"})
        await layer.send("jobs", {"list": "secret"})
        await layer.send("jobs", {"n": 1})
        assert await receive(layer, "jobs") == {"n": 1}
        assert layer.stats()["dropped_undecodable"] == 2
    texts = [record.getMessage() for record in records(caplog, log_events.MESSAGE_UNDECODABLE)]
    assert re.search(
        r"deserialize\(\) raised ValueError .*test_layer_attributes.py, line", texts[0]
    )
    assert "returned list" in texts[1]
    assert "secret" not in caplog.text


async def test_deserialize_reads_messages_that_were_sent_from_sql(
    migrated_dsn: str, observer: Observer
) -> None:
    async with opened(OwnTypes(dsn=migrated_dsn, **UNHURRIED)) as layer:
        message = json.dumps({"type": "a", "id": {"$uuid": str(uuid.UUID(int=5))}})
        observer.execute("SELECT pg_layer_send('jobs', %s)", [message])
        assert await receive(layer, "jobs") == {"type": "a", "id": uuid.UUID(int=5)}
