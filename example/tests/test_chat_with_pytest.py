"""The tests of the chat with pytest-django and pytest-asyncio."""

from __future__ import annotations

import pytest
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.test import AsyncClient, Client

from example.urls import websocket_urlpatterns
from pg_layer.testing import captured_messages


@pytest.mark.django_db
def test_announcement_is_sent(client: Client) -> None:
    with captured_messages(groups=["chat.hall"]) as sent:
        client.post("/hall/", {"text": "Dinner is ready"})

    assert [each.message["text"] for each in sent] == ["Dinner is ready"]


@pytest.mark.asyncio
@pytest.mark.django_db(transaction=True)
async def test_announcement_reaches_the_socket(async_client: AsyncClient) -> None:
    socket = WebsocketCommunicator(URLRouter(websocket_urlpatterns), "/ws/hall/?name=Ann")
    await socket.connect()
    assert (await socket.receive_json_from())["type"] == "welcome"
    assert (await socket.receive_json_from())["type"] == "joined"

    await async_client.post("/hall/", {"text": "Dinner is ready"})

    event = await socket.receive_json_from()
    assert (event["type"], event["text"], event["saved"]) == ("announcement", "Dinner is ready", 1)
    await socket.disconnect()
