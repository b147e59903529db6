# SPDX-License-Identifier: Apache-2.0
"""Messages between two programs, the same by every transport."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import until
from places import SCHEMES, STREAMS, Place, make_place, vsock_works

from cowshed.cache.errors import CapacityError, PeerError, SourceError, UsageError
from cowshed.transport.channels import channel
from cowshed.transport.channels.channel import Channel, ChannelRequest, Liveness
from cowshed.transport.messages.protocol import HEADER, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, encode

SECONDS = 60.0


@pytest.fixture(scope="module", params=SCHEMES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        yield make_place(request.param, Path(folder))


def test_vsock_is_among_the_schemes() -> None:
    if not vsock_works():
        pytest.skip("no vsock to this machine itself: needs the kernel module vsock_loopback")
    assert "vsock" in SCHEMES


@pytest.fixture
def pair(place: Place) -> Iterator[tuple[Channel, Channel]]:
    """A channel's two ends: who connected, who accepted."""
    with channel.listen(place.listen_uri, ["one", "two"]) as listener:
        got: list[Channel] = []
        thread = threading.Thread(target=lambda: got.append(listener.accept(SECONDS)))
        thread.start()
        ours = channel.connect(place.connect_uri(listener.uri), ["two", "three"], SECONDS)
        thread.join()
    with ours, got[0] as theirs:
        yield ours, theirs


def test_hello_agrees_on_version_and_features(pair: tuple[Channel, Channel]) -> None:
    for end in pair:
        assert (end.version, end.features, end.state) == (1, {"two"}, Liveness.OPEN)


def test_requests_are_answered_in_any_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    with ours.batch():
        pending = [ours.send("square", n=n) for n in range(20)]
    asked = [theirs.recv(SECONDS) for _ in range(20)]
    for one in reversed(asked):
        assert one.op == "square"
        one.reply({"n": one.body["n"] ** 2})
    assert [one.result(SECONDS)["n"] for one in pending] == [n * n for n in range(20)]


