"""Transactions that have changed memberships and stay open: no other process waits for them.

The owner of the channels may reconnect meanwhile, or write rows again that the table has
lost. A channel that was discarded does not return by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pg_layer import PostgresChannelLayer
from pg_layer._db.queries import groups
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, terminate_backends, until

REQUEST = "SELECT pg_layer_request_memberships('asgi', %s, %s, %s, 86400, %s, 10, false, false)"

Transaction = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def open_transaction(migrated_dsn: str) -> Iterator[Transaction]:
    """Yield a connection whose transaction stays open until the test commits it."""
    with psycopg.connect(migrated_dsn) as connection:
        yield connection


def add(transaction: Transaction, group: str, channel: str) -> None:
    """Add a channel, as ``layer.sync.group_add`` does in a transaction unknown to Django."""
    transaction.execute(REQUEST, [[group], [channel], [True], [100]])


def discard(transaction: Transaction, group: str, channel: str) -> None:
    """Discard a channel in the same way."""
    transaction.execute(REQUEST, [[group], [channel], [False], [100]])


def membership_rows(observer: Observer) -> list[tuple[Any, ...]]:
    """Return the rows of memberships, and for each whether it is the owner's."""
    return observer.execute(
        "SELECT group_name, channel, id = 0 FROM pg_layer_membership ORDER BY 1, 2, id"
    ).fetchall()


def expires_later_than(observer: Observer, group: str, least: int) -> bool:
    """Return whether all memberships of the group last longer than ``least`` seconds."""
    query = (
        "SELECT bool_and(expires_at > clock_timestamp() + %s * interval '1 second')"
        " FROM pg_layer_membership WHERE group_name = %s"
    )
    return observer.execute(query, [least, group]).fetchone() == (True,)


def waiting_for_locks(observer: Observer) -> int:
    """Return how many statements wait for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )
    row = observer.execute(query).fetchone()
    assert row is not None
    return int(row[0])


async def new_member(layer: PostgresChannelLayer, group: str) -> str:
    """Return a new channel of a listening layer, in the group."""
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    return channel


async def reconnect(layer: PostgresChannelLayer, observer: Observer) -> None:
    """Terminate all connections of layers. Return when this layer listens again."""
    before = layer.stats()["reconnects"]
    terminate_backends(
        observer, "datname = current_database() AND application_name LIKE 'pg_layer %'"
    )
    await until(lambda: layer.stats()["reconnects"] > before)


def lose_rows(observer: Observer) -> None:
    """Remove rows that a crash may have undone. The owner must write them again."""
    observer.execute("DELETE FROM pg_layer_membership")
    observer.execute("DELETE FROM pg_layer_client")


# ---------------------------------------------------------------------- the owner reconnects


async def test_channel_discarded_in_an_open_transaction_leaves_with_the_commit(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    """The owner reconnects meanwhile, receives, and writes lost rows again."""
    layer, sender = make_layer(), make_layer()
    leaver, stayer = await new_member(layer, "room"), await new_member(layer, "room")
    discard(open_transaction, "room", leaver)

    await reconnect(layer, observer)
    await sender.send(stayer, {"number": 1})
    assert (await receive(layer, stayer))["number"] == 1
    lose_rows(observer)
    await reconnect(layer, observer)
    both = sorted([("room", leaver, True), ("room", stayer, True)])
    await until(lambda: membership_rows(observer) == both)

    open_transaction.commit()
    await until(lambda: membership_rows(observer) == [("room", stayer, True)])
    assert layer.stats()["memberships"] == 1
    assert await sender.group_channels("room") == [stayer]


@pytest.mark.parametrize("has_rows", [True, False], ids=["rows are there", "rows were lost"])
async def test_channel_discarded_while_its_owner_rewrites_memberships_stays_out(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction, has_rows: bool
) -> None:
    """The owner's statement still contains the channel, and waits for a lock.

    Then another process discards the channel.
    """
    layer = make_layer()
    leaver, stayer = await new_member(layer, "room"), await new_member(layer, "room")
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
    await layer.health()  # renews the lease: for the database, the client is new
    await until(lambda: waiting_for_locks(observer) == 1)
    discard(observer, "room", leaver)
    await until(lambda: layer.stats()["memberships"] == 1)
    assert waiting_for_locks(observer) == 1
    open_transaction.commit()
    await until(lambda: membership_rows(observer) == [("room", stayer, True)])
    assert await layer.group_channels("room") == [stayer]


async def test_channel_discarded_and_added_in_one_transaction_stays(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await new_member(layer, "room")
    lose_rows(observer)
    await reconnect(layer, observer)
    await until(lambda: membership_rows(observer) == [("room", channel, True)])
    with open_transaction.transaction():
        discard(open_transaction, "room", channel)
        add(open_transaction, "room", channel)
    await other.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1
    await until(lambda: membership_rows(observer) == [("room", channel, True)])


async def test_message_of_a_transaction_open_across_renewals_arrives_after_its_commit(
    make_layer: MakeLayer, open_transaction: Transaction
) -> None:
    """The reader polls several times, before and after the commit."""
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


# ---------------------------------------------------------------------- changes of other callers


async def test_change_of_a_membership_changed_in_an_open_transaction_does_not_wait(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    """The owner applies changes in the order in which it observes them.

    It observes the change of the transaction last.
    """
    layer = make_layer(send_timeout=20)
    locked, other, leaver = [await new_member(layer, "room") for _ in range(3)]
    discard(open_transaction, "room", locked)
    add(open_transaction, "room", leaver)
    await layer.group_add("room", locked)
    await layer.group_discard("room", leaver)
    await layer.group_add("hall", other)
    assert sorted(await layer.group_channels("room")) == sorted([locked, other])
    open_transaction.commit()
    expected = sorted([("room", other, True), ("room", leaver, True), ("hall", other, True)])
    await until(lambda: membership_rows(observer) == expected)
    assert sorted(await layer.group_channels("room")) == sorted([other, leaver])


async def test_change_in_a_transaction_rolled_back_has_no_effect(
    make_layer: MakeLayer, observer: Observer, open_transaction: Transaction
) -> None:
    layer = make_layer()
    channel = await new_member(layer, "room")
    discard(open_transaction, "room", channel)
    await layer.group_add("room", channel)
    open_transaction.rollback()
    await layer.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1
    assert membership_rows(observer) == [("room", channel, True)]


# ---------------------------------------------------------------------- clients without a lease


async def test_client_beginning_while_a_transaction_adds_its_channel_becomes_a_member(
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
    await until(lambda: membership_rows(observer) == [("room", channel, True)])
    assert expires_later_than(observer, "room", 80000)


@pytest.mark.parametrize("group_expiry", [None, 86400])
async def test_client_beginning_later_is_a_member_for_the_requested_group_expiry(
    make_layer: MakeLayer, observer: Observer, group_expiry: int | None
) -> None:
    layer, other = make_layer(), make_layer(lease=60, heartbeat=20, group_expiry=group_expiry)
    channel = await layer.new_channel()
    await other.group_add("room", channel)
    assert await other.group_count("room") == 1
    assert not expires_later_than(observer, "room", 61)
    await listen(layer)
    await until(lambda: membership_rows(observer) == [("room", channel, True)])
    assert expires_later_than(observer, "room", 80000)
    await other.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1


async def test_client_never_beginning_is_counted_only_while_its_request_lasts(
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
