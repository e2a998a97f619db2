"""Group messages: their cost for the database, their throughput and their latency."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Literal

from benchmarks.compared.base import Reading, Result, Setting, open_room, percentiles
from benchmarks.compared.children import paused

State = Literal["gone", "stopped", "live"]

#: How `processes` sends: concurrent ``group_send`` calls, and messages for each second.
_WAYS = {"one at a time": (1, 1_000), "64 at once": (64, 4_000)}
#: A bound for the deliveries of one part. Two cores must complete them before messages expire.
_DELIVERIES = 25_600
_SLOWEST = 5_000


def processes(setting: Setting, *, count: int, state: State) -> Result:
    """One member in each process: messages/s that the database accepts, and WAL.

    ``state`` is the state of the receiving processes while the sender sends. "gone": they have
    joined and were killed, so their memberships exist but no process listens. "stopped": SIGSTOP
    has stopped them while they listen, so they do not compete with the database for the cores.
    "live": they receive. The WAL is read when the rows are deleted, which is after the stopped
    processes have continued and received everything.
    """
    readings: list[Reading] = []
    readers = 1 if state == "gone" else count
    most = {way: _messages(setting.seconds, rate, readers) for way, (_, rate) in _WAYS.items()}
    expiry = 10 + 2 * setting.seconds
    if state != "gone":
        expiry += max(most.values()) * count / _SLOWEST
    with open_room(setting.dsn, count, expiry=expiry) as room:
        if state == "gone":
            room.kill_receivers()
        for way, (at_once, _) in _WAYS.items():
            wal, start = room.wal(), time.monotonic()
            with paused(room.receivers) if state == "stopped" else nullcontext():
                order = ("flood", at_once, most[way], 10 * setting.seconds, 0)
                sent, seconds = room.sender.request(order)
            if state != "gone":
                room.sent_to_group(sent)
                readings += room.missing(expiry)
            written = room.cost(room.wal, wal, start, expiry)
            readings += [
                Reading(way, "messages/s", sent / seconds),
                Reading(way, "WAL with deletion, bytes a message", written / sent),
            ]
    return Result(readings)


def _messages(seconds: float, rate: float, processes: int) -> int:
    return int(seconds * min(rate, _DELIVERIES / processes)) or 1


def receivers(setting: Setting, *, count: int) -> Result:
    """One member in each process, 64 concurrent sends: deliveries/s and p50.

    The sender is at most 100 messages ahead of the slowest process. Otherwise the latency would be
    the length of a queue.
    """
    with open_room(setting.dsn, count) as room:
        sent, _ = room.sender.request(("flood", 64, 10_000_000, setting.seconds, 100))
        room.sent_to_group(sent)
        readings = room.missing()
        seconds = (room.board.latest_ns - room.board.start_ns) / 1e9
        what = "64 at once"
        readings.append(Reading(what, "deliveries/s", sent * len(room.channels) / seconds))
        return Result([*readings, *percentiles(what, room.ages(), 50)])


def cpu(setting: Setting, *, count: int) -> Result:
    """300 messages a second to one member in each process: CPU of the database."""
    expiry = 10 + 2 * setting.seconds
    with open_room(setting.dsn, count, expiry=expiry) as room:
        before, start = room.cpu(), time.monotonic()
        sent, _ = room.sender.request(("pace", "", 2 * setting.seconds, 300))
        room.sent_to_group(sent)
        readings = room.missing()
        what = "300 messages/s"
        readings += percentiles(what, room.ages(), 50)
        used = room.cost(room.cpu, before, start, expiry)
        return Result(
            [
                *readings,
                Reading(what, "database CPU with deletion, s per 1,000", used / sent * 1000),
            ]
        )


def latency(setting: Setting, *, count: int, members: int, rate: float) -> Result:
    """``rate`` messages a second to members in several processes: latency."""
    with open_room(setting.dsn, count, members) as room:
        sent, _ = room.sender.request(("pace", "", 2 * setting.seconds, rate))
        room.sent_to_group(sent)
        readings = room.missing()
        return Result([*readings, *percentiles(f"{rate:g} messages/s", room.ages(), 50, 99)])
