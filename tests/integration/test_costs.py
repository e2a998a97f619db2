"""The cost of statements: the rows that a statement reads or deletes, and how many statements run.

Costs are counted, not timed. The server counts the index entries and rows that a connection has
read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from pg_layer._messages.addresses import channel_address
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.integration.test_connections import Log, connections, logging_server
from tests.logs import records
from tests.processes import listen, receive, until
from tests.project.commands import manage, succeeded

__all__ = ["logging_server"]

MANY = 20_000  # rows that a statement must not read
FEW = 1000  # entries that it may read
PART = 5000  # rows that a statement deletes at most
STATISTICS = ("never", "before", "after")
LAYER_TABLES = (
    "pg_layer_message",
    "pg_layer_membership",
    "pg_layer_client",
    "pg_layer_lease_clock",
)


async def read_so_far(observer: Observer, table: str) -> int:
    """Return the index entries and rows that ended connections have read in a table."""
    # A connection reports its statistics when it ends.
    await until(
        lambda: (
            observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'measured'"
            ).fetchone()
            == (0,)
        )
    )
    observer.execute("SELECT pg_stat_clear_snapshot()")
    [(read,)] = observer.execute(
        """
        SELECT (t.seq_tup_read + (
            SELECT sum(i.idx_tup_read) FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid
        ))::bigint
        FROM pg_stat_user_tables AS t WHERE t.relname = %s
        """,
        (table,),
    ).fetchall()
    return int(read)


async def cost(dsn: str, query: str, *tables: str, runs: int = 1) -> int:
    """Return the index entries and rows that the last of several runs of a statement reads.

    The statement runs on a new connection, which reads its own counters. Those of the whole server
    also contain reads of other sessions, which an idle session may report a second late.
    """
    read = 0
    async with await psycopg.AsyncConnection.connect(
        dsn, application_name="measured"
    ) as connection:
        for _ in range(runs):
            before = await read_in_transaction(connection, tables or LAYER_TABLES)
            await connection.execute(query.encode())
            read = await read_in_transaction(connection, tables or LAYER_TABLES) - before
    return read


async def read_in_transaction(connection: psycopg.AsyncConnection, tables: Sequence[str]) -> int:
    """Return the index entries and rows of tables that the open transaction has read."""
    result = await connection.execute(
        """
        SELECT sum(pg_stat_get_xact_tuples_returned(t.relid) + (
            SELECT sum(pg_stat_get_xact_tuples_returned(i.indexrelid))
            FROM pg_index AS i WHERE i.indrelid = t.relid
        ))::bigint
        FROM unnest(%s::text[]::regclass[]) AS t (relid)
        """,
        (list(tables),),
    )
    [(read,)] = await result.fetchall()
    return int(read)


async def test_cost_of_a_statement_excludes_reads_of_other_sessions(
    migrated_dsn: str, observer: Observer
) -> None:
    """Another session has read a table. It ends, and reports that, while the statement runs."""
    fill(observer, "asgi!other", "specific.other!1", messages=MANY, memberships=0)
    count = "SELECT count(*) FROM pg_layer_message"
    end = (
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE application_name = 'other'"
    )
    with closing(psycopg.connect(migrated_dsn, application_name="other")) as other:
        other.execute(count.encode())
        assert await cost(migrated_dsn, end) == 0
    assert await cost(migrated_dsn, count) == MANY


@contextmanager
def old_snapshot(dsn: str) -> Iterator[None]:
    """Hold a snapshot: deleted rows cannot be removed, nor their index entries marked dead."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT FROM pg_layer_client")
        yield


def leave_dead_rows(
    observer: Observer,
    address: str,
    *,
    count: int = MANY,
    end: str = "1 hour",
    marked: bool = False,
) -> None:
    """Write messages at an address, and delete them."""
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, marked, channel, expires_at)"
        " SELECT %s, pg_current_xact_id(), 1, %s, 'dead', clock_timestamp() + %s::interval"
        " FROM generate_series(1, %s)",
        (address, marked, end, count),
    )
    observer.execute("DELETE FROM pg_layer_message WHERE channel = 'dead'")


