"""A client: names, where each row goes, what is counted and dropped, and what is said at the end."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer.client import LOG_PERIOD, Client, inbox_of
from pg_layer.codec import Codec
from pg_layer.config import Config
from pg_layer.exceptions import UndecodableMessage
from pg_layer.inbox import Row
from pg_layer.mailbox import Letter, Mailbox

NOW = 1_750_000_000.0
LATER = NOW + 60
CAPACITY = 4


@pytest.fixture
def client() -> Client:
    client = make_client()
    client.clock.observe(time.monotonic(), NOW)
    return client


def make_client(**options: object) -> Client:
    config = Config(dsn="host=nowhere", capacity=CAPACITY, **options)  # type: ignore[arg-type]
    return Client(config, Codec("json", config.max_message_size))


def row(
    id: int,
    *,
    kind: str = "message",
    channel: str | None = None,
    group: str | None = None,
    payload: bytes | None = None,
    expires_at: float = LATER,
    excluded: str | None = None,
) -> Row:
    body = b'{"n":%d}' % id if payload is None else payload
    return Row(id, 1000 + id, kind, channel, group, body, expires_at, excluded)


def waiting(mailbox: Mailbox) -> list[int]:
    """The ids of what waits."""
    return [letter.id for letter in mailbox.pop_all()]


def groups_of(client: Client, channel: str) -> list[str]:
    return sorted(client.memberships.of_channel(channel))


# --- Names


def test_new_channels_are_the_clients_own_and_never_the_same() -> None:
    client, other = make_client(), make_client()
    names = [client.new_channel("specific") for _ in range(50)] + [other.new_channel("specific")]
    assert len(set(names)) == 51
    assert all(client.owns(name) for name in names[:-1])
    assert not client.owns(names[-1])
    assert names[0].startswith(f"specific.{client.id}!")


def test_new_channels_in_many_threads_are_never_the_same() -> None:
    client = make_client()
    names: list[list[str]] = [[] for _ in range(4)]

    def work(into: list[str]) -> None:
        into.extend(client.new_channel("s") for _ in range(300))

    threads = [threading.Thread(target=work, args=(into,)) for into in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({name for mine in names for name in mine}) == 1200


def test_a_client_owns_its_specific_channels_whatever_their_prefix() -> None:
    client = make_client()
    assert client.owns(client.new_channel("a.b-c_d"))
    assert client.owns(f"{client.id}!x")
    assert not client.owns(f"specific.{client.id}")
    assert not client.owns(client.id)
    assert not client.owns(f"specific.{client.id}0!1")
    assert not client.owns(f"{client.id}.specific!1")


@pytest.mark.parametrize(
    ("channel", "inbox"),
    [
        ("specific.0a1b!xyz", "asgi!0a1b"),
        ("a.b.c.0a1b!x", "asgi!0a1b"),
        ("0a1b!x", "asgi!0a1b"),
        ("0a1b!", "asgi!0a1b"),
        ("specific.0a1b!x.y", "asgi!0a1b"),
        ("thumbnails", "asgi!:thumbnails"),
        ("a.b", "asgi!:a.b"),
    ],
)
def test_the_inbox_of_a_channel(channel: str, inbox: str) -> None:
    assert inbox_of("asgi", channel) == inbox


@given(st.from_regex(r"[a-z.\-_]{1,10}(![a-z.\-_]{0,5})?", fullmatch=True))
def test_inboxes_of_clients_and_of_normal_channels_are_apart(channel: str) -> None:
    inbox = inbox_of("p", channel)
    assert inbox.startswith("p!")
    assert inbox.startswith("p!:") is ("!" not in channel)


def test_the_own_inbox_is_that_of_all_own_channels() -> None:
    client = make_client(prefix="shop")
    assert client.inbox_name == f"shop!{client.id}"
    assert inbox_of("shop", client.new_channel("specific")) == client.inbox_name
    assert inbox_of("shop", client.address) == client.inbox_name


# --- Where rows go


def test_a_message_for_a_channel_waits_in_its_mailbox_and_its_row_stays(client: Client) -> None:
    mine, other = client.new_channel("s"), client.new_channel("s")
    rows = [row(1, channel=mine), row(2, channel=other), row(3, channel=mine), row(4, channel="jobs")]
    assert client.dispatch(rows) == []
    letters = client.mailbox(mine).pop_all()
    assert [letter.id for letter in letters] == [1, 3]
    assert [letter.key for letter in letters] == [rows[0].key, rows[2].key]
    assert letters[0].payload == b'{"n":1}'
    assert letters[0].expires_at == LATER
    assert client.mailbox(mine).undeleted == 2
    assert waiting(client.mailbox(other)) == [2]
    assert waiting(client.mailbox("jobs")) == [4]
    assert client.counters["received"] == 4


def test_a_message_for_a_group_goes_to_its_local_members_and_its_row_is_done_with(
    client: Client,
) -> None:
    a, b, c = (client.new_channel("s") for _ in range(3))
    for group, channel in (("g", a), ("g", b), ("h", c)):
        client.memberships.join(group, client.mailbox(channel), 0, LATER)
    message = row(5, group="g")
    assert client.dispatch([message]) == [message.key]
    for channel in (a, b):
        (letter,) = client.mailbox(channel).pop_all()
        assert (letter.id, client.codec.decode(letter.payload), letter.key) == (5, {"n": 5}, None)
        assert client.mailbox(channel).undeleted == 0
    assert waiting(client.mailbox(c)) == []


def test_a_groups_message_for_a_normal_channel_goes_to_that_channel_alone(client: Client) -> None:
    mine = client.new_channel("s")
    client.memberships.join("g", client.mailbox(mine), 0, LATER)
    assert client.dispatch([row(5, channel="jobs", group="g")]) == []
    assert waiting(client.mailbox("jobs")) == [5]
    assert waiting(client.mailbox(mine)) == []


def test_what_was_sent_before_a_joining_is_not_for_the_new_member(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 5, LATER)
    client.dispatch([row(id, group="g") for id in (4, 5, 6)])
    assert waiting(client.mailbox(channel)) == [6]


def test_what_was_sent_before_a_leave_is_for_who_left(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 1, LATER)
    client.memberships.leave("g", channel, 5)
    client.dispatch([row(id, group="g") for id in (1, 4, 5, 6)])
    assert waiting(client.mailbox(channel)) == [4, 5]


def test_who_left_and_came_back_gets_what_was_sent_before_and_after_in_order(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 1, LATER)
    client.memberships.leave("g", channel, 5)
    client.memberships.join("g", client.mailbox(channel), 7, LATER)
    client.dispatch([row(id, group="g") for id in (4, 5, 6, 7, 8)])
    assert waiting(client.mailbox(channel)) == [4, 5, 8]


def test_who_left_does_not_disorder_what_others_get(client: Client) -> None:
    leaver, other = client.new_channel("s"), client.new_channel("s")
    for channel in (leaver, other):
        client.memberships.join("g", client.mailbox(channel), 1, LATER)
    client.memberships.leave("g", leaver, 3)
    client.dispatch([row(id, group="g") for id in (2, 3, 4)] + [row(5, group="g", excluded=leaver)])
    assert waiting(client.mailbox(leaver)) == [2, 3]
    assert waiting(client.mailbox(other)) == [2, 3, 4, 5]


def test_messages_for_several_groups_and_channels_that_come_together_stay_in_order() -> None:
    client = make_client(channel_capacity={"s.*": 10})
    channel, other = client.new_channel("s"), client.new_channel("s")
    for group in ("g", "h"):
        client.memberships.join(group, client.mailbox(channel), 0, LATER)
    client.memberships.join("h", client.mailbox(other), 0, LATER)
    rows = [
        row(1, group="g"),
        row(2, group="g"),
        row(3, channel=channel),
        row(4, group="h"),
        row(5, group="g"),
    ]
    rows.append(row(6, group="h", excluded=other))
    client.dispatch(rows)
    assert waiting(client.mailbox(channel)) == [1, 2, 3, 4, 5, 6]
    assert waiting(client.mailbox(other)) == [4]


def test_after_a_reconnect_members_get_messages_whatever_their_ids(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 100, LATER)
    client.memberships.ids_begin_anew(90)
    client.dispatch([row(90, group="g")])
    assert waiting(client.mailbox(channel)) == [90]


def test_a_membership_that_has_ended_gets_nothing(client: Client) -> None:
    gone, here = client.new_channel("s"), client.new_channel("s")
    client.memberships.join("g", client.mailbox(gone), 0, NOW - 1)
    client.memberships.join("g", client.mailbox(here), 0, math.inf)
    client.dispatch([row(1, group="g")])
    assert waiting(client.mailbox(gone)) == []
    assert waiting(client.mailbox(here)) == [1]


def test_of_many_that_come_together_a_member_gets_as_many_as_it_has_room_for(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 0, LATER)
    client.dispatch([row(id, group="g") for id in range(1, CAPACITY + 4)])
    assert waiting(client.mailbox(channel)) == list(range(1, CAPACITY + 1))
    assert client.counters["dropped_full"] == 3


def test_a_full_member_misses_the_newest_and_nobody_else_does(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = client.new_channel("s"), client.new_channel("s")
    for channel in (slow, quick):
        client.memberships.join("g", client.mailbox(channel), 0, LATER)
    received = []
    for id in range(1, CAPACITY + 4):
        client.dispatch([row(id, group="g")])
        received += waiting(client.mailbox(quick))
    assert waiting(client.mailbox(slow)) == list(range(1, CAPACITY + 1))
    assert received == list(range(1, CAPACITY + 4))
    assert client.counters["dropped_full"] == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert slow in record.getMessage()
    assert "group g" in record.getMessage()


def test_a_message_for_a_channel_is_put_however_full_the_mailbox_is(client: Client) -> None:
    channel = client.new_channel("s")
    client.dispatch([row(id, channel=channel) for id in range(CAPACITY + 2)])
    assert waiting(client.mailbox(channel)) == list(range(CAPACITY + 2))
    assert client.counters["dropped_full"] == 0


def test_an_unreadable_message_is_skipped_and_logged_once(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    channel = client.new_channel("s")
    bad = [row(id, channel=channel, payload=b"\x00 secret") for id in (1, 2)]
    assert client.dispatch([*bad, row(3, channel=channel)]) == [bad[0].key, bad[1].key]
    assert waiting(client.mailbox(channel)) == [3]
    assert client.mailbox(channel).undeleted == 1
    assert client.counters["dropped_undecodable"] == 2
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert channel in record.getMessage()
    assert "secret" not in record.getMessage()


def test_an_unreadable_message_for_a_group_reaches_nobody(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 0, LATER)
    bad = row(1, group="g", payload=b"")
    assert client.dispatch([bad, row(2, group="g")]) == [bad.key, row(2).key]
    assert waiting(client.mailbox(channel)) == [2]


def test_each_reader_of_an_encrypted_message_gets_the_plaintext() -> None:
    config = Config(dsn="host=nowhere", symmetric_encryption_keys=("key",))
    codec = Codec("msgpack", config.max_message_size, ["key"])
    client = Client(config, codec)
    channels = [client.new_channel("s") for _ in range(2)]
    for channel in channels:
        client.memberships.join("g", client.mailbox(channel), 0, LATER)
    client.dispatch([row(1, group="g", payload=codec.encode({"n": 1}))])
    for channel in channels:
        (letter,) = client.mailbox(channel).pop_all()
        assert codec.decode(letter.payload) == {"n": 1}


# --- Changes of membership, told by other processes


def test_joining_and_leaving_take_their_place_in_the_order(client: Client) -> None:
    channel = client.new_channel("s")
    rows = [
        row(1, group="g"),
        row(2, kind="join", channel=channel, group="g"),
        row(3, group="g"),
        row(4, kind="leave", channel=channel, group="g"),
        row(5, group="g"),
        row(6, kind="join", channel=channel, group="g", expires_at=math.inf),
        row(7, group="g"),
    ]
    assert client.dispatch(rows) == [each.key for each in rows]
    assert waiting(client.mailbox(channel)) == [3, 7]
    assert groups_of(client, channel) == ["g"]
    members, times = client.memberships.of_group("g")
    (member,) = members or (each for each in times[0] if not each.has_left)
    assert member.expires_at == math.inf


def test_only_own_channels_join(client: Client) -> None:
    other = make_client().new_channel("s")
    client.dispatch([row(1, kind="join", channel=other, group="g")])
    assert not client.memberships


def test_a_leave_that_is_read_late_does_not_undo_a_later_joining(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.join("g", client.mailbox(channel), 6, LATER)
    client.dispatch([row(5, kind="leave", channel=channel, group="g")])
    assert groups_of(client, channel) == ["g"]


def test_a_joining_that_is_read_late_does_not_undo_a_later_leave(client: Client) -> None:
    channel = client.new_channel("s")
    client.memberships.leave("g", channel, 6)
    client.dispatch([row(5, kind="join", channel=channel, group="g")])
    assert groups_of(client, channel) == []


@pytest.mark.parametrize(
    "change",
    [
        row(1, kind="join"),
        row(1, kind="leave", group="g"),
        row(1, kind="join", channel="x!y"),
        row(1, kind="?"),
    ],
)
def test_what_makes_no_sense_is_deleted_and_does_nothing(client: Client, change: Row) -> None:
    assert client.dispatch([change]) == [change.key]
    assert not client.memberships
    assert client.mailboxes() == []


# --- Flushing


def test_a_flush_takes_its_place_in_the_order(client: Client) -> None:
    channel = client.new_channel("s")
    before = [
        row(1, kind="join", channel=channel, group="g"),
        row(2, channel=channel),
        row(3, group="g"),
    ]
    flush, after = row(4, kind="flush"), row(6, channel=channel)
    client.dispatch(before)
    client.memberships.join("h", client.mailbox(channel), 5, LATER)
    assert client.dispatch([flush, after]) == [flush.key]
    assert waiting(client.mailbox(channel)) == [6]
    assert groups_of(client, channel) == ["h"]


def test_flushed_rows_are_counted_no_longer_than_until_they_are_deleted(client: Client) -> None:
    channel = client.new_channel("s")
    rows = [row(id, channel=channel) for id in (1, 2, 3)]
    client.dispatch(rows)
    client.flush(2)
    mailbox = client.mailbox(channel)
    assert client.doomed == {rows[0].key: mailbox, rows[1].key: mailbox}
    assert waiting(mailbox) == [3]


# --- Mailboxes


def test_a_mailbox_is_made_once_and_has_its_channels_capacity() -> None:
    client = make_client(channel_capacity={"jobs.*": 7})
    assert client.mailbox("jobs.a") is client.mailbox("jobs.a")
    assert client.mailbox("jobs.a").capacity == 7
    assert client.mailbox("other").capacity == CAPACITY
    assert {mailbox.channel for mailbox in client.mailboxes()} == {"jobs.a", "other"}


def test_idle_mailboxes_are_forgotten_in_the_second_round(client: Client) -> None:
    mailbox = client.mailbox("idle")
    client.forget_idle_mailboxes()
    assert client.mailboxes() == [mailbox]
    client.forget_idle_mailboxes()
    assert client.mailboxes() == []


def test_a_mailbox_that_is_asked_for_again_and_again_stays(client: Client) -> None:
    mailbox = client.mailbox("busy")
    for _ in range(4):
        client.forget_idle_mailboxes()
        assert client.mailbox("busy") is mailbox


async def test_mailboxes_that_matter_are_not_forgotten(client: Client) -> None:
    kept = {name: client.mailbox(name) for name in ("letter", "undeleted", "member", "waiting")}
    kept["letter"].put(Letter(1, b"{}", LATER, None))
    kept["undeleted"].undeleted = 1
    client.memberships.join("g", kept["member"], 0, LATER)
    waiter = asyncio.create_task(kept["waiting"].wait())
    await asyncio.sleep(0)
    for _ in range(4):
        client.forget_idle_mailboxes()
    assert {mailbox.channel for mailbox in client.mailboxes()} == kept.keys()
    # And once they do not matter any more, they are.
    waiter.cancel()
    await asyncio.wait([waiter])
    kept["letter"].pop()
    kept["undeleted"].undeleted = 0
    client.memberships.leave("g", "member", 1)
    for _ in range(2):
        client.forget_idle_mailboxes()
    assert client.mailboxes() == []


# --- The end


def test_at_the_end_it_says_what_it_has_done_and_which_memberships_go(client: Client) -> None:
    mine = client.new_channel("s")
    client.memberships.join("g", client.mailbox(mine), 0, LATER)
    client.dispatch([row(1, channel=mine), row(2, channel="jobs"), row(3, channel="jobs")])
    done = client.mailbox("jobs").pop()
    assert done is not None
    assert done.key is not None
    client.doomed[done.key] = client.mailbox("jobs")
    farewell = client.farewell()
    assert farewell.prefix == "asgi"
    assert farewell.inbox == client.inbox_name
    assert farewell.done == [row(2).key]
    assert farewell.memberships == [("g", mine)]
    # Nobody gets from the mailboxes what is given back.
    assert [len(mailbox) for mailbox in client.mailboxes()] == [0, 0]


# --- Logging


def test_the_same_thing_is_logged_again_after_a_while(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):
        client.foreign("pg_layer_x")
    client.foreign("pg_layer_y")
    assert len(caplog.records) == 2
    now += LOG_PERIOD + 1
    client.foreign("pg_layer_x")
    assert len(caplog.records) == 3
    assert client.counters["foreign_notifies"] == 5


def test_not_everything_that_was_logged_is_remembered_for_ever(client: Client) -> None:
    for number in range(3000):
        client.foreign(f"doorbell {number}")
    assert len(client._logged) <= 1001


def test_different_faults_are_logged_apart(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("one", "other", "one"):
        client.undecodable("channel", UndecodableMessage(text))
    assert [record.args for record in caplog.records] != []
    assert len(caplog.records) == 2


# --- Servers


@pytest.mark.parametrize(
    ("server", "next_id", "begins_anew"),
    [
        pytest.param(100.0, 12, False, id="the same"),
        pytest.param(100.0, 3, True, id="the same, with tables made anew"),
        pytest.param(250.0, 12, False, id="restarted"),
        pytest.param(250.0, 11, True, id="crashed, and the last ids are lost"),
        pytest.param(90.0, 12, True, id="a standby that ran already, and may have lagged"),
    ],
)
def test_a_server_that_may_hand_ids_out_again(
    client: Client, server: float, next_id: int, begins_anew: bool
) -> None:
    assert not client.meet(100.0, 150.0, 5)
    client.dispatch([row(11, channel=client.new_channel("s"))])
    assert client.meet(server, 300.0, next_id) is begins_anew
    assert not client.meet(server, 310.0, next_id + 1)


def test_what_expired_last_need_not_be_the_newest(client: Client) -> None:
    mailbox = client.mailbox("jobs")
    for id, now, neglected in ((10, 80.0, 10), (5, 90.0, 10), (12, 95.0, 12)):
        client.clock.observe(time.monotonic(), now)
        mailbox.put(Letter(id, b"", now, None))
        client.drop_expired(mailbox)
        assert mailbox.neglected == neglected
    client.ids_begin_anew(1)  # those of another server say nothing
    assert mailbox.neglected == -1
