"""The messages that the form sends, in tests whose transaction never commits."""

from __future__ import annotations

from django.test import TestCase

from example.models import Announcement
from pg_layer.testing import captured_messages


class AnnouncementTests(TestCase):
    def test_announcement_is_saved_and_sent(self) -> None:
        with captured_messages(groups=["chat.hall"]) as sent:
            self.client.post("/hall/", {"text": "Dinner is ready"})

        assert [(each.group, each.message["text"]) for each in sent] == [
            ("chat.hall", "Dinner is ready")
        ]
        assert Announcement.objects.get().pk == sent[0].message["id"]

    def test_announcement_rolled_back_is_not_sent(self) -> None:
        with captured_messages(groups=["chat.hall"]) as sent:
            self.client.post("/hall/", {"text": "Dinner is ready", "roll_back": "yes"})

        assert sent == []
        assert not Announcement.objects.exists()

    def test_announcement_reaches_only_its_room(self) -> None:
        with captured_messages(groups=["chat.hall", "chat.cellar"]) as sent:
            self.client.post("/cellar/", {"text": "Dinner is ready"})

        assert [each.group for each in sent] == ["chat.cellar"]
