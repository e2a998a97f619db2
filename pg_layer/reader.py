"""What a process knows of a normal channel that it reads. No I/O."""

from __future__ import annotations

import asyncio
import math

from pg_layer.mailbox import Mailbox


class Reader:
    """A normal channel that this process reads."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.is_wanted = False  # somebody has waited: it is to be listened to
        self.doorbell: str | None = None  # what is listened to
        self.is_used = True
        self.is_taking = False
        self.is_putting_back = False
        self.may_have_more = True
        self.floor = 0  # nothing waits below this id
        self.ahead = 0  # messages to take beyond what is waited for, as this reader is quick
        self.took_at = -math.inf
        self.put_back: asyncio.TimerHandle | None = None
