"""The order of calls that concern one group: which call waits for which."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer import LayerUnavailable
from pg_layer._groups.order import Call, GroupOrder
from tests.project.commands import TIMEOUT


async def passed() -> None:
    """Let the tasks of this loop run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Calls:
    """Calls by name: ``add`` and ``send`` begin one. ``gone``: the sends that went, in order."""

    def __init__(self) -> None:
        self.order = GroupOrder()
        self.changes: dict[str, Call] = {}
        self.sends: dict[str, asyncio.Task[None]] = {}
        self.gone: list[str] = []

    def add(self, name: str, group: str) -> None:
        self.changes[name] = self.order.begin(group, asyncio.get_running_loop())

    def end(self, *names: str) -> None:
        for name in names:
            self.order.end(self.changes.pop(name))

    async def send(self, name: str, *groups: str) -> None:
        self.sends[name] = asyncio.create_task(self._send(name, groups))
        await passed()

    async def _send(self, name: str, groups: tuple[str, ...]) -> None:
        await self.order.wait(groups, TIMEOUT)
        self.gone.append(name)

    async def cancel(self, name: str) -> None:
        self.sends[name].cancel()
        await asyncio.wait((self.sends[name],))

    async def went(self) -> list[str]:
        """Return the sends that went since the last call of this."""
        await passed()
        gone, self.gone = self.gone, []
        return gone


async def test_send_waits_for_the_changes_that_began_before_it_only() -> None:
    calls = Calls()
    calls.add("before1", "a")
    calls.add("before2", "a")
    await calls.send("send", "a")
    calls.add("after", "a")
    calls.end("before2")
    assert await calls.went() == []
    calls.end("before1")
    assert await calls.went() == ["send"]
    calls.end("after")
    assert not len(calls.order)


async def test_send_while_changes_begin_without_a_pause_goes() -> None:
    calls = Calls()
    calls.add("add", "a")
    await calls.send("send", "a")
    for number in range(100):
        calls.add(str(number), "a")
        calls.end("add" if number == 0 else str(number - 1))
        await passed()
    assert await calls.went() == ["send"]


async def test_send_with_no_change_in_flight_does_not_suspend() -> None:
    calls = Calls()
    calls.add("add", "a")
    wait = calls.order.wait(("b", "c"), TIMEOUT)
    with pytest.raises(StopIteration):
        wait.send(None)


async def test_send_to_many_groups_waits_for_all_of_them() -> None:
    calls = Calls()
    calls.add("a", "a")
    calls.add("b", "b")
    await calls.send("many", "a", "b", "c")
    calls.add("c", "c")
    calls.end("b")
    assert await calls.went() == []
    calls.end("a")
    assert await calls.went() == ["many"]


async def test_sends_that_wait_keep_their_order() -> None:
    calls = Calls()
    calls.add("a", "a")
    await calls.send("many", "a", "b")
    await calls.send("b", "b")
    await calls.send("a", "a")
    await calls.send("free", "c")
    assert await calls.went() == ["free"]
    calls.end("a")
    gone = await calls.went()
    assert gone[0] == "many"
    assert sorted(gone) == ["a", "b", "many"]


async def test_send_that_begins_while_an_earlier_one_may_go_does_not_overtake_it() -> None:
    calls = Calls()
    calls.add("add", "a")
    await calls.send("first", "a")
    calls.end("add")
    await asyncio.wait_for(calls._send("second", ("a",)), TIMEOUT)
    assert await calls.went() == ["first", "second"]
    assert not len(calls.order)


async def test_send_that_is_cancelled_leaves_the_line() -> None:
    calls = Calls()
    calls.add("a", "a")
    await calls.send("many", "a", "b")
    await calls.send("b", "b")
    await calls.cancel("many")
    assert await calls.went() == ["b"]
    await calls.send("a", "a")
    await calls.cancel("a")
    calls.end("a")
    assert not len(calls.order)


async def test_send_that_is_cancelled_when_it_may_go_holds_nothing() -> None:
    calls = Calls()
    calls.add("add", "a")
    await calls.send("send", "a")
    calls.end("add")
    await calls.cancel("send")
    assert await calls.went() == []
    assert not len(calls.order)


async def test_send_that_waited_for_too_long_raises_and_names_the_wait() -> None:
    calls = Calls()
    calls.add("add", "a")
    with pytest.raises(LayerUnavailable, match=r"waited for .* s for earlier calls of group_add"):
        await calls.order.wait(("a",), 0.05)
    calls.end("add")
    assert not len(calls.order)


async def test_send_that_may_go_with_too_little_time_left_raises() -> None:
    """The loop did not run meanwhile."""
    calls = Calls()
    calls.add("add", "a")
    waiting = asyncio.create_task(calls.order.wait(("a",), 0.05))
    await passed()
    calls.end("add")
    threading.Event().wait(0.1)
    with pytest.raises(LayerUnavailable, match="It did not take effect"):
        await waiting
    assert not len(calls.order)


# --- Other loops


