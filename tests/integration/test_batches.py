"""Batches write the same rows as single statements."""

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


class Membership(NamedTuple):
    """A membership row: whether the channel is in the group, and until when."""

    present: bool
    end: str


class State(NamedTuple):
    """Whether membership rows are known to be complete, the memberships, and waiting messages."""

    is_steady: bool
    members: dict[tuple[str, str], list[Membership]]
    waiting: list[tuple[str, str]]


memberships = st.lists(st.builds(Membership, st.booleans(), ends), min_size=1, max_size=2)
states = st.builds(
    State,
    st.booleans(),
    st.dictionaries(st.tuples(st.sampled_from(GROUPS[:2]), channels), memberships, max_size=10),
    st.lists(st.tuples(channels, ends), max_size=8),
)
group_sends = st.lists(
    st.tuples(st.sampled_from(GROUPS), st.binary(max_size=3), expiries, st.none() | channels),
    min_size=1,
    max_size=9,
)
sends = st.lists(
    channels.flatmap(
        lambda name: st.tuples(
            st.just(name), st.binary(max_size=3), expiries, st.just(capacity_of(name))
        )
    ),
    min_size=1,
    max_size=9,
)

examples = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def arrange(observer: Observer, state: State) -> int:
    """Write the state. Return the largest id of a message in it."""
    observer.execute(
        "INSERT INTO pg_layer_lease_clock (prefix, boot, lease, renewed_at, steady_since)"
        " VALUES ('asgi', pg_layer_current_boot(), 60, clock_timestamp(),"
        " clock_timestamp() - make_interval(secs => %s))",
        (3600 if state.is_steady else 0,),
    )
    for (group, channel), claims in state.members.items():
        for number, (present, end) in enumerate(claims):
            is_normal = channel in NORMAL
            observer.execute(
                "INSERT INTO pg_layer_membership"
                " (group_name, address, channel, id, present, expires_at, capacity)"
                " VALUES (%s, pg_layer_address('asgi', %s), %s, %s, %s, %s, %s)",
                (
                    group,
                    channel,
                    channel,
                    number + is_normal,
                    present,
                    end,
                    capacity_of(channel) if is_normal else None,
                ),
            )
    for channel, end in state.waiting:
        observer.execute(
            "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
            " VALUES (pg_layer_address('asgi', %s), pg_current_xact_id(), 1, %s, %s)",
            (channel, channel, end),
        )
    [[last]] = observer.execute("SELECT coalesce(max(id), 0) FROM pg_layer_message").fetchall()
    return int(last)


def written(observer: Observer, after: int) -> list[tuple[Any, ...]]:
    """Return the new rows in their order, with their ends in hundreds of seconds."""
    return observer.execute(
        "SELECT address, channel, excluded, payload, kind, marked,"
        " round(extract(epoch FROM expires_at - clock_timestamp()) / 100)"
        " FROM pg_layer_message WHERE id > %s ORDER BY id",
        (after,),
    ).fetchall()


@examples
@given(states, group_sends)
def test_group_send_batch_writes_the_rows_of_single_group_sends(
    observer: Observer, state: State, ops: list[tuple[Any, ...]]
) -> None:
    with observer.transaction(force_rollback=True):
        last = arrange(observer, state)
        positions, missed = observer.execute(
            "SELECT missed_positions, missed_channels FROM pg_layer_group_send_batch("
            "'asgi', %s::text[], %s::bytea[], %s::float8[], %s::text[], true, false)",
            [list(values) for values in zip(*ops, strict=True)],
        ).fetchall()[0]
        together = sorted(zip(positions or (), missed or (), strict=True)), written(observer, last)
    with observer.transaction(force_rollback=True):
        last = arrange(observer, state)
        all_missed = []
        for position, op in enumerate(ops, 1):
            ((missed,),) = observer.execute(
                "SELECT missed_channels FROM pg_layer_group_send_one('asgi', %s, %s, %s, %s, true)",
                op,
            ).fetchall()
            all_missed += [(position, channel) for channel in missed or ()]
        one_by_one = sorted(all_missed), written(observer, last)
    assert together == one_by_one


@examples
@given(states, sends, st.booleans())
def test_send_batch_writes_the_rows_of_single_sends(
    observer: Observer, state: State, ops: list[tuple[Any, ...]], are_counted: bool
) -> None:
    low_ids: list[list[object] | None] = [[], []] if are_counted else [None, None]
    with observer.transaction(force_rollback=True):
        last = arrange(observer, state)
        [(full, ids)] = observer.execute(
            "SELECT full_positions, ids FROM pg_layer_send_batch("
            "'asgi', %s::text[], %s::bytea[], %s::float8[], %s::integer[], %s::text[],"
            " %s::bigint[],"
            " true, false)",
            [
                *[list(values) for values in zip(*ops, strict=True)],
                *low_ids,
            ],
        ).fetchall()
        together = sorted(full or ()), written(observer, last)
        assert len(ids or ()) == len(together[1])
    with observer.transaction(force_rollback=True):
        last = arrange(observer, state)
        all_full = []
        for position, op in enumerate(ops, 1):
            [(accepted,)] = observer.execute(
                "SELECT pg_layer_send_one('asgi', %s, %s, %s, %s, %s, true, false) IS NOT NULL",
                (*op, 0 if are_counted else None),
            ).fetchall()
            if not accepted:
                all_full.append(position)
        one_by_one = all_full, written(observer, last)
    assert together == one_by_one
