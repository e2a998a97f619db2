"""Tests with a live server, for `manage.py test tests.project.live`."""

from __future__ import annotations

import multiprocessing
import os
import sys

from channels.layers import get_channel_layer
from channels.testing import ChannelsLiveServerTestCase
from websockets.sync.client import ClientConnection, connect

if "test" in sys.argv[1:]:  # and not where a spawned server imports this module
    multiprocessing.set_start_method(os.environ["PG_LAYER_TEST_START_METHOD"], force=True)


class LiveServerTests(ChannelsLiveServerTestCase):
    """The server is another process: it must use the test database as well."""

    serve_static = False

    def open(self) -> ClientConnection:
        return connect(f"{self.live_server_ws_url}/async/", open_timeout=30)

    def test_clients_of_the_server_receive_from_each_other(self) -> None:
        with self.open() as one, self.open() as two:
            one.send("hello")
            assert one.recv(30) == two.recv(30) == "hello"

    def test_client_of_the_server_receives_what_the_test_sends(self) -> None:
        with self.open() as client:
            message = {"type": "chat.message", "text": "from the test"}
            get_channel_layer().sync.group_send("chat", message)  # type: ignore[union-attr]
            assert client.recv(30) == "from the test"
