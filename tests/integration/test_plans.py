"""The SQL behind the promises: its plans on full tables, and that it addresses inboxes as Python does."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pg_layer import PostgresChannelLayer
from pg_layer.client import inbox_of
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, until

TABLES = ("pg_layer_message", "pg_layer_membership", "pg_layer_client")
FILL = """
    INSERT INTO pg_layer_client (inbox, expires_at)
    SELECT 'asgi!' || md5(n::text), 'infinity' FROM generate_series(1, 5000) AS n;

    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
    SELECT 'asgi!' || md5(c::text), n, 'specific.' || md5(c::text) || '!1', '\\x80', 'infinity'
    FROM generate_series(1, 80000) AS n, LATERAL (SELECT n % 5000) AS client (c);

    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
    SELECT 'asgi!:' || name, n, name, '\\x80', 'infinity'
    FROM generate_series(1, 20000) AS n, LATERAL (SELECT 'jobs-' || n % 10) AS job (name);

    INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at)
    SELECT 'group-' || n % 1000, 'asgi!' || md5(c::text), 'specific.' || md5(c::text) || '!' || n, 'infinity'
    FROM generate_series(1, 50000) AS n, LATERAL (SELECT n % 5000) AS client (c);

    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
    SELECT 'asgi!:backlog', n, 'backlog', '\\x80', 'infinity' FROM generate_series(1, 20000) AS n;

    INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at)
    SELECT 'crowd', 'asgi!' || md5(c::text), 'specific.' || md5(c::text) || '!' || n, 'infinity'
    FROM generate_series(1, 20000) AS n, LATERAL (SELECT n % 3) AS client (c)
"""


async def statistics(observer: Observer) -> dict[str, tuple[int, int]]:
    """Sequential scans of each table so far, and rows fetched by way of an index."""
    # Those who leave hand in their statistics as they go.
    await until(
        lambda: (
            observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend'"
            ).fetchone()
            == (1,)
        )
    )
    observer.execute("SELECT pg_stat_clear_snapshot()")
    return {
        table: (scans, fetched)
        for table, scans, fetched in observer.execute(
            "SELECT relname, seq_scan, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = ANY (%s)",
            (list(TABLES),),
        )
    }


async def send_and_receive(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    channel = await layer.new_channel()
    for _ in range(20):
        await sender.send(channel, {"blob": bytes(6000)})
        await receive(layer, channel)
    await asyncio.gather(*(sender.send(channel, {}) for _ in range(20)))
    for _ in range(20):
        await receive(layer, channel)
    return 40


async def send_then_receive(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    channels = [await layer.new_channel() for _ in range(4)]
    for channel in channels:
        await sender.send(channel, {"type": "first"})
    await asyncio.gather(*(sender.send(channel, {}) for channel in channels for _ in range(5)))
    for channel in channels:
        for _ in range(6):
            await receive(layer, channel)
    return 24


async def compete(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    await listen(layer)
    receivers = [asyncio.create_task(layer.receive("jobs")) for _ in range(20)]
    for _ in range(10):
        await sender.send("jobs", {})
    await asyncio.gather(*(sender.send("jobs", {}) for _ in range(20)))
    await asyncio.wait(receivers)
    await asyncio.wait({asyncio.create_task(layer.receive("jobs"))})
    return 30


async def talk_in_groups(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    channels = [await layer.new_channel() for _ in range(5)]
    for channel in channels:
        await layer.group_add("room", channel)
        await sender.group_add("other", channel)
    for _ in range(10):
        await sender.group_send("room", {})
    await asyncio.gather(*(sender.group_send(group, {}) for group in ("room", "other") * 5))
    for channel in channels:
        for _ in range(20):
            await receive(layer, channel)
    await layer.group_discard("room", channels[0])
    await sender.group_discard("room", channels[1])
    return 30


async def join_a_large_group(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    channel = await layer.new_channel()
    await layer.group_add("group-7", channel)
    await sender.group_add("group-7", channel)
    await layer.group_discard("group-7", channel)
    return 3


async def talk_to_a_crowd(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    for _ in range(5):
        await sender.group_send("crowd", {})
    await asyncio.gather(*(sender.group_send("crowd", {}) for _ in range(20)))
    return 25


async def work_off_a_backlog(layer: PostgresChannelLayer, sender: PostgresChannelLayer) -> int:
    for _ in range(20):
        await receive(layer, "backlog")
    return 20


WORKS: list[Callable[[PostgresChannelLayer, PostgresChannelLayer], Awaitable[int]]] = [
    send_and_receive,
    send_then_receive,
    compete,
    talk_in_groups,
    join_a_large_group,
    talk_to_a_crowd,
    work_off_a_backlog,
]


@pytest.mark.parametrize("analyzed", ["never", "while empty", "when full"])
async def test_nothing_walks_the_rows_of_others(
    make_layer: MakeLayer, observer: Observer, analyzed: str
) -> None:
    if analyzed == "while empty":
        observer.execute("ANALYZE")
    observer.execute(FILL.encode())
    if analyzed == "when full":
        observer.execute("ANALYZE")
    before = await statistics(observer)
    for work in WORKS:
        layer, sender = make_layer(), make_layer()
        messages = await work(layer, sender)
        await layer.close()
        await sender.close()
        after = await statistics(observer)
        for table in TABLES:
            scans = after[table][0] - before[table][0]
            fetched = after[table][1] - before[table][1]
            assert (work.__name__, table, scans) == (work.__name__, table, 0)
            # What waits in the inbox is counted and read a few times; what waits elsewhere is 100,000 rows.
            assert fetched <= 50 * messages + 200, (work.__name__, table)
        before = after


async def test_plans_made_while_the_tables_were_empty_walk_nothing_when_they_are_full(
    make_layer: MakeLayer, observer: Observer
) -> None:
    observer.execute("VACUUM ANALYZE")
    before = await statistics(observer)
    layer, sender = make_layer(), make_layer()
    for work in WORKS:
        if work is not work_off_a_backlog:  # that comes with the rest
            await work(layer, sender)
    observer.execute(FILL.encode())
    for work in WORKS:
        await work(layer, sender)
    await layer.close()
    await sender.close()
    after = await statistics(observer)
    assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(TABLES, 0)


# ---------------------------------------------------------------------- addresses

LETTERS = "abcXYZ019-_."
PREFIXES = st.text(LETTERS, min_size=1, max_size=50)
NORMAL = st.text(LETTERS, min_size=1, max_size=99)
SPECIFIC = st.builds("{}!{}".format, st.text(LETTERS, min_size=1, max_size=49), st.text(LETTERS, max_size=49))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=PREFIXES, names=st.lists(NORMAL | SPECIFIC, min_size=1, max_size=20))
def test_python_and_sql_agree_on_inboxes(observer: Observer, prefix: str, names: list[str]) -> None:
    rows = observer.execute(
        "SELECT n, pg_layer_inbox(%s, n) FROM unnest(%s::text[]) AS n", (prefix, names)
    ).fetchall()
    assert rows == [(name, inbox_of(prefix, name)) for name in names]


def test_a_doorbell_is_a_short_name_of_its_inbox(observer: Observer) -> None:
    inboxes = [f"asgi!{'x' * n}" for n in range(150)]
    rows = observer.execute("SELECT pg_layer_doorbell(i) FROM unnest(%s::text[]) AS i", (inboxes,)).fetchall()
    assert [doorbell for (doorbell,) in rows] == [
        f"pg_layer_{hashlib.sha256(inbox.encode()).hexdigest()[:40]}" for inbox in inboxes
    ]
    assert max(len(doorbell) for (doorbell,) in rows) < 63
