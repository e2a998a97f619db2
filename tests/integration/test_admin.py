"""The admin's pages: their content, permissions and database. They change nothing.

Each test runs a Django project with the admin, and sends it the requests of a browser.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pg_layer._messages.codec import Codec
from tests.conftest import Observer
from tests.integration.test_checks import nowhere
from tests.integration.test_django import BACKEND, SQLITE, postgres
from tests.integration.test_same_database import otherwise
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
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows]
    return [[strip_tags(cell).strip().replace("\xa0", " ") for cell in row] for row in cells]

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
    """Without a choice, those that have not ended: overdue ones first."""
    fill(observer)
    output = ask(
        migrated_dsn,
        """
print(json.dumps([row[:3] for row in shown("client")]))
for query in ("?state=live", "?state=overdue", "?state=ended", "?state=ended&q=host-lost",
              "?q=host-late", "?q=4711", "?q=nothing", "?state=nonsense"):
    print(json.dumps([row[0] for row in shown("client", query)]))
page = detail("client", "asgi!live")
print("12345" in page, "host-live" in page, 'name="_save"' in page, "deletelink" in page)
""",
    )
    everyone, *filtered, page = output.splitlines()
    assert json.loads(everyone) == [
        ["host-late", "4711", "overdue"],
        ["host-live", "4711", "live"],
    ]
    live, late, gone, lost = "host-live", "host-late", "host-gone", "host-lost"
    assert [json.loads(line) for line in filtered] == [
        *([live], [late], [lost, gone], [lost]),
        *([late], [late, live], [], [late, live]),
    ]
    assert page == "True True False False"


def test_client_pages_show_the_lease_in_words(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() + interval '58.5 seconds',"
        " started_at = clock_timestamp() - interval '3 hours 5 minutes 1 second'"
        " WHERE address = 'asgi!live'"
    )
    output = ask(
        migrated_dsn,
        """
for query in ("?state=live", "?state=overdue", "?state=ended"):
    for row in shown("client", query):
        print(*row[2:], sep=" | ")
page = strip_tags(detail("client", "asgi!live")).replace("\xa0", " ")
for label in ("Lease", "Memberships", "Waiting messages"):
    print(*re.findall(label + r":\\s+(.*)", page))
print("fence" in page.lower(), "dropped_full" in page)
""",
    )
    live, late, lost, gone, *page = output.splitlines()
    assert re.fullmatch(r"live \| [1-5]\d s left \| 12345 \| 3 h 5 min ago", live)
    assert re.fullmatch(r"overdue \| expired 1 min \d+ s ago \| 12345 \| \d+ s ago", late)
    assert gone.startswith("closed | closed 1 h ")
    assert lost.startswith("lost | expired, removed 1 h ")
    assert re.fullmatch(r"[1-5]\d s left; it lasts 60 s after each renewal", page[0])
    assert page[1:] == [
        "3",
        "0 in the table, 0 in the memory of the process",
        "False True",
    ]


def test_client_pages_show_a_client_without_notifications(
    migrated_dsn: str, observer: Observer
) -> None:
    fill(observer)
    observer.execute(
        'UPDATE pg_layer_client SET counters = \'{"without_notifications": 1,'
        " \"queued_messages\": 100}' WHERE address = 'asgi!live'"
    )
    output = ask(
        migrated_dsn,
        """
print(json.dumps([row[:3] for row in shown("client", "?state=live")]))
page = strip_tags(unescape(detail("client", "asgi!live")))
print("listen_dsn" in page, "100 in the memory" in page)
print("killed" in strip_tags(detail("client", "asgi!lost")))
""",
    )
    assert output.splitlines() == ['[["host-live", "4711", "live, polls"]]', "True True", "True"]


def test_client_pages_show_a_client_that_closed_without_a_lease(
    migrated_dsn: str, observer: Observer
) -> None:
    observer.execute("SELECT pg_layer_close('asgi', 'asgi!stranger')")
    output = ask(
        migrated_dsn,
        """
