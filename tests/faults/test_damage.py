"""Rows, notifications and tables that are broken from outside, while messages flow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

import psycopg
import pytest

from pg_layer import LayerUnavailable, NotMigrated, PgLayerError, PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.faults.conftest import migrate
from tests.logs import event_of, records
from tests.processes import Link, Processes, listen, open_layer, receive, until

Recovery = Callable[[str], AbstractContextManager[None]]

OPTIONS: dict[str, object] = {"capacity": 100_000}
HUGE = 10**30


async def receive_everything(
    link: Link, /, dsn: str, **options: object
) -> tuple[list[int], list[int], list[int]]:
    """Receive on a member of the room, on another channel, and on "jobs". Runs in a process.

    Report the two channels first, and the events and texts of all warnings at the end. Return
    the numbers that arrived on each.
    """
    warnings: list[tuple[str | None, str]] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(  # type: ignore[method-assign]
        (event_of(record), record.getMessage())
    )
    logging.getLogger("pg_layer").addHandler(handler)
    async with open_layer(dsn, **OPTIONS, **options) as layer:
        member, alone = await layer.new_channel(), await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", member)

        async def receive_numbers(channel: str) -> list[int]:
            found = []
            while (number := (await receive(layer, channel))["number"]) is not None:
                found.append(number)
            return found

        tasks = [
            asyncio.create_task(receive_numbers(channel)) for channel in (member, alone, "jobs")
        ]
        link.say((member, alone))
        first, second, third = await asyncio.gather(*tasks)
    link.say(warnings)
    return first, second, third


class NumberedTraffic:
    """A sender of numbers to the room, to a channel and to workers.

    For each of the three: ``sure`` lists the sends that returned, ``perhaps`` those with an
    unknown outcome.
    """

    def __init__(self, layer: PostgresChannelLayer, alone: str) -> None:
        self._layer = layer
        self._alone = alone
        self.number = 0
        self.sure: tuple[list[int], ...] = ([], [], [])
        self.perhaps: tuple[list[int], ...] = ([], [], [])
        self.errors: list[BaseException] = []

    async def one(self) -> None:
        number = self.number
        # Small and large messages, so that some are read and others are in the notification.
        message = {"number": number, "blob": bytes(9000 if number % 7 == 0 else 10)}
        sends = [
            self._layer.group_send("room", message),
            self._layer.send(self._alone, message),
            self._layer.send("jobs", message),
        ]
        for place, outcome in enumerate(await asyncio.gather(*sends, return_exceptions=True)):
            if outcome is None:
                self.sure[place].append(number)
            elif isinstance(outcome, LayerUnavailable) and "unknown" in str(outcome):
                self.perhaps[place].append(number)
            if outcome is not None:
                self.errors.append(outcome)
        self.number += 1

    async def more(self, count: int) -> None:
        """Return when ``count`` more numbers have been sent after this call."""
        enough = self.number + 1 + count
        await until(lambda: self.number >= enough)

    async def end(self, member: str) -> None:
        for channel in (member, self._alone, "jobs"):
            await self._layer.send(channel, {"number": None})


@asynccontextmanager
async def flowing_traffic(
    layer: PostgresChannelLayer, alone: str
) -> AsyncIterator[NumberedTraffic]:
    traffic = NumberedTraffic(layer, alone)
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            await traffic.one()
            await asyncio.sleep(0.002)  # so that the readers keep up

    running = asyncio.create_task(run())
    try:
        yield traffic
    finally:
        stop.set()
        await running


# ---------------------------------------------------------------------- rows

FOREIGN_CHANNEL = "specific.0123456789abcdef!1"
OWN = "a channel of the reader's"
CONTROL = b'{"group": "room", "request": 1, "snapshot": "1:1:", "expires_at": null}'
# Kind, channel and payload of the rows at the reader's address.
ROWS: dict[str, tuple[str, str | None, bytes]] = {
    "rubbish": ("message", OWN, b"\x00\xff\x00\xff"),
    "empty": ("message", OWN, b""),
    "unknown kind": ("something new", OWN, b"\x80"),
    "unknown kind of nothing": ("", None, b""),
    "message for no channel": ("message", None, b"\x80"),
    "add of no channel": ("add", None, CONTROL),
    "add without JSON": ("add", OWN, b"\xff"),
    "add without a group": ("add", OWN, b'{"request": 1, "snapshot": "1:1:"}'),
    "add of another type": ("add", OWN, b"[1]"),
    "add with values of other types": (
        *("add", OWN),
        b'{"group": 5, "request": "x", "snapshot": "y", "expires_at": [1]}',
    ),
    "discard without a group": ("discard", OWN, b"{}"),
    "discard of no channel": ("discard", None, CONTROL),
    "add of another client's channel": ("add", FOREIGN_CHANNEL, CONTROL),
    "discard of another client's channel": ("discard", FOREIGN_CHANNEL, CONTROL),
    "add of a normal channel": ("add", "jobs", CONTROL),
    "strange name": ("message", "no name\n!!/", b"\x80"),
    "strange name of a normal channel": ("message", "", b"\x80"),
    "another client's channel": ("message", FOREIGN_CHANNEL, b"\x80"),
}
GROUP_ROWS: dict[str, tuple[str, str | None, bytes]] = {
    "rubbish": ("message", None, b"rubbish" * 5),
    "empty": ("message", None, b""),
    "unknown kind": ("something new", None, b"\x80"),
    "with a channel": ("message", OWN, b"\xc1"),
    "control message": ("discard", OWN, CONTROL),
}
WRITE_ROW = """
    WITH written AS (
        INSERT INTO pg_layer_message (address, xid, boot, kind, channel, payload, expires_at)
        SELECT %s, pg_current_xact_id(), pg_layer_current_boot(), %s, %s, %s, {expires}
        RETURNING address, xid, boot, id
    )
    SELECT pg_notify(
        pg_layer_notification_channel(address), concat_ws(' ', 'R', boot, xid, %s::text, id, id)
    )
    FROM written
