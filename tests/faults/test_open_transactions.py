"""Transactions that have changed memberships and stay open: nobody waits for them.

The owner of the channels may reconnect meanwhile, or write again what the table has lost. What was discarded
does not come back by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pg_layer import PostgresChannelLayer
from pg_layer._db.queries import groups
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, until

REQUEST = "SELECT pg_layer_request_memberships('asgi', %s, %s, %s, 86400, %s, 10, false, false)"

Transaction = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def open_transaction(migrated_dsn: str) -> Iterator[Transaction]:
    """A transaction that is open until it is committed."""
    with psycopg.connect(migrated_dsn) as connection:
        yield connection


def add(transaction: Transaction, group: str, channel: str) -> None:
    """Add a channel, as ``layer.sync.group_add`` does in a transaction that Django does not manage."""
    transaction.execute(REQUEST, [[group], [channel], [True], [100]])


def discard(transaction: Transaction, group: str, channel: str) -> None:
    transaction.execute(REQUEST, [[group], [channel], [False], [100]])


def rows(observer: Observer) -> list[tuple[Any, ...]]:
    return observer.execute(
        "SELECT group_name, channel, id = 0 FROM pg_layer_membership ORDER BY 1, 2, id"
    ).fetchall()


def lasts(observer: Observer, group: str, least: int) -> bool:
    """Whether all members of the group are that for more than so many seconds."""
    query = (
        "SELECT bool_and(expires_at > clock_timestamp() + %s * interval '1 second')"
        " FROM pg_layer_membership WHERE group_name = %s"
    )
    return observer.execute(query, [least, group]).fetchone() == (True,)


def waiting_for_locks(observer: Observer) -> int:
    """How many statements wait for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )
    row = observer.execute(query).fetchone()
    assert row is not None
    return int(row[0])


async def member(layer: PostgresChannelLayer, group: str) -> str:
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    return channel


async def reconnect(layer: PostgresChannelLayer, observer: Observer) -> None:
    """Kill all connections of layers. Return when this one listens again."""
    before = layer.stats()["reconnects"]
    observer.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'pg_layer %'"
    )
    await until(lambda: layer.stats()["reconnects"] > before)


def lose_rows(observer: Observer) -> None:
    """Remove what a crash may have undone: the owner must write it again."""
    observer.execute("DELETE FROM pg_layer_membership")
    observer.execute("DELETE FROM pg_layer_client")


# ---------------------------------------------------------------------- the owner reconnects


