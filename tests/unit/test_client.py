"""The client: names, channel queues, and events that are logged once."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from pg_layer._config.options import Config
from pg_layer._messages.addresses import channel_address
from pg_layer._messages.codec import Codec
from pg_layer._messages.rows import Key, Row
from pg_layer._state import log_events
from pg_layer._state.channel_queue import QueuedMessage
from pg_layer._state.client import Client
from pg_layer._state.log_limit import MAX_RECORDS, PERIOD, LogLimit
from pg_layer.exceptions import UndecodableMessage
from tests.logs import events

NOW = 1_750_000_000.0
LATER = NOW + 60
CAPACITY = 4


@pytest.fixture
def client() -> Client:
    client = make_client()
    client.clock.observe(client.clock.ticks(), NOW)
    return client


def make_client(**options: object) -> Client:
    config = Config(dsn="host=nowhere", capacity=CAPACITY, **options)  # type: ignore[arg-type]
    return Client(config, Codec("json", config.max_message_size))


def queued(id: int, expires_at: float = LATER, key: Key | None = None) -> QueuedMessage:
    return QueuedMessage(b'{"n":%d}' % id, expires_at, key)


# --- Names


def test_new_channel_many_calls_are_own_and_never_the_same() -> None:
    client, other = make_client(), make_client()
    names = [client.new_channel("specific") for _ in range(50)] + [other.new_channel("specific")]
    assert len(set(names)) == 51
    assert all(client.owns(name) for name in names[:-1])
    assert not client.owns(names[-1])
    assert names[0].startswith(f"specific.{client.id}!")


def test_new_channel_many_threads_are_never_the_same() -> None:
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


def test_owns_specific_channels_whatever_their_prefix() -> None:
    client = make_client()
    channel = client.new_channel("a.b-c_d")
    assert client.owns(channel)
    assert not client.owns(f"x{channel}")
    assert not client.owns(f"{channel}0")
    assert not client.owns(channel[:-1])
    assert not client.owns(channel.replace("!1-", "!2-"))
    assert not client.owns(f"{client.id}!x")
    assert not client.owns("")
    assert not client.owns("jobs")
    assert not client.owns(f"specific.{client.id}")
    assert not client.owns(client.id)
    assert not client.owns(f"specific.{client.id}0!1")
    assert not client.owns(f"{client.id}.specific!1")


def test_address_own_channels_have_that_of_the_client() -> None:
    client = make_client(prefix="shop")
    assert client.address == f"shop!{client.id}"
    assert channel_address("shop", client.new_channel("specific")) == client.address


# --- The owner loop


def test_is_owned_here_other_thread_is_false(client: Client) -> None:
    """Only the owner loop's thread may touch the state of receiving."""
    assert not client.is_owned_here()
    client.take_ownership()
    elsewhere: list[bool] = []
    thread = threading.Thread(target=lambda: elsewhere.append(client.is_owned_here()))
    thread.start()
    thread.join(10)
    assert (client.is_owned_here(), elsewhere) == (True, [False])


# --- Channel queues


def test_queue_asked_twice_is_made_once_with_the_capacity_of_its_channel() -> None:
    client = make_client(channel_capacity={"jobs.*": 7})
    assert client.find_queue("jobs.a") is None
    assert client.queue("jobs.a") is client.queue("jobs.a") is client.find_queue("jobs.a")
    assert client.queue("jobs.a").capacity == 7
    assert client.queue("other").capacity == CAPACITY
    assert {queue.channel for queue in client.queues()} == {"jobs.a", "other"}


def test_own_queue_of_a_channel_that_was_not_made_is_none(client: Client) -> None:
    channel = client.new_channel("specific")
    for unknown in (
        f"specific.{client.id}!1",
        channel.replace("specific", "other"),
        "jobs",
        f"{channel}\ufffd",
    ):
        assert client.own_queue(unknown) is None
    assert client.queues() == []


def test_own_queue_forgotten_is_made_again(client: Client) -> None:
    channel = client.new_channel("specific")
    queue = client.own_queue(channel)
    assert queue is not None
    assert client.own_queue(channel) is queue
    for _ in range(2):
        client.forget_idle_queues()
    assert client.find_queue(channel) is None
    again = client.own_queue(channel)
    assert again is not None
    assert again is not queue


def test_forget_idle_queues_second_call_forgets_unused(client: Client) -> None:
    queue = client.queue("idle")
    client.forget_idle_queues()
    assert client.queues() == [queue]
    client.forget_idle_queues()
    assert client.queues() == []


def test_forget_idle_queues_used_in_between_stays(client: Client) -> None:
    queue = client.queue("busy")
    for _ in range(4):
        client.forget_idle_queues()
        assert client.queue("busy") is queue


async def test_forget_idle_queues_needed_queues_stay_until_they_are_not(client: Client) -> None:
    kept = {name: client.queue(name) for name in ("message", "undeleted", "member", "waiting")}
    kept["message"].put(queued(1))
    kept["undeleted"].count_row()
    client.memberships.add("g", kept["member"], LATER, None)
    waiter = asyncio.create_task(kept["waiting"].wait())
    await asyncio.sleep(0)
    for _ in range(4):
        client.forget_idle_queues()
    assert {queue.channel for queue in client.queues()} == kept.keys()
    waiter.cancel()
    await asyncio.wait([waiter])
    kept["message"].pop()
    kept["undeleted"].uncount_rows(1)
    client.memberships.discard("g", "member")
    for _ in range(2):
        client.forget_idle_queues()
    assert client.queues() == []


