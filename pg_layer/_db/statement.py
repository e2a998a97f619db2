"""Statements, and the binary encoding of their parameters by declared types. No I/O.

psycopg's cursors look at the type of each parameter, and of each item of a list, at every
execution. That would cost more than the rest of a statement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from struct import Struct, pack
from typing import Any, NamedTuple

_ARRAY = Struct("!iiIii").pack  # dimensions, has nulls, type of items, length, lower bound
_LENGTH = Struct("!i").pack
_NULL = _LENGTH(-1)
_PARAMETER = re.compile(r"\$(\d+)")


class Type(NamedTuple):
    """The type of a parameter.

    ``name`` and ``oid`` are those of PostgreSQL's catalogue. ``encode`` returns the bytes of a
    value in PostgreSQL's binary format.
    """

    name: str
    oid: int
    encode: Callable[[Any], bytes]


def _array(oid: int, item: Type) -> Type:
    """Return the type of a one-dimensional array. Items may be None."""

    def encode(items: Sequence[Any]) -> bytes:
        encode_item = item.encode
        parts = [_ARRAY(1, None in items, item.oid, len(items), 1)]
        append = parts.append
        for value in items:
            if value is None:
                append(_NULL)
                continue
            data = encode_item(value)
            append(_LENGTH(len(data)))
            append(data)
        return b"".join(parts)

    return Type(f"{item.name}[]", oid, encode)


def _array_of_numbers(oid: int, item: Type, code: str, size: int) -> Type:
    """Return the type of a one-dimensional array of numbers. No item may be None.

    All items are packed by one call, which is faster than `_array`. ``code``: the `struct` code
    of an item. ``size``: its bytes.
    """

    def encode(items: Sequence[float]) -> bytes:
        count = len(items)
        numbers: list[float] = [size] * (2 * count)
        numbers[1::2] = items
        return _ARRAY(1, 0, item.oid, count, 1) + pack("!" + f"i{code}" * count, *numbers)

    return Type(f"{item.name}[]", oid, encode)


BOOL = Type("boolean", 16, Struct("!?").pack)
BYTEA = Type("bytea", 17, bytes)
INT8 = Type("bigint", 20, Struct("!q").pack)
INT4 = Type("integer", 23, Struct("!i").pack)
TEXT = Type("text", 25, str.encode)
FLOAT8 = Type("float8", 701, Struct("!d").pack)
BOOLS = _array(1000, BOOL)
BYTEAS = _array(1001, BYTEA)
INT4S = _array_of_numbers(1007, INT4, "i", 4)
TEXTS = _array(1009, TEXT)
INT8S = _array_of_numbers(1016, INT8, "q", 8)
INT8S_OR_NULL = _array(1016, INT8)
FLOAT8S = _array_of_numbers(1022, FLOAT8, "d", 8)
FLOAT8S_OR_NULL = _array(1022, FLOAT8)


class Statement:
    """SQL with parameters ``$1``, ``$2``, ... of these types. Compared by identity.

    `Session` sends it to libpq as ``sql`` with `encode`. Django's cursors execute ``cursor_sql``
    with `parameters`: the same text, with a placeholder and a cast for each use of a parameter.
    """

    __slots__ = ("_encoders", "_uses", "cursor_sql", "formats", "oids", "sql")

    def __init__(self, sql: str, *types: Type) -> None:
        self.sql = sql.encode()
        self.oids = [type.oid for type in types]
        self.formats = [1] * len(types)
        self._encoders = [type.encode for type in types]
        self._uses = [int(number) - 1 for number in _PARAMETER.findall(sql)]
        self.cursor_sql = _PARAMETER.sub(
            lambda match: f"%s::{types[int(match[1]) - 1].name}", sql.replace("%", "%%")
        )

    def encode(self, values: Sequence[object]) -> list[bytes | None]:
        """Return the parameters in binary; None is NULL.

        Raises `ValueError` if there are more or fewer values than types.
        """
        return [
            None if value is None else encode(value)
            for encode, value in zip(self._encoders, values, strict=True)
        ]

    def parameters(self, values: Sequence[object]) -> list[Any]:
        """Return a value for each placeholder of ``cursor_sql``."""
        plain = [
            _array_literal(value) if isinstance(value, (list, tuple)) else value for value in values
        ]
        return [plain[index] for index in self._uses]


def _array_literal(items: Sequence[Any]) -> str:
    """Return a one-dimensional array in PostgreSQL's text format.

    psycopg would adapt a list item by item, at 20 us a list.
    """
    return f"{{{','.join(map(_array_item, items))}}}"


def _array_item(item: Any) -> str:
    if item is None:
        return "NULL"
    if isinstance(item, str):
        escaped = item.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(item, bytes):
        return f'"\\\\x{item.hex()}"'
    return str(item)
