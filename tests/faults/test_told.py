"""Who is told when the database goes and comes: consumers by messages, and whoever asks by `health()`."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from channels.generic.websocket import AsyncWebsocketConsumer, WebsocketConsumer

from devtools.postgres import PostgresServer
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.integration.test_django import postgres
from tests.logs import events, records
from tests.processes import PATIENCE, listen, open_layer, receive, until
from tests.project.commands import ROOT, django
from tests.project.communicators import WebsocketCommunicator
from tests.project.configured import configured

TOLD: dict[str, object] = {"on_disconnect": "database.lost", "on_reconnect": "database.back"}


class Told(AsyncWebsocketConsumer):
    """Tells its browser what it is told."""

    groups = ["room"]  # noqa: RUF012  # as Channels declares it

    async def database_lost(self, event: dict[str, Any]) -> None:
        await self.send("lost")

    async def database_back(self, event: dict[str, Any]) -> None:
        await self.send("back")

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send(event["text"])


class ToldInThreads(WebsocketConsumer):
    """The same, in threads."""

    groups = ["room"]  # noqa: RUF012  # as Channels declares it

    def database_lost(self, event: dict[str, Any]) -> None:
        self.send("lost")

    def database_back(self, event: dict[str, Any]) -> None:
        self.send("back")

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send(event["text"])


async def test_consumers_are_told_that_the_database_goes_and_is_back(
    server: PostgresServer, database: str
) -> None:
    async with open_layer(database, **TOLD) as layer:
        with configured(layer):
            sockets = [WebsocketCommunicator(app.as_asgi(), "/") for app in (Told, ToldInThreads)]
            for socket in sockets:
                assert await socket.connect(timeout=PATIENCE) == (True, None)
            # They hear once the listener does.
            await layer.group_send("room", {"type": "chat.message", "text": "hello"})
            for socket in sockets:
                assert await socket.receive_from(timeout=PATIENCE) == "hello"
            await asyncio.to_thread(server.stop)
            for socket in sockets:
                assert await socket.receive_from(timeout=PATIENCE) == "lost"
            health = await layer.health()
            assert health["problems"]
            assert health["round_trip"] is None
            await asyncio.to_thread(server.start)
            for socket in sockets:
                assert await socket.receive_from(timeout=PATIENCE) == "back"
            await layer.group_send("room", {"type": "chat.message", "text": "again"})
            for socket in sockets:
                assert await socket.receive_from(timeout=PATIENCE) == "again"
                await socket.disconnect(timeout=PATIENCE)


async def test_only_consumers_of_this_process_are_told(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, other = make_layer(**TOLD), make_layer()
    await listen(layer)
    await listen(other)
    channel, unread = await layer.new_channel(), await layer.new_channel()
    waiting = asyncio.create_task(receive(layer, channel))
    job = asyncio.create_task(layer.receive("jobs"))
    theirs = asyncio.create_task(other.receive(await other.new_channel()))
    await layer.send(unread, {"type": "x"})
    observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert await waiting == {"type": "database.lost"}
    assert await receive(layer, channel) == {"type": "database.back"}
    # Nobody has read there, so that nobody is a consumer of it.
    assert await receive(layer, unread) == {"type": "x"}
    assert not job.done()
    assert not theirs.done()
    for task in (job, theirs):
        task.cancel()


async def test_health_when_all_is_well(make_layer: MakeLayer) -> None:
    layer = make_layer()
    await listen(layer)
    health = await layer.health()
    assert health["problems"] == []
    assert health["listener"] == "listening"
    assert health["lease_age"] is not None
    assert health["last_notification_age"] is not None
    assert health["round_trip"] is not None


async def test_health_of_who_only_sends(make_layer: MakeLayer) -> None:
    layer = make_layer()
    health = await layer.health()
    assert health["problems"] == []
    assert (health["listener"], health["lease_age"], health["last_notification_age"]) == (
        "off",
        None,
        None,
    )
    assert health["round_trip"] is not None


async def test_health_where_the_tables_are_missing(fresh_database: str) -> None:
    async with open_layer(fresh_database) as layer:
        (problem,) = (await layer.health())["problems"]
    assert "migrate" in problem


async def test_health_where_there_is_no_database() -> None:
    async with open_layer("postgresql://nobody@127.0.0.1:1/none", send_timeout=0.3) as layer:
        health = await layer.health()
    assert health["round_trip"] is None
    (problem,) = health["problems"]
    assert "could not be reached" in problem


async def test_health_names_a_listener_that_is_away(
    make_layer: MakeLayer, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = server.create_database("other")
    layer = make_layer(listen_dsn=elsewhere)  # where there are no tables
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))

    await until(lambda: records(caplog, log_events.RECEIVING_REFUSED))
    health = await layer.health()
    assert health["listener"] == "connecting"
    assert any("migrate" in problem for problem in health["problems"])
    waiting.cancel()
    await until(waiting.done)


# ---------------------------------------------------------------------- the log


async def test_a_database_that_was_never_there_is_not_lost(
    server: PostgresServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(server.stop)
    async with open_layer(database) as layer:
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        await until(lambda: events(caplog))
        await asyncio.to_thread(server.start)
        await until(lambda: len(events(caplog)) > 1)
        waiting.cancel()
        await until(waiting.done)
    assert events(caplog) == [log_events.DATABASE_UNREACHABLE, log_events.DATABASE_BACK]
    # The reason follows; it does not repeat that the database cannot be reached.
    assert "could not be reached" not in records(caplog)[0].getMessage()


async def test_a_wrong_password_is_no_loss(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(server.dsn(password="wrong")) as layer:
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        assert await until(lambda: events(caplog)) == [log_events.DATABASE_UNREACHABLE]
        waiting.cancel()
        await until(waiting.done)


async def test_missing_tables_are_no_loss(
    fresh_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(fresh_database) as layer:
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        assert await until(lambda: events(caplog)) == [log_events.RECEIVING_REFUSED]
        waiting.cancel()
        await until(waiting.done)
    assert "manage.py migrate pg_layer" in records(caplog)[0].getMessage()


async def test_a_lease_that_cannot_be_given_back(
    server: PostgresServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(database) as layer:
        await layer.group_add("room", await layer.new_channel())
        await asyncio.to_thread(server.stop)
    assert events(caplog)[-1] == log_events.CLOSE_FAILED


VIEW = """
import sys, types
from django.conf import settings
from django.test import Client
from django.urls import path

settings.ROOT_URLCONF = types.ModuleType("urls")
settings.ROOT_URLCONF.urlpatterns = [path("health/", health)]
answer = Client(raise_request_exception=False).get("/health/")
print(answer.status_code, answer.json()["problems"])
"""


def test_the_view_for_probes(migrated_dsn: str, fresh_database: str) -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for dsn, answer in (
        (migrated_dsn, "200 []"),
        (fresh_database, "503 ['The tables of pg_layer are missing"),
    ):
        settings = {
            "DATABASES": {"default": {**postgres(dsn), "ATOMIC_REQUESTS": True}},
            "ALLOWED_HOSTS": ["*"],
        }
        assert django(dsn, snippet + VIEW, settings=settings).startswith(answer)
