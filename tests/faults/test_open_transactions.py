"""Somebody's transaction has changed memberships and stays open: it holds up only who wants the same.

The owner of the channels may connect anew meanwhile, and puts back what the tables may have lost: nothing
that has left may come back by that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest

from pg_layer import LayerUnavailable, PostgresChannelLayer, roster
from pg_layer.session import Session
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, until

REGROUP = "SELECT pg_layer_regroup('asgi', NULL, 60, 86400, %s, %s, %s, %s, %s)"

Somebody = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def somebody(migrated_dsn: str) -> Iterator[Somebody]:
    """A transaction that is open until it is committed."""
    with psycopg.connect(migrated_dsn) as connection:
        yield connection


def join(somebody: Somebody, group: str, channel: str) -> None:
    somebody.execute(REGROUP, [[group], [channel], [100], [], []])


def leave(somebody: Somebody, group: str, channel: str) -> None:
    somebody.execute(REGROUP, [[], [], [], [group], [channel]])


def members(observer: Observer) -> list[tuple[Any, ...]]:
    return observer.execute("SELECT group_name, channel FROM pg_layer_membership ORDER BY 1, 2").fetchall()


def lasts(observer: Observer, group: str, least: int) -> bool:
    """Whether all members of the group are that for more than so many seconds."""
    query = (
        "SELECT bool_and(expires_at > clock_timestamp() + %s * interval '1 second')"
        " FROM pg_layer_membership WHERE group_name = %s"
    )
    return observer.execute(query, [least, group]).fetchone() == (True,)


async def member(layer: PostgresChannelLayer, group: str) -> str:
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    return channel


async def connect_anew(layer: PostgresChannelLayer, observer: Observer) -> None:
    """All its connections are killed; returns when it listens again."""
    before = layer.stats()["reconnects"]
    observer.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'pg_layer %'"
    )
    await until(lambda: layer.stats()["reconnects"] > before)


def mirrored(layer: PostgresChannelLayer) -> int:
    return layer.stats()["memberships"]


# ---------------------------------------------------------------------- the owner connects anew


async def test_who_leaves_in_an_open_transaction_stays_away_and_the_owner_hears_meanwhile(
    make_layer: MakeLayer, observer: Observer, somebody: Somebody
) -> None:
    layer, sender = make_layer(), make_layer()
    leaver, stayer = await member(layer, "room"), await member(layer, "room")
    leave(somebody, "room", leaver)

    await connect_anew(layer, observer)
    await sender.send(stayer, {"number": 1})
    assert (await receive(layer, stayer))["number"] == 1
    observer.execute("DELETE FROM pg_layer_membership WHERE channel = %s", [stayer])
    await connect_anew(layer, observer)
    await until(lambda: ("room", stayer) in members(observer))  # so that it has put back what there is

    somebody.commit()
    await until(lambda: mirrored(layer) == 1)
    assert members(observer) == [("room", stayer)]
    assert await sender.group_count("room") == 1


Reassert = Callable[[Session, str, Sequence[tuple[str, str, float | None]]], Awaitable[list[tuple[str, str]]]]


@pytest.mark.parametrize("is_known", [True, False], ids=["known before", "known after"])
async def test_who_leaves_when_the_owner_has_looked_at_its_mirror_does_not_come_back(
    make_layer: MakeLayer,
    observer: Observer,
    somebody: Somebody,
    monkeypatch: pytest.MonkeyPatch,
    is_known: bool,
) -> None:
    layer = make_layer()
    leaver, stayer = await member(layer, "room"), await member(layer, "room")
    reassert: Reassert = roster.reassert
    asserted = asyncio.Event()

    async def after_a_leave(session: Session, inbox: str, pairs: Any) -> list[tuple[str, str]]:
        monkeypatch.setattr(roster, "reassert", reassert)
        if not is_known:  # a crash has undone their joining
            observer.execute("DELETE FROM pg_layer_membership")
        leave(somebody, "room", leaver)
        if is_known:
            somebody.commit()
            await until(lambda: mirrored(layer) == 1)
        found = await reassert(session, inbox, pairs)
        assert ("room", leaver) in members(observer)
        asserted.set()
        return found

    monkeypatch.setattr(roster, "reassert", after_a_leave)
    await connect_anew(layer, observer)
    await asserted.wait()
    somebody.commit()
    await until(lambda: mirrored(layer) == 1)
    await until(lambda: members(observer) == [("room", stayer)])


async def test_who_has_joined_anew_since_it_was_put_back_stays(
    make_layer: MakeLayer, observer: Observer, somebody: Somebody
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await member(layer, "room")
    observer.execute("DELETE FROM pg_layer_membership")
    await connect_anew(layer, observer)
    await until(lambda: members(observer) == [("room", channel)])
    # The owner learns of both at once: at the first, it may think that the row is what it had put back.
    with somebody.transaction():
        leave(somebody, "room", channel)
        join(somebody, "room", channel)
    await other.group_send("room", {"number": 1})
    assert (await receive(layer, channel))["number"] == 1
    await store_is_quiet(layer, observer)
    assert members(observer) == [("room", channel)]


async def store_is_quiet(layer: PostgresChannelLayer, observer: Observer) -> None:
    """Nothing that the layer has begun is under way."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'pg_layer %' AND state <> 'idle'"
    )
    await until(lambda: not layer._homes.client.memberships.has_ghosts)
    await until(lambda: observer.execute(query).fetchone() == (0,))