"""
TIMES = {
    "": "clock_timestamp() + interval '1 minute'",
    ", for ever": "'infinity'",
    ", never": "'-infinity'",
}


@pytest.mark.parametrize("expires", TIMES.values(), ids=["soon", "for ever", "never"])
async def test_broken_rows_among_others_harm_no_other_message(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer, expires: str
) -> None:
    layer = make_layer(**OPTIONS)
    reader = processes.start(receive_everything, migrated_dsn)
    member, alone = await reader.hear()
    async with flowing_traffic(layer, alone) as traffic:
        [(own,)] = observer.execute("SELECT pg_layer_address('asgi', %s)", (alone,)).fetchall()
        for address, name, rows in ((own, ".", ROWS), ("asgi!@room", "@room", GROUP_ROWS)):
            for kind, channel, payload in rows.values():
                await traffic.more(1)
                # Each row is announced as the layer does it, in its own transaction.
                observer.execute(
                    WRITE_ROW.format(expires=expires).encode(),
                    (address, kind, alone if channel == OWN else channel, payload, name),
                )
        # Rows at the address of a normal channel too: a claim makes no difference between rows.
        for values in ("('message', 'jobs', '\\x00ff')", "('odd', 'jobs', '\\x80')"):
            observer.execute(
                "INSERT INTO pg_layer_message"
                " (address, xid, boot, kind, channel, payload, expires_at)"
                " SELECT 'asgi!:jobs', pg_current_xact_id(), 0, kind, channel, payload::bytea,"
                f" {expires} FROM (VALUES {values}) AS row (kind, channel, payload)".encode()
            )
        await traffic.more(10)
    await traffic.end(member)
    warnings = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == []
    assert len(warnings) == len(set(warnings))
    assert log_events.TASK_FAILED not in [event for event, _ in warnings]
    # Broken rows are deleted like others. Only expired rows stay, until a sweep.
    left = (
        "SELECT kind, channel FROM pg_layer_message"
        " WHERE address = %s AND expires_at > clock_timestamp()"
    )
    assert observer.execute(left.encode(), (own,)).fetchall() == []


async def test_payloads_overwritten_while_they_wait_are_skipped_and_logged_once(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    # The layer does not listen yet. All messages wait in the table, and every third is damaged.
    layer, sender = make_layer(**OPTIONS), make_layer(**OPTIONS)
    channel = await layer.new_channel()
    for number in range(300):
        for name in (channel, "jobs"):
            await sender.send(name, {"number": number})
    observer.execute(
        "UPDATE pg_layer_message SET payload = decode('00ff00ff', 'hex') WHERE id IN ("
        " SELECT id FROM ("
        "SELECT id, row_number() OVER (PARTITION BY channel ORDER BY id) - 1 AS place"
        "  FROM pg_layer_message) AS m WHERE place % 3 = 0)"
    )
    undamaged = [number for number in range(300) if number % 3]
    for name in (channel, "jobs"):
        assert [(await receive(layer, name))["number"] for _ in undamaged] == undamaged
    assert len(records(caplog, log_events.MESSAGE_UNDECODABLE)) == 1
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )


async def test_messages_encrypted_with_a_wrong_key_harm_no_other_message(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    right_sender = make_layer(**OPTIONS, symmetric_encryption_keys=["right"])
    wrong_sender = make_layer(**OPTIONS, symmetric_encryption_keys=["wrong"])
    reader = processes.start(receive_everything, migrated_dsn, symmetric_encryption_keys=["right"])
    member, alone = await reader.hear()
    async with (
        flowing_traffic(right_sender, alone) as traffic,
        flowing_traffic(wrong_sender, alone) as wrong_traffic,
    ):
        await traffic.more(50)
        await wrong_traffic.more(50)
    await traffic.end(member)
    warnings = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == wrong_traffic.errors == []
    [(event, text)] = warnings
    assert event == log_events.MESSAGE_UNDECODABLE
    assert "symmetric_encryption_keys" in text


# ---------------------------------------------------------------------- notifications

FOREIGN_PAYLOADS = [
    "",
    "R 1 2",
    "R 1 2 . 3 4 5",
    "R a b . c d",
    "R 0 0 . 0 0",
    "R 1 1 . 9 2",
    f"R 1 1 . 1 {2**63 - 1}",
    f"R {HUGE} 1 . 1 1",
    f"R 1 {HUGE} . 1 1",
    f"R {2**63 - 1} 1 . 1 1",
    f"R 1 1 . {2**63 - 1} {2**63 - 1}",
    "R 1 1 @ 1 1",
    f"R 1 1 @room 1 {2**63 - 1}",
    "R 1 1 . 2 3\n",
    "R  1 2 . 3 4",
    "R +1 2 . 3 3",
    "R 1_0 2 . 3 3",
    f"r 1 1 . 1 {2**63 - 1}",
    "M ",
    "M 1 2",
    "M 1 2 {channel} 3 9999999999 *",
    "M 1 2 {channel} 3 9999999999 * !!",
    "M 1 2 {channel} 3 9999999999 * AAA",
    "M 1 2 {channel} 3 nan * gA==",
    "M 1 2 {channel} x 9999999999 * gA==",
    f"M {2**63} 2 {{channel}} 3 9999999999 * gA==",
    "m 1 2 {channel} 3 9999999999 * AAA",
    "J",
    "J x",
    f"J {HUGE}",
    f"J {2**63 - 1}",
    "P 1",
    f"P {HUGE}",
    f"P {2**63 - 1}",
    "P",
    "LISTEN pg_layer; DROP TABLE pg_layer_message",
    "☃" * 2000,
]


async def test_foreign_notifications_under_traffic_are_ignored_and_logged_once(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(**OPTIONS)
    # The short heartbeat: its own pings arrive among the foreign notifications.
    reader = processes.start(receive_everything, migrated_dsn, lease=5, heartbeat=0.1)
    member, alone = await reader.hear()
    async with flowing_traffic(layer, alone) as traffic:
        for payload in FOREIGN_PAYLOADS * 2:
            for name in (alone, "jobs"):
                observer.execute(
                    "SELECT pg_notify("
                    "pg_layer_notification_channel(pg_layer_address('asgi', %s)), %s)",
                    (name, payload.format(channel=alone)),
                )
            await traffic.more(1)
    await traffic.end(member)
    warnings = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == []
    # One warning for each notification channel, and one for a payload that looks like a message
    # and cannot be decoded.
    events = [event for event, _ in warnings]
    assert events.count(log_events.NOTIFICATION_IGNORED) == 2
    ignored = [text for event, text in warnings if event == log_events.NOTIFICATION_IGNORED]
    assert len(set(ignored)) == 2
    # With a heartbeat of 0.1 s, a busy machine may log an outage, or miss its own pings.
    outage = {
        log_events.DATABASE_LOST,
        log_events.DATABASE_BACK,
        log_events.NOTIFICATIONS_MISSING,
    }
    assert set(events) - outage <= {log_events.NOTIFICATION_IGNORED, log_events.MESSAGE_UNDECODABLE}
    assert events.count(log_events.MESSAGE_UNDECODABLE) <= 1


async def test_notification_repeated_delivers_its_message_once(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    # Each notification arrives twice, as a proxy might deliver it.
    layer = make_layer(**OPTIONS)
    reader = processes.start(receive_everything, migrated_dsn)
    member, alone = await reader.hear()
    observer.execute(
        "SELECT pg_layer_listen(ARRAY[pg_layer_notification_channel(pg_layer_address('asgi', %s)),"
        " pg_layer_notification_channel('asgi!@room'),"
        " pg_layer_notification_channel('asgi!:jobs')])",
        (alone,),
    )
    repeated = 0
    async with flowing_traffic(layer, alone) as traffic:
        while repeated < 100:
            heard = await asyncio.to_thread(
                lambda: list(observer.notifies(timeout=5, stop_after=1))
            )
            for notify in heard:
                if notify.pid != observer.info.backend_pid:
                    observer.execute("SELECT pg_notify(%s, %s)", (notify.channel, notify.payload))
                    repeated += 1
    await traffic.end(member)
    await reader.hear()
    assert await reader.result() == traffic.sure


# ---------------------------------------------------------------------- tables


def undo_migration(dsn: str) -> None:
    """Undo the migration."""
    with psycopg.connect(dsn) as connection:
        connection.execute((MIGRATIONS / "0001_reverse.sql").read_bytes())


@pytest.mark.parametrize(
    "has_gap", [True, False], ids=["missing for a while", "in one transaction"]
)
async def test_tables_dropped_and_migrated_again_without_traffic_lose_nothing(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    recovery: Recovery,
    has_gap: bool,
) -> None:
    layer = make_layer(**OPTIONS, send_timeout=5)
    reader = processes.start(receive_everything, migrated_dsn, lease=2, heartbeat=0.5)
    member, alone = await reader.hear()
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        async with flowing_traffic(layer, alone) as traffic:
            await traffic.more(20)
        await all_received(connection)
        if has_gap:
            await asyncio.to_thread(undo_migration, migrated_dsn)
            for outcome in await asyncio.gather(
                layer.send(alone, {"number": -1}),
                layer.group_send("room", {"number": -1}),
                layer.group_add("room", "jobs"),
                return_exceptions=True,
            ):
                assert isinstance(outcome, NotMigrated)
            # Give the reader time to notice the missing tables.
            await asyncio.sleep(1)
            await asyncio.to_thread(migrate, migrated_dsn)
        else:
            with connection.transaction():
                connection.execute((MIGRATIONS / "0001_reverse.sql").read_bytes())
                for file in sorted(MIGRATIONS.glob("0001_[0-9]_*.sql")):
                    connection.execute(file.read_bytes())
        when = "a second later" if has_gap else "at once"
        with recovery(f"tables migrated again ({when}): until the group is back"):
            await until(
                lambda: connection.execute("SELECT channel FROM pg_layer_membership").fetchone()
            )
    async with flowing_traffic(layer, alone) as later_traffic:
        await later_traffic.more(50)
    await later_traffic.end(member)
    warnings = await reader.hear()
    found = await reader.result()
    assert later_traffic.errors == traffic.errors == []
    for place in range(3):
        assert found[place] == [*traffic.sure[place], *later_traffic.sure[place]]
    assert len([text for _, text in warnings if "manage.py migrate pg_layer" in text]) <= 1
    assert len(warnings) == len(set(warnings))
    assert len(warnings) <= 3


async def all_received(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Return when all messages have been received. Group messages stay until they expire."""
    left = b"SELECT FROM pg_layer_message WHERE address NOT LIKE '%!@%'"
    await until(lambda: connection.execute(left).fetchall() == [])


