"""The limit of a ``layer.sync`` call outside of transactions, and the thread that keeps it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection, connections

from pg_layer import LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
from pg_layer._db.queries.send import Unannounced
from pg_layer._sync import django_session
from pg_layer._sync.watchdog import Watch
from tests.conftest import Observer
from tests.faults.test_sync_faults import in_thread, locked, until_blocked
from tests.integration.test_django import postgres
from tests.integration.test_sync import number, on_django, shown, waiting
from tests.project.commands import eventually


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pg_layer-watchdog"]


def test_watchdog_of_many_calls_is_one_thread_that_ends_after_them(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer()

    def send() -> None:
        for n in range(50):
            layer.sync.send("jobs", number(n))
            assert len(watchdogs()) <= 1
        connections.close_all()

    with on_django(layer, default=postgres(migrated_dsn)), ThreadPoolExecutor(2) as pool:
        for sending in [pool.submit(send) for _ in range(2)]:
            sending.result()
    assert waiting(observer) == 100
    eventually(lambda: not watchdogs(), "the watchdog's thread ends")


def test_watchdog_cuts_a_call_whose_deadline_comes_before_those_of_earlier_calls(
    migrated_dsn: str, observer: Observer
) -> None:
    patient = PostgresChannelLayer(send_timeout=3600)
    hasty = PostgresChannelLayer(send_timeout=0.5)
    with (
        on_django(hasty, default=postgres(migrated_dsn)),
        locked(migrated_dsn, "pg_layer_message") as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        sending = in_thread(pool, lambda: patient.sync.send("jobs", number(1)))
        until_blocked(observer)
        connection.ensure_connection()
        with pytest.raises(OutcomeUnknown):
            hasty.sync.send("jobs", number(2))
        assert not sending.done()
        holder.rollback()
        sending.result()


def test_read_that_exceeds_send_timeout_says_so(migrated_dsn: str) -> None:
    layer = PostgresChannelLayer(send_timeout=0.5)
    with (
        on_django(layer, default=postgres(migrated_dsn)),
        locked(migrated_dsn, "pg_layer_client"),
    ):
        connection.ensure_connection()
        with pytest.raises(LayerUnavailable, match="did not answer in time") as caught:
            layer.sync.group_count("room")
        assert not isinstance(caught.value, OutcomeUnknown)
        assert shown("server_version_num")


def test_call_in_a_child_is_limited_although_the_parent_was_in_a_call(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(send_timeout=0.5)
    patient = PostgresChannelLayer(send_timeout=3600)
    with (
        on_django(layer, default=postgres(migrated_dsn)),
        locked(migrated_dsn, "pg_layer_message") as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        sending = in_thread(pool, lambda: patient.sync.send("jobs", number(1)))
        until_blocked(observer)
        assert watchdogs()
        connections.close_all()
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                connection.ensure_connection()
                layer.sync.send("jobs", number(2))
            except OutcomeUnknown:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0) == (child, 0)
        holder.rollback()
        sending.result()


def test_send_when_no_thread_can_be_started_succeeds(
    migrated_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a function that runs at the end of the interpreter."""
    eventually(lambda: not watchdogs(), "the watchdog of an earlier call ends")
    layer = PostgresChannelLayer(send_timeout=0.5)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with on_django(layer, default=postgres(migrated_dsn)):
        connection.ensure_connection()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            layer.sync.send("jobs", number(1))
        assert waiting(observer) == 1
        with locked(migrated_dsn, "pg_layer_message"), pytest.raises(OutcomeUnknown):
            layer.sync.send("jobs", number(2))  # the next call starts the thread


def test_interrupt_while_the_watchdog_starts_limits_no_later_call(
    migrated_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Celery's soft time limit, which a signal handler raises at any place."""
    eventually(lambda: not watchdogs(), "the watchdog of an earlier call ends")
    patient = PostgresChannelLayer(send_timeout=3600)
    limited = PostgresChannelLayer(send_timeout=0.5)

    def interrupt(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with on_django(limited, default=postgres(migrated_dsn)):
        patient.sync.group_count("room")  # connects
        eventually(lambda: not watchdogs(), "the watchdog of an earlier call ends")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupt)
            with pytest.raises(KeyboardInterrupt):
                limited.sync.send("jobs", number(1))
        with locked(migrated_dsn, "pg_layer_message") as holder, ThreadPoolExecutor(1) as pool:

            def release() -> None:
                until_blocked(observer)
                observer.execute("SELECT pg_sleep(1)")  # the deadline of the first call passes
                holder.rollback()

            releasing = pool.submit(release)
            patient.sync.send("jobs", number(2))
            releasing.result()
        assert waiting(observer) == 1
        with locked(migrated_dsn, "pg_layer_message"), pytest.raises(OutcomeUnknown):
            limited.sync.send("jobs", number(3))


def after_execute(then: Callable[[], None]) -> Callable[..., Any]:
    """Return a wrapper for `execute_wrapper` that calls a function after each statement."""

    def wrapper(execute: Callable[..., Any], *arguments: Any) -> Any:
        result = execute(*arguments)
        then()
        return result

    return wrapper


def test_watchdog_outlives_a_connection_that_is_lost_before_the_deadline(
    migrated_dsn: str,
) -> None:
    """An application's wrapper takes long to report the lost connection."""
    layer = PostgresChannelLayer(send_timeout=0.5)

    def lose() -> None:
        connection.connection.close()
        eventually(lambda: not watchdogs(), "the deadline passes")

    with on_django(layer, default=postgres(migrated_dsn)):
        connection.ensure_connection()
        with connection.execute_wrapper(after_execute(lose)):
            layer.sync.send("jobs", number(1))  # the answer came before
        connection.ensure_connection()
        with locked(migrated_dsn, "pg_layer_message"), pytest.raises(OutcomeUnknown):
            layer.sync.send("jobs", number(2))


def test_connection_cut_after_the_answer_does_not_return_to_a_pool(
    migrated_dsn: str, observer: Observer
) -> None:
    """The answer arrives, and then the deadline passes before the call ends."""
    layer = PostgresChannelLayer(send_timeout=0.5)
    options = {"pool": {"min_size": 1, "max_size": 1}}

    def wait() -> None:
        eventually(lambda: not watchdogs(), "the deadline passes")

    with on_django(layer, default={**postgres(migrated_dsn), "OPTIONS": options}):
        wrapper: Any = connections["default"]
        wrapper.ensure_connection()
        with wrapper.execute_wrapper(after_execute(wait)):
            layer.sync.send("jobs", number(1))
        assert waiting(observer) == 1
        try:
            assert shown("server_version_num")
        finally:
            wrapper.close()
            wrapper.close_pool()


def test_send_after_a_slow_announcement_ends_within_send_timeout(
    migrated_dsn: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The announcement of an earlier message takes half of the time. The rest is for the send."""
    layer = PostgresChannelLayer(send_timeout=1)
    deadlines: list[float] = []

    class Recorded(Watch):
        def __init__(self, conn: Any, deadline: float) -> None:
            deadlines.append(deadline)
            super().__init__(conn, deadline)

    with on_django(layer, default=postgres(migrated_dsn)):
        layer._loops.announcer.add(
            [Unannounced(1, 1, 1, "asgi!:jobs", "jobs", "message", None, b"x")]
        )
        connection.ensure_connection()
        monkeypatch.setattr(django_session, "Watch", Recorded)
        with locked(migrated_dsn, "pg_layer_message"), pytest.raises(OutcomeUnknown):
            layer.sync.send("jobs", number(1))
    announced_until, sent_until = deadlines
    assert 0 < sent_until - announced_until < 1
