"""The exceptions of pg_layer.

Errors of operation derive from `PgLayerError`. `ChannelFull` and `MessageTooLarge` are the classes
of `channels.exceptions`, re-exported: code that catches them works with any channel layer. An
invalid channel name raises `TypeError`, as in Channels, and so does an invalid message
(`InvalidMessage`). An invalid configuration raises Django's `ImproperlyConfigured`.
"""

from __future__ import annotations

import inspect

from channels.exceptions import ChannelFull, MessageTooLarge, StopConsumer

__all__ = [
    "ChannelFull",
    "InvalidMessage",
    "LayerUnavailable",
    "MessageTooLarge",
    "NotMigrated",
    "OutcomeUnknown",
    "PgLayerError",
    "UndecodableMessage",
]


class PgLayerError(Exception):
    """The channel layer failed.

    The base class of errors that occur while the layer runs and that the caller did not cause.
    Without another message, the message is the first paragraph of the docstring of the class.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self._default_message())

    @classmethod
    def _default_message(cls) -> str:
        # `python -OO` removes docstrings. The name of the class remains.
        doc = inspect.getdoc(cls) or cls.__name__
        return " ".join(doc.split("\n\n", 1)[0].split())


class LayerUnavailable(PgLayerError):
    """The database could not be reached within send_timeout.

    Raised by calls that write (`send`, `group_send`, `group_add`, `group_discard`, `flush`) and by
    calls that read groups, never by `receive`. A call that certainly did not commit is retried
    until `send_timeout`. A call that may have committed raises the subclass `OutcomeUnknown`.
    After any other `LayerUnavailable` the call has changed nothing and may be repeated. The
    `__cause__` is the error of the database.
    """


class OutcomeUnknown(LayerUnavailable):
    """The connection to the database was lost; it is unknown whether the call took effect.

    The layer does not send such a message again, because that could deliver it twice.
    """


class Stopping(LayerUnavailable, StopConsumer):
    """The process is stopping, the database is unavailable, and the call did not take effect.

    It is also Channels' `StopConsumer`, so that a consumer that raises it ends without a
    traceback. Otherwise each consumer of the process would log one.
    """


class StoppingUnknown(OutcomeUnknown, StopConsumer):
    """The process is stopping, the database is unavailable, and the outcome is unknown."""


class NotBegun(PgLayerError):
    """The event loop that served the channel layer ended before the call began.

    Internal: the layer repeats the call on the loop that takes over. ``may_have_begun``: the call
    may have taken effect, and repeating it does no harm.
    """

    def __init__(self, *, may_have_begun: bool = False) -> None:
        super().__init__()
        self.may_have_begun = may_have_begun


class NotMigrated(PgLayerError):
    """The tables of pg_layer are missing or out of date: run `python manage.py migrate pg_layer`.

    If the layer does not use the database "default", add `--database <alias>` to the command.
    """


class UndecodableMessage(PgLayerError):
    """A stored message could not be read.

    Internal to receiving, which counts the message and drops it. The message is encrypted with
    another key, damaged, or in a format that pg_layer does not know. The text of the error never
    contains a part of the message.
    """


class InvalidMessage(TypeError, ValueError):
    """The message is not a dict, or contains a value that Channels' specification does not allow.

    It is an error in the calling code and therefore not a `PgLayerError`: code that catches
    `PgLayerError` to retry must not hide it. It is a `TypeError`, because Channels raises that for
    invalid names. It is also a `ValueError`, because some values have the right type and are out of
    range. The text gives the path to the value, never the value.
    """
