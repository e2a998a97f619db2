"""One measurement: start the processes of a scenario with one layer, and always end them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.board import Board
from benchmarks.layers import KINDS, LayerSpec
from benchmarks.scenarios.base import Run, Scenario, Sent, Sizes
from benchmarks.signals import uninterrupted
from benchmarks.statistics import Outcome
from benchmarks.worker import Part, play

_SPAWN = multiprocessing.get_context("spawn")

#: Seconds that a measurement may take in addition to the sending.
_OVERHEAD_LIMIT = 90.0
#: Seconds after the last expected delivery in which a second copy may arrive.
_SETTLE = 0.3
#: Seconds without a delivery after which missing messages count as lost.
_GRACE = 3.0
#: Seconds after the sender's end for which late messages are read.
_DRAIN_LIMIT = 30.0
_LEAVE_LIMIT = 10.0
_TICK = 0.05


class Failed(Exception):
    """The measurement has no result; the message gives the reason."""


@dataclass
class _Player:
    part: Part
    process: Any
    pipe: Connection

    @classmethod
    def start(cls, part: Part, board: Board) -> _Player:
        own_end, child_end = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=play, args=(part, board, child_end), name=part.label, daemon=True
        )
        with uninterrupted():
            process.start()
        child_end.close()
        return cls(part, process, own_end)

    def leave(self) -> bool:
        """Wait for the end of the process. Return False if it had to be killed."""
        self.process.join(_LEAVE_LIMIT)
        left = self.process.exitcode is not None
        if not left:
            self.process.kill()
            self.process.join()
        self.pipe.close()
        return left


class Measurement:
    """A measurement of a scenario with one layer. ``on_progress`` often gets the deliveries."""

    def __init__(
        self,
        scenario: Scenario,
        spec: LayerSpec,
        sizes: Sizes,
        *,
        profile: str | None = None,
        on_progress: Callable[[int], None] = lambda deliveries: None,
    ) -> None:
        self._scenario = scenario
        self._spec = spec
        self._sizes = sizes
        self._profile = profile
        self._on_progress = on_progress
        self._board = Board(sizes.processes)
        self._end = time.monotonic() + sizes.seconds + _OVERHEAD_LIMIT

    def run(self) -> Outcome:
        """Return the outcome. An error of the layer becomes the outcome's error."""
        players: list[_Player] = []
        try:
            if KINDS[self._spec.name].played == "in one loop":
                sender = self._start("all", 0, players)
                readers = [sender] * self._sizes.processes
            else:
                readers = [
                    self._start("receive", index, players) for index in range(self._sizes.processes)
                ]
                sender = self._start("send", 0, players)
                announced = [self._hear(reader, "ready") for reader in readers]
                with suppress(OSError):  # it has ended; the next message gives the reason
                    sender.pipe.send(announced)
            sent: Sent = self._hear(sender, "report")
            self._drain(self._scenario.expected(sent, self._sizes))
            self._board.stop()
            receipts = [self._hear(reader, "report") for reader in readers]
            run = Run(
                self._sizes,
                sent,
                receipts,
                self._board.deliveries,
                self._board.start_ns,
                self._board.latest_ns,
            )
            outcome = self._scenario.summarise(run)
        except Failed as failure:
            outcome = Outcome(error=str(failure))
            _kill(players)
        except BaseException:
            _kill(players)
            raise
        left = [player.leave() for player in players]
        if outcome.error is None and not all(left):
            notes = {**outcome.notes, "processes killed": left.count(False)}
            outcome = Outcome(outcome.figures, outcome.tally, notes)
        return outcome

    def _start(self, role: Any, index: int, players: list[_Player]) -> _Player:
        part = Part(role, index, self._scenario.name, self._spec, self._sizes, self._profile)
        player = _Player.start(part, self._board)
        players.append(player)
        return player

    def _hear(self, player: _Player, wanted: str) -> Any:
        while not player.pipe.poll(_TICK):
            self._on_progress(self._board.deliveries)
            if time.monotonic() > self._end:
                raise Failed(f"{player.part.role}: no {wanted} in time")
        try:
            word, value = player.pipe.recv()
        except (EOFError, ConnectionError):
            player.process.join(1)
            raise Failed(
                f"{player.part.role}: the process ended (exit code {player.process.exitcode})"
            ) from None
        if word == "error":
            raise Failed(value)
        if word != wanted:
            raise Failed(f"{player.part.role}: sent {word} instead of {wanted}")
        return value

    def _drain(self, expected: int) -> None:
        """Let the readers continue until all messages have arrived or none arrives any more."""
        limit = time.monotonic() + _DRAIN_LIMIT
        seen, since = -1, time.monotonic()
        while (now := time.monotonic()) < limit:
            deliveries = self._board.deliveries
            self._on_progress(deliveries)
            if deliveries != seen:
                seen, since = deliveries, now
            if now - since > (_SETTLE if deliveries >= expected else _GRACE):
                return
            time.sleep(_TICK)


def _kill(players: Sequence[_Player]) -> None:
    for player in players:
        with suppress(Exception):
            player.process.kill()
