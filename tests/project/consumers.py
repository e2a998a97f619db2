"""Consumers like those of Channels' documentation, one of each kind."""

from __future__ import annotations

import os
from typing import Any

from asgiref.sync import async_to_sync
from channels.consumer import SyncConsumer
from channels.generic.http import AsyncHttpConsumer
from channels.generic.websocket import (
    AsyncJsonWebsocketConsumer,
    AsyncWebsocketConsumer,
    WebsocketConsumer,
)
from django.db import connection

GROUP = "chat"


class AsyncChat(AsyncWebsocketConsumer):
    """A chat of text frames."""

    async def connect(self) -> None:
        await self.channel_layer.group_add(GROUP, self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(GROUP, self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        await self.channel_layer.group_send(GROUP, {"type": "chat.message", "text": text_data})

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send(text_data=event["text"])


class SyncChat(WebsocketConsumer):
    """The chat of `AsyncChat` as a synchronous consumer, which runs in threads."""

    def connect(self) -> None:
        async_to_sync(self.channel_layer.group_add)(GROUP, self.channel_name)
        self.accept()

    def disconnect(self, code: int) -> None:
        async_to_sync(self.channel_layer.group_discard)(GROUP, self.channel_name)

    def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        async_to_sync(self.channel_layer.group_send)(
            GROUP, {"type": "chat.message", "text": text_data}
        )

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send(text_data=event["text"])


class DeclaredGroups(WebsocketConsumer):
    """A synchronous chat whose group Channels itself joins and leaves."""

    groups = [GROUP]  # noqa: RUF012  # as Channels declares it

    def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        async_to_sync(self.channel_layer.group_send)(
            GROUP, {"type": "chat.message", "text": text_data}
        )

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send(text_data=event["text"])


class Leaving(AsyncChat):
    """An `AsyncChat` that notifies all members when a client leaves."""

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_send(GROUP, {"type": "chat.message", "text": "left"})
        await super().disconnect(code)


class SyncLeaving(SyncChat):
    """A `SyncChat` that does so with `layer.sync`, on Django's connection."""

    def disconnect(self, code: int) -> None:
        layer: Any = self.channel_layer
        layer.sync.group_send(GROUP, {"type": "chat.message", "text": "left"})
        super().disconnect(code)


class JsonChat(AsyncJsonWebsocketConsumer):
    """A chat of JSON frames, each addressed to the group or to one channel."""

    groups = [GROUP]  # noqa: RUF012  # as Channels declares it

    async def connect(self) -> None:
        await self.accept()
        await self.send_json({"channel": self.channel_name})

    async def receive_json(self, content: dict[str, Any], **kwargs: Any) -> None:
        event = {"type": "chat.message", "content": content["say"]}
        if "to" in content:
            await self.channel_layer.send(content["to"], event)
        else:
            await self.channel_layer.group_send(GROUP, event)

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send_json({"said": event["content"]})


class Post(AsyncHttpConsumer):
    """An HTTP request that sends a message to the chat."""

    async def handle(self, body: bytes) -> None:
        await self.channel_layer.group_send(GROUP, {"type": "chat.message", "text": body.decode()})
        await self.send_response(200, b"said")


class Thumbnails(SyncConsumer):
    """A worker that records which process did which job."""

    def thumbnails_make(self, message: dict[str, Any]) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO job (number, pid) VALUES (%s, %s)", [message["number"], os.getpid()]
            )
