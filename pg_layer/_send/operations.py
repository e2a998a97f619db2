"""Operations: the calls of the application, checked and encoded for a write. No I/O."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from django.core.exceptions import ImproperlyConfigured

from pg_layer._config.options import MAX_COUNT, MAX_SECONDS, Config
from pg_layer._messages.addresses import group_name
from pg_layer._messages.codec import Codec
from pg_layer.exceptions import InvalidMessage, MessageTooLarge

MAX_MANY = 100_000  # messages of one call, which one statement writes
MAX_REMEMBERED_NAMES = 10_000
MAX_MANY_BYTES = 256 * 1024 * 1024
_INVALID = (InvalidMessage, MessageTooLarge, TypeError)  # errors about a single message


class Send(NamedTuple):
    """A message for a channel. ``expiry``: seconds. ``capacity``: of the channel."""

    channel: str
    payload: bytes
    expiry: float
    capacity: int


class GroupSend(NamedTuple):
    """A message for a group. ``expiry``: seconds. The member ``excluded`` does not receive it."""

    group: str
    payload: bytes
    expiry: float
    excluded: str | None


class Many(NamedTuple):
    """Messages for one statement, all for channels or all for groups."""

    operations: Sequence[Send] | Sequence[GroupSend]


class Change(NamedTuple):
    """A channel that is added to a group, or discarded from it. ``capacity``: of the channel."""

    group: str
    channel: str
    added: bool
    capacity: int


Operation = Send | GroupSend | Many | Change


class Rules(Protocol):
    """What a builder asks its layer. A subclass of the layer may override these methods."""

    def require_valid_channel_name(self, name: str) -> bool:
        """Raise `TypeError` for an invalid name."""
        ...

    def require_valid_group_name(self, name: str) -> bool:
        """Raise `TypeError` for an invalid name."""
        ...

    def get_capacity(self, channel: str) -> int:
        """Return how many messages may wait in a channel."""
        ...

    def serialize(self, message: dict[str, Any]) -> bytes:
        """Return the bytes of a message."""
        ...


class OperationBuilder:
    """A builder of operations from the arguments of calls.

    Every method checks its arguments before anything is sent. It raises `TypeError` for an invalid
    name, `InvalidMessage` or `MessageTooLarge` for a message, `TypeError` or `ValueError` for an
    expiry or a list of messages, and the errors of methods that a subclass of the layer overrides.

    ``layer``: the builder keeps no reference to it, so that a layer without other references ends
    at once. Callers hold it; without it `queue_capacity` follows the options.
    ``overridden``: the names of the `Rules` that a subclass overrides. The others are not called:
    to call them costs a tenth of the time of a method here.
    """

    def __init__(
        self, layer: Rules, config: Config, codec: Codec, overridden: Collection[str]
    ) -> None:
        self._layer_ref = weakref.ref(layer)
        self._has_own_capacity = "get_capacity" in overridden
        self._has_own_serialize = "serialize" in overridden
        self._config = config
        self._encode = codec.encode
        # Names that were found valid. The check is a large part of the cost of a call.
        self._valid_channels: set[str] = set()
        self._valid_groups: set[str] = set()

    def _layer(self) -> Rules:
        layer = self._layer_ref()
        if layer is None:
            raise RuntimeError("The channel layer no longer exists.")
        return layer

    def check_channel(self, channel: str) -> None:
        """Raise `TypeError` for an invalid name of a channel."""
        if channel.__class__ is not str or channel not in self._valid_channels:
            self._layer().require_valid_channel_name(channel)
            _remember(self._valid_channels, channel)

    def check_group(self, group: str) -> None:
        """Raise `TypeError` for an invalid name of a group."""
        if group.__class__ is not str or group not in self._valid_groups:
            self._layer().require_valid_group_name(group)
            _remember(self._valid_groups, group)

    def queue_capacity(self, channel: str) -> int:
        """Return the capacity of a channel that this process reads. From any thread.

        If `get_capacity` fails, the options decide: senders raise its error, receiving continues.
        """
        try:
            return self._capacity_of(channel)
        except Exception:
            return self._config.capacity_of(channel)

    def _capacity_of(self, channel: str) -> int:
        if not self._has_own_capacity:
            return self._config.capacity_of(channel)
        capacity = self._layer().get_capacity(channel)
        if not isinstance(capacity, int) or not 1 <= capacity <= MAX_COUNT:
            raise ImproperlyConfigured(
                f"get_capacity() of the channel layer must return an integer from 1 to {MAX_COUNT},"
                f" not {capacity!r}, for channel {channel}."
            )
        return capacity

    def _serialize(self) -> Callable[[dict[str, Any]], bytes] | None:
        return self._layer().serialize if self._has_own_serialize else None

    def send(self, channel: str, message: dict[str, Any], expiry: float | None) -> Send:
        """Return an operation that sends a message to a channel.

        ``expiry``: seconds; None: the option ``expiry``.
        """
        self.check_channel(channel)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        payload = self._encode(message, channel, self._serialize())
        return Send(channel, payload, seconds, self._capacity_of(channel))

    def group_send(
        self, group: str, message: dict[str, Any], expiry: float | None, exclude: str | None
    ) -> GroupSend:
        """Return an operation that sends a message to a group.

        ``expiry``: seconds; None: the option ``expiry``. ``exclude``: a member that must not
        receive the message.
        """
        self.check_group(group)
        if exclude is not None:
            self.check_channel(exclude)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        payload = self._encode(message, group_name(group), self._serialize())
        return GroupSend(group, payload, seconds, exclude)

    def send_many(
        self, messages: Iterable[tuple[str, dict[str, Any]]], expiry: float | None
    ) -> Many:
        """Return an operation that sends pairs of channel and message.

        ``expiry``: as for `send`. An error about one of the messages names its index.
        """
        sends: list[Send] = []
        pairs = _pairs(messages)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        check_channel, encode, serialize = self.check_channel, self._encode, self._serialize()
        capacity_of = self._capacity_of if self._has_own_capacity else self._config.capacity_of
        try:
            for channel, message in pairs:
                check_channel(channel)
                payload = encode(message, channel, serialize)
                sends.append(Send(channel, payload, seconds, capacity_of(channel)))
        except _INVALID as error:
            raise _of_item(len(sends), error) from error
        return _many(sends)

    def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        expiry: float | None,
        exclude: str | None,
    ) -> Many:
        """Return an operation that sends pairs of group and message.

        ``expiry``, ``exclude``: as for `group_send`, for all messages. An error about one of the
        messages names its index.
        """
        sends: list[GroupSend] = []
        pairs = _pairs(messages)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        if exclude is not None:
            self.check_channel(exclude)
        check_group, encode, serialize = self.check_group, self._encode, self._serialize()
        try:
            for group, message in pairs:
                check_group(group)
                payload = encode(message, group_name(group), serialize)
                sends.append(GroupSend(group, payload, seconds, exclude))
        except _INVALID as error:
            raise _of_item(len(sends), error) from error
        return _many(sends)

    def change(self, group: str, channel: str, *, added: bool) -> Change:
        """Return an operation that adds a channel to a group, or discards it."""
        self.check_group(group)
        self.check_channel(channel)
        return Change(group, channel, added, self._capacity_of(channel))

    def group(self, group: str) -> str:
        """Check the name of a group, and return it."""
        self.check_group(group)
        return group


def _remember(names: set[str], name: str) -> None:
    if len(names) >= MAX_REMEMBERED_NAMES:
        names.clear()
    names.add(name)


def _seconds(expiry: float) -> float:
    if not isinstance(expiry, (int, float)) or isinstance(expiry, bool):
        raise TypeError(f"expiry must be a number of seconds, not {type(expiry).__name__}.")
    if not 0 < expiry <= MAX_SECONDS:
        raise ValueError(
            f"expiry must be a number of seconds above 0, at most {MAX_SECONDS}, not {expiry}."
        )
    return expiry


def _pairs(messages: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(messages, (str, bytes, dict)):
        raise TypeError(
            f"Messages must be an iterable of (name, message) pairs, not {type(messages).__name__}."
        )
    pairs = list(messages)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"Item {index} of the messages must be a (name, message) pair.")
    if len(pairs) > MAX_MANY:
        raise ValueError(f"{len(pairs)} messages are too many for one call: at most {MAX_MANY}.")
    return pairs


def _of_item(index: int, error: Exception) -> Exception:
    kind = next(kind for kind in _INVALID if isinstance(error, kind))
    return kind(f"Item {index}: {error}")


def _many(operations: Sequence[Send] | Sequence[GroupSend]) -> Many:
    size = sum(len(operation.payload) for operation in operations)
    if size > MAX_MANY_BYTES:
        raise MessageTooLarge(
            f"The messages of a call may be {MAX_MANY_BYTES} bytes long together, not {size}:"
            " make several calls."
        )
    return Many(operations)
