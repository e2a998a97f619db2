"""``send_many``, ``group_send_many``, the arguments ``expiry`` and ``exclude``, and presence."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from pg_layer import ChannelFull, InvalidMessage, MessageTooLarge, PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import Link, Message, Processes, listen, open_layer, receive, until


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Receive ``count`` messages from the channel. Return their numbers."""
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def assert_empty(layer: PostgresChannelLayer, *channels: str) -> None:
    """Assert that no message waits in the channels.

    Messages arrive in order: an earlier one would come before the one sent here.
    """
    for channel in channels:
        await layer.send(channel, {"number": -99})
        assert await receive_numbers(layer, channel, 1) == [-99]


# ---------------------------------------------------------------------- several at once


async def test_send_many_to_three_channels_returns_a_result_for_each_message(
    make_layer: MakeLayer,
) -> None:
    layer, sender = make_layer(capacity=5), make_layer(capacity=5)
    await listen(layer)
    own, other = await layer.new_channel(), await layer.new_channel()
    messages = [(channel, {"number": n}) for n in range(7) for channel in (own, "jobs", other)]
    accepted = await sender.send_many(messages)
    assert accepted == [n < 5 for n in range(7) for _ in range(3)]
    for channel in (own, "jobs", other):
        assert await receive_numbers(layer, channel, 5) == list(range(5))
    await assert_empty(layer, own, "jobs", other)


