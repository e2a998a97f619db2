"""Transactions of an application that also send, with commits that take 3 ms."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psycopg
from django.db import connection, transaction
from psycopg import sql

from benchmarks.compared.base import Reading, Result, Room, Setting, percentiles
from benchmarks.compared.children import CAPACITY, GROUP, Child, Children, message
from benchmarks.statistics import percentile
from pg_layer import PostgresChannelLayer

#: Clients are threads of several processes, because one Python process would be the limit.
PROCESSES = 4
#: Transactions a second of all clients, and other messages a second, in the paced measurement.
PACE = 200

NONE = "without a send"
_FUNCTION = "SELECT pg_layer_group_send(%s, %s::jsonb)"
_Send = Callable[[PostgresChannelLayer], object]


def _no_send(layer: PostgresChannelLayer) -> None:
    pass


def _by_layer(layer: PostgresChannelLayer) -> None:
    layer.sync.group_send(GROUP, message(0))


def _by_function(layer: PostgresChannelLayer) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_FUNCTION, [GROUP, json.dumps(message(0))])


SENDS: Mapping[str, _Send] = {
    NONE: _no_send,
    "layer.sync.group_send": _by_layer,
    "pg_layer_group_send() in SQL": _by_function,
}


@dataclass(frozen=True)
class Order:
    """An order. ``rate``: transactions a second of each client, or 0 without a limit."""

    what: str
    seconds: float
    rate: float


def unpaced(setting: Setting, *, clients: int) -> Result:
    """Clients without a pause: transactions/s, and the duration of a transaction."""
    readings: list[Reading] = []
    with _application(setting.dsn, clients) as (room, processes):
        alone = 0.0
        for what in SENDS:
            times = _run(room, processes, Order(what, setting.seconds, 0))
            rate = len(times) / setting.seconds
            alone = alone or rate
            readings += room.missing()
            readings.append(Reading(what, "transactions/s", rate))
            if what != NONE:
                readings.append(Reading(what, "share of those without a send", rate / alone))
            readings += percentiles(what, times, 50)
    return Result(readings)


def paced(setting: Setting, *, clients: int) -> Result:
    """200 transactions a second of all clients beside 200 messages a second."""
    readings: list[Reading] = []
    seconds = 2 * setting.seconds
    with _application(setting.dsn, clients) as (room, processes):
        for what in SENDS:
            room.ages()
            room.sender.send(("pace", room.channels[1], seconds, PACE))
            times = _run(room, processes, Order(what, seconds, PACE / clients))
            sent, _ = room.sender.receive()
            room.sent(sent)
            readings += room.missing()
            readings += [
                Reading(what, "transaction, p50, ms", percentile(times, 50)),
                *percentiles(f"{what}: other messages", room.ages(), 50, 99),
            ]
    return Result(readings)


@contextmanager
def _application(dsn: str, clients: int) -> Iterator[tuple[Room, list[Child]]]:
    """Start two receiving processes, and processes of the application with their threads.

    A commit that waits for the disk takes 3 ms. The layer's own commits do not wait for the disk.
    """
    with Children() as children, psycopg.connect(dsn, autocommit=True) as observer:
        observer.execute("CREATE TABLE application (text text)")
        name = sql.Identifier(observer.info.dbname)
        for option, value in (("commit_delay", 3000), ("commit_siblings", 0)):
            observer.execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(name, sql.Identifier(option), value)
            )
        room = Room(children, observer, dsn, 2)
        yield room, [children.start(_clients, clients // PROCESSES) for _ in range(PROCESSES)]


def _run(room: Room, processes: list[Child], order: Order) -> list[float]:
    """Run transactions in all clients; return their durations in milliseconds."""
    for process in processes:
        process.send(order)
    for process in processes:
        process.receive()
    for process in processes:
        process.send("start")
    times: list[float] = []
    for process in processes:
        total, found = process.receive(order.seconds + 60)
        times += found
        if order.what != NONE:
            room.sent_to_group(total)
    return times


def _clients(pipe: Connection, threads: int) -> None:
    """Run transactions in threads that each have a connection of Django, as ordered.

    At an `Order`, connect and answer "ready". At "start", run, then answer with the number of
    transactions and the milliseconds of each that ended in time.
    """
    layer = PostgresChannelLayer(using="default", capacity=CAPACITY)
    while order := pipe.recv():
        gate = threading.Barrier(threads + 1)
        with ThreadPoolExecutor(threads) as pool:
            phases = [index / threads for index in range(threads)]
            clients = [pool.submit(_client, layer, order, phase, gate) for phase in phases]
            with suppress(
                threading.BrokenBarrierError
            ):  # a client has failed; its result gives the reason
                gate.wait()
                pipe.send("ready")
                pipe.recv()
                gate.wait()
            results = [client.result() for client in clients]
        total = sum(total for total, _ in results)
        pipe.send((total, [ms for _, times in results for ms in times]))


def _client(
    layer: PostgresChannelLayer, order: Order, phase: float, gate: threading.Barrier
) -> tuple[int, list[float]]:
    send = SENDS[order.what]
    pause = 1 / order.rate if order.rate else 0.0
    times: list[float] = []
    total = 1
    try:
        _transaction(layer, send)  # connects
        gate.wait()
        gate.wait()
        start = time.monotonic()
        due = start + phase * pause
        while due < start + order.seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            _transaction(layer, send)
            total += 1
            now = time.monotonic()
            if pause or now < start + order.seconds:
                times.append((now - due) * 1e3)
            due = due + pause if pause else now
    except BaseException:
        gate.abort()
        raise
    finally:
        connection.close()
    return total, times


def _transaction(layer: PostgresChannelLayer, send: _Send) -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO application VALUES ('row')")
        send(layer)
