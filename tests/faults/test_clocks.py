"""Machines whose clocks are an hour off, either way: only the database's clock counts.

The processes run under libfaketime. What is faked is the wall clock of the whole process, Python's and
libpq's; the monotonic clock stays.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pg_layer import PostgresChannelLayer
from tests.components import require_executable
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, open_layer, receive, until
from tests.project.commands import Process, manage, started, succeeded

pytestmark = pytest.mark.faketime

EXPIRY = 3.0
OPTIONS: dict[str, object] = {"lease": 3, "heartbeat": 0.5, "sweep_interval": 0, "capacity": 1000}
HOURS = ["+1h", "-1h"]


@pytest.fixture(scope="session")
def faketime() -> dict[str, str]:
    """The environment in which wall clocks are wrong, but for FAKETIME itself."""
    program = require_executable("faketime", component="faketime")
    said = subprocess.run(
        [program, "--exclude-monotonic", "-f", "+0", "env"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    preload = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)["LD_PRELOAD"]
    return {"LD_PRELOAD": preload, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    fake: dict[str, str],
    offset: str,
    *arguments: str,
) -> Process:
    """This module's `main` in a process whose clock is wrong by that much."""
    with monkeypatch.context() as patched:
        for name, value in {**fake, "FAKETIME": offset}.items():
            patched.setenv(name, value)
        process = stack.enter_context(started("", "-m", "tests.faults.test_clocks", *arguments))
    # Else nothing is tested.
    wrong = float(process.expect("clock ").split()[1]) - time.time()
    assert wrong == pytest.approx(3600 if offset == "+1h" else -3600, abs=60)
    return process


# ---------------------------------------------------------------------- in the other process


async def main(dsn: str, expiry: float | None) -> None:
    """Be a member of the room and a worker; do what is told, line by line."""
    options = {**OPTIONS, **({"expiry": expiry, "group_expiry": 60} if expiry else {})}
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", channel)
        print(f"channel {channel}", flush=True)
        while (line := await asyncio.to_thread(sys.stdin.readline)) != "end\n":
            await _obey(layer, channel, *json.loads(line))
    print("ended", flush=True)


async def _obey(layer: PostgresChannelLayer, channel: str, what: str, *arguments: object) -> None:
    match what, arguments:
        case "receive", (str(name), int(count)):
            found = [(await receive(layer, name or channel))["number"] for _ in range(count)]
            print(f"received {json.dumps(found)}", flush=True)
        case "send", (str(name), list(numbers)):
            for number in numbers:
                await layer.send(name, {"number": number})
            print("sent", flush=True)
        case "group_send", (str(name), list(numbers)):
            for number in numbers:
                await layer.group_send(name, {"number": number})
            print("sent", flush=True)
        case _:
            raise ValueError(what)


def say(process: Process, *what: object) -> None:
    process.say(json.dumps(what))


def numbers(process: Process) -> list[int]:
    found: list[int] = json.loads(process.expect("received ").partition(" ")[2])
    return found


# ---------------------------------------------------------------------- tests


