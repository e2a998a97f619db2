"""Encryption, and messages that cannot be read: they are skipped and logged, others arrive."""

from __future__ import annotations

import asyncio

import pytest

from pg_layer._state import log_events
from pg_layer._state.log_limit import MAX_RECORDS, PERIOD, LogLimit
from pg_layer.exceptions import UndecodableMessage
from tests.conftest import MakeLayer, Observer
from tests.logs import events, records
from tests.processes import Link, Message, Processes, listen, open_layer, read, receive, until

OLD, NEW, WRONG = "the old key", b"the new key", "a key of another project"
SECRET = "attack at dawn"
# Messages to channels that were not received. Group messages remain until they expire.
IS_ALL_RECEIVED = "SELECT count(*) = 0 FROM pg_layer_message WHERE address NOT LIKE '%!@%'"


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the texts of the warnings and errors that the package logged."""
    return [record.getMessage() for record in records(caplog)]


# ---------------------------------------------------------------------- keys


async def test_encrypted_message_arrives_and_is_nowhere_in_clear(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(symmetric_encryption_keys=[OLD])
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_add("room", "jobs")
    observer.execute(
        """
        SELECT pg_layer_listen(ARRAY[
            pg_layer_notification_channel(pg_layer_address('asgi', %s)),
            pg_layer_notification_channel(pg_layer_group_address('asgi', 'room'))])
        """,
        (channel,),
    )
    messages: list[Message] = [
        {"text": SECRET, "blob": bytes(size)} for size in (0, 1000, 10_000, 1_000_000)
    ]
    for message in messages:
        await layer.send(channel, message)
        await layer.group_send("room", message)
    rows = observer.execute("SELECT payload FROM pg_layer_message").fetchall()
    assert len(rows) == 3 * len(messages)
    said = [
        notify.payload for notify in observer.notifies(timeout=10, stop_after=2 * len(messages))
    ]
    assert not [
        payload for (payload,) in rows if SECRET.encode() in payload or b"\x00" * 8 in payload
    ]
    assert len(said) == 2 * len(messages)
    reader = processes.start(read_both, migrated_dsn, len(messages))
    await layer.send("jobs", {"text": "the end"})
    assert await reader.result() == [*messages, {"text": "the end"}]
    for message in messages:
        assert [await receive(layer, channel) for _ in range(2)] == [message, message]


async def read_both(link: Link, dsn: str, count: int) -> list[Message]:
    async with open_layer(dsn, symmetric_encryption_keys=[OLD]) as layer:
        return [await receive(layer, "jobs") for _ in range(count + 1)]


@pytest.mark.parametrize(
    ("writes", "reads"),
    [([OLD], [NEW, OLD]), ([NEW, OLD], [NEW, OLD]), ([NEW], [OLD, NEW]), ([NEW.decode()], [NEW])],
    ids=["not yet rotated", "rotated", "reader first", "as text and as bytes"],
)
async def test_keys_rotated_messages_arrive(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    writes: list[str | bytes],
    reads: list[str | bytes],
) -> None:
    layer = make_layer(symmetric_encryption_keys=writes)
    reader = processes.start(read, migrated_dsn, 2, symmetric_encryption_keys=reads)
    channel = await reader.hear()
    await layer.group_add("room", channel)
    await layer.send(channel, {"text": SECRET})
    await layer.group_send("room", {"blob": bytes(10_000)})
    assert await reader.result() == [{"text": SECRET}, {"blob": bytes(10_000)}]


@pytest.mark.parametrize(
    ("writes", "reads"),
    [([WRONG], [NEW, OLD]), (None, [NEW, OLD]), ([WRONG], None)],
    ids=["another key", "not encrypted", "reader without keys"],
)
@pytest.mark.parametrize("starts", ["listening", "later"])
async def test_message_that_no_key_opens_is_skipped_and_logged_once(
    make_layer: MakeLayer,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
    starts: str,
    writes: list[str] | None,
    reads: list[str] | None,
) -> None:
    reader, friend = (make_layer(symmetric_encryption_keys=reads) for _ in range(2))
    stranger = make_layer(symmetric_encryption_keys=writes)
    channel = await reader.new_channel()
    await reader.group_add("room", channel)
    await reader.group_add("room", "jobs")
    if starts == "listening":
        await listen(reader)
    for size in (10, 10_000, 10):
        await stranger.send(channel, {"text": SECRET, "blob": bytes(size)})
        await stranger.send("jobs", {"text": SECRET, "blob": bytes(size)})
        await stranger.group_send("room", {"text": SECRET, "blob": bytes(size)})
    for name in (channel, "jobs"):
        await friend.send(name, {"text": "readable"})
        assert await receive(reader, name) == {"text": "readable"}
    [complaint] = complaints(caplog)
    assert events(caplog) == [log_events.MESSAGE_UNDECODABLE]
    assert "symmetric_encryption_keys" in complaint
    assert SECRET not in caplog.text
    # They do not arrive again, and do not use capacity.
    await until(lambda: observer.execute(IS_ALL_RECEIVED.encode()).fetchone() == (True,))


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("sent_to", ["channel", "group"])
async def test_encrypted_notification_repeated_for_another_address_is_refused(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture, sent_to: str
) -> None:
    """A role that may only connect hears a notification, and repeats it with other names."""
    layer, sender = (make_layer(symmetric_encryption_keys=[OLD]) for _ in range(2))
    channel, other = await layer.new_channel(), await layer.new_channel()
    for group in ("room", "hall"):
        await layer.group_add(group, other)
    await listen(layer)
    where = {
        "room": "pg_layer_group_address('asgi', 'room')",
        "hall": "pg_layer_group_address('asgi', 'hall')",
        channel: f"pg_layer_address('asgi', '{channel}')",
        other: f"pg_layer_address('asgi', '{other}')",
    }
    observer.execute(
        f"SELECT pg_layer_listen(array_agg(pg_layer_notification_channel(address)))"
        f" FROM unnest(ARRAY[{', '.join(where.values())}]) AS address".encode()
    )
    if sent_to == "channel":
        await sender.send(channel, {"text": SECRET})
    else:
        await sender.group_send("room", {"text": SECRET})
    said_at = channel if sent_to == "channel" else "room"
    assert await receive(layer, channel if sent_to == "channel" else other) == {"text": SECRET}
    [heard] = observer.notifies(timeout=30, stop_after=1)
    letter, boot, xid, _, id, *rest = heard.payload.split(" ")
    for number, (name, address) in enumerate(where.items(), start=int(id) + 1_000_000):
        if name != said_at:
            entry = name if "!" in name else f"@{name}"
            repeated = " ".join((letter, boot, xid, entry, str(number), *rest))
            observer.execute(
                f"SELECT pg_notify(pg_layer_notification_channel({address}), %s)".encode(),
                (repeated,),
            )
    for name in (channel, other):
        await sender.send(name, {"text": "the end"})
        assert await receive(layer, name) == {"text": "the end"}
    assert layer.stats()["dropped_undecodable"] == 3
    [complaint] = complaints(caplog)
    assert "encrypted for another channel or group" in complaint


async def test_encrypted_row_copied_to_another_address_is_refused(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    # Its heartbeats search for rows that were not announced.
    layer = make_layer(symmetric_encryption_keys=[OLD], heartbeat=0.1)
    sender = make_layer(symmetric_encryption_keys=[OLD])
    sources = [await sender.new_channel(), "jobs"]
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    for name in sources:
        await sender.send(name, {"text": SECRET})
    copies = """
        INSERT INTO pg_layer_message (address, xid, boot, marked, channel, payload, expires_at)
        SELECT a.address, pg_current_xact_id(), 0, true, a.channel, m.payload, m.expires_at
        FROM pg_layer_message AS m, (VALUES
            (pg_layer_address('asgi', %s), %s), (pg_layer_group_address('asgi', 'room'), NULL),
            (pg_layer_address('asgi', 'mail'), 'mail')) AS a (address, channel)
        WHERE m.channel = ANY (%s)
    """
    assert observer.execute(copies.encode(), (channel, channel, sources)).rowcount == 6
    late = make_layer(symmetric_encryption_keys=[OLD])
    for name, reader in ((channel, layer), ("mail", late)):
        await sender.send(name, {"text": "the end"})
        assert await receive(reader, name) == {"text": "the end"}
    await until(lambda: layer.stats()["dropped_undecodable"] == 4)
    assert late.stats()["dropped_undecodable"] == 2
    assert SECRET not in caplog.text
    assert any(
        "encrypted for another channel or group" in complaint for complaint in complaints(caplog)
    )


async def test_encrypted_group_message_reaches_normal_channels_of_the_group(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """The rows of the normal channels contain tokens for the group."""
    layer, sender = (make_layer(symmetric_encryption_keys=[OLD]) for _ in range(2))
    await sender.group_add("room", "jobs")
    for size in (10, 10_000):
        await sender.group_send("room", {"blob": bytes(size)})
        assert await receive(layer, "jobs") == {"blob": bytes(size)}


# ---------------------------------------------------------------------- plain messages


def send_from_sql(observer: Observer, channel: str) -> None:
    """Send a small and a large message to a channel, and to a group that it is in."""
    for size in (10, 10_000):
        observer.execute(
            """
            SELECT
                pg_layer_send(
                    %s, jsonb_build_object('type', 'sql', 'pad', repeat('x', %s::integer))),
                pg_layer_group_send(
                    'room', jsonb_build_object('type', 'sql', 'pad', repeat('x', %s::integer)))
            """,
            (channel, size, size),
        )


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_message_from_sql_with_keys_is_refused(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    layer, friend = (
        make_layer(symmetric_encryption_keys=[OLD]),
        make_layer(symmetric_encryption_keys=[OLD]),
    )
    channel = name or await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    send_from_sql(observer, channel)
    await friend.send(channel, {"text": "encrypted"})
    assert await receive(layer, channel) == {"text": "encrypted"}
    [complaint] = complaints(caplog)
    assert "allow_unencrypted" in complaint
    assert layer.stats()["dropped_undecodable"] == 4
    await until(lambda: observer.execute(IS_ALL_RECEIVED.encode()).fetchone() == (True,))


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_message_from_sql_with_allow_unencrypted_is_delivered(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    layer = make_layer(symmetric_encryption_keys=[OLD], allow_unencrypted=True)
    strict, stranger = (
        make_layer(symmetric_encryption_keys=[OLD]),
        make_layer(symmetric_encryption_keys=[WRONG]),
    )
    channel = name or await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    send_from_sql(observer, channel)
    sizes = [len((await receive(layer, channel))["pad"]) for _ in range(4)]
    assert sizes == [10, 10, 10_000, 10_000]
    assert complaints(caplog) == []
    # An encrypted message needs a known key, and the layer encrypts all messages that it sends.
    await stranger.send(channel, {"text": SECRET})
    await layer.send(channel, {"text": SECRET})
    assert await receive(layer, channel) == {"text": SECRET}
    assert events(caplog) == [log_events.MESSAGE_UNDECODABLE]
    await layer.send("mail", {"text": SECRET})
    assert await receive(strict, "mail") == {"text": SECRET}


# ---------------------------------------------------------------------- damage

DAMAGES = {
    "empty": "''",
    "unknown": "'\\x00'",
    "cut": "substr(payload, 1, 10)",
    "longer": "payload || '\\xc0'",
    "noise": "sha256(payload)",
    "json": "'{\"text\": '",
    "no dict": "'[1]'",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_damaged_row_is_skipped_and_logged_once(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await sender.group_add("room", channel)  # this process does not listen yet
    for name in (channel, "jobs"):
        for _ in range(2):
            await sender.send(name, {"text": "to be damaged"})
    await sender.group_send("room", {"text": "to be damaged"})
    damaged = observer.execute(
        f"UPDATE pg_layer_message SET payload = {damage} WHERE kind = 'message'".encode()
    )
    assert damaged.rowcount == 5
    for name in (channel, "jobs"):
        await sender.send(name, {"text": "sound"})
        assert await receive(layer, name) == {"text": "sound"}
    assert events(caplog) == [log_events.MESSAGE_UNDECODABLE]
    assert layer.stats()["dropped_undecodable"] == 5
    await until(lambda: observer.execute(IS_ALL_RECEIVED.encode()).fetchone() == (True,))


async def test_row_of_an_unknown_kind_is_skipped(make_layer: MakeLayer, observer: Observer) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await sender.send(channel, {"text": "of the future"})
    observer.execute("UPDATE pg_layer_message SET kind = 'something new'")
    await sender.send(channel, {"text": "known"})
    assert await receive(layer, channel) == {"text": "known"}


# ---------------------------------------------------------------------- foreign notifications

HUGE = 10**30
FOREIGN = [
    "",
    " ",
    "hello",
    "M",
    "R",
    "J",
    "M 1",
    "M 1 2",
    "M 1 2 c",
    "M 1 2 c 3 4 *",
    "M one 2 c 3 4 * gA==",
    "M 1 2 c three 4 * gA==",
    "M 1 2 c 3 soon * gA==",
    "M 1 2 c 3 nan * gA==",
    "M 1 2 c 3 4 * !",
    "M 1 2 c 3 4 * gA",
    "M 1 2 c 3 4 * \N{SNOWMAN}",
    "M 1 2  3 4 * gA==",
    f"M {HUGE} 1 {{channel}} 3 {HUGE} * AAAA",
    f"M 1 {HUGE} {{channel}} 3 {HUGE} * AAAA",
    f"M 1 1 {{channel}} {HUGE} {HUGE} * AAAA",
    f"m -{HUGE} 1 {{channel}} 3 {HUGE} * AAAA",
    "R 1",
    "R 1 2",
    "R 1 2 3 4",
    "R a b . c d",
    "R 1 1 . 5 3",
    "R 1 1 . -5 -3",
    f"R 1 1 . -{HUGE} {HUGE}",
    f"R {HUGE} {HUGE} . {HUGE} {HUGE}",
    f"r 1 1 @room 1 {2**63 - 1}",
    f"J {HUGE}",
    "J -1",
    "J x",
    "P x",
    "F 1 2 3",
    "x" * 7999,
]


@pytest.mark.parametrize("name", [None, "jobs"], ids=["specific", "normal"])
async def test_foreign_notification_is_ignored_and_logged_once(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = name or await layer.new_channel()
    await sender.send(channel, {"number": -1})
    await receive(layer, channel)
    for number, payload in enumerate(FOREIGN):
        observer.execute(
            "SELECT pg_notify(pg_layer_notification_channel(pg_layer_address('asgi', %s)), %s)",
            (channel, payload.format(channel=channel)),
        )
        for size in (10, 10_000):
            await sender.send(channel, {"number": number, "blob": bytes(size)})
            assert (await receive(layer, channel))["number"] == number
    assert len(records(caplog, log_events.NOTIFICATION_IGNORED)) == 1
    assert layer.stats()["ignored_notifications"] >= 20
    # Received messages are still deleted.
    await until(lambda: observer.execute(IS_ALL_RECEIVED.encode()).fetchone() == (True,))
    assert not [record for record in caplog.records if record.exc_info]


MANY = 20_000
INVENTED = """
    SELECT count(pg_notify(
        pg_layer_notification_channel(pg_layer_address('asgi', %(channel)s)), format(
        'M %%s %%s %%s %%s 4102444800 * gA==', boot, 1000000 + n,
        replace(replace(%(name)s, 'N', n::text), 'X', to_hex(n)), 1000000 + n)))
    FROM pg_layer_boot, generate_series(1, %(many)s) AS n
