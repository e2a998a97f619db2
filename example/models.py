"""What the demo keeps: announcements. What is said in the chat is kept nowhere."""

from __future__ import annotations

from datetime import datetime

from django.db import models

MAX_ANNOUNCEMENT = 200


class Announcement(models.Model):
    """A line that somebody put up in a room."""

    room: models.CharField[str, str] = models.CharField(max_length=40, db_index=True)
    text: models.CharField[str, str] = models.CharField(max_length=MAX_ANNOUNCEMENT)
    created_at: models.DateTimeField[datetime, datetime] = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"#{self.room}: {self.text}"
