"""Rows of ``pg_layer_message`` in the memory of a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pg_layer._messages.addresses import group_name, split_address

LAST_ID = 2**63 - 1


class Key(NamedTuple):
    """The identity of a row: the boot, the transaction id and the id."""

    boot: int
    xid: int
    id: int


def columns_of(keys: Sequence[Key]) -> tuple[list[int], list[int], list[int]]:
    """Return the boots, transaction ids and ids of keys, for a statement."""
    return [key.boot for key in keys], [key.xid for key in keys], [key.id for key in keys]


class Row(NamedTuple):
    """A row of the table.

    ``group`` is set for a row at a group's address. ``channel`` is set for any other row,
    except for a control message of the kind ``flush``. ``expires_at`` is in seconds since
    1970 by the database's clock.
    """

    id: int
    xid: int
    boot: int
    marked: bool
    kind: str
    group: str | None
    channel: str | None
    excluded: str | None
    payload: bytes
    expires_at: float

    @property
    def key(self) -> Key:
        """The identity of the row."""
        return Key(self.boot, self.xid, self.id)

    @property
    def name(self) -> str:
        """The channel that the row was sent to, or the `group_name` of its group."""
        return self.channel or "" if self.group is None else group_name(self.group)

    @property
    def is_job(self) -> bool:
        """Whether the row was claimed from a normal channel."""
        return self.kind == "message" and self.group is None and "!" not in (self.channel or "!")


class KeyAt(NamedTuple):
    """A key with its address. ``size`` is the size of the payload in bytes."""

    address: str
    id: int
    xid: int
    boot: int
    marked: bool
    size: int

    @property
    def key(self) -> Key:
        """The identity of the row."""
        return Key(self.boot, self.xid, self.id)


class Span(NamedTuple):
    """Rows of one transaction at one address, from the id ``first`` to ``last``."""

    address: str
    boot: int
    xid: int
    marked: bool
    first: int
    last: int

    def covers(self, address: str, key: Key) -> bool:
        """Return whether a row at this address is in the span."""
        return (
            self.xid == key.xid
            and self.first <= key.id <= self.last
            and self.boot == key.boot
            and self.address == address
        )


def row_from_columns(columns: Sequence[Any]) -> Row:
    """Make a row of the columns that statements in ``_db.queries.receive`` return.

    The columns are address, id, xid, boot, marked, kind, channel, excluded, payload, and
    the end in seconds since 1970.
    """
    address, id, xid, boot, marked, kind, channel, excluded, payload, expires_at = columns
    group, _ = split_address(address)
    return Row(id, xid, boot, marked, kind, group, channel, excluded, payload, expires_at)
