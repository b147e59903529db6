# SPDX-License-Identifier: Apache-2.0
"""One more than there is room for is told why, at every server; and nobody else notices."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from certificates import Authority
from domains import ANSWER_SECONDS, Daemon, MakeImage, StartDaemon, StartGuest, cowshed, until
from machine_guests import new_machine

from cowshed.cache import CapacityError, PeerError, UsageError
from cowshed.transport import connect
from cowshed.transport.channels.exchange import ask, ask_for_fds, close_all, greet
from cowshed.transport.links.acceptor import NR_SPARE

pytestmark = pytest.mark.slow

MIB = 1 << 20
NO_ROOM = "no room for another guest: "
NO_MORE_FILES = "the backend has as many descriptors open as it may"


@contextlib.contextmanager
def _no_descriptors(pid: int, nr_left: int = 0) -> Iterator[None]:
    """Inside `with`, a process can open no more descriptors than nr_left."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 20) if number not in taken)
    limit = next(itertools.islice(free, nr_left, None))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


class House:
    """A daemon with every server, and how one comes in at each."""

    def __init__(self, daemon: Daemon, client: dict[str, str]) -> None:
        self.daemon = daemon
        found = re.findall(r'event=(?:listening|metrics) ur[il]="?([^"\s]+)', daemon.log())
        self.tcp = next(uri for uri in found if uri.startswith("tcp:"))
        self.tls = next(uri for uri in found if uri.startswith("tls:")) + f"?{urlencode(client)}"
        self.metrics = next(uri for uri in found if uri.startswith("http:"))

    def refusals(self) -> dict[str, str]:
        """What is said at each server where a guest, or an operator, comes in."""
        said = {}
        for name, uri in (("unix", self.daemon.uri), ("tcp", self.tcp), ("tls", self.tls)):
            with pytest.raises(CapacityError) as caught:
                connect(uri)
            said[name] = str(caught.value)
        run_dir = str(self.daemon.run_dir)
        nbd = f"nbd+unix:///d?socket={run_dir}/nbd.sock"
        done = subprocess.run(
            ["nbdinfo", nbd],
            env={**os.environ, "LIBNBD_DEBUG": "1"},  # where the server's words are
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        said["nbd"] = done.stderr
        for words in (("status",), ("attach", "d", "--", "cat", "{image}")):
            refused = cowshed(words[0], "--run-dir", run_dir, *words[1:])
            assert refused.returncode == 1
            said[words[0]] = refused.stderr
        return said

    def page(self) -> int:
        """The status that the metrics' page has."""
        asked = http.client.HTTPConnection(self.metrics.split("/")[2], timeout=30)
        with contextlib.closing(asked):
            asked.request("GET", "/metrics")
            answer = asked.getresponse()
            text = answer.read().decode()
            assert answer.status == 200 or text.startswith("no room for another request: ")
            return answer.status


@pytest.fixture
def house(start_daemon: StartDaemon, make_image: MakeImage, tmp_path: Path) -> House:
    """Its connections are bounded by 400 open files."""
    authority = Authority(tmp_path / "ca")
    server = urlencode(authority.issue("server", "IP:127.0.0.1"))
    daemon = start_daemon(
        f"--image=d={make_image(MIB)}",
        "--listen=tcp://127.0.0.1:0",
        f"--listen=tls://127.0.0.1:0?{server}",
        "--metrics=127.0.0.1:0",
        "--accept-handoff",
        "--verbose",
        before=("env", "COWSHED_TEST_POINTS=1", "prlimit", "--nofile=400:400"),
    )
    # Nothing that it still does gives a descriptor back, so none is free once none may be taken.
    until(lambda: all(image["digest"] for image in daemon.status()["images"]))
    daemon.nr_fds()
    return House(daemon, authority.issue("alice", "DNS:alice.example"))


def _check_open(house: House) -> None:
    for uri in (house.daemon.uri, house.tcp, house.tls):
        with connect(uri) as backend, backend.open("d", guest="after") as disk:
            assert disk.read(0, 4096)
    assert house.page() == 200
    assert house.daemon.mismatches() == []


def test_where_there_are_as_many_connections_as_fit_every_server_says_so(house: House) -> None:
    with contextlib.ExitStack() as crowd:
        # Who has said hello may be silent for as long as the refusals take.
        with contextlib.suppress(CapacityError):
            while True:
                crowd.enter_context(greet(house.daemon.uri))
        for _ in range(12):  # less than one of those takes, each one descriptor
            sock = crowd.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(house.daemon.run_dir / "nbd.sock"))
        for server, said in house.refusals().items():
            assert NO_ROOM in said, server
            limit = "connections are open, and the backend's limit of open files (400)"
            assert limit in said, server
            assert "is the backend running" not in said, server
    until(lambda: cowshed("status", "--run-dir", house.daemon.run_dir).returncode == 0)
    _check_open(house)


