"""Serialisation, validation and encryption of messages, and the reverse. No I/O. Thread-safe.

The first byte of a payload is its format. So readers understand every format, whichever they write
themselves, and a deployment can change the format while rows in both are in the table:

- ``{``: JSON in UTF-8. SQL callers and ``serializer_format="json"`` write it.
- 0x80-0x8f, 0xde, 0xdf: a map of msgpack.
- ``g``: a Fernet token (all begin with this byte). It holds one of the above, and the name
  that the message was sent to: see `pg_layer._messages.encryption`.

A message may contain what the specification lists
(https://channels.readthedocs.io/en/latest/channel_layer_spec.html): bytes, str, signed
64-bit int, float, list, dict with str keys, bool and None. Unsigned 64-bit ints are accepted, as
msgpack can write them. Tuples are accepted, and arrive as lists.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import traceback
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
_PLAIN_BEGINNINGS = frozenset(bytes((first,)) for first in _PLAIN_FIRST)

INT_MIN = -(2**63)
INT_MAX = 2**64 - 1
# Levels of dicts and lists; the message itself is the first. All serialisers and their
# readers support this depth.
MAX_DEPTH = 200

# Top-level keys with this beginning belong to channel layers: channels_redis keeps its
# routing in one.
_RESERVED = "__asgi_"

# Types that contain no other values, and whose values `_is_sound` does not check. The
# serialiser itself refuses what is wrong with such a value: a lone surrogate; in JSON also
# bytes and NaN.
_LEAVES = frozenset((str, float, bool, type(None), bytes, bytearray, memoryview))
_IMMUTABLE = frozenset((str, int, float, bool, type(None), bytes))
_LEAF_BASES = (str, float, bytes, bytearray)


class Template:
    """A plaintext that several readers decode, each into a message of its own.

    A message without lists and dicts in it is decoded once, and then copied: no reader can
    change a value that it shares with others.
    """

    __slots__ = ("flat", "is_flat", "plaintext")

    def __init__(self, plaintext: bytes) -> None:
        self.plaintext = plaintext
        self.is_flat: bool | None = None  # not known yet
        self.flat: dict[str, Any] = {}


class Codec:
    """A converter of messages into payloads, and of payloads into messages.

    ``serializer_format``: "msgpack" or "json". It decides how messages are written; a
    payload itself decides how it is read.
    ``max_message_size``: the limit in bytes for the serialised message before encryption.
    Encryption adds the name of the channel or group, a third, and about 100 bytes.
    ``keys``: the first one encrypts, all of them decrypt. None: payloads are not encrypted.
    ``prefix``: the prefix of the layer.
    ``allow_unencrypted``: read plain payloads although there are keys.

    ``pg_layer._config.options`` has checked the arguments.
    Raises ``ImportError`` for keys without the package ``cryptography``.
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
        # `packb` makes a packer for each message, which costs 0.2 µs more than one packer for
        # each thread. But a finaliser that sends could enter that packer while it works, and
        # it would keep the largest buffer that it ever needed.
        self._pack: Callable[[object], bytes] = (
            _to_json if serializer_format == "json" else msgpack.packb
        )
        self._crypter = _make_crypter(keys, prefix) if keys else None

    def encode(
        self, message: object, name: str, serialize: Callable[[dict[str, Any]], bytes] | None = None
    ) -> bytes:
        """Return the payload for a message to ``name``: a channel, or ``@<group>``.

        If there are keys, the payload is encrypted for this name alone.
        ``serialize``: returns the plaintext; default: `serialise`.

        Raises ``InvalidMessage`` for a message that is no dict, ``MessageTooLarge`` above
        ``max_message_size``, ``TypeError`` for a plaintext in an unknown format, and the errors of
        ``serialize``.
        """
        if not isinstance(message, dict):
            raise InvalidMessage(f"A message must be a dict, not {type(message).__name__}.")
        if serialize is None:
            plaintext = self.serialise(message)
        else:
            plaintext = serialize(message)
            if type(plaintext) is not bytes or plaintext[:1] not in _PLAIN_BEGINNINGS:
                raise TypeError(_wrong_serialization(plaintext))
        if len(plaintext) > self._max_message_size:
            raise MessageTooLarge(
                f"The message is {len(plaintext)} bytes long when serialised; "
                f"max_message_size is {self._max_message_size} bytes."
            )
        return plaintext if self._crypter is None else self._crypter.encrypt(plaintext, name)

    def serialise(self, message: dict[str, Any]) -> bytes:
        """Return the plaintext for a message. Neither change nor keep the message.

        Raises ``InvalidMessage`` for values that the specification (or JSON, if it is the format)
        cannot carry, for top-level keys that begin with ``__asgi_``, and for more than
        ``MAX_DEPTH`` levels.
        """
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
                    f"The message's keys must not begin with {_RESERVED!r}: "
                    "these belong to channel layers."
                )
        return payload

    def _reason_for_refusing(self, message: object, error: Exception | None) -> Exception:
        # The errors of serialisers quote values of the message, which must not appear in logs.
        # Pass one on only if the message itself has no problem: no memory, no stack.
        problem = _find_problem(message, as_json=self._serializer_format == "json")
        if problem is not None:
            return InvalidMessage(problem)
        return error or InvalidMessage(
            "The message could not be serialised: it changed while it was sent."
        )

    def open(self, payload: bytes, name: str) -> bytes:
        """Return the plaintext of a stored payload, which each reader gives to `decode`.

        ``name``: the channel or ``@<group>`` of the row in which the payload was found.

        Raises ``UndecodableMessage`` for a payload in no known format, for one that no key
        opens or that was encrypted for another name, and for an encrypted one if there are
        no keys. Also for a plain one if there are keys and plain ones are not allowed. Otherwise
        every role that can write to the table could forge messages.
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
                "Was it sent from SQL, or by a process without keys? "
                "allow_unencrypted would deliver it."
            )
        if first != _FERNET_FIRST:
            raise UndecodableMessage(_unknown_format(payload))
        return self._crypter.decrypt(payload, name)

    def decode(
        self,
        plaintext: bytes | Template,
        deserialize: Callable[[bytes], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return the message in a plaintext that `open` returned.

        The message is a new object at each call: readers share nothing that can change.
        ``deserialize``: returns the message; default: `deserialise`.
        Raises ``UndecodableMessage``, and no other error, for anything but a whole message.
        """
        if isinstance(plaintext, Template):
            return self._decode_again(plaintext, deserialize)
        if deserialize is None:
            return self.deserialise(plaintext)
        try:
            message = deserialize(plaintext)
        except UndecodableMessage:
            raise
        except Exception as error:  # its text may hold the message: do not use it
            raise UndecodableMessage(_error_in_deserialize(error)) from None
        if not isinstance(message, dict):
            raise UndecodableMessage(
                f"deserialize() returned {type(message).__name__} for a stored message, not a dict."
            )
        return message

    def deserialise(self, plaintext: bytes) -> dict[str, Any]:
        """Return the message in a plaintext in one of the formats of this module.

        Raises ``UndecodableMessage``, and no other error.
        """
        first = plaintext[0] if plaintext else -1
        try:
            message: Any = None
            if first in _MSGPACK_FIRST:
                message = msgpack.unpackb(plaintext, raw=False, strict_map_key=True)
            elif first == _JSON_FIRST:
                message = _from_json(plaintext.decode())
        except Exception:
            pass  # many of these errors hold the payload: use neither their text nor their cause
        if type(message) is dict:
            return message
        if first in _PLAIN_FIRST:
            name = "JSON" if first == _JSON_FIRST else "msgpack"
            raise UndecodableMessage(
                f"A stored message is damaged: {len(plaintext)} bytes that are no valid {name}."
            )
        raise UndecodableMessage(_unknown_format(plaintext))

    def _decode_again(
        self, template: Template, deserialize: Callable[[bytes], dict[str, Any]] | None
    ) -> dict[str, Any]:
        if template.is_flat:
            return template.flat.copy()
        message = self.decode(template.plaintext, deserialize)
        if template.is_flat is None:
            is_flat = _IMMUTABLE.issuperset(map(type, message.values()))
            if is_flat:
                template.flat = message.copy()
            template.is_flat = is_flat  # last, because other threads read it first
        return message


