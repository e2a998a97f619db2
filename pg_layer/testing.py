"""Support for the tests of projects: messages sent in a test's transaction, and clean layers.

See docs/how-to/testing.md. As a plugin of pytest (``pytest_plugins``), it resets layers after each
test.
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

# The fixtures of pytest-django on which its other database fixtures depend.
DATABASE_FIXTURES = {"db", "transactional_db", "live_server"}
MAX_TEST_DURATION = timedelta(days=1)  # a test may stop at a breakpoint


# ---------------------------------------------------------------------- sent messages


class Sent(NamedTuple):
    """A message that was sent to a channel, or to a group without the member ``exclude``."""

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
    """Capture the messages that a block sends to these groups and channels.

    Yield a list that is filled at the end of the block, in the order of sending. The function reads
    the layer's tables on Django's connection. So it finds the messages that the test's transaction
    sent with `layer.sync` or from SQL and did not roll back. Outside of a transaction it finds the
    messages of all processes, except messages to a channel that have been received. A normal
    channel that is a member of a group is sent its own message, which is listed if the channel is
    captured.

    Messages to a group without members are not written. Therefore each group has an additional
    member during the block, which `group_count` counts.

    ``layer``: an alias in CHANNEL_LAYERS. ``using``: the alias in DATABASES that the calls name.
    Raises `ValueError` without groups and channels. For synchronous code only: Django raises
    `SynchronousOnlyOperation` on the thread of a running event loop.
    """
    # pytest loads this module before Django's apps are ready, which the import of models needs.
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

    def remove_member() -> None:
        # Delete the member and the control message to its owner.
        for rows in (memberships, Message.objects.using(alias).filter(address=own_address)):
            rows.delete()

    sent: list[Sent] = []
    try:
        for group in groups:
            channel_layer.sync.group_add(group, own_channel, using=using)
        memberships.update(expires_at=Now() + MAX_TEST_DURATION)
        yield sent
        for row in messages.exclude(id__in=earlier).order_by("id"):
            to_group = group_of.get(row.address)
            name = row.channel or "" if to_group is None else group_name(to_group)
            message = codec.decode(codec.open(bytes(row.payload), name))
            excluded = None if to_group is None else row.excluded
            sent.append(Sent(message, to_group, row.channel, excluded))
    except BaseException:
        with suppress(DjangoError):  # a broken transaction is rolled back
            remove_member()
        raise
    remove_member()


def _names(what: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{what} must be a list of names, not a str: {what}=[{names!r}].")
    return list(names)


def _layer(alias: str) -> PostgresChannelLayer:
    layer = get_channel_layer(alias)
    if not isinstance(layer, PostgresChannelLayer):
        what = "does not exist" if layer is None else f"is a {type(layer).__name__}"
        raise ImproperlyConfigured(
            f"pg_layer: CHANNEL_LAYERS[{alias!r}] {what}: "
            "captured_messages() needs a PostgresChannelLayer."
        )
    return layer


# ---------------------------------------------------------------------- clean layers


def reset_layers(databases: Container[str] | None = None) -> None:
    """Flush and close all layers that were used in this process. They can be used again.

    A layer with a ``dsn`` is closed but not flushed, because its database may not be a test
    database. ``databases``: the aliases that the test may use. A layer that was used on another
    alias is not flushed either, and the function raises `ImproperlyConfigured`. Must not be called
    on the thread of a running event loop.
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
            "pg_layer: the test used the layer on a database that it did not request and that may "
            f"be no test database: {', '.join(sorted(strays))}. Name it in `databases` of the test "
            "case; with pytest, mark the test: @pytest.mark.django_db(transaction=True)."
        )


if TYPE_CHECKING:
    _TestCase = TransactionTestCase
else:
    _TestCase = object


class ResetLayersMixin(_TestCase):
    """A mixin that resets layers after each test. Name it before Django's test case class.

    class ChatTests(ResetLayersMixin, TransactionTestCase): ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        later = cls.__mro__[cls.__mro__.index(ResetLayersMixin) :]
        if issubclass(cls, unittest.TestCase) and TransactionTestCase not in later:
            raise TypeError(
                f"{cls.__name__}: ResetLayersMixin must precede Django's TestCase or "
                "TransactionTestCase in the base classes."
            )

    def _fixture_teardown(self) -> None:
        # This method runs after all clean-ups, which may still use the layer. A `TestCase` must
        # first roll back, because it may hold locks on rows. Before a `TransactionTestCase`
        # truncates tables, the layer must have stopped using them.
        try:
            if not isinstance(self, TestCase):
                reset_layers(self.databases)
        finally:
            super()._fixture_teardown()  # type: ignore[misc]  # not public
        if isinstance(self, TestCase):
            reset_layers(self.databases)


if HAS_PYTEST:

    @pytest.fixture(autouse=True)
    def _reset_pg_layers(request: pytest.FixtureRequest) -> Iterator[None]:
        """Reset layers after each test, before its database is torn down."""
        is_test_case = isinstance(request.cls, type) and issubclass(
            request.cls, TransactionTestCase
        )
        is_marked = request.node.get_closest_marker("django_db") is not None
        has_database = is_marked or not DATABASE_FIXTURES.isdisjoint(request.fixturenames)
        if has_database and not is_test_case:
            request.getfixturevalue("db")  # set up first, therefore torn down last
        yield
        reset_layers(None if has_database or is_test_case else ())
        if has_database and inspect.iscoroutinefunction(request.function):
            # The test's queries ran in this thread. Nothing else closes its connections.
            SyncToAsync.single_thread_executor.submit(connections.close_all).result()
