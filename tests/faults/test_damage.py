"""Rows, notifications and tables that somebody else has broken, while messages flow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import NamedTuple

import psycopg
import pytest

from pg_layer import LayerUnavailable, NotMigrated, PgLayerError, PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.faults.conftest import migrate
from tests.logs import event_of, events
from tests.processes import Link, Processes, listen, open_layer, receive, until

Recovery = Callable[[str], AbstractContextManager[None]]

OPTIONS: dict[str, object] = {"capacity": 100_000}
HUGE = 10**30


class Logged(NamedTuple):
    """A warning or an error that the layer logged."""

    event: str | None
    text: str


async def consumer(
    link: Link, /, dsn: str, **options: object
) -> tuple[list[int], list[int], list[int]]:
    """Receive on a member of the room, on a channel that is none, and on "jobs"; return the numbers of each.

    Says the two channels, and at last all warnings that were logged.
    """
    said: list[Logged] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(  # type: ignore[method-assign]
        Logged(event_of(record), record.getMessage())
    )
    logging.getLogger("pg_layer").addHandler(handler)
    async with open_layer(dsn, **OPTIONS, **options) as layer:
        member, alone = await layer.new_channel(), await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", member)

        async def numbers(channel: str) -> list[int]:
            found = []
            while (number := (await receive(layer, channel))["number"]) is not None:
                found.append(number)
            return found

        tasks = [asyncio.create_task(numbers(channel)) for channel in (member, alone, "jobs")]
        link.say((member, alone))
        first, second, third = await asyncio.gather(*tasks)
    link.say(said)
    return first, second, third


class Traffic:
    """Numbers to the room, to a channel, and to workers; of each what was surely sent, and what perhaps."""

    def __init__(self, layer: PostgresChannelLayer, alone: str) -> None:
        self._layer = layer
        self._alone = alone
        self.number = 0
        self.sure: tuple[list[int], ...] = ([], [], [])
        self.perhaps: tuple[list[int], ...] = ([], [], [])
        self.errors: list[BaseException] = []

    async def one(self) -> None:
        number = self.number
        # Small and large in turn, single and in batches.
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
        """Return when so many more have been sent since."""
        enough = self.number + 1 + count
        await until(lambda: self.number >= enough)

    async def end(self, member: str) -> None:
        for channel in (member, self._alone, "jobs"):
            await self._layer.send(channel, {"number": None})


@asynccontextmanager
async def flowing(layer: PostgresChannelLayer, alone: str) -> AsyncIterator[Traffic]:
    traffic = Traffic(layer, alone)
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            await traffic.one()
            await asyncio.sleep(0.002)  # the readers are to keep up

    running = asyncio.create_task(run())
    try:
        yield traffic
    finally:
        stop.set()
        await running


# ---------------------------------------------------------------------- rows

ELSEWHERE = "specific.0123456789abcdef!1"
OWN = "a channel of the reader's"
CONTROL = b'{"group": "room", "claim": 1, "snapshot": "1:1:", "expires_at": null}'
# Kind, channel and payload of rows at the reader's address.
ROWS: dict[str, tuple[str, str | None, bytes]] = {
    "rubbish": ("message", OWN, b"\x00\xff\x00\xff"),
    "empty": ("message", OWN, b""),
    "unknown kind": ("something new", OWN, b"\x80"),
    "unknown kind of nothing": ("", None, b""),
    "message for no channel": ("message", None, b"\x80"),
    "add of no channel": ("add", None, CONTROL),
    "add without JSON": ("add", OWN, b"\xff"),
    "add without a group": ("add", OWN, b'{"claim": 1, "snapshot": "1:1:"}'),
    "add of another type": ("add", OWN, b"[1]"),
    "add with values of other types": (
        *("add", OWN),
        b'{"group": 5, "claim": "x", "snapshot": "y", "expires_at": [1]}',
    ),
    "discard without a group": ("discard", OWN, b"{}"),
    "discard of no channel": ("discard", None, CONTROL),
    "add of another client's channel": ("add", ELSEWHERE, CONTROL),
    "discard of another client's channel": ("discard", ELSEWHERE, CONTROL),
    "add of a normal channel": ("add", "jobs", CONTROL),
    "strange name": ("message", "no name\n!!/", b"\x80"),
    "strange name of a normal channel": ("message", "", b"\x80"),
    "another client's channel": ("message", ELSEWHERE, b"\x80"),
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
    SELECT pg_notify(pg_layer_notification_channel(address), concat_ws(' ', 'R', boot, xid, %s::text, id, id))
    FROM written
"""
TIMES = {
    "": "clock_timestamp() + interval '1 minute'",
    ", for ever": "'infinity'",
    ", never": "'-infinity'",
}