def test_where_there_are_no_descriptors_left_every_server_says_so(
    house: House, start_guest: StartGuest
) -> None:
    daemon = house.daemon
    machine = new_machine(daemon, start_guest, [MIB])
    assert house.page() == 200
    nr_fds = daemon.nr_fds()
    with connect(house.tcp) as before, _no_descriptors(daemon.pid):
        # Nobody is left waiting for room that asks for the first time.
        with pytest.raises(CapacityError, match=NO_MORE_FILES):
            before.open("d", guest="g", timeout=3600)
        for _ in range(3):  # the reserve is full again each time
            for server, said in house.refusals().items():
                assert f"{NO_ROOM}{NO_MORE_FILES}" in said, server
        # These protocols have no words for it.
        machine.call("connect")
        assert machine.call("wait_dropped") == 0
        until(lambda: re.search("event=turned-away image=d .*no room", daemon.log()) is not None)
        until(lambda: house.page() == 503)  # its reserve is full again
    _check_open(house)
    until(lambda: daemon.nr_fds() == nr_fds)


def test_who_could_be_accepted_and_not_watched_is_told_so(house: House) -> None:
    with (
        _no_descriptors(house.daemon.pid, nr_left=1),  # and none for its pidfd
        pytest.raises(CapacityError, match=f"{NO_ROOM}{NO_MORE_FILES}"),
    ):
        connect(house.daemon.uri)
    _check_open(house)


def test_what_the_daemon_has_open_itself_is_set_aside(
    start_daemon: StartDaemon, make_image: MakeImage
) -> None:
    image = make_image(MIB)
    daemon = start_daemon(
        *(f"--image=d{no}={image}" for no in range(95)),
        before=("prlimit", "--nofile=800:800"),
    )
    crowd: list[socket.socket] = []
    while "event=turned-away" not in daemon.log():
        crowd.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        crowd[-1].connect(str(daemon.run_dir / "cowshed.sock"))
    daemon.wait_logged("allows no more")  # before there is none left
    for sock in crowd:
        sock.close()


def test_silent_peers_that_there_is_no_room_for_make_room_for_who_asks(house: House) -> None:
    with _no_descriptors(house.daemon.pid):
        silent = [  # more than are awaited at a time
            socket.create_connection(("127.0.0.1", _port(house.tcp))) for _ in range(8)
        ]
        with pytest.raises(CapacityError, match=NO_MORE_FILES):
            connect(house.tcp)
        # The first of them are told unasked.
        assert NO_MORE_FILES.encode() in silent[0].recv(4096)
        for sock in silent:
            sock.close()
    _check_open(house)


def _port(uri: str) -> int:
    return int(uri.rpartition(":")[2])


def test_silent_nbd_clients_that_there_is_no_room_for_make_room_for_others(house: House) -> None:
    with _no_descriptors(house.daemon.pid), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(NR_SPARE)]
        for sock in silent:
            sock.connect(str(house.daemon.run_dir / "nbd.sock"))
        for sock in silent:
            assert sock.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        # The first of them went before the last was greeted.
        silent[0].setblocking(False)
        while silent[0].recv(4096):
            pass
    _check_open(house)


def test_an_open_that_there_are_no_descriptors_for_is_refused_with_the_reason(
    house: House,
) -> None:
    with (
        greet(house.daemon.uri) as greeted,
        _no_descriptors(house.daemon.pid),
        pytest.raises(CapacityError, match=f"{NO_ROOM}{NO_MORE_FILES}"),
    ):
        ask(greeted, "open", {"image": "d", "guest": "g"})
    _check_open(house)


def test_a_region_whose_descriptors_find_no_room_is_refused_with_the_reason(house: House) -> None:
    opened = greet(house.daemon.uri)
    _, fds = ask_for_fds(opened, "open", {"image": "d", "guest": "g"})
    with (
        _no_descriptors(house.daemon.pid),
        pytest.raises(CapacityError, match=f"{NO_ROOM}{NO_MORE_FILES}"),
    ):
        ask(opened, "region", {"address": 1 << 20, "length": MIB}, [fds[0]] * 3)
    opened.close()
    close_all(fds)
    _check_open(house)


