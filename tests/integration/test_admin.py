"""The admin's pages: their content, permissions and database. They change nothing.

Each test runs a Django project with the admin, and sends it the requests of a browser.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pg_layer._messages.codec import Codec
from tests.conftest import Observer
from tests.integration.test_django import BACKEND, SQLITE, postgres
from tests.project.commands import django

ADMIN: dict[str, Any] = {
    "INSTALLED_APPS": [
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.messages",
        "django.contrib.sessions",
        "channels",
        "pg_layer",
    ],
    "MIDDLEWARE": [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    "TEMPLATES": [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
    "STATIC_URL": "/static/",
    "ALLOWED_HOSTS": ["testserver"],
    "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
}
SETUP = """
from html import unescape
import json, re, sys, types, warnings
warnings.simplefilter("error")
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.test import Client as Browser
from django.urls import path, reverse
from django.utils.html import strip_tags

settings.ROOT_URLCONF = types.ModuleType("urls")
settings.ROOT_URLCONF.urlpatterns = [path("admin/", admin.site.urls)]

for app in ("contenttypes", "auth", "admin", "sessions"):
    call_command("migrate", app, verbosity=0)
from django.contrib.auth.management import create_permissions
from django.apps import apps
create_permissions(apps.get_app_config("pg_layer"), verbosity=0)

browser = Browser()
root, _ = User.objects.get_or_create(username="root", is_staff=True, is_superuser=True)
browser.force_login(root)

def address(model, page="changelist", *args):
    return reverse(f"admin:pg_layer_{model}_{page}", args=args)