print(json.dumps([row[:3] for row in shown("client", "?state=ended")]))
print(shown("client", "?state=overdue"))
print("unknown process" in detail("client", "asgi!stranger"))
""",
    )
    assert output.splitlines() == ['[["unknown", "unknown", "closed"]]', "[]", "True"]


def test_group_pages_show_groups_and_members(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
print(json.dumps(shown("group")))
print(json.dumps([row[:2] for row in shown("group", "?prefix=other")]))
print(json.dumps([row[:2] for row in shown("group", "?q=hal")]))
missing = browser.get(address("group", "change", "asgi!no"))
page = detail("group", "asgi!room")
cells = [[strip_tags(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
         for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
print(json.dumps([row for row in cells if row]))
print(address("client", "change", "asgi!live") in page, "asgi!room" in strip_tags(page))
print(missing.status_code)
""",
        CHANNEL_LAYERS={
            "default": {"BACKEND": BACKEND},
            "other": {"BACKEND": BACKEND, "CONFIG": {"prefix": "other"}},
        },
    )
    everything, other, hall, members, page, missing = output.splitlines()
    assert json.loads(everything) == [
        ["room", "2", "1", "asgi"],
        ["hall", "1", "1", "asgi"],
        ["room", "1", "1", "other"],
    ]
    assert json.loads(other) == [["room", "1"]]
    assert json.loads(hall) == [["hall", "1"]]
    process = "host-live, process 4711"
    assert json.loads(members) == [["specific.live!1", process], ["specific.live!2", process]]
    assert (page, missing) == ("True False", "302")


def test_group_page_shows_the_first_of_many_members(migrated_dsn: str, observer: Observer) -> None:
    observer.execute(
        "INSERT INTO pg_layer_membership"
        " SELECT 'room', 'asgi!live', 'specific.live!' || n, 0, true, 'infinity'"
        " FROM generate_series(1, 1234) AS n"
    )
    output = ask(
        migrated_dsn,
        """
page = detail("group", "asgi!room")
print(page.count("specific.live!"), "and 1034 more" in page)
""",
    )
    assert output == "200 True"


def test_group_page_of_a_user_without_other_permissions_has_no_links(
    migrated_dsn: str, observer: Observer
) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
user = User.objects.create_user("staff", is_staff=True)
permissions = Permission.objects.filter(content_type__app_label="pg_layer")
user.user_permissions.add(permissions.get(codename="view_group"))
browser.force_login(user)
page = detail("group", "asgi!room")
print("host-live, process 4711" in page, "/client/" in page)
""",
    )
    assert output == "True False"


def test_message_pages_show_waiting_messages(migrated_dsn: str, observer: Observer) -> None:
    id = fill(observer)
    add_message(observer, b"", "asgi!@room", None)
    add_message(observer, b"", "asgi!live", "specific.live!1")
    output = ask(
        migrated_dsn,
        f"""
for row in shown("message", "?to=all"):
    print(*row, sep=" | ")
for query in ("?to=group", "", "?to=process", "?to=nonsense", "?q=job", "?to=all&q=roo",
              "?to=all&q=specific.live!1", "?to=all&q=specific.live!2", "?to=all&q=no",
              "?to=all&q=asgi"):
    print(json.dumps([row[0] for row in shown("message", query)]))
print("{{'text': 'hello there', 'type': 'greet'}}" in unescape(detail("message", {id})))
""",
    )
    rows, found, page = output.splitlines()[:3], output.splitlines()[3:-1], output.splitlines()[-1]
    size = len(Codec("msgpack", 1000).encode({"type": "greet", "text": "hello there"}, "jobs"))
    jobs, room, own = "channel jobs", "group room", "channel specific.live!1"
    # Not the one that is over.
    assert [row.split(" | ")[0] for row in rows] == [jobs, room, own]
    assert re.fullmatch(rf"{jobs} \| {size} bytes \| \d+ s ago \| in 59 min \d+ s", rows[0])
    assert [json.loads(line) for line in found] == [
        *([room], [jobs], [own], [jobs], [jobs], [room]),
        *([own], [], [], []),
    ]
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
print([row[3] for row in shown("message")], [row[3] for row in shown("client")])
print("never" in detail("message", {id[0]}), "never" in detail("client", "asgi!live"))
print(Membership.objects.get().expires_at)
""",
    )
    assert output.splitlines() == ["['never'] ['never expires']", "True True", "None"]