@pytest.fixture
def stopped() -> Any:
    """Return an event loop that does not run."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize("is_closed", [False, True])
async def test_change_on_a_loop_that_stopped_is_not_waited_for(
    stopped: asyncio.AbstractEventLoop, is_closed: bool
) -> None:
    calls = Calls()
    change = calls.order.begin("a", stopped)
    if is_closed:
        stopped.close()
    await calls.send("send", "a")
    await asyncio.wait_for(calls.sends["send"], TIMEOUT)
    calls.order.end(change)  # its coroutine is deleted later
    assert not len(calls.order)


async def test_change_of_a_loop_that_runs_again_ends_no_newer_one(
    stopped: asyncio.AbstractEventLoop,
) -> None:
    calls = Calls()
    old = calls.order.begin("a", stopped)
    await calls.send("send1", "a")
    assert await calls.went() == ["send1"]
    calls.add("add", "a")
    await calls.send("send2", "a")
    new = calls.order.begin("a", stopped)
    calls.order.end(old)
    assert await calls.went() == []
    calls.end("add")
    assert await calls.went() == ["send2"]
    calls.order.end(new)
    assert not len(calls.order)


async def test_change_on_a_loop_that_stops_later_is_not_waited_for() -> None:
    calls = Calls()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    change = calls.order.begin("a", loop)
    await calls.send("send", "a")
    assert await calls.went() == []
    loop.call_soon_threadsafe(loop.stop)
    await asyncio.wait_for(calls.sends["send"], TIMEOUT)
    await asyncio.to_thread(thread.join)
    calls.order.end(change)
    loop.close()
    assert not len(calls.order)


async def test_send_on_a_closed_loop_holds_nothing() -> None:
    calls = Calls()
    calls.add("add", "a")
    loop = asyncio.new_event_loop()
    coroutine = calls.order.wait(("a",), TIMEOUT)

    async def begin() -> asyncio.Task[float]:
        task = asyncio.ensure_future(coroutine)
        await passed()
        return task

    task = await asyncio.to_thread(loop.run_until_complete, begin())
    loop.close()
    calls.end("add")
    await calls.send("send", "a")
    assert await calls.went() == ["send"]
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()
    assert not len(calls.order)


async def test_change_on_another_thread_lets_the_send_go_when_it_ends() -> None:
    order = GroupOrder()
    ahead = order.begin("a", asyncio.get_running_loop())
    has_gone = threading.Event()
    has_begun = threading.Event()

    async def follow() -> None:
        asyncio.get_running_loop().call_soon(has_begun.set)
        await order.wait(("a",), TIMEOUT)
        has_gone.set()

    thread = threading.Thread(target=lambda: asyncio.run(follow()), daemon=True)
    thread.start()
    assert await asyncio.to_thread(has_begun.wait, TIMEOUT)
    assert not has_gone.is_set()
    order.end(ahead)
    assert await asyncio.to_thread(has_gone.wait, TIMEOUT)
    await asyncio.to_thread(thread.join)
    assert not len(order)


async def test_calls_of_many_threads_leave_nothing_behind() -> None:
    order = GroupOrder()

    async def change(group: str) -> None:
        call = order.begin(group, asyncio.get_running_loop())
        await asyncio.sleep(0)
        order.end(call)

    async def work() -> None:
        for _ in range(200):
            await asyncio.gather(
                *(change(group) for group in "ab"),
                order.wait(("a", "b"), TIMEOUT),
                order.wait(("b",), TIMEOUT),
            )

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert not len(order)


async def test_end_where_the_lock_is_held_is_done_when_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Garbage collection may delete the coroutine of a call in any line, also of `_enter`."""
    calls = Calls()
    calls.add("deleted", "a")
    leave: Callable[[GroupOrder, Call], None] = GroupOrder._leave

    def leave_and_collect(order: GroupOrder, call: Call) -> None:
        if "deleted" in calls.changes:
            calls.end("deleted")
        leave(order, call)

    monkeypatch.setattr(GroupOrder, "_leave", leave_and_collect)
    calls.add("other", "b")
    await calls.send("send", "a", "b")
    calls.end("other")
    assert await calls.went() == ["send"]
    assert not len(calls.order)


@given(st.data())
def test_calls_in_any_schedule_wait_for_no_more_than_the_rule_says(data: st.DataObject) -> None:
    """A send waits for earlier changes of its groups, and behind earlier sends that wait."""
    asyncio.run(_any_schedule(data))


async def _any_schedule(data: st.DataObject) -> None:
    calls = Calls()
    groups = st.sets(st.sampled_from("abc"), min_size=1)
    live: dict[str, set[str]] = {}  # changes in flight and sends that should wait, in order

    def let_go() -> list[str]:
        """Take the sends out that have no call ahead. Return them."""
        gone: list[str] = []
        taken: set[str] = set()
        for name, of in list(live.items()):
            if name not in calls.changes and not of & taken:
                gone.append(name)
                del live[name]
            else:
                taken |= of
        return gone

    for step in range(data.draw(st.integers(0, 25))):
        name = str(step)
        action = data.draw(st.sampled_from(("add", "send", "end", "cancel")))
        waiting = [each for each in live if each not in calls.changes]
        if action == "add":
            live[name] = {data.draw(st.sampled_from("abc"))}
            calls.add(name, *live[name])
        elif action == "send":
            live[name] = data.draw(groups)
            await calls.send(name, *live[name])
        elif action == "end" and calls.changes:
            name = data.draw(st.sampled_from(list(calls.changes)))
            calls.end(name)
            del live[name]
        elif action == "cancel" and waiting:
            name = data.draw(st.sampled_from(waiting))
            del live[name]
            await calls.cancel(name)
        of, gone = dict(live), await calls.went()
        assert sorted(gone) == sorted(let_go())
        for index, name in enumerate(gone):
            for later in gone[index + 1 :]:
                assert int(name) < int(later) or not of[name] & of[later]
    calls.end(*list(calls.changes))
    await passed()
    assert not len(calls.order)
