# SPDX-License-Identifier: Apache-2.0
"""A backend is killed under its guests: no wrong byte, no error, no end of waiting for them."""

import os
import random
import signal
from pathlib import Path

import pytest
from domains import Daemon, Guest, MakeImage, StartDaemon, StartGuest, kill_backend, stop, until

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096
NOBODY = 65534


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(16 * MIB)


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon("--image", f"d={image}", "--capacity", "12M", kept=True)


def read(guest: Guest, offset: int, length: int) -> bytes:
    return bytes.fromhex(guest.call("read", offset=offset, length=length))


def test_a_guest_goes_on_reading_and_writing_under_the_successor(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    content = image.read_bytes()
    guest = start_guest(kept.uri, uid=NOBODY)
    guest.call("open", image="d", guest="g", quota_bytes=4 * MIB)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    before = kept.guest_status("g")
    for number in (signal.SIGKILL, signal.SIGHUP, signal.SIGKILL):
        kill_backend(kept, number)
        after = kept.guest_status("g")
        assert {k: after[k] for k in ("state", "pid", "quota_bytes", "private_bytes")} == {
            "state": "running",
            "pid": guest.pid,
            "quota_bytes": 4 * MIB,
            "private_bytes": before["private_bytes"],
        }
        assert after["misses"] >= before["misses"]
        assert after["hits"] >= before["hits"]
        assert read(guest, 10 * PAGE, PAGE) == b"\xab" * PAGE
        offset = random.randrange(16 * MIB // PAGE - 16) * PAGE
        if not offset <= 10 * PAGE < offset + 16 * PAGE:
            assert read(guest, offset, 16 * PAGE) == content[offset : offset + 16 * PAGE]
        before = kept.guest_status("g")
        assert kept.mismatches() == []
    guest.call("write", offset=11 * PAGE, hex="cd" * PAGE)
    assert kept.guest_status("g")["private_bytes"] >= 2 * PAGE
    kept.request("evict", image="d")
    assert read(guest, 10 * PAGE, 2 * PAGE) == b"\xab" * PAGE + b"\xcd" * PAGE
    assert kept.mismatches() == []
    guest.close()
    until(lambda: kept.status()["guests"] == [])
    assert kept.mismatches() == []


def test_a_guest_that_died_with_the_backend_is_let_go(
    kept: Daemon, start_guest: StartGuest
) -> None:
    guest, other = start_guest(kept.uri), start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    other.call("open", image="d", guest="o")
    guest.call("write", offset=0, hex="aa")
    other.call("write", offset=0, hex="bb")
    stop(kept.pid)  # the keeper sees both deaths at once
    pid = int((kept.run_dir / "lock").read_text())
    os.kill(pid, signal.SIGKILL)
    guest.kill()
    os.kill(kept.pid, signal.SIGCONT)
    until(lambda: [each["name"] for each in kept.status()["guests"]] == ["o"])
    assert read(other, 0, 2)[:1] == b"\xbb"
    assert kept.mismatches() == []


def test_a_guest_at_its_quota_is_stopped_under_the_successor_too(
    kept: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g", quota_bytes=2 * PAGE)
    guest.start("write", offset=0, hex="ee" * (3 * PAGE))
    until(lambda: kept.guest_status("g")["state"] == "stopped-quota")
    kill_backend(kept)
    until(lambda: kept.guest_status("g")["state"] == "stopped-quota")
    assert not guest.answered()
    kept.request("quota", guest="g", quota_bytes=3 * PAGE)
    guest.finish()
    assert read(guest, 0, 3 * PAGE) == b"\xee" * (3 * PAGE)
    assert kept.mismatches() == []


def test_two_mappings_of_one_guest_share_their_quota_still(
    kept: Daemon, start_guest: StartGuest
) -> None:
    guests = [start_guest(kept.uri) for _ in range(2)]
    for guest in guests:
        guest.call("open", image="d", guest="g", token="t" * 16, quota_bytes=4 * PAGE)
        guest.call("write", offset=0, hex="11" * PAGE)
    kill_backend(kept)
    (one,) = kept.status()["guests"]
    assert (one["name"], one["mappings"], one["private_bytes"]) == ("g", 2, 2 * PAGE)
    guests[0].start("write", offset=PAGE, hex="22" * (4 * PAGE))
    until(lambda: kept.guest_status("g")["state"] == "stopped-quota")
    assert kept.guest_status("g")["private_bytes"] == 4 * PAGE
    kept.request("quota", guest="g", quota_bytes=8 * PAGE)
    guests[0].finish()
    assert kept.mismatches() == []


def test_a_new_guest_may_not_have_the_name_of_one_that_was_adopted(
    kept: Daemon, start_guest: StartGuest
) -> None:
    guest, other = start_guest(kept.uri), start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    kill_backend(kept)
    with pytest.raises(AssertionError, match="taken"):
        other.call("open", image="d", guest="g")
    guest.close()
    until(lambda: kept.status()["guests"] == [])
    other.call("open", image="d", guest="g")


def test_kills_at_random_under_guests_that_never_rest(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    content = image.read_bytes()
    guests = [start_guest(kept.uri, uid=NOBODY) for _ in range(3)]
    mine: list[dict[int, bytes]] = [{} for _ in guests]
    for no, guest in enumerate(guests):
        guest.call("open", image="d", guest=f"g{no}")
    for round_no in range(12):
        work = []
        for no, guest in enumerate(guests):
            page = random.randrange(16 * MIB // PAGE)
            if random.random() < 0.5:
                data = bytes([random.randrange(1, 256)]) * PAGE
                guest.start("write", offset=page * PAGE, hex=data.hex())
                mine[no][page] = data
                work.append((guest, None))
            else:
                expected = mine[no].get(page, content[page * PAGE : page * PAGE + PAGE])
                guest.start("read", offset=page * PAGE, length=PAGE)
                work.append((guest, expected))
        if round_no % 2:
            kill_backend(kept, random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGHUP]))
        for guest, expected in work:
            answer = guest.finish()
            if expected is not None:
                assert bytes.fromhex(answer) == expected
    for no, guest in enumerate(guests):
        for page, data in mine[no].items():
            assert read(guest, page * PAGE, PAGE) == data
    assert kept.mismatches() == []
    assert sum(each["private_bytes"] for each in kept.status()["guests"]) == PAGE * sum(
        map(len, mine)
    )
