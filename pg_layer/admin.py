"""Read-only pages of Django's admin for clients, groups and messages.

They show the database of the layer ``default`` if it is of this package, otherwise the database of
the first layer of this package.

A list page reads the prefixes, and at most `MAX_LISTED` rows, in one query each. The index and the
pages of other apps run no query and connect to no server.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from channels import DEFAULT_CHANNEL_LAYER
from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.utils import quote
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import ImproperlyConfigured
from django.core.paginator import InvalidPage
from django.db import connections
from django.db.models import Model, Q, QuerySet
from django.db.models.functions import Coalesce, Length, Now
from django.http import HttpRequest
from django.http.response import HttpResponse
from django.template.defaultfilters import filesizeformat
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import is_aware, localtime

from pg_layer._config.aliases import postgresql_aliases
from pg_layer._config.options import Config
from pg_layer._configured_layers import configurations
from pg_layer._db.queries.groups import first_channels
from pg_layer._db.same_database import alias_of
from pg_layer._messages.addresses import channel_address, group_address
from pg_layer._messages.codec import Codec
from pg_layer._state.status import DROPS, LOST_TEXT, POLLING_ADVICE, in_words
from pg_layer._sync.django_session import DjangoSession, finish
from pg_layer.exceptions import LayerUnavailable, UndecodableMessage
from pg_layer.models import Client, Group, LeaseClock, Membership, Message

M = TypeVar("M", bound=Model)

MAX_LISTED = 1000  # rows of a list, on all of its pages together
MAX_COUNTED = 1000  # rows that a page about a client counts
MAX_MEMBERS = 200  # members that the page of a group shows
MEMBERS_TIMEOUT = 10.0  # seconds for the query of the members
MAX_DECODED = 16 * 1024 * 1024  # bytes of a payload; a larger payload is not fetched
MAX_SHOWN = 4000  # characters
FAILURE_REPEATED = 60.0  # seconds, before servers are asked again which database is the layer's
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


def _may_have_alias() -> bool:
    """Return whether an alias in DATABASES may lead to a layer's database. Asks no server."""
    return any(
        isinstance(config, Config) and (config.dsn is None or postgresql_aliases())
        for config in _configurations()
    )


class Source:
    """Where the pages of one request read."""

    def __init__(self) -> None:
        self.alias: str | None = None  # in DATABASES; None if no alias leads to a layer's database
        self.problem = ""  # then: the reason
        for config in _configurations():
            try:
                if isinstance(config, Config):
                    self.alias = alias_of(config, repeat_failure=FAILURE_REPEATED)
                    return
            except (ImproperlyConfigured, LayerUnavailable) as error:
                self.problem = self.problem or str(error)

    @cached_property
    def prefixes(self) -> list[str]:
        """The prefixes of the layers of this project, and of all that have had clients."""
        found = {config.prefix for config in _configurations() if isinstance(config, Config)}
        if self.alias is not None:
            found.update(LeaseClock.objects.using(self.alias).values_list("prefix", flat=True))
        return sorted(found)


def _source(request: HttpRequest) -> Source:
    """Return the `Source` of a request, which is made once."""
    if not hasattr(request, "_pg_layer_source"):
        request._pg_layer_source = Source()  # type: ignore[attr-defined]
    source: Source = request._pg_layer_source  # type: ignore[attr-defined]
    return source


def _in_prefix(prefix: str) -> Q:
    """Return the condition for addresses of a prefix: one range of an index."""
    return Q(address__gt=f"{prefix}!", address__lt=f'{prefix}"')


def _words(seconds: float) -> str:
    """Return a duration that a browser keeps in one line."""
    return in_words(seconds).replace(" ", "\xa0")


def _ago(moment: datetime, now: datetime) -> str:
    return f"{_words((now - moment).total_seconds())}\xa0ago"


