# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen at and to connect to, for each transport: tests are repeated over them."""

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

from certificates import Authority

_numbers = itertools.count(1)


@cache
def vsock_works() -> bool:
    """Return whether this kernel has vsock loopback (module vsock_loopback)."""
    if not hasattr(socket, "AF_VSOCK"):
        return False
    try:
        with socket.socket(socket.AF_VSOCK) as ours, socket.socket(socket.AF_VSOCK) as theirs:
            ours.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            ours.listen()
            theirs.settimeout(1)
            theirs.connect((1, ours.getsockname()[1]))
    except OSError:
        return False
    return True


# Tests are not repeated over missing transports; test_channel.py has one that skips instead.
STREAMS = ["tcp", "tls"] + (["vsock"] if vsock_works() else [])
SCHEMES = ["unix", *STREAMS]


def take_port() -> socket.socket:
    """Listen at a loopback port that stays free for the test once this socket is closed.

    The kernel assigns automatic ports only from its range; this port is below it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with contextlib.suppress(OSError):  # the port is in use
            port = random.SystemRandom().randrange(lowest // 2, lowest)
            return socket.create_server(("127.0.0.1", port))


class Place:
    """One transport: a new URI to listen at each time, and the client's that goes with it."""

    def __init__(self, scheme: str, folder: Path, authority: Authority | None) -> None:
        self.scheme = scheme
        self.folder = folder
        if authority is not None:
            self._server = authority.issue("server", "DNS:localhost,IP:127.0.0.1")
            self._client = authority.issue("alice", "DNS:alice.example")
            self.authority = authority

    @property
    def listen_uri(self) -> str:
        match self.scheme:
            case "unix":
                return f"unix://{self.folder}/s{next(_numbers)}"
            case "tls":
                return f"tls://127.0.0.1:0?{urlencode(self._server)}"
            case "vsock":
                # Each process that runs tests has its own ports.
                return f"vsock://any:{6_000_000 + 1000 * os.getpid() + next(_numbers)}"
        return "tcp://127.0.0.1:0"

    @contextlib.contextmanager
    def free_uri(self) -> Iterator[str]:
        """Yield a URI to listen at, and to fail to connect to before; reserved inside `with`."""
        uri = self.listen_uri
        with contextlib.ExitStack() as stack:
            if self.scheme in ("tcp", "tls"):
                keeper = stack.enter_context(socket.socket())
                keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                keeper.bind(("127.0.0.1", 0))
                uri = uri.replace(":0", f":{keeper.getsockname()[1]}")
            yield uri

    def connect_uri(self, listening: str) -> str:
        match self.scheme:
            case "tls":
                return f"{listening}?{urlencode(self._client)}"
            case "vsock":
                return listening.replace("any", "1")
        return listening


def make_place(scheme: str, folder: Path) -> Place:
    """Return a place for a scheme, with certificates if it needs them."""
    return Place(scheme, folder, Authority(folder / "ca") if scheme == "tls" else None)
