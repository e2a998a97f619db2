"""Plans of statements on full tables with old statistics, and addresses in SQL."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from pg_layer._messages.addresses import channel_address, group_address, notification_channel
from tests.conftest import MakeLayer, Observer
from tests.processes import TIMEOUT, listen, receive, until

TABLES = ("pg_layer_message", "pg_layer_membership", "pg_layer_client")
MANY = 20_000  # rows that a statement must not read
# Clients with leases, messages that wait for clients, groups and workers, and memberships.
FILL = """
    INSERT INTO pg_layer_client (address, expires_at, lease)
    SELECT 'asgi!' || md5(n::text), 'infinity', 60 FROM generate_series(1, 5000) AS n;

    INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)
    SELECT 'asgi!' || md5(c::text), pg_current_xact_id(), 1, 'specific.' || md5(c::text) || '!1',
        '\\x80',
        'infinity'
    FROM generate_series(1, 80000) AS n, LATERAL (SELECT n % 5000) AS client (c);

    INSERT INTO pg_layer_message (address, xid, boot, payload, expires_at)
    SELECT 'asgi!@' || name, pg_current_xact_id(), 1, '\\x80', 'infinity'
    FROM generate_series(1, 20000) AS n,
        LATERAL (SELECT CASE WHEN n % 4 = 0 THEN 'room' ELSE 'group-' || n % 1000 END) AS g (name);

    INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)
    SELECT 'asgi!:' || name, pg_current_xact_id(), 1, name, '\\x80', 'infinity'
    FROM generate_series(1, 20000) AS n, LATERAL (SELECT 'jobs-' || n % 10) AS job (name);

    INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)
    SELECT 'group-' || n % 1000, 'asgi!' || md5(c::text),
        'specific.' || md5(c::text) || '!' || n, 'infinity'
    FROM generate_series(1, 50000) AS n, LATERAL (SELECT n % 5000) AS client (c);

    INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)
    SELECT 'asgi!:backlog', pg_current_xact_id(), 1, 'backlog', '\\x80', 'infinity'
    FROM generate_series(1, 20000) AS n;

    INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)
    SELECT 'crowd', 'asgi!' || md5(c::text), 'specific.' || md5(c::text) || '!' || n, 'infinity'
    FROM generate_series(1, 20000) AS n, LATERAL (SELECT n % 3) AS client (c)
