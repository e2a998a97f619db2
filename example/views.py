"""The page: the chat, and a form for announcements in the room."""

from __future__ import annotations

from typing import cast

from channels.layers import get_channel_layer
from django import forms
from django.conf import settings
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

from example.consumers import MAX_NAME, MAX_TEXT, group_of, this_process
from example.models import MAX_ANNOUNCEMENT, Announcement
from pg_layer import PostgresChannelLayer

OUTCOMES = {
    "committed": "Committed: the row is saved, and the message is sent.",
    "rolled-back": "Rolled back after sending: there is no row and no message.",
}


class AnnouncementForm(forms.Form):
    """An announcement; ``roll_back`` is the second button."""

    text = forms.CharField(
        max_length=MAX_ANNOUNCEMENT,
        error_messages={"required": "There is nothing to announce yet."},
    )
    roll_back = forms.BooleanField(required=False)


class Mishap(Exception):
    """A simulated error in a view that has already sent its message."""


@require_http_methods(["GET", "HEAD", "POST"])
def chat(request: HttpRequest, room: str) -> HttpResponse:
    """Show the room with the name of this process. A POST makes an announcement."""
    form = AnnouncementForm(request.POST if request.method == "POST" else None)
    if form.is_valid():
        try:
            announce(room, form.cleaned_data["text"], fails=form.cleaned_data["roll_back"])
            outcome = "committed"
        except Mishap:
            outcome = "rolled-back"
        return redirect(f"{request.path}?outcome={outcome}")
    process = this_process()
    response = render(
        request,
        "chat.html",
        {
            "room": room,
            "process": process,
            "other_url": settings.DEMO_OTHER_URL and settings.DEMO_OTHER_URL + request.path,
            "form": form,
            "outcome": OUTCOMES.get(request.GET.get("outcome", "")),
            "saved": Announcement.objects.filter(room=room).count(),
            "max_name": MAX_NAME,
            "max_text": MAX_TEXT,
            "max_announcement": MAX_ANNOUNCEMENT,
        },
        status=400 if form.errors else 200,
    )
    response["X-Demo-Pid"] = str(process["pid"])
    response["Cache-Control"] = "no-store"
    return response


def announce(room: str, text: str, *, fails: bool) -> None:
    """Save an announcement and send it to the room, in one transaction."""
    layer = cast(PostgresChannelLayer, get_channel_layer())
    with transaction.atomic():
        announcement = Announcement.objects.create(room=room, text=text)
        layer.sync.group_send(
            group_of(room),
            {
                "type": "chat.announcement",
                "id": announcement.pk,
                "text": text,
                "time": announcement.created_at.timestamp(),
                "via": this_process(),
            },
        )
        if fails:
            raise Mishap
