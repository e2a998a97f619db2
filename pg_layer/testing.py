"""For tests of projects that use the layer: what was sent in a test's transaction, and clean layers after it.

See docs/testing.md. Loaded by ``pytest_plugins``, it resets layers after each test by itself.
"""

from __future__ import annotations

import inspect
import secrets
import unittest
from collections.abc import Container, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from asgiref.sync import SyncToAsync, async_to_sync
from channels import DEFAULT_CHANNEL_LAYER
from channels.layers import get_channel_layer
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as DjangoError
from django.db import connections
from django.db.models import Q
from django.db.models.functions import Now
from django.test import TestCase, TransactionTestCase

from pg_layer._config.databases import alias_of
from pg_layer._messages.addresses import channel_address, group_address, group_name
from pg_layer._process.shutdown import registered
from pg_layer._runtime.engine import Engine
from pg_layer._runtime.loops import Loops
from pg_layer.layer import PostgresChannelLayer

try:
    import pytest
except ImportError:
    HAS_PYTEST = False
else:
    HAS_PYTEST = True

FOR_DATABASES = {
    "db",
    "transactional_db",
    "live_server",
}  # fixtures of pytest-django, which others need
LONGEST_TEST = timedelta(days=1)  # it may stop at a breakpoint


# ---------------------------------------------------------------------- what was sent


class Sent(NamedTuple):
    """A message that was sent to a group, but for the member ``exclude``, or to a channel."""

    message: dict[str, Any]
    group: str | None = None
    channel: str | None = None
    exclude: str | None = None


@contextmanager
def captured_messages(
    *,
    groups: Iterable[str] = (),
    channels: Iterable[str] = (),
    layer: str = DEFAULT_CHANNEL_LAYER,
    using: str | None = None,
) -> Iterator[list[Sent]]:
    """A list that holds, when the block has ended, what was sent to these groups and channels, in order.

    It reads the layer's own tables on Django's connection, and so sees what the test's transaction wrote:
    what was sent by `layer.sync` or from SQL and not rolled back. Outside of a transaction it sees what all
    processes sent; of messages to a channel only those that have not been received. A normal channel that is
    a member of a group is sent a message of its own, and that is listed if the channel is captured.

    Messages to a group without members are not written. So, while the block lasts, each group has a member
    more, which counts in `group_count`. ``layer`` is an alias in CHANNEL_LAYERS, ``using`` one in DATABASES,
    if the calls name it. For synchronous code: raises `SynchronousOnlyOperation` on the thread of a running
    event loop.
    """
    # Their import needs Django's apps, which are not there yet when pytest loads this module.
    from pg_layer.models import Membership, Message

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
    prefix, codec = channel_layer.config.prefix, channel_layer._codec
    alias = using or alias_of(channel_layer.config)
    own_channel = f"specific.{secrets.token_hex(8)}!captured"
    own_address = channel_address(prefix, own_channel)
    group_of = {group_address(prefix, group): group for group in groups}
    channel_addresses = [channel_address(prefix, channel) for channel in channels]
    memberships = Membership.objects.using(alias).filter(address=own_address)
    messages = Message.objects.using(alias).filter(
        Q(address__in=group_of) | Q(address__in=channel_addresses, channel__in=channels),
        kind="message",
    )
    earlier = list(messages.values_list("id", flat=True))

    def leave() -> None:
        # The member, and the message to its owner that asked for it.
        for rows in (memberships, Message.objects.using(alias).filter(address=own_address)):
            rows.delete()

    sent: list[Sent] = []
    try:
        for group in groups:
            channel_layer.sync.group_add(group, own_channel, using=using)
        memberships.update(expires_at=Now() + LONGEST_TEST)
        yield sent
        for row in messages.exclude(id__in=earlier).order_by("id"):
            to_group = group_of.get(row.address)
            name = row.channel or "" if to_group is None else group_name(to_group)
            message = codec.decode(codec.open(bytes(row.payload), name))
            excluded = None if to_group is None else row.excluded
            sent.append(Sent(message, to_group, row.channel, excluded))
    except BaseException:
        with suppress(DjangoError):  # the transaction may be broken, and is rolled back then
            leave()
        raise
    leave()


