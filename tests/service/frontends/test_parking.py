# SPDX-License-Identifier: Apache-2.0
"""A guest loses its connection, and its own userfaultfd with it: it never reads zeros."""

import os
import signal
from pathlib import Path

import pytest
from domains import Daemon, Guest, MakeImage, StartDaemon, StartGuest, until

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(4 * MIB)


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon("--image", f"d={image}", kept=True)


@pytest.fixture
def guest(kept: Daemon, start_guest: StartGuest) -> Guest:
    """One that has read all, written a page, and then closed every descriptor."""
    guest = start_guest(kept.uri, script="hostile_guest.py")
    # No thread of the library's listens: one would hold the connection open.
    terms = {"token": "secret", "quota_bytes": MIB, "follow_moves": False}
    guest.call("open", image="d", guest="g", **terms)
    guest.call("hash", offset=0, length=4 * MIB)
    guest.call("fill", offset=5 * PAGE, length=PAGE, byte=7)
    guest.call("close_quietly")
    until(lambda: kept.guest_status("g")["state"] == "parked")
    return guest


def check(kept: Daemon, guest: Guest, image: Path) -> None:
    """All of it, from frames that were evicted: its own page, and the image's."""
    kept.request("evict", image="d")
    content = image.read_bytes()
    for page in (0, 6, 1023):
        assert (
            guest.call("read", offset=page * PAGE, length=PAGE)
            == content[page * PAGE : (page + 1) * PAGE].hex()
        )
    assert guest.call("read", offset=5 * PAGE, length=PAGE) == "07" * PAGE


def test_a_guest_without_a_connection_reads_no_zeros(
    kept: Daemon, guest: Guest, image: Path
) -> None:
    check(kept, guest, image)
    status = kept.guest_status("g")
    assert (status["state"], status["parked_mappings"]) == ("parked", 1)
    assert (status["private_bytes"], status["quota_bytes"]) == (PAGE, MIB)
    until(lambda: "event=parked" in kept.log())
    assert kept.mismatches() == []


def test_its_quota_holds(kept: Daemon, guest: Guest) -> None:
    guest.start("fill", offset=MIB, length=MIB, byte=1)
    until(lambda: kept.guest_status("g")["state"] == "stopped-quota")
    kept.request("quota", guest="g", quota_bytes=2 * MIB)
    guest.finish()
    assert kept.guest_status("g")["private_bytes"] == MIB + PAGE


def test_it_is_served_over_a_crash(kept: Daemon, guest: Guest, image: Path) -> None:
    for _ in range(2):
        pid = int((kept.run_dir / "lock").read_text())
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: kept.status()["pid"] != pid)
        until(lambda: kept.guest_status("g")["state"] == "parked")
        check(kept, guest, image)
    assert kept.mismatches() == []


def test_its_name_is_its_own_but_for_who_knows_its_token(
    kept: Daemon, guest: Guest, start_guest: StartGuest
) -> None:
    other = start_guest(kept.uri)
    with pytest.raises(AssertionError, match="still has the image mapped; choose another, or end"):
        other.call("open", image="d", guest="g")
    other.call("open", image="d", guest="g", token="secret")
    status = kept.guest_status("g")
    assert (status["state"], status["mappings"], status["parked_mappings"]) == ("running", 2, 1)
    other.call("close")
    assert kept.guest_status("g")["state"] == "parked"


def test_it_is_let_go_when_it_ends(kept: Daemon, guest: Guest) -> None:
    guest.kill()
    until(lambda: kept.status()["guests"] == [])
    assert kept.mismatches() == []


def test_it_is_let_go_when_it_becomes_another_program(kept: Daemon, guest: Guest) -> None:
    guest.start("become_another")
    until(lambda: kept.status()["guests"] == [])
    assert guest.process.poll() is None
    assert kept.mismatches() == []


@pytest.mark.parametrize("how", ["unmap", "put something else there"])
def test_it_is_let_go_when_nothing_is_mapped(kept: Daemon, guest: Guest, how: str) -> None:
    guest.call("unmap", offset=0, length=MIB)
    guest.call("map_over", offset=MIB, length=3 * MIB - PAGE)
    assert kept.guest_status("g")["state"] == "parked"
    guest.call("unmap" if how == "unmap" else "map_over", offset=4 * MIB - PAGE, length=PAGE)
    until(lambda: kept.status()["guests"] == [])


def test_what_it_does_not_have_is_sigbus_when_the_backend_ends(
    kept: Daemon, guest: Guest, image: Path
) -> None:
    # An extent that its fault thread still maps is kept.
    until(lambda: kept.request("evict", image="d")["kept_bytes"] == 0)
    assert guest.call("touch", pages=[1, 5]) == [image.read_bytes()[PAGE], 7]
    kept.request("shutdown")
    assert kept.process.wait(60) == 0
    assert guest.call("touch", pages=[1, 5]) == [image.read_bytes()[PAGE], 7]
    guest.start("touch", pages=[700])
    assert guest.process.wait(60) == -signal.SIGBUS


def test_who_leaves_without_a_word_may_come_again_at_once(
    kept: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(kept.uri, script="hostile_guest.py")
    for _ in range(20):
        guest.call("open", image="d", guest="g", follow_moves=False)
        guest.call("read", offset=0, length=PAGE)
        guest.call("leave")
    until(lambda: kept.status()["guests"] == [])
