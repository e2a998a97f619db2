"""PostgreSQL arrays in its binary format, for parameters of many items.

psycopg's own list dumper looks at each item's type; these are for lists whose type is known, where that
costs more than the rest of a statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack
from typing import Generic, TypeVar

from psycopg import postgres
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

T = TypeVar("T")

_HEADER = Struct("!iiIii").pack  # dimensions, has nulls, type of items, length, lower bound
_LENGTH = Struct("!i").pack


class Array(Generic[T]):
    """A one-dimensional array without nulls."""

    __slots__ = ("items",)

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items


class Texts(Array[str]):
    """``text[]``"""


class Blobs(Array[bytes]):
    """``bytea[]``"""


class Ints(Array[int]):
    """``integer[]``"""


class BigInts(Array[int]):
    """``bigint[]``"""


class Floats(Array[float]):
    """``float8[]``"""


def _join(oid: int, items: Sequence[bytes]) -> bytes:
    parts = [_HEADER(1, 0, oid, len(items), 1)]
    append = parts.append
    for item in items:
        append(_LENGTH(len(item)))
        append(item)
    return b"".join(parts)


class _ArrayDumper(Dumper):
    format = Format.BINARY
    item_type = "text"

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        info = postgres.types[self.item_type]
        self.oid = info.array_oid
        self.item_oid = info.oid


class _TextsDumper(_ArrayDumper):
    item_type = "text"

    def dump(self, obj: Texts) -> Buffer:
        return _join(self.item_oid, [item.encode() for item in obj.items])


class _BlobsDumper(_ArrayDumper):
    item_type = "bytea"

    def dump(self, obj: Blobs) -> Buffer:
        return _join(self.item_oid, obj.items)


class _NumbersDumper(_ArrayDumper):
    code = "i"
    size = 4

    def dump(self, obj: Array[float]) -> Buffer:
        count = len(obj.items)
        numbers: list[float] = [self.size] * (2 * count)
        numbers[1::2] = obj.items
        return _HEADER(1, 0, self.item_oid, count, 1) + pack("!" + f"i{self.code}" * count, *numbers)


class _IntsDumper(_NumbersDumper):
    item_type = "int4"


class _BigIntsDumper(_NumbersDumper):
    item_type, code, size = "int8", "q", 8


class _FloatsDumper(_NumbersDumper):
    item_type, code, size = "float8", "d", 8


def register(context: AdaptContext) -> None:
    """Teach a connection these types."""
    context.adapters.register_dumper(Texts, _TextsDumper)
    context.adapters.register_dumper(Blobs, _BlobsDumper)
    context.adapters.register_dumper(Ints, _IntsDumper)
    context.adapters.register_dumper(BigInts, _BigIntsDumper)
    context.adapters.register_dumper(Floats, _FloatsDumper)
