"""The exceptions of pg_layer, one tree for faults of operation and Channels' own where it has one.

`ChannelFull` and `MessageTooLarge` are the classes of `channels.exceptions`, re-exported, so that code which
catches them works with any channel layer. A bad channel name is a `TypeError`, as in Channels itself, and so
is a bad message (`InvalidMessage`). A bad configuration is Django's `ImproperlyConfigured`.
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

    The base of what can go wrong while the layer runs, through no fault of the caller. The first paragraph of
    a class's docstring is its message unless another is given.
    """

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self._default_message())

    @classmethod
    def _default_message(cls) -> str:
        # Docstrings are gone under `python -OO`; the name still says what happened.
        doc = inspect.getdoc(cls) or cls.__name__
        return " ".join(doc.split("\n\n", 1)[0].split())


class LayerUnavailable(PgLayerError):
    """The database could not be reached within send_timeout.

    Raised by what writes (`send`, `group_send`, `group_add`, `group_discard`, `flush`), never by `receive`. A
    call that surely did not commit is retried until `send_timeout`. One that may have committed raises
    `OutcomeUnknown`, a subclass: after any other the call has changed nothing, and may be made again. The
    database's own error is the `__cause__`.
    """


class OutcomeUnknown(LayerUnavailable):
    """The connection to the database was lost; it is unknown whether the call took effect.

    A message is not sent again then, as that could deliver it twice.
    """


class Stopping(LayerUnavailable, StopConsumer):
    """The process is stopping while the database is away; the call did not take effect.

    Channels ends a consumer that raises it, without a traceback: each consumer of the process would have one.
    """


class StoppingUnknown(OutcomeUnknown, StopConsumer):
    """The same of a call that was under way; it is unknown whether it took effect."""


class NotBegun(PgLayerError):
    """The event loop that served the channel layer ended before the call began.

    Internal: the call is made again on the loop that takes over. ``may_have_begun``: it may have taken
    effect already, and does no harm if it is made twice.
    """

    def __init__(self, *, may_have_begun: bool = False) -> None:
        super().__init__()
        self.may_have_begun = may_have_begun


class NotMigrated(PgLayerError):
    """The tables of pg_layer are missing or out of date: run `python manage.py migrate pg_layer`.

    Where the layer does not use the database "default", the command needs `--database <alias>`, too.
    """


class UndecodableMessage(PgLayerError):
    """A stored message could not be read.

    Internal to the receiving side, which counts such a message and drops it: written with another key,
    damaged, or in no format that pg_layer knows. The text never holds any part of the message.
    """


class InvalidMessage(TypeError, ValueError):
    """The message is not a dict, or holds something that the specification has no place for.

    A mistake in the calling code, hence no `PgLayerError`: who catches those to retry must not swallow this.
    It is a `TypeError` as Channels raises for bad names, and a `ValueError` too, as some values have the
    right type but are out of range. The text names the path to the value, never the value.
    """
