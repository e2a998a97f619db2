"""Messages that are sent and received, with Django's test runner."""

from __future__ import annotations

from typing import cast

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.db import transaction
from django.test import TransactionTestCase

from example.urls import websocket_urlpatterns
from pg_layer import PostgresChannelLayer


class ChatTests(TransactionTestCase):
    async def test_announcement_reaches_the_socket(self) -> None:
        socket = WebsocketCommunicator(URLRouter(websocket_urlpatterns), "/ws/hall/?name=Ann")
        await socket.connect()
        assert (await socket.receive_json_from())["type"] == "welcome"
        assert (await socket.receive_json_from())["type"] == "joined"

        await self.async_client.post("/hall/", {"text": "Dinner is ready"})

        event = await socket.receive_json_from()
        assert (event["type"], event["text"], event["saved"]) == (
            "announcement",
            "Dinner is ready",
            1,
        )
        await socket.disconnect()


class WorkerTests(TransactionTestCase):
    def test_job_is_received_by_its_worker(self) -> None:
        layer = cast(PostgresChannelLayer, get_channel_layer())
        with transaction.atomic():
            layer.sync.send("thumbnails", {"type": "thumbnails.make", "number": 1})

        assert async_to_sync(layer.receive)("thumbnails") == {
            "type": "thumbnails.make",
            "number": 1,
        }
