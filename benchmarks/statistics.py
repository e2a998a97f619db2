"""The arithmetic of the benchmarks, without any I/O: what arrived, how late, and how the layers compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Better = Literal["higher", "lower"]

#: What the error of a point says, and its drawing, where what should wait did not get there in time.
NOT_FILLED = "could not be filled"

#: So many in a tenth, at least; a layer is behind if the last tenth is older than that, and so many times.
_ENOUGH_TO_TELL = 5
_BEHIND_MS = 20.0
_BEHIND_TIMES = 3


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the values lie, interpolated; NaN if there are none."""
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent}")
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def quantiles(values: Sequence[float], parts: int = 200) -> list[float]:
    """``parts + 1`` values, from the smallest to the largest, that cut the rest into equal shares.

    Enough to draw their distribution; empty if there are none. Four digits each, for they go into files.
    """
    ordered = sorted(values)
    if not ordered:
        return []
    last = len(ordered) - 1
    return [float(f"{ordered[round(last * part / parts)]:.4g}") for part in range(parts + 1)]


def median(values: Sequence[float]) -> float:
    """The middle of the values that are numbers; NaN if there are none."""
    return percentile([value for value in values if not math.isnan(value)], 50)


def fell_behind(ages_ms: Sequence[float]) -> bool:
    """Did messages that were sent at a pace, in the order of their arrival, get older and older?

    Then their age is the length of a queue. The last tenth is compared to the first; a few messages tell
    nothing.
    """
    tenth = len(ages_ms) // 10
    if tenth < _ENOUGH_TO_TELL:
        return False
    last = median(ages_ms[-tenth:])
    return last > _BEHIND_MS and last > _BEHIND_TIMES * median(ages_ms[:tenth])


def ratio(ours: float, theirs: float, better: Better) -> float:
    """How many times better ``ours`` is: above 1 means ahead, below 1 behind. NaN where it has no meaning.

    It has none against nothing, nor with a negative figure.
    """
    above, below = (ours, theirs) if better == "higher" else (theirs, ours)
    if math.isnan(above) or math.isnan(below) or above < 0 or below <= 0:
        return math.nan
    return above / below


def rate(count: int, start_ns: int, end_ns: int) -> float:
    """Events per second between two readings of the monotonic clock; 0 if nothing happened."""
    if count <= 0 or end_ns <= start_ns:
        return 0.0
    return count * 1e9 / (end_ns - start_ns)


@dataclass(frozen=True)
class Tally:
    """What went wrong between senders and readers, in deliveries."""

    lost: int = 0
    twice: int = 0
    disorder: int = 0
    stray: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.lost + other.lost,
            self.twice + other.twice,
            self.disorder + other.disorder,
            self.stray + other.stray,
        )

    def __bool__(self) -> bool:
        return bool(self.lost or self.twice or self.disorder or self.stray)


@dataclass
class Stream:
    """The numbers 0, 1, 2 … of one sender as they reached one reader.

    Exact, at the cost of a comparison as long as nothing goes wrong: counting must not blur the measurement.
    """

    next: int = 0
    missing: set[int] = field(default_factory=set)
    twice: int = 0
    disorder: int = 0

    def see(self, number: int) -> bool:
        """Count one delivery; False if it is another copy."""
        if number == self.next:
            self.next = number + 1
        elif number > self.next:
            self.missing.update(range(self.next, number))
            self.next = number + 1
        elif number in self.missing:
            self.missing.remove(number)
            self.disorder += 1
        else:
            self.twice += 1
            return False
        return True

    def tally(self, sent: int) -> Tally:
        """The balance against ``sent``, the count of numbers that the sender gave out."""
        lost = sum(1 for number in self.missing if number < sent)
        beyond = max(self.next - sent, 0) - (len(self.missing) - lost)
        lost += max(sent - self.next, 0)
        return Tally(lost=lost, twice=self.twice, disorder=self.disorder, stray=beyond)


#: The streams of one channel, by sender.
Streams = Mapping[int, Stream]


def tally_channel(streams: Streams, sent: Mapping[int, int]) -> Tally:
    """The balance of one channel, to which each sender sent so many; what others sent is stray."""
    total = Tally()
    for sender in sent.keys() | streams.keys():
        total += streams.get(sender, Stream()).tally(sent.get(sender, 0))
    return total


def tally_competing(readers: Iterable[Sequence[tuple[int, int]]], sent: Mapping[int, int]) -> Tally:
    """The balance of readers that share a channel: each (sender, number) should reach one of them, once.

    Order is only counted within a reader: among several there is none.
    """
    seen: set[tuple[int, int]] = set()
    twice = stray = disorder = 0
    for reader in readers:
        latest: dict[int, int] = {}
        for sender, number in reader:
            if number >= sent.get(sender, 0):
                stray += 1
            elif (sender, number) in seen:
                twice += 1
            else:
                seen.add((sender, number))
                disorder += number < latest.get(sender, -1)
            latest[sender] = max(number, latest.get(sender, -1))
    return Tally(lost=sum(sent.values()) - len(seen), twice=twice, disorder=disorder, stray=stray)


@dataclass(frozen=True)
class Figure:
    """One number that a scenario yields. ``better`` is None where it is no merit of the layer."""

    name: str
    unit: str
    better: Better | None

    @property
    def label(self) -> str:
        return self.unit if self.name == self.unit else f"{self.name} {self.unit}".strip()


@dataclass(frozen=True)
class Outcome:
    """One scenario on one layer in one round. ``error`` says why there are no figures.

    ``samples``: `quantiles` of the messages' ages in milliseconds, where their distribution is of interest.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    tally: Tally = Tally()
    notes: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    samples: Sequence[float] = ()


@dataclass(frozen=True)
class Summary:
    """All rounds of one scenario on one layer: the medians, and the sum of what went wrong."""

    figures: Mapping[str, float]
    tally: Tally
    notes: Mapping[str, float]
    errors: Sequence[str]


def summarise(outcomes: Sequence[Outcome], figures: Iterable[Figure]) -> Summary:
    """Medians over the rounds that succeeded; faults, notes and errors add up."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    notes: dict[str, float] = {}
    for outcome in good:
        for name, value in outcome.notes.items():
            notes[name] = notes.get(name, 0) + value
    return Summary(
        figures={
            figure.name: median([outcome.figures.get(figure.name, math.nan) for outcome in good])
            for figure in figures
        },
        tally=sum((outcome.tally for outcome in good), Tally()),
        notes=notes,
        errors=[outcome.error for outcome in outcomes if outcome.error is not None],
    )
