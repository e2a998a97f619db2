"""The chat, like that of the tutorial of Channels: a consumer, a group, a handler for each event.

The code does not depend on this layer. A group spans all server processes because the layer does.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any
from urllib.parse import parse_qs

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.conf import settings
from django.db import OperationalError

from example.models import Announcement
from pg_layer import LayerUnavailable, PostgresChannelLayer

MAX_NAME = 24
MAX_TEXT = 1000


def this_process() -> dict[str, Any]:
    """Return the name and id of this process, which the page and every message show."""
    return {"name": settings.DEMO_NAME, "pid": os.getpid()}


def group_of(room: str) -> str:
    """Return the group of all users in a room, in all processes."""
    return f"chat.{room}"


def clean(value: object, limit: int) -> str:
    """Return ``value`` as text of at most ``limit`` characters, trimmed; "" if it is not a str."""
    if not isinstance(value, str):
        return ""
    # JSON may contain a lone surrogate, which UTF-8 cannot encode.
    return value.encode("utf-8", "replace").decode("utf-8").strip()[:limit].rstrip()


def clean_name(value: object) -> str:
    """Return a name on one line; "somebody" for an empty name."""
    return clean(" ".join(clean(value, 4 * MAX_NAME).split()), MAX_NAME) or "somebody"


class ChatConsumer(AsyncJsonWebsocketConsumer):
    """One browser in one room.

    The page sends ``{"type": "say", "text": …}``, ``{"type": "rename", "name": …}`` and
    ``{"type": "count"}``, which requests the number of users (``here``). The answer to anything
    else is an ``error``. The page receives ``welcome``, ``message``, ``announcement``, ``joined``,
    ``left``, ``renamed`` and ``here``.
    """

    channel_layer: PostgresChannelLayer
    name: str
    room: str
    group: str

    async def connect(self) -> None:
        query = parse_qs(self.scope["query_string"].decode("latin-1"))
        self.name = clean_name(query.get("name", [""])[0])
        self.room = self.scope["url_route"]["kwargs"]["room"]
        self.group = group_of(self.room)
        await self.accept()
        await self.channel_layer.group_add(self.group, self.channel_name)
        await self.send_json(
            {
                "type": "welcome",
                "room": self.room,
                "name": self.name,
                "by": this_process(),
                "saved": await self.count_saved(),
            }
        )
        await self.send_to_room("chat.joined")

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(self.group, self.channel_name)
        await self.send_to_room("chat.left")

    # From the page

    @classmethod
    async def decode_json(cls, text_data: str) -> Any:
        try:
            return json.loads(text_data)
        except (ValueError, RecursionError):
            return None

    async def receive(
        self, text_data: str | None = None, bytes_data: bytes | None = None, **kwargs: Any
    ) -> None:
        await super().receive(text_data=text_data or "null", **kwargs)

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        try:
            match content:
                case {"type": "say", "text": str(text)}:
                    if text := clean(text, MAX_TEXT):
                        await self.send_to_room("chat.message", text=text)
                case {"type": "rename", "name": str(name)}:
                    if (name := clean_name(name)) != self.name:
                        before, self.name = self.name, name
                        await self.send_to_room("chat.renamed", before=before)
                case {"type": "count"}:
                    await self.send_json({"type": "here", "count": await self.count_here()})
                case _:
                    await self.complain("The server does not understand this frame.")
        except LayerUnavailable:
            await self.complain(
                "This may not have reached other users: the database is unavailable."
            )

    # To the page

    async def send_json(self, content: Any, close: bool = False) -> None:
        # If the browser has disconnected, the server raises OSError. The error would end the
        # consumer before its disconnect handler runs, and other users would not see it leave.
        with contextlib.suppress(OSError):
            await super().send_json(content, close)

    async def complain(self, text: str) -> None:
        await self.send_json({"type": "error", "text": text})

    # Current numbers, for all processes

    async def count_here(self) -> int | None:
        """Return the number of users in the room; None without the database."""
        try:
            return await self.channel_layer.group_count(self.group)
        except LayerUnavailable:
            return None

    @database_sync_to_async
    def count_saved(self) -> int | None:
        """Return the number of saved announcements of the room; None without the database."""
        try:
            return Announcement.objects.filter(room=self.room).count()
        except OperationalError:
            return None

    # To all users in the room, in every process

    async def send_to_room(self, event: str, **fields: Any) -> None:
        await self.channel_layer.group_send(
            self.group,
            {
                "type": event,
                "sender": self.channel_name,
                "name": self.name,
                "via": this_process(),
                "time": time.time(),
                **fields,
            },
        )

    # From the channel layer, to the page: one handler for each event

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.show("message", event, text=event["text"])

    async def chat_joined(self, event: dict[str, Any]) -> None:
        # Each receiver counts after the event. The sender's count may already be out of date.
        await self.show("joined", event, here=await self.count_here())

    async def chat_left(self, event: dict[str, Any]) -> None:
        await self.show("left", event, here=await self.count_here())

    async def chat_renamed(self, event: dict[str, Any]) -> None:
        await self.show("renamed", event, before=event["before"])

    async def chat_announcement(self, event: dict[str, Any]) -> None:
        # The message was announced after its transaction committed, so the row exists.
        await self.send_json(
            {
                **event,
                "type": "announcement",
                "by": this_process(),
                "saved": await self.count_saved(),
            }
        )

    async def show(self, kind: str, event: dict[str, Any], **fields: Any) -> None:
        await self.send_json(
            {
                "type": kind,
                "name": event["name"],
                "mine": event["sender"] == self.channel_name,
                "via": event["via"],
                "by": this_process(),
                "time": event["time"],
                **fields,
            }
        )
