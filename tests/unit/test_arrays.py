"""Arrays for parameters: psycopg's own loaders read from them what was put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import postgres
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format

from pg_layer import arrays
from pg_layer.arrays import Array, BigInts, Blobs, Floats, Ints, Texts


class Context:
    """What a connection is to `register`: a place for dumpers."""

    def __init__(self) -> None:
        self.adapters = psycopg.adapters.__class__(psycopg.adapters)
        self.connection = None


CONTEXT = Context()
arrays.register(CONTEXT)

TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
BYTES = st.lists(st.binary())
INT4 = st.lists(st.integers(-(2**31), 2**31 - 1))
INT8 = st.lists(st.integers(-(2**63), 2**63 - 1))
FLOAT8 = st.lists(st.floats(allow_nan=False))
KINDS: list[tuple[Callable[[Any], Array[Any]], str]] = [
    (Texts, "text"),
    (Blobs, "bytea"),
    (Ints, "int4"),
    (BigInts, "int8"),
    (Floats, "float8"),
]


def dumped(array: Array[Any]) -> tuple[int, bytes]:
    """The type and the bytes of a parameter, in the binary format, as a connection would send them."""
    dumper = Transformer(CONTEXT).get_dumper(array, PyFormat.BINARY)
    assert dumper.format == Format.BINARY
    data = dumper.dump(array)
    assert data is not None
    return dumper.oid, bytes(data)


def there_and_back(array: Array[Any]) -> Any:
    oid, data = dumped(array)
    return Transformer().get_loader(oid, Format.BINARY).load(data)


@given(TEXT)
def test_texts(items: list[str]) -> None:
    assert there_and_back(Texts(items)) == items


@given(BYTES)
def test_blobs(items: list[bytes]) -> None:
    assert there_and_back(Blobs(items)) == items


@given(INT4)
def test_ints(items: list[int]) -> None:
    assert there_and_back(Ints(items)) == items


@given(INT8)
def test_big_ints(items: list[int]) -> None:
    assert there_and_back(BigInts(items)) == items


@given(FLOAT8)
def test_floats(items: list[float]) -> None:
    assert there_and_back(Floats(items)) == items


def test_floats_that_are_no_numbers() -> None:
    infinite, nan = there_and_back(Floats([math.inf, math.nan]))
    assert infinite == math.inf
    assert math.isnan(nan)


@pytest.mark.parametrize(("kind", "item_type"), KINDS, ids=[name for _, name in KINDS])
def test_each_says_its_type(kind: Callable[[Any], Array[Any]], item_type: str) -> None:
    oid, data = dumped(kind([]))
    assert oid == postgres.types[item_type].array_oid
    # The array's own header: no nulls, and the type of its items.
    assert data[4:8] == bytes(4)
    assert int.from_bytes(data[8:12], "big") == postgres.types[item_type].oid


@pytest.mark.parametrize("items", [(), ("one",), ("", "two", "ü", "x" * 70_000)])
def test_texts_are_the_bytes_that_psycopg_itself_sends(items: Sequence[str]) -> None:
    texts = Texts(items)
    own = Transformer().get_dumper([*items], PyFormat.BINARY).dump([*items]) if items else None
    _, data = dumped(texts)
    if own is None:
        assert data[12:16] == bytes(4)
    else:
        assert data == bytes(own)


def test_what_is_no_list_will_do() -> None:
    assert there_and_back(Texts(("a", "b"))) == ["a", "b"]
    assert there_and_back(BigInts(range(3))) == [0, 1, 2]


@pytest.mark.parametrize(("kind", "number"), [(Ints, 2**31), (BigInts, 2**63)])
def test_numbers_that_do_not_fit_are_refused(kind: Callable[[Any], Array[int]], number: int) -> None:
    import struct

    with pytest.raises(struct.error):
        dumped(kind([number]))


def test_registering_leaves_other_connections_alone() -> None:
    with pytest.raises(psycopg.ProgrammingError):
        Transformer().get_dumper(Texts(["a"]), PyFormat.BINARY)
