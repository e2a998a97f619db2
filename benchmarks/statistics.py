"""The arithmetic of the benchmarks: deliveries, latencies and comparisons. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Better = Literal["higher", "lower"]

#: The error of a point whose waiting messages were not stored in time, in words and in its drawing.
NOT_FILLED = "could not be filled"

#: The minimum size of a tenth. A layer is behind if its last tenth is older than so many ms, and so
#: many times older than the first.
_MIN_TENTH = 5
_BEHIND_MS = 20.0
_BEHIND_TIMES = 3


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the interpolated percentile of the values, or NaN without values."""
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
    """Return ``parts + 1`` values, smallest to largest, that cut the rest into equal shares.

    They are enough to draw the distribution. They are rounded to four digits, because they are
    written to files. Without values the result is empty.
    """
    ordered = sorted(values)
    if not ordered:
        return []
    last = len(ordered) - 1
    return [float(f"{ordered[round(last * part / parts)]:.4g}") for part in range(parts + 1)]


def median(values: Sequence[float]) -> float:
    """Return the median of the values that are numbers, or NaN if there are none."""
    return percentile([value for value in values if not math.isnan(value)], 50)


def fell_behind(ages_ms: Sequence[float]) -> bool:
    """Return whether messages that were sent at a pace arrive with increasing ages.

    If so, their age is the length of a queue. The last tenth is compared to the first; a small
    number of messages proves nothing.
    """
    tenth = len(ages_ms) // 10
    if tenth < _MIN_TENTH:
        return False
    last = median(ages_ms[-tenth:])
    return last > _BEHIND_MS and last > _BEHIND_TIMES * median(ages_ms[:tenth])


def ratio(value: float, other: float, better: Better) -> float:
    """Return how many times better ``value`` is than ``other``: above 1 ahead, below 1 behind.

    Return NaN if the ratio has no meaning: against zero, or with a negative figure.
    """
    above, below = (value, other) if better == "higher" else (other, value)
    if math.isnan(above) or math.isnan(below) or above < 0 or below <= 0:
        return math.nan
    return above / below


def rate(count: int, start_ns: int, end_ns: int) -> float:
    """Return events per second between two readings of the monotonic clock, 0 without events."""
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

    The count is exact. It costs one comparison as long as nothing goes wrong, so that it does not
    distort the measurement.
    """

    next: int = 0
    missing: set[int] = field(default_factory=set)
    twice: int = 0
    disorder: int = 0

    def see(self, number: int) -> bool:
        """Count one delivery. Return False if it is another copy."""
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
        """Return the tally against ``sent``, the count of numbers that the sender used."""
        lost = sum(1 for number in self.missing if number < sent)
        beyond = max(self.next - sent, 0) - (len(self.missing) - lost)
        lost += max(sent - self.next, 0)
        return Tally(lost=lost, twice=self.twice, disorder=self.disorder, stray=beyond)


#: The streams of one channel, by sender.
Streams = Mapping[int, Stream]


def tally_channel(streams: Streams, sent: Mapping[int, int]) -> Tally:
    """Return the tally of a channel with these senders. Messages of other senders are stray."""
    total = Tally()
    for sender in sent.keys() | streams.keys():
        total += streams.get(sender, Stream()).tally(sent.get(sender, 0))
    return total


def tally_competing(readers: Iterable[Sequence[tuple[int, int]]], sent: Mapping[int, int]) -> Tally:
    """Return the tally of readers of one channel. Each message should reach one reader once.

    Order is only checked within a reader, because there is none among several.
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
    """One figure of a scenario. ``better`` is None if it is no merit of the layer."""

    name: str
    unit: str
    better: Better | None

    @property
    def label(self) -> str:
        return self.unit if self.name == self.unit else f"{self.name} {self.unit}".strip()


@dataclass(frozen=True)
class Outcome:
    """One scenario with one layer in one round. ``error`` gives the reason without figures.

    ``samples``: `quantiles` of the messages' ages in milliseconds, if their distribution matters.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    tally: Tally = Tally()
    notes: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    samples: Sequence[float] = ()


@dataclass(frozen=True)
class Summary:
    """All rounds of a scenario with one layer: the medians, and the sum of what went wrong."""

    figures: Mapping[str, float]
    tally: Tally
    notes: Mapping[str, float]
    errors: Sequence[str]


def summarise(outcomes: Sequence[Outcome], figures: Iterable[Figure]) -> Summary:
    """Return medians over the successful rounds; faults, notes and errors add up."""
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