@pytest.mark.parametrize("time_zone", [None, "Asia/Tokyo"])
def test_pages_show_times_to_the_second(
    migrated_dsn: str, observer: Observer, time_zone: str | None
) -> None:
    id = fill(observer)
    settings = {"USE_TZ": time_zone is not None, "TIME_ZONE": time_zone or "UTC"}
    zone = time_zone or "UTC"
    output = ask(
        migrated_dsn,
        f"""
print(*re.findall(r"(\\d+-\\d+-\\d+ \\d+:\\d+:\\d+) .(.*?).\\s", detail("message", {id})))
""",
        **settings,
    )
    row = observer.execute(
        "SELECT to_char(sent_at AT TIME ZONE %s, 'YYYY-MM-DD HH24:MI:SS') FROM pg_layer_message"
        " WHERE id = %s",
        (zone, id),
    ).fetchone()
    assert row is not None
    assert f"('{row[0]}', " in output, output


def test_message_list_fetches_no_payload(migrated_dsn: str, observer: Observer) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        """
from django.db import connection
from django.test.utils import CaptureQueriesContext
with CaptureQueriesContext(connection) as queries:
    assert len(shown("message")) == 1
print([query["sql"] for query in queries if re.search(r'"payload",', query["sql"])])
""",
    )
    assert output == "[]"


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("client", ""),
        ("client", "?state=ended"),
        ("group", "?q=hall"),
        ("message", "?to=group"),
        ("message", "?q=jobs"),
    ],
)
def test_list_reads_the_prefixes_and_its_rows_in_one_query_each(
    migrated_dsn: str, observer: Observer, model: str, query: str
) -> None:
    fill(observer)
    output = ask(
        migrated_dsn,
        f"""
from django.db import connection
from django.test.utils import CaptureQueriesContext
with CaptureQueriesContext(connection) as queries:
    shown({model!r}, {query!r})
for query in queries:
    for table in re.findall(r'FROM "(pg_layer_\\w+)"', query["sql"]):
        print(table)
""",
    )
    assert sorted(output.split()) == sorted(["pg_layer_lease_clock", f"pg_layer_{model}"])


MANY = """
    INSERT INTO pg_layer_client (address, host, pid, expires_at, lease, ended_at, swept_at)
    SELECT 'asgi!gone' || n, 'web', n, clock_timestamp(), 60, clock_timestamp(), clock_timestamp()
    FROM generate_series(1, 20000) AS n;
    INSERT INTO pg_layer_message (address, xid, boot, channel, expires_at)
    SELECT 'asgi!:jobs', pg_current_xact_id(), 0, 'jobs',
        clock_timestamp() + interval '1 hour' * n / 10000
    FROM generate_series(-20000, 20000) AS n;
    INSERT INTO pg_layer_membership
    SELECT 'room-' || n, 'asgi!live', 'specific.live!' || n, 0, true, 'infinity'
    FROM generate_series(1, 20000) AS n;
    ANALYZE pg_layer_client, pg_layer_message, pg_layer_membership
"""


