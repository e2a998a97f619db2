"""Parameters in PostgreSQL's binary format: psycopg's own loaders decode them unchanged."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import postgres
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format

from pg_layer._db import statement
from pg_layer._db.statement import Statement, Type

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
INT4 = st.integers(-(2**31), 2**31 - 1)
INT8 = st.integers(-(2**63), 2**63 - 1)
FLOAT8 = st.floats(allow_nan=False)

SCALARS = {
    "BOOL": (st.booleans(), "bool"),
    "BYTEA": (st.binary(), "bytea"),
    "INT8": (INT8, "int8"),
    "INT4": (INT4, "int4"),
    "TEXT": (TEXT, "text"),
    "FLOAT8": (FLOAT8, "float8"),
}
ARRAYS = {
    "BOOLS": (st.lists(st.booleans()), "bool"),
    "BYTEAS": (st.lists(st.binary()), "bytea"),
    "INT4S": (st.lists(INT4), "int4"),
    "INT8S": (st.lists(INT8), "int8"),
    "INT8S_OR_NULL": (st.lists(INT8 | st.none()), "int8"),
    "TEXTS": (st.lists(TEXT), "text"),
    "FLOAT8S": (st.lists(FLOAT8), "float8"),
    "FLOAT8S_OR_NULL": (st.lists(FLOAT8 | st.none()), "float8"),
}


def type_named(name: str) -> Type:
    found: Type = getattr(statement, name)
    return found


def round_trip(type: Type, value: object) -> Any:
    return Transformer().get_loader(type.oid, Format.BINARY).load(type.encode(value))


@pytest.mark.parametrize("name", [*SCALARS, *ARRAYS])
def test_encoded_value_is_decoded_unchanged_by_psycopg(name: str) -> None:
    values, _ = {**SCALARS, **ARRAYS}[name]

    @given(values)
    def check(value: object) -> None:
        assert round_trip(type_named(name), value) == value

    check()


@pytest.mark.parametrize("name", [*SCALARS, *ARRAYS])
def test_type_has_the_oid_of_the_catalogue(name: str) -> None:
    if name in SCALARS:
        assert type_named(name).oid == postgres.types[SCALARS[name][1]].oid
        return
    info = postgres.types[ARRAYS[name][1]]
    assert type_named(name).oid == info.array_oid
    data = type_named(name).encode([])
    # The array's own header: no nulls, and the type of its items.
    assert data[4:8] == bytes(4)
    assert int.from_bytes(data[8:12], "big") == info.oid


def test_encode_types_are_all_tested() -> None:
    types = {name for name, found in vars(statement).items() if isinstance(found, Type)}
    assert types == {*SCALARS, *ARRAYS}


def test_encode_of_infinity_and_nan_round_trips() -> None:
    infinite, nan = round_trip(statement.FLOAT8S, [math.inf, math.nan])
    assert infinite == math.inf
    assert math.isnan(nan)


@pytest.mark.parametrize("items", [("one",), ("", "two", "ü", "x" * 70_000)])
def test_encode_of_texts_equals_psycopgs_own_encoding(items: Sequence[str]) -> None:
    own = Transformer().get_dumper([*items], PyFormat.BINARY).dump([*items])
    assert own is not None
    assert statement.TEXTS.encode(items) == bytes(own)


def test_encode_accepts_any_sequence() -> None:
    assert round_trip(statement.TEXTS, ("a", "b")) == ["a", "b"]
    assert round_trip(statement.INT8S, range(3)) == [0, 1, 2]


@pytest.mark.parametrize(("name", "number"), [("INT4S", 2**31), ("INT8S", 2**63), ("INT4", 2**31)])
def test_encode_of_a_number_out_of_range_raises(name: str, number: int) -> None:
    value = [number] if name in ARRAYS else number
    with pytest.raises(struct.error):
        type_named(name).encode(value)


def test_statement_encodes_its_parameters_in_order() -> None:
    select = Statement("SELECT $1, $2", statement.TEXT, statement.INT4)
    assert select.sql == b"SELECT $1, $2"
    assert select.oids == [25, 23]
    assert select.formats == [1, 1]
    assert select.encode(("ü", 7)) == ["ü".encode(), struct.pack("!i", 7)]
    assert select.encode((None, None)) == [None, None]


@pytest.mark.parametrize("values", [(), ("a",), ("a", 1, 2)])
def test_statement_with_too_few_or_too_many_values_raises(values: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="argument"):
        Statement("SELECT $1, $2", statement.TEXT, statement.INT4).encode(values)


def test_statement_for_cursors_has_a_cast_placeholder_for_each_use_of_a_parameter() -> None:
    select = Statement("SELECT 5 % $2, $1, $2", statement.TEXTS, statement.INT4)
    assert select.cursor_sql == "SELECT 5 %% %s::integer, %s::text[], %s::integer"
    assert select.parameters((("a", "b"), 7)) == [7, '{"a","b"}', 7]
    assert select.parameters((None, None)) == [None, None, None]
    assert Statement("SELECT 1").parameters(()) == []