def _names(what: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{what} must be a list of names, not a str: {what}=[{names!r}].")
    return list(names)


def _layer(alias: str) -> PostgresChannelLayer:
    layer = get_channel_layer(alias)
    if not isinstance(layer, PostgresChannelLayer):
        what = "does not exist" if layer is None else f"is a {type(layer).__name__}"
        raise ImproperlyConfigured(
            f"pg_layer: CHANNEL_LAYERS[{alias!r}] {what}: captured_messages() needs a PostgresChannelLayer."
        )
    return layer


# ---------------------------------------------------------------------- clean layers


def reset_layers(databases: Container[str] | None = None) -> None:
    """Flush and close all layers that were used in this process: they can be used again, as if new.

    A layer by ``dsn`` is closed and not flushed: that database may be anybody's. With ``databases``, the
    aliases that the test has: raises `ImproperlyConfigured` if a layer was used on another one, which is
    neither flushed, and may not be a test database. Not on the thread of a running event loop.
    """
    async_to_sync(_reset_layers)(databases)


async def _reset_layers(databases: Container[str] | None) -> None:
    used = [loops for loops in registered() if isinstance(loops, Loops) and loops.is_used]
    strays = set()
    async with AsyncExitStack() as stack:
        for loops in used:
            stack.push_async_callback(loops.close)
        for loops in used:
            using = loops.client.config.using
            if using is not None and (databases is None or using in databases):
                await loops.run(loops.for_sending, Engine.flush)
            elif using is not None:
                strays.add(using)
    if strays:
        raise ImproperlyConfigured(
            f"pg_layer: the test used the layer on a database that it has not asked for, and that may be no "
            f"test database: {', '.join(sorted(strays))}. Name it in `databases` of the test case; with "
            f"pytest, mark the test: @pytest.mark.django_db(transaction=True)."
        )


if TYPE_CHECKING:
    _TestCase = TransactionTestCase
else:
    _TestCase = object


class ResetLayersMixin(_TestCase):
    """Has layers reset after each test of a `TestCase` or `TransactionTestCase`, before which it stands.

    class ChatTests(ResetLayersMixin, TransactionTestCase): ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        later = cls.__mro__[cls.__mro__.index(ResetLayersMixin) :]
        if issubclass(cls, unittest.TestCase) and TransactionTestCase not in later:
            raise TypeError(
                f"{cls.__name__}: ResetLayersMixin must stand before Django's TestCase or "
                f"TransactionTestCase among the base classes."
            )

    def _fixture_teardown(self) -> None:
        # After all clean-ups, which may still use the layer. What a `TestCase` locked is free when it has
        # rolled back; the tables that a `TransactionTestCase` empties must not be in use by others.
        try:
            if not isinstance(self, TestCase):
                reset_layers(self.databases)
        finally:
            super()._fixture_teardown()  # type: ignore[misc]  # no part of its public face
        if isinstance(self, TestCase):
            reset_layers(self.databases)


if HAS_PYTEST:

    @pytest.fixture(autouse=True)
    def _reset_pg_layers(request: pytest.FixtureRequest) -> Iterator[None]:
        """Has layers reset after each test, before its database goes."""
        is_test_case = isinstance(request.cls, type) and issubclass(
            request.cls, TransactionTestCase
        )
        is_marked = request.node.get_closest_marker("django_db") is not None
        has_database = is_marked or not FOR_DATABASES.isdisjoint(request.fixturenames)
        if has_database and not is_test_case:
            request.getfixturevalue("db")  # what is set up first goes last
        yield
        reset_layers(None if has_database or is_test_case else ())
        if has_database and inspect.iscoroutinefunction(request.function):
            # Where its queries ran. Nobody else closes that thread's connections.
            SyncToAsync.single_thread_executor.submit(connections.close_all).result()
