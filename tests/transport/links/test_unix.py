# SPDX-License-Identifier: Apache-2.0
"""Real sockets: descriptors arrive or are closed; no peer holds up or fills up the other end."""

import array
import contextlib
import gc
import os
import resource
import select
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowshed.cache.errors import CapacityError, PeerError, UsageError
from cowshed.transport.links.connection import EOF, MAX_PACKETS_AT_ONCE, MAX_QUEUED_FDS, Connection
from cowshed.transport.links.unix import Listener, connect, listen, parse_uri
from cowshed.transport.messages.protocol import (
    MAX_FDS,
    MAX_PACKET_BYTES,
    MAX_PIECE_BYTES,
    MAX_REQUEST_BYTES,
    encode,
)

SECONDS = 60


def nr_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def every_descriptor_is_closed() -> Iterator[None]:
    gc.collect()  # what other tests left must not go meanwhile
    before = nr_fds()
    yield
    assert nr_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection as a daemon has it, and the bare socket of its peer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Connection(ours, receive_limit_bytes=MAX_REQUEST_BYTES) as connection, theirs:
        yield connection, theirs


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Connection(one) as first, Connection(other) as second:
        yield first, second


def send_raw(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    sock.sendmsg([packet], rights if fds else [])


def pipe_is_closed(reader: int) -> bool:
    """Whether nobody holds the writing end any more."""
    poll = select.poll()
    poll.register(reader, 0)
    return bool(poll.poll(0))


def test_message_and_descriptors_go_over(ends: tuple[Connection, Connection]) -> None:
    first, second = ends
    reader, writer = os.pipe()
    assert first.send({"op": "region"}, [writer]) == 1
    body, fds, tag = second.recv(5)
    assert (body, len(fds), tag) == ({"op": "region"}, 1, 1)
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"through")
    assert os.read(reader, 7) == b"through"
    second.send({"ok": True}, tag=tag)
    assert first.recv(5) == ({"ok": True}, [], 1)
    assert first.send({}) == 2
    for fd in (reader, writer, fds[0]):
        os.close(fd)


def test_long_message_arrives_whole_with_its_descriptors(
    ends: tuple[Connection, Connection],
) -> None:
    first, second = ends
    body = {"text": "x" * (3 << 20)}
    with open("/dev/null") as null:
        first.queue(body, [null.fileno()])
    first.queue({"next": 1})
    messages = []
    while len(messages) < 2:
        first.flush()
        got = second.recv_ready()
        assert got is not EOF
        messages += got
    assert [one.body for one in messages] == [body, {"next": 1}]
    assert [len(one.fds) for one in messages] == [1, 0]
    messages[0].close_fds()
    assert messages[0].fds == []


