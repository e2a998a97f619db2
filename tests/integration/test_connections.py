"""The number of connections of a process, and its statements while it is idle."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer._runtime import engine
from tests.conftest import MIGRATIONS, MakeLayer, Observer
from tests.processes import Link, Processes, listen, open_layer, receive, until


def connections(observer: Observer, name: str) -> int:
    row = observer.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", (name,)
    ).fetchone()
    assert row is not None
    return int(row[0])


class Peak:
    """The largest number of simultaneous connections of one application name."""

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer = observer
        self._name = name
        self.most = 0

    async def watch(self) -> None:
        while True:
            self.most = max(self.most, connections(self._observer, self._name))
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------- the budget


async def serve_many(link: Link, dsn: str, consumers: int) -> int:
    async with open_layer(dsn) as layer:
        channels = [await layer.new_channel() for _ in range(consumers)]
        await asyncio.gather(*(layer.group_add("room", channel) for channel in channels))

        async def consume(channel: str) -> int:
            for _ in range(2):
                await receive(layer, channel)
            await layer.group_discard("room", channel)
            return 2

        jobs = [asyncio.create_task(receive(layer, f"jobs-{n}")) for n in range(20)]
        tasks = [asyncio.create_task(consume(channel)) for channel in channels]
        await listen(layer)
        link.say(channels)
        received = sum(await asyncio.gather(*tasks))
        for job in jobs:
            await job
        return received


async def test_process_with_a_thousand_consumers_needs_three_connections(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer()
    reader = processes.start(
        serve_many, make_conninfo(migrated_dsn, application_name="server"), 1000
    )
    peak = Peak(observer, "server")
    watching = asyncio.create_task(peak.watch())
    channels = await reader.hear()
    await asyncio.gather(*(layer.send(channel, {"type": "direct"}) for channel in channels))
    await layer.group_send("room", {"type": "group"})
    for n in range(20):
        await layer.send(f"jobs-{n}", {"type": "job"})
    assert await reader.result() == 2000
    watching.cancel()
    assert 2 <= peak.most <= 3


async def write_much(link: Link, dsn: str) -> None:
    async with open_layer(dsn, capacity=10_000) as layer:
        for number in range(10):
            await layer.send("jobs", {"number": number})
            await layer.group_send("room", {"number": number})
        link.say("one by one")
        await link.hear()
        await asyncio.gather(
            *(layer.send("jobs", {"number": number}) for number in range(500)),
            *(layer.group_send("room", {"number": number}) for number in range(500)),
            *(layer.group_add(f"room-{number}", "jobs") for number in range(500)),
        )
        link.say("at once")
        await link.hear()


async def test_process_that_only_sends_needs_one_connection(
    migrated_dsn: str, processes: Processes, observer: Observer
) -> None:
    writer = processes.start(write_much, make_conninfo(migrated_dsn, application_name="writer"))
    peak = Peak(observer, "writer")
    watching = asyncio.create_task(peak.watch())
    for pace in ("one by one", "at once"):
        assert await writer.hear() == pace
        assert connections(observer, "writer") == 1
        writer.say()
    await writer.result()
    watching.cancel()
    assert peak.most == 1


async def test_sender_closes_its_idle_connection_within_the_readmes_seconds() -> None:
    assert 5 <= engine.SENDER_IDLE <= 10


async def test_sender_closes_its_idle_connection_and_opens_it_again(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SENDER_IDLE", 0.5)
    layer = make_layer(dsn=make_conninfo(migrated_dsn, application_name="idle"))
    await layer.send("jobs", {})
    await until(lambda: connections(observer, "idle") == 0)
    await layer.send("jobs", {})
    assert connections(observer, "idle") == 1


async def test_close_closes_every_connection(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    dsn = make_conninfo(migrated_dsn, application_name="closing")
    layer = make_layer(dsn=dsn)
    await listen(layer)
    receiving = asyncio.create_task(layer.receive("jobs"))
    await listen(layer)
    assert connections(observer, "closing") >= 2
    receiving.cancel()
    await layer.close()
    await until(lambda: connections(observer, "closing") == 0)


async def test_pool_max_size_and_listen_dsn_limit_the_connections_of_each_dsn(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(
        dsn=make_conninfo(migrated_dsn, application_name="pooled"),
        listen_dsn=make_conninfo(migrated_dsn, application_name="listening"),
        pool_max_size=1,
    )
    peak = Peak(observer, "pooled")
    watching = asyncio.create_task(peak.watch())
    channel = await layer.new_channel()
    await listen(layer)
    for _ in range(10):
        await asyncio.gather(
            *(layer.send(channel, {}) for _ in range(5)),
            *(receive(layer, channel) for _ in range(5)),
        )
    watching.cancel()
    assert peak.most == 1
    assert connections(observer, "listening") == 1


# ---------------------------------------------------------------------- quiet, and without LISTEN


class Log:
    """The statements that a server logs, by application name."""

    def __init__(self, server: PostgresServer) -> None:
        self._path = server.log_path
        self._from = 0

    def forget(self) -> None:
        """Ignore the statements logged until now."""
        self._from = self._path.stat().st_size

    def statements(self, name: str) -> list[str]:
        with self._path.open("rb") as file:
            file.seek(self._from)
            text = file.read().decode(errors="replace")
        # An entry begins with [application name]; its further lines begin with a tab.
        entries = re.findall(r"^\[([^\]]*)\] (.*(?:\n\t.*)*)", text, re.MULTILINE)
        return [
            entry
            for application, entry in entries
            if application == name and re.match(r"LOG: +(execute|statement|duration)", entry)
        ]


@pytest.fixture(scope="module")
def logging_server() -> Iterator[PostgresServer]:
    """A server that logs every statement."""
    settings = {"log_statement": "all", "log_line_prefix": "[%a] "}
    with PostgresServer(fsync=False, settings=settings) as server:
        server.create_database("logged")
        with psycopg.connect(server.dsn("logged")) as connection:
            for file in sorted(MIGRATIONS.glob("*.sql")):
                if not file.stem.endswith("_reverse"):
                    connection.execute(file.read_bytes())
        yield server


async def test_idle_layer_sends_one_statement_per_heartbeat_and_normal_channel(
    logging_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second statement claims jobs of the channel that a reader waits on.

    No connection is made for a heartbeat, although an idle sender would have closed its own.
    """
    monkeypatch.setattr(engine, "SENDER_IDLE", 0.1)
    log = Log(logging_server)
    async with (
        open_layer(logging_server.dsn("logged", application_name="quiet")) as quiet,
        open_layer(
            logging_server.dsn("logged", application_name="beating"), lease=3, heartbeat=0.5
        ) as beating,
    ):
        tasks = []
        for layer in (quiet, beating):
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            await listen(layer)
            tasks += [asyncio.create_task(layer.receive(name)) for name in (channel, "jobs")]
            await listen(layer)
        # The rows of received messages are deleted a moment later.
        waiting = "SELECT count(*) FROM pg_layer_message WHERE split_part(address, '!', 1) = 'asgi'"
        await until(lambda: logging_server.execute(waiting, dbname="logged") == [(0,)])
        await until(lambda: "pg_layer_claim" in "".join(log.statements("beating")))
        log.forget()
        await until(
            lambda: (
                len([entry for entry in log.statements("beating") if "pg_layer_renew" in entry])
                >= 4
            )
        )
        assert log.statements("quiet") == []
        beats = log.statements("beating")
        for task in tasks:
            task.cancel()
    renewals, claims = (
        [beat for beat in beats if name in beat] for name in ("pg_layer_renew", "pg_layer_claim")
    )
    assert len(renewals) + len(claims) == len(beats)
    assert len(claims) <= len(renewals) + 1


