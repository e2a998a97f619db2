"""Event loops that are closed without cancelling their tasks, and layers that are dropped.

The code runs in processes of their own, in Python's development mode: any complaint of asyncio or
of the garbage collector is on their standard error.
"""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.project.commands import django, run, succeeded

COMMON = """
import asyncio, contextlib, gc, os, threading, time
import psycopg
from pg_layer import PostgresChannelLayer

dsn = os.environ["PG_LAYER_TEST_PROJECT_DSN"]
observer = psycopg.connect(dsn, autocommit=True)
blocker = psycopg.connect(dsn)

def connections():
    [count] = observer.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'pg_layer%'"
    ).fetchone()
    return count

def eventually(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError

def live_clients():
    return observer.execute(
        "SELECT count(*) FROM pg_layer_client WHERE ended_at IS NULL"
    ).fetchone()[0]

async def use(layer):
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"n": 1})
    assert (await layer.receive(channel))["n"] == 1
    return channel

async def run_until_they_wait(*calls):
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks), tasks
    return tasks

def finish():
    blocker.rollback()
    eventually(lambda: not connections())
    gc.collect()
    observer.close()
    blocker.close()
    print("finished")
"""

WAITING = {
    "receivers": """
async def wait(layer, channel):
    return await run_until_they_wait(
        layer.receive(channel), layer.receive("jobs"), asyncio.wait_for(layer.receive("a"), 60)
    )
""",
    "writers": """
async def wait(layer, channel):
    blocker.execute("LOCK TABLE pg_layer_message, pg_layer_membership IN EXCLUSIVE MODE")
    return await run_until_they_wait(
        *(layer.send(channel, {"n": n}) for n in range(3)),
        layer.group_send("room", {"n": 1}),
        layer.group_discard("room", channel),
        layer.group_add("other", channel),
        layer.group_send("other", {"n": 1}),
        layer.group_add("other", "jobs"),
        layer.flush(),
    )
""",
    "nothing": """
async def wait(layer, channel):
    return []
""",
}

CLOSED = """
async def main():
    layer = PostgresChannelLayer(dsn=dsn)
    return layer, await wait(layer, await use(layer))

loop = asyncio.new_event_loop()
kept = loop.run_until_complete(main())
{close}
blocker.rollback()  # a backend that waits for a lock does not notice that its client has gone
eventually(lambda: not connections())
{drop}
gc.collect()
finish()
"""
IN_RUNNING_LOOP = """
async def close():
    loop.close()
asyncio.run(close())
"""


@pytest.mark.parametrize("drop", ["del kept", ""], ids=["dropped", "kept"])
@pytest.mark.parametrize("waiting", WAITING)
def test_loop_closed_with_pending_calls_is_silent_and_closes_connections(
    migrated_dsn: str, waiting: str, drop: str
) -> None:
    code = COMMON + WAITING[waiting] + CLOSED.format(close="loop.close()", drop=drop)
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


def test_loop_closed_by_code_on_another_loop_is_silent(migrated_dsn: str) -> None:
    code = COMMON + WAITING["receivers"]
    code += CLOSED.format(close=IN_RUNNING_LOOP, drop="del kept")
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


@pytest.mark.parametrize("close", ["loop.close()", IN_RUNNING_LOOP], ids=["here", "elsewhere"])
def test_loop_stopped_and_closed_is_silent(migrated_dsn: str, close: str) -> None:
    """A loop that was stopped while it did not run ends its next run at once."""
    code = COMMON + WAITING["receivers"]
    code += CLOSED.format(close=f"loop.stop()\n{close}", drop="del kept")
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


def test_uvloop_closed_with_pending_calls_is_silent(migrated_dsn: str) -> None:
    pytest.importorskip("uvloop")
    code = COMMON + WAITING["receivers"]
    code += CLOSED.format(close="loop.close()", drop="del kept").replace(
        "asyncio.new_event_loop()", "__import__('uvloop').new_event_loop()"
    )
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


