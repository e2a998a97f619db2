"""The examples in the documentation of Channels and of this package, run unchanged."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from asgiref.sync import async_to_sync
from channels.generic.websocket import AsyncJsonWebsocketConsumer, WebsocketConsumer
from django.conf import settings

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import TIMEOUT, receive
from tests.project.communicators import WebsocketCommunicator
from tests.project.configured import configured


async def execute(snippet: str, **names: Any) -> dict[str, Any]:
    """Run a snippet, which may await, with these names. Return all its names."""
    code = compile(
        textwrap.dedent(snippet), "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    result = eval(code, names)
    if inspect.iscoroutine(result):
        await result
    return names


@pytest.fixture
async def layer(make_layer: MakeLayer) -> AsyncIterator[PostgresChannelLayer]:
    layer = make_layer()
    with configured(layer, MSG_TYPE_MESSAGE="message"):
        yield layer


async def connected(consumer: Any) -> WebsocketCommunicator:
    """Connect a browser to a consumer."""
    socket = WebsocketCommunicator(consumer.as_asgi(), "/")
    assert await socket.connect(timeout=TIMEOUT) == (True, None)
    return socket


def accepting(consumer: Any) -> Any:
    """Return the consumer, but accepting connections: the examples leave that to the reader."""

    class Accepting(consumer):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            self.accept()

    return Accepting


SYNCHRONOUS = """
    from asgiref.sync import async_to_sync

    async_to_sync(channel_layer.send)("channel_name", {"type": "test", "text": "hello"})
"""


async def test_snippet_of_synchronous_functions_sends(layer: PostgresChannelLayer) -> None:
    await asyncio.to_thread(execute_in_thread, SYNCHRONOUS, channel_layer=layer)
    assert await receive(layer, "channel_name") == {"type": "test", "text": "hello"}


def execute_in_thread(snippet: str, **names: Any) -> None:
    exec(textwrap.dedent(snippet), names)


SEND_EVENT = """
    await self.channel_layer.group_send(
        room.group_name,
        {
            "type": "chat.message",
            "room_id": room_id,
            "username": self.scope["user"].username,
            "message": message,
        }
    )
"""

HANDLE_EVENT = '''
    async def chat_message(self, event):
        """
        Called when someone has messaged our chat.
        """
        # Send a message down to the client
        await self.send_json(
            {
                "msg_type": settings.MSG_TYPE_MESSAGE,
                "room": event["room_id"],
                "username": event["username"],
                "message": event["message"],
            },
        )
'''


async def test_snippet_of_events_with_ids_reaches_the_consumer(layer: PostgresChannelLayer) -> None:
    chat_message = (await execute(HANDLE_EVENT, settings=settings))["chat_message"]

    class Room(AsyncJsonWebsocketConsumer):
        groups = ["room-7"]  # noqa: RUF012  # as Channels declares it

    Room.chat_message = chat_message  # type: ignore[attr-defined]
    socket = await connected(Room)
    await execute(
        SEND_EVENT,
        self=SimpleNamespace(channel_layer=layer, scope={"user": SimpleNamespace(username="ann")}),
        room=SimpleNamespace(group_name="room-7"),
        room_id=7,
        message="hello",
    )
    assert await socket.receive_json_from(timeout=TIMEOUT) == {
        "msg_type": "message",
        "room": 7,
        "username": "ann",
        "message": "hello",
    }
    await socket.disconnect(timeout=TIMEOUT)


SINGLE_CHANNELS = """
    class ChatConsumer(WebsocketConsumer):

        def connect(self):
            # Make a database row with our channel name
            Clients.objects.create(channel_name=self.channel_name)

        def disconnect(self, close_code):
            # Note that in some rare cases (power loss, etc) disconnect may fail
            # to run; this naive example would leave zombie channel names around.
            Clients.objects.filter(channel_name=self.channel_name).delete()

        def chat_message(self, event):
            # Handles the "chat.message" event when it's sent to us.
            self.send(text_data=event["text"])