def test_recv_ready_is_bounded_and_then_tells_the_end(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    assert connection.recv_ready() == []
    nr_sent = MAX_PACKETS_AT_ONCE + 3
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    for tag in range(nr_sent):
        peer.send(encode(tag, {})[0])
    peer.close()
    first = connection.recv_ready()
    rest = connection.recv_ready()
    assert first is not EOF
    assert rest is not EOF
    assert [one.tag for one in first + rest] == list(range(nr_sent))
    assert len(first) == MAX_PACKETS_AT_ONCE
    assert connection.recv_ready() is EOF
    assert not connection.alive


def test_too_many_descriptors_are_refused_and_closed(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    reader, writer = os.pipe()
    send_raw(peer, encode(1, {}, MAX_FDS)[0], [writer] * (MAX_FDS + 1))
    os.close(writer)
    with pytest.raises(PeerError, match="more than 8 descriptors"):
        connection.recv_ready()
    assert pipe_is_closed(reader)
    os.close(reader)


@pytest.mark.parametrize("told", [0, 2])
def test_descriptors_not_told_of_are_refused_and_closed(
    pair: tuple[Connection, socket.socket], told: int
) -> None:
    connection, peer = pair
    reader, writer = os.pipe()
    send_raw(peer, encode(1, {}, told)[0], [writer])
    os.close(writer)
    with pytest.raises(PeerError, match=f"announces {told} descriptors and carries 1"):
        connection.recv_ready()
    assert pipe_is_closed(reader)
    os.close(reader)


def test_descriptors_of_refused_and_unfinished_messages_are_closed(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    reader, writer = os.pipe()
    # One good message, then an unfinished one, then one that breaks it off.
    send_raw(peer, encode(1, {}, 1)[0], [writer])
    send_raw(peer, encode(2, {"t": "x" * MAX_PIECE_BYTES}, 1)[0], [writer])
    send_raw(peer, encode(3, {}, 1)[0], [writer])
    os.close(writer)
    with pytest.raises(PeerError, match="broken off"):
        connection.recv_ready()
    assert pipe_is_closed(reader)
    os.close(reader)


def test_descriptors_of_an_unfinished_message_are_closed_with_the_connection(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    reader, writer = os.pipe()
    send_raw(peer, encode(2, {"t": "x" * MAX_PIECE_BYTES}, 1)[0], [writer])
    os.close(writer)
    assert connection.recv_ready() == []
    assert not pipe_is_closed(reader)
    connection.close()
    assert pipe_is_closed(reader)
    os.close(reader)


def test_oversize_packet_is_refused(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    # Cut off, it would pass for a packet of the right length.
    full = encode(1, {"t": "x" * (MAX_PIECE_BYTES - len('{"t":""}'))})[0]
    assert len(full) == MAX_PACKET_BYTES
    peer.send(full + b"y")
    with pytest.raises(PeerError, match="more than 65536 bytes"):
        connection.recv_ready()


def test_request_over_its_limit_is_refused_at_its_first_packet(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    peer.send(encode(1, {"t": "x" * MAX_REQUEST_BYTES})[0])
    with pytest.raises(PeerError, match="1 to 65536"):
        connection.recv_ready()


def test_peer_that_closes_in_the_middle_is_refused(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    peer.send(encode(2, {"t": "x" * MAX_PIECE_BYTES})[0])
    peer.close()
    with pytest.raises(PeerError, match="in the middle"):
        connection.recv_ready()


def test_half_open_peer_can_still_be_answered(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.send(encode(1, {"op": "x"})[0])
    peer.shutdown(socket.SHUT_WR)
    assert [one.tag for one in connection.recv_ready()] == [1]  # type: ignore[union-attr]
    assert connection.recv_ready() is EOF
    connection.send({"ok": True}, tag=1, timeout=5)
    assert peer.recv(MAX_PACKET_BYTES) == encode(1, {"ok": True})[0]


def test_silent_peer_is_told_from_a_closed_one(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    assert connection.alive
    with pytest.raises(PeerError, match=r"no message in 0\.01 s"):
        connection.recv(0.01)
    peer.close()
    assert not connection.alive
    with pytest.raises(PeerError, match="closed"):
        connection.recv(5)
    with pytest.raises(PeerError, match="cannot send"):
        connection.send({})


def test_slow_peer_is_bounded_and_loses_nothing(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    sent = 0

    def send_without_end() -> None:
        nonlocal sent
        while True:
            connection.queue({"t": "x" * 65000}, tag=sent)
            connection.flush()
            sent += 1

    with pytest.raises(PeerError, match="unread"):
        send_without_end()
    assert connection.wants_write
    assert sent * 65000 < 5 << 20
    with pytest.raises(PeerError, match=r"took no message in 0\.01 s"):
        connection.drain(0.01)
    peer.setblocking(False)
    tags = []
    while connection.wants_write or not tags:
        connection.flush()
        with contextlib.suppress(BlockingIOError):
            while packet := peer.recv(MAX_PACKET_BYTES):
                tags.append(struct.unpack_from("<I", packet, 8)[0])
    assert tags == list(range(sent))
    # What was taken counts no more: as much again can be sent, descriptors too.
    for _ in range(2 * sent):
        connection.queue({"t": "x" * 65000}, [0])
        assert connection.flush()
        _, fds, _, _ = socket.recv_fds(peer, MAX_PACKET_BYTES, 1)
        os.close(fds[0])


def test_descriptors_pile_up_for_a_slow_peer_only_so_far(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, _ = pair
    before = nr_fds()
    for _ in range(MAX_QUEUED_FDS // MAX_FDS + 1):
        connection.queue({}, [0] * MAX_FDS)
    with pytest.raises(PeerError, match="72 descriptors unread"):
        connection.queue({}, [0] * MAX_FDS)
    assert nr_fds() == before + MAX_QUEUED_FDS + MAX_FDS
    connection.close()
    assert nr_fds() == before - 1


def test_bad_descriptor_queues_nothing(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    before = nr_fds()
    with open("/dev/null") as null, pytest.raises(CapacityError, match="descriptor 9999"):
        connection.queue({}, [null.fileno(), 9999])
    assert nr_fds() == before
    assert not connection.wants_write


@settings(max_examples=50)
@given(st.lists(st.tuples(st.binary(max_size=100), st.integers(0, 10)), max_size=6))
def test_arbitrary_packets_with_descriptors_leave_none_behind(
    packets: list[tuple[bytes, int]],
) -> None:
    before = nr_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Connection(ours, receive_limit_bytes=MAX_REQUEST_BYTES) as connection, theirs:
        for packet, nr in packets:
            send_raw(theirs, packet, [0] * nr)
        with contextlib.suppress(PeerError):
            while (messages := connection.recv_ready()) and messages is not EOF:
                pass
    assert nr_fds() == before


def accept(listener: Listener) -> Connection:
    select.select([listener], [], [], SECONDS)
    connection = listener.accept()
    assert connection is not None
    return connection


def test_peer_is_who_the_kernel_says(socket_path: Path) -> None:
    script = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({str(socket_path)!r}); sys.stdin.read()
"""
    with listen(f"unix://{socket_path}") as listener:
        process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
        connection = accept(listener)
        peer = connection.peer
        assert (peer.pid, peer.uid, peer.gid) == (process.pid, os.getuid(), os.getgid())
        assert peer.pidfd is not None  # Linux 6.5
        assert not os.get_inheritable(peer.pidfd)
        assert connection.peer is peer
        poll = select.poll()
        poll.register(peer.pidfd, select.POLLIN)
        assert not poll.poll(0)
        process.communicate()
        assert poll.poll(1000 * SECONDS)  # it hangs up when the process ends
        connection.close()
        assert connection.peer._replace(pidfd=None) == connection.peer
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(peer.pidfd)


def test_listener_gives_none_while_nobody_waits(socket_path: Path) -> None:
    with listen(f"unix://{socket_path}") as listener:
        assert listener.accept() is None
        with connect(f"unix://{socket_path}") as client:
            with accept(listener) as served:
                client.send({"op": "x"})
                assert served.recv(5)[0] == {"op": "x"}
                # Requests are short, replies may be long.
                with pytest.raises(UsageError, match="over the limit"):
                    client.send({"t": "x" * MAX_REQUEST_BYTES})
                served.queue({"t": "x" * MAX_REQUEST_BYTES})
                served.flush()
                assert len(client.recv(5)[0]["t"]) == MAX_REQUEST_BYTES
            assert not client.alive


def test_path_has_the_mode_asked_for_and_goes_with_the_listener(socket_path: Path) -> None:
    for mode in (0o666, 0o600):
        with listen(f"unix://{socket_path}", mode) as listener:
            assert stat.S_IMODE(socket_path.stat().st_mode) == mode
            listener.close()
        assert not socket_path.exists()


def test_path_is_open_to_nobody_else_before_its_mode_is_set(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    chmod = os.chmod

    def look_and_chmod(path: str, mode: int) -> None:
        seen.append(stat.S_IMODE(os.stat(path).st_mode))
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", look_and_chmod)
    listen(f"unix://{socket_path}", 0o660).close()
    assert seen == [0o600]


def test_stale_path_is_replaced_a_live_one_is_not(socket_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(socket_path))
    stale.close()
    with listen(f"unix://{socket_path}") as first:
        with pytest.raises(UsageError, match="another process does"):
            listen(f"unix://{socket_path}")
        with connect(f"unix://{socket_path}"):
            # The probe before it, and this one.
            accept(first).close()
            accept(first).close()
        # Whoever took the path over keeps it.
        socket_path.unlink()
        second = listen(f"unix://{socket_path}")
        first.close()
        assert socket_path.exists()
        second.close()


def test_file_that_is_no_socket_is_left_alone(socket_path: Path) -> None:
    socket_path.write_text("precious")
    with pytest.raises(UsageError, match="is no socket"):
        listen(f"unix://{socket_path}")
    assert socket_path.read_text() == "precious"
    with pytest.raises(PeerError, match="is the backend running"):
        connect(f"unix://{socket_path}")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("tcp://host:1", "write unix:///absolute/path"),
        ("/run/x", "write unix:///"),
        ("unix://run/x", "no absolute path"),
        ("unix://", "no absolute path"),
        ("unix:///a\0b", "no absolute path"),
        ("unix:///" + "x" * 107, "over 107 bytes"),
    ],
)
def test_uri_that_cannot_be_used_is_told_why(uri: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_uri(uri)
    assert parse_uri("unix:///a b/%20?#") == "/a b/%20?#"


def test_out_of_descriptors_a_peer_is_turned_away_and_the_next_one_served(
    socket_path: Path,
) -> None:
    with listen(f"unix://{socket_path}") as listener:
        uri = f"unix://{socket_path}"
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with connect(uri) as first, connect(uri) as second:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_fd(), hard))
            try:
                assert listener.accept() is None
                assert not first.alive
                assert second.alive
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with accept(listener) as served:
                second.send({"op": "x"})
                assert served.recv(5)[0] == {"op": "x"}


def lowest_free_fd() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd
