"""Reports of an outage: notices to consumers, ``health()``, the log, and the view for probes."""

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
from tests.processes import TIMEOUT, listen, open_layer, receive, until
from tests.project.commands import ROOT, django
from tests.project.communicators import WebsocketCommunicator
from tests.project.configured import configured

NOTICES: dict[str, object] = {"on_disconnect": "database.lost", "on_reconnect": "database.back"}


class NoticeConsumer(AsyncWebsocketConsumer):
    """A consumer that sends its browser a text for each notice that it receives."""

    groups = ["room"]  # noqa: RUF012  # as Channels declares it

    async def database_lost(self, event: dict[str, Any]) -> None:
        await self.send("lost")

    async def database_back(self, event: dict[str, Any]) -> None:
        await self.send("back")

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send(event["text"])


class SyncNoticeConsumer(WebsocketConsumer):
    """The synchronous counterpart: its handlers run in threads."""

    groups = ["room"]  # noqa: RUF012  # as Channels declares it

    def database_lost(self, event: dict[str, Any]) -> None:
        self.send("lost")

    def database_back(self, event: dict[str, Any]) -> None:
        self.send("back")

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send(event["text"])


async def test_consumers_receive_notices_when_the_database_is_lost_and_back(
    server: PostgresServer, database: str
) -> None:
    async with open_layer(database, **NOTICES) as layer:
        with configured(layer):
            sockets = [
                WebsocketCommunicator(app.as_asgi(), "/")
                for app in (NoticeConsumer, SyncNoticeConsumer)
            ]
            for socket in sockets:
                assert await socket.connect(timeout=TIMEOUT) == (True, None)
            # When this message arrives, the listener listens.
            await layer.group_send("room", {"type": "chat.message", "text": "hello"})
            for socket in sockets:
                assert await socket.receive_from(timeout=TIMEOUT) == "hello"
            await asyncio.to_thread(server.stop)
            for socket in sockets:
                assert await socket.receive_from(timeout=TIMEOUT) == "lost"
            health = await layer.health()
            assert health["problems"]
            assert health["round_trip"] is None
            await asyncio.to_thread(server.start)
            for socket in sockets:
                assert await socket.receive_from(timeout=TIMEOUT) == "back"
            await layer.group_send("room", {"type": "chat.message", "text": "again"})
            for socket in sockets:
                assert await socket.receive_from(timeout=TIMEOUT) == "again"
                await socket.disconnect(timeout=TIMEOUT)


async def test_notices_reach_only_consumers_that_read_in_this_process(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, other = make_layer(**NOTICES), make_layer()
    await listen(layer)
    await listen(other)
    channel, unread = await layer.new_channel(), await layer.new_channel()
    waiting = asyncio.create_task(receive(layer, channel))
    job = asyncio.create_task(layer.receive("jobs"))
    others = asyncio.create_task(other.receive(await other.new_channel()))
    await layer.send(unread, {"type": "x"})
    observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert await waiting == {"type": "database.lost"}
    assert await receive(layer, channel) == {"type": "database.back"}
    # No task reads this channel, so it gets no notices.
    assert await receive(layer, unread) == {"type": "x"}
    assert not job.done()
    assert not others.done()
    for task in (job, others):
        task.cancel()


async def test_health_of_a_listening_layer_reports_no_problems(make_layer: MakeLayer) -> None:
    layer = make_layer()
    await listen(layer)
    health = await layer.health()
    assert health["problems"] == []
    assert health["listener"] == "listening"
    assert health["lease_age"] is not None
    assert health["last_notification_age"] is not None
    assert health["round_trip"] is not None


async def test_health_of_a_layer_that_only_sends_reports_no_problems(make_layer: MakeLayer) -> None:
    layer = make_layer()
    health = await layer.health()
    assert health["problems"] == []
    assert (health["listener"], health["lease_age"], health["last_notification_age"]) == (
        "off",
        None,
        None,
    )
    assert health["round_trip"] is not None


async def test_health_without_tables_names_migrate(fresh_database: str) -> None:
    async with open_layer(fresh_database) as layer:
        (problem,) = (await layer.health())["problems"]
    assert "migrate" in problem


async def test_health_without_a_database_reports_that_it_is_unreachable() -> None:
    async with open_layer("postgresql://nobody@127.0.0.1:1/none", send_timeout=0.3) as layer:
        health = await layer.health()
    assert health["round_trip"] is None
    (problem,) = health["problems"]
    assert "could not be reached" in problem


async def test_health_with_a_listener_that_cannot_connect_reports_the_problem(
    make_layer: MakeLayer, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = server.create_database("other")
    layer = make_layer(listen_dsn=elsewhere)  # a database without tables
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))

    await until(lambda: records(caplog, log_events.RECEIVING_REFUSED))
    health = await layer.health()
    assert health["listener"] == "connecting"
    assert any("migrate" in problem for problem in health["problems"])
    waiting.cancel()
    await until(waiting.done)


# ---------------------------------------------------------------------- the log


async def test_database_absent_from_the_start_is_not_logged_as_lost(
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


async def test_wrong_password_is_not_logged_as_a_loss(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(server.dsn(password="wrong")) as layer:
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        assert await until(lambda: events(caplog)) == [log_events.DATABASE_UNREACHABLE]
        waiting.cancel()
        await until(waiting.done)


async def test_missing_tables_are_not_logged_as_a_loss(
    fresh_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(fresh_database) as layer:
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        assert await until(lambda: events(caplog)) == [log_events.RECEIVING_REFUSED]
        waiting.cancel()
        await until(waiting.done)
    assert "manage.py migrate pg_layer" in records(caplog)[0].getMessage()


async def test_close_without_a_database_logs_that_the_lease_remains(
    server: PostgresServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_layer(database) as layer:
        await layer.group_add("room", await layer.new_channel())
        await asyncio.to_thread(server.stop)
    assert events(caplog)[-1] == log_events.CLOSE_FAILED


async def test_view_for_probes_counts_a_process_that_polls_as_ready() -> None:
    """Otherwise a pooler before the listener would take all processes out of the load balancer."""
    page = (ROOT / "docs" / "how-to" / "operations.md").read_text(encoding="utf-8")
    (condition,) = re.findall(r"is_ready = (.*)\n", page)
    polls = "Polling: a connection pooler is between"
    for listener, round_trip, problems, expected in (
        ("listening", 0.1, [], True),
        ("polling", 0.1, [polls], True),
        ("polling", None, [polls], False),
        ("connecting", 0.1, [], False),
        ("listening", None, ["A notification to itself was not heard."], False),
        ("off", 0.1, [], True),
    ):
        health = {"listener": listener, "round_trip": round_trip, "problems": problems}
        assert eval(condition, {"now": health}) is expected


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


def test_view_for_probes_in_the_documentation_answers_200_or_503(
    migrated_dsn: str, fresh_database: str
) -> None:
    page = (ROOT / "docs" / "how-to" / "operations.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for dsn, expected in (
        (migrated_dsn, "200 []"),
        (fresh_database, "503 ['The tables of pg_layer are missing"),
    ):
        settings = {
            "DATABASES": {"default": {**postgres(dsn), "ATOMIC_REQUESTS": True}},
            "ALLOWED_HOSTS": ["*"],
        }
        assert django(dsn, snippet + VIEW, settings=settings).startswith(expected)
