"""The codec: messages arrive unchanged, invalid ones are named, and no bytes break a reader."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import math
import sys
import traceback
import uuid
from functools import partial
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from channels.exceptions import MessageTooLarge
from cryptography.fernet import Fernet
from django.utils.functional import lazystr
from django.utils.safestring import mark_safe
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._messages.codec import Codec, Template
from pg_layer.exceptions import InvalidMessage, PgLayerError, UndecodableMessage

LIMIT = 1024 * 1024
NAME = "specific.a!1"
MAX_DEPTH = 200
MSGPACK = Codec("msgpack", LIMIT)
JSON = Codec("json", LIMIT)
SECRET = Codec("msgpack", LIMIT, ["first key"])
SECRET_JSON = Codec("json", LIMIT, [b"first key"])
ALL = [MSGPACK, JSON, SECRET, SECRET_JSON]
ALL_IDS = ["msgpack", "json", "msgpack-encrypted", "json-encrypted"]

INTS = st.integers(min_value=-(2**63), max_value=2**64 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def messages(*, as_json: bool) -> st.SearchStrategy[dict[str, Any]]:
    leaves: st.SearchStrategy[Any] = st.none() | st.booleans() | INTS | TEXTS
    if as_json:
        leaves |= st.floats(allow_nan=False, allow_infinity=False)
    else:
        leaves |= st.floats() | st.binary()
    values = st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(TEXTS, v), max_leaves=12)
    return st.dictionaries(
        TEXTS.filter(lambda key: not key.startswith("__asgi_")), values, max_size=5
    )


def same(left: object, right: object) -> bool:
    """Compare types, too. NaN equals NaN; 0.0 does not equal -0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.copysign(1, left) == math.copysign(1, right) and (
            left == right or left != left != right
        )
    return left == right


def there_and_back(codec: Codec, message: object) -> dict[str, Any]:
    return codec.decode(codec.open(codec.encode(message, NAME), NAME))


# --- Round trips


@given(messages(as_json=False))
def test_encode_msgpack_carries_every_type_of_the_specification(message: dict[str, Any]) -> None:
    assert same(there_and_back(MSGPACK, message), message)


@given(messages(as_json=True))
def test_encode_json_carries_all_types_but_bytes(message: dict[str, Any]) -> None:
    assert same(there_and_back(JSON, message), message)


@given(messages(as_json=True))
def test_decode_encrypted_message_equals_the_sent_one(message: dict[str, Any]) -> None:
    assert same(there_and_back(SECRET, message), message)
    assert same(there_and_back(SECRET_JSON, message), message)