def _at(moment: datetime | None, now: datetime) -> str:
    """Return a time to the second, and how far away it is."""
    if moment is None:
        return "never"
    seconds = (moment - now).total_seconds()
    away = f"in {in_words(seconds)}" if seconds > 0 else f"{in_words(-seconds)} ago"
    shown = localtime(moment) if is_aware(moment) else moment
    return f"{shown:%Y-%m-%d %H:%M:%S} ({away})"


class OneQueryChangeList(ChangeList):
    """A list that reads its first `MAX_LISTED` rows in one query, and counts and divides these.

    Django counts all rows of a list, and then reads a page of it.
    """

    is_cut = False  # there are more rows

    def get_results(self, request: HttpRequest) -> None:
        rows: Any = list(self.queryset[: MAX_LISTED + 1])
        self.is_cut = len(rows) > MAX_LISTED
        paginator = self.model_admin.get_paginator(request, rows[:MAX_LISTED], self.list_per_page)
        try:
            self.result_list = paginator.page(self.page_num).object_list
        except InvalidPage:
            raise IncorrectLookupParameters from None
        self.result_count = paginator.count
        self.multi_page = paginator.num_pages > 1
        self.paginator = paginator
        self.can_show_all = self.show_full_result_count = self.show_admin_actions = False
        self.full_result_count = self.result_count  # so that no link offers to show all


class ReadOnlyAdmin(ModelAdmin[M]):
    """Admin pages without permission to add, change or delete."""

    about: str | None = None  # a sentence at the top of the list
    actions = None
    list_per_page = 50
    show_facets = admin.ShowFacets.NEVER

    def get_queryset(self, request: HttpRequest) -> QuerySet[M]:
        alias = _source(request).alias
        rows = self.model.objects.none() if alias is None else self.model.objects.using(alias)
        queryset: QuerySet[M] = rows.annotate(now=Now())  # the clock of the database
        return queryset

    def get_list_display(self, request: HttpRequest) -> tuple[Any, ...]:
        """Return the columns. The last one is the prefix of the layer, if there are several."""
        columns = tuple(super().get_list_display(request))
        return (*columns, "prefix") if len(_source(request).prefixes) > 1 else columns

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return OneQueryChangeList

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        response = super().changelist_view(request, extra_context)
        context = getattr(response, "context_data", None) or {}
        if isinstance(found := context.get("cl"), OneQueryChangeList):
            title = str(self.opts.verbose_name_plural).capitalize()
            context["title"] = f"{title} (only the first {MAX_LISTED})" if found.is_cut else title
            context["subtitle"] = self.about
            if (source := _source(request)).alias is None:
                self.message_user(request, source.problem, messages.WARNING)
        return response

    # Each page of the admin calls these two.

    def has_view_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return super().has_view_permission(request, obj) and _may_have_alias()

    def has_module_permission(self, request: HttpRequest) -> bool:
        return super().has_module_permission(request) and _may_have_alias()

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False


# ---------------------------------------------------------------------- filters


class PrefixFilter(admin.SimpleListFilter):
    """A filter by the prefix of the layer, shown if there are several."""

    title = "prefix"
    parameter_name = "prefix"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        prefixes = _source(request).prefixes
        return [(prefix, prefix) for prefix in prefixes] if len(prefixes) > 1 else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        prefix = self.value()
        if prefix is None:
            return queryset
        condition = Q(prefix=prefix) if queryset.model is Group else _in_prefix(prefix)
        found: QuerySet[Any] = queryset.filter(condition)
        return found


class StateFilter(admin.SimpleListFilter):
    """A filter of clients by the state of their lease. Without a choice, ended ones are left out.

    The table keeps them for a day, and they may be most of its rows.
    """

    title = "state"
    parameter_name = "state"

    RUNNING = Q(ended_at__isnull=True, swept_at__isnull=True)
    ENDED = Q(ended_at__isnull=False) | Q(swept_at__isnull=False)
    STATES = (
        (None, "live or overdue", RUNNING),
        ("live", "live", RUNNING & Q(expires_at__gt=Now())),
        ("overdue", "overdue", RUNNING & Q(expires_at__lte=Now())),
        ("ended", "ended within a day", ENDED),
    )

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        return [(name, title) for name, title, _ in self.STATES]

    def choices(self, changelist: Any) -> Iterator[Any]:
        titles = ((name, title) for name, title, _ in self.STATES)
        yield from _choices(self, changelist, titles)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Client]) -> QuerySet[Client]:
        conditions = {name: condition for name, _, condition in self.STATES}
        found: QuerySet[Client] = queryset.filter(conditions.get(self.value(), self.RUNNING))
        return found


