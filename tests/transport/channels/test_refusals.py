# SPDX-License-Identifier: Apache-2.0
"""Who is turned away in the handshake says what it truly knows."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowshed.cache import CapacityError
from cowshed.cache.errors import PeerError, PeerGoneError
from cowshed.transport import connect
from cowshed.transport.messages.fields import error_reply
from cowshed.transport.messages.protocol import encode

FULL = error_reply("capacity", "no room for another guest: so it is")


@contextmanager
def _backend(
    where: str, tmp_path: Path, turn_away: Callable[[socket.socket], None]
) -> Iterator[str]:
    """Somebody who does that with whoever connects."""
    if where == "unix":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / "s"))
        uri = f"unix://{tmp_path}/s"
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        uri = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    listener.listen()

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                turn_away(peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield uri
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _say(peer: socket.socket, tag: int, *, after_hello: bool) -> None:
    if after_hello:
        select.select([peer], [], [])  # it is there, and stays unread
    (packet,) = encode(tag, FULL)
    peer.send(packet)


@pytest.mark.parametrize("where", ["unix", "tcp"])
@pytest.mark.parametrize("tag", [0, 1])
@pytest.mark.parametrize("after_hello", [False, True])
def test_a_refusal_is_heard_though_the_backend_hung_up_with_hello_unread(
    tmp_path: Path, where: str, tag: int, after_hello: bool
) -> None:
    def turn_away(peer: socket.socket) -> None:
        _say(peer, tag, after_hello=after_hello)

    with (
        _backend(where, tmp_path, turn_away) as uri,
        pytest.raises(CapacityError, match="no room for another guest: so it is"),
    ):
        connect(uri)


@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_a_backend_that_hangs_up_without_a_word_is_not_asked_whether_it_runs(
    tmp_path: Path, where: str
) -> None:
    with _backend(where, tmp_path, lambda _: None) as uri, pytest.raises(PeerError) as caught:
        connect(uri)
    said = str(caught.value)
    assert said.startswith(f"the backend at {uri} closed the connection before it replied")
    assert "is the backend running" not in said
    assert isinstance(caught.value.__cause__, PeerGoneError)