def shown(model, query=""):
    "The cells of the list, row by row."
    response = browser.get(address(model) + query)
    assert response.status_code == 200, response.status_code
    body = re.search(r"<tbody>(.*)</tbody>", response.content.decode(), re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL) if body else []
    return [[strip_tags(cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
            for row in rows]

def detail(model, key):
    response = browser.get(address(model, "change", key))
    assert response.status_code == 200, response.status_code
    return response.content.decode()
"""


def ask(dsn: str, code: str, **settings: Any) -> str:
    """Return the output of ``code`` in a project with the admin."""
    return django(dsn, f"{SETUP}\n{code}", settings=ADMIN | settings)


def layers(**config: Any) -> dict[str, Any]:
    return {"CHANNEL_LAYERS": {"default": {"BACKEND": BACKEND, "CONFIG": config}}}


def add_message(
    observer: Observer, payload: bytes, address: str = "asgi!:jobs", channel: str | None = "jobs"
) -> int:
    row = observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
        " VALUES (%s, pg_current_xact_id(), 0, %s, %s, clock_timestamp() + interval '1 hour')"
        " RETURNING id",
        (address, channel, payload),
    ).fetchone()
    assert row is not None
    return int(row[0])


def fill(observer: Observer) -> int:
    """Write clients in each state, groups and a message. Return the id of the message."""
    for client, expires, ended, swept in (
        ("live", "1 hour", None, None),
        ("late", "-1 minute", None, None),
        ("gone", "-1 hour", "1 hour", None),
        ("lost", "-2 hours", None, "1 hour"),
    ):
        observer.execute(
            "INSERT INTO pg_layer_client"
            " (address, host, pid, expires_at, lease, ended_at, swept_at, counters) VALUES"
            " ('asgi!' || %s, 'host-' || %s, 4711, clock_timestamp() + %s::interval, 60,"
            " clock_timestamp() - %s::interval, clock_timestamp() - %s::interval,"
            " '{\"dropped_full\": 12345}')",
            (client, client, expires, ended, swept),
        )
    for group, client, member in (("room", "live", 1), ("room", "live", 2), ("hall", "live", 1)):
        observer.execute(
            "INSERT INTO pg_layer_membership VALUES (%s, 'asgi!' || %s, %s, 0, true, 'infinity')",
            (group, client, f"specific.{client}!{member}"),
        )
    for client in ("gone", "lost"):
        observer.execute(
            "INSERT INTO pg_layer_membership"
            " VALUES ('old', 'asgi!' || %s, 'a.old!1', 0, true, 'infinity')",
            (client,),
        )
    observer.execute(
        "INSERT INTO pg_layer_membership VALUES"
        " ('room', 'other!:jobs', 'jobs', 1, true, 'infinity', 100),"
        " ('hall', 'asgi!:jobs', 'jobs', 2, true, 'infinity', 100),"
        " ('hall', 'asgi!:jobs', 'jobs', 3, false, 'infinity', 100)"
    )
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
        " VALUES ('asgi!:old', pg_current_xact_id(), 0, 'old', clock_timestamp())"
    )
    return add_message(
        observer, Codec("msgpack", 1000).encode({"type": "greet", "text": "hello there"}, "jobs")
    )


# ---------------------------------------------------------------------- what is shown


def test_client_pages_show_clients_by_state(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
print(json.dumps([row[:3] for row in shown("client")]))
for query in ("?state=live", "?state=overdue", "?state=ended",
              "?q=host-late", "?q=4711", "?q=nothing",
              "?host=host-gone", "?state=nonsense"):
    print(json.dumps([row[0] for row in shown("client", query)]))
page = detail("client", "asgi!live")
print("12345" in page, "host-live" in page, 'name="_save"' in page, "deletelink" in page)
""",
    )
    everyone, *filtered, page = output.splitlines()
    assert json.loads(everyone) == [
        ["asgi!live", "host-live", "4711"],
        ["asgi!late", "host-late", "4711"],
        ["asgi!gone", "host-gone", "4711"],
        ["asgi!lost", "host-lost", "4711"],
    ]
    live, late, gone, lost = "asgi!live", "asgi!late", "asgi!gone", "asgi!lost"
    assert [json.loads(line) for line in filtered] == [
        *([live], [late], [gone, lost]),
        *([late], [live, late, gone, lost], [], [gone], [live, late, gone, lost]),
    ]
    assert page == "True True False False"


def test_client_pages_show_a_client_that_closed_without_a_lease(
    migrated_dsn: str, observer: Observer
) -> None:
    observer.execute("SELECT pg_layer_close('asgi', 'asgi!stranger')")
    output = ask(
        migrated_dsn,
        """
print(json.dumps([row[:3] for row in shown("client")]))
print(shown("client", "?state=overdue"))
print("unknown process" in detail("client", "asgi!stranger"))
""",
    )
    assert output.splitlines() == ['[["asgi!stranger", "unknown", "unknown"]]', "[]", "True"]


def test_group_pages_show_groups(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
print(json.dumps(shown("group")))
print(json.dumps([row[:2] for row in shown("group", "?prefix=other")]))
print(json.dumps([row[:2] for row in shown("group", "?q=hal")]))
missing = browser.get(address("group", "change", "asgi!no"))
print("room" in detail("group", "asgi!room"), missing.status_code)
""",
    )
    everything, other, hall, page = output.splitlines()
    assert json.loads(everything) == [
        ["room", "asgi", "2", "1"],
        ["hall", "asgi", "1", "1"],
        ["room", "other", "1", "1"],
    ]
    assert json.loads(other) == [["room", "other"]]
    assert json.loads(hall) == [["hall", "asgi"]]
    assert page == "True 302"


def test_message_pages_show_waiting_messages(migrated_dsn: str, observer: Observer) -> None:
    id = fill(observer)
    output = ask(
        migrated_dsn,
        f"""
print(json.dumps([row[:5] for row in shown("message")]))
print(*(len(shown("message", query)) for query in ("?kind=message", "?q=jobs", "?q=no")))
print("{{'text': 'hello there', 'type': 'greet'}}" in unescape(detail("message", {id})))
""",
    )
    rows, counts, page = output.splitlines()
    size = len(Codec("msgpack", 1000).encode({"type": "greet", "text": "hello there"}, "jobs"))
    # Not the one that is over.
    assert json.loads(rows) == [[str(id), "message", "asgi!:jobs", "jobs", str(size)]]
    assert counts == "1 1 0"
    assert page == "True"


def test_pages_show_never_for_infinity(migrated_dsn: str, observer: Observer) -> None:
    observer.execute(
        "INSERT INTO pg_layer_client (address, expires_at, lease)"
        " VALUES ('asgi!live', 'infinity', 60);"
        "INSERT INTO pg_layer_membership"
        " VALUES ('room', 'asgi!live', 'a.live!1', 0, true, 'infinity');"
        "INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)"
        " VALUES ('asgi!:jobs', pg_current_xact_id(), 0, 'jobs', 'infinity')"
    )
    id = observer.execute("SELECT id FROM pg_layer_message").fetchone()
    assert id is not None
    output = ask(
        migrated_dsn,
        f"""
from pg_layer.models import Membership
print([row[6] for row in shown("message")], [row[4] for row in shown("client")])
print("never" in detail("message", {id[0]}), "never" in detail("client", "asgi!live"))
print(Membership.objects.get().expires_at)
""",
    )
    assert output.splitlines() == ["['never'] ['never']", "True True", "None"]


def test_message_list_fetches_no_payload(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
from django.db import connection
from django.test.utils import CaptureQueriesContext
with CaptureQueriesContext(connection) as queries:
    assert len(shown("message")) == 1
selects = [query["sql"] for query in queries if "pg_layer_message" in query["sql"]]
print(len(selects) > 0, [sql for sql in selects if re.search(r'"payload",', sql)])
""",
    )
    assert output == "True []"


# ---------------------------------------------------------------------- payloads


def content(dsn: str, id: int, **settings: Any) -> str:
    """Return the content that the page of a message shows."""
    code = f"""
page = detail("message", {id})
assert len(page) < 60_000, len(page)
content = r'<label>Content:</label>\\s*<div class="readonly">(.*?)</div>'
[found] = re.findall(content, page, re.DOTALL)
print(json.dumps(found))
"""
    return str(json.loads(ask(dsn, code, **settings)))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\x81\xa4type",
        b'{"type": "greet"',
        b"\xdf\xff\xff\xff\xff",
        b"{" * 5000,
        b"\xff" * 5000,
    ],
    ids=["empty", "zero", "cut short", "cut JSON", "a lie", "deep", "noise"],
)
def test_content_of_a_damaged_payload_is_its_error(
    migrated_dsn: str, observer: Observer, payload: bytes
) -> None:
    id = add_message(observer, payload)
    assert content(migrated_dsn, id).startswith("A stored message is ")