"""


async def statistics(observer: Observer) -> dict[str, tuple[int, int, int]]:
    """Return for each table the sequential scans, fetched rows and index entries read so far."""
    # A connection reports its statistics when it ends.
    await until(
        lambda: (
            observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend' AND application_name <> 'old'"
            ).fetchone()
            == (1,)
        )
    )
    observer.execute("SELECT pg_stat_clear_snapshot()")
    return {
        table: (scans, fetched, read)
        for table, scans, fetched, read in observer.execute(
            """
            SELECT t.relname, t.seq_scan, t.idx_tup_fetch, sum(i.idx_tup_read)::bigint
            FROM pg_stat_user_tables AS t JOIN pg_stat_user_indexes AS i USING (relid)
            WHERE t.relname = ANY (%s) GROUP BY t.relname, t.seq_scan, t.idx_tup_fetch
            """,
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
        await sender.group_send("room", {"blob": bytes(6000)})
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


async def add_workers_to_a_large_group(
    layer: PostgresChannelLayer, sender: PostgresChannelLayer
) -> int:
    for _ in range(5):
        await sender.group_add("group-8", "errands")
        await sender.group_send("group-8", {})
        await receive(layer, "errands")
        await sender.group_discard("group-8", "errands")
    return 15


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
    add_workers_to_a_large_group,
    talk_to_a_crowd,
    work_off_a_backlog,
]


@pytest.mark.parametrize("analyzed", ["never", "while empty", "when full"])
async def test_operations_any_statistics_read_no_rows_of_other_addresses(
    make_layer: MakeLayer, observer: Observer, analyzed: str
) -> None:
    """The tables have many rows of other clients. Each operation reads a few rows."""
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
            # The rows at the address are counted and read a few times. 140,000 rows are at other
            # addresses.
            assert fetched <= 50 * messages + 200, (work.__name__, table)
        before = after


async def test_plans_made_for_empty_tables_do_not_scan_full_ones(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """Sessions keep the plans of prepared statements, which must suit larger tables."""
    observer.execute("VACUUM ANALYZE")
    before = await statistics(observer)
    layer, sender = make_layer(), make_layer()
    for work in WORKS:
        if work is not work_off_a_backlog:  # it runs with the other operations
            await work(layer, sender)
    observer.execute(FILL.encode())
    for work in WORKS:
        await work(layer, sender)
    await layer.close()
    await sender.close()
    after = await statistics(observer)
    assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(
        TABLES, 0
    )


# ---------------------------------------------------------------------- dead rows


@contextmanager
def old_snapshot(dsn: str) -> Iterator[None]:
    """Hold a snapshot: deleted rows cannot be removed, nor their index entries marked dead."""
    with psycopg.connect(dsn, application_name="old") as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT FROM pg_layer_client")
        yield


async def many_dead(observer: Observer, address: str, channel: str | None) -> None:
    """Write many messages at an address, and delete them."""
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
        " SELECT %s, pg_current_xact_id(), 1, %s, '\\x80', clock_timestamp() + interval '1 hour'"
        " FROM generate_series(1, %s)",
        (address, channel, MANY),
    )
    observer.execute("DELETE FROM pg_layer_message WHERE address = %s", (address,))


async def test_operations_under_old_snapshot_read_no_dead_rows(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    """Messages went through a channel, a group and a normal channel, and cannot be vacuumed.

    Processes send, receive and renew their leases, and one reconnects. After the first statements,
    none of that reads the index entries of the dead rows again.
    """
    named = make_conninfo(migrated_dsn, application_name="layer")
    layer, sender = make_layer(dsn=named, lease=60, heartbeat=0.1), make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)

    async def talk(number: int) -> None:
        await sender.send(channel, {"n": number})
        assert await receive(layer, channel) == {"n": number}
        await sender.send("jobs", {"n": number})
        assert await receive(layer, "jobs") == {"n": number}
        await sender.group_send("room", {"n": number})
        assert await receive(layer, channel) == {"n": number}

    async def end_connections() -> None:
        """End the connections, which report their statistics then."""
        reconnects = layer.stats()["reconnects"]
        observer.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = 'layer'"
        )
        await until(lambda: layer.stats()["reconnects"] > reconnects)

    await talk(0)
    with old_snapshot(migrated_dsn):
        for address, name in (
            (channel_address("asgi", channel), channel),
            (channel_address("asgi", "jobs"), "jobs"),
            (group_address("asgi", "room"), None),
        ):
            await many_dead(observer, address, name)
        # Wait until the low-water ids are old enough to be used.
        number = 0
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            number += 1
            await talk(number)
            await renewed(observer)
        await end_connections()
        await talk(number + 1)
        await renewed(observer)
        await end_connections()
        before = await read_by(observer)
        for _ in range(20):
            await renewed(observer)
        await end_connections()
        quiet = await read_by(observer) - before
        # The first count of a sender, and the first claim after a lost connection, begin with the
        # first row.
        assert quiet < 5 * MANY
        for more in range(20):
            await talk(number + 2 + more)
        await renewed(observer)
        await sender.close()
        await end_connections()
        busy = await read_by(observer) - before - quiet
        assert busy < 10 * MANY


async def renewed(observer: Observer) -> None:
    """Return when the lease has been renewed."""
    query = "SELECT expires_at FROM pg_layer_client WHERE lease = 60"
    before = observer.execute(query).fetchone()
    await until(lambda: observer.execute(query).fetchone() != before)


async def read_by(observer: Observer) -> int:
    """Return the index entries of messages that ended connections have read."""
    observer.execute("SELECT pg_stat_clear_snapshot()")
    [[read]] = observer.execute(
        "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes"
        " WHERE relname = 'pg_layer_message'"
    ).fetchall()
    return int(read)


# ---------------------------------------------------------------------- addresses

LETTERS = "abcXYZ019-_."
PREFIXES = st.text(LETTERS, min_size=1, max_size=50)
NORMAL = st.text(LETTERS, min_size=1, max_size=99)
SPECIFIC = st.builds(
    "{}!{}".format, st.text(LETTERS, min_size=1, max_size=49), st.text(LETTERS, max_size=49)
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prefix=PREFIXES,
    names=st.lists(NORMAL | SPECIFIC, min_size=1, max_size=20),
    groups=st.lists(NORMAL),
)
def test_addresses_and_notification_channels_in_python_equal_those_in_sql(
    observer: Observer, prefix: str, names: list[str], groups: list[str]
) -> None:
    addresses = observer.execute(
        "SELECT pg_layer_address(%(prefix)s, n) FROM unnest(%(names)s::text[]) AS n"
        " UNION ALL SELECT pg_layer_group_address(%(prefix)s, g)"
        " FROM unnest(%(groups)s::text[]) AS g",
        {"prefix": prefix, "names": names, "groups": groups},
    ).fetchall()
    expected = [channel_address(prefix, name) for name in names]
    expected += [group_address(prefix, group) for group in groups]
    assert [address for (address,) in addresses] == expected
    found = observer.execute(
        "SELECT pg_layer_notification_channel(a) FROM unnest(%s::text[]) AS a", (expected,)
    ).fetchall()
    assert [channel for (channel,) in found] == list(map(notification_channel, expected))


def test_notification_channel_name_fits_into_63_bytes(observer: Observer) -> None:
    addresses = [f"asgi!{'x' * n}" for n in range(150)]
    rows = observer.execute(
        "SELECT pg_layer_notification_channel(a) FROM unnest(%s::text[]) AS a", (addresses,)
    ).fetchall()
    assert [channel for (channel,) in rows] == [
        f"pg_layer_{hashlib.sha256(address.encode()).hexdigest()[:40]}" for address in addresses
    ]
    assert max(len(channel) for (channel,) in rows) < 63


def test_groups_of_a_prefix_share_1024_notification_channels(observer: Observer) -> None:
    [[buckets]] = observer.execute(
        "SELECT count(DISTINCT pg_layer_notification_channel(pg_layer_group_address('asgi',"
        " 'group-' || n)))"
        " FROM generate_series(1, 20000) AS n"
    ).fetchall()
    assert buckets == 1024


def test_group_send_batch_many_empty_groups_is_not_quadratic(observer: Observer) -> None:
    """With steady leases the groups are skipped. Comparing each with each would take minutes."""
    observer.execute("SELECT pg_layer_current_boot()")
    observer.execute(
        """
        INSERT INTO pg_layer_lease_clock (prefix, boot, lease, renewed_at, steady_since)
        SELECT 'asgi', boot, 3600, clock_timestamp(), clock_timestamp() - interval '1 day'
            FROM pg_layer_boot
        """
    )
    observer.execute(f"SET statement_timeout = '{TIMEOUT}s'")
    [(ids,)] = observer.execute(
        """
        SELECT sent.ids
        FROM (
            SELECT array_agg('room-' || n), array_agg('x'::bytea),
                array_agg(60::float8), array_agg(NULL::text)
            FROM generate_series(1, 200000) AS n
        ) AS s (groups, payloads, expiries, excluded),
            pg_layer_group_send_batch('asgi', groups, payloads, expiries, excluded, true,
                false) AS sent
        """
    ).fetchall()
    assert ids is None
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)


def test_functions_with_enable_seqscan_off_have_jit_off(observer: Observer) -> None:
    """A scan without an index counts as so expensive that PostgreSQL compiles it at each call."""
    [(names,)] = observer.execute(
        """
        SELECT coalesce(array_agg(proname ORDER BY proname), '{}') FROM pg_proc
        WHERE proname LIKE 'pg\\_layer\\_%'
            AND array_to_string(proconfig, ' ') LIKE '%enable\\_seqscan=off%'
            AND array_to_string(proconfig, ' ') NOT LIKE '%jit=off%'
        """
    ).fetchall()
    assert names == []
