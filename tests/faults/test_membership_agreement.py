"""The table of memberships and the owner of a channel agree, whatever changes a membership."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.apps import apps
from django.db import connections, transaction

from pg_layer import LayerUnavailable, PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.faults.readers import numbered, readers_of
from tests.integration.test_django import postgres
from tests.processes import TIMEOUT, UNHURRIED, Link, Processes, listen, open_layer, receive, until
from tests.project.configured import configured

GROUP = "room"
PAIRS = 300
SHORT = 1.0  # seconds, the send_timeout of a call that must give up

Pair = tuple[str, str]


@pytest.fixture
def sync_layer(migrated_dsn: str) -> Iterator[PostgresChannelLayer]:
    """Return a layer on Django's database, for ``layer.sync``."""
    layer = PostgresChannelLayer(**UNHURRIED)
    with configured(layer, DATABASES={"default": postgres(migrated_dsn)}, SECRET_KEY="x"):
        apps.populate([])
        yield layer


class OpenTransaction:
    """A transaction in a thread of its own, which has made its changes and stays open."""

    def __init__(self, changes: Callable[[], None], *, commits: bool) -> None:
        self._changes = changes
        self._commits = commits
        self._has_changed = threading.Event()
        self._may_end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with transaction.atomic():
                self._changes()
                self._has_changed.set()
                assert self._may_end.wait(2 * TIMEOUT)
                transaction.set_rollback(not self._commits)
        except BaseException as error:
            self._error = error
        finally:
            self._has_changed.set()
            connections.close_all()

    async def begin(self) -> None:
        self._thread.start()
        await asyncio.to_thread(self._has_changed.wait)
        assert self._error is None, self._error

    async def end(self) -> None:
        self._may_end.set()
        await asyncio.to_thread(self._thread.join)
        assert self._error is None, self._error

    def abandon(self) -> None:
        """End the transaction, also if the test has failed."""
        self._may_end.set()
        if self._thread.ident is not None:
            self._thread.join()


@contextmanager
def open_transaction(
    changes: Callable[[], None], *, commits: bool = True
) -> Iterator[OpenTransaction]:
    opened = OpenTransaction(changes, commits=commits)
    try:
        yield opened
    finally:
        opened.abandon()


class Agreement:
    """A comparison of the members that groups list with the members that a message reaches."""

    def __init__(self, owner: PostgresChannelLayer, sender: PostgresChannelLayer) -> None:
        self._owner = owner
        self._sender = sender
        self._probes = 0

    async def look(self, pairs: Iterable[Pair]) -> tuple[set[Pair], set[Pair]]:
        """Return the pairs of group and channel that are listed, and those that a message reaches.

        A message to all groups is followed by one to each channel, from the same sender. When a
        channel has received the second, the first has reached it or never will.
        """
        pairs = list(pairs)
        self._probes += 1
        groups = sorted({group for group, _ in pairs})
        listed = {
            (group, channel)
            for group in groups
            for channel in await self._sender.group_channels(group)
        }
        await self._sender.group_send_many(
            (group, {"probe": self._probes, "group": group}) for group in groups
        )
        reached: set[Pair] = set()
        for channel in {channel for _, channel in pairs}:
            await self._sender.send(channel, {"end": self._probes})
            while (message := await receive(self._owner, channel)) != {"end": self._probes}:
                if message.get("probe") == self._probes:
                    assert (message["group"], channel) not in reached
                    reached.add((message["group"], channel))
        return listed & set(pairs), reached

    async def reached_by_all(self, pairs: Iterable[Pair]) -> set[Pair]:
        """Wait until the listed members are the reached members, and return them. It stays so."""
        pairs = list(pairs)
        deadline = asyncio.get_running_loop().time() + TIMEOUT
        while True:
            listed, reached = await self.look(pairs)
            if listed == reached and await self.look(pairs) == (listed, reached):
                return listed
            assert asyncio.get_running_loop().time() < deadline, (
                f"of {len(pairs)} memberships {len(listed - reached)} are listed and receive"
                f" nothing, {len(reached - listed)} receive and are not listed"
            )
            await asyncio.sleep(0.1)


async def new_channels(layer: PostgresChannelLayer, count: int) -> list[str]:
    await listen(layer)
    return [await layer.new_channel() for _ in range(count)]