FOREIGN = """
layer = PostgresChannelLayer(dsn=dsn)
channels = []
may_end = threading.Event()
is_used = threading.Event()

async def own():
    channels.append(await use(layer))
    is_used.set()
    await asyncio.to_thread(may_end.wait)
    assert not len(layer._loops._order)
    await layer.close()

thread = threading.Thread(target=lambda: asyncio.run(own()))
thread.start()
is_used.wait()
loop = asyncio.new_event_loop()
kept = loop.run_until_complete(wait(layer, channels[0]))
loop.close()
del kept
gc.collect()
blocker.rollback()
may_end.set()
thread.join()
finish()
"""


@pytest.mark.parametrize("waiting", ["receivers", "writers"])
def test_foreign_loop_closed_with_pending_calls_is_silent(migrated_dsn: str, waiting: str) -> None:
    code = COMMON + WAITING[waiting] + FOREIGN
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


DROPPED = """
async def main():
    before = len(asyncio.all_tasks())
    for _ in range(10):
        layer = PostgresChannelLayer(dsn=dsn)
        await use(layer)
        {keep}
        del layer
    gc.disable()  # what follows needs no garbage collection
    {drop}
    while connections() or live_clients() or len(asyncio.all_tasks()) > before:
        await asyncio.sleep(0.05)

kept = []
gc.disable()
asyncio.run(asyncio.wait_for(main(), 30))
[memberships] = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone()
assert not memberships
finish()
"""


@pytest.mark.parametrize("drop", ["kept.clear()", ""], ids=["together", "each"])
def test_layer_dropped_without_close_closes_when_nothing_refers_to_it(
    migrated_dsn: str, drop: str
) -> None:
    keep = "kept.append(layer)" if drop else ""
    code = COMMON + DROPPED.format(keep=keep, drop=drop)
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


OVERRIDDEN = """
import django
django.setup()
from channels.layers import get_channel_layer
from django.test import override_settings

entry = {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": {"dsn": dsn}}

async def main():
    await use(get_channel_layer())
    before = connections(), len(asyncio.all_tasks())
    for _ in range(10):
        with override_settings(CHANNEL_LAYERS={"default": entry}):
            await use(get_channel_layer())
    while connections() > before[0] or len(asyncio.all_tasks()) > before[1]:
        await asyncio.sleep(0.05)
    await get_channel_layer().close()

gc.disable()
asyncio.run(asyncio.wait_for(main(), 30))
finish()
"""


def test_layers_of_overridden_settings_close(migrated_dsn: str) -> None:
    assert succeeded(run(migrated_dsn, "-c", COMMON + OVERRIDDEN)) == "finished"


DROPPED_ELSEWHERE = """
from asgiref.sync import async_to_sync

layer = PostgresChannelLayer(dsn=dsn)
{use}
assert connections()
del layer
blocker.rollback()  # a backend that waits for a lock does not notice that its client has gone
eventually(lambda: not connections())
assert live_clients() == {clients}
finish()
"""


@pytest.mark.parametrize(
    ("use", "clients"),
    [
        ("async_to_sync(layer.send)('jobs', {})", 0),
        (
            "async_to_sync(layer.group_add)('room', async_to_sync(layer.new_channel)());"
            "async_to_sync(layer.group_send)('room', {})",
            0,
        ),
        # A loop that does not run: the lease expires by itself.
        ("loop = asyncio.new_event_loop(); loop.run_until_complete(use(layer))", 1),
    ],
    ids=["sending thread", "receiving thread", "halted loop"],
)
def test_layer_dropped_outside_of_a_running_loop_closes_its_connections(
    migrated_dsn: str, use: str, clients: int
) -> None:
    code = COMMON + DROPPED_ELSEWHERE.format(use=use, clients=clients)
    if clients:
        code += "loop.close()"
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


def test_layer_that_a_call_uses_is_not_dropped(migrated_dsn: str) -> None:
    code = (
        COMMON
        + """
async def main():
    layer = PostgresChannelLayer(dsn=dsn)
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await use(layer)
    del layer
    other = PostgresChannelLayer(dsn=dsn)
    await other.send(channel, {"n": 2})
    assert await receiving == {"n": 2}
    await other.close()
    del receiving
    while connections():
        await asyncio.sleep(0.05)

asyncio.run(asyncio.wait_for(main(), 30))
finish()
"""
    )
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


