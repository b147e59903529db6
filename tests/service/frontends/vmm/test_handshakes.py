# SPDX-License-Identifier: Apache-2.0
"""A handshake that breaks a rule costs that connection, and nobody else anything."""

import array
import contextlib
import os
import random
import select
import socket
import struct
from typing import Any

import pytest
from domains import ANSWER_SECONDS, Daemon, StartGuest, until
from siege import MIB, guests_are, still_serves
from swarms import Swarm

from cowshed.cache import PeerError
from cowshed.transport import Connection
from cowshed.transport.channels.exchange import ask_for_fds, close_all, greet

pytestmark = pytest.mark.slow

PAGE = 4096


def packet(body: bytes, **changes: int) -> bytes:
    fields = {
        "magic": 0x44485343,
        "version": 1,
        "flags": 0,
        "tag": 1,
        "nr_fds": 0,
        "reserved": 0,
        "total": len(body),
        "piece": len(body),
    }
    assert not set(changes) - set(fields)
    return struct.pack("<IHHIHHII", *{**fields, **changes}.values()) + body


HELLO = b'{"op":"hello","version":1,"features":[]}'
BAD_PACKETS = {
    "garbage": [b"\xff" * 100],
    "one byte": [b"x"],
    "another magic": [packet(HELLO, magic=1)],
    "another version": [packet(HELLO, version=2)],
    "unknown flags": [packet(HELLO, flags=8)],
    "reserved set": [packet(HELLO, reserved=1)],
    "more descriptors told than sent": [packet(HELLO, nr_fds=3)],
    "no length": [packet(b"")],
    "length of 4 GiB": [packet(HELLO, total=0xFFFFFFFF)],
    "piece longer than its packet": [packet(HELLO, piece=1000)],
    "short piece with more to come": [packet(HELLO, total=60_000, flags=1)],
    "no JSON": [packet(b"{")],
    "no object": [packet(b"[1]")],
    "no text": [packet(b"\xc3\x28")],
    "nests deep": [packet(b'{"a":' * 5000 + b"1" + b"}" * 5000)],
    "same key twice": [packet(b'{"op":"hello","op":"open"}')],
    "huge number": [packet(b'{"op":"hello","version":' + b"9" * 5000 + b"}")],
    "no op": [packet(b"{}")],
    "op of another type": [packet(b'{"op":["hello"]}')],
    "open before hello": [packet(b'{"op":"open","image":"d","guest":"x"}')],
    "status before hello": [packet(b'{"op":"status"}')],
    "hello twice": [packet(HELLO), packet(HELLO)],
    "region before open": [packet(HELLO), packet(b'{"op":"region","address":4096,"length":4096}')],
    "version 0": [packet(b'{"op":"hello","version":0}')],
}


@pytest.mark.timeout(300)
def test_a_bad_handshake_costs_the_connection(
    daemon: Daemon, victim: Swarm, start_guest: StartGuest
) -> None:
    for name, packets in BAD_PACKETS.items():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(60)
            sock.connect(daemon.uri.removeprefix("unix://"))
            with contextlib.suppress(BrokenPipeError):
                for one in packets:
                    sock.send(one)
            replies = []
            with contextlib.suppress(ConnectionResetError):
                while reply := sock.recv(1 << 16):
                    replies.append(reply)
            assert replies, f"{name}: no goodbye"
            assert b'"kind": "peer"' in replies[-1] or b'"kind":"peer"' in replies[-1], name
    daemon.wait_logged("event=dropped pid=")
    assert still_serves(daemon, start_guest)


def test_garbage_of_every_kind_costs_the_connection(
    daemon: Daemon, victim: Swarm, rng: random.Random
) -> None:
    threads = daemon.nr_threads()
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(300):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(daemon.uri.removeprefix("unix://"))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(rng.randrange(4)):
                    junk = rng.choice((rng.randbytes(rng.randrange(1, 200)), packet(HELLO)))
                    junk = bytearray(junk)
                    junk[rng.randrange(len(junk))] = rng.randrange(256)
                    fds = [null] * rng.choice((0, 0, 1, 8, 9, 100))
                    sock.sendmsg([junk], rights(fds))
    os.close(null)
    until(lambda: guests_are(daemon))
    daemon.until_threads_end(threads)


def rights(fds: list[int]) -> list[tuple[int, int, Any]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def test_silence_ends_with_the_handshakes_deadline(
    daemon: Daemon, victim: Swarm, start_guest: StartGuest
) -> None:
    """Before hello, and between open and region; after hello quiet is allowed."""
    path = daemon.uri.removeprefix("unix://")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
        greet(daemon.uri) as opened,
        greet(daemon.uri) as idle,
    ):
        silent.connect(path)
        _, fds = ask_for_fds(opened, "open", {"image": "d", "guest": "slow"})
        close_all(fds)
        with pytest.raises(PeerError, match=r"closed|answered"):
            opened.recv(ANSWER_SECONDS)
        assert select.select([silent], [], [], ANSWER_SECONDS)[0]
        assert silent.recv(10) == b""
        assert idle.alive
        # The name is free again.
        guest = start_guest(daemon.uri)
        guest.call("open", image="d", guest="slow")
        guest.call("close")


def test_guests_that_stop_reading_replies_are_dropped(daemon: Daemon, victim: Swarm) -> None:
    def ask_for_ever(deaf: Connection) -> None:
        while True:
            deaf.send({"op": "unheard of"}, timeout=1)

    with greet(daemon.uri) as deaf, pytest.raises(PeerError):
        ask_for_ever(deaf)
    assert daemon.resident_set_bytes() < 256 * MIB
