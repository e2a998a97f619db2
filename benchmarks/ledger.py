"""The accounts of a chat: the rooms, what each client sent and received. No I/O."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass

from benchmarks.board import Board
from benchmarks.statistics import Stream, Tally, tally_channel


@dataclass(frozen=True)
class Said:
    """A message to the server. ``heard`` is done when each client of the room has received it."""

    text: str
    missing: set[int]
    heard: asyncio.Future[None]


class Ledger:
    """The account of ``clients`` in rooms of ``room`` clients, spread over all servers.

    Every sender numbers its messages. Deliveries are noted on the board, in the slot of the
    listener's server. Only `tally` counts second copies.
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
        """Begin a phase: count ``deliveries`` and their ``ages`` in nanoseconds from zero."""
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
        """Return unnumbered warm-up messages, one from each server in each room that needs one.

        Return None while earlier ones still arrive, so that they do not accumulate before a slow
        layer.
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
        """Return whether no warm-up message arrived since the last call of this or `greet`."""
        arriving, self._arriving = self._arriving, False
        return not arriving

    def say(self, sender: int, now: int) -> Said:
        """Return the next message of the sender, to be sent now."""
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
        """Note that a client received a text."""
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
        """Return the tally of all clients. Each must have received all messages of its room."""
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
