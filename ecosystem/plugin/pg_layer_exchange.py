"""A plugin of pytest that runs the tests of a package on PostgreSQL and with another layer.

`ecosystem.run` says in the environment which database and which classes. pytest imports the plugin
before the package's settings and tests.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

import django
import pytest
from django.conf import settings

DATABASE = json.loads(os.environ["PG_LAYER_ECOSYSTEM_DATABASE"])
# The dotted names of the classes that are replaced: none in a run with the package's own layer.
REPLACED = json.loads(os.environ["PG_LAYER_ECOSYSTEM_REPLACED"])

# The options that other layers share with this one. Others, such as Redis' `hosts`, name what this
# layer does not have.
SHARED_OPTIONS = {"capacity", "channel_capacity", "expiry", "group_expiry", "prefix"}

setup_django = django.setup


def setup(set_prefix: bool = True) -> None:
    """Set up Django with PostgreSQL as its database, and replace the layer."""
    settings.DATABASES = {"default": DATABASE}
    if REPLACED:
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "pg_layer"]
    setup_django(set_prefix)
    for dotted in REPLACED:
        replace_layer(dotted)


def replace_layer(dotted: str) -> None:
    """Let the name of another layer's class lead to `PostgresChannelLayer`."""
    from pg_layer import PostgresChannelLayer

    module_name, _, name = dotted.rpartition(".")

    def __init__(self: Any, **options: Any) -> None:
        shared = {key: value for key, value in options.items() if key in SHARED_OPTIONS}
        PostgresChannelLayer.__init__(self, **shared)

    layer = type(name, (PostgresChannelLayer,), {"__init__": __init__})
    setattr(importlib.import_module(module_name), name, layer)


django.setup = setup


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Configure Django where the suite does without it, because the layer needs a database."""
    if not settings.configured:
        settings.configure()
        django.setup()
