"""When each process was disconnected or stopped, and what it caught up on. No I/O."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from soak.records import EVERY_PROCESS, Away

HEARTBEAT = 2.5  # seconds; the layer's options in a soak
LEASE = 20.0
# Seconds after an absence until the lease and the memberships are written again.
RETURN = HEARTBEAT + 3


class Spans:
    """Spans of time. Spans that overlap or are at most ``gap`` seconds apart are joined."""

    def __init__(self, spans: Iterable[tuple[float, float]], gap: float = 0.0) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted(spans):
            if self._ends and start <= self._ends[-1] + gap:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def overlap(self, start: float, end: float) -> bool:
        """Return whether any of the spans overlaps this one."""
        index = bisect_right(self._starts, end) - 1
        return index >= 0 and self._ends[index] >= start

    def cut_by(self, gaps: Iterable[tuple[float, float]]) -> Spans:
        """Return the parts of the spans that are outside of some gaps."""
        pieces = list(zip(self._starts, self._ends, strict=True))
        for gap_start, gap_end in gaps:
            pieces = [
                piece
                for start, end in pieces
                for piece in ((start, min(end, gap_start)), (max(start, gap_end), end))
                if piece[0] < piece[1]
            ]
        return Spans(dict.fromkeys(pieces))

    def longer_than(self, seconds: float) -> list[tuple[float, float]]:
        """Return the spans that are longer than this."""
        spans = zip(self._starts, self._ends, strict=True)
        return [(start, end) for start, end in spans if end - start > seconds]


_NONE = Spans(())


class Absences:
    """The absences of all processes.

    ``receipts``: by process, when each received message had been sent and when it was received.
    ``breaks``: when the server crashed or was replaced by a standby.

    A process that has lost its connections *catches up*: it reads what it missed. The catch-up is
    over when the process receives a message that was sent after the absence. So a message was
    *caught up on* if it was received after the absence began and sent before that time.
    """

    def __init__(
        self,
        aways: Iterable[Away],
        receipts: Mapping[str, Iterable[tuple[float, float]]],
        breaks: Sequence[tuple[float, float]] = (),
    ) -> None:
        self._away: dict[str, Spans] = {}
        self._alone: dict[str, Spans] = {}
        self._catch_up: dict[str, Spans] = {}
        self._without_lease: dict[str, Spans] = {}
        by_process: dict[str, list[Away]] = defaultdict(list)
        for away in aways:
            by_process[away.process].append(away)
        of_all = by_process.pop(EVERY_PROCESS, [])
        # All leases start again after a crash and after an outage longer than a lease.
        self._gaps = [
            (away.at, away.ended)
            for away in of_all
            if away.ended - away.at > LEASE
            or any(start <= away.ended and away.at <= end for start, end in breaks)
        ]
        self._of_all = Spans((away.at, away.ended) for away in of_all)
        for process in by_process.keys() | receipts.keys():
            self._add(process, of_all, by_process[process], Receipts(receipts.get(process, ())))

    def _add(
        self, process: str, of_all: Sequence[Away], own: Sequence[Away], receipts: Receipts
    ) -> None:
        alone = [(away.at, away.ended) for away in own if away.is_alone]
        everything = [(away.at, away.ended) for away in (*of_all, *own)]
        self._away[process] = Spans(everything)
        self._alone[process] = Spans(alone)
        self._catch_up[process] = Spans(
            (at, receipts.first_sent_after(end)) for at, end in everything
        )
        absent = Spans(alone, HEARTBEAT + 1).cut_by(self._gaps)
        too_long = absent.longer_than(LEASE - HEARTBEAT - 1)
        returns = [(start - 1, self._returned(process, end)) for start, end in too_long]
        self._without_lease[process] = Spans(returns)

    def _returned(self, process: str, end: float) -> float:
        """Return when a process that was absent until ``end`` certainly has its lease again."""
        while True:
            later = end + RETURN
            again = [e for s, e in self._away[process].longer_than(0) if end < e and s <= later]
            if not again:
                return later
            end = max(again)

    def was_away(self, process: str, start: float, end: float) -> bool:
        """Return whether a process may have been disconnected or stopped in this time."""
        return self._away.get(process, self._of_all).overlap(start, end)

    def was_alone(self, process: str, start: float, end: float) -> bool:
        """Return whether a process may have been absent while others reached the database."""
        return self._alone.get(process, _NONE).overlap(start, end)

    def is_caught_up(self, process: str, sent: float, received: float) -> bool:
        """Return whether a process may have received a message in a catch-up."""
        return self._catch_up.get(process, _NONE).overlap(sent, received)

    def had_no_lease(self, process: str, start: float, end: float) -> bool:
        """Return whether the lease of a process may have been over while the database was up."""
        return self._without_lease.get(process, _NONE).overlap(start, end)


class Receipts:
    """The times at which messages were sent and received."""

    def __init__(self, receipts: Iterable[tuple[float, float]]) -> None:
        pairs = sorted(receipts)
        self._sent = [sent for sent, _ in pairs]
        self._first: list[float] = [math.inf] * (len(pairs) + 1)
        for index in range(len(pairs) - 1, -1, -1):
            self._first[index] = min(pairs[index][1], self._first[index + 1])

    def first_sent_after(self, moment: float) -> float:
        """Return when the first message that was sent at ``moment`` or later was received."""
        return self._first[bisect_left(self._sent, moment)]
