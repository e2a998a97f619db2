"""The check that all members of a group receive its messages in one order. No I/O.

The rule: if two members of a group, in any processes, both received two messages, they received
the two in the same order. The rule does not apply if one of the two messages

- was received by one of the two members in a catch-up (see `soak.absences`), or
- was possibly never announced. Its sender may have died or lost its connection between the commit
  of a transaction and the announcement. Each process finds such a message at a different time, so
  the message has no place in the order.

All other pairs count, including pairs between which other messages were caught up on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[str, int]


class Receipt(NamedTuple):
    """The receipt of a group message by one member."""

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
    """The result of a comparison of members."""

    compared: int = 0  # places of messages that two members agreed or disagreed on
    left_out: int = 0  # places that were not compared because of a catch-up
    excused: set[Key] = field(default_factory=set)  # messages reordered by a catch-up
    disagreements: dict[Key, Disagreement] = field(default_factory=dict)  # one for each message

    def add(self, other: GroupOrder) -> None:
        """Add the result of another group."""
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
    """Compare the receipts of the members of one group, by channel, in order of receipt."""
    found = GroupOrder()
    present: list[_Member] = []
    all_members = [_Member(channel, receipts) for channel, receipts in members.items() if receipts]
    for member in sorted(all_members, key=lambda member: member.first_sent):
        # A member whose messages were all sent earlier shares none with this or later members.
        present = [other for other in present if other.last_sent >= member.first_sent]
        for other in present:
            one, two = sorted((member, other), key=lambda each: len(each.receipts))
            _compare_two(one, two, found)
        present.append(member)
    found.excused -= found.disagreements.keys()
    return found


def _compare_two(one: _Member, other: _Member, found: GroupOrder) -> None:
    furthest: Receipt | None = None  # of ``other``, among the compared receipts
    furthest_place = furthest_of_all = -1
    for receipt in one.receipts:
        place = other.places.get(receipt.key)
        if place is None:
            continue
        other_receipt = other.receipts[place]
        is_behind = place < furthest_of_all
        furthest_of_all = max(place, furthest_of_all)
        if receipt.is_caught_up or other_receipt.is_caught_up:
            found.left_out += 1
            if is_behind:
                found.excused.add(receipt.key)
            continue
        found.compared += 1
        if furthest is not None and place < furthest_place:
            found.disagreements.setdefault(
                receipt.key,
                Disagreement(
                    furthest.key, receipt.key, one.channel, other.channel, furthest.received
                ),
            )
        else:
            furthest, furthest_place = other_receipt, place
            if is_behind:  # only relative to messages that were caught up on
                found.excused.add(receipt.key)