async def test_layer_with_poll_interval_receives_everything_without_listen(
    logging_server: PostgresServer,
) -> None:
    log = Log(logging_server)
    log.forget()
    async with (
        open_layer(
            logging_server.dsn("logged", application_name="polling"),
            poll_interval=0.05,
            prefix="poll",
        ) as layer,
        open_layer(
            logging_server.dsn("logged", application_name="sending"), prefix="poll"
        ) as sender,
    ):
        own, added = [await layer.new_channel() for _ in range(2)]
        await layer.group_add("room", own)
        await listen(layer)
        await sender.group_add("room", added)
        for number in range(20):
            message = {"number": number, "blob": bytes(400 * number)}
            await sender.send(own, message)
            await sender.send("jobs", message)
            await sender.group_send("room", message)
        for number in range(20):
            assert (await receive(layer, own))["number"] == number
            assert (await receive(layer, own))["number"] == number
            assert (await receive(layer, added))["number"] == number
            assert (await receive(layer, "jobs"))["number"] == number
        await sender.group_discard("room", added)
        await sender.group_send("room", {"number": 20})
        await sender.send(added, {"number": 21})
        assert (await receive(layer, added))["number"] == 21
        statements = log.statements("polling")
    assert statements
    assert not [entry for entry in statements if "LISTEN" in entry.upper()]
