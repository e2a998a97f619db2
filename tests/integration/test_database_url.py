"""The settings of docs/how-to/settings.md that read DATABASE_URL, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.project.commands import ROOT, SLOW_STEPS, TIMEOUT

PAGE = (ROOT / "docs" / "how-to" / "settings.md").read_text(encoding="utf-8")
SETTINGS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    if "DATABASE_URL" in block or "dj_database_url" in block
]
REST = """
SECRET_KEY = "only-for-tests"
USE_TZ = True
INSTALLED_APPS = ["channels", "pg_layer"]
"""
TALK = """
import asyncio, django
django.setup()
from channels.layers import get_channel_layer
from django.db import transaction

layer = get_channel_layer()
with transaction.atomic(using=layer.config.using or "default"):
    layer.sync.send("jobs", {"type": "test", "number": 1})

async def receive():
    print(await layer.receive("jobs"))
    await layer.close()

asyncio.run(receive())
"""


def url(dsn: str) -> str:
    """Return the DATABASE_URL of a database."""
    part = {name: quote(str(value), safe="") for name, value in conninfo_to_dict(dsn).items()}
    login = f"{part['user']}:{part.get('password', '')}"
    return f"postgres://{login}@{part['host']}:{part['port']}/{part['dbname']}?sslmode=prefer"


def run(folder: Path, database_url: str, *arguments: str) -> str:
    """Return the output of Python with the settings in the folder."""
    variables = {
        **os.environ,
        "DATABASE_URL": database_url,
        "EVENTS_DATABASE_URL": database_url,
        "DJANGO_SETTINGS_MODULE": "shop_settings",
        "PYTHONPATH": f"{ROOT}:{folder}",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert (result.returncode, SLOW_STEPS.sub("", result.stderr)) == (0, ""), result.stdout
    return result.stdout.strip()


def test_page_shows_both_packages() -> None:
    assert ["environ" in settings for settings in SETTINGS] == [True, False, True]
    assert ["dj_database_url" in settings for settings in SETTINGS] == [False, True, False]


@pytest.mark.parametrize("settings", SETTINGS, ids=["environ", "dj_database_url", "two"])
def test_settings_from_database_url_work(
    settings: str, fresh_database: str, tmp_path: Path
) -> None:
    (tmp_path / "shop_settings.py").write_text(settings + REST)
    alias = "events" if "EVENTS_DATABASE_URL" in settings else "default"
    command = ("-m", "django")
    database_url = url(fresh_database)
    run(tmp_path, database_url, *command, "migrate", "pg_layer", "--database", alias)
    check = run(tmp_path, database_url, *command, "check", "--database", alias)
    assert check == "System check identified no issues (0 silenced)."
    assert run(tmp_path, database_url, "-c", TALK) == "{'type': 'test', 'number': 1}"


WITH_DSN = """
import environ

env = environ.Env()
DATABASES = {"default": env.db()}
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "pg_layer.PostgresChannelLayer",
        "CONFIG": {"dsn": env("DATABASE_URL")},
    },
}
"""


def test_dsn_from_database_url_finds_the_alias(migrated_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "shop_settings.py").write_text(WITH_DSN + REST)
    assert run(tmp_path, url(migrated_dsn), "-c", TALK) == "{'type': 'test', 'number': 1}"