async def test_tables_dropped_under_traffic_lose_only_what_they_held(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, recovery: Recovery
) -> None:
    layer = make_layer(**OPTIONS, send_timeout=5)
    reader = processes.start(receive_everything, migrated_dsn, lease=2, heartbeat=0.5)
    member, alone = await reader.hear()
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        async with flowing_traffic(layer, alone) as traffic:
            await traffic.more(20)
            await asyncio.to_thread(undo_migration, migrated_dsn)
            await traffic.more(5)
            assert traffic.errors
            await asyncio.to_thread(migrate, migrated_dsn)
            with recovery(
                "tables dropped under traffic: from the migration until the group is back"
            ):
                await until(
                    lambda: connection.execute("SELECT channel FROM pg_layer_membership").fetchone()
                )
            first_after_migration = traffic.number + 1
            await traffic.more(50)
    await traffic.end(member)
    warnings = await reader.hear()
    found = await reader.result()
    assert all(isinstance(error, PgLayerError) for error in traffic.errors)
    for place in range(3):
        # Messages that waited in the dropped table are lost. No other is, and none is doubled.
        assert found[place] == sorted(set(found[place]))
        assert set(found[place]) <= {*traffic.sure[place], *traffic.perhaps[place]}
        assert [n for n in found[place] if n >= first_after_migration] == [
            n for n in traffic.sure[place] if n >= first_after_migration
        ]
    assert len(warnings) == len(set(warnings))