def test_content_in_json_with_html_is_escaped(migrated_dsn: str, observer: Observer) -> None:
    text = "<script>alert(1)</script>"
    id = add_message(observer, Codec("json", 1000).encode({"type": "greet", "text": text}, "jobs"))
    found = content(migrated_dsn, id)
    assert "&lt;script&gt;" in found
    assert "<script" not in found


@pytest.mark.parametrize(
    "message",
    [
        {"type": "greet", "text": "beginning" + "x" * 5_000_000},
        {"type": "greet", "blob": b"beginning" + bytes(5_000_000)},
        {"type": "greet", "list": ["beginning", *("x" * 900 for _ in range(5000))]},
        {"type": "greet", **{f"beginning{n}": n for n in range(100_000)}},
    ],
    ids=["text", "bytes", "a list", "a dict"],
)
def test_content_of_a_large_payload_is_truncated(
    migrated_dsn: str, observer: Observer, message: Any
) -> None:
    id = add_message(observer, Codec("msgpack", 10**9).encode(message, "jobs"))
    found = content(migrated_dsn, id)
    assert "beginning" in found
    assert len(found) < 10_000


def test_content_of_a_huge_payload_is_not_fetched(migrated_dsn: str, observer: Observer) -> None:
    id = add_message(
        observer, Codec("msgpack", 10**9).encode({"type": "greet", "blob": bytes(2**24)}, "jobs")
    )
    assert content(migrated_dsn, id) == "Not shown, because it is too large."


KEYS = {"symmetric_encryption_keys": ["secret"]}


def test_content_with_keys_is_not_decoded(migrated_dsn: str, observer: Observer) -> None:
    encrypted = add_message(
        observer, Codec("msgpack", 1000, ["secret"]).encode({"type": "confidential"}, "jobs")
    )
    plain = add_message(observer, Codec("msgpack", 1000).encode({"type": "confidential"}, "jobs"))
    for id in (encrypted, plain):
        assert (
            content(migrated_dsn, id, **layers(**KEYS))
            == "Not shown, because messages are encrypted."
        )
    assert content(migrated_dsn, encrypted) == (
        "A stored message is encrypted, but symmetric_encryption_keys is not set here."
    )


