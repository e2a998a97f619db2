"""A user's test suite with the layer, for `manage.py test tests.project.suite`.

Django's runner creates a test database before the layer's first use and removes it at the end.
"""

from __future__ import annotations

import asyncio
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import connection
from django.test import TestCase, TransactionTestCase


def layer() -> Any:
    return get_channel_layer()


class SyncTests(TransactionTestCase):
    available_apps = ("pg_layer",)

    def test_send_and_receive(self) -> None:
        channel = async_to_sync(layer().new_channel)()
        async_to_sync(layer().group_add)("room", channel)
        async_to_sync(layer().group_send)("room", {"type": "test", "n": 1})
        assert async_to_sync(layer().receive)(channel) == {"type": "test", "n": 1}

    def test_it_uses_the_test_database(self) -> None:
        async_to_sync(layer().send)("jobs", {"type": "test"})
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_database() FROM pg_layer_message WHERE channel = 'jobs'")
            [(name,)] = cursor.fetchall()
        assert name.startswith("test_")


class AsyncTests(TransactionTestCase):
    available_apps = ("pg_layer",)

    async def test_send_and_receive(self) -> None:
        channel = await layer().new_channel()
        await layer().group_add("room", channel)
        await layer().group_send("room", {"type": "test", "n": 2})
        message = await asyncio.wait_for(layer().receive(channel), 30)
        assert message == {"type": "test", "n": 2}

    async def test_once_more_on_another_loop(self) -> None:
        await self.test_send_and_receive()


class InTransaction(TestCase):
    async def test_send_and_receive(self) -> None:
        channel = await layer().new_channel()
        await layer().send(channel, {"type": "test", "n": 3})
        assert await asyncio.wait_for(layer().receive(channel), 30) == {"type": "test", "n": 3}