class RecipientFilter(admin.SimpleListFilter):
    """A filter of messages by what they were sent to. Without a choice, to normal channels.

    Most rows are of groups. They stay until they expire, whether or not they were received.
    """

    title = "recipient"
    parameter_name = "to"

    TITLES = (
        (None, "normal channels"),
        ("group", "groups"),
        ("process", "processes"),
        ("all", "all"),
    )

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        return list(self.TITLES)

    def choices(self, changelist: Any) -> Iterator[Any]:
        yield from _choices(self, changelist, self.TITLES)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Message]) -> QuerySet[Message]:
        condition = Q()
        for prefix in _source(request).prefixes:
            groups = Q(address__startswith=group_address(prefix, ""))
            normal = Q(address__startswith=channel_address(prefix, ""))
            processes = _in_prefix(prefix) & ~groups & ~normal
            conditions = {"group": groups, "process": processes, "all": Q()}
            condition |= conditions.get(self.value() or "", normal)
        found: QuerySet[Message] = queryset.filter(condition)
        return found


def _choices(
    filter: admin.SimpleListFilter, changelist: Any, titles: Iterable[tuple[str | None, str]]
) -> Iterator[Any]:
    """Return the links of a filter, one of which stands for no choice."""
    name = filter.parameter_name
    for value, title in titles:
        query = changelist.get_query_string(
            {} if value is None else {name: value}, [name] if value is None else []
        )
        yield {"selected": filter.value() == value, "query_string": query, "display": title}


# ---------------------------------------------------------------------- pages


@admin.register(Client)
class ClientAdmin(ReadOnlyAdmin[Client]):
    """The processes that receive, or have received within a day; overdue ones first."""

    list_display = ("shown_host", "shown_pid", "state", "lease_left", "dropped", "started")
    fields = (
        *("shown_host", "shown_pid", "prefix", "client_id", "state", "shown_lease"),
        *("shown_start", "problem", "memberships", "waiting", "shown_counters"),
    )
    list_filter = (StateFilter, PrefixFilter)
    search_fields = ("host", "pid", "address")
    search_help_text = "Host, process or id"

    def get_ordering(self, request: HttpRequest) -> tuple[Any, ...]:
        if request.GET.get(StateFilter.parameter_name) == "ended":
            return (Coalesce("ended_at", "swept_at").desc(),)  # as an index has it
        return ("expires_at",)

    @admin.display(description="host", ordering="host")
    def shown_host(self, client: Client) -> str:
        return "unknown" if client.is_unknown else client.host

    @admin.display(description="process", ordering="pid")
    def shown_pid(self, client: Client) -> str:
        return "unknown" if client.is_unknown else str(client.pid)

    @admin.display
    def prefix(self, client: Client) -> str:
        return client.address.partition("!")[0]

    @admin.display(description="client")
    def client_id(self, client: Client) -> str:
        return client.address.partition("!")[2]

    @admin.display
    def state(self, client: Any) -> str:
        if client.ended_at is not None:
            return "closed"
        if client.swept_at is not None:
            return "lost"
        if client.expires_at is not None and client.expires_at <= client.now:
            return "overdue"
        return "live, polls" if client.is_without_notifications else "live"

    @admin.display(description="lease", ordering="expires_at")
    def lease_left(self, client: Any) -> str:
        """Say how long the lease lasts, or when it ended."""
        if client.ended_at is not None:
            return f"closed {_ago(client.ended_at, client.now)}"
        if client.swept_at is not None:
            return f"expired, removed {_ago(client.swept_at, client.now)}"
        if client.expires_at is None:
            return "never expires"
        left = (client.expires_at - client.now).total_seconds()
        return f"{_words(left)}\xa0left" if left > 0 else f"expired {_words(-left)}\xa0ago"

    @admin.display(description="lease")
    def shown_lease(self, client: Any) -> str:
        return f"{self.lease_left(client)}; it lasts {client.lease:g} s after each renewal"

    @admin.display(ordering="started_at")
    def started(self, client: Any) -> str:
        return _ago(client.started_at, client.now)

    @admin.display(description="started")
    def shown_start(self, client: Any) -> str:
        return _at(client.started_at, client.now)

    @admin.display
    def problem(self, client: Any) -> str | None:
        """Say what is wrong with the process, as `Status.problems` does."""
        if self.state(client) == "lost":
            return LOST_TEXT
        return POLLING_ADVICE if client.is_without_notifications else None

    @admin.display(description="dropped or refused")
    def dropped(self, client: Client) -> int:
        return sum(map(client.counter, DROPS))

    @admin.display
    def memberships(self, client: Client) -> str:
        rows = Membership.objects.using(client._state.db)
        rows = rows.filter(address=client.address, present=True)
        return _count(rows)

    @admin.display(description="waiting messages")
    def waiting(self, client: Client) -> str:
        rows = Message.objects.using(client._state.db)
        rows = rows.filter(address=client.address, expires_at__gt=Now())
        queued = client.counter("queued_messages")
        return f"{_count(rows)} in the table, {queued} in the memory of the process"

    @admin.display(description="counters")
    def shown_counters(self, client: Client) -> SafeString:
        return _table(("counter", "count"), sorted(client.counters.items()))