def test_both_ends_may_ask(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    first, second = ours.send("a"), theirs.send("b")
    theirs.recv(SECONDS).reply({"who": "theirs"})
    ours.recv(SECONDS).reply({"who": "ours"})
    assert (first.result(SECONDS)["who"], second.result(SECONDS)["who"]) == ("theirs", "ours")


def test_progress_comes_before_the_answer(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    pending = ours.send("warm")
    asked = theirs.recv(SECONDS)
    for done in (1, 2):
        asked.reply({"progress": done})
    asked.reply({"done": 3})
    assert pending.result(SECONDS)["done"] == 3
    assert [one["progress"] for one in pending.progress] == [1, 2]
    with pytest.raises(UsageError, match="waits for an answer"):
        asked.reply({})


@pytest.mark.parametrize("error", [UsageError("u"), CapacityError("c"), SourceError("s")])
def test_a_refusal_raises_its_kind_and_the_talk_goes_on(
    pair: tuple[Channel, Channel], error: UsageError | CapacityError | SourceError
) -> None:
    ours, theirs = pair
    pending = ours.send("x")
    theirs.recv(SECONDS).refuse(error)
    with pytest.raises(type(error), match=str(error)):
        pending.result(SECONDS)
    assert ours.state is Liveness.OPEN


def test_large_messages_go_both_ways_at_once(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    big = "x" * (MAX_REQUEST_BYTES - 100)
    pending = [ours.send("echo", text=big) for _ in range(12)]
    huge = "y" * (MAX_REPLY_BYTES // 16)

    def answer() -> None:
        for _ in pending:
            asked = theirs.recv(SECONDS)
            assert asked.body["text"] == big
            asked.reply({"text": huge})
        with pytest.raises(PeerError):
            theirs.recv(SECONDS)  # which sends the rest, until the other end closes

    thread = threading.Thread(target=answer)
    thread.start()
    assert all(one.result(SECONDS)["text"] == huge for one in pending)
    ours.close()
    thread.join()


def test_what_is_too_large_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    with pytest.raises(UsageError, match="over the limit"):
        ours.send("echo", text="x" * MAX_REPLY_BYTES)
    pending = ours.send("small")  # and does not take a place
    theirs.recv(SECONDS).reply()
    assert pending.result(SECONDS)["ok"]


def test_what_the_peer_takes_bounds_what_is_sent(place: Place) -> None:
    with channel.listen(place.listen_uri, max_message_bytes=4096) as listener:
        got: list[Channel] = []
        thread = threading.Thread(target=lambda: got.append(listener.accept(SECONDS)))
        thread.start()
        with channel.connect(place.connect_uri(listener.uri)) as ours:
            thread.join()
            with got[0] as theirs:
                with pytest.raises(UsageError, match="over the limit of 4096"):
                    ours.send("x", text="x" * 4096)
                # A peer that does not keep to it is dropped.
                ours.connection.limit_sending(1 << 20)
                ours.send("x", text="x" * 4096)
                with pytest.raises(PeerError, match="4096 are allowed"):
                    theirs.recv(SECONDS)


def test_no_more_requests_fly_than_the_peer_takes(place: Place) -> None:
    with channel.listen(place.listen_uri, max_outstanding=3) as listener:
        got: list[Channel] = []
        thread = threading.Thread(target=lambda: got.append(listener.accept(SECONDS)))
        thread.start()
        with channel.connect(place.connect_uri(listener.uri)) as ours:
            thread.join()
            with got[0] as theirs:
                pending = [ours.send("x") for _ in range(3)]
                with pytest.raises(CapacityError, match="3 requests"):
                    ours.send("x")
                theirs.recv(SECONDS).reply()
                pending[0].result(SECONDS)
                ours.send("x")
                # A peer that does not keep to it is dropped.
                for tag in (77, 78):
                    ours.connection.queue({"op": "x"}, (), tag)
                ours.connection.flush()
                with pytest.raises(PeerError, match="at most 3"):
                    hear_out(theirs)


def test_silence_is_an_error_at_the_deadline(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    with pytest.raises(PeerError, match=r"no answer.* in 0\.05 s"):
        ours.send("x").result(0.05)
    assert ours.state is Liveness.GONE


def test_closing_is_noticed_by_who_waits(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    pending = ours.send("x")
    theirs.recv(SECONDS)
    theirs.close()
    with pytest.raises(PeerError, match="closed"):
        pending.result(SECONDS)
    assert ours.state is Liveness.GONE
    with pytest.raises(UsageError, match="gone"):
        ours.send("y")


PEER = """
import sys
from cowshed.transport.channels import channel
peer = channel.connect(sys.argv[1])
pending = peer.send("x")
print("sent", flush=True)
pending.result(60)
"""


def test_a_killed_peer_is_noticed(place: Place) -> None:
    with channel.listen(place.listen_uri) as listener:
        command = [sys.executable, "-c", PEER, place.connect_uri(listener.uri)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
            listener.accept(SECONDS) as theirs,
        ):
            assert process.stdout is not None
            assert process.stdout.readline() == "sent\n"
            asked = theirs.recv(SECONDS)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(PeerError):
                theirs.recv(SECONDS)
            assert theirs.state is Liveness.GONE
            with pytest.raises((PeerError, UsageError)):
                asked.reply()


def test_a_line_waits_for_its_peer_and_finds_it_again(place: Place) -> None:
    with (
        place.free_uri() as uri,
        channel.Line(place.connect_uri(uri.partition("?")[0])) as line,
    ):
        assert line.state is Liveness.NOT_YET
        with pytest.raises(PeerError, match="no peer"):
            line.channel(0.05)
        assert line.state is Liveness.NOT_YET
        for _ in range(2):
            with channel.listen(uri) as listener:
                thread = threading.Thread(target=answer_one, args=[listener])
                thread.start()
                assert line.channel(SECONDS).request("x", SECONDS)["ok"]
                thread.join()
            until(lambda: line.state is Liveness.GONE)
            with pytest.raises(PeerError):
                line.channel(0.05)
            assert line.state is Liveness.GONE


def hear_out(peer: Channel) -> None:
    with peer:
        while True:
            peer.recv(SECONDS)


def answer_one(listener: channel.ChannelListener) -> None:
    with listener.accept(SECONDS) as peer:
        peer.recv(SECONDS).reply()


def test_a_batch_goes_out_in_one_go(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    sock = ours.connection._socket
    calls: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            if name in ("send", "sendmsg"):
                calls.append(1)
            return getattr(sock, name)

    ours.connection._socket = Counting()  # type: ignore[assignment]
    with ours.batch():
        for _ in range(16):
            ours.send("x")
        assert not calls
    ours.connection._socket = sock
    # A packet socket cannot join them.
    assert len(calls) == (16 if ours.connection.carries_descriptors else 1)
    for _ in range(16):
        theirs.recv(SECONDS)


def test_descriptors_travel_where_they_can(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    reader, writer = os.pipe()
    try:
        if not ours.connection.carries_descriptors:
            with pytest.raises(UsageError, match="no descriptors"):
                ours.send("take", [writer])
            return
        ours.send("take", [writer])
        asked: ChannelRequest = theirs.recv(SECONDS)
        os.write(asked.fds[0], b"hi")
        asked.close_fds()
        assert os.read(reader, 2) == b"hi"
    finally:
        os.close(reader)
        os.close(writer)


# What a peer may not do on a stream, each for itself.


@pytest.fixture
def stream_place(tmp_path: Path) -> Place:
    return make_place("tcp", tmp_path)


HELLO = b"".join(encode(1, {"op": "hello", "version": 1, "features": []}))
BAD_STREAMS: dict[str, bytes] = {
    "other protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no hello": b"".join(encode(1, {"op": "x"})),
    "hello twice": HELLO + HELLO,
    "answer to nothing": HELLO + b"".join(encode(9, {"ok": True})),
    "same tag twice": HELLO + 2 * b"".join(encode(9, {"op": "x"})),
    "long piece": HEADER.pack(0x44485343, 1, 1, 1, 0, 0, 1 << 20, 1 << 20),
    "long message": HEADER.pack(0x44485343, 1, 1, 1, 0, 0, 1 << 31, 64),
    "descriptors told": HEADER.pack(0x44485343, 1, 0, 1, 1, 0, 2, 2) + b"{}",
    "half a header": HELLO[:10],
    "half a message": HELLO[:-3],
    "version": HEADER.pack(0x44485343, 9, 0, 1, 0, 0, 2, 2) + b"{}",
    "features": b"".join(encode(1, {"op": "hello", "version": 1, "features": 7})),
}


@pytest.mark.parametrize("what", BAD_STREAMS)
def test_a_peer_that_breaks_a_rule_is_dropped_alone(what: str, stream_place: Place) -> None:
    with channel.listen(stream_place.listen_uri) as listener:
        host, port = listener.uri.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), SECONDS) as rude:
            rude.sendall(BAD_STREAMS[what])
            rude.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerError):
                hear_out(listener.accept(SECONDS))
            with contextlib.suppress(ConnectionResetError):
                while rude.recv(4096):
                    pass
        thread = threading.Thread(target=answer_one, args=[listener])
        thread.start()
        with channel.connect(listener.uri) as ours:
            assert ours.request("x", SECONDS)["ok"]
        thread.join()


def test_a_silent_peer_costs_its_deadline(stream_place: Place) -> None:
    with channel.listen(stream_place.listen_uri) as listener:
        host, port = listener.uri.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), SECONDS):
            assert select.select([listener], [], [], SECONDS)[0]
            with pytest.raises(PeerError, match="no hello"):
                listener.accept(0.1)
        with pytest.raises(PeerError, match="nobody connected"):
            listener.accept(0.05)


@pytest.mark.parametrize("scheme", STREAMS)
def test_nobody_there_is_said_plainly(scheme: str, tmp_path: Path) -> None:
    place = make_place(scheme, tmp_path)
    with (
        place.free_uri() as uri,
        pytest.raises(PeerError, match=r"cannot connect to .*; is the backend running"),
    ):
        channel.connect(place.connect_uri(uri.partition("?")[0]), timeout=SECONDS)