@asynccontextmanager
async def working(layer: PostgresChannelLayer, channel: str) -> AsyncIterator[None]:
    """Receive all jobs of a channel."""

    async def work() -> None:
        while True:
            await layer.receive(channel)

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# ---------------------------------------------------------------------- writing memberships again


@pytest.mark.parametrize("statistics", STATISTICS)
async def test_memberships_written_again_any_statistics_cost_is_linear(
    make_layer: MakeLayer,
    migrated_dsn: str,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
    statistics: str,
) -> None:
    """A crash has emptied the table of memberships, and its statistics are old.

    The process writes its rows again, in parts. Meanwhile it receives messages, opens no further
    connection, and does not report the database as unavailable.
    """
    caplog.set_level(logging.WARNING, "pg_layer")
    groups, members = 100, 200
    observer.execute(
        "INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)"
        " SELECT 'group-' || n % 100, 'asgi!other-' || n % 50,"
        " 'specific.other-' || n % 50 || '!' || n,"
        " 'infinity' FROM generate_series(1, 20000) AS n"
    )
    if statistics == "before":  # of many clients, without this one
        observer.execute("ANALYZE")
    layer = make_layer(
        dsn=make_conninfo(migrated_dsn, application_name="measured"), lease=60, heartbeat=0.5
    )
    sender = make_layer()
    channels = [await layer.new_channel() for _ in range(members)]
    for start in range(0, members, 20):
        await asyncio.gather(
            *(
                layer.group_add(f"group-{group}", channel)
                for channel in channels[start : start + 20]
                for group in range(groups)
            )
        )
    if statistics == "after":
        observer.execute("ANALYZE")
    address = channel_address("asgi", channels[0])
    last = (f"group-{groups - 1}", channels[-1])
    is_written = (
        "SELECT FROM pg_layer_membership WHERE group_name = %s AND channel = %s AND address = %s"
    )
    assert observer.execute(is_written, (*last, address)).fetchone() is not None
    observer.execute("DELETE FROM pg_layer_membership WHERE address = %s", [address])
    observer.execute("DELETE FROM pg_layer_boot")
    peak = 0
    begun_at = time.monotonic()
    while observer.execute(is_written, (*last, address)).fetchone() is None:
        assert time.monotonic() - begun_at < 30
        await sender.send(channels[0], {"n": 1})
        assert await receive(layer, channels[0]) == {"n": 1}
        peak = max(peak, connections(observer, "measured"))
    assert 2 <= peak <= 3
    assert not records(caplog, log_events.DATABASE_LOST)
    mine = "SELECT count(*) FROM pg_layer_membership WHERE address = %s"
    assert observer.execute(mine, [address]).fetchone() == (groups * members,)
    await layer.close()
    # Each row is added, written again, read to find old rows, and deleted: a few entries each.
    assert await read_so_far(observer, "pg_layer_membership") < 20 * groups * members


def test_groups_counted_read_each_client_once(migrated_dsn: str, observer: Observer) -> None:
    """Few clients have many memberships. Their leases expired while no client renewed."""
    observer.execute(
        "INSERT INTO pg_layer_lease_clock"
        " VALUES ('asgi', 1, 60, clock_timestamp(), clock_timestamp());"
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        " SELECT 'asgi!' || n, clock_timestamp(), 60 FROM generate_series(0, 2) AS n;"
        "INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)"
        " SELECT 'room', 'asgi!' || n % 3, 'specific.' || n % 3 || '!' || n, 'infinity'"
        f" FROM generate_series(1, {MANY}) AS n"
    )
    looks = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = %s"

    def scans(query: str) -> int:
        found = []
        for step in (b"SELECT 1", query.encode()):
            with psycopg.connect(migrated_dsn, autocommit=True) as connection:
                connection.execute(step)
            observer.execute("SELECT pg_stat_clear_snapshot()")
            rows = [
                observer.execute(looks, [f"pg_layer_{table}"]).fetchone()
                for table in ("client", "lease_clock")
            ]
            found.append(sum(row[0] for row in rows if row is not None))
        return int(found[1] - found[0])

    members = observer.execute("SELECT members, addresses FROM pg_layer_group").fetchall()
    assert members == [(MANY, 3)]
    assert scans("SELECT members FROM pg_layer_group") <= 10
    assert scans("SELECT count(*) FROM pg_layer_group_channels('asgi', 'room')") <= 10


