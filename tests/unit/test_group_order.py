"""The order of calls that concern one group: which call waits for which."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._groups.order import GroupOrder, Phase, Turn
from tests.project.commands import TIMEOUT


def waits(turn: Turn) -> bool:
    return not all(phase.is_first for phase in turn)


class Lines:
    """Calls by name: ``add`` and ``send`` begin one."""

    def __init__(self) -> None:
        self.order = GroupOrder()
        self.turns: dict[str, Turn] = {}
        self.changes: set[str] = set()

    def begin(self, name: str, *groups: str, is_change: bool) -> Turn:
        turn, _ = self.order.begin(groups, asyncio.get_running_loop(), is_change=is_change)
        self.turns[name] = turn
        if is_change:
            self.changes.add(name)
        return turn

    def add(self, name: str, *groups: str) -> Turn:
        return self.begin(name, *groups, is_change=True)

    def send(self, name: str, *groups: str) -> Turn:
        return self.begin(name, *groups, is_change=False)

    def end(self, *names: str) -> None:
        for name in names:
            self.order.end(self.turns.pop(name), asyncio.get_running_loop())

    def blocked(self) -> set[str]:
        return {name for name, turn in self.turns.items() if waits(turn)}

    def groups(self, name: str) -> set[str]:
        return {phase.group for phase in self.turns[name]}


async def test_calls_of_one_kind_do_not_wait_for_each_other() -> None:
    lines = Lines()
    for number in range(3):
        lines.send(f"send{number}", "a")
        lines.add(f"add{number}", "b")
    assert not lines.blocked()


async def test_call_waits_for_earlier_calls_of_the_other_kind_only() -> None:
    lines = Lines()
    lines.send("send1", "a")
    lines.add("add1", "a")
    lines.add("add2", "a")
    lines.send("send2", "a")
    assert lines.blocked() == {"add1", "add2", "send2"}
    lines.end("send1")
    assert lines.blocked() == {"send2"}
    lines.end("add2")
    assert lines.blocked() == {"send2"}
    lines.end("add1")
    assert not lines.blocked()


async def test_calls_of_unrelated_groups_do_not_wait() -> None:
    lines = Lines()
    lines.add("add", "a")
    lines.send("send", "b")
    lines.send("many", "b", "c")
    assert not lines.blocked()


async def test_call_that_concerns_many_groups_waits_for_all_of_them() -> None:
    lines = Lines()
    lines.add("a", "a")
    lines.add("b", "b")
    lines.send("many", "a", "b", "c")
    lines.add("c", "c")
    assert lines.blocked() == {"many", "c"}
    lines.end("b")
    assert lines.blocked() == {"many", "c"}
    lines.end("a")
    assert lines.blocked() == {"c"}
    lines.end("many")
    assert not lines.blocked()


async def test_waiting_call_that_is_cancelled_leaves_the_line() -> None:
    lines = Lines()
    lines.send("send1", "a")
    waiting = lines.add("add", "a")
    lines.send("send2", "a")
    task = asyncio.create_task(lines.order.wait(waiting, time.monotonic() + TIMEOUT))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    lines.end("add", "send1")
    assert not lines.blocked()
    lines.end("send2")
    assert not len(lines.order)


async def test_wait_returns_when_the_call_ahead_ends() -> None:
    lines = Lines()
    lines.add("add", "a")
    turn = lines.send("send", "a")
    task = asyncio.create_task(lines.order.wait(turn, time.monotonic() + TIMEOUT))
    await asyncio.sleep(0)
    assert not task.done()
    lines.end("add")
    await asyncio.wait_for(task, TIMEOUT)
    assert not waits(turn)


async def test_wait_returns_at_the_deadline() -> None:
    lines = Lines()
    lines.add("add", "a")
    turn = lines.send("send", "a")
    await lines.order.wait(turn, time.monotonic() + 0.01)
    assert waits(turn)


async def test_call_on_a_loop_that_stopped_is_not_waited_for() -> None:
    order = GroupOrder()
    stopped = asyncio.new_event_loop()
    ahead, _ = order.begin(("a",), stopped, is_change=True)
    stopped.close()
    turn, _ = order.begin(("a",), asyncio.get_running_loop(), is_change=False)
    await asyncio.wait_for(order.wait(turn, time.monotonic() + TIMEOUT), TIMEOUT)
    assert not waits(turn)
    order.end(turn, asyncio.get_running_loop())
    order.end(ahead, stopped)  # its coroutine is deleted later
    assert not len(order)


async def test_wait_across_threads_returns_when_the_call_ahead_ends() -> None:
    order = GroupOrder()
    ahead, _ = order.begin(("a",), asyncio.get_running_loop(), is_change=True)
    has_begun, has_ended = threading.Event(), threading.Event()

    async def follow() -> None:
        turn, _ = order.begin(("a",), asyncio.get_running_loop(), is_change=False)
        has_begun.set()
        await order.wait(turn, time.monotonic() + TIMEOUT)
        assert not waits(turn)
        order.end(turn, asyncio.get_running_loop())
        has_ended.set()

    thread = threading.Thread(target=lambda: asyncio.run(follow()), daemon=True)
    thread.start()
    await asyncio.to_thread(has_begun.wait, TIMEOUT)
    order.end(ahead, asyncio.get_running_loop())
    assert await asyncio.to_thread(has_ended.wait, TIMEOUT)
    thread.join()
    assert not len(order)


async def test_end_where_the_lock_is_held_is_done_when_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Garbage collection may delete the coroutine of a call in any line of `begin`."""
    lines = Lines()
    lines.add("deleted", "a")
    init = Phase.__init__

    def init_and_collect(phase: Phase, *args: Any, **kwargs: Any) -> None:
        init(phase, *args, **kwargs)
        lines.end("deleted")

    monkeypatch.setattr(Phase, "__init__", init_and_collect)
    lines.send("send", "a")
    assert not lines.blocked()
    lines.end("send")
    assert not len(lines.order)


@given(st.data())
def test_calls_in_any_schedule_run_in_order_and_end(data: st.DataObject) -> None:
    """The rule: a call runs when no earlier call of the other kind on one of its groups does."""
    asyncio.run(_any_schedule(data))


async def _any_schedule(data: st.DataObject) -> None:
    lines = Lines()
    groups = st.sets(st.sampled_from("abc"), min_size=1)
    choices: st.SearchStrategy[bool] = st.booleans()
    live: list[str] = []
    for step in range(data.draw(st.integers(0, 25))):
        if data.draw(choices) and live:  # a call ends, or is cancelled while it waits
            name = data.draw(st.sampled_from(live))
            live.remove(name)
            lines.end(name)
        else:
            name = str(step)
            lines.begin(name, *data.draw(groups), is_change=data.draw(choices))
            live.append(name)
        for index, name in enumerate(live):
            turn = lines.turns[name]
            met = [each for each in live[:index] if lines.groups(each) & lines.groups(name)]
            if any((each in lines.changes) != (name in lines.changes) for each in met):
                assert waits(turn)
            elif not met:
                assert not waits(turn)
    lines.end(*live)
    assert not len(lines.order)
