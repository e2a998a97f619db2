"""The order of calls that concern one group: which call waits for which."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._groups import order as order_module
from pg_layer._groups.order import GroupOrder, Turn
from tests.project.commands import TIMEOUT


class Lines:
    """Calls by name: ``add`` and ``send`` begin one, and return its task's turn."""

    def __init__(self) -> None:
        self.order = GroupOrder()
        self.ran: list[str] = []
        self.turns: dict[str, Turn] = {}

    def begin(self, name: str, *groups: str, is_change: bool) -> Turn:
        turn = self.order.begin(groups, asyncio.get_running_loop(), is_change=is_change)
        self.turns[name] = turn
        return turn

    def add(self, name: str, *groups: str) -> Turn:
        return self.begin(name, *groups, is_change=True)

    def send(self, name: str, *groups: str) -> Turn:
        return self.begin(name, *groups, is_change=False)

    def end(self, *names: str) -> None:
        for name in names:
            self.order.end(self.turns[name])

    def blocked(self) -> set[str]:
        return {name for name, turn in self.turns.items() if turn.blocked and not turn.is_over}


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
    assert not turn.blocked


async def test_wait_returns_at_the_deadline() -> None:
    lines = Lines()
    lines.add("add", "a")
    turn = lines.send("send", "a")
    await lines.order.wait(turn, time.monotonic() + 0.01)
    assert turn.blocked


async def test_call_on_a_loop_that_stopped_is_not_waited_for() -> None:
    order = GroupOrder()
    stopped = asyncio.new_event_loop()
    ahead = order.begin(("a",), stopped, is_change=True)
    stopped.close()
    turn = order.begin(("a",), asyncio.get_running_loop(), is_change=False)
    await asyncio.wait_for(order.wait(turn, time.monotonic() + TIMEOUT), TIMEOUT)
    assert not turn.blocked
    order.end(turn)
    order.end(ahead)  # its coroutine is deleted later
    assert not len(order)


async def test_wait_across_threads_returns_when_the_call_ahead_ends() -> None:
    order = GroupOrder()
    ahead = order.begin(("a",), asyncio.get_running_loop(), is_change=True)
    has_begun, has_ended = threading.Event(), threading.Event()

    async def follow() -> None:
        turn = order.begin(("a",), asyncio.get_running_loop(), is_change=False)
        has_begun.set()
        await order.wait(turn, time.monotonic() + TIMEOUT)
        assert not turn.blocked
        order.end(turn)
        has_ended.set()

    thread = threading.Thread(target=lambda: asyncio.run(follow()), daemon=True)
    thread.start()
    await asyncio.to_thread(has_begun.wait, TIMEOUT)
    order.end(ahead)
    assert await asyncio.to_thread(has_ended.wait, TIMEOUT)
    thread.join()
    assert not len(order)


async def test_end_where_the_lock_is_held_is_done_when_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Garbage collection may delete the coroutine of a call in any line of `begin`."""
    lines = Lines()
    lines.add("deleted", "a")
    init = order_module._Phase.__init__

    def init_and_collect(phase: order_module._Phase, turn: Turn) -> None:
        init(phase, turn)
        lines.end("deleted")

    monkeypatch.setattr(order_module._Phase, "__init__", init_and_collect)
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
            conflicts = [
                each
                for each in (lines.turns[earlier] for earlier in live[:index])
                if each.is_change != turn.is_change and set(each.groups) & set(turn.groups)
            ]
            if conflicts:
                assert turn.blocked
            if not conflicts and not any(
                set(lines.turns[earlier].groups) & set(turn.groups) for earlier in live[:index]
            ):
                assert not turn.blocked
    lines.end(*live)
    assert not len(lines.order)