def _come_and_go(house: House, server: str, timeout: float = ANSWER_SECONDS) -> None:
    """Be a guest at a server, from the first connection to the last; CapacityError if it cannot.

    Over a network it asks again for timeout seconds.
    """
    if server == "nbd":
        uri = f"nbd+unix:///d@g?socket={house.daemon.run_dir}/nbd.sock"
        command = ["nbdinfo", "--size", uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise CapacityError(done.stderr)
        return
    uri, how = {
        "unix": (house.daemon.uri, {}),
        "tcp": (house.tcp, {"timeout": timeout}),
        "tls": (house.tls, {"timeout": timeout}),
    }[server]
    with connect(uri) as backend, backend.open("d", guest="g", **how) as disk:
        disk.write(0, b"mine")
        assert disk.read(0, 4) == b"mine"


@pytest.mark.parametrize("server", ["unix", "tcp", "tls", "nbd"])
def test_however_few_descriptors_are_left_nothing_of_a_guest_is(house: House, server: str) -> None:
    def nr_fds() -> int:
        # A guest that is kept until it is discarded, or until it comes again.
        until(lambda: all(each["state"] == "away" for each in house.daemon.status()["guests"]))
        with contextlib.suppress(UsageError):  # it has gone with its pages, or is about to
            house.daemon.request("discard", overlay="d@g")
        until(lambda: house.daemon.status()["guests"] == [])
        until(all_are_closed)
        return house.daemon.nr_fds()

    def all_are_closed() -> bool:
        log = house.daemon.log()
        return log.count("event=overlay-made") == log.count("event=overlay-discarded")

    _come_and_go(house, server)
    before = nr_fds()
    for nr_left in range(14):
        with (
            _no_descriptors(house.daemon.pid, nr_left),
            contextlib.suppress(CapacityError, PeerError),
        ):
            _come_and_go(house, server, timeout=0.5)
        until(lambda: nr_fds() == before)  # a connection's socket is not the last that is closed
    _come_and_go(house, server)
    _check_open(house)


def test_however_few_descriptors_are_left_nothing_of_a_machine_is(
    house: House, start_guest: StartGuest
) -> None:
    nr_fds = house.daemon.nr_fds()
    for nr_left in range(6):
        machine = new_machine(house.daemon, start_guest, [MIB])
        with _no_descriptors(house.daemon.pid, nr_left):
            machine.call("connect")
            if nr_left < 3:  # a socket, a pidfd, a record
                assert machine.call("wait_dropped") == 0
        machine.process.kill()
        until(lambda: house.daemon.nr_fds() == nr_fds)
    _check_open(house)


def test_a_guest_that_there_is_no_thread_for_is_told_so_and_leaves_nothing(house: House) -> None:
    house.daemon.request("point", name="GUEST_THREAD", action="fail", errno=11)
    with connect(house.daemon.uri) as backend:
        with pytest.raises(CapacityError, match=f"{NO_ROOM}the backend may start no more threads"):
            backend.open("d", guest="g")
        with backend.open("d", guest="g") as disk:
            assert disk.read(0, 4096)
    _check_open(house)


def test_more_bytes_than_a_handoff_was_asked_for_with_do_not_end_the_daemon(house: House) -> None:
    with greet(house.tcp) as plain:
        tag = plain.queue({"op": "handoff"})
        plain.queue({"op": "handoff"})
        plain.flush()
        assert plain.recv(30)[2] == tag
    _check_open(house)


STARVED = """
import resource, threading
from cowshed.cache import CapacityError
from cowshed.service.runtime.workers import Workers
from cowshed.transport.links.no_room import start_thread
came = threading.Semaphore(0)
workers = Workers(lambda call: came.release())
threading.stack_size(256 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    start_thread(threading.Thread(target=print))
except CapacityError as error:
    print(error)
done = threading.Event()
for quick in (True, False):
    workers.submit(lambda: iter([{}]), lambda _: None, lambda: None, is_quick=quick)
workers.run(done.set)
print([came.acquire(timeout=30) for _ in range(4)], done.wait(30))
workers.stop()
"""


def test_at_the_limit_of_threads_requests_are_answered_and_what_needs_one_is_told_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(f"{NO_ROOM}the backend may start no more threads"), done.stderr
    assert done.stdout.splitlines()[1] == "[True, True, True, True] True", done.stderr
