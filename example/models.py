"""The model of the demo: announcements. Chat messages are not saved."""

from __future__ import annotations

from datetime import datetime

from django.db import models

MAX_ANNOUNCEMENT = 200


class Announcement(models.Model):
    """A line that a user announced in a room."""

    room: models.CharField[str, str] = models.CharField(max_length=40, db_index=True)
    text: models.CharField[str, str] = models.CharField(max_length=MAX_ANNOUNCEMENT)
    created_at: models.DateTimeField[datetime, datetime] = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"#{self.room}: {self.text}"
