"""Processes whose threads are greenlets, as under `celery -P gevent` and `gunicorn -k gevent`."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec

import pytest

from tests.components import require
from tests.conftest import MakeLayer
from tests.processes import listen, receive
from tests.project.commands import run, succeeded

LIBRARIES = {
    "gevent": """
from gevent import monkey
monkey.patch_all()
from gevent import joinall, sleep, spawn
""",
    "eventlet": """
import os
import warnings
# psycopg knows gevent alone: otherwise each query, also of the ORM, blocks all greenlets.
os.environ["PSYCOPG_WAIT_FUNC"] = "wait_select"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that it is deprecated
    import eventlet
eventlet.monkey_patch()
from eventlet import sleep, spawn
def joinall(greenlets, raise_error):
    for greenlet in greenlets:
        greenlet.wait()
""",
}
START = """
import sys
import django
django.setup()
import psycopg
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import connection, transaction
layer = get_channel_layer()
def message(number):
    return {"type": "test.number", "number": number}
"""


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in LIBRARIES])
def library(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    # Found only: eventlet warns where it is imported.
    require(name, find_spec(name), f"Python's module {name} is not installed")
    return name


async def run_patched(library: str, dsn: str, program: str, *arguments: str) -> str:
    """Return the output of the program, in a process whose threads are greenlets of the library."""
    code = LIBRARIES[library] + START + program
    # On a busy machine the last of several senders begins late. The first must still wait then.
    config = {"send_timeout": 60}
    layers = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": config}}
    settings = {"CHANNEL_LAYERS": layers}
    return succeeded(await asyncio.to_thread(run, dsn, "-c", code, *arguments, settings=settings))


ONE_AT_A_TIME = """
channel = sys.argv[1]
async_to_sync(layer.group_add)("room", channel)
for number in range(3):
    async_to_sync(layer.group_send)("room", message(number))
joinall([spawn(async_to_sync(layer.send), channel, message(3))], raise_error=True)
joinall([spawn(async_to_sync(layer.group_send), "room", message(4))], raise_error=True)
layer.sync.group_send("room", message(5))
async_to_sync(layer.group_send)("room", message(6))

own = async_to_sync(layer.new_channel)()
layer.sync.group_add("own", own)
for number in range(3):
    async_to_sync(layer.group_send)("own", message(number))
    print(async_to_sync(layer.receive)(own)["number"])
async_to_sync(layer.close)()
"""


async def test_async_to_sync_under_greenlets_runs_one_call_at_a_time(
    migrated_dsn: str, make_layer: MakeLayer, library: str
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    assert (await run_patched(library, migrated_dsn, ONE_AT_A_TIME, channel)).split() == [
        "0",
        "1",
        "2",
    ]
    assert [(await receive(layer, channel))["number"] for _ in range(7)] == list(range(7))


# All senders wait for a lock, and the main greenlet waits for all of them. If a sender blocked the
# thread, no other sender could begin, and the lock could not be released.
CONCURRENT = """
def send(number):
    layer.sync.group_send("room", message(number))
    with transaction.atomic():
        layer.sync.group_send("room", message(number + 10))
    connection.close()

dsn = sys.argv[1]
with psycopg.connect(dsn) as blocker, psycopg.connect(dsn, autocommit=True) as observer:
    blocker.execute("LOCK TABLE pg_layer_message IN ACCESS EXCLUSIVE MODE")
    senders = [spawn(send, number) for number in range(3)]
    query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
    while observer.execute(query).fetchone() != (3,):
        sleep(0.01)
    blocker.rollback()
    joinall(senders, raise_error=True)
print("end")
"""


async def test_layer_sync_under_greenlets_runs_calls_concurrently(
    migrated_dsn: str, make_layer: MakeLayer, library: str
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    assert await run_patched(library, migrated_dsn, CONCURRENT, migrated_dsn) == "end"
    numbers = [(await receive(layer, channel))["number"] for _ in range(6)]
    assert sorted(numbers) == [0, 1, 2, 10, 11, 12]
