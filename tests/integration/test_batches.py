"""What is written together is treated as if it were written one by one: both functions agree."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Observer

CLIENTS = ("c0", "c1", "c2")
NORMAL = ("n", "n.1", "n.23", "n.345")
SPECIFIC = tuple(f"specific.{client}!{n}" for client in CLIENTS for n in range(2))
GROUPS = ("g", "h", "nobody")

channels = st.sampled_from(NORMAL + SPECIFIC)
ends = st.sampled_from(["infinity", "-infinity"])
expiries = st.sampled_from([100.0, 200.0])


def capacity_of(channel: str) -> int:
    return 1 + len(channel) % 4


class State(NamedTuple):
    """The leases, the memberships and what waits, each with its end."""

    leases: dict[str, str]
    members: dict[tuple[str, str], str]
    waiting: list[tuple[str, str]]


states = st.builds(
    State,
    st.dictionaries(st.sampled_from(CLIENTS), ends),
    st.dictionaries(st.tuples(st.sampled_from(GROUPS[:2]), channels), ends, max_size=10),
    st.lists(st.tuples(channels, ends), max_size=8),
)
# A few are written one by one in any case, more are not.
group_sends = st.lists(
    st.tuples(st.sampled_from(GROUPS), st.binary(max_size=3), expiries, st.none() | channels),
    min_size=1,
    max_size=9,
)
sends = st.lists(
    channels.flatmap(
        lambda name: st.tuples(st.just(name), st.binary(max_size=3), expiries, st.just(capacity_of(name)))
    ),
    min_size=1,
    max_size=9,
)

examples = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arrange(observer: Observer, state: State) -> None:
    for client, end in state.leases.items():
        observer.execute(
            "INSERT INTO pg_layer_client (inbox, expires_at) VALUES (%s, %s)", (f"asgi!{client}", end)
        )
    for (group, channel), end in state.members.items():
        observer.execute(
            "INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at, capacity)"
            " VALUES (%s, pg_layer_inbox('asgi', %s), %s, %s, %s)",
            (group, channel, channel, end, capacity_of(channel) if channel in NORMAL else None),
        )
    for channel, end in state.waiting:
        observer.execute(
            "INSERT INTO pg_layer_message (inbox, nonce, channel, expires_at)"
            " VALUES (pg_layer_inbox('asgi', %s), 0, %s, %s)",
            (channel, channel, end),
        )


def written(observer: Observer) -> list[tuple[Any, ...]]:
    """The rows that are new, in their order; when they end in hundreds of seconds."""
    return observer.execute(
        "SELECT inbox, channel, group_name, excluded, payload,"
        " round(extract(epoch FROM expires_at - clock_timestamp()) / 100)"
        " FROM pg_layer_message WHERE nonce <> 0 ORDER BY id"
    ).fetchall()


@examples
@given(states, group_sends)
def test_group_sends(observer: Observer, state: State, ops: list[tuple[Any, ...]]) -> None:
    with observer.transaction(force_rollback=True):
        arrange(observer, state)
        positions, missed = observer.execute(
            "SELECT * FROM pg_layer_group_send_batch("
            "'asgi', %s::text[], %s::bytea[], %s::float8[], %s::text[])",
            [list(values) for values in zip(*ops, strict=True)],
        ).fetchall()[0]
        together = sorted(zip(positions or (), missed or (), strict=True)), written(observer)
    with observer.transaction(force_rollback=True):
        arrange(observer, state)
        all_missed = []
        for position, op in enumerate(ops, 1):
            ((missed,),) = observer.execute(
                "SELECT pg_layer_group_send_one('asgi', %s, %s, %s, %s)", op
            ).fetchall()
            all_missed += [(position, channel) for channel in missed or ()]
        one_by_one = sorted(all_missed), written(observer)
    assert together == one_by_one


@examples
@given(states, sends, st.booleans())
def test_sends(observer: Observer, state: State, ops: list[tuple[Any, ...]], are_counted: bool) -> None:
    floors: list[list[object] | None] = [[], []] if are_counted else [None, None]
    with observer.transaction(force_rollback=True):
        arrange(observer, state)
        ((full,),) = observer.execute(
            "SELECT full_positions FROM pg_layer_send_batch("
            "'asgi', %s::text[], %s::bytea[], %s::float8[], %s::integer[], %s::text[], %s::bigint[])",
            [
                *[list(values) for values in zip(*ops, strict=True)],
                *floors,
            ],
        ).fetchall()
        together = sorted(full or ()), written(observer)
    with observer.transaction(force_rollback=True):
        arrange(observer, state)
        all_full = []
        for position, op in enumerate(ops, 1):
            ((seen,),) = observer.execute(
                "SELECT pg_layer_send_one('asgi', %s, %s, %s, %s, %s)", (*op, 0 if are_counted else None)
            ).fetchall()
            if seen is None:
                all_full.append(position)
        one_by_one = all_full, written(observer)
    assert together == one_by_one