# ---------------------------------------------------------------------- sweeping


@pytest.mark.parametrize("statistics", STATISTICS)
async def test_sweep_reads_no_clients_that_ended_within_a_day(
    migrated_dsn: str, observer: Observer, statistics: str
) -> None:
    """10,000 clients ended today. Other clients have many memberships and messages."""
    if statistics == "before":
        observer.execute("ANALYZE")
    observer.execute(
        """
        INSERT INTO pg_layer_lease_clock
        VALUES ('asgi', 1, 60, clock_timestamp(), clock_timestamp() - interval '1 day');
        SELECT pg_layer_current_boot();
        UPDATE pg_layer_lease_clock SET boot = (SELECT boot FROM pg_layer_boot);
        SELECT pg_layer_close('asgi', 'asgi!closed-' || n) FROM generate_series(1, 5000) AS n;
        INSERT INTO pg_layer_client (address, expires_at, lease, swept_at)
        SELECT 'asgi!swept-' || n, clock_timestamp(), 60, clock_timestamp()
        FROM generate_series(1, 5000) AS n;
        INSERT INTO pg_layer_client (address, expires_at, lease)
        SELECT 'asgi!live-' || n, clock_timestamp() + interval '1 hour', 60
            FROM generate_series(1, 20) AS n;
        INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)
        SELECT 'group-' || n % 1000, 'asgi!live-' || n % 20 + 1,
            'specific.live-' || n % 20 + 1 || '!' || n,
            'infinity'
        FROM generate_series(1, 20000) AS n;
        INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)
        SELECT 'asgi!live-' || n % 20 + 1, pg_current_xact_id(), 1,
            'specific.live-' || n % 20 + 1 || '!1',
            clock_timestamp() + interval '1 hour'
        FROM generate_series(1, 20000) AS n;
        """
    )
    if statistics == "after":
        observer.execute("ANALYZE")
    sweep = "SELECT * FROM pg_layer_sweep('asgi', 1000, false, 0)"
    await cost(migrated_dsn, sweep)  # marks the index entries of rows that were replaced
    assert await cost(migrated_dsn, sweep) < FEW
    observer.execute(
        """
        INSERT INTO pg_layer_client (address, expires_at, lease)
            VALUES ('asgi!over', '2020-01-01', 60);
        INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)
        SELECT 'group-' || n, 'asgi!over', 'specific.over!' || n, 'infinity'
        FROM generate_series(1, 100) AS n;
        INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)
        SELECT 'asgi!over', pg_current_xact_id(), 1, 'specific.over!1', clock_timestamp()
        FROM generate_series(1, 100) AS n;
        INSERT INTO pg_layer_client (address, expires_at, lease, ended_at, swept_at)
        SELECT 'asgi!old-' || n, '2020-01-01', 60, '2020-01-01', '2020-01-01'
        FROM generate_series(1, 100) AS n
        """
    )
    left = "SELECT * FROM pg_layer_sweepable('asgi')"
    assert observer.execute(left).fetchone() == (100, 100, 100)
    assert await cost(migrated_dsn, sweep) < 2 * FEW
    assert observer.execute(left).fetchone() == (0, 0, 0)


async def test_sweep_any_statistics_reads_no_swept_clients(
    migrated_dsn: str, observer: Observer
) -> None:
    """The statistics have a few live clients. Since then many more have begun and ended.

    After five runs a session keeps a plan that holds for all arguments.
    """
    observer.execute(
        """
        ALTER TABLE pg_layer_client SET (autovacuum_enabled = off);
        INSERT INTO pg_layer_client (address, expires_at, lease)
        SELECT 'asgi!live-' || n, clock_timestamp() + interval '1 hour', 60
            FROM generate_series(1, 20) AS n;
        ANALYZE pg_layer_client
        """
    )
    observer.execute(
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        f" SELECT 'asgi!gone-' || n, clock_timestamp(), 60 FROM generate_series(1, {MANY}) AS n"
    )
    observer.execute(
        "UPDATE pg_layer_client SET ended_at = clock_timestamp(), swept_at = clock_timestamp()"
        " WHERE address LIKE 'asgi!gone-%'"
    )
    sweep = "SELECT * FROM pg_layer_sweep('asgi', 1000, false, 0)"
    await cost(migrated_dsn, sweep)  # marks the index entries of rows that were replaced
    assert await cost(migrated_dsn, sweep, runs=10) < FEW