async def test_channel_discarded_in_an_open_transaction_leaves_with_the_commit(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    """The owner reconnects meanwhile, receives, and writes again what the table has lost."""
    layer, sender = make_layer(), make_layer()
    leaver, stayer = await member(layer, "room"), await member(layer, "room")
    discard(open_transaction, "room", leaver)

    await reconnect(layer, observer)
    await sender.send(stayer, {"number": 1})
    assert (await receive(layer, stayer))["number"] == 1
    lose_rows(observer)
    await reconnect(layer, observer)
    both = sorted([("room", leaver, True), ("room", stayer, True)])
    await until(lambda: rows(observer) == both)

    open_transaction.commit()
    await until(lambda: rows(observer) == [("room", stayer, True)])
    assert layer.stats()["memberships"] == 1
    assert await sender.group_channels("room") == [stayer]


@pytest.mark.parametrize("has_rows", [True, False], ids=["rows are there", "rows were lost"])
async def test_channel_discarded_while_its_owner_writes_its_memberships_again_does_not_come_back(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction, has_rows: bool
) -> None:
    """The owner's statement still says that the channel is a member, and waits. Then it is discarded."""
    layer = make_layer()
    leaver, stayer = await member(layer, "room"), await member(layer, "room")
    if has_rows:
        observer.execute("DELETE FROM pg_layer_client")
    else:
        lose_rows(observer)
    open_transaction.execute(
        "INSERT INTO pg_layer_membership (group_name, address, channel, expires_at)"
        " VALUES ('room', pg_layer_address('asgi', %s), %s, 'infinity')"
        " ON CONFLICT (group_name, address, channel, id) DO UPDATE SET expires_at = 'infinity'",
        [stayer, stayer],
    )
    await layer.health()  # renews the lease, which is a new one to the database
    await until(lambda: waiting_for_locks(observer) == 1)
    discard(observer, "room", leaver)
    await until(lambda: layer.stats()["memberships"] == 1)
    assert waiting_for_locks(observer) == 1
    open_transaction.commit()
    await until(lambda: rows(observer) == [("room", stayer, True)])
    assert await layer.group_channels("room") == [stayer]


async def test_channel_discarded_and_added_in_one_transaction_stays(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await member(layer, "room")
    lose_rows(observer)
    await reconnect(layer, observer)
    await until(lambda: rows(observer) == [("room", channel, True)])
    with open_transaction.transaction():
        discard(open_transaction, "room", channel)
        add(open_transaction, "room", channel)
    await other.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1
    await until(lambda: rows(observer) == [("room", channel, True)])


async def test_message_of_a_transaction_that_stays_open_across_renewals_is_received_after_its_commit(
    make_layer: MakeLayer, open_transaction: Transaction
) -> None:
    """The reader polls. It looks at what is new again and again, before and after the commit."""
    layer = make_layer(poll_interval=0.05)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    open_transaction.execute(
        'SELECT pg_layer_group_send(\'room\', \'{"type": "test", "number": 1}\')'
    )
    open_transaction.execute(
        'SELECT pg_layer_send(%s, \'{"type": "test", "number": 2}\')', [channel]
    )
    for _ in range(4):
        await layer.health()  # renews the lease
        await layer.send(channel, {"type": "test", "number": 0})
        assert (await receive(layer, channel))["number"] == 0
    open_transaction.commit()
    assert [(await receive(layer, channel))["number"] for _ in range(2)] == [1, 2]


# ---------------------------------------------------------------------- others go on


async def test_change_of_a_membership_that_an_open_transaction_has_changed_does_not_wait(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    """The owner decides in the order in which it learns of changes: that of the transaction comes last."""
    layer = make_layer(send_timeout=20)
    held, other, leaver = [await member(layer, "room") for _ in range(3)]
    discard(open_transaction, "room", held)
    add(open_transaction, "room", leaver)
    await layer.group_add("room", held)
    await layer.group_discard("room", leaver)
    await layer.group_add("hall", other)
    assert sorted(await layer.group_channels("room")) == sorted([held, other])
    open_transaction.commit()
    expected = sorted([("room", other, True), ("room", leaver, True), ("hall", other, True)])
    await until(lambda: rows(observer) == expected)
    assert sorted(await layer.group_channels("room")) == sorted([other, leaver])


async def test_change_of_a_transaction_that_is_rolled_back_changes_nothing(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    layer = make_layer()
    channel = await member(layer, "room")
    discard(open_transaction, "room", channel)
    await layer.group_add("room", channel)
    open_transaction.rollback()
    await layer.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1
    assert rows(observer) == [("room", channel, True)]


# ---------------------------------------------------------------------- clients that have not begun


async def test_client_that_begins_while_a_transaction_adds_its_channel_is_a_member_after_the_commit(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    add(open_transaction, "room", channel)
    await listen(layer)
    await sender.send(channel, {"number": 1})
    await sender.send("jobs", {"number": 2})
    assert (await receive(layer, channel))["number"] == 1
    assert (await receive(layer, "jobs"))["number"] == 2
    open_transaction.commit()
    await sender.group_send("room", {"number": 3})
    assert (await receive(layer, channel))["number"] == 3
    await until(lambda: rows(observer) == [("room", channel, True)])
    assert lasts(observer, "room", 80000)


@pytest.mark.parametrize("group_expiry", [None, 86400])
async def test_client_that_begins_later_is_a_member_for_as_long_as_was_asked(
    make_layer: MakeLayer, observer: Observer, group_expiry: int | None
) -> None:
    layer, other = make_layer(), make_layer(lease=60, heartbeat=20, group_expiry=group_expiry)
    channel = await layer.new_channel()
    await other.group_add("room", channel)
    assert await other.group_count("room") == 1
    assert not lasts(observer, "room", 61)
    await listen(layer)
    await until(lambda: rows(observer) == [("room", channel, True)])
    assert lasts(observer, "room", 80000)
    await other.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1


async def test_client_that_never_begins_is_counted_only_for_a_while(
    make_layer: MakeLayer, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "REQUEST_SECONDS", 0.2)
    layer = make_layer(group_expiry=None)
    await layer.group_add("room", "specific.nobody!1")
    query = "SELECT bool_and(expires_at <= clock_timestamp()) FROM pg_layer_membership"
    await until(lambda: observer.execute(query).fetchone() == (True,))
    assert await layer.group_count("room") == 0
    assert observer.execute("SELECT kind FROM pg_layer_message").fetchall() == [("add",)]
    assert observer.execute(
        "SELECT max(expires_at) < clock_timestamp() + interval '25 hours' FROM pg_layer_message"
    ).fetchone() == (True,)