def _is_sound(values: Iterable[Any], depth: int) -> bool:  # noqa: C901, RUF100  # the hot path
    """Return whether a message may contain ``values``.

    ``depth``: how many more levels of dicts and lists they may contain. This is the hot path
    of sending. It records no path and gives no reason: `_find_problem` finds both when they
    are needed.
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
        # The rest are subclasses: enumerations, SafeString, OrderedDict, named tuples.
        elif isinstance(value, dict):
            # Use `items`, as the serialisers do: QueryDict returns other values than it stores.
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
    """A value inside a message, and the path to it."""

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


def _find_problem(message: object, *, as_json: bool) -> str | None:
    """Return what is wrong with a message, as a sentence with the path, or None.

    It must find every error for which `_is_sound` or the serialiser refuses a message. It uses a
    stack of its own, because it may be called when Python's stack was too small for the message.
    """
    todo = [_Place(message, "message", None, 0)]
    while todo:
        place = todo.pop()
        problem = _problem_at(place, as_json)
        if problem is not None:
            return f"{place} {problem}"
        value = place.value
        inner: list[_Place] = []
        if isinstance(value, dict):
            inner = [_Place(v, f"[{_quoted(k)}]", place, place.depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            inner = [_Place(v, f"[{i}]", place, place.depth + 1) for i, v in enumerate(value)]
        todo.extend(reversed(inner))
    return None


def _problem_at(place: _Place, as_json: bool) -> str | None:
    value = place.value
    if isinstance(value, msgpack.ExtType):
        return _wrong_type(value)
    if isinstance(value, (dict, list, tuple)):
        return _problem_of_container(place)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return None if _is_encodable(value) else f"holds {_SURROGATE}"
    if isinstance(value, (int, float)):
        return _problem_of_number(value, as_json)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _problem_of_bytes(value, as_json)
    return _wrong_type(value)


def _problem_of_number(value: float, as_json: bool) -> str | None:
    if isinstance(value, int):
        if INT_MIN <= value <= INT_MAX:
            return None
        return "does not fit into 64 bits: -2**63 to 2**64 - 1. Send it as a str."
    if as_json and not math.isfinite(value):
        return f"is not a finite number, which JSON cannot carry. Send None, {_OR_MSGPACK}"
    return None


def _problem_of_bytes(value: bytes | bytearray | memoryview, as_json: bool) -> str | None:
    if as_json:
        kind = type(value).__name__
        return f"is {kind}, which JSON cannot carry. Send it as text (base64), {_OR_MSGPACK}"
    if isinstance(value, memoryview) and not value.c_contiguous:
        return "is a memoryview of scattered memory. Send bytes() of it."
    return None


def _problem_of_container(place: _Place) -> str | None:
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


def _wrong_serialization(plaintext: object) -> str:
    what = type(plaintext).__name__
    if isinstance(plaintext, bytes):
        what = "other bytes" if plaintext else "no bytes"
    return (
        f"serialize() must return a map of msgpack, or an object of JSON in UTF-8, not {what}: "
        "the first byte of a stored message says its format."
    )


def _error_in_deserialize(error: Exception) -> str:
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return (
        f"deserialize() raised {type(error).__name__} for a stored message, "
        f"at {frame.f_code.co_filename}, line {line}."
    )


def _unknown_format(payload: bytes) -> str:
    return f"A stored message is in no format that pg_layer knows ({len(payload)} bytes)."


def _to_json(message: object) -> bytes:
    return _json_encode(message).encode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# `_is_sound` has limited the depth, so there are no circular references.
_json_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode
_from_json = json.JSONDecoder(parse_constant=_no_constant).decode


def _make_crypter(keys: Sequence[str | bytes], prefix: str) -> Crypter:
    from pg_layer._messages.encryption import Crypter  # needs cryptography

    return Crypter(keys, prefix)
