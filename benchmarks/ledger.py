"""The books of a chat: who is in which room, what each client said, and what each heard. No I/O."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass

from benchmarks.board import Board
from benchmarks.statistics import Stream, Tally, tally_channel


@dataclass(frozen=True)
class Said:
    """``text`` goes to the server; ``heard`` is done once each client of the room has heard it."""

    text: str
    missing: set[int]
    heard: asyncio.Future[None]


class Ledger:
    """``clients`` in rooms of ``room``, each room spread over as many servers as the board has readers.

    Every sender numbers what it says. Deliveries go on the board, to the account of the listener's server;
    second copies are counted in the `tally` alone.
    """

    def __init__(self, board: Board, clients: int, room: int) -> None:
        self.servers = board.readers
        self.rooms = [range(first, min(first + room, clients)) for first in range(0, clients, room)]
        self._board = board
        self._size = room
        self._sent = [0] * clients
        self._streams: list[dict[int, Stream]] = [{} for _ in range(clients)]
        self._greeted: list[set[int]] = [set() for _ in range(clients)]
        self._open: dict[str, Said] = {}
        self._arriving = False
        self.begin()

    def begin(self) -> None:
        """Another phase: count ``deliveries``, and their ``ages`` in nanoseconds, from none."""
        self.ages: array[int] = array("q")
        self.latest_ns = 0

    @property
    def deliveries(self) -> int:
        return len(self.ages)

    def room_of(self, client: int) -> int:
        return client // self._size

    def server_of(self, client: int) -> int:
        return client % self.servers

    def greet(self) -> list[tuple[int, str]]:
        """Warm-up messages, not numbered: in each room that needs it, from one client at each server.

        None while those of the last time are still arriving: they shall not pile up before a slow layer.
        """
        if not self.calm():
            return []
        return [
            (sender, f"{sender} -1 0")
            for room in self.rooms
            if any(len(self._greeted[client]) < self.servers for client in room)
            for sender in room[: self.servers]
        ]

    def calm(self) -> bool:
        """Has no warm-up message arrived since this, or `greet`, was called last?"""
        arriving, self._arriving = self._arriving, False
        return not arriving

    def say(self, sender: int, now: int) -> Said:
        """The sender's next message, to be sent now."""
        number = self._sent[sender]
        self._sent[sender] = number + 1
        said = Said(
            text=f"{sender} {number} {now}",
            missing=set(self.rooms[self.room_of(sender)]),
            heard=asyncio.get_running_loop().create_future(),
        )
        self._open[said.text] = said
        return said

    def hear(self, client: int, text: str, now: int) -> None:
        """This client was handed this text."""
        sender, number, sent_ns = map(int, text.split())
        if number < 0:
            self._hear_greeting(client, sender)
            return
        streams = self._streams[client]
        if sender not in streams:
            streams[sender] = Stream()
        if not streams[sender].see(number):
            return
        self.ages.append(now - sent_ns)
        self.latest_ns = now
        self._board.deliver(self.server_of(client), now)
        if said := self._open.get(text):
            said.missing.discard(client)
            if not said.missing:
                del self._open[text]
                if not said.heard.done():
                    said.heard.set_result(None)

    def tally(self) -> Tally:
        """The balance of all clients, each of which should have heard all that its room said."""
        total = Tally()
        for room in self.rooms:
            sent = {sender: count for sender in room if (count := self._sent[sender])}
            for client in room:
                total += tally_channel(self._streams[client], sent)
        return total

    def _hear_greeting(self, client: int, sender: int) -> None:
        self._arriving = True
        greeted = self._greeted[client]
        if sender in greeted or self.room_of(sender) != self.room_of(client):
            return
        greeted.add(sender)
        if len(greeted) == self.servers:
            self._board.warm(self.server_of(client))
