"""The errors of calls: `OutcomeUnknown` if and only if the call may have taken effect."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connections

from pg_layer import LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
from pg_layer._db.queries import lease
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.faults.test_sync_faults import locked, until_blocked
from tests.integration.test_django import postgres
from tests.integration.test_sync import on_django
from tests.processes import listen, until

Call = Callable[[PostgresChannelLayer], Coroutine[Any, Any, object]]
MESSAGE = {"type": "test"}


@pytest.fixture
def proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


def goes_away(proxy: Proxy) -> None:
    """Break all connections, and refuse new ones."""
    proxy.swallow()
    proxy.cut()


async def blocked(observer: Observer, count: int = 1) -> None:
    """Return when a number of statements wait for a lock."""
    await asyncio.to_thread(until_blocked, observer, count)


# ---------------------------------------------------------------------- in flight


async def test_send_whose_timeout_passes_in_its_statement_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The layer gives the statement up, and it takes effect later."""
    layer = make_layer(send_timeout=2)
    with locked(migrated_dsn, "pg_layer_message"):
        results = await asyncio.gather(
            *(layer.send("jobs", MESSAGE) for _ in range(3)), return_exceptions=True
        )
    assert type(results[0]) is OutcomeUnknown
    # These operations waited for the first one, and were not sent.
    assert [type(result) for result in results[1:]] == [LayerUnavailable, LayerUnavailable]

    def sent() -> bool:
        return observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (1,)

    await until(sent)


async def test_send_of_foreign_loop_in_flight_when_loop_blocks_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop with the connections blocks during the batch, and the message is committed."""
    monkeypatch.setattr("pg_layer._send.batcher.GRACE", 0.0)
    layer = make_layer(send_timeout=2)
    await layer.send("others", MESSAGE)
    thread = threading.Thread(target=lambda: results.append(asyncio.run(send())))
    results: list[BaseException | None] = []

    async def send() -> BaseException | None:
        (result,) = await asyncio.gather(layer.send("jobs", MESSAGE), return_exceptions=True)
        return result

    with locked(migrated_dsn, "pg_layer_message"):
        thread.start()
        await blocked(observer)
    thread.join()  # blocks this loop
    assert [type(result) for result in results] == [OutcomeUnknown]
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (2,)


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["own loop", "another loop"])
async def test_send_in_flight_when_the_layer_is_closed_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, is_elsewhere: bool
) -> None:
    layer = make_layer()
    await layer.send("others", MESSAGE)

    async def send() -> None:
        with pytest.raises(OutcomeUnknown):
            await layer.send("jobs", MESSAGE)

    with locked(migrated_dsn, "pg_layer_message"):
        sending = asyncio.create_task(
            asyncio.to_thread(asyncio.run, send()) if is_elsewhere else send()
        )
        await blocked(observer)
        await layer.close()
        await sending


# ---------------------------------------------------------------------- attempts


CHANGES: dict[str, tuple[str, Call]] = {
    "another's channel": ("pg_layer_membership", lambda layer: layer.group_add("room", "jobs")),
    "flush": ("pg_layer_membership", lambda layer: layer.flush()),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_call_whose_only_attempt_was_lost_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, proxy: Proxy, what: str
) -> None:
    """An idempotent call is tried again. The outcome of the first attempt is unknown."""
    layer = make_layer(dsn=proxy.dsn(connect_timeout=2), send_timeout=4)
    await layer.send("jobs", MESSAGE)
    table, call = CHANGES[what]
    with locked(migrated_dsn, table):
        calling = asyncio.create_task(call(layer))
        await blocked(observer)
        goes_away(proxy)
        with pytest.raises(OutcomeUnknown):
            await calling
    proxy.let_go()


async def test_own_group_add_whose_first_attempt_was_lost_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, proxy: Proxy
) -> None:
    layer = make_layer(dsn=proxy.dsn(connect_timeout=2), listen_dsn=migrated_dsn, send_timeout=4)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    with locked(migrated_dsn, "pg_layer_membership"):
        adding = asyncio.create_task(layer.group_add("other", channel))
        await blocked(observer)
        goes_away(proxy)
        with pytest.raises(OutcomeUnknown):
            await adding
    proxy.let_go()


async def test_own_group_discard_while_the_database_is_away_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, proxy: Proxy
) -> None:
    """The channel receives nothing more. The row is deleted when the database returns."""
    layer = make_layer(dsn=proxy.dsn(connect_timeout=2), listen_dsn=migrated_dsn, send_timeout=2)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    goes_away(proxy)
    with pytest.raises(OutcomeUnknown, match="receives nothing more"):
        await layer.group_discard("room", channel)
    proxy.let_go()
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)
    )


async def test_calls_while_the_database_is_away_raise_layer_unavailable(
    make_layer: MakeLayer, proxy: Proxy
) -> None:
    layer = make_layer(dsn=proxy.dsn(connect_timeout=2), send_timeout=2)
    await layer.send("jobs", MESSAGE)
    goes_away(proxy)
    calls: list[Coroutine[Any, Any, object]] = [
        layer.send("jobs", MESSAGE),
        layer.group_send("room", MESSAGE),
        layer.group_add("room", "jobs"),
        layer.group_count("room"),
        layer.flush(),
    ]
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert type(result) is LayerUnavailable
    proxy.let_go()


async def test_read_whose_connection_was_lost_raises_no_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, proxy: Proxy
) -> None:
    layer = make_layer(dsn=proxy.dsn(connect_timeout=2), send_timeout=4)
    await layer.send("jobs", MESSAGE)
    with locked(migrated_dsn, "pg_layer_membership"):
        counting = asyncio.create_task(layer.group_count("room"))
        await blocked(observer)
        goes_away(proxy)
        with pytest.raises(LayerUnavailable, match="could not be reached") as caught:
            await counting
    assert type(caught.value) is LayerUnavailable
    proxy.let_go()


async def test_flush_that_fails_after_its_first_part_raises_outcome_unknown(
    make_layer: MakeLayer, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PART", 1)
    layer = make_layer()
    for _ in range(3):
        await layer.send("jobs", MESSAGE)
    observer.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (SELECT count(*) FROM pg_layer_message) <= 2 THEN
                RAISE 'no more';
            END IF;
            RETURN OLD;
        END $$
        """
    )
    observer.execute(
        "CREATE TRIGGER refuse BEFORE DELETE ON pg_layer_message FOR EACH ROW"
        " EXECUTE FUNCTION refuse()"
    )
    with pytest.raises(OutcomeUnknown) as caught:
        await layer.flush()
    assert "no more" in str(caught.value.__cause__)
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (2,)


# ---------------------------------------------------------------------- synchronous calls


def test_synchronous_group_add_whose_first_attempt_was_lost_raises_outcome_unknown(
    migrated_dsn: str, observer: Observer, proxy: Proxy
) -> None:
    layer = PostgresChannelLayer(send_timeout=4)

    def call() -> LayerUnavailable | None:
        try:
            layer.sync.group_add("room", "jobs")
        except LayerUnavailable as error:
            return error
        finally:
            connections.close_all()
        return None

    # Connecting has its own limit, set by Django.
    database = {**postgres(proxy.dsn()), "OPTIONS": {"connect_timeout": 2}}
    with (
        on_django(layer, default=database),
        locked(migrated_dsn, "pg_layer_membership"),
        ThreadPoolExecutor(1) as pool,
    ):
        calling = pool.submit(call)
        until_blocked(observer)
        goes_away(proxy)
        assert type(calling.result()) is OutcomeUnknown
    proxy.let_go()