@pytest.mark.parametrize("codec", ALL, ids=ALL_IDS)
@pytest.mark.parametrize("number", [-(2**63), -1, 0, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_decode_64_bit_integers_are_exact(codec: Codec, number: int) -> None:
    assert there_and_back(codec, {"n": number}) == {"n": number}


@pytest.mark.parametrize("writer", [MSGPACK, JSON], ids=["msgpack", "json"])
@pytest.mark.parametrize("reader", [MSGPACK, JSON], ids=["msgpack", "json"])
def test_open_any_format_is_understood_by_every_reader(writer: Codec, reader: Codec) -> None:
    # The sizes at which msgpack changes the first byte of a map.
    for size in (0, 1, 15, 16, 65_535, 65_536):
        message = {str(n): n for n in range(size)}
        assert reader.decode(reader.open(writer.encode(message, NAME), NAME)) == message


def test_encode_first_byte_says_the_format() -> None:
    assert JSON.encode({"a": "é"}, NAME) == '{"a":"é"}'.encode()
    assert MSGPACK.encode({"a": 1}, NAME) == b"\x81\xa1a\x01"
    assert SECRET.encode({"a": 1}, NAME)[:1] == b"g"


def test_decode_json_of_another_writer_is_read() -> None:
    assert MSGPACK.decode(MSGPACK.open(b'{"type": "chat.message", "n": [1, 2.5, null]}', NAME)) == {
        "type": "chat.message",
        "n": [1, 2.5, None],
    }


class Colour(enum.IntEnum):
    RED = 7


class Kind(str, enum.Enum):
    CHAT = "chat"


class Metres(float):
    pass


class Plain(enum.Enum):
    A = 1


class Big(enum.IntEnum):
    A = 2**64


Point = collections.namedtuple("Point", "x y")


class Presenting(dict[str, Any]):
    """A mapping like Django's QueryDict: it stores lists and shows their last value."""

    def items(self) -> Any:
        return [(key, values[-1]) for key, values in super().items()]


@pytest.mark.parametrize("codec", ALL, ids=ALL_IDS)
def test_decode_subclasses_arrive_as_the_plain_type(codec: Codec) -> None:
    message = collections.OrderedDict(
        colour=Colour.RED,
        kind=Kind.CHAT,
        html=mark_safe("<b>"),
        height=Metres(1.5),
        tuple=(1, (2,)),
        point=Point(1, 2),
        counts=collections.Counter("aab"),
        form=Presenting(a=[{1}, 2]),
    )
    expected = {
        "colour": 7,
        "kind": "chat",
        "html": "<b>",
        "height": 1.5,
        "tuple": [1, [2]],
        "point": [1, 2],
        "counts": {"a": 2, "b": 1},
        "form": {"a": 2},
    }
    assert same(there_and_back(codec, message), expected)


def test_decode_all_kinds_of_bytes_arrive_as_bytes() -> None:
    message = {"a": b"\x00\xff", "b": bytearray(b"xy"), "c": memoryview(b"zz")}
    assert there_and_back(MSGPACK, message) == {"a": b"\x00\xff", "b": b"xy", "c": b"zz"}


@pytest.mark.parametrize(
    "message",
    [
        {"text": "a", "n": 1},
        {},
        {"list": [1, {"a": [2]}]},
        {"b": b"x", "f": 1.5, "t": True, "0": None},
    ],
)
@pytest.mark.parametrize("codec", [MSGPACK, JSON])
def test_decode_template_readers_share_no_mutable_value(
    codec: Codec, message: dict[str, Any]
) -> None:
    if codec is JSON:
        message = {key: value for key, value in message.items() if not isinstance(value, bytes)}
    template = Template(codec.open(codec.encode(message, NAME), NAME))
    for _ in range(4):
        mine = codec.decode(template)
        assert mine == message
        for value in mine.values():
            if isinstance(value, list):
                value.clear()
        mine.clear()
        mine["text"] = "mine"


def test_decode_template_with_a_list_is_not_kept() -> None:
    template = Template(MSGPACK.encode({"list": [1]}, NAME))
    assert MSGPACK.decode(template) == MSGPACK.decode(template) == {"list": [1]}
    assert template.flat == {}


def test_decode_damaged_template_raises_for_each_reader() -> None:
    template = Template(MSGPACK.encode({"text": "abc"}, NAME)[:-1])
    for _ in range(3):
        with pytest.raises(UndecodableMessage, match="damaged"):
            MSGPACK.decode(template)


def test_decode_twice_returns_two_messages() -> None:
    plaintext = MSGPACK.open(MSGPACK.encode({"list": [1]}, NAME), NAME)
    MSGPACK.decode(plaintext)["list"].append(2)
    assert MSGPACK.decode(plaintext) == {"list": [1]}


def test_encode_leaves_the_message_unchanged() -> None:
    message = {"tuple": (1, 2), "dict": {"a": [1]}}
    for codec in ALL:
        codec.encode(message, NAME)
    assert message == {"tuple": (1, 2), "dict": {"a": [1]}}


# --- What is refused


class Model:
    _meta = pk = None


class Index:
    def __index__(self) -> int:
        raise NotImplementedError


# (message, regular expression for the error)
REFUSED: list[tuple[Any, str]] = [
    (
        {"user": {"ids": [1, 2, 3, uuid.UUID(int=0)]}},
        r'^message\["user"\]\["ids"\]\[3\] .*uuid\.UUID.*str\(\)',
    ),
    ({"at": datetime.datetime(2024, 1, 1)}, r'^message\["at"\] .*datetime\.datetime.*isoformat'),
    ({"at": datetime.date(2024, 1, 1)}, r"datetime\.date.*isoformat"),
    ({"for": datetime.timedelta(1)}, r"timedelta.*total_seconds"),
    ({"price": decimal.Decimal("1.5")}, r'^message\["price"\] .*Decimal.*str\(\)'),
    ({"tags": {"a"}}, r'^message\["tags"\] .*set.*a list'),
    ({"keys": {}.keys()}, r"dict_keys.*a list"),
    ({"text": lazystr("hello")}, r'^message\["text"\] .*str\(\)'),
    ({"object": Model()}, r"Model.*primary key"),
    ({"n": Index()}, r"Index.*int\(\)"),
    ({"n": 1j}, r'^message\["n"\] .*complex'),
    ({"kind": Plain.A}, r"Plain.*\.value"),
    ({"ext": msgpack.ExtType(5, b"x")}, r"ExtType"),
    ({"ext": msgpack.Timestamp(5)}, r"Timestamp"),
    ({"a": [(object(),)]}, r'^message\["a"\]\[0\]\[0\] .*builtins\.object'),
    ({"a": [1, {2}], "b": {3}, "c": 4j}, r'^message\["a"\]\[1\] '),  # the first of several
    ({1: "a"}, r"^message has a key of type int: keys must be str"),
    ({None: "a"}, r"^message has a key of type NoneType"),
    ({b"a": "a"}, r"^message has a key of type bytes"),
    ({"a": {uuid.UUID(int=1): 1}}, r'^message\["a"\] has a key of type UUID'),
    ({"a": collections.OrderedDict({2: 1})}, r'^message\["a"\] has a key of type int'),
    ({"n": 2**64}, r'^message\["n"\] .*64 bits'),
    ({"n": [-(2**63) - 1]}, r'^message\["n"\]\[0\] .*64 bits'),
    ({"n": Big.A}, r'^message\["n"\] .*64 bits'),
    ({"text": ["ok", "a\ud800b"]}, r'^message\["text"\]\[1\] .*lone surrogate'),
    ({"a": {"k\udfff": 1}}, r'^message\["a"\] .*key with a lone surrogate'),
    ({"a\ud800": {1: 2}}, r"^message has a key with a lone surrogate"),
    ({"__asgi_channel__": "x"}, r"__asgi_"),
    ({'a"b': {1}}, r'^message\["a\\"b"\] '),
    ({"é" * 60: {1}}, r'^message\["é{39}…"\] '),
    (["a"], r"must be a dict, not list"),
    (None, r"must be a dict, not NoneType"),
    ("text", r"must be a dict, not str"),
]


@pytest.mark.parametrize("codec", ALL, ids=ALL_IDS)
@pytest.mark.parametrize(("message", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_encode_unsupported_value_is_named_with_its_path(
    codec: Codec, message: Any, says: str
) -> None:
    with pytest.raises(InvalidMessage, match=says) as caught:
        codec.encode(message, NAME)
    # The serialisers' errors quote the value, so the error must not refer to one.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_encode_invalid_message_raises_an_error_of_the_caller() -> None:
    assert issubclass(InvalidMessage, TypeError)
    assert issubclass(InvalidMessage, ValueError)
    assert not issubclass(InvalidMessage, PgLayerError)


@pytest.mark.parametrize(
    "value", [b"x", bytearray(b"x"), memoryview(b"x")], ids=lambda v: type(v).__name__
)
def test_encode_json_bytes_raises(value: object) -> None:
    with pytest.raises(
        InvalidMessage, match=rf'^message\["a"\]\[0\] is {type(value).__name__},.*msgpack'
    ):
        JSON.encode({"a": [value]}, NAME)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, Metres("nan")])
def test_encode_json_not_a_finite_number_raises(value: float) -> None:
    with pytest.raises(InvalidMessage, match=r'^message\["a"\] is not a finite number.*msgpack'):
        JSON.encode({"a": value}, NAME)
    assert same(there_and_back(MSGPACK, {"a": value}), {"a": float(value)})


def test_encode_scattered_memoryview_raises() -> None:
    with pytest.raises(
        InvalidMessage, match=r'^message\["a"\] is a memoryview of scattered memory'
    ):
        MSGPACK.encode({"a": memoryview(b"abcdef")[::2]}, NAME)


def test_encode_reserved_key_raises_at_the_top_level_only() -> None:
    assert there_and_back(MSGPACK, {"a": {"__asgi_x": 1}, "_asgi_": 2}) == {
        "a": {"__asgi_x": 1},
        "_asgi_": 2,
    }


def nested(levels: int, *, in_lists: bool) -> dict[str, Any]:
    value: Any = [] if in_lists else {}
    for _ in range(levels - 2):
        value = [value] if in_lists else {"k": value}
    return {"k": value}


@pytest.mark.parametrize("in_lists", [True, False], ids=["lists", "dicts"])
@pytest.mark.parametrize("codec", ALL, ids=ALL_IDS)
def test_encode_nested_too_deeply_raises(codec: Codec, in_lists: bool) -> None:
    deep = nested(MAX_DEPTH, in_lists=in_lists)
    assert there_and_back(codec, deep) == deep
    with pytest.raises(
        InvalidMessage, match=rf"^message(\[.{{1,3}}\]){{4}}….*at most {MAX_DEPTH} levels"
    ) as caught:
        codec.encode(nested(MAX_DEPTH + 1, in_lists=in_lists), NAME)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("codec", ALL, ids=ALL_IDS)
def test_encode_circular_message_is_named_with_its_path(codec: Codec) -> None:
    message: dict[str, Any] = {"a": {"b": []}}
    message["a"]["b"].append(message["a"])
    with pytest.raises(
        InvalidMessage,
        match=r'^message\["a"\]\["b"\]\[0\] contains itself: it is message\["a"\] again',
    ):
        codec.encode(message, NAME)


def test_encode_value_in_two_places_is_no_circle() -> None:
    shared = [1]
    assert there_and_back(JSON, {"a": shared, "b": [shared, shared]}) == {"a": [1], "b": [[1], [1]]}


def test_encode_error_without_a_problem_in_the_message_is_passed_on() -> None:
    class Broken(dict[str, Any]):
        def items(self) -> Any:
            raise RuntimeError("from items")

    with pytest.raises(RuntimeError, match="from items"):
        MSGPACK.encode({"a": Broken(b=1)}, NAME)


def test_encode_small_stack_is_no_problem_of_the_message() -> None:
    deep = nested(MAX_DEPTH, in_lists=True)

    def at_depth(frames: int) -> bytes:
        return at_depth(frames - 1) if frames else MSGPACK.encode(deep, NAME)

    limit = sys.getrecursionlimit()
    used = len(traceback.extract_stack())
    with pytest.raises(RecursionError):
        at_depth(limit - used - MAX_DEPTH // 2)


def test_encode_size_limit_is_exact_and_counts_serialised_bytes() -> None:
    limit = 1000
    for serializer_format in ("msgpack", "json"):
        for keys in (None, ["key"]):
            codec = Codec(serializer_format, limit, keys)
            overhead = len(Codec(serializer_format, limit).encode({"t": "x" * 300}, NAME)) - 300
            fits = {"t": "x" * (limit - overhead)}
            assert there_and_back(codec, fits) == fits
            with pytest.raises(
                MessageTooLarge, match=r"1001 bytes.*max_message_size is 1000 bytes"
            ):
                codec.encode({"t": "x" * (limit - overhead + 1)}, NAME)
    with pytest.raises(MessageTooLarge):
        Codec("json", limit).encode({"t": "é" * 600}, NAME)


# --- Keys


def test_open_rotated_keys_reads_with_any_of_them() -> None:
    old = Codec("msgpack", LIMIT, ["old"])
    both = Codec("msgpack", LIMIT, ["new", "old"])
    new = Codec("msgpack", LIMIT, [b"new"])
    assert both.decode(both.open(old.encode({"a": 1}, NAME), NAME)) == {"a": 1}
    assert new.decode(new.open(both.encode({"a": 1}, NAME), NAME)) == {"a": 1}
    with pytest.raises(UndecodableMessage, match="none of the symmetric_encryption_keys"):
        new.open(old.encode({"a": 1}, NAME), NAME)


def test_crypter_key_is_hashed_as_by_channels_redis() -> None:
    # base64.urlsafe_b64encode(hashlib.sha256(b"abc").digest()): SHA-256's published test vector
    fernet = Fernet("ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0=")
    codec = Codec("msgpack", LIMIT, ["abc"], prefix="asgi")
    inside = b"asgi!specific.a!1\0\x81\xa1a\x01"
    assert codec.open(fernet.encrypt(inside), NAME) == b"\x81\xa1a\x01"
    assert fernet.decrypt(codec.encode({"a": 1}, NAME)) == inside


NAMES = [
    NAME,
    "specific.a!11",
    "specific.a!",
    "specific.b!1",
    "jobs",
    "jobs2",
    "@room",
    "@room2",
    "@jobs",
]


@pytest.mark.parametrize("sent_to", NAMES)
def test_open_encrypted_for_another_name_is_undecodable(sent_to: str) -> None:
    """A normal channel accepts tokens for groups: its readers do not know its groups."""
    keys = ["first key"]
    writer, reader = (
        Codec("json", LIMIT, keys, prefix="asgi"),
        Codec("msgpack", LIMIT, keys, prefix="asgi"),
    )
    payload = writer.encode({"a": 1}, sent_to)
    for found_at in NAMES:
        if found_at == sent_to or (sent_to[0] == "@" and found_at in ("jobs", "jobs2")):
            assert reader.decode(reader.open(payload, found_at)) == {"a": 1}
        else:
            with pytest.raises(UndecodableMessage, match="for another channel or group"):
                reader.open(payload, found_at)


@pytest.mark.parametrize(
    ("sent_to", "found_at"), [(NAME, NAME), ("@room", "@room"), ("@room", "jobs")]
)
def test_open_encrypted_with_another_prefix_is_undecodable(sent_to: str, found_at: str) -> None:
    payload = Codec("json", LIMIT, ["first key"], prefix="shop").encode({"a": 1}, sent_to)
    for prefix in ("asgi", "sho", "shop2", ""):
        with pytest.raises(UndecodableMessage, match="for another channel or group"):
            Codec("json", LIMIT, ["first key"], prefix=prefix).open(payload, found_at)


def test_open_encrypted_for_no_name_is_undecodable() -> None:
    fernet = Fernet("ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0=")
    payload = fernet.encrypt(MSGPACK.serialise({"a": 1}))
    for name in NAMES:
        with pytest.raises(UndecodableMessage, match="for another channel or group"):
            Codec("msgpack", LIMIT, ["abc"], prefix="asgi").open(payload, name)


def test_encode_encrypted_payload_shows_no_plaintext() -> None:
    payload = SECRET.encode({"text": "attack at dawn"}, NAME)
    assert b"attack" not in payload
    assert SECRET.encode({"text": "attack at dawn"}, NAME) != payload


@pytest.mark.parametrize("writer", [MSGPACK, JSON], ids=["msgpack", "json"])
def test_open_plain_payload_with_keys_raises(writer: Codec) -> None:
    with pytest.raises(
        UndecodableMessage,
        match=r"not encrypted, but symmetric_encryption_keys is set.*allow_unencrypted",
    ):
        SECRET.open(writer.encode({"a": 1}, NAME), NAME)


@pytest.mark.parametrize("writer", [MSGPACK, JSON], ids=["msgpack", "json"])
def test_open_plain_payload_with_allow_unencrypted_is_read(writer: Codec) -> None:
    codec = Codec("msgpack", LIMIT, ["first key"], allow_unencrypted=True)
    assert codec.decode(codec.open(writer.encode({"a": 1}, NAME), NAME)) == {"a": 1}
    # It writes encrypted payloads only, and reads these with its keys only.
    assert codec.encode({"a": 1}, NAME)[:1] == b"g"
    assert SECRET.decode(SECRET.open(codec.encode({"a": 1}, NAME), NAME)) == {"a": 1}
    with pytest.raises(UndecodableMessage, match="none of the symmetric_encryption_keys"):
        codec.open(Codec("msgpack", LIMIT, ["another key"]).encode({"a": 1}, NAME), NAME)
    for damaged in (b"", b"\xff", b"null", b"[]"):
        with pytest.raises(UndecodableMessage, match="in no format"):
            codec.open(damaged, NAME)


def test_allow_unencrypted_without_keys_has_no_effect() -> None:
    codec = Codec("json", LIMIT, allow_unencrypted=True)
    assert there_and_back(codec, {"a": 1}) == {"a": 1}
    with pytest.raises(UndecodableMessage, match="symmetric_encryption_keys is not set"):
        codec.open(SECRET.encode({"a": 1}, NAME), NAME)


def test_open_encrypted_payload_without_keys_names_the_option() -> None:
    with pytest.raises(
        UndecodableMessage, match="encrypted, but symmetric_encryption_keys is not set"
    ):
        MSGPACK.open(SECRET.encode({"a": 1}, NAME), NAME)


# --- Damage

EVIL = [
    b"",
    b"\xff",
    b"null",
    b"[]",
    b" {}",
    b"{",
    b"{}{}",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": "\xff"}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a":' * 100_000,
    b'{"a":' + b"[" * 100_000,
    b"\x81",
    b"\x81\xa1a",
    b"\x81\xa1a\x01\x01",
    b"\x81\x01\x01",  # the key is an int
    b"\x81\x90\x01",  # the key is a list
    b"\x81\xa1\xff\x01",  # the key is no UTF-8
    b"\x81\xa1a\xc1",  # the one byte that msgpack never uses
    b"\x81\xa1a\xdd\xff\xff\xff\xff",  # a list said to have 2**32 - 1 items
    b"\xdf\xff\xff\xff\xff",
    b"\x81\xa1a" + b"\x91" * 100_000,
    b"\x81\xa1a\xd6\xff",  # a truncated timestamp
    b"g",
    b"gAAAAA",
    b"g\xff\x00",
]


@pytest.mark.parametrize("payload", EVIL, ids=lambda payload: repr(payload[:16]))
@pytest.mark.parametrize("codec", [MSGPACK, SECRET], ids=["plain", "encrypted"])
def test_decode_damaged_payload_is_undecodable(codec: Codec, payload: bytes) -> None:
    with pytest.raises(UndecodableMessage) as caught:
        codec.decode(codec.open(payload, NAME))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with pytest.raises(UndecodableMessage) as caught:
        codec.decode(payload)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_decode_encrypted_garbage_is_undecodable() -> None:
    crypter = Fernet("ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0=")
    codec = Codec("msgpack", LIMIT, ["abc"])
    for inside in (b"", b"hello", b"\x81", b"gAAAA"):
        with pytest.raises(UndecodableMessage):
            codec.decode(codec.open(crypter.encrypt(b"!specific.a!1\0" + inside), NAME))


@given(st.data(), messages(as_json=True), st.sampled_from(ALL))
def test_decode_any_damage_returns_a_dict_or_raises_without_content(
    data: st.DataObject, message: dict[str, Any], codec: Codec
) -> None:
    message["marker"] = "Geheimnis"
    payload = bytearray(codec.encode(message, NAME))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    at = data.draw(st.integers(0, len(payload) - 1))
    if kind == "flip":
        payload[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del payload[at:]
    else:
        payload[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    try:
        result = codec.decode(codec.open(bytes(payload), NAME))
    except UndecodableMessage as error:
        shown = "".join(traceback.format_exception(error)) + repr(error.__context__)
    else:
        shown = ""
        assert type(result) is dict
        # Without a key a token cannot be changed. Fernet ignores only the padding of base64.
        assert codec in (MSGPACK, JSON) or same(result, message)
    assert "Geheim" not in shown


def open_and_decode(codec: Codec, payload: bytes) -> dict[str, Any]:
    """Return the message in a payload."""
    return codec.decode(codec.open(payload, NAME))


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"{", b"\x82", b"\xde\x00\x02", b"g", b"gAAAAA"])
)
def test_decode_arbitrary_bytes_returns_a_dict_or_raises(rest: bytes, first: bytes) -> None:
    for codec in (MSGPACK, SECRET):
        for read in (codec.decode, partial(open_and_decode, codec)):
            try:
                assert type(read(first + rest)) is dict
            except UndecodableMessage:
                pass


# --- Errors that need no database


def test_exceptions_without_arguments_have_their_docstring_as_text() -> None:
    assert str(UndecodableMessage()) == "A stored message could not be read."
    assert str(UndecodableMessage("other")) == "other"
    assert issubclass(UndecodableMessage, PgLayerError)

    class Undocumented(UndecodableMessage):
        pass

    assert str(Undocumented()) == "A stored message could not be read."
