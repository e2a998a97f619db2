"""Settings of the test project.

The environment variable ``PG_LAYER_TEST_PROJECT_DSN`` is the DSN of its database.
``PG_LAYER_TEST_PROJECT_SETTINGS`` is a JSON object of settings that replace those below.
"""

from __future__ import annotations

import json
import os
from typing import Any

from psycopg.conninfo import conninfo_to_dict


def database(dsn: str) -> dict[str, Any]:
    """Return a ``DATABASES`` entry for a connection string."""
    parameters = dict(conninfo_to_dict(dsn))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parameters.pop("dbname", ""),
        "USER": parameters.pop("user", ""),
        "PASSWORD": parameters.pop("password", ""),
        "HOST": parameters.pop("host", ""),
        "PORT": parameters.pop("port", ""),
        "OPTIONS": parameters,
    }


SECRET_KEY = "only-for-tests"
USE_TZ = True
INSTALLED_APPS = ["channels", "pg_layer"]
ASGI_APPLICATION = "tests.project.asgi.application"
DATABASES = {"default": database(os.environ["PG_LAYER_TEST_PROJECT_DSN"])}
CHANNEL_LAYERS: dict[str, Any] = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer"}}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"event": {"()": "tests.project.logs.EventFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "event"}},
    "loggers": {"pg_layer": {"handlers": ["stderr"], "level": "WARNING", "propagate": False}},
}

globals().update(json.loads(os.environ.get("PG_LAYER_TEST_PROJECT_SETTINGS", "{}")))
