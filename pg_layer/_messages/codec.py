"""Messages to bytes and back: serialisation, validation, encryption. Pure; no I/O, and safe from any thread.

A payload says by its first byte what it is, so that readers understand every format whatever they write
themselves, and a deployment can change formats while both are in the table:

- `{`: JSON, UTF-8. What SQL callers and `serializer_format="json"` write.
- 0x80-0x8f, 0xde, 0xdf: msgpack (its maps).
- `g`: a Fernet token (they all begin with it), holding one of the above, and where it was sent to: see
  `pg_layer._messages.encryption`.

What a message may hold is the specification's list
(https://channels.readthedocs.io/en/latest/channel_layer_spec.html): bytes, str, signed 64-bit int, float,
list, dict with str keys, bool, None; tuples are taken too and arrive as lists.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgpack  # type: ignore[import-untyped]

from pg_layer.exceptions import InvalidMessage, MessageTooLarge, UndecodableMessage

if TYPE_CHECKING:
    from pg_layer._messages.encryption import Crypter

_JSON_FIRST = 0x7B
_FERNET_FIRST = 0x67
_MSGPACK_FIRST = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_PLAIN_FIRST = _MSGPACK_FIRST | {_JSON_FIRST}

INT_MIN = -(2**63)
INT_MAX = 2**63 - 1
# Levels of dicts and lists, the message itself being the first. All serialisers and their readers can do it.
MAX_DEPTH = 200

# Top-level keys that begin like this belong to channel layers (channels_redis keeps its routing in one).
_RESERVED = "__asgi_"

# Types that hold nothing and need no look at their value. What is wrong with one all the same (a lone
# surrogate; bytes and NaN in JSON) the serialiser itself finds.
_LEAVES = frozenset((str, float, bool, type(None), bytes, bytearray, memoryview))
_IMMUTABLE = frozenset((str, int, float, bool, type(None), bytes))
_LEAF_BASES = (str, float, bytes, bytearray)


class Template:
    """A plaintext that several readers decode, each into a message of its own.

    One without lists and dicts in it is decoded once and copied: no reader can change what is in it.
    """

    __slots__ = ("flat", "is_flat", "plaintext")

    def __init__(self, plaintext: bytes) -> None:
        self.plaintext = plaintext
        self.is_flat: bool | None = None  # not known yet
        self.flat: dict[str, Any] = {}


class Codec:
    """Turns messages into payloads and payloads into messages.

    `serializer_format` ("msgpack" or "json") and `keys[0]` decide how messages are written; `keys` (all of
    them) and the payload itself decide how they are read. `max_message_size` is in bytes and counts the
    serialised message before encryption, which adds the name of its channel or group, a third and about 100
    bytes. With `allow_unencrypted` plain payloads are read although there are keys. `prefix` is the layer's.
    `keys` needs the `cryptography` package (`ImportError` otherwise); arguments are trusted,
    `pg_layer._config.options` checks them.
    """

    __slots__ = (
        "_allow_unencrypted",
        "_crypter",
        "_max_message_size",
        "_pack",
        "_serializer_format",
    )

    def __init__(
        self,
        serializer_format: str,
        max_message_size: int,
        keys: Sequence[str | bytes] | None = None,
        *,
        prefix: str = "",
        allow_unencrypted: bool = False,
    ) -> None:
        self._serializer_format = serializer_format
        self._allow_unencrypted = allow_unencrypted
        self._max_message_size = max_message_size
        # `packb` makes a packer for each message: 0.2 µs dearer than a packer for each thread, but that one
        # could be entered a second time while it works, by a finaliser that sends, and keeps the largest
        # buffer it ever needed.
        self._pack: Callable[[object], bytes] = (
            _to_json if serializer_format == "json" else msgpack.packb
        )
        self._crypter = _make_crypter(keys, prefix) if keys else None

    def encode(self, message: object, name: str) -> bytes:
        """The payload for `message`; if there are keys encrypted, for a channel or `@<group>` alone.

        Raises as `serialise`.
        """
        plaintext = self.serialise(message)
        return plaintext if self._crypter is None else self._crypter.encrypt(plaintext, name)

    def serialise(self, message: object) -> bytes:
        """The plaintext for `message`.

        Raises `InvalidMessage` for what is no dict, for values that the specification (or JSON, if that is
        the format) cannot carry, for top-level keys that begin with `__asgi_`, and for nesting deeper than
        `MAX_DEPTH`; `MessageTooLarge` above `max_message_size`. The message is only read, and nothing of it
        is kept.
        """
        if not isinstance(message, dict):
            raise InvalidMessage(f"A message must be a dict, not {type(message).__name__}.")
        error = None
        try:
            payload = self._pack(message) if _is_sound((message,), MAX_DEPTH) else None
        except Exception as caught:
            payload, error = None, caught
        if payload is None:
            raise self._reason_for_refusing(message, error)
        for key in message:
            if key[:7] == _RESERVED:
                raise InvalidMessage(
                    f"The message's keys must not begin with {_RESERVED!r}: these belong to channel layers."
                )
        if len(payload) > self._max_message_size:
            raise MessageTooLarge(
                f"The message is {len(payload)} bytes long when serialised; "
                f"max_message_size is {self._max_message_size} bytes."
            )
        return payload

    def _reason_for_refusing(self, message: object, error: Exception | None) -> Exception:
        # Serialisers' errors quote what they stumble over. So the fault that is found here replaces them, and
        # they are passed on only where there is none: no memory, no stack.
        fault = _find_fault(message, as_json=self._serializer_format == "json")
        if fault is not None:
            return InvalidMessage(fault)
        return error or InvalidMessage(
            "The message could not be serialised: it changed while it was sent."
        )

    def open(self, payload: bytes, name: str) -> bytes:
        """The plaintext of a stored payload, to be given to `decode` as often as there are readers.

        `name`: the channel or `@<group>` that it was found for.

        Raises `UndecodableMessage` for a payload in no known format, for one that none of the keys opens or
        that was encrypted for another name, for an encrypted one without keys, and for a plain one where
        there are keys and plain ones are not allowed (else whoever can write to the table could forge
        messages).
        """
        first = payload[0] if payload else -1
        if self._crypter is None:
            if first in _PLAIN_FIRST:
                return payload
            if first == _FERNET_FIRST:
                raise UndecodableMessage(
                    "A stored message is encrypted, but symmetric_encryption_keys is not set here."
                )
            raise UndecodableMessage(_unknown_format(payload))
        if first in _PLAIN_FIRST:
            if self._allow_unencrypted:
                return payload
            raise UndecodableMessage(
                "A stored message is not encrypted, but symmetric_encryption_keys is set here. "
                "Was it sent from SQL, or by a process without keys? allow_unencrypted would deliver it."
            )
        if first != _FERNET_FIRST:
            raise UndecodableMessage(_unknown_format(payload))
        return self._crypter.decrypt(payload, name)

    def decode(self, plaintext: bytes | Template) -> dict[str, Any]:
        """The message in a plaintext of `open`, a new object at every call: readers share nothing.

        Raises `UndecodableMessage`, and nothing else, for whatever is not a whole message.
        """
        if isinstance(plaintext, Template):
            return self._decode_again(plaintext)
        first = plaintext[0] if plaintext else -1
        try:
            message: Any = None
            if first in _MSGPACK_FIRST:
                message = msgpack.unpackb(plaintext, raw=False, strict_map_key=True)
            elif first == _JSON_FIRST:
                message = _from_json(plaintext.decode())
        except Exception:
            # Of these errors many hold the payload; hence neither their text nor they themselves as a cause.
            pass
        if type(message) is dict:
            return message
        if first in _PLAIN_FIRST:
            name = "JSON" if first == _JSON_FIRST else "msgpack"
            raise UndecodableMessage(
                f"A stored message is damaged: {len(plaintext)} bytes that are no valid {name}."
            )
        raise UndecodableMessage(_unknown_format(plaintext))

    def _decode_again(self, template: Template) -> dict[str, Any]:
        if template.is_flat:
            return template.flat.copy()
        message = self.decode(template.plaintext)
        if template.is_flat is None:
            is_flat = _IMMUTABLE.issuperset(map(type, message.values()))
            if is_flat:
                template.flat = message.copy()
            template.is_flat = is_flat  # last, as other threads look at it first
        return message


def _is_sound(values: Iterable[Any], depth: int) -> bool:
    """Whether `values`, and what they contain down to `depth` more levels, may stand in a message.

    The hot path of sending. It keeps no path and gives no reason; `_find_fault` looks for both once they are
    needed.
    """
    for value in values:
        kind = type(value)
        if kind in _LEAVES:
            continue
        if kind is int:
            if not INT_MIN <= value <= INT_MAX:
                return False
        elif kind is dict:
            if not depth:
                return False
            for key in value:
                if type(key) is not str and not isinstance(key, str):
                    return False
            if not _is_sound(value.values(), depth - 1):
                return False
        elif kind is list or kind is tuple:
            if not depth or not _is_sound(value, depth - 1):
                return False
        # From here on the subclasses: enumerations, SafeString, OrderedDict, named tuples.
        elif isinstance(value, dict):
            # By `items`, as the serialisers do: some dicts (QueryDict) present other values than they store.
            if not _is_sound((dict(value.items()),), depth):
                return False
        elif kind is msgpack.ExtType:
            return False
        elif isinstance(value, (list, tuple)):
            if not depth or not _is_sound(value, depth - 1):
                return False
        elif isinstance(value, int):
            if not INT_MIN <= value <= INT_MAX:
                return False
        elif not isinstance(value, _LEAF_BASES):
            return False
    return True


_SURROGATE = "a lone surrogate, half a character that UTF-8 cannot carry."
_OR_MSGPACK = "or set serializer_format to 'msgpack'."


class _Place(NamedTuple):
    """A value inside a message and the way to it."""

    value: Any
    step: str
    parent: _Place | None
    depth: int

    def __str__(self) -> str:
        steps = []
        place: _Place | None = self
        while place is not None:
            steps.append(place.step)
            place = place.parent
        steps.reverse()
        if len(steps) > 9:
            steps[5:-3] = ["…"]
        return "".join(steps)


def _find_fault(message: object, *, as_json: bool) -> str | None:
    """What keeps `message` from being sent, as a sentence with the path to it; None if nothing does.

    The slow twin of `_is_sound`. It must find whatever that function or the serialiser refuses, and keeps a
    stack of its own, as it may be called because Python's was too small.
    """
    todo = [_Place(message, "message", None, 0)]
    while todo:
        place = todo.pop()
        fault = _fault_at(place, as_json)
        if fault is not None:
            return f"{place} {fault}"
        value = place.value
        inner: list[_Place] = []
        if isinstance(value, dict):
            inner = [_Place(v, f"[{_quoted(k)}]", place, place.depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            inner = [_Place(v, f"[{i}]", place, place.depth + 1) for i, v in enumerate(value)]
        todo.extend(reversed(inner))
    return None


def _fault_at(place: _Place, as_json: bool) -> str | None:
    value = place.value
    if isinstance(value, msgpack.ExtType):
        return _wrong_type(value)
    if isinstance(value, (dict, list, tuple)):
        return _fault_of_container(place)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return None if _is_encodable(value) else f"holds {_SURROGATE}"
    if isinstance(value, int):
        return (
            None
            if INT_MIN <= value <= INT_MAX
            else "does not fit into 64 bits, signed. Send it as a str."
        )
    if isinstance(value, float):
        if as_json and not math.isfinite(value):
            return f"is not a finite number, which JSON cannot carry. Send None, {_OR_MSGPACK}"
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        if as_json:
            return f"is {type(value).__name__}, which JSON cannot carry. Send it as text (base64), {_OR_MSGPACK}"
        if isinstance(value, memoryview) and not value.c_contiguous:
            return "is a memoryview of scattered memory. Send bytes() of it."
        return None
    return _wrong_type(value)


def _fault_of_container(place: _Place) -> str | None:
    above = place.parent
    while above is not None:
        if above.value is place.value:
            return f"contains itself: it is {above} again."
        above = above.parent
    if place.depth >= MAX_DEPTH:
        return f"is nested too deeply: at most {MAX_DEPTH} levels of dicts and lists."
    if isinstance(place.value, dict):
        for key in place.value:
            if not isinstance(key, str):
                return f"has a key of type {type(key).__name__}: keys must be str."
            if not _is_encodable(key):
                return f"has a key with {_SURROGATE}"
    return None


_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (enum.Enum, "its .value"),
    ((datetime.date, datetime.time), "its .isoformat()"),  # datetime.datetime is a date
    (datetime.timedelta, "its .total_seconds()"),
    ((uuid.UUID, decimal.Decimal), "str() of it"),
    ((set, frozenset, range), "a list of it"),
)


def _wrong_type(value: object) -> str:
    kind = type(value)
    advice = "what identifies it, or a dict of plain values"
    for types, better in _ADVICE:
        if isinstance(value, types):
            advice = better
            break
    else:
        if kind.__name__ == "__proxy__":  # Django's lazy translations
            advice = "str() of it"
        elif hasattr(kind, "_meta") and hasattr(kind, "pk"):  # a model
            advice = "its primary key"
        elif hasattr(kind, "__iter__"):  # generators, views, querysets, arrays
            advice = "a list of plain values"
        elif hasattr(kind, "__index__"):  # numpy's integers
            advice = "int() of it"
    return (
        f"is of type {kind.__module__}.{kind.__qualname__}, which a message cannot carry "
        f"(None, bool, int, float, str, bytes, list, dict). Send {advice}."
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(key: str) -> str:
    return json.dumps(
        key if len(key) <= 40 else key[:39] + "…", ensure_ascii=not _is_encodable(key)
    )


def _unknown_format(payload: bytes) -> str:
    return f"A stored message is in no format that pg_layer knows ({len(payload)} bytes)."


def _to_json(message: object) -> bytes:
    return _json_encode(message).encode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# The depth is known by then, and with it that there are no circles.
_json_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode
_from_json = json.JSONDecoder(parse_constant=_no_constant).decode


def _make_crypter(keys: Sequence[str | bytes], prefix: str) -> Crypter:
    from pg_layer._messages.encryption import Crypter  # only here, as it needs cryptography

    return Crypter(keys, prefix)
