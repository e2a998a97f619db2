"""The one page."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from example.consumers import MAX_NAME, MAX_TEXT, this_process


@require_safe
def chat(request: HttpRequest, room: str) -> HttpResponse:
    """The chat room, with the name of the process that serves it."""
    process = this_process()
    response = render(
        request,
        "chat.html",
        {
            "room": room,
            "process": process,
            "other_url": settings.DEMO_OTHER_URL and settings.DEMO_OTHER_URL + request.path,
            "max_name": MAX_NAME,
            "max_text": MAX_TEXT,
        },
    )
    response["X-Demo-Pid"] = str(process["pid"])
    response["Cache-Control"] = "no-store"
    return response