@pytest.mark.parametrize(
    "look",
    [
        "SELECT * FROM pg_layer_sweep('asgi', 1000, false, 0)",
        "SELECT * FROM pg_layer_sweepable('asgi')",
    ],
    ids=["sweep", "sweepable"],
)
async def test_sweep_any_statistics_reads_each_request_a_few_times(
    migrated_dsn: str, observer: Observer, look: str
) -> None:
    """The statistics have one group for each normal channel. One channel is then in many groups."""
    count = 2000
    claim = (
        "INSERT INTO pg_layer_membership (group_name, address, channel, id, expires_at)"
        " SELECT 'group-' || n, 'asgi!:' || c, c, n, clock_timestamp() + interval '1 hour'"
        f" FROM generate_series(1, {count}) AS n,"
        " LATERAL (SELECT 'worker-' || n %% %s) AS channel (c)"
    )
    observer.execute("ALTER TABLE pg_layer_membership SET (autovacuum_enabled = off)")
    observer.execute(claim.encode(), (count,))
    observer.execute("ANALYZE pg_layer_membership")
    observer.execute("DELETE FROM pg_layer_membership")
    observer.execute("VACUUM pg_layer_membership")
    observer.execute(claim.encode(), (1,))
    assert await cost(migrated_dsn, look) < 5 * count


# ---------------------------------------------------------------------- dead rows


@pytest.mark.parametrize(
    "send",
    [
        "SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')",
        "SELECT pg_layer_group_send('workers', '{\"type\": \"test\"}')",
    ],
)
async def test_sql_send_to_normal_channel_reads_no_dead_rows(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, send: str
) -> None:
    """The session knows no low-water id. Workers have taken many jobs under an old snapshot."""
    layer = make_layer(lease=60, heartbeat=0.1)
    await layer.group_add("workers", "jobs")
    await listen(layer)
    async with working(layer, "jobs"):
        with old_snapshot(migrated_dsn):
            leave_dead_rows(observer, channel_address("asgi", "jobs"))
            # Within a few heartbeats the worker raises the low-water id.
            await renewed(observer, 5)
            costs = [await cost(migrated_dsn, send, "pg_layer_message") for _ in range(10)]
    assert sorted(costs)[5] < FEW


