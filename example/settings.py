"""Settings of the demo: one database, and the layer on it.

Environment: ``PG_LAYER_DSN`` (required) is the DSN of the database. ``DEMO_NAME`` is the name of
this process. ``DEMO_OTHER_URL`` is the address of the other server, to which the page links.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from psycopg.conninfo import conninfo_to_dict

BASE_DIR = Path(__file__).resolve().parent


def database_from_dsn(dsn: str) -> dict[str, Any]:
    """Return an entry of ``DATABASES`` for a libpq connection string or URL."""
    try:
        parameters = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        # The cause may quote the password.
        raise ImproperlyConfigured(
            "PG_LAYER_DSN is no connection string that libpq understands."
        ) from error
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parameters.pop("dbname", ""),
        "USER": parameters.pop("user", ""),
        "PASSWORD": parameters.pop("password", ""),
        "HOST": parameters.pop("host", ""),
        "PORT": parameters.pop("port", ""),
        "OPTIONS": parameters,
    }


DSN = os.environ.get("PG_LAYER_DSN", "")
if not DSN:
    raise ImproperlyConfigured(
        "Set PG_LAYER_DSN to a PostgreSQL database, for example "
        "postgresql://user:password@localhost/chat; `python -m example.demo` starts its own."
    )

# The settings that the demo shows.
INSTALLED_APPS = ["channels", "pg_layer", "example"]
DATABASES = {"default": database_from_dsn(DSN)}
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "pg_layer.PostgresChannelLayer",
        # Short, so that the users of a killed process soon disappear.
        "CONFIG": {"lease": 12, "heartbeat": 4},
    }
}

# The settings of any Django project.
DEBUG = False
SECRET_KEY = "only-for-the-demo-which-keeps-no-secrets"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
ASGI_APPLICATION = "example.asgi.application"
ROOT_URLCONF = "example.urls"
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

# The name of this process. The page shows it, and every message includes it.
DEMO_NAME = os.environ.get("DEMO_NAME") or "this server"
DEMO_OTHER_URL = os.environ.get("DEMO_OTHER_URL", "").rstrip("/")
