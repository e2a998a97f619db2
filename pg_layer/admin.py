"""Read-only pages of Django's admin for clients, groups and waiting messages.

They show the database of the layer ``default`` if it is of this package, otherwise the database of
the first layer of this package.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, TypeVar

from channels import DEFAULT_CHANNEL_LAYER
from django.contrib import admin
from django.contrib.admin.utils import display_for_value
from django.core.exceptions import ImproperlyConfigured
from django.db.models import Model, Q, QuerySet
from django.db.models.functions import Length, Now
from django.http import HttpRequest

from pg_layer._config.options import Config
from pg_layer._configured_layers import configurations
from pg_layer._db.same_database import alias_of
from pg_layer._messages.codec import Codec
from pg_layer.exceptions import LayerUnavailable, UndecodableMessage
from pg_layer.models import Client, Group, Message

M = TypeVar("M", bound=Model)

MAX_DECODED = 16 * 1024 * 1024  # bytes of a payload; a larger payload is not fetched
MAX_SHOWN = 4000  # characters
READER = Codec("msgpack", MAX_DECODED)  # it also reads JSON

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin
else:  # Django's class is generic for the type checker only

    class ModelAdmin(admin.ModelAdmin):
        def __class_getitem__(cls, item: object) -> type:
            return cls


def _configurations() -> list[Config | ImproperlyConfigured]:
    """Return the options of all layers of this package, the default layer's first."""
    found = dict(configurations())
    return sorted(found.values(), key=lambda config: config is not found.get(DEFAULT_CHANNEL_LAYER))


def _alias() -> str | None:
    """Return the alias in DATABASES whose tables are shown; None if no alias leads to a layer's."""
    for config in _configurations():
        if isinstance(config, Config):
            try:
                return alias_of(config)
            except (ImproperlyConfigured, LayerUnavailable):
                continue
    return None


class ReadOnlyAdmin(ModelAdmin[M]):
    """Admin pages without permission to add, change or delete."""

    actions = None
    list_per_page = 50
    show_full_result_count = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[M]:
        queryset: QuerySet[M] = super().get_queryset(request).using(_alias())
        return queryset

    @admin.display(description="expires at", ordering="expires_at")
    def shown_end(self, shown: Any) -> str:
        return str(display_for_value(shown.expires_at, "never"))

    def has_view_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return _alias() is not None and super().has_view_permission(request, obj)

    def has_module_permission(self, request: HttpRequest) -> bool:
        return _alias() is not None and super().has_module_permission(request)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False


class StateFilter(admin.SimpleListFilter):
    """A filter of clients by the state of their lease."""

    title = "state"
    parameter_name = "state"

    ENDED = Q(ended_at__isnull=False) | Q(swept_at__isnull=False)
    LIVE = Q(expires_at__gt=Now()) & ~ENDED
    OVERDUE = Q(expires_at__lte=Now()) & ~ENDED
    STATES = (("live", LIVE), ("overdue", OVERDUE), ("ended", ENDED))

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name) for name, _ in self.STATES]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Client]) -> QuerySet[Client]:
        wanted = dict(self.STATES).get(self.value() or "")
        return queryset if wanted is None else queryset.filter(wanted)


@admin.register(Client)
class ClientAdmin(ReadOnlyAdmin[Client]):
    list_display = (
        "address",
        "shown_host",
        "shown_pid",
        "started_at",
        "shown_end",
        "ended_at",
        "swept_at",
    )
    fields = (*list_display, "lease", "fence", "counters")
    list_filter = (StateFilter, "host")
    search_fields = ("address", "host", "pid")
    ordering = ("-expires_at",)

    @admin.display(description="host", ordering="host")
    def shown_host(self, client: Client) -> str:
        return "unknown" if client.is_unknown else client.host

    @admin.display(description="process", ordering="pid")
    def shown_pid(self, client: Client) -> str:
        return "unknown" if client.is_unknown else str(client.pid)


@admin.register(Group)
class GroupAdmin(ReadOnlyAdmin[Group]):
    list_display = ("group_name", "prefix", "members", "addresses")
    list_filter = ("prefix",)
    search_fields = ("group_name",)
    ordering = ("-members", "key")


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin[Message]):
    """Messages that have not expired. Their content is shown only if no layer encrypts.

    A message to a channel is deleted after it was received. A message to a group stays until it
    expires.
    """

    list_display = ("id", "kind", "address", "channel", "size", "sent_at", "shown_end")
    list_filter = ("kind",)
    search_fields = ("address", "channel")
    ordering = ("address", "id")
    fields = (*list_display, "excluded", "marked", "content")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Message]:
        waiting = super().get_queryset(request).filter(expires_at__gt=Now()).defer("payload")
        sized: QuerySet[Message] = waiting.annotate(size=Length("payload"))
        return sized

    @admin.display(description="size in bytes", ordering="size")
    def size(self, message: Any) -> int:
        return int(message.size)

    @admin.display
    def content(self, message: Message) -> str:
        # A layer whose configuration is invalid may also encrypt.
        if any(
            isinstance(config, ImproperlyConfigured) or config.symmetric_encryption_keys
            for config in _configurations()
        ):
            return "Not shown, because messages are encrypted."
        if self.size(message) > MAX_DECODED:
            return "Not shown, because it is too large."
        try:
            return _shown(READER.decode(READER.open(bytes(message.payload), message.channel or "")))
        except UndecodableMessage as error:
            return str(error)


def _shown(message: dict[str, Any]) -> str:
    writer = reprlib.Repr()
    writer.maxlevel = 10
    writer.maxdict = writer.maxlist = 50
    writer.maxstring = writer.maxother = writer.maxlong = 1000
    text = writer.repr(message)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