async def test_sql_send_to_consumer_reads_no_dead_rows(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    """The process of the channel keeps the low-water id for senders."""
    layer = make_layer(lease=60, heartbeat=0.1)
    channel = await layer.new_channel()
    await listen(layer)
    send = f"SELECT pg_layer_send('{channel}', '{{\"type\": \"test\"}}')"
    async with working(layer, channel):
        with old_snapshot(migrated_dsn):
            leave_dead_rows(observer, channel_address("asgi", channel))
            await renewed(observer, 5)
            costs = [await cost(migrated_dsn, send, "pg_layer_message") for _ in range(10)]
    assert sorted(costs)[5] < FEW


async def test_send_to_full_channel_any_low_id_is_refused(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """The low-water id never exceeds the id of a waiting or released job."""
    layer = make_layer(lease=60, heartbeat=0.05)
    send = "SELECT pg_layer_send('jobs', '{\"type\": \"test\"}', capacity => 20)"
    await listen(layer)
    # The worker reads the channel from time to time, and so keeps its low-water id.
    async with working(layer, "jobs"):
        for _ in range(5):
            observer.execute(send)
        await until(
            lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
        )
    for _ in range(20):
        assert observer.execute(send).fetchone() == (True,)
    assert observer.execute(send).fetchone() == (False,)
    # Many ids are drawn for other addresses. Heartbeats may raise the low-water id.
    for _ in range(5):
        leave_dead_rows(observer, "asgi!elsewhere", count=2000)
        await renewed(observer, 2)
        assert observer.execute(send).fetchone() == (False,)
    # A reader finds all of them without an announcement, in order.
    for _ in range(20):
        assert await receive(layer, "jobs") == {"type": "test"}


async def test_released_job_without_announcement_is_claimed(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """A worker keeps a claimed job while another one raises the channel's low-water id."""
    observer.execute(
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        " VALUES ('asgi!slow', 'infinity', 1)"
    )
    observer.execute("SELECT pg_layer_send('jobs', '{\"type\": \"test\"}')")
    claimed = observer.execute(
        "SELECT boot, xid, id FROM pg_layer_claim('asgi', 'jobs', 'asgi!slow', 0, 0, 1)"
    ).fetchone()
    assert claimed is not None
    layer = make_layer(lease=60, heartbeat=0.1)
    await listen(layer)
    async with working(layer, "jobs"):
        leave_dead_rows(observer, "asgi!elsewhere", count=3000)
        kept = "SELECT FROM pg_layer_low_id WHERE address = 'asgi!:jobs' AND low_id > %s"
        await until(lambda: observer.execute(kept, [claimed[2]]).fetchone() is not None)
    await layer.close()
    observer.execute(
        "SELECT pg_layer_release('asgi', 'asgi!slow', 0, ARRAY[%s], ARRAY[%s], ARRAY[%s])", claimed
    )
    assert await receive(make_layer(), "jobs") == {"type": "test"}


async def renewed(observer: Observer, times: int = 1) -> None:
    """Return when the lease has been renewed several times."""
    query = "SELECT max(expires_at) FROM pg_layer_client WHERE lease = 60"
    for _ in range(times):
        before = observer.execute(query).fetchone()
        await until(
            lambda before=before: observer.execute(query).fetchone() != before  # type: ignore[misc]
        )


@pytest.mark.parametrize(
    "is_analyzed", [False, True], ids=["no statistics", "statistics of empty tables"]
)
async def test_heartbeats_and_sweeps_read_no_rows_that_others_deleted(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, is_analyzed: bool
) -> None:
    """Under an old snapshot others deleted expired messages, and marked messages were received.

    An idle process renews its lease and sweeps. Each time it reads few index entries.
    """
    layer = make_layer(
        dsn=make_conninfo(migrated_dsn, application_name="measured"),
        lease=60,
        heartbeat=0.1,
        sweep_interval=0.1,
    )
    await listen(layer)
    await renewed(observer, 3)
    with old_snapshot(migrated_dsn):
        before = await read_so_far_by_living(observer, layer)
        leave_dead_rows(observer, "asgi!@room", end="-10 minutes")
        leave_dead_rows(observer, "asgi!@room", marked=True)
        if is_analyzed:
            observer.execute("ANALYZE")
        await renewed(observer, 3)
        middle = await read_so_far_by_living(observer, layer)
        await renewed(observer, 20)
        after = await read_so_far_by_living(observer, layer)
        # The first sweep finds that nothing is left. Later ones do not read that part again.
        assert middle - before < 20 * MANY
        assert after - middle < MANY


async def read_so_far_by_living(observer: Observer, layer: PostgresChannelLayer) -> int:
    """End the connections of a layer. Return the rows that they have read."""
    reconnects = layer.stats()["reconnects"]
    observer.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE application_name = 'measured'"
    )
    observer.execute("SELECT pg_stat_clear_snapshot()")
    [(read,)] = observer.execute(
        "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes"
        " WHERE relname = 'pg_layer_message'"
    ).fetchall()
    await until(lambda: layer.stats()["reconnects"] > reconnects)
    return int(read)


# ---------------------------------------------------------------------- deletions in parts


class Deletions:
    """A record of the number of rows that each statement deletes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        observer.execute(
            "CREATE TABLE deletion (tablename text, deleted bigint);"
            "CREATE FUNCTION note_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO deletion SELECT TG_TABLE_NAME, count(*) FROM gone; RETURN NULL; END $$"
        )
        for table in ("pg_layer_message", "pg_layer_membership"):
            observer.execute(
                f"CREATE TRIGGER note_deletion AFTER DELETE ON {table}"
                " REFERENCING OLD TABLE AS gone"
                " FOR EACH STATEMENT EXECUTE FUNCTION note_deletion()".encode()
            )

    def most(self) -> int:
        """Return the largest number of rows that one statement has deleted."""
        [(most,)] = self._observer.execute(
            "SELECT coalesce(max(deleted), 0) FROM deletion"
        ).fetchall()
        return int(most)

    def all(self, table: str) -> int:
        """Return the number of rows of a table that all statements have deleted."""
        [(count,)] = self._observer.execute(
            "SELECT coalesce(sum(deleted), 0)::bigint FROM deletion WHERE tablename = %s", [table]
        ).fetchall()
        return int(count)


def fill(
    observer: Observer, address: str, channel: str, *, messages: int, memberships: int
) -> None:
    """Write messages and memberships of a client."""
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
        " SELECT %s, pg_current_xact_id(), 1, %s, '\\x80', clock_timestamp() + interval '1 hour'"
        " FROM generate_series(1, %s)",
        (address, channel, messages),
    )
    observer.execute(
        "INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)"
        " SELECT 'group-' || n, %s, %s, 'infinity' FROM generate_series(1, %s) AS n",
        (address, channel, memberships),
    )


def is_empty(observer: Observer, *tables: str) -> bool:
    """Return whether only control messages are left."""
    queries = {
        "pg_layer_message": "SELECT count(*) FROM pg_layer_message WHERE kind = 'message'",
        "pg_layer_membership": "SELECT count(*) FROM pg_layer_membership",
    }
    return all(
        observer.execute(queries[table].encode()).fetchone() == (0,) for table in tables or queries
    )


async def flush(layer: PostgresChannelLayer, observer: Observer, channel: str) -> None:
    await layer.flush()
    assert is_empty(observer)


async def close(layer: PostgresChannelLayer, observer: Observer, channel: str) -> None:
    await layer.close()
    await until(lambda: is_empty(observer))


@pytest.mark.parametrize("end", [flush, close])
async def test_flush_and_close_delete_in_parts(
    make_layer: MakeLayer,
    observer: Observer,
    end: Callable[[PostgresChannelLayer, Observer, str], Awaitable[None]],
) -> None:
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    fill(observer, channel_address("asgi", channel), channel, messages=12_000, memberships=11_000)
    deletions = Deletions(observer)
    await end(layer, observer, channel)
    assert deletions.most() <= PART
    assert deletions.all("pg_layer_message") >= 12_000
    assert deletions.all("pg_layer_membership") >= 11_000


async def test_flush_in_parts_earlier_messages_do_not_arrive(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """Another process has messages and memberships. The flush ends them, but nothing later."""
    layer, other = make_layer(), make_layer()
    channel = await other.new_channel()
    await other.group_add("room", channel)
    await listen(other)
    for n in range(20):
        await layer.send(channel, {"before": n})
        await layer.group_send("room", {"before": n})
    fill(observer, "asgi!elsewhere", "specific.elsewhere!1", messages=12_000, memberships=11_000)
    await layer.flush()
    # The control message has its place in the order: only messages that are sent later arrive.
    await layer.send(channel, {"after": 1})
    await until(lambda: other.stats()["queued_messages"] <= 1)
    assert await receive(other, channel) == {"after": 1}
    await layer.group_send("room", {"after": 2})
    await layer.send(channel, {"after": 3})
    assert await receive(other, channel) == {"after": 3}


async def test_close_that_runs_out_of_time_leaves_rest_to_the_sweeper(
    migrated_dsn: str, observer: Observer
) -> None:
    """A client with many memberships closes, and its process ends after the first part."""
    fill(observer, "asgi!closing", "specific.closing!1", messages=10, memberships=2500)
    closed = observer.execute("SELECT pg_layer_close('asgi', 'asgi!closing', 1000)").fetchone()
    assert closed == (False,)
    [(left,)] = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchall()
    assert left == 1500
    # They no longer count, and the next sweep removes them.
    assert observer.execute("SELECT * FROM pg_layer_group").fetchall() == []
    assert succeeded(
        manage(migrated_dsn, "pg_layer_sweep", "--once", "--batch-size", "1000")
    ).startswith("Removed 0 messages, 1500 memberships")


async def test_expired_messages_are_deleted_in_parts(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(lease=60, heartbeat=0.1)
    await listen(layer)
    deletions = Deletions(observer)
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, expires_at)"
        " SELECT 'asgi!@room', pg_current_xact_id(), 1, clock_timestamp()"
        f" FROM generate_series(1, {MANY})"
    )
    await until(lambda: is_empty(observer, "pg_layer_message"))
    assert deletions.all("pg_layer_message") >= MANY
    assert deletions.most() <= 1000


async def test_received_messages_are_deleted_in_parts(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """The database refuses deletions while many messages are received, and later accepts them."""
    count = 5000
    layer, sender = make_layer(capacity=2 * count), make_layer(capacity=2 * count)
    channel = await layer.new_channel()
    await listen(layer)
    await until(lambda: is_empty(observer, "pg_layer_message"))
    deletions = Deletions(observer)
    for start in range(0, count, 500):
        assert all(await sender.send_many([(channel, {"n": n}) for n in range(start, start + 500)]))
    await until(lambda: layer.stats()["queued_messages"] == count)
    for n in range(count):
        assert await receive(layer, channel) == {"n": n}
    await until(lambda: is_empty(observer, "pg_layer_message"))
    assert deletions.all("pg_layer_message") == count
    assert deletions.most() <= 1000


async def test_rows_restored_by_a_crash_are_deleted_in_parts(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """A crash undid deletions. The receiver repeats them, and keeps undelivered messages."""
    layer = make_layer(lease=60, heartbeat=0.1)
    channel = await layer.new_channel()
    await listen(layer)
    await layer.send(channel, {"n": "held"})
    await until(lambda: layer.stats()["queued_messages"] == 1)
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (1,)
    )
    deletions = Deletions(observer)
    fill(observer, channel_address("asgi", channel), channel, messages=MANY, memberships=0)
    observer.execute("DELETE FROM pg_layer_boot")
    # The process observes the new boot when it catches up.
    observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'pg_layer %' AND query LIKE '%pg_layer_listen%'"
    )
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (1,)
    )
    assert deletions.most() <= 1000
    assert await receive(layer, channel) == {"n": "held"}


# ---------------------------------------------------------------------- statements


async def test_idle_process_runs_one_statement_per_heartbeat_and_normal_channel(
    logging_server: PostgresServer, make_layer: MakeLayer
) -> None:
    """Consumers are in groups, and a worker waits. Nothing is sent."""
    heartbeat, beats = 0.4, 5
    log = Log(logging_server)

    def statements(name: str) -> list[str]:
        return [statement for statement in log.statements("idle") if name in statement]

    layer = make_layer(
        dsn=logging_server.dsn("logged", application_name="idle"), lease=3, heartbeat=heartbeat
    )
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in channels:
        await layer.group_add("room", channel)
    await listen(layer)
    async with working(layer, "jobs"):
        await until(lambda: "pg_layer_claim" in "".join(log.statements("idle")))
        await until(
            lambda: (
                logging_server.execute("SELECT count(*) FROM pg_layer_message", dbname="logged")
                == [(0,)]
            )
        )
        log.forget()
        begun_at = time.monotonic()
        await until(lambda: len(statements("pg_layer_renew")) >= beats)
        # The first claim may come at once. Between two claims there is a heartbeat.
        assert time.monotonic() - begun_at > 0.9 * heartbeat * (beats - 1)
        idle = log.statements("idle")
        claims = [statement for statement in idle if "pg_layer_claim" in statement]
        renewals = [statement for statement in idle if "pg_layer_renew" in statement]
        assert len(renewals) + len(claims) == len(idle)
        assert len(claims) <= len(renewals) + 1
