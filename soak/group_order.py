"""Whether all members of a group see its messages in one order. No I/O.

The rule. Take two members of a group, in whatever processes, and two messages that both members
received. Both members received the two in the same order. It does not hold where one of the two

- was received by one of the two members in a catch-up (see `soak.absences`), or
- was perhaps never announced: its sender died, or lost its connection, between the commit of a
  transaction and the announcement. Such a message is found later, by each process at a time of its
  own, and has no place in the order.

All other pairs count, also those of which the other messages were caught up on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[str, int]


class Receipt(NamedTuple):
    """A member received a message of the group."""

    key: Key
    sent: float
    received: float
    is_caught_up: bool


class Disagreement(NamedTuple):
    """``one`` received ``key`` before ``other_key``, and ``other`` after it."""

    key: Key
    other_key: Key
    one: str
    other: str
    received: float  # by ``other``


@dataclass
class GroupOrder:
    """What a comparison of the members found."""

    compared: int = 0  # places of messages that two members agreed or disagreed on
    left_out: int = 0  # places that were not compared, by a catch-up
    excused: set[Key] = field(default_factory=set)  # messages in another order, by a catch-up
    disagreements: dict[Key, Disagreement] = field(default_factory=dict)  # one for each message

    def add(self, other: GroupOrder) -> None:
        """Add what was found for another group."""
        self.compared += other.compared
        self.left_out += other.left_out
        self.excused |= other.excused
        self.disagreements |= other.disagreements


class _Member:
    def __init__(self, channel: str, receipts: Sequence[Receipt]) -> None:
        self.channel = channel
        self.receipts = receipts
        self.places = {receipt.key: place for place, receipt in enumerate(receipts)}
        self.first_sent = min(receipt.sent for receipt in receipts)
        self.last_sent = max(receipt.sent for receipt in receipts)


def compare(members: Mapping[str, Sequence[Receipt]]) -> GroupOrder:
    """Compare what the members of one group received, by channel, in the order of receipt."""
    found = GroupOrder()
    present: list[_Member] = []
    all_members = [_Member(channel, receipts) for channel, receipts in members.items() if receipts]
    for member in sorted(all_members, key=lambda member: member.first_sent):
        # Members whose messages were all sent earlier have none in common with it or later ones.
        present = [other for other in present if other.last_sent >= member.first_sent]
        for other in present:
            one, two = sorted((member, other), key=lambda each: len(each.receipts))
            _compare_two(one, two, found)
        present.append(member)
    found.excused -= found.disagreements.keys()
    return found


def _compare_two(one: _Member, other: _Member, found: GroupOrder) -> None:
    furthest: Receipt | None = None  # of ``other``, among what counts
    furthest_place = furthest_of_all = -1
    for mine in one.receipts:
        place = other.places.get(mine.key)
        if place is None:
            continue
        theirs = other.receipts[place]
        is_behind = place < furthest_of_all
        furthest_of_all = max(place, furthest_of_all)
        if mine.is_caught_up or theirs.is_caught_up:
            found.left_out += 1
            if is_behind:
                found.excused.add(mine.key)
            continue
        found.compared += 1
        if furthest is not None and place < furthest_place:
            found.disagreements.setdefault(
                mine.key,
                Disagreement(furthest.key, mine.key, one.channel, other.channel, furthest.received),
            )
        else:
            furthest, furthest_place = theirs, place
            if is_behind:  # only of what was caught up on
                found.excused.add(mine.key)
