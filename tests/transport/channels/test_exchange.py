# SPDX-License-Identifier: Apache-2.0
"""What a client sends before it waits for a reply."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import pytest
from domains import in_thread

from cowshed.cache import PeerError, UsageError
from cowshed.transport.channels.exchange import greet_asking, reply_to
from cowshed.transport.links.connection import EOF, Received
from cowshed.transport.links.stream_ends import StreamListener, listen

Answer = Callable[[Received], dict[str, Any]]


def _answer_two(listener: StreamListener, answer: Answer) -> None:
    """Answer a client's requests, once two of them have come."""
    select.select([listener], [], [])
    connection = listener.accept()
    assert connection is not None
    with connection:
        messages: list[Received] = []
        while len(messages) < 2:
            select.select([connection], [], [])
            got = connection.recv_ready()
            assert got is not EOF
            messages += got
        for message in messages:
            connection.queue(answer(message), tag=message.tag)
        connection.drain(30)


def test_hello_and_the_first_request_take_one_round_trip() -> None:
    with listen("tcp://127.0.0.1:0") as listener:
        server = in_thread(
            lambda: _answer_two(
                listener, lambda message: {"ok": True, "version": 1, "did": message.body["op"]}
            )
        )
        connection, tag = greet_asking(listener.uri, "open", {"image": "d"})
        with connection:
            assert reply_to(connection, "open", tag)["did"] == "open"
        server.join()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ({"ok": True, "version": 2}, PeerError),
        ({"ok": False, "error": {"kind": "usage", "message": "not you"}}, UsageError),
    ],
)
def test_a_first_request_counts_for_nothing_if_hello_fails(
    reply: dict[str, Any], error: type[Exception]
) -> None:
    with listen("tcp://127.0.0.1:0") as listener:
        server = in_thread(lambda: _answer_two(listener, lambda _: reply))
        with pytest.raises(error):
            greet_asking(listener.uri, "open", {"image": "d"})
        server.join()