@admin.register(Group)
class GroupAdmin(ReadOnlyAdmin[Group]):
    """The groups that have members, the largest first."""

    list_display = ("group", "members", "shown_addresses")
    fields = ("prefix", "members", "shown_addresses", "channels")
    list_filter = (PrefixFilter,)
    search_fields = ("group_name",)
    search_help_text = "Name"
    ordering = ("-members", "key")

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Group | None:
        # The database finds a name by an index. It computes the key of each group.
        prefix, _, name = object_id.partition("!")
        rows: QuerySet[Any] = self.get_queryset(request).filter(prefix=prefix, group_name=name)
        user: Any = request.user
        for group in rows:
            group.may_view_clients = user.has_perm("pg_layer.view_client")
            return group  # type: ignore[no-any-return]
        return None

    @admin.display(ordering="group_name")
    def group(self, group: Group) -> str:
        return group.group_name

    @admin.display(description="processes and normal channels", ordering="addresses")
    def shown_addresses(self, group: Group) -> int:
        return group.addresses

    @admin.display(description="channels")
    def channels(self, group: Any) -> SafeString:
        """Return a table of the members, with the processes that they belong to."""
        alias = group._state.db
        session = DjangoSession(connections[alias], time.monotonic() + MEMBERS_TIMEOUT)
        names = finish(first_channels(session, group.prefix, group.group_name, MAX_MEMBERS))
        addresses = [channel_address(group.prefix, name) for name in names]
        clients = Client.objects.using(alias).in_bulk(set(addresses))
        rows = [
            (name, _process(clients.get(address), is_link=group.may_view_clients))
            for name, address in zip(names, addresses, strict=True)
        ]
        table = _table(("channel", "process"), rows)
        if group.members > len(names):
            return format_html("{}<p>and {} more</p>", table, group.members - len(names))
        return table


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin[Message]):
    """Messages that have not expired. Their content is shown only if no layer encrypts.

    A message to a channel is deleted after it was received. A message to a group stays until it
    expires.
    """

    about = (
        "Messages to a channel are deleted after they were received. Messages to a group stay until"
        " they expire, also after all members have received them."
    )
    list_display = ("recipient", "size", "sent", "expires")
    fields = (
        *("recipient", "prefix", "kind", "not_to", "size", "shown_sending", "shown_end"),
        "content",
    )
    list_filter = (RecipientFilter, PrefixFilter)
    search_fields = ("address",)
    search_help_text = "The beginning of the name of a group or channel"
    ordering = ("expires_at",)  # as an index has it

    def get_queryset(self, request: HttpRequest) -> QuerySet[Message]:
        waiting = super().get_queryset(request).filter(expires_at__gt=Now()).defer("payload")
        sized: QuerySet[Message] = waiting.annotate(octets=Length("payload"))
        return sized

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Message], search_term: str
    ) -> tuple[QuerySet[Message], bool]:
        name = search_term.strip()
        if not name:
            return queryset, False
        condition = Q()
        for prefix in _source(request).prefixes:
            condition |= Q(address__startswith=group_address(prefix, name))
            if "!" in name:
                condition |= Q(address=channel_address(prefix, name), channel__startswith=name)
            else:
                condition |= Q(address__startswith=channel_address(prefix, name))
        return queryset.filter(condition), False

    @admin.display
    def recipient(self, message: Message) -> str:
        _, _, rest = message.address.partition("!")
        if message.kind != "message":
            return f"client {rest} ({message.kind})"
        return f"group {rest[1:]}" if rest.startswith("@") else f"channel {message.channel}"

    @admin.display
    def prefix(self, message: Message) -> str:
        return message.address.partition("!")[0]

    @admin.display(description="except to")
    def not_to(self, message: Message) -> str | None:
        return message.excluded

    @admin.display(ordering="octets")
    def size(self, message: Any) -> str:
        return filesizeformat(message.octets)

    @admin.display(ordering="sent_at")
    def sent(self, message: Any) -> str:
        return _ago(message.sent_at, message.now)

    @admin.display(description="sent")
    def shown_sending(self, message: Any) -> str:
        return _at(message.sent_at, message.now)

    @admin.display(ordering="expires_at")
    def expires(self, message: Any) -> str:
        if message.expires_at is None:
            return "never"
        return f"in\xa0{_words((message.expires_at - message.now).total_seconds())}"

    @admin.display(description="expires")
    def shown_end(self, message: Any) -> str:
        return _at(message.expires_at, message.now)

    @admin.display
    def content(self, message: Any) -> str:
        # A layer whose configuration is invalid may also encrypt.
        if any(
            isinstance(config, ImproperlyConfigured) or config.symmetric_encryption_keys
            for config in _configurations()
        ):
            return "Not shown, because messages are encrypted."
        if message.octets > MAX_DECODED:
            return "Not shown, because it is too large."
        try:
            return _shown(READER.decode(READER.open(bytes(message.payload), message.channel or "")))
        except UndecodableMessage as error:
            return str(error)