def test_drop_expired_counts_and_has_rows_deleted(client: Client) -> None:
    queue = client.queue("jobs")
    old, new = Key(1, 10, 1), Key(1, 11, 2)
    queue.put(queued(1, NOW - 1, old))
    queue.put(queued(2, LATER, new))
    client.drop_expired(queue)
    assert client.pending_deletes == {old: queue}
    assert client.counters["dropped_expired"] == 1
    assert len(queue) == 1


def test_drop_expired_before_the_first_answer_drops_nothing() -> None:
    """Until its clock is known, only the database decides which messages have expired."""
    client = make_client()
    queue = client.queue("jobs")
    queue.put(queued(1, 1.0, Key(1, 10, 1)))
    client.drop_expired(queue)
    assert len(queue) == 1


def test_unreceived_keys_include_queue_and_channel_queues(client: Client) -> None:
    """The deletion after a restart of the server must leave unreceived rows in the table."""
    waiting, ready = Key(1, 10, 1), Key(1, 11, 2)
    client.queue("jobs").put(queued(1, key=waiting))
    client.queue("member").put(queued(2))
    client.announcements.begin_catch_up()
    client.announcements.append([Row(2, 11, 1, False, "message", None, "jobs", None, b"{}", LATER)])
    assert sorted(client.unreceived_keys()) == [waiting, ready]


def test_send_to_consumers_reaches_those_of_this_process_only(client: Client) -> None:
    consumer, job, other = client.new_channel("s"), "jobs", "specific.other!1"
    for channel in (consumer, job, other):
        client.queue(channel).allow_receive()
    client.queue(client.new_channel("s"))  # a queue that no consumer reads
    client.send_to_consumers("db.lost")
    client.send_to_consumers(None)
    assert [len(queue) for queue in client.queues()] == [1, 0, 0, 0]
    message = client.queue(consumer).pop()
    assert message is not None
    assert (message.expires_at, message.key) == (math.inf, None)
    assert client.codec.decode(message.payload) == {"type": "db.lost"}


def test_send_to_consumers_full_queue_is_unchanged(client: Client) -> None:
    queue = client.queue(client.new_channel("s"))
    queue.allow_receive()
    for id in range(CAPACITY):
        queue.put(queued(id))
    client.send_to_consumers("db.lost")
    assert len(queue) == CAPACITY


def test_close_returns_received_rows_and_empties_queues(client: Client) -> None:
    queue = client.queue("jobs")
    received, waiting = Key(1, 10, 1), Key(1, 10, 2)
    queue.put(queued(1, key=received))
    queue.put(queued(2, key=waiting))
    queue.pop(client.pending_deletes)
    assert client.close() == [received]
    assert queue.is_closed
    assert len(queue) == 0


def test_counts_next_client_of_a_layer_begin_at_its_start() -> None:
    first = make_client()
    first.counters.add("sent", 3)
    second = Client(first.config, first.codec, first.counters)
    second.counters.add("sent")
    assert second.counts(has_notifications=True)["sent"] == 1
    assert second.counters["sent"] == 4


# --- Logging


def test_log_foreign_notification_same_channel_again_after_a_while(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    client.log_limit = LogLimit(lambda: now)
    for _ in range(3):
        client.log_foreign_notification("pg_layer_x")
    client.log_foreign_notification("pg_layer_y")
    assert len(caplog.records) == 2
    now += PERIOD
    client.log_foreign_notification("pg_layer_x")
    assert len(caplog.records) == 3
    assert client.counters["ignored_notifications"] == 5


def test_count_dropped_many_channels_logs_how_many_lines_were_omitted(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    client.log_limit = LogLimit(lambda: now)
    for number in range(3000):
        client.count_dropped("room", f"channel {number}", 2)
    assert len(caplog.records) == MAX_RECORDS
    now += PERIOD
    client.count_dropped("room", "late")
    assert set(events(caplog)) == {log_events.CHANNEL_FULL}
    assert "late" in caplog.messages[-1]
    assert f": {3000 - MAX_RECORDS}.)" in caplog.messages[-1]
    assert client.counters["dropped_full"] == 6001


def test_log_unknown_channel_any_text_is_one_short_line(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Any role may invent the name in a notification."""
    client.log_unknown_channel("a\nERROR forged!" + "x" * 7000)
    assert len(caplog.messages[0]) < 300
    assert "\n" not in caplog.messages[0]


def test_log_undecodable_different_problems_are_logged_separately(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("one", "other", "one"):
        client.log_undecodable("channel", UndecodableMessage(text))
    assert len(caplog.records) == 2
    assert client.counters["dropped_undecodable"] == 3


def test_count_dropped_counts_each_and_logs_once(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.count_dropped("g", "c", 3)
    client.count_dropped("g", "c")
    assert client.counters["dropped_full"] == 4
    assert len(caplog.records) == 1
