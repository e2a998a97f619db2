"""Operations: the calls of the application, checked and encoded for a write. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pg_layer._config.options import MAX_SECONDS, Config
from pg_layer._messages.addresses import group_name
from pg_layer._messages.codec import Codec
from pg_layer.exceptions import InvalidMessage, MessageTooLarge

MAX_MANY = 100_000  # messages of one call, which one statement writes
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


class OperationBuilder:
    """A builder of operations from the arguments of calls.

    Every method checks its arguments before anything is sent. It raises `TypeError` for an invalid
    name, `InvalidMessage` or `MessageTooLarge` for a message, `TypeError` or `ValueError` for an
    expiry or a list of messages.
    """

    def __init__(
        self,
        config: Config,
        codec: Codec,
        check_channel: Callable[[str], None],
        check_group: Callable[[str], None],
    ) -> None:
        self._config = config
        self._encode = codec.encode
        self._check_channel = check_channel
        self._check_group = check_group

    def send(self, channel: str, message: dict[str, Any], expiry: float | None) -> Send:
        """Return an operation that sends a message to a channel.

        ``expiry``: seconds; None: the option ``expiry``.
        """
        self._check_channel(channel)
        config = self._config
        seconds = config.expiry if expiry is None else _seconds(expiry)
        return Send(channel, self._encode(message, channel), seconds, config.capacity_of(channel))

    def group_send(
        self, group: str, message: dict[str, Any], expiry: float | None, exclude: str | None
    ) -> GroupSend:
        """Return an operation that sends a message to a group.

        ``expiry``: seconds; None: the option ``expiry``. ``exclude``: a member that must not
        receive the message.
        """
        self._check_group(group)
        if exclude is not None:
            self._check_channel(exclude)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        return GroupSend(group, self._encode(message, group_name(group)), seconds, exclude)

    def send_many(
        self, messages: Iterable[tuple[str, dict[str, Any]]], expiry: float | None
    ) -> Many:
        """Return an operation that sends pairs of channel and message.

        ``expiry``: as for `send`. An error about one of the messages names its index.
        """
        sends: list[Send] = []
        pairs = _pairs(messages)
        seconds = self._config.expiry if expiry is None else _seconds(expiry)
        check_channel, encode, capacity_of = (
            self._check_channel,
            self._encode,
            self._config.capacity_of,
        )
        try:
            for channel, message in pairs:
                check_channel(channel)
                sends.append(Send(channel, encode(message, channel), seconds, capacity_of(channel)))
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
            self._check_channel(exclude)
        check_group, encode = self._check_group, self._encode
        try:
            for group, message in pairs:
                check_group(group)
                sends.append(GroupSend(group, encode(message, group_name(group)), seconds, exclude))
        except _INVALID as error:
            raise _of_item(len(sends), error) from error
        return _many(sends)

    def change(self, group: str, channel: str, *, added: bool) -> Change:
        """Return an operation that adds a channel to a group, or discards it."""
        self._check_group(group)
        self._check_channel(channel)
        return Change(group, channel, added, self._config.capacity_of(channel))

    def group(self, group: str) -> str:
        """Check the name of a group, and return it."""
        self._check_group(group)
        return group


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
