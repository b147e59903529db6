# SPDX-License-Identifier: Apache-2.0
"""Those for whom there is no room are told why, and the oldest makes place for one more."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cowshed.cache import CapacityError
from cowshed.service.guests.turned_away import TurnedAway
from cowshed.service.runtime.loop import Loop
from cowshed.transport import Connection
from cowshed.transport.channels.exchange import ask
from cowshed.transport.links.acceptor import NR_SPARE

WHY = "no room for another guest: the house is full"
NR_PLACES = NR_SPARE - 1


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def refilled() -> list[int]:
    return []


@pytest.fixture
def turned_away(loop: Loop, refilled: list[int]) -> Iterator[TurnedAway]:
    turned_away = TurnedAway(loop, lambda: refilled.append(1))
    yield turned_away
    turned_away.close()


def come(turned_away: TurnedAway) -> Connection:
    """A peer that is turned away; its end, which has asked nothing yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    turned_away.add(Connection(theirs, 1 << 16, 1 << 16), WHY)
    return Connection(ours, 1 << 16, 1 << 16)


def test_silent_peers_are_told_unasked_as_soon_as_others_need_their_place(
    turned_away: TurnedAway, refilled: list[int]
) -> None:
    peers = [come(turned_away) for _ in range(NR_PLACES)]
    assert refilled == []
    late = come(turned_away)
    assert refilled == [1]
    first, *others = peers
    with pytest.raises(CapacityError, match=WHY):
        ask(first, "hello", {"version": 1, "features": []}, timeout=0)
    for other in (*others, late):
        assert list(other.recv_ready()) == []
    for peer in (*peers, late):
        peer.close()


def test_who_asks_is_answered_and_gives_its_place_back(
    loop: Loop, turned_away: TurnedAway, refilled: list[int]
) -> None:
    peer = come(turned_away)
    tag = peer.queue({"op": "hello"})
    peer.flush()
    loop.stop()
    loop.run()
    body, _, told = peer.recv(0)
    assert (body["error"]["message"], told) == (WHY, tag)
    assert refilled == [1]
    peer.close()