@pytest.mark.parametrize("expires", TIMES.values(), ids=["soon", "for ever", "never"])
async def test_broken_rows_between_others_harm_none_of_them(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer, expires: str
) -> None:
    layer = make_layer(**OPTIONS)
    reader = processes.start(consumer, migrated_dsn)
    member, alone = await reader.hear()
    async with flowing(layer, alone) as traffic:
        [(own,)] = observer.execute("SELECT pg_layer_address('asgi', %s)", (alone,)).fetchall()
        for address, name, rows in ((own, ".", ROWS), ("asgi!@room", "@room", GROUP_ROWS)):
            for kind, channel, payload in rows.values():
                await traffic.more(1)
                # Announced as the layer does, each in a transaction of its own.
                observer.execute(
                    WRITE_ROW.format(expires=expires).encode(),
                    (address, kind, alone if channel == OWN else channel, payload, name),
                )
        # And where workers claim: for them all rows are alike.
        for values in ("('message', 'jobs', '\\x00ff')", "('odd', 'jobs', '\\x80')"):
            observer.execute(
                "INSERT INTO pg_layer_message (address, xid, boot, kind, channel, payload, expires_at)"
                f" SELECT 'asgi!:jobs', pg_current_xact_id(), 0, kind, channel, payload::bytea, {expires}"
                f" FROM (VALUES {values}) AS row (kind, channel, payload)".encode()
            )
        await traffic.more(10)
    await traffic.end(member)
    said = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == []
    assert len(said) == len(set(said))
    assert {line.event for line in said} <= {
        log_events.MESSAGE_UNDECODABLE,
        log_events.MESSAGE_IGNORED,
        log_events.NOTIFICATION_IGNORED,
    }
    # They do not stay: what cannot be read is deleted as what was. What has expired is left to a sweep.
    left = "SELECT kind, channel FROM pg_layer_message WHERE address = %s AND expires_at > clock_timestamp()"
    assert observer.execute(left.encode(), (own,)).fetchall() == []


async def test_payloads_overwritten_while_they_wait(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    # Nobody listens yet: all wait in the table, and every third is damaged there.
    layer, sender = make_layer(**OPTIONS), make_layer(**OPTIONS)
    channel = await layer.new_channel()
    for number in range(300):
        for name in (channel, "jobs"):
            await sender.send(name, {"number": number})
    observer.execute(
        "UPDATE pg_layer_message SET payload = decode('00ff00ff', 'hex') WHERE id IN ("
        " SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY channel ORDER BY id) - 1 AS place"
        "  FROM pg_layer_message) AS m WHERE place % 3 = 0)"
    )
    sound = [number for number in range(300) if number % 3]
    for name in (channel, "jobs"):
        assert [(await receive(layer, name))["number"] for _ in sound] == sound
    assert events(caplog) == [log_events.MESSAGE_UNDECODABLE]
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )


