"""The parser of notifications. See ``docs/protocols.md``, section 2."""

from __future__ import annotations

import binascii
import math
from typing import NamedTuple

from pg_layer._messages.addresses import group_address
from pg_layer._messages.rows import LAST_ID, Row, Span


class Messages(NamedTuple):
    """Messages of one transaction that the notification itself carries."""

    rows: list[Row]


class ToRead(NamedTuple):
    """Rows that the client must read from the table."""

    span: Span


class Jobs(NamedTuple):
    """Jobs that wait in a normal channel, from the id ``first`` on."""

    first: int


class Ping(NamedTuple):
    """A ping that the client sent to itself. ``token``: see `ping_token`."""

    token: str

    @property
    def name(self) -> str:
        """The part of the token that all runs of the statement share."""
        return self.token.partition("/")[0]


def ping_token(name: str, run: int) -> str:
    """Return the token for one run of a statement that sends the ping ``name``.

    A statement that is repeated has a token for each run, because each run takes another
    snapshot. A ping proves something only about the snapshot of its own run.
    """
    return f"{name}/{run}"


Announcement = Messages | ToRead | Jobs | Ping


def parse(payload: str, prefix: str, own_address: str) -> Announcement:
    """Return the announcement in a notification.

    ``own_address`` is the client's: spans of its own rows do not name it.
    Raises ``ValueError`` for a text that the layer does not send.
    """
    letter, _, rest = payload.partition(" ")
    if letter in ("M", "m"):
        return _messages(rest.split(" "), letter == "m")
    if letter in ("R", "r"):
        boot, xid, name, first, last = rest.split(" ")
        address = group_address(prefix, name[1:]) if name.startswith("@") else own_address
        span = Span(
            address, _bigint(boot), _bigint(xid), letter == "r", _bigint(first), _bigint(last)
        )
        return ToRead(span)
    if letter == "J":
        return Jobs(_bigint(rest))
    if letter == "P":
        return Ping(rest)
    raise ValueError(f"{payload[:20]!r} is no announcement.")


def _messages(words: list[str], marked: bool) -> Messages:
    if len(words) < 7 or len(words) % 5 != 2:
        raise ValueError("An entry is incomplete.")
    boot, xid = _bigint(words[0]), _bigint(words[1])
    rows = []
    rest = iter(words[2:])
    for name, number, expires_at, excluded, payload in zip(
        rest, rest, rest, rest, rest, strict=True
    ):
        id, end = int(number), float(expires_at)
        if not name or not 0 <= id <= LAST_ID or math.isnan(end):
            raise ValueError("An entry is malformed.")
        group, channel = (name[1:], None) if name[0] == "@" else (None, name)
        if channel is not None and "!" not in channel:
            raise ValueError("Messages of normal channels are claimed, and not announced.")
        exclude = None if excluded == "*" else excluded
        try:
            data = binascii.a2b_base64(payload)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
        rows.append(Row(id, xid, boot, marked, "message", group, channel, exclude, data, end))
    return Messages(rows)


def _bigint(text: str) -> int:
    number = int(text)
    if not 0 <= number <= LAST_ID:
        raise ValueError(text)
    return number
