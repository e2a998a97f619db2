"""The books of the WebSocket benchmark: the expected and the received messages of each client."""

from __future__ import annotations

from itertools import islice

import pytest

from benchmarks.board import Board
from benchmarks.ledger import Ledger
from benchmarks.scenarios.websockets import in_turn
from benchmarks.statistics import Tally


@pytest.fixture
def board() -> Board:
    return Board(2)


@pytest.fixture
def ledger(board: Board) -> Ledger:
    """Two rooms of four, each with two clients at each of two servers."""
    return Ledger(board, clients=8, room=4)


async def test_ledger_message_is_heard_when_the_whole_room_has_it(
    ledger: Ledger, board: Board
) -> None:
    said = ledger.say(1, 100)
    for client in (0, 1, 2):
        ledger.hear(client, said.text, 150)
    ledger.hear(2, said.text, 155)
    assert not said.heard.done()
    ledger.hear(3, said.text, 160)
    assert said.heard.done()
    ledger.hear(0, said.text, 170)
    assert list(ledger.ages) == [
        50,
        50,
        50,
        60,
    ]  # second copies are faults, but neither speed nor latency
    assert ledger.latest_ns == 160
    assert (board.delivered(0), board.delivered(1)) == (2, 2)
    assert ledger.tally() == Tally(twice=2)


async def test_ledger_counts_what_a_client_of_the_room_did_not_hear(ledger: Ledger) -> None:
    first, second = ledger.say(0, 0), ledger.say(0, 0)
    other = ledger.say(5, 0)
    for client in (0, 1, 2):
        ledger.hear(client, first.text, 1)
        ledger.hear(client, second.text, 1)
    ledger.hear(3, second.text, 1)
    assert ledger.tally() == Tally(lost=1 + 4)
    ledger.hear(3, first.text, 1)
    ledger.hear(3, other.text, 1)
    assert ledger.tally() == Tally(lost=4, disorder=1, stray=1)


async def test_ledger_new_phase_counts_from_zero_and_continues_numbering(ledger: Ledger) -> None:
    ledger.hear(0, ledger.say(0, 0).text, 7)
    ledger.begin()
    assert (ledger.deliveries, ledger.latest_ns) == (0, 0)
    assert ledger.say(0, 9).text == "0 1 9"


def test_ledger_client_is_warm_when_it_has_heard_from_each_server(
    ledger: Ledger, board: Board
) -> None:
    (first, hello), (second, hi), *others = ledger.greet()
    assert [first, second, *(sender for sender, _ in others)] == [0, 1, 4, 5]
    for client in (0, 1, 2, 3):
        ledger.hear(client, hello, 1)
        ledger.hear(client, hello, 1)
    assert (board.warmed(0), board.warmed(1)) == (0, 0)
    for client in (0, 1, 2):
        ledger.hear(client, hi, 1)
        ledger.hear(client, hi, 1)
    assert (board.warmed(0), board.warmed(1)) == (2, 1)
    assert ledger.deliveries == 0
    assert not ledger.tally()


def test_ledger_greetings_that_are_missing_are_repeated(ledger: Ledger) -> None:
    greetings = ledger.greet()
    for sender, text in greetings:
        for client in ledger.rooms[ledger.room_of(sender)]:
            if client != 7:
                ledger.hear(client, text, 1)
    assert ledger.greet() == []
    assert ledger.greet() == greetings[2:]
    assert ledger.calm()
    ledger.hear(7, greetings[2][1], 1)
    assert not ledger.calm()
    assert ledger.calm()


def test_in_turn_each_client_sends_ten_in_a_row() -> None:
    speakers = list(islice(in_turn(range(4, 6)), 30))
    assert speakers == [4] * 10 + [5] * 10 + [4] * 10
