"""Messages of asynchronous calls, in tests whose transaction never commits."""

from __future__ import annotations

from typing import cast

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.test import TestCase

from pg_layer import PostgresChannelLayer
from pg_layer.testing import reset_layers


class ThumbnailTests(TestCase):
    def setUp(self) -> None:
        self.addCleanup(reset_layers)

    def test_view_sends_a_job(self) -> None:
        layer = cast(PostgresChannelLayer, get_channel_layer())
        async_to_sync(layer.send)("thumbnails", {"type": "thumbnails.make"})