# ---------------------------------------------------------------------- open transactions


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("was_member", [False, True])
async def test_membership_added_in_transaction_discarded_by_owner_agrees_with_table(
    make_layer: MakeLayer, sync_layer: PostgresChannelLayer, commits: bool, was_member: bool
) -> None:
    """A transaction adds the channel and stays open. The owner discards it. The transaction ends.

    A moment later the channel is listed if and only if it receives. After a rollback, the owner's
    change holds.
    """
    owner = make_layer()
    [channel] = await new_channels(owner, 1)
    if was_member:
        await owner.group_add(GROUP, channel)
    with open_transaction(
        lambda: sync_layer.sync.group_add(GROUP, channel), commits=commits
    ) as opened:
        await opened.begin()
        await owner.group_discard(GROUP, channel)
        await opened.end()
    members = await Agreement(owner, make_layer()).reached_by_all([(GROUP, channel)])
    assert commits or not members


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("was_member", [False, True])
async def test_membership_discarded_in_transaction_added_by_owner_agrees_with_table(
    make_layer: MakeLayer, sync_layer: PostgresChannelLayer, commits: bool, was_member: bool
) -> None:
    """A transaction discards the channel and stays open. The owner adds it. Then it ends."""
    owner = make_layer()
    [channel] = await new_channels(owner, 1)
    if was_member:
        await owner.group_add(GROUP, channel)
    with open_transaction(
        lambda: sync_layer.sync.group_discard(GROUP, channel), commits=commits
    ) as opened:
        await opened.begin()
        await owner.group_add(GROUP, channel)
        await opened.end()
    members = await Agreement(owner, make_layer()).reached_by_all([(GROUP, channel)])
    assert commits or members


async def test_open_transaction_with_many_memberships_fails_no_other_change(
    make_layer: MakeLayer, sync_layer: PostgresChannelLayer
) -> None:
    """An open transaction has changed 60 memberships; all changes of the owner succeed meanwhile.

    The owner changes the same 60 memberships and 400 others, at once. None of the calls waits
    for the transaction, which ends only after them. Then all memberships agree with the table.
    """
    owner = make_layer(send_timeout=5)
    held = await new_channels(owner, 60)
    others = await new_channels(owner, 20)
    await asyncio.gather(*(owner.group_add(GROUP, channel) for channel in held))

    def change() -> None:
        for number, channel in enumerate(held):
            call = sync_layer.sync.group_discard if number % 2 else sync_layer.sync.group_add
            call(GROUP, channel)

    unrelated = [(f"room-{number}", channel) for number in range(20) for channel in others]
    with open_transaction(change) as opened:
        await opened.begin()
        calls = [
            owner.group_discard(GROUP, channel)
            if number % 3 == 0
            else owner.group_add(GROUP, channel)
            for number, channel in enumerate(held)
        ]
        calls += [owner.group_add(*pair) for pair in unrelated]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failed_held = [error for error in outcomes[:60] if error is not None]
        failed_unrelated = [error for error in outcomes[60:] if error is not None]
        assert (len(failed_held), len(failed_unrelated)) == (0, 0), outcomes
        await opened.end()
    agreement = Agreement(owner, make_layer())
    assert await agreement.reached_by_all(unrelated) == set(unrelated)
    await agreement.reached_by_all((GROUP, channel) for channel in held)


# ---------------------------------------------------------------------- two processes at once


async def change_elsewhere(link: Link, dsn: str) -> None:
    """Change memberships of channels that another process owns, until the test sends None."""
    async with open_layer(dsn) as layer:
        await layer.group_count(GROUP)
        link.say("ready")
        while (order := await link.hear()) is not None:
            change, *channels = order
            await asyncio.gather(*(getattr(layer, change)(GROUP, channel) for channel in channels))
            link.say("done")


