# SPDX-License-Identifier: Apache-2.0
"""A backend is killed, or restarted, and counts on: no series of a counter ever falls."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, kill_backend, until
from nbd_site import Site
from scraping import ANY_PORT, Samples, families, samples_of, value

from cowshed.cache import InvariantError
from cowshed.service.persist.fd_store import FdStore, kind_of
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.persist.kept_counts import KeptCounts, keep_counts

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096
# The client library's own are of the process, as everywhere.
OF_THE_PROCESS = ("process_", "python_")


def counted(daemon: Daemon) -> Samples:
    """Every series that only grows: of counters, and of histograms."""
    found = {
        name: family
        for name, family in families(daemon).items()
        if family.type in ("counter", "histogram") and not name.startswith(OF_THE_PROCESS)
    }
    return {
        key: sample for key, sample in samples_of(found).items() if not key[0].endswith("_created")
    }


def fallen(before: Samples, after: Samples) -> dict[str, tuple[float, float | None]]:
    return {
        f"{name}{dict(labels)}": (was, after.get((name, labels)))
        for (name, labels), was in before.items()
        if after.get((name, labels), -1.0) < was
    }


@pytest.fixture
def kept(start_daemon: StartDaemon, make_image: MakeImage, run_dir: Path) -> Daemon:
    config = run_dir / "cowshed.toml"
    config.write_text("guest_metrics = 10\n")
    return start_daemon(
        f"--config={config}",
        f"--image=d={make_image(4 * MIB)}",
        "--capacity=2M",
        "--nbd=127.0.0.1:0",
        *ANY_PORT,
        kept=True,
    )


def rude_connection(kept: Daemon) -> None:
    """Be dropped for breaking the protocol."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(kept.run_dir / "cowshed.sock"))
        sock.send(b"no message at all")
        assert sock.recv(4096) is not None
        sock.settimeout(60)
        while sock.recv(4096):
            pass


def test_no_counter_falls_over_a_restart_of_the_backend(
    kept: Daemon, start_guest: StartGuest, run_dir: Path
) -> None:
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    site = Site(kept, run_dir / "image")
    site.nbdsh("h.pwrite(b'x' * 8192, 0)", "d@keeps")
    site.nbdsh("h.pwrite(b'x' * 8192, 0)", "d@gone")
    until(lambda: kept.guest_status("gone")["state"] == "away")
    site.cowshed("discard", "d@gone")
    before = counted(kept)
    for turn, number in enumerate((signal.SIGKILL, signal.SIGHUP, signal.SIGKILL)):
        guest.call("hash", offset=0, length=4 * MIB)
        guest.call("poke", pages=[turn * 8], byte=turn)
        leaver = start_guest(kept.uri)
        leaver.call("open", image="d")
        leaver.call("hash", offset=0, length=MIB)
        leaver.call("close")
        site.nbdsh("h.pread(65536, 0); h.trim(4096, 0); h.flush()", "d@keeps")
        site.nbdsh("h.pread(65536, 1 << 20)")
        rude_connection(kept)
        until(lambda nr=turn: _dropped(kept) > nr)
        until(lambda: len(kept.status()["guests"]) == 2)  # who left takes its series along
        last = counted(kept)
        assert fallen(before, last) == {}
        kill_backend(kept, number)
        now = counted(kept)
        assert fallen(last, now) == {}
        before = now
    # The test is of something: what was kept is more than one backend's part of it.
    for name, labels, least in (
        ("nbd_connections_total", {"image": "d"}, 8),
        ("nbd_requests_total", {"image": "d", "command": "write"}, 2),
        ("nbd_requests_total", {"image": "d", "command": "trim"}, 3),
        ("nbd_bytes_total", {"image": "d", "direction": "write"}, 16384),
        ("connections_dropped_total", {"reason": "protocol"}, 3),
        ("guest_attaches_total", {"image": "d"}, 4),
        ("guest_requests_total", {"image": "d", "guest": "g"}, 1),
        ("evictions_total", {"image": "d", "reason": "pressure"}, 64),
        ("fault_duration_seconds_count", {"kind": "miss"}, 3),
    ):
        assert value(before, name, **labels) >= least, name
    assert kept.guest_status("keeps")["hits"] + kept.guest_status("keeps")["misses"] >= 3
    assert kept.mismatches() == []


def _dropped(kept: Daemon) -> float:
    return value(counted(kept), "connections_dropped_total", reason="protocol")


@pytest.fixture
def counts() -> Iterator[KeptCounts]:
    counts = KeptCounts(("one", "two"))
    yield counts
    counts.close()


def test_counts_are_read_by_name_and_go_on_in_another_process(counts: KeptCounts) -> None:
    assert kind_of(counts.fd) == "counters"
    counts.add("two", 1 << 40)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with_left = KeptCounts(("one", "two"), os.dup(counts.fd))
            with_left.add("two")
            with_left.add("one")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert counts.read() == {"one": 1, "two": (1 << 40) + 1}
    with pytest.raises(KeyError):
        counts.add("three")


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three"), ("one", "other")])
def test_counts_of_other_things_begin_again_and_say_so(
    counts: KeptCounts, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    counts.add("one", 7)
    with pytest.raises(InvariantError, match="inherited table"):
        KeptCounts(names, counts.fd)
    left = os.dup(counts.fd)
    fd_store = FdStore(None, {"tallies": [left]})
    began = keep_counts("tallies", names, fd_store, InheritedFds({"tallies": [left]}))
    assert began.read() == dict.fromkeys(names, 0)
    assert fd_store.groups == {"tallies": [began.fd]}
    assert [record.event for record in caplog.records] == ["counters-begin-again"]
    assert counts.read()["one"] == 7
    began.close()


def test_counts_that_were_left_are_gone_on_with(counts: KeptCounts) -> None:
    counts.add("one", 7)
    left = os.dup(counts.fd)
    fd_store = FdStore(None, {"tallies": [left]})
    again = keep_counts("tallies", ("one", "two"), fd_store, InheritedFds({"tallies": [left]}))
    again.add("two")
    assert again.read() == counts.read() == {"one": 7, "two": 1}
    again.close()
