# SPDX-License-Identifier: Apache-2.0
"""Block servers of other projects, and connections to them in the transmission phase."""

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from cowshed.transport.guest.byte_disk import Dialled

_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_GO, _STRUCTURED = 7, 8
_ACK, _INFO = 1, 3


def nbd_dial(path: Path, timeout: float, *, structured: bool = True) -> Dialled:
    """Enter the default export of a fixed-newstyle server."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        assert _take(sock, 18)[:16] == b"NBDMAGICIHAVEOPT"
        sock.sendall(struct.pack(">I", 3))
        if structured:
            sock.sendall(_OPTION.pack(b"IHAVEOPT", _STRUCTURED, 0))
            assert _reply(sock)[0] == _ACK
        sock.sendall(_OPTION.pack(b"IHAVEOPT", _GO, 6) + struct.pack(">IH", 0, 0))
        size_bytes = 0
        while True:
            kind, body = _reply(sock)
            if kind == _ACK:
                break
            assert kind == _INFO, (kind, body)
            if body[:2] == b"\0\0":
                (size_bytes,) = struct.unpack_from(">Q", body, 2)
    except BaseException:
        sock.close()
        raise
    return Dialled(sock, size_bytes)


def _reply(sock: socket.socket) -> tuple[int, bytes]:
    magic, _, kind, length = _REPLY.unpack(_take(sock, _REPLY.size))
    assert magic == 0x3E889045565A9
    return kind, _take(sock, length)


def _take(sock: socket.socket, nr_bytes: int) -> bytes:
    taken = b""
    while len(taken) < nr_bytes:
        piece = sock.recv(nr_bytes - len(taken))
        if not piece:
            raise ConnectionResetError("the server closed")
        taken += piece
    return taken


@contextlib.contextmanager
def nbdkit(path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run nbdkit in the foreground, listening at a path; killed at the end."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), *arguments])
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    probe.connect(str(path))
                    break
                time.sleep(0.01)
        assert process.poll() is None, "nbdkit did not start"
        yield process
    finally:
        process.kill()
        process.wait()
