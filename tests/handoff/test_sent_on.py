# SPDX-License-Identifier: Apache-2.0
"""A guest by bytes that is sent on before anybody knows where its pages are."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from domains import in_thread, new_run_dir, until
from two_hosts import PAGE, Host

from cowshed.transport import ByteDisk, connect

Pair = tuple[Host, Host]


class Switch:
    """A TCP address behind which is the backend at port; cut() ends its connections."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.nr_accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._pumping: list[threading.Thread] = []
        self._accepting = in_thread(self._serve)

    @property
    def uri(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self.cut()
        for pumping in self._pumping:
            pumping.join()
        for sock in (self._listener, *self._open):
            sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self.port))
                self.nr_accepted += 1
                self._open += [ours, theirs]
                for source, to in ((ours, theirs), (theirs, ours)):
                    self._pumping.append(in_thread(partial(_pump, source, to)))


def _pump(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            to.sendall(piece)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)


@pytest.fixture
def unsure(pair: Pair) -> Iterator[Host]:
    """A backend that sends everybody on to b, which has none of its guests."""
    with new_run_dir() as run_dir:
        image = run_dir / "image.raw"
        shutil.copy(pair[0].image, image)
        host = Host("unsure", run_dir, image).start()
        host.drain("--to", pair[1].tcp)
        yield host
        host.end()


def test_a_guest_whose_pages_are_not_there_asks_who_sent_it_again(pair: Pair, unsure: Host) -> None:
    a, b = pair
    switch = Switch(a.port)
    try:
        with (
            connect(switch.uri) as backend,
            backend.open("d", guest="g", token="token") as disk,
        ):
            assert isinstance(disk, ByteDisk)
            disk.write(PAGE, b"mine")
            switch.port = unsure.port
            nr_accepted = switch.nr_accepted
            switch.cut()
            reader = in_thread(lambda: disk.read(PAGE, 4))
            until(lambda: switch.nr_accepted >= nr_accepted + 3)  # sent on, and come back
            assert b.guests() == set()  # nothing was made in the place of what it has
            switch.port = a.port
            reader.join()
            assert disk.read(PAGE, 4) == b"mine"
        assert b.guests() == set()
    finally:
        switch.close()
