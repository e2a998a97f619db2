"""Support for the tests of projects: captured messages, clean layers, a layer in memory.

See docs/how-to/testing.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

from channels import DEFAULT_CHANNEL_LAYER
from channels.layers import get_channel_layer
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import connections
from django.db.models import Q
from django.db.models.functions import Now

from pg_layer._db.same_database import alias_of
from pg_layer._in_memory import InMemoryChannelLayer, Memory, Sent
from pg_layer._messages.addresses import channel_address, group_address, group_name
from pg_layer._process.shutdown import registered
from pg_layer._runtime.databases_of_tests import is_test_database, used_layers
from pg_layer._sync.django_session import is_in_transaction
from pg_layer.layer import PostgresChannelLayer

__all__ = ["InMemoryChannelLayer", "Sent", "captured_messages", "reset_layers"]

MAX_TEST_DURATION = timedelta(days=1)  # a test may stop at a breakpoint
OUTSIDE_LOCK_TIMEOUT = 5000  # milliseconds


# ---------------------------------------------------------------------- sent messages


@contextmanager
def captured_messages(
    *,
    groups: Iterable[str] = (),
    channels: Iterable[str] = (),
    layer: str = DEFAULT_CHANNEL_LAYER,
    using: str | None = None,
) -> Iterator[list[Sent]]:
    """Capture the messages that a block sends to these groups and channels.

    Yield a list that is filled at the end of the block, in the order of sending. It has the
    messages of `layer.sync`, of the asynchronous calls and of SQL, unless they were rolled back.
    The function reads the layer's tables on Django's connection. So it finds what the test's
    transaction has written and what others have committed, also other processes. It does not find
    messages to a channel that have been received. A normal channel that is a member of a group is
    sent its own message, which is listed if the channel is captured.

    Messages to a group without members may not be written. Therefore each group has an additional
    member during the block, which `group_count` counts.

    ``layer``: an alias in CHANNEL_LAYERS. ``using``: the alias in DATABASES that the calls of
    `layer.sync` name. Raises `ValueError` without groups and channels. For synchronous code only:
    Django raises `SynchronousOnlyOperation` on the thread of a running event loop.
    """
    groups, channels = _names("groups", groups), _names("channels", channels)
    if not groups and not channels:
        raise ValueError(
            "captured_messages() needs groups or channels to capture what is sent to them."
        )
    channel_layer = _layer(layer)
    for group in groups:
        channel_layer.require_valid_group_name(group)
    for channel in channels:
        channel_layer.require_valid_channel_name(channel)
    sent: list[Sent] = []
    if isinstance(channel_layer, InMemoryChannelLayer):
        with channel_layer._capture() as captured:
            yield sent
        sent += [each for each in captured if each.group in groups or each.channel in channels]
    else:
        alias = using or alias_of(channel_layer.config)
        with ExitStack() as stack:
            run_outside = _outside_of_transaction(stack, alias)
            capture = _Capture(channel_layer, groups, channels, alias, run_outside)
            try:
                capture.begin()
                yield sent
                sent += capture.sent()
            except BaseException:
                with suppress(DjangoError):  # a broken transaction is rolled back
                    capture.end()
                raise
            capture.end()


def _outside_of_transaction(stack: ExitStack, alias: str) -> Callable[[Callable[[], Any]], Any]:
    """Return a caller of functions whose queries are not part of the open transaction, if any."""
    if not is_in_transaction(connections[alias]):
        return lambda function: function()
    # Another thread has connections of its own.
    thread = stack.enter_context(ThreadPoolExecutor(1, "pg_layer-captured"))
    stack.callback(lambda: thread.submit(connections.close_all).result())

    def prepare() -> None:
        # The thread of the test waits for this one: its transaction would keep a lock for ever.
        with connections[alias].cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {OUTSIDE_LOCK_TIMEOUT}")

    thread.submit(prepare).result()
    return lambda function: thread.submit(function).result()


class _Capture:
    """The messages in the tables of one database that were sent during a block.

    ``run_outside``: calls a function, whose writes are committed at once.
    """

    def __init__(
        self,
        layer: PostgresChannelLayer,
        groups: list[str],
        channels: list[str],
        alias: str,
        run_outside: Callable[[Callable[[], Any]], Any],
    ) -> None:
        # Django's apps are ready now, which the import of models needs.
        from pg_layer.models import Membership, Message

        self._layer = layer
        self._groups = groups
        self._alias = alias
        self._run_outside = run_outside
        prefix = layer.config.prefix
        self._own_channel = f"specific.{secrets.token_hex(8)}!captured"
        own_address = channel_address(prefix, self._own_channel)
        self._group_of = {group_address(prefix, group): group for group in groups}
        addresses = [channel_address(prefix, channel) for channel in channels]
        self._memberships = Membership.objects.using(alias).filter(address=own_address)
        self._control_messages = Message.objects.using(alias).filter(address=own_address)
        self._messages = Message.objects.using(alias).filter(
            Q(address__in=self._group_of) | Q(address__in=addresses, channel__in=channels),
            kind="message",
        )
        self._earlier: set[int] = set()

    def begin(self) -> None:
        """Note the earlier messages, and add a member to each group."""
        self._earlier = self._read(lambda: self._messages.values_list("id", flat=True))
        # The member is committed, for the asynchronous calls. A transaction with one snapshot
        # (REPEATABLE READ) does not see it, and has a member of its own.
        self._run_outside(self._add_member)
        if not self._memberships.exists():
            self._add_member()

    def sent(self) -> list[Sent]:
        """Return the messages since `begin`."""
        rows = self._read(lambda: self._messages.exclude(id__in=self._earlier))
        return [self._sent(row) for row in sorted(rows, key=lambda row: row.id)]

    def end(self) -> None:
        """Remove the members."""
        self._run_outside(self._remove_member)
        self._remove_member()

    def _read(self, query: Callable[[], Iterable[Any]]) -> set[Any]:
        """Return what the transaction sees, and what was committed besides."""
        return set(query()) | set(self._run_outside(lambda: list(query())))

    def _sent(self, row: Any) -> Sent:
        group = self._group_of.get(row.address)
        name = row.channel or "" if group is None else group_name(group)
        codec = self._layer._codec
        message = codec.decode(codec.open(bytes(row.payload), name), self._layer.deserialize)
        return Sent(message, group, row.channel, None if group is None else row.excluded)

    def _add_member(self) -> None:
        for group in self._groups:
            self._layer.sync.group_add(group, self._own_channel, using=self._alias)
        self._memberships.update(expires_at=Now() + MAX_TEST_DURATION)

    def _remove_member(self) -> None:
        # With the control messages to the owner of the channel.
        self._memberships.delete()
        self._control_messages.delete()


def _names(what: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{what} must be a list of names, not a str: {what}=[{names!r}].")
    return list(names)


def _layer(alias: str) -> PostgresChannelLayer:  # or its subclass in memory
    layer = get_channel_layer(alias)
    if not isinstance(layer, PostgresChannelLayer):
        what = "does not exist" if layer is None else f"is a {type(layer).__name__}"
        raise ImproperlyConfigured(
            f"pg_layer: CHANNEL_LAYERS[{alias!r}] {what}: captured_messages() needs a"
            " pg_layer.PostgresChannelLayer or a pg_layer.testing.InMemoryChannelLayer."
        )
    return layer


# ---------------------------------------------------------------------- clean layers


def reset_layers(databases: Container[str] = ()) -> None:
    """Flush and close all layers that were used in this process. They can be used again.

    Only a layer that was used in a test database of Django is flushed, or on an alias that
    ``databases`` names. A layer with a ``dsn`` is closed but not flushed, because its database may
    not be a test database. If another layer was not flushed, the function raises
    `ImproperlyConfigured` when it has closed all.

    May be called from any thread, also while an event loop runs in it. It does not wait until other
    processes have emptied their channels: `PostgresChannelLayer.flush` does.
    """
    close_layers(databases, may_leave=False)


def close_layers(databases: Container[str] = (), *, may_leave: bool) -> None:
    """Do what `reset_layers` does. ``may_leave``: do not raise if a layer was not flushed."""
    for memory in registered():
        if isinstance(memory, Memory):
            memory.reset()
    left = set()
    with ExitStack() as stack:
        for loops in used_layers():
            alias = loops.using
            may_flush = alias is not None and (alias in databases or is_test_database(alias))
            stack.callback(loops.close_now, is_flushing=may_flush)
            if alias is not None and not may_flush:
                left.add(alias)
    if left and not may_leave:
        raise ImproperlyConfigured(
            "pg_layer: the layer was closed and not flushed, because it was used on a database that"
            f" is no test database: {', '.join(sorted(left))}. Name it in `databases` of the test"
            " case; with pytest, mark the test: @pytest.mark.django_db(transaction=True)."
            " Or, if all messages and memberships in it may be removed, call"
            f" reset_layers(databases={sorted(left)})."
        )