"""


@pytest.mark.parametrize("how", ["serials", "prefixes", "codes", "normal", "elsewhere"])
async def test_notification_for_unmade_channels_is_foreign_and_makes_no_queue(
    make_layer: MakeLayer, observer: Observer, how: str
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    name = {
        "serials": channel.partition("!")[0] + "!X",
        "prefixes": channel.replace("specific", "prefixN"),
        "codes": channel.rpartition("-")[0] + "-X",
        "normal": "jobsN",
        "elsewhere": "specific.N!1",
    }[how]
    before = layer.stats()
    observer.execute(INVENTED.encode(), {"channel": channel, "name": name, "many": MANY})
    await layer.send(channel, {"text": "the end"})
    assert await receive(layer, channel) == {"text": "the end"}
    after = layer.stats()
    assert after["channels"] <= before["channels"] + 1
    assert after["ignored_notifications"] == before["ignored_notifications"] + MANY
    assert after["dropped_undecodable"] == 0


async def test_row_for_an_unmade_channel_is_deleted_not_that_of_a_forgotten_queue(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    client = layer._loops.client

    def is_forgotten() -> bool:
        client.forget_idle_queues()
        return client.find_queue(channel) is None

    for size in (10, 10_000):
        await until(is_forgotten)
        await sender.send(f"{channel}0", {"blob": bytes(size)})
        await sender.send(channel, {"blob": bytes(size)})
        assert await receive(layer, channel) == {"blob": bytes(size)}
    assert layer.stats()["ignored_notifications"] == 2
    await until(lambda: observer.execute(IS_ALL_RECEIVED.encode()).fetchone() == (True,))


async def test_log_many_full_channels_and_forged_messages_is_bounded(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind of line is limited, and the next one contains the number of omitted lines."""
    count = 1100
    now = 1000.0
    layer = make_layer(capacity=1)
    layer._loops.client.log_limit = LogLimit(lambda: now)
    channel = await layer.new_channel()
    await listen(layer)
    members = [await layer.new_channel() for _ in range(count)]
    await asyncio.gather(*(layer.group_add("room", member) for member in members))

    for number in range(2):
        await layer.group_send("room", {"number": number})
    # No two errors have the same text: it includes the length.
    forge = """
        SELECT count(pg_notify(
            pg_layer_notification_channel(pg_layer_address('asgi', %(channel)s)), format(
            'M %%s %%s %%s %%s 4102444800 * %%s',
            boot, 1000000 + n, %(channel)s::text, 1000000 + n,
            translate(encode(convert_to(repeat('x', n), 'UTF8'), 'base64'), E'\\n', ''))))
        FROM pg_layer_boot, generate_series(1, %(count)s) AS n
    """
    observer.execute(forge.encode(), {"channel": channel, "count": count})
    await layer.send(channel, {"text": "the end"})
    assert await receive(layer, channel) == {"text": "the end"}
    stats = layer.stats()
    assert (stats["dropped_full"], stats["dropped_undecodable"]) == (count, count)
    assert len(complaints(caplog)) == 2 * MAX_RECORDS
    caplog.clear()
    now += PERIOD
    layer._loops.client.count_dropped("room", members[0])
    layer._loops.client.log_undecodable("room", UndecodableMessage("another"))
    assert events(caplog) == [log_events.CHANNEL_FULL, log_events.MESSAGE_UNDECODABLE]
    assert all(f": {count - MAX_RECORDS}.)" in complaint for complaint in complaints(caplog))