async def test_send_many_to_four_channels_is_one_transaction_and_two_notifications(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(capacity=10_000), make_layer(capacity=10_000)
    await listen(layer)
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in (channels[0], "jobs"):
        observer.execute(
            "SELECT pg_layer_listen("
            "ARRAY[pg_layer_notification_channel(pg_layer_address('asgi', %s))])",
            [channel],
        )
    messages = [(channel, {"number": n}) for n in range(1000) for channel in (*channels, "jobs")]
    assert all(await sender.send_many(messages))
    forms = Counter(notification.payload[0] for notification in observer.notifies(timeout=1.0))
    # One notification announces that jobs wait, and one names the rows that the client must read.
    assert forms == {"J": 1, "R": 1}
    transactions = "SELECT count(DISTINCT xid::text) FROM pg_layer_message WHERE channel = 'jobs'"
    assert observer.execute(transactions.encode()).fetchone() == (1,)
    for channel in (*channels, "jobs"):
        assert await receive_numbers(layer, channel, 1000) == list(range(1000))


async def test_group_send_many_returns_false_where_a_normal_channel_was_full(
    make_layer: MakeLayer,
) -> None:
    layer, sender = make_layer(), make_layer(capacity=2)
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in channels:
        await layer.group_add("room", channel)
    await layer.group_add("attic", channels[0])
    await sender.group_add("attic", "jobs")
    messages = [(group, {"number": n}) for n in range(4) for group in ("room", "attic", "nobody")]
    accepted = await sender.group_send_many(messages, exclude=channels[2])
    # Two of the four messages for the attic found the normal channel full.
    assert accepted == [
        group != "attic" or n < 2 for n in range(4) for group in ("room", "attic", "nobody")
    ]
    assert await receive_numbers(layer, channels[0], 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert await receive_numbers(layer, channels[1], 4) == [0, 1, 2, 3]
    assert await receive_numbers(layer, "jobs", 2) == [0, 1]
    await assert_empty(layer, *channels, "jobs")


async def test_send_and_send_many_from_one_sender_keep_their_order(make_layer: MakeLayer) -> None:
    layer, sender = make_layer(capacity=1000), make_layer(capacity=1000)
    await listen(layer)
    channel = await layer.new_channel()
    sends: list[Coroutine[Any, Any, Any]] = []
    for start in range(0, 300, 10):
        sends.append(sender.send(channel, {"number": start}))
        sends.append(sender.send_many([(channel, {"number": start + n}) for n in range(1, 10)]))
    results = await asyncio.gather(*sends)
    assert results == [None, [True] * 9] * 30
    assert await receive_numbers(layer, channel, 300) == list(range(300))


async def test_send_among_send_many_to_a_full_channel_raises_channel_full(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(capacity=4)
    await listen(layer)
    channel = await layer.new_channel()
    results = await asyncio.gather(
        layer.send("other", {}),  # is written at once; the others are written together
        layer.send_many([(channel, {"number": n}) for n in range(3)]),
        layer.send(channel, {"number": 3}),
        layer.send(channel, {"number": 4}),
        layer.send_many([(channel, {"number": 5}), ("other", {})]),
        return_exceptions=True,
    )
    assert list(results[:3]) == [None, [True, True, True], None]
    assert isinstance(results[3], ChannelFull)
    assert results[4] == [False, True]
    assert await receive_numbers(layer, channel, 4) == [0, 1, 2, 3]


@pytest.mark.slow
async def test_send_many_of_the_maximum_size_to_a_full_channel_and_many_others_ends(
    make_layer: MakeLayer, observer: Observer
) -> None:
    # A search in the list of refused messages for each message would take many minutes.
    layer = make_layer(send_timeout=60)
    assert sum(await layer.send_many([("jobs", {"number": n}) for n in range(100_000)])) == 100
    assert await receive_numbers(layer, "jobs", 100) == list(range(100))
    gone = [(f"specific.gone{n}!1", {"number": n}) for n in range(99_999)]
    assert all(await layer.send_many([*gone, ("jobs", {"number": 7})]))
    assert await receive_numbers(layer, "jobs", 1) == [7]
    # Messages to a client that has closed, or has not begun yet, are written and expire.
    waiting = "SELECT count(*) FROM pg_layer_message WHERE address LIKE 'asgi!gone%'"
    assert observer.execute(waiting.encode()).fetchone() == (99_999,)


async def test_send_many_to_full_gone_and_other_channels_returns_the_result_of_each(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(capacity=2)
    await listen(layer)
    own = await layer.new_channel()
    gone = make_layer()
    gone_channel = await gone.new_channel()
    await listen(gone)
    await gone.close()
    other = make_layer(capacity=2)
    await listen(other)
    alone = await other.new_channel()  # receives a single message
    names = [
        "jobs",
        gone_channel,
        own,
        "jobs",
        "jobs",
        gone_channel,
        "others",
        "jobs",
        own,
        own,
        alone,
    ]
    accepted = await layer.send_many([(name, {"number": n}) for n, name in enumerate(names)])
    # Messages to a closed client are accepted, because the sender may not know of its end.
    assert [n for n, was_accepted in enumerate(accepted) if not was_accepted] == [4, 7, 9]
    assert await receive_numbers(layer, own, 2) == [2, 8]
    assert await receive_numbers(other, alone, 1) == [10]
    assert await receive_numbers(layer, "jobs", 2) == [0, 3]
    assert await receive_numbers(layer, "others", 1) == [6]


async def test_send_many_of_no_messages_returns_an_empty_list(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    assert await layer.send_many([]) == await layer.group_send_many(iter(())) == []
    assert await layer.send_many([("jobs", {"number": 1})]) == [True]
    assert await layer.group_send_many([("room", {"number": 1})]) == [True]


async def test_send_many_with_one_invalid_item_sends_nothing(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(max_message_size=300 * 1024 * 1024)
    good = ("jobs", {"number": 1})
    with pytest.raises(TypeError, match="Channel name"):
        await layer.send_many([good, ("no channel", {})])
    with pytest.raises(TypeError, match="object"):
        await layer.send_many([good, ("jobs", {"it": object()})])
    with pytest.raises(TypeError, match="Item 1"):
        await layer.send_many([good, ("jobs", {}, 3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="100001 messages"):
        await layer.group_send_many([("room", {})] * 100_001)
    with pytest.raises(MessageTooLarge, match=re.escape(str(256 * 1024 * 1024))):
        await layer.send_many([("jobs", {"blob": bytes(130 * 1024 * 1024)})] * 2)
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)


async def test_send_many_with_an_invalid_item_raises_an_error_that_names_its_index(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(max_message_size=1000)

    def many(name: str, message: Any) -> list[tuple[str, Any]]:
        return [("fine", {"number": n}) for n in range(17)] + [(name, message)] * 2

    for send in (layer.send_many, layer.group_send_many):
        with pytest.raises(TypeError, match=r"^Item 17: \w+ name must "):
            await send(many("no name", {}))
        with pytest.raises(InvalidMessage, match=r'^Item 17: message\["it"\].*\.object'):
            await send(many("fine", {"it": object()}))
        with pytest.raises(InvalidMessage, match=r"^Item 17: .* not str"):
            await send(many("fine", "text"))
        with pytest.raises(MessageTooLarge, match=r"^Item 17: .*max_message_size is 1000"):
            await send(many("fine", {"blob": bytes(2000)}))
        # An error in an argument of the call names no item.
        with pytest.raises(TypeError, match=r"^expiry must"):
            await send(many("fine", {}), expiry="soon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Channel name"):
        await layer.group_send_many(many("fine", {}), exclude="no channel")
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)


# ---------------------------------------------------------------------- expiry and exclusion


async def test_send_with_an_expiry_uses_it_instead_of_the_option(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(), make_layer()
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await sender.send("jobs", {"number": 1}, expiry=0.01)
    await sender.send(channel, {"number": 2}, expiry=0.01)
    await sender.group_send("room", {"number": 3}, expiry=0.01)
    await sender.send_many([(channel, {"number": 4}), ("jobs", {"number": 5})], expiry=0.01)
    await sender.group_send_many([("room", {"number": 6})], expiry=0.01)
    await until(
        lambda: (
            observer.execute(
                "SELECT FROM pg_layer_message WHERE expires_at > clock_timestamp()"
            ).rowcount
            == 0
        )
    )
    await sender.send("jobs", {"number": 7}, expiry=3600)
    await sender.group_send("room", {"number": 8}, expiry=3600)
    left = observer.execute(
        "SELECT max(extract(epoch FROM expires_at - sent_at))"
        " FROM pg_layer_message WHERE channel = 'jobs'"
    ).fetchone()
    assert left is None or left[0] is None or 3599 < left[0] < 3601
    assert await receive_numbers(layer, "jobs", 1) == [7]
    assert await receive_numbers(layer, channel, 1) == [8]


async def join_and_report(link: Link, dsn: str, group: str) -> None:
    """Join the group, and report the number of one message for each "next". Runs in a process."""
    async with open_layer(dsn) as layer:
        channel = await layer.new_channel()
        await layer.group_add(group, channel)
        await listen(layer)
        link.say(channel)
        while (await link.hear()) == "next":
            link.say((await receive(layer, channel))["number"])


@pytest.mark.parametrize("size", [10, 20_000], ids=["in its notification", "read"])
async def test_group_send_with_exclude_skips_only_that_channel(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, size: int
) -> None:
    layer = make_layer()
    await listen(layer)
    mine, neighbour = await layer.new_channel(), await layer.new_channel()
    for channel in (mine, neighbour, "jobs"):
        await layer.group_add("room", channel)
    remote = processes.start(join_and_report, migrated_dsn, "room")
    remote_channel = await remote.hear()

    async def send_number(number: int, exclude: str | None) -> None:
        message: Message = {"number": number, "blob": bytes(size)}
        if number % 2:
            await layer.group_send("room", message, exclude=exclude)
        else:
            await asyncio.gather(
                layer.group_send("room", message, exclude=exclude), layer.group_send("nobody", {})
            )

    excluded = [None, mine, remote_channel, "jobs", neighbour, "somebody-else", None]
    for number, channel in enumerate(excluded):
        await send_number(number, channel)
    for channel in (mine, neighbour, "jobs"):
        expected = [n for n, name in enumerate(excluded) if name != channel]
        assert await receive_numbers(layer, channel, len(expected)) == expected
    heard = []
    for _ in range(6):
        remote.say("next")
        heard.append(await remote.hear())
    assert heard == [0, 1, 3, 4, 5, 6]
    remote.say("end")


# ---------------------------------------------------------------------- presence


async def test_group_channels_and_count_return_the_members_of_all_processes(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer, sender = make_layer(), make_layer()
    assert await sender.group_channels("room") == []
    assert await sender.group_count("room") == 0
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in (*channels, "jobs"):
        await layer.group_add("room", channel)
    await layer.group_add("other", channels[0])
    remote_channel = await processes.start(join_and_report, migrated_dsn, "room").hear()
    expected = sorted([*channels, "jobs", remote_channel])
    assert sorted(await sender.group_channels("room")) == expected
    assert await sender.group_count("room") == 5
    assert await layer.group_channels("other") == [channels[0]]
    await layer.group_discard("room", channels[0])
    assert await sender.group_count("room") == 4
    with pytest.raises(TypeError, match="Group name"):
        await sender.group_count("no!group")
    with pytest.raises(TypeError, match="Group name"):
        await sender.group_channels("")


async def test_group_count_with_different_prefixes_counts_only_own_members(
    make_layer: MakeLayer,
) -> None:
    for prefix in ("a", "aa", "a-b"):
        layer = make_layer(prefix=prefix)
        await layer.group_add("room", await layer.new_channel())
    for prefix in ("a", "aa", "a-b"):
        assert await make_layer(prefix=prefix).group_count("room") == 1


async def test_group_count_skips_members_of_a_client_with_an_expired_lease(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(group_expiry=None)
    mine = await layer.new_channel()
    await layer.group_add("room", mine)
    killed = processes.start(join_and_report, migrated_dsn, "room")
    await killed.hear()
    assert await layer.group_count("room") == 2
    killed.kill()
    # Let its lease expire: the test moves the times in the tables.
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() WHERE pid = %s", [killed.pid]
    )
    # It is still counted: the lease may have expired because the database was down.
    assert await layer.group_count("room") == 2
    # The lease is over when other clients have renewed their leases without a gap.
    observer.execute(
        "UPDATE pg_layer_lease_clock SET steady_since = steady_since - interval '1 day'"
    )
    assert await layer.group_channels("room") == [mine]
    assert await layer.group_count("room") == 1
    observer.execute("UPDATE pg_layer_membership SET expires_at = clock_timestamp()")
    assert await layer.group_count("room") == 0
