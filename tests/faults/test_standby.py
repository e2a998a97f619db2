"""Functions that write, called on a standby: they raise the error of a server that takes no writes.

That error may be retried: the next connection may find the primary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from devtools.postgres import PostgresServer
from pg_layer._db.errors import READ_ONLY
from tests.faults.conftest import migrate
from tests.faults.standby import caught_up

WRITES = {
    "send without a count": "pg_layer_send_one('asgi', 'a', 'x', 60, 9, NULL, true, false)",
    "send": "pg_layer_send_one('asgi', 'a', 'x', 60, 9, 0, true, false)",
    "send from SQL": "pg_layer_send('a', '{\"type\": \"x\"}')",
    "send_many": (
        "pg_layer_send_batch('asgi', '{a,b}', '{x,x}', '{60,60}', '{9,9}', '{}', '{}', true, false)"
    ),
    "group_send": "pg_layer_group_send_one('asgi', 'a', 'x', 60, NULL, true, false)",
    "group_send_many": (
        "pg_layer_group_send_batch('asgi', '{a,b}', '{x,x}', '{60,60}', '{NULL,NULL}', true, false)"
    ),
    "announce": (
        "pg_layer_announce_marked("
        "'{1}', '{1}', '{1}', '{asgi!x}', '{a}', '{message}', '{NULL}', '{x}')"
    ),
    "membership request": (
        "pg_layer_request_memberships("
        "'asgi', '{room}', '{a}', '{true}', 60, '{9}', 10, true, false)"
    ),
    "claim": "pg_layer_claim('asgi', 'a', 'asgi!x', 0, 0, 1)",
    "renew": "pg_layer_renew('asgi', 'asgi!x', '', 0, 60, 0, '{}', NULL, 0, 0, 0)",
}


@pytest.fixture(scope="module")
def standby_dsn() -> Iterator[str]:
    with PostgresServer(fsync=False) as primary:
        migrate(primary.dsn())
        with PostgresServer(fsync=False, primary=primary) as standby:
            asyncio.run(caught_up(primary, standby))
            yield standby.dsn()


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
def test_write_on_a_standby_raises_read_only(standby_dsn: str, call: str) -> None:
    with psycopg.connect(standby_dsn) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(f"SELECT {call}".encode())
    assert caught.value.sqlstate == READ_ONLY