def test_lists_of_large_tables_read_few_rows_in_one_query(
    migrated_dsn: str, observer: Observer
) -> None:
    """A page of a group reads this group only."""
    fill(observer)
    observer.execute(MANY)
    output = ask(
        migrated_dsn,
        """
from django.db import connection
from django.test.utils import CaptureQueriesContext

def rows_read(plan, table):
    "The rows of a table that a plan has read."
    rows = (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
    own = rows if plan.get("Relation Name") == table else 0
    return int(own + sum(rows_read(part, table) for part in plan.get("Plans", [])))

def look(page, what, table):
    "The rows of a table that each query about clients, messages or groups has read."
    with CaptureQueriesContext(connection) as captured:
        page()
    found = []
    for query in captured:
        if f'"pg_layer_{what}"' in query["sql"]:
            with connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {query['sql']}")
                found.append(rows_read(cursor.fetchone()[0][0]["Plan"], f"pg_layer_{table}"))
    print(found)

look(lambda: shown("client"), "client", "client")
look(lambda: shown("client", "?state=ended"), "client", "client")
look(lambda: shown("message"), "message", "message")
look(lambda: shown("message", "?p=3"), "message", "message")
look(lambda: shown("message", "?q=nothing"), "message", "message")
look(lambda: detail("group", "asgi!room-77"), "group", "membership")
look(lambda: shown("group"), "group", "membership")
title = browser.get(address("message")).content.decode()
print("Messages (only the first 1000)" in title, "1000 messages" in title)
print(browser.get(address("message") + "?p=99").status_code)
""",
    )
    *read, title, beyond = output.splitlines()
    *few, all_groups = [json.loads(line) for line in read]
    assert all(len(rows) == 1 and rows[0] <= 1100 for rows in few), output
    assert len(all_groups) == 1, output  # it counts the members of all groups, once
    assert (title, beyond) == ("True True", "302")


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
print(answers(), "Channel layer" in browser.get("/admin/").content.decode())
permissions = Permission.objects.filter(content_type__app_label="pg_layer")
user.user_permissions.add(permissions.get(codename="view_group"))
print(answers(), "Channel layer" in browser.get("/admin/").content.decode())
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
        assert output.split() == ["2", "3", "1", "True"]


@pytest.mark.parametrize(
    "entries",
    [{}, {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}],
    ids=["none", "another"],
)
def test_pages_without_a_layer_do_not_exist(migrated_dsn: str, entries: dict[str, Any]) -> None:
    output = ask(
        migrated_dsn,
        """
print([browser.get(address(model)).status_code for model in ("client", "group", "message")])
print("Channel layer" in browser.get("/admin/").content.decode())
""",
        CHANNEL_LAYERS=entries,
    )
    assert output.splitlines() == ["[403, 403, 403]", "False"]


ASKED = """
from pg_layer._db import same_database
connected_now, asked = same_database.connected_now, []
def counted(config):
    asked.append(config)
    return connected_now(config)
same_database.connected_now = counted
print("Channel layer" in browser.get("/admin/").content.decode(), len(asked))
"""


def test_index_asks_no_server_which_database_is_the_layers(
    migrated_dsn: str, observer: Observer, tmp_path: Any
) -> None:
    fill(observer)
    lite = {**SQLITE, "NAME": str(tmp_path / "db.sqlite3")}
    output = ask(
        migrated_dsn,
        f"""{ASKED}
print(len(shown("client")), len(asked) > 0)
""",
        DATABASES={"default": lite, "events": otherwise(migrated_dsn) | {"OPTIONS": {}}},
        **layers(dsn=migrated_dsn),
    )
    assert output.splitlines() == ["True 0", "2 True"]


@pytest.mark.parametrize("is_running", [True, False])
def test_lists_without_an_alias_say_so_and_ask_the_servers_once(
    migrated_dsn: str, fresh_database: str, is_running: bool
) -> None:
    """A list without an alias is empty, not an error, and the other pages are not there."""
    output = ask(
        migrated_dsn,
        f"""{ASKED}
for model in ("client", "group", "message"):
    page = unescape(strip_tags(browser.get(address(model)).content.decode()))
    print(shown(model), *re.findall("no alias in DATABASES leads to|could not be reached", page))
    print(browser.get(address(model, "change", "1")).status_code)
print(len(asked))
""",
        **layers(dsn=fresh_database if is_running else nowhere(migrated_dsn)),
    )
    told = "no alias in DATABASES leads to" if is_running else "could not be reached"
    assert output.splitlines() == ["True 0", *[f"[] {told}", "302"] * 3, "2" if is_running else "1"]


def test_pages_without_a_default_layer_show_the_first(
    migrated_dsn: str, observer: Observer
) -> None:
    fill(observer)
    output = ask(
        migrated_dsn, 'print(len(shown("client")))', CHANNEL_LAYERS={"mine": {"BACKEND": BACKEND}}
    )
    assert output == "2"