# ---------------------------------------------------------------------- others go on


async def test_others_join_and_leave_while_one_membership_is_held(
    make_layer: MakeLayer, somebody: Somebody
) -> None:
    layer = make_layer(send_timeout=20)
    held, other, leaver = [await member(layer, "room") for _ in range(3)]
    join(somebody, "room", held)
    # Together in one batch, as all wait for the first.
    first = asyncio.create_task(layer.group_add("lobby", other))
    renewal = asyncio.create_task(layer.group_add("room", held))
    await asyncio.gather(layer.group_add("hall", other), layer.group_discard("room", leaver))
    await layer.group_add("garden", held)
    await first
    assert not renewal.done()
    assert sorted(await layer.group_channels("room")) == sorted([held, other])
    somebody.commit()
    await renewal
    assert await layer.group_count("room") == 2


async def test_a_membership_that_is_held_for_too_long_is_said_to_be(
    make_layer: MakeLayer, somebody: Somebody
) -> None:
    layer = make_layer(send_timeout=1)
    channel = await member(layer, "room")
    leave(somebody, "room", channel)
    with pytest.raises(LayerUnavailable, match="Another transaction, still open, has changed"):
        await layer.group_add("room", channel)
    somebody.rollback()
    await layer.group_add("room", channel)


async def test_a_client_begins_while_a_transaction_has_its_channel_join(
    make_layer: MakeLayer, observer: Observer, somebody: Somebody
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    join(somebody, "room", channel)
    await listen(layer)
    await sender.send(channel, {"number": 1})
    await sender.send("jobs", {"number": 2})
    assert (await receive(layer, channel))["number"] == 1
    assert (await receive(layer, "jobs"))["number"] == 2  # only who has a lease is given jobs
    somebody.commit()
    # It was not known then whether it lives. It sees to it that the membership is as long as was asked for.
    await until(lambda: lasts(observer, "room", 80000))
    await sender.group_send("room", {"number": 3})
    assert (await receive(layer, channel))["number"] == 3


@pytest.mark.parametrize("group_expiry", [None, 86400])
async def test_a_client_that_begins_later_is_a_member_for_as_long_as_was_asked(
    make_layer: MakeLayer, observer: Observer, group_expiry: int | None
) -> None:
    layer, other = make_layer(), make_layer(lease=60, heartbeat=20, group_expiry=group_expiry)
    channel = await layer.new_channel()
    await other.group_add("room", channel)
    assert await other.group_count("room") == 1
    assert not lasts(observer, "room", 61)
    await listen(layer)
    await until(lambda: lasts(observer, "room", 80000))


async def test_a_client_that_never_begins_is_a_member_for_the_length_of_a_lease(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(lease=0.2, heartbeat=0.1, group_expiry=None)
    await layer.group_add("room", "specific.nobody!1")
    await until(lambda: observer.execute("SELECT FROM pg_layer_client").fetchall() == [])
    query = "SELECT expires_at <= clock_timestamp() FROM pg_layer_membership"
    await until(lambda: observer.execute(query).fetchone() == (True,))
    assert await layer.group_count("room") == 0
    await layer.group_send("room", {"number": 1})
    assert observer.execute("SELECT kind FROM pg_layer_message").fetchall() == [("join",)]
    assert observer.execute(
        "SELECT max(expires_at) < clock_timestamp() + interval '25 hours' FROM pg_layer_message"
    ).fetchone() == (True,)