def test_content_with_keys_of_another_layer_is_not_decoded(
    migrated_dsn: str, observer: Observer
) -> None:
    id = add_message(observer, Codec("msgpack", 1000).encode({"type": "confidential"}, "jobs"))
    for config in ({"prefix": "other", **KEYS}, {"prefix": "other", "misspelt": 5}):
        entries = {"default": {"BACKEND": BACKEND}, "other": {"BACKEND": BACKEND, "CONFIG": config}}
        assert (
            content(migrated_dsn, id, CHANNEL_LAYERS=entries)
            == "Not shown, because messages are encrypted."
        )


# ---------------------------------------------------------------------- nobody changes anything


def test_pages_are_read_only(migrated_dsn: str, observer: Observer) -> None:
    id = fill(observer)
    everything = (
        "SELECT c::text FROM pg_layer_client AS c"
        " UNION ALL SELECT m::text FROM pg_layer_message AS m"
        " UNION ALL SELECT m::text FROM pg_layer_membership AS m ORDER BY 1"
    )
    before = observer.execute(everything.encode()).fetchall()
    output = ask(
        migrated_dsn,
        f"""
for model, key in (("client", "asgi!live"), ("group", "asgi!room"), ("message", {id})):
    answers = [
        browser.get(address(model, "add")),
        browser.post(address(model, "add"), {{"address": "x"}}),
        browser.post(address(model, "change", key), {{"host": "x", "_save": "1"}}),
        browser.get(address(model, "delete", key)),
        browser.post(address(model, "delete", key), {{"post": "yes"}}),
    ]
    print(*(answer.status_code for answer in answers))
    deletion = {{"action": "delete_selected", "_selected_action": [key], "post": "yes"}}
    browser.post(address(model), deletion)
    print("action-select" in browser.get(address(model)).content.decode())
""",
    )
    assert output.splitlines() == ["403 403 403 403 403", "False"] * 3
    assert observer.execute(everything.encode()).fetchall() == before


def test_pages_need_the_view_permission(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
user = User.objects.create_user("staff", is_staff=True)
browser.force_login(user)
def answers():
    return [browser.get(address(model)).status_code for model in ("client", "group", "message")]
print(answers(), "PostgreSQL channel layer" in browser.get("/admin/").content.decode())
permissions = Permission.objects.filter(content_type__app_label="pg_layer")
user.user_permissions.add(permissions.get(codename="view_group"))
print(answers(), "PostgreSQL channel layer" in browser.get("/admin/").content.decode())
browser.logout()
print(answers())
""",
    )
    assert output.splitlines() == [
        "[403, 403, 403] False",
        "[403, 200, 403] True",
        "[302, 302, 302]",
    ]


# ---------------------------------------------------------------------- which database


def test_pages_show_the_database_of_the_layer(
    migrated_dsn: str, observer: Observer, tmp_path: Any
) -> None:
    id = fill(observer)
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    databases = {"default": lite, "events": postgres(migrated_dsn)}
    code = f"""
print(len(shown("client")), len(shown("group")), len(shown("message")))
print("hello there" in detail("message", {id}))
"""
    for config in ({"using": "events"}, {"dsn": migrated_dsn}):
        output = ask(migrated_dsn, code, DATABASES=databases, **layers(**config))
        assert output.split() == ["4", "3", "1", "True"]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {"dsn": "postgresql://elsewhere/db"}}},
    ],
    ids=["none", "another", "out of reach"],
)
def test_pages_without_an_alias_do_not_exist(migrated_dsn: str, entries: dict[str, Any]) -> None:
    output = ask(
        migrated_dsn,
        """
print([browser.get(address(model)).status_code for model in ("client", "group", "message")])
print("PostgreSQL channel layer" in browser.get("/admin/").content.decode())
""",
        CHANNEL_LAYERS=entries,
    )
    assert output.splitlines() == ["[403, 403, 403]", "False"]


def test_pages_without_a_default_layer_show_the_first(
    migrated_dsn: str, observer: Observer
) -> None:
    fill(observer)
    output = ask(
        migrated_dsn, 'print(len(shown("client")))', CHANNEL_LAYERS={"mine": {"BACKEND": BACKEND}}
    )
    assert output == "4"