async def test_processes_whose_clocks_disagree_by_two_hours(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    ending: ExitStack,
) -> None:
    right = make_layer(**OPTIONS)
    own = await right.new_channel()
    await listen(right)
    await right.group_add("room", own)
    fast, slow = (start(ending, monkeypatch, faketime, offset, migrated_dsn) for offset in HOURS)
    channels = {process: process.expect("channel ").split()[1] for process in (fast, slow)}
    for sender, receiver in ((fast, slow), (slow, fast)):
        say(sender, "send", channels[receiver], list(range(20)))
        say(sender, "send", own, list(range(20)))
        say(receiver, "receive", "", 20)
        assert await asyncio.to_thread(numbers, receiver) == list(range(20))
        assert [(await receive(right, own))["number"] for _ in range(20)] == list(range(20))
        # Members whose leases others renew, by the database's clock alone.
        say(sender, "group_send", "room", list(range(100, 120)))
        for process in (sender, receiver):
            say(process, "receive", "", 20)
            assert await asyncio.to_thread(numbers, process) == list(range(100, 120))
        assert [(await receive(right, own))["number"] for _ in range(20)] == list(range(100, 120))
        say(sender, "send", "jobs", list(range(200, 220)))
        say(receiver, "receive", "jobs", 20)
        assert await asyncio.to_thread(numbers, receiver) == list(range(200, 220))

    # Several leases' time later they live, to others and to a sweeper, whose clock is wrong as well.
    [(before,)] = observer.execute("SELECT min(expires_at) FROM pg_layer_client").fetchall()
    for offset in HOURS:
        with monkeypatch.context() as patched:
            for name, value in {**faketime, "FAKETIME": offset}.items():
                patched.setenv(name, value)
            swept = await asyncio.to_thread(manage, migrated_dsn, "pg_layer_sweep", "--once")
        assert succeeded(swept).split()[3::2] == ["0", "0"]
    await until(
        lambda: observer.execute(
            "SELECT 1 FROM pg_layer_client HAVING min(expires_at) > %s + interval '3 seconds'",
            (before,),
        ).fetchone()
    )
    [(least, most)] = observer.execute(
        "SELECT extract(epoch FROM min(expires_at) - clock_timestamp())::float8,"
        " extract(epoch FROM max(expires_at) - clock_timestamp())::float8 FROM pg_layer_client"
    ).fetchall()
    assert 0 < least <= most <= 3
    await right.group_send("room", {"number": 300})
    for process in (fast, slow):
        say(process, "receive", "", 1)
        assert await asyncio.to_thread(numbers, process) == [300]
        process.say("end")
        process.expect("ended")
        assert await asyncio.to_thread(process.end) == 0
        # But for what asyncio says of a slow machine in development mode.
        assert not [line for line in process.errors if not line.startswith("Executing <")]


@pytest.mark.parametrize("offset", HOURS)
async def test_expiry_with_a_wrong_clock(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    ending: ExitStack,
    offset: str,
) -> None:
    right = make_layer(**OPTIONS, expiry=EXPIRY)
    own = await right.new_channel()
    await listen(right)
    await right.group_add("room", own)
    wrong = start(ending, monkeypatch, faketime, offset, migrated_dsn, str(EXPIRY))
    channel = wrong.expect("channel ").split()[1]

    # Memberships end by the same clock.
    [(left,)] = observer.execute(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM pg_layer_membership"
        " WHERE channel = %s",
        (channel,),
    ).fetchall()
    assert 0 < left <= 60

    # In time: not one is missing, whoever's clock it was sent by.
    await right.send(channel, {"number": 0})
    await right.group_send("room", {"number": 1})
    say(wrong, "receive", "", 2)
    assert await asyncio.to_thread(numbers, wrong) == [0, 1]
    say(wrong, "send", own, [2, 3])
    wrong.expect("sent")
    assert [(await receive(right, own))["number"] for _ in range(3)] == [1, 2, 3]

    # Too late: none is delivered, neither from the channel queue nor from the table.
    await right.send(channel, {"number": 4})
    say(wrong, "send", own, [5])
    say(wrong, "send", "jobs", [6])
    for _ in range(2):
        wrong.expect("sent")
    await until(
        lambda: observer.execute(
            "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_layer_message WHERE expires_at > clock_timestamp())"
        ).fetchone()
    )
    lasting = make_layer(**OPTIONS)
    for name in (channel, own, "jobs"):
        await lasting.send(name, {"number": 7})
    say(wrong, "receive", "", 1)
    assert await asyncio.to_thread(numbers, wrong) == [7]
    assert (await receive(right, own))["number"] == 7
    say(wrong, "receive", "jobs", 1)
    assert await asyncio.to_thread(numbers, wrong) == [7]


async def test_a_killed_process_with_a_fast_clock_counts_no_longer_than_its_lease(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    ending: ExitStack,
) -> None:
    """Its lease ends by the database's clock, and with it its membership counts no more."""
    right = make_layer(**OPTIONS)
    own = await right.new_channel()
    await listen(right)
    await right.group_add("room", own)
    fast = start(ending, monkeypatch, faketime, "+1h", migrated_dsn)
    channel = fast.expect("channel ").split()[1]
    assert sorted(await right.group_channels("room")) == sorted([own, channel])
    fast.close()
    [(left,)] = observer.execute(
        "SELECT extract(epoch FROM max(expires_at) - clock_timestamp())::float8 FROM pg_layer_client"
    ).fetchall()
    assert left <= 3
    deadline = time.monotonic() + 20
    while await right.group_channels("room") != [own]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    print(f"clock {time.time()}", flush=True)
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None))