"""

SEND_TO_ONE = """
    from channels.layers import get_channel_layer

    channel_layer = get_channel_layer()
    await channel_layer.send("channel_name", {
        "type": "chat.message",
        "text": "Hello there!",
    })
"""


class Clients:
    """A stand-in for the model in the example."""

    names: set[str] = set()  # noqa: RUF012

    class objects:
        @staticmethod
        def create(channel_name: str) -> None:
            Clients.names.add(channel_name)

        @staticmethod
        def filter(channel_name: str) -> Any:
            return SimpleNamespace(delete=lambda: Clients.names.remove(channel_name))


async def test_snippet_of_single_channels_reaches_each_consumer(
    layer: PostgresChannelLayer,
) -> None:
    names = await execute(SINGLE_CHANNELS, WebsocketConsumer=WebsocketConsumer, Clients=Clients)
    sockets = [await connected(accepting(names["ChatConsumer"])) for _ in range(2)]
    assert len(Clients.names) == 2
    for name in Clients.names:
        await execute(SEND_TO_ONE.replace("channel_name", name))
    for socket in sockets:
        assert await socket.receive_from(timeout=TIMEOUT) == "Hello there!"
        assert await socket.receive_nothing()
        await socket.disconnect(timeout=TIMEOUT)
    assert not Clients.names


async def test_snippet_of_single_channels_reaches_a_normal_channel(
    layer: PostgresChannelLayer,
) -> None:
    await execute(SEND_TO_ONE)
    assert await receive(layer, "channel_name") == {"type": "chat.message", "text": "Hello there!"}


GROUPS = """
    # This example uses WebSocket consumer, which is synchronous, and so
    # needs the async channel layer functions to be converted.
    from asgiref.sync import async_to_sync

    class ChatConsumer(WebsocketConsumer):

        def connect(self):
            async_to_sync(self.channel_layer.group_add)("chat", self.channel_name)

        def disconnect(self, close_code):
            async_to_sync(self.channel_layer.group_discard)("chat", self.channel_name)
"""

BROADCAST = """
    class ChatConsumer(WebsocketConsumer):

        ...

        def receive(self, text_data):
            async_to_sync(self.channel_layer.group_send)(
                "chat",
                {
                    "type": "chat.message",
                    "text": text_data,
                },
            )

        def chat_message(self, event):
            self.send(text_data=event["text"])
"""

FROM_OUTSIDE = """
    from channels.layers import get_channel_layer
    channel_layer = get_channel_layer()
"""

ANNOUNCE = """
    for chat_name in chats:
        await channel_layer.group_send(
            chat_name,
            {"type": "chat.system_message", "text": announcement_text},
        )
"""

FORCE_DISCONNECT = """
    from asgiref.sync import async_to_sync

    async_to_sync(channel_layer.group_send)("chat", {"type": "chat.force_disconnect"})