# ---------------------------------------------------------------------- text


def _count(rows: QuerySet[Any]) -> str:
    """Return the number of rows, or that there are more than `MAX_COUNTED`."""
    count = rows.values("address")[: MAX_COUNTED + 1].count()
    return str(count) if count <= MAX_COUNTED else f"more than {MAX_COUNTED}"


def _process(client: Client | None, *, is_link: bool) -> str:
    if client is None or client.is_unknown:
        return ""
    name = f"{client.host}, process {client.pid}"
    if not is_link:
        return name
    address = reverse("admin:pg_layer_client_change", args=(quote(client.address),))
    return format_html('<a href="{}">{}</a>', address, name)


def _table(names: Sequence[str], rows: Sequence[tuple[object, ...]]) -> SafeString:
    cell = "<{0}>{1}</{0}>"
    head = format_html_join("", cell, (("th", name) for name in names))
    body = format_html_join(
        "",
        "<tr>{}</tr>",
        ((format_html_join("", cell, (("td", each) for each in row)),) for row in rows),
    )
    return format_html("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", head, body)


def _shown(message: dict[str, Any]) -> str:
    writer = reprlib.Repr()
    writer.maxlevel = 10
    writer.maxdict = writer.maxlist = 50
    writer.maxstring = writer.maxother = writer.maxlong = 1000
    text = writer.repr(message)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
