# SPDX-License-Identifier: Apache-2.0
"""Hostile guests: what one does to its memory costs it its connection at most, and nobody else."""

import contextlib
import os
import random
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import NOBODY, Daemon, Guest, MakeImage, StartDaemon, StartGuest, stop, until
from siege import MIB, SIZE, guests_are, still_serves
from swarms import Swarm

pytestmark = pytest.mark.slow

PAGE = 4096


def test_a_guest_that_makes_its_userfaultfd_blocking_holds_up_nobody(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    for no in range(3):
        bad = start_guest(daemon.uri, script="hostile_guest.py")
        bad.call("open", image="d", guest=f"bad{no}")
        bad.call("block", times=200)
        assert still_serves(daemon, start_guest)
        bad.kill()
    until(lambda: guests_are(daemon))


def test_a_guest_that_reads_its_own_events_harms_itself(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    hostile.call("open", image="d", guest="bad")
    assert hostile.call("steal", nr_events=3) >= 0
    assert still_serves(daemon, start_guest)
    daemon.request("evict", image="d")
    hostile.kill()
    until(lambda: guests_are(daemon))


def test_a_guest_that_unregisters_its_range_harms_itself(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    hostile.call("open", image="d", guest="bad")
    hostile.call("hash", offset=0, length=SIZE)
    hostile.call("unregister")
    daemon.request("evict", image="d")
    hostile.call("hash", offset=0, length=SIZE)
    assert still_serves(daemon, start_guest)
    hostile.kill()
    until(lambda: guests_are(daemon))


@pytest.mark.parametrize(
    ("order", "fields"),
    [
        ("unmap", {"offset": 0, "length": SIZE}),
        ("unmap", {"offset": PAGE, "length": 3 * PAGE}),
        ("move", {"offset": 0, "length": SIZE}),
        ("move", {"offset": 4 * PAGE, "length": 9 * PAGE}),
    ],
)
def test_a_guest_that_changes_its_mapping_harms_itself(
    daemon: Daemon,
    hostile: Guest,
    start_guest: StartGuest,
    order: str,
    fields: dict[str, int],
) -> None:
    hostile.call("open", image="d", guest="bad")
    hostile.call("fill", offset=0, length=MIB, byte=1)
    hostile.call(order, **fields)
    daemon.status()
    daemon.request("evict", image="d")
    assert still_serves(daemon, start_guest)
    hostile.kill()
    until(lambda: guests_are(daemon))


def test_a_guest_that_closes_everything_in_the_middle_of_faults_is_served_till_it_ends(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    hostile.call("open", image="d", guest="bad", follow_moves=False)
    hostile.call("close_all")
    until(lambda: daemon.guest_status("bad")["state"] == "parked")
    assert still_serves(daemon, start_guest)
    assert daemon.guest_status("bad")["parked_mappings"] == 1
    hostile.kill()
    until(lambda: guests_are(daemon))


def test_floods_of_discards_hold_up_nobody(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    hostile.call("open", image="d", guest="bad")
    hostile.start("flood_discards", times=300)
    assert still_serves(daemon, start_guest)
    daemon.status()
    hostile.finish()
    hostile.kill()
    until(lambda: guests_are(daemon))


def test_uncharged_writes_are_reported_and_harm_nobody(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(SIZE)}")
    bad = start_guest(daemon.uri, script="hostile_guest.py")
    bad.call("open", image="d", guest="bad", quota_bytes=PAGE)
    bad.call("hash", offset=0, length=MIB)
    bad.call("write_uncharged", length=16 * PAGE)
    mismatches = daemon.mismatches()
    assert len(mismatches) == 16
    assert {(one["guest"], one["check"]) for one in mismatches} == {("bad", "private")}
    assert still_serves(daemon, start_guest)
    bad.kill()
    until(lambda: daemon.status()["guests"] == [])
    assert daemon.mismatches() == []


def test_an_audit_of_very_many_mismatches_is_bounded(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(MIB, "sparse.raw")
    with image.open("r+b") as file:
        file.truncate(256 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "512M")
    bad = start_guest(daemon.uri, script="hostile_guest.py")
    bad.call("open", image="d", guest="bad")
    bad.call("hash", offset=0, length=256 * MIB)
    bad.call("write_uncharged", length=256 * MIB)
    assert len(daemon.mismatches()) == 1000
    assert daemon.stop() == 0


def test_frames_can_be_read_and_nothing_else(hostile: Guest) -> None:
    denied = "PermissionError"
    errors = hostile.call("tamper")
    assert errors[0] == errors[4] == errors[5] == errors[6] == denied
    assert "none" not in errors


@pytest.mark.parametrize("nr_busy", [0, 3])
def test_holes_read_without_a_guard_are_emptied_again(
    daemon: Daemon, start_guest: StartGuest, rng: random.Random, nr_busy: int
) -> None:
    """They are frames beyond the capacity; also while others keep the evictor busy."""
    half = SIZE // 2
    image = str(daemon.run_dir / "image.raw")
    frames = os.open(daemon.frames_path(), os.O_RDONLY)

    def is_filled() -> bool:
        with contextlib.suppress(OSError):
            return os.lseek(frames, half, os.SEEK_DATA) >= half
        return False

    with Swarm(daemon.uri, "churn", nr_busy, rng, path=image, span_bytes=half) as swarm:
        until(lambda: len(daemon.status()["guests"]) == nr_busy)
        bad = start_guest(daemon.uri, script="hostile_guest.py")
        bad.call("read_holes", length=SIZE)
        until(lambda: not is_filled())
        swarm.end()
        assert [result["wrong"] for result in swarm.results()] == [0] * nr_busy
    os.close(frames)
    daemon.wait_logged("event=strays-emptied image=d ")
    assert daemon.mismatches() == []
    assert still_serves(daemon, start_guest)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it floods as nobody")
@pytest.mark.timeout(300)
def test_a_flood_of_connections_locks_nobody_out(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    few_files = ["prlimit", "--nofile=2000:2000"]
    daemon = start_daemon("--image", f"d={make_image(SIZE)}", before=few_files)
    before = daemon.resident_set_bytes()
    floods = [start_guest(daemon.uri, NOBODY - no, script="hostile_guest.py") for no in range(3)]
    let_in = [flood.call("flood_connections", nr_connections=900) for flood in floods]
    assert 50 < let_in[0] < 900
    assert daemon.resident_set_bytes() < before + 16 * MIB
    # Operators and root's guests come in all the same; a second user did too.
    assert let_in[1] > 0
    assert daemon.status()["guests"] == []
    assert still_serves(daemon, start_guest)
    assert 0 < daemon.log().count("event=turned-away") < 200
    for flood in floods:
        flood.kill()
    stranger = start_guest(daemon.uri, NOBODY)
    until(lambda: comes_in(stranger))
    assert daemon.stop() == 0


def test_a_daemon_out_of_descriptors_turns_guests_away_and_lives(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    """Messages that never end hold descriptors in the daemon, and others have taken the rest.

    The daemon lets in no more than it has descriptors for, so its limit is lowered behind its back.
    """
    daemon = start_daemon("--image", f"d={make_image(SIZE)}")
    guest = start_guest(daemon.uri)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(unfinished_message(daemon, 8))
        max_fds = daemon.nr_fds_now() + 12
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (max_fds, max_fds))
        for nr_fds in [*range(9), *range(9)]:
            with unfinished_message(daemon, nr_fds), contextlib.suppress(AssertionError):
                guest.call("open", image="d", guest="g")
                guest.call("close")
    until(lambda: daemon.nr_fds_now() < 60)
    assert still_serves(daemon, start_guest)
    assert daemon.stop() == 0


@contextlib.contextmanager
def unfinished_message(daemon: Daemon, nr_fds: int) -> Iterator[None]:
    """A connection whose message has begun; it and its descriptors are in the daemon."""
    before = daemon.nr_fds_now()
    header = struct.pack("<IHHIHHII", 0x44485343, 1, 1, 1, nr_fds, 0, 65_513, 65_512)
    with (
        open("/dev/null") as null,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        sock.connect(daemon.uri.removeprefix("unix://"))
        socket.send_fds(sock, [header + b" " * 65_512], [null.fileno()] * nr_fds)
        until(lambda: daemon.nr_fds_now() >= before + 2 + nr_fds)
        yield
    until(lambda: daemon.nr_fds_now() <= before)


def comes_in(guest: Guest) -> bool:
    try:
        guest.call("open", image="d", guest="stranger")
    except AssertionError:
        return False
    return True


def test_a_stopped_guest_holds_up_nobody(
    daemon: Daemon, hostile: Guest, start_guest: StartGuest
) -> None:
    hostile.call("open", image="d", guest="bad")
    hostile.call("touch_all")
    stop(hostile.pid)
    assert still_serves(daemon, start_guest)
    assert daemon.status()["pid"] == daemon.pid
    hostile.kill()
    until(lambda: guests_are(daemon))