"""


async def chat_consumer() -> Any:
    """Return the consumer of two examples, which "combined with the code above" is a chat."""
    groups = (await execute(GROUPS, WebsocketConsumer=WebsocketConsumer))["ChatConsumer"]
    names = {"WebsocketConsumer": groups, "async_to_sync": async_to_sync}
    return accepting((await execute(BROADCAST, **names))["ChatConsumer"])


async def test_snippet_of_groups_is_a_chat(layer: PostgresChannelLayer, observer: Observer) -> None:
    consumer = await chat_consumer()
    sockets = [await connected(consumer) for _ in range(3)]
    await sockets[0].send_to("hello")
    for socket in sockets:
        assert await socket.receive_from(timeout=TIMEOUT) == "hello"
    for socket in sockets:
        await socket.disconnect(timeout=TIMEOUT)
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


async def test_snippets_of_use_outside_of_consumers_reach_the_group(
    layer: PostgresChannelLayer,
) -> None:
    class Chat(await chat_consumer()):  # type: ignore[misc]
        def chat_system_message(self, event: dict[str, Any]) -> None:
            self.send(text_data=f"* {event['text']}")

        def chat_force_disconnect(self, event: dict[str, Any]) -> None:
            self.close(4000)

    sockets = [await connected(Chat) for _ in range(2)]
    channel_layer = (await execute(FROM_OUTSIDE))["channel_layer"]
    assert channel_layer is layer
    await execute(
        ANNOUNCE,
        channel_layer=channel_layer,
        chats=["chat", "nobody-there"],
        announcement_text="Lunch!",
    )
    await asyncio.to_thread(execute_in_thread, FORCE_DISCONNECT, channel_layer=channel_layer)
    for socket in sockets:
        assert await socket.receive_from(timeout=TIMEOUT) == "* Lunch!"
        assert await socket.receive_output(timeout=TIMEOUT) == {
            "type": "websocket.close",
            "code": 4000,
        }
        await socket.disconnect(timeout=TIMEOUT)


@pytest.mark.parametrize("event", ["chat.join", "chat_join", "chat.join.now"])
async def test_message_type_with_dots_names_the_handler(
    layer: PostgresChannelLayer, event: str
) -> None:
    def handler(self: Any, message: dict[str, Any]) -> None:
        self.send(text_data=message["type"])

    attributes = {"groups": ["chat"], event.replace(".", "_"): handler}
    socket = await connected(type("Consumer", (WebsocketConsumer,), attributes))
    await layer.group_send("chat", {"type": event})
    assert await socket.receive_from(timeout=TIMEOUT) == event
    await socket.disconnect(timeout=TIMEOUT)


# ---------------------------------------------------------------------- our own pages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


OF_THE_READER = ["DSN", "DATABASES", "INSTALLED_APPS", "layer"]


def python_blocks_of_our_pages() -> list[Any]:
    found = []
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^( *)```python\n(.*?)^ *```", content, re.DOTALL | re.MULTILINE)
        for number, (indent, text) in enumerate(blocks, 1):
            lines = [line.removeprefix(indent) for line in text.splitlines(keepends=True)]
            found.append(pytest.param("".join(lines), id=f"{page.name} {number}"))
    return found


@pytest.mark.parametrize("snippet", python_blocks_of_our_pages())
def test_block_of_our_pages_imports_exactly_what_it_uses(snippet: str) -> None:
    """A reader can copy each block alone. `OF_THE_READER` are names that every reader has."""
    options = ["--isolated", "--select=F", f"--config=builtins={OF_THE_READER}", "-"]
    command = [sys.executable, "-m", "ruff", "check", *options]
    result = subprocess.run(command, input=snippet, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def blocks_of_our_pages(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name} {number}")
        for page in PAGES
        for number, text in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL), 1
        )
    ]


@pytest.mark.parametrize("text", blocks_of_our_pages("yaml"))
def test_yaml_block_of_our_pages_is_valid(text: str) -> None:
    assert isinstance(yaml.safe_load(textwrap.dedent(text)), dict)


@pytest.mark.parametrize("text", blocks_of_our_pages("ini"))
def test_unit_file_of_our_pages_is_valid(text: str) -> None:
    lines = [line for line in text.splitlines() if line]
    assert all(re.fullmatch(r"\[(Unit|Service|Install)\]|[A-Z]\w+=.+", line) for line in lines)


MAX_COLUMNS = 82  # which fit the site in a window of 1280 pixels
FOR_USERS = [page for page in PAGES if "architecture" not in page.as_posix()]


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.name)
def test_listings_of_our_pages_are_not_wider_than_the_site(page: Path) -> None:
    text = re.sub(r"^```{.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    listings = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line
        for listing in listings
        if " overdue, " not in listing  # the status, as it is
        for line in listing.splitlines()
    ]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
