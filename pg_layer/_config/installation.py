"""A report if the project does not list the app in INSTALLED_APPS."""

from __future__ import annotations

import functools
import logging

from django.apps import apps
from django.conf import settings

from pg_layer._state import log_events

logger = logging.getLogger("pg_layer")


def report_missing_app() -> None:
    """Log a warning if Django's settings name channel layers, but not the app.

    Without the app there are no checks, which would report it. It is no error: another project may
    have created the tables. A script without Django's apps, or without CHANNEL_LAYERS, needs no
    app.
    """
    if (
        apps.apps_ready
        and not apps.is_installed("pg_layer")
        and settings.configured
        and getattr(settings, "CHANNEL_LAYERS", None)
    ):
        _report_once()


@functools.cache
def _report_once() -> None:
    logger.warning(
        'INSTALLED_APPS does not name "pg_layer": `manage.py` neither creates nor checks the tables'
        ' of the channel layer, and has no pg_layer_sweep. Add "pg_layer" to INSTALLED_APPS, and'
        " run `python manage.py migrate pg_layer`.",
        extra={"event": log_events.APP_MISSING},
    )
