"""The text of notifications, and rows: ``docs/protocols.md``, sections 1 and 2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._messages.announcements import Jobs, Messages, Ping, ToRead, parse, ping_token
from pg_layer._messages.rows import LAST_ID, Key, KeyAt, Row, Span, row_from_columns

OWN = "p!c"


def row(**changes: object) -> Row:
    plain = Row(7, 20, 3, False, "message", None, "s.c!1", None, b"{}", 1.5)
    return plain._replace(**changes)  # type: ignore[arg-type]


def test_parse_messages_for_a_group_and_a_channel() -> None:
    assert parse("M 3 20 @g 7 1.5 * e30= s.c!1 8 2 s.c!2 e30=", "p", OWN) == Messages(
        [row(group="g", channel=None), row(id=8, excluded="s.c!2", expires_at=2.0)]
    )


def test_parse_marked_messages() -> None:
    assert parse("m 0 20 @g 7 1.5 * e30=", "p", OWN) == Messages(
        [row(boot=0, marked=True, group="g", channel=None)]
    )


def test_parse_payload_in_several_lines_of_base64() -> None:
    """PostgreSQL breaks base64 after 76 characters."""
    text = "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh\nYWFh"
    announcement = parse(f"M 3 20 @g 7 1.5 * {text}", "p", OWN)
    assert isinstance(announcement, Messages)
    assert announcement.rows[0].payload == b"a" * 60


def test_parse_empty_payload() -> None:
    assert parse("M 3 20 s.c!1 7 1.5 * ", "p", OWN) == Messages([row(payload=b"")])


def test_parse_rows_to_be_read_of_a_group_and_of_the_own_address() -> None:
    assert parse("R 3 20 @g 7 9", "p", OWN) == ToRead(Span("p!@g", 3, 20, False, 7, 9))
    assert parse("r 3 20 . 7 9", "p", OWN) == ToRead(Span(OWN, 3, 20, True, 7, 9))


def test_parse_jobs_and_pings() -> None:
    assert parse("J 12", "p", OWN) == Jobs(12)
    assert parse("P abc.1", "p", OWN) == Ping("abc.1")
    ping = parse(f"P {ping_token('abc.1', 2)}", "p", OWN)
    assert isinstance(ping, Ping)
    assert ping.name == "abc.1"
    assert ping.token != ping_token("abc.1", 1)


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "hello",
        "X 1",
        "M",
        "M 3",
        "M 3 20 @g",
        "M 3 20 @g 7 1.5 * e30= @g 8",
        "M 3 20 @g 7 nan * e30=",
        "M 3 20 @g 7 soon * e30=",
        "M 3 20 @g x 1.5 * e30=",
        "M 3 20 @g -7 1.5 * e30=",
        "M 3 20 @g 7 1.5 * e30",
        "M 3 20  7 1.5 * e30=",
        "M 3 20 jobs 7 1.5 * e30=",
        "M 3 20 @g 7 1.5 * e30= jobs 8 1.5 * e30=",
        "R 3 20 @g 7",
        "R 3 20 @g 7 8 9",
        f"J {LAST_ID + 1}",
        "J -1",
        "J",
    ],
)
def test_parse_foreign_text_raises_value_error(payload: str) -> None:
    """Any role may call NOTIFY: no text may cause an error other than ``ValueError``."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        parse(payload, "p", OWN)
    assert raised.type is ValueError


@given(
    st.text(alphabet="MmRrJP 0123456789@*.=ae-\n!", max_size=60)
    | st.tuples(st.sampled_from("MmRrJPX"), st.lists(st.text(max_size=8), max_size=12)).map(
        lambda parts: f"{parts[0]} {' '.join(parts[1])}"
    )
)
def test_parse_any_text_returns_an_announcement_or_raises_value_error(payload: str) -> None:
    try:
        assert isinstance(parse(payload, "p", OWN), (Messages, ToRead, Jobs, Ping))
    except ValueError:
        pass


# --- Rows


def test_row_is_job_only_for_a_claimed_message_of_a_normal_channel() -> None:
    assert row(channel="jobs").is_job
    assert not row().is_job
    assert not row(group="g", channel=None).is_job
    assert not row(kind="flush", channel=None).is_job
    assert not row(kind="add", channel="jobs").is_job


def test_row_from_columns_group_row_knows_its_group() -> None:
    assert row_from_columns(("p!@g", 7, 20, 3, True, "message", None, "x", b"{}", 1.5)) == row(
        marked=True, group="g", channel=None, excluded="x"
    )
    assert row_from_columns((OWN, 7, 20, 3, False, "message", "s.c!1", None, b"{}", 1.5)) == row()


def test_key_is_unique_by_boot_transaction_and_id() -> None:
    """After a crash an id and a transaction id may be given out again, in another boot."""
    assert row().key == Key(3, 20, 7) == KeyAt(OWN, 7, 20, 3, False, 2).key
    keys = {row().key, row(id=8).key, row(xid=21).key, row(boot=4).key}
    assert len(keys) == 4


def test_span_covers_rows_of_its_transaction_at_its_address() -> None:
    span = Span("p!@g", 3, 20, False, 7, 9)
    assert span.covers("p!@g", Key(3, 20, 7))
    assert span.covers("p!@g", Key(3, 20, 9))
    assert not span.covers("p!@g", Key(3, 20, 6))
    assert not span.covers("p!@g", Key(3, 20, 10))
    assert not span.covers("p!@h", Key(3, 20, 8))
    assert not span.covers("p!@g", Key(3, 21, 8))
    assert not span.covers("p!@g", Key(4, 20, 8))
