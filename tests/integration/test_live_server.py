"""Channels' `ChannelsLiveServerTestCase`, whose server is another process."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.components import require_module
from tests.project.commands import manage


def databases(dsn: str, **test: str) -> dict[str, Any]:
    """Return `DATABASES` with options for the test database."""
    parameters: dict[str, Any] = dict(conninfo_to_dict(dsn))
    return {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parameters["dbname"],
            "USER": parameters["user"],
            "PASSWORD": parameters["password"],
            "HOST": parameters["host"],
            "PORT": parameters["port"],
            "TEST": test,
        }
    }


@pytest.mark.daphne
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_live_server_in_another_process_uses_the_layer_of_the_test(
    migrated_dsn: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `TEST: {"NAME": ...}`, as Channels needs it to find the database in a fork."""
    require_module("daphne", component="daphne")
    monkeypatch.setenv("PG_LAYER_TEST_START_METHOD", method)
    name = f"test_{conninfo_to_dict(migrated_dsn)['dbname']}"
    result = manage(
        migrated_dsn,
        "test",
        "--noinput",
        "tests.project.live",
        settings={"DATABASES": databases(migrated_dsn, NAME=name)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Ran 2 tests" in result.stderr
