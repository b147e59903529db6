# SPDX-License-Identifier: Apache-2.0
"""A region that makes no sense costs its guest the connection, and nobody else anything."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from domains import Daemon, StartGuest, until
from siege import SIZE, guests_are, still_serves
from swarms import Swarm

from cowshed.cache import PeerError
from cowshed.cache._core import ffi, lib
from cowshed.transport import Connection
from cowshed.transport.channels.exchange import ask, ask_for_fds, close_all, greet

pytestmark = pytest.mark.slow

PAGE = 4096


class Handshake:
    """A handshake up to its last word, with what that would honestly be."""

    def __init__(self, daemon: Daemon) -> None:
        self.connection: Connection = greet(daemon.uri)
        reply, fds = ask_for_fds(self.connection, "open", {"image": "d", "guest": "bad"})
        self.region, stage = ffi.new("struct region *"), ffi.new("int *")
        features = reply["uffd_features"]
        err = lib.region_init(self.region, fds[0], SIZE, fds[1], features, stage)
        assert err == 0
        self.memfd, self.device = fds
        self.address = int(ffi.cast("uintptr_t", self.region.address))
        self.fds = [self.region.uffd, self.region.pagemap_fd, self.region.mem_fd]

    def finish(self, fds: list[int] | None = None, **changes: Any) -> dict[str, Any]:
        body = {"address": self.address, "length": SIZE, **changes}
        return ask(self.connection, "region", body, self.fds if fds is None else fds, 60)

    def leave(self) -> None:
        """Go without a word, taking the memory along."""
        self.connection.close()
        lib.region_deinit(self.region)

    def close(self) -> None:
        self.leave()
        os.close(self.memfd)
        os.close(self.device)


@pytest.fixture
def handshake(daemon: Daemon) -> Iterator[Handshake]:
    handshake = Handshake(daemon)
    yield handshake
    handshake.close()


def test_the_honest_region_is_taken(daemon: Daemon, handshake: Handshake) -> None:
    assert handshake.finish() == {"ok": True, "guest": "bad"}
    assert daemon.guest_status("bad")["state"] == "running"


@pytest.mark.parametrize(
    "changes",
    [
        {"length": SIZE - PAGE},
        {"length": SIZE + PAGE},
        {"length": 1 << 63},
        {"length": 0},
        {"length": -PAGE},
        {"length": None},
        {"length": float(SIZE)},
        {"address": 0},
        {"address": 1},
        {"address": 5000},
        {"address": (1 << 64) - PAGE},
        {"address": (1 << 63) - PAGE},
        {"address": -PAGE},
        {"address": "4096"},
    ],
    ids=str,
)
def test_an_absurd_region_costs_the_connection(
    daemon: Daemon, handshake: Handshake, changes: dict[str, Any]
) -> None:
    with pytest.raises(PeerError, match=r"a region of|'address'|'length'"):
        handshake.finish(**changes)
    until(lambda: not handshake.connection.alive)
    until(lambda: daemon.status()["guests"] == [])


@pytest.mark.parametrize("shift", [PAGE, -PAGE, 1 << 30, SIZE])
def test_a_region_where_the_mapping_is_not_costs_the_connection_or_serves_what_is_there(
    daemon: Daemon, start_guest: StartGuest, handshake: Handshake, shift: int
) -> None:
    with contextlib.suppress(PeerError):
        handshake.finish(address=handshake.address + shift)
    assert still_serves(daemon, start_guest)
    daemon.mismatches()
    handshake.leave()
    until(lambda: daemon.status()["guests"] == [])
    assert daemon.mismatches() == []


WRONG: dict[str, Callable[[Handshake, list[int]], list[int]]] = {
    "none": lambda *_: [],
    "one": lambda _, own: own[:1],
    "four": lambda _, own: [*own, own[0]],
    "eight": lambda _, own: (own * 3)[:8],
    "in another order": lambda _, own: own[::-1],
    "the memfd as userfaultfd": lambda shake, own: [shake.memfd, *own[1:]],
    "the device as userfaultfd": lambda shake, own: [shake.device, *own[1:]],
    "the connection itself": lambda shake, own: [shake.connection.fileno(), *own[1:]],
    "userfaultfds only": lambda _, own: [own[0]] * 3,
    "a pagemap as mem": lambda _, own: [own[0], own[1], own[1]],
    "the memfd as pagemap": lambda shake, own: [own[0], shake.memfd, own[2]],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_descriptors_cost_the_connection(
    daemon: Daemon, handshake: Handshake, wrong: str
) -> None:
    fds = daemon.nr_fds_now()
    with pytest.raises(PeerError, match=r"descriptor|own /proc"):
        handshake.finish(WRONG[wrong](handshake, handshake.fds))
    until(lambda: daemon.nr_fds_now() < fds)
    until(lambda: daemon.status()["guests"] == [])


def test_page_tables_of_another_process_cost_the_connection(
    daemon: Daemon, handshake: Handshake, start_guest: StartGuest
) -> None:
    foreign = os.open(f"/proc/{start_guest(daemon.uri).pid}/pagemap", os.O_RDONLY)
    with pytest.raises(PeerError, match="guest's own"):
        handshake.finish([handshake.fds[0], foreign, handshake.fds[2]])
    os.close(foreign)


def test_a_userfaultfd_without_the_features_costs_the_connection(
    daemon: Daemon, handshake: Handshake
) -> None:
    bare = fcntl.ioctl(handshake.device, 0xAA00, os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with pytest.raises(PeerError, match=r"UFFDIO_API|features"):
            handshake.finish([bare, *handshake.fds[1:]])
    finally:
        os.close(bare)


def test_a_userfaultfd_of_nothing_serves_nobody(
    daemon: Daemon, victim: Swarm, handshake: Handshake
) -> None:
    """Its range is not under it: no fault is ever answered, and that is that guest's affair."""
    with contextlib.suppress(PeerError):
        handshake.finish(address=1 << 40)
    handshake.leave()
    until(lambda: guests_are(daemon))


def test_one_mapping_handed_over_twice_harms_nobody(
    daemon: Daemon, victim: Swarm, handshake: Handshake, start_guest: StartGuest
) -> None:
    assert handshake.finish()["ok"]
    with greet(daemon.uri) as again:
        _, fds = ask_for_fds(again, "open", {"image": "d", "guest": "again"})
        close_all(fds)
        where = {"address": handshake.address, "length": SIZE}
        with contextlib.suppress(PeerError):
            ask(again, "region", where, handshake.fds)
        assert still_serves(daemon, start_guest)
    handshake.leave()
    until(lambda: guests_are(daemon))