@pytest.mark.parametrize("at_once", [1, 50])
@pytest.mark.parametrize(
    ("own_change", "other_change"), [("group_add", "group_discard"), ("group_discard", "group_add")]
)
async def test_memberships_changed_by_two_processes_at_once_agree_with_table(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    own_change: str,
    other_change: str,
    at_once: int,
) -> None:
    """The owner adds a channel while another process discards it, and the other way round.

    Either change may be the later one. For all of hundreds of channels, the table lists a
    channel if and only if a message to the group reaches it.
    """
    owner = make_layer()
    channels = await new_channels(owner, PAIRS)
    if own_change == "group_discard":
        await asyncio.gather(*(owner.group_add(GROUP, channel) for channel in channels))
    other = processes.start(change_elsewhere, migrated_dsn)
    assert await other.hear() == "ready"
    for start in range(0, PAIRS, at_once):
        part = channels[start : start + at_once]
        other.say((other_change, *part))
        await asyncio.gather(*(getattr(owner, own_change)(GROUP, channel) for channel in part))
        assert await other.hear() == "done"
    await Agreement(owner, make_layer()).reached_by_all((GROUP, channel) for channel in channels)


@pytest.mark.parametrize("owner_adds", [False, True], ids=["alone", "and by the owner"])
async def test_messages_after_add_by_another_process_arrive_once_in_order(
    make_layer: MakeLayer, owner_adds: bool
) -> None:
    """Another process adds the channel, the first one of its group there, and sends to the group.

    The owner may not have heard of it yet when it adds the channel as well.
    """
    owner, other = make_layer(capacity=1000), make_layer(capacity=1000)
    await listen(owner)
    channel = await owner.new_channel()
    async with readers_of(owner, channel) as readers:
        for number in range(0, 2 * PAIRS, 2):
            group = f"room-{number}"
            await other.group_add(group, channel)
            adding = [asyncio.create_task(owner.group_add(group, channel))] if owner_adds else []
            await other.group_send(group, numbered(number))
            await asyncio.gather(*adding)
            await other.group_send(group, numbered(number + 1))
        await readers.reached(2 * PAIRS - 1)
        await other.send(channel, numbered(2 * PAIRS))
        await readers.reached(2 * PAIRS)
        assert readers.numbers[channel] == list(range(2 * PAIRS + 1))


# ---------------------------------------------------------------------- statements that come late


@pytest.fixture
def proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


def backends(observer: Observer) -> set[Any]:
    """Return the process ids of the connections through the proxy."""
    query = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'proxied'"
    )
    return {pid for (pid,) in observer.execute(query)}


async def returned(call: Callable[[], Awaitable[None]]) -> None:
    """Call until the call returns: its first attempt may use a connection that no longer works."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    while True:
        try:
            return await call()
        except LayerUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise


@pytest.mark.parametrize("by", ["owner", "another process"])
@pytest.mark.parametrize("late", ["group_discard", "group_add"])
async def test_membership_change_given_up_and_late_changes_nothing(
    migrated_dsn: str, proxy: Proxy, make_layer: MakeLayer, observer: Observer, late: str, by: str
) -> None:
    """A change hangs in the network and raises. The opposite one returns. The first arrives last.

    The database executes the late statement when the network delivers it, after the later
    change. The membership remains as the later change left it.
    """
    changer = make_layer(
        dsn=proxy.dsn(connect_timeout=2, application_name="proxied"),
        listen_dsn=migrated_dsn,
        send_timeout=SHORT,
        pool_max_size=1,  # no idle session without a statement is blocked
    )
    owner = changer if by == "owner" else make_layer()
    [channel] = await new_channels(owner, 1)
    later = "group_add" if late == "group_discard" else "group_discard"
    await getattr(changer, later)(GROUP, channel)

    held_up = backends(observer)
    assert held_up
    proxy.swallow()
    with pytest.raises(LayerUnavailable):
        await getattr(changer, late)(GROUP, channel)
    proxy.let_go(revive=False)  # new connections work, and the old ones stay blocked
    await returned(lambda: getattr(changer, later)(GROUP, channel))
    assert held_up & backends(observer)
    proxy.let_go()
    # The server receives the blocked statements, executes them and ends these sessions.
    await until(lambda: not held_up & backends(observer))

    pairs = [(GROUP, channel)]
    agreement = Agreement(owner, make_layer())
    expected = set(pairs) if later == "group_add" else set()
    if by == "owner":  # a late request counts until the owner has ignored it
        assert await agreement.look(pairs) == (expected, expected)
    assert await agreement.reached_by_all(pairs) == expected
