"""Machines whose clocks are wrong by an hour: only the database's clock counts.

The processes run under libfaketime. It fakes the wall clock of the whole process, Python's
and libpq's. The monotonic clock is not faked.
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
OPTIONS: dict[str, object] = {"lease": 3, "heartbeat": 1, "sweep_interval": 0, "capacity": 1000}
HOURS = ["+1h", "-1h"]


@pytest.fixture(scope="session")
def faketime() -> dict[str, str]:
    """Return the environment of a process with a wrong clock, without FAKETIME itself."""
    program = require_executable("faketime", component="faketime")
    output = subprocess.run(
        [program, "--exclude-monotonic", "-f", "+0", "env"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    preload = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)["LD_PRELOAD"]
    return {"LD_PRELOAD": preload, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}


@pytest.fixture
def exit_stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_with_offset(
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    fake: dict[str, str],
    offset: str,
    *arguments: str,
) -> Process:
    """Run ``main()`` of this module in a process whose clock is wrong by the offset."""
    with monkeypatch.context() as patched:
        for name, value in {**fake, "FAKETIME": offset}.items():
            patched.setenv(name, value)
        process = stack.enter_context(started("", "-m", "tests.faults.test_clocks", *arguments))
    # Without a wrong clock the test would prove nothing.
    wrong = float(process.expect("clock ").split()[1]) - time.time()
    assert wrong == pytest.approx(3600 if offset == "+1h" else -3600, abs=60)
    return process


# ---------------------------------------------------------------------- in the other process


async def main(dsn: str, expiry: float | None) -> None:
    """Be a member of the room and a worker. Execute commands, one in each line."""
    options = {**OPTIONS, **({"expiry": expiry, "group_expiry": 60} if expiry else {})}
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", channel)
        print(f"channel {channel}", flush=True)
        while (line := await asyncio.to_thread(sys.stdin.readline)) != "end\n":
            await _answer(layer, channel, *json.loads(line))
    print("ended", flush=True)


async def _answer(
    layer: PostgresChannelLayer, channel: str, command: str, *arguments: object
) -> None:
    match command, arguments:
        case "receive", (str(name), int(count)):
            found = [(await receive(layer, name or channel))["number"] for _ in range(count)]
            print(f"received {json.dumps(found)}", flush=True)
        case "send", (str(name), list(received_numbers)):
            for number in received_numbers:
                await layer.send(name, {"number": number})
            print("sent", flush=True)
        case "group_send", (str(name), list(received_numbers)):
            for number in received_numbers:
                await layer.group_send(name, {"number": number})
            print("sent", flush=True)
        case _:
            raise ValueError(command)


def request(process: Process, *command: object) -> None:
    process.say(json.dumps(command))


def received_numbers(process: Process) -> list[int]:
    found: list[int] = json.loads(process.expect("received ").partition(" ")[2])
    return found


# ---------------------------------------------------------------------- tests


async def test_processes_with_clocks_two_hours_apart_deliver_and_keep_their_leases(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    exit_stack: ExitStack,
) -> None:
    correct = make_layer(**OPTIONS)
    own = await correct.new_channel()
    await listen(correct)
    await correct.group_add("room", own)
    fast, slow = (
        start_with_offset(exit_stack, monkeypatch, faketime, offset, migrated_dsn)
        for offset in HOURS
    )
    channels = {process: process.expect("channel ").split()[1] for process in (fast, slow)}
    for sender, receiver in ((fast, slow), (slow, fast)):
        request(sender, "send", channels[receiver], list(range(20)))
        request(sender, "send", own, list(range(20)))
        request(receiver, "receive", "", 20)
        assert await asyncio.to_thread(received_numbers, receiver) == list(range(20))
        assert [(await receive(correct, own))["number"] for _ in range(20)] == list(range(20))
        # Group messages: the members count because the database's clock decides about leases.
        request(sender, "group_send", "room", list(range(100, 120)))
        for process in (sender, receiver):
            request(process, "receive", "", 20)
            assert await asyncio.to_thread(received_numbers, process) == list(range(100, 120))
        assert [(await receive(correct, own))["number"] for _ in range(20)] == list(range(100, 120))
        request(sender, "send", "jobs", list(range(200, 220)))
        request(receiver, "receive", "jobs", 20)
        assert await asyncio.to_thread(received_numbers, receiver) == list(range(200, 220))

    # After several leases the processes still count, also for a sweeper with a wrong clock.
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
    await correct.group_send("room", {"number": 300})
    for process in (fast, slow):
        request(process, "receive", "", 1)
        assert await asyncio.to_thread(received_numbers, process) == [300]
        process.say("end")
        process.expect("ended")
        assert await asyncio.to_thread(process.end) == 0
        # In development mode asyncio logs slow callbacks: ignore these lines.
        assert not [line for line in process.errors if not line.startswith("Executing <")]


@pytest.mark.parametrize("offset", HOURS)
async def test_expiry_with_a_wrong_clock_follows_the_clock_of_the_database(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    exit_stack: ExitStack,
    offset: str,
) -> None:
    correct = make_layer(**OPTIONS, expiry=EXPIRY)
    own = await correct.new_channel()
    await listen(correct)
    await correct.group_add("room", own)
    wrong = start_with_offset(exit_stack, monkeypatch, faketime, offset, migrated_dsn, str(EXPIRY))
    channel = wrong.expect("channel ").split()[1]

    # The membership ends by the database's clock as well.
    [(left,)] = observer.execute(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM pg_layer_membership"
        " WHERE channel = %s",
        (channel,),
    ).fetchall()
    assert 0 < left <= 60

    # Before the expiry: all messages arrive, whichever process sent them.
    await correct.send(channel, {"number": 0})
    await correct.group_send("room", {"number": 1})
    request(wrong, "receive", "", 2)
    assert await asyncio.to_thread(received_numbers, wrong) == [0, 1]
    request(wrong, "send", own, [2, 3])
    wrong.expect("sent")
    assert [(await receive(correct, own))["number"] for _ in range(3)] == [1, 2, 3]

    # After the expiry: none is delivered, neither from the channel queue nor from the table.
    await correct.send(channel, {"number": 4})
    request(wrong, "send", own, [5])
    request(wrong, "send", "jobs", [6])
    for _ in range(2):
        wrong.expect("sent")
    await until(
        lambda: observer.execute(
            "SELECT 1 WHERE NOT EXISTS"
            " (SELECT FROM pg_layer_message WHERE expires_at > clock_timestamp())"
        ).fetchone()
    )
    lasting = make_layer(**OPTIONS)
    for name in (channel, own, "jobs"):
        await lasting.send(name, {"number": 7})
    request(wrong, "receive", "", 1)
    assert await asyncio.to_thread(received_numbers, wrong) == [7]
    assert (await receive(correct, own))["number"] == 7
    request(wrong, "receive", "jobs", 1)
    assert await asyncio.to_thread(received_numbers, wrong) == [7]


async def test_killed_process_with_a_fast_clock_is_counted_no_longer_than_its_lease(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    faketime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    exit_stack: ExitStack,
) -> None:
    """Its lease ends by the database's clock. Its membership is not counted after that."""
    correct = make_layer(**OPTIONS)
    own = await correct.new_channel()
    await listen(correct)
    await correct.group_add("room", own)
    fast = start_with_offset(exit_stack, monkeypatch, faketime, "+1h", migrated_dsn)
    channel = fast.expect("channel ").split()[1]
    assert sorted(await correct.group_channels("room")) == sorted([own, channel])
    fast.close()
    [(left,)] = observer.execute(
        "SELECT extract(epoch FROM max(expires_at) - clock_timestamp())::float8"
        " FROM pg_layer_client"
    ).fetchall()
    assert left <= 3
    deadline = time.monotonic() + 20
    while await correct.group_channels("room") != [own]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    print(f"clock {time.time()}", flush=True)
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None))