async def test_a_writer_with_a_wrong_key_among_others(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    friend = make_layer(**OPTIONS, symmetric_encryption_keys=["right"])
    stranger = make_layer(**OPTIONS, symmetric_encryption_keys=["wrong"])
    reader = processes.start(consumer, migrated_dsn, symmetric_encryption_keys=["right"])
    member, alone = await reader.hear()
    async with flowing(friend, alone) as traffic, flowing(stranger, alone) as strange:
        await traffic.more(50)
        await strange.more(50)
    await traffic.end(member)
    said = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == strange.errors == []
    [line] = said
    assert line.event == log_events.MESSAGE_UNDECODABLE


# ---------------------------------------------------------------------- notifications

FOREIGN = [
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


async def test_foreign_notifications_under_traffic(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(**OPTIONS)
    # It rings its own pings all the while.
    reader = processes.start(consumer, migrated_dsn, lease=5, heartbeat=0.1)
    member, alone = await reader.hear()
    async with flowing(layer, alone) as traffic:
        for payload in FOREIGN * 2:
            for name in (alone, "jobs"):
                observer.execute(
                    "SELECT pg_notify(pg_layer_notification_channel(pg_layer_address('asgi', %s)), %s)",
                    (name, payload.format(channel=alone)),
                )
            await traffic.more(1)
    await traffic.end(member)
    said = await reader.hear()
    assert await reader.result() == traffic.sure
    assert traffic.errors == []
    # Once for each NOTIFY channel; and one that looks like a message is one, but cannot be read.
    assert len(said) == len(set(said))
    ignored = [line for line in said if line.event == log_events.NOTIFICATION_IGNORED]
    assert len(ignored) == 2
    assert len(said) <= 3


async def test_a_notification_that_is_repeated_is_delivered_once(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    # As a proxy might: each notification comes twice.
    layer = make_layer(**OPTIONS)
    reader = processes.start(consumer, migrated_dsn)
    member, alone = await reader.hear()
    observer.execute(
        "SELECT pg_layer_listen(ARRAY[pg_layer_notification_channel(pg_layer_address('asgi', %s)),"
        " pg_layer_notification_channel('asgi!@room'), pg_layer_notification_channel('asgi!:jobs')])",
        (alone,),
    )
    repeated = 0
    async with flowing(layer, alone) as traffic:
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


def drop(dsn: str) -> None:
    """Undo the migration."""
    with psycopg.connect(dsn) as connection:
        connection.execute((MIGRATIONS / "0001_reverse.sql").read_bytes())


@pytest.mark.parametrize("gap", [True, False], ids=["missing for a while", "in one transaction"])
async def test_tables_that_are_dropped_and_migrated_again(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, recovery: Recovery, gap: bool
) -> None:
    layer = make_layer(**OPTIONS, send_timeout=5)
    reader = processes.start(consumer, migrated_dsn, lease=2, heartbeat=0.5)
    member, alone = await reader.hear()
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        async with flowing(layer, alone) as traffic:
            await traffic.more(20)
        await _received(connection)
        if gap:
            await asyncio.to_thread(drop, migrated_dsn)
            for outcome in await asyncio.gather(
                layer.send(alone, {"number": -1}),
                layer.group_send("room", {"number": -1}),
                layer.group_add("room", "jobs"),
                return_exceptions=True,
            ):
                assert isinstance(outcome, NotMigrated)
            # The reader notices as well.
            await asyncio.sleep(1)
            await asyncio.to_thread(migrate, migrated_dsn)
        else:
            with connection.transaction():
                connection.execute((MIGRATIONS / "0001_reverse.sql").read_bytes())
                for file in sorted(MIGRATIONS.glob("0001_[0-9]_*.sql")):
                    connection.execute(file.read_bytes())
        with recovery(
            f"tables migrated again ({'a second later' if gap else 'at once'}): until the group is back"
        ):
            await until(
                lambda: connection.execute("SELECT channel FROM pg_layer_membership").fetchone()
            )
    async with flowing(layer, alone) as again:
        await again.more(50)
    await again.end(member)
    said = await reader.hear()
    found = await reader.result()
    assert again.errors == traffic.errors == []
    for place in range(3):
        assert found[place] == [*traffic.sure[place], *again.sure[place]]
    assert len([line for line in said if line.event == log_events.RECEIVING_REFUSED]) <= 1
    assert len(said) == len(set(said))
    assert len(said) <= 3


async def _received(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Return when all that was sent has been received. A group's messages stay until they expire."""
    left = b"SELECT FROM pg_layer_message WHERE address NOT LIKE '%!@%'"
    await until(lambda: connection.execute(left).fetchall() == [])


async def test_tables_that_are_dropped_in_the_midst_of_traffic(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, recovery: Recovery
) -> None:
    layer = make_layer(**OPTIONS, send_timeout=5)
    reader = processes.start(consumer, migrated_dsn, lease=2, heartbeat=0.5)
    member, alone = await reader.hear()
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        async with flowing(layer, alone) as traffic:
            await traffic.more(20)
            await asyncio.to_thread(drop, migrated_dsn)
            await traffic.more(5)
            assert traffic.errors
            await asyncio.to_thread(migrate, migrated_dsn)
            with recovery(
                "tables dropped under traffic: from the migration until the group is back"
            ):
                await until(
                    lambda: connection.execute("SELECT channel FROM pg_layer_membership").fetchone()
                )
            back = traffic.number + 1
            await traffic.more(50)
    await traffic.end(member)
    said = await reader.hear()
    found = await reader.result()
    assert all(isinstance(error, PgLayerError) for error in traffic.errors)
    for place in range(3):
        # What waited in the dropped table is gone with it; nothing else, and nothing twice.
        assert found[place] == sorted(set(found[place]))
        assert set(found[place]) <= {*traffic.sure[place], *traffic.perhaps[place]}
        assert [n for n in found[place] if n >= back] == [
            n for n in traffic.sure[place] if n >= back
        ]
    assert len(said) == len(set(said))