def test_sync_keeps_its_layer(migrated_dsn: str) -> None:
    """As a module does that keeps `layer.sync` while a test overrides CHANNEL_LAYERS."""
    code = (
        COMMON
        + """
import django
django.setup()
layer = PostgresChannelLayer(dsn=dsn)
sync = layer.sync
del layer
gc.collect()
sync.send("jobs", {})
del sync
eventually(lambda: not connections())
PostgresChannelLayer(dsn=dsn).sync.send("other-jobs", {})
assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (2,)
finish()
"""
    )
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


def test_process_ends_the_lease_of_a_layer_dropped_with_its_loop(migrated_dsn: str) -> None:
    code = (
        COMMON
        + """
async def main():
    layer = PostgresChannelLayer(dsn=dsn)
    await use(layer)

asyncio.run(main())
gc.collect()
finish()
"""
    )
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"
    with psycopg.connect(migrated_dsn) as conn:
        rows = conn.execute("SELECT ended_at IS NOT NULL FROM pg_layer_client").fetchall()
    assert rows == [(True,)]


def test_dropped_layer_of_the_parent_is_not_closed_by_a_child(migrated_dsn: str) -> None:
    """To shut its sockets down would end the connections of the parent."""
    code = (
        COMMON
        + """
from pg_layer._runtime.loops import Dropped

async def main():
    layer = PostgresChannelLayer(dsn=dsn)
    await use(layer)
    dropped = Dropped(layer.config, None, [layer._loops.client], [layer._loops.main_engine])
    assert dropped.is_used
    child = os.fork()
    if not child:
        os._exit(dropped.is_used)
    assert os.waitpid(child, 0)[1] == 0
    await layer.close()
    assert not dropped.is_used

asyncio.run(asyncio.wait_for(main(), 30))
finish()
"""
    )
    assert succeeded(run(migrated_dsn, "-c", code)) == "finished"


FORKED = """
async def main():
    layer = PostgresChannelLayer(dsn=dsn)
    return layer, await use(layer)

loop = asyncio.new_event_loop()
layer, channel = loop.run_until_complete(main())
pid = os.fork()
if not pid:
    loop.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0

async def go_on():
    await layer.send(channel, {"n": 2})
    assert (await layer.receive(channel))["n"] == 2
    assert layer.stats()["reconnects"] == 0
    await layer.close()

loop.run_until_complete(go_on())
loop.close()
finish()
"""


def test_loop_closed_in_a_forked_child_leaves_the_connections_of_the_parent(
    migrated_dsn: str,
) -> None:
    assert succeeded(run(migrated_dsn, "-W", "ignore", "-c", COMMON + FORKED)) == "finished"


@pytest.mark.parametrize(
    ("cursor", "statement"),
    [
        ("connection.cursor()", "TRUNCATE pg_layer_message, pg_layer_membership"),
        ("connection._nodb_cursor()", "DROP DATABASE {name}"),
    ],
    ids=["TRUNCATE", "DROP"],
)
def test_dropped_layers_have_closed_before_such_statements(
    migrated_dsn: str, cursor: str, statement: str
) -> None:
    """As layers of `override_settings` do. Their close would go on beside the statement."""
    name = f"{conninfo_to_dict(migrated_dsn)['dbname']}_dropped"
    output = django(
        migrated_dsn,
        f"""
import os
import psycopg
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import connection
from django.test import override_settings
from django.test.utils import setup_test_environment
setup_test_environment()
observer = psycopg.connect(os.environ["PG_LAYER_TEST_PROJECT_DSN"], autocommit=True)

def count(execute, sql, *arguments):
    for query in (
        "SELECT count(*) FROM pg_layer_client WHERE ended_at IS NULL",
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'pg_layer%' AND datname = current_database()",
    ):
        print(*observer.execute(query).fetchone())
    return execute(sql, *arguments)

with connection._nodb_cursor() as cursor:
    cursor.execute("CREATE DATABASE {name}")
layers = []
for _ in range(5):
    entry = {{"BACKEND": "pg_layer.PostgresChannelLayer"}}
    with override_settings(CHANNEL_LAYERS={{"default": entry}}):
        layer = get_channel_layer()
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
        layers.append(layer)
        del layer
with {cursor} as cursor, cursor.db.execute_wrapper(count):
    layers.clear()
    cursor.execute("{statement.format(name=name)}")
observer.close()
connection.close()
""",
    )
    assert output == "0\n0"
