# SPDX-License-Identifier: Apache-2.0
"""Quotas: the writer that reaches its own stops, dies or is only counted, and counts are exact."""

import random
import signal

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, cowshed, until

KIB = 1 << 10
MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon("--image", f"d={make_image(4 * MIB)}", "--capacity", "2M")


@pytest.mark.parametrize("read_first", [False, True])
def test_a_writer_at_its_quota_stops_until_it_is_raised(
    daemon: Daemon, start_guest: StartGuest, *, read_first: bool
) -> None:
    writer, other = start_guest(daemon.uri), start_guest(daemon.uri)
    writer.call("open", image="d", guest="writer", quota_bytes=64 * KIB)
    other.call("open", image="d", guest="other")
    if read_first:
        writer.call("hash", offset=0, length=MIB)
    writer.start("fill", offset=0, length=200 * KIB, byte=5)
    until(lambda: daemon.guest_status("writer")["state"] == "stopped-quota")
    status = daemon.guest_status("writer")
    assert (status["private_bytes"], status["quota_bytes"]) == (64 * KIB, 64 * KIB)
    assert (status["quota_stops"], status["policy"]) == (1, "stop")
    assert status["stopped_seconds"] > 0
    daemon.wait_logged("event=quota-stop guest=writer image=d ")
    shown = cowshed("status", "--run-dir", daemon.run_dir)
    assert "writer" in shown.stdout
    assert "stopped" in shown.stdout
    # Nobody else notices.
    image = str(daemon.run_dir / "image.raw")
    assert other.call("compare", path=image, offset=0, length=4 * MIB) == 0
    assert other.call("fill", offset=0, length=PAGE, byte=6) == PAGE
    assert not writer.answered()
    # Not enough: it stops again, and it is said again.
    raised = cowshed("quota", "writer", "100K", "--run-dir", daemon.run_dir)
    assert (raised.returncode, raised.stdout) == (0, "writer: quota 100K\n")
    until(lambda: daemon.guest_status("writer")["quota_stops"] >= 2)
    assert daemon.guest_status("writer")["private_bytes"] == 100 * KIB
    assert not writer.answered()
    assert cowshed("quota", "writer", "none", "--run-dir", daemon.run_dir).returncode == 0
    assert writer.finish() == 200 * KIB
    status = daemon.guest_status("writer")
    assert (status["state"], status["private_bytes"]) == ("running", 200 * KIB)
    assert (status["quota_bytes"], status["stopped_seconds"]) == (None, 0)
    assert writer.call("read", offset=200 * KIB - 1, length=1) == "05"
    assert daemon.mismatches() == []


def test_a_writer_that_gives_pages_back_has_room_again(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g", quota_bytes=2 * PAGE)
    assert guest.call("fill", offset=0, length=2 * PAGE, byte=1) == 2 * PAGE
    guest.call("discard", offset=0, length=PAGE)
    assert guest.call("fill", offset=MIB, length=1, byte=1) == 1
    assert daemon.guest_status("g")["private_bytes"] == 2 * PAGE
    assert daemon.guest_status("g")["quota_stops"] == 0


def test_a_quota_below_what_is_used_stops_the_next_write_only(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    guest.call("fill", offset=0, length=10 * PAGE, byte=1)
    daemon.request("quota", guest="g", quota_bytes=2 * PAGE)
    assert guest.call("fill", offset=0, length=10 * PAGE, byte=2) == 10 * PAGE
    guest.start("fill", offset=MIB, length=1, byte=3)
    until(lambda: daemon.guest_status("g")["state"] == "stopped-quota")
    assert daemon.guest_status("g")["private_bytes"] == 10 * PAGE
    daemon.request("quota", guest="g", quota_bytes=11 * PAGE)
    assert guest.finish() == 1


@pytest.mark.parametrize("read_first", [False, True])
def test_under_kill_the_writer_gets_sigbus(
    daemon: Daemon, start_guest: StartGuest, *, read_first: bool
) -> None:
    writer, other = start_guest(daemon.uri), start_guest(daemon.uri)
    other.call("open", image="d")
    writer.call("open", image="d", guest="writer", quota_bytes=4 * PAGE, on_quota="kill")
    if read_first:
        writer.call("hash", offset=0, length=MIB)
    writer.call("poke", pages=[0, 7, 9, 100], byte=1)
    assert daemon.guest_status("writer")["private_bytes"] == 4 * PAGE
    writer.call("poke", pages=[0, 7, 9, 100], byte=2)
    writer.start("poke", pages=[50], byte=1)
    assert writer.process.wait(60) == -signal.SIGBUS
    until(lambda: [guest["image"] for guest in daemon.status()["guests"]] == ["d"])
    image = str(daemon.run_dir / "image.raw")
    assert other.call("compare", path=image, offset=0, length=4 * MIB) == 0
    assert daemon.mismatches() == []


def test_under_allow_the_writer_is_only_counted(daemon: Daemon, start_guest: StartGuest) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g", quota_bytes=4 * PAGE, on_quota="allow")
    assert guest.call("fill", offset=0, length=3 * MIB, byte=1) == 3 * MIB
    status = daemon.guest_status("g")
    assert (status["private_bytes"], status["quota_bytes"]) == (3 * MIB, 4 * PAGE)
    assert (status["state"], status["quota_stops"]) == ("running", 0)
    assert daemon.mismatches() == []


def test_guests_that_name_no_quota_get_the_configured_one(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(MIB)
    config = image.with_name("cowshed.toml")
    config.write_text(f'quota = "12K"\non_quota = "kill"\n[images]\nd = "{image}"\n')
    daemon = start_daemon("--config", str(config))
    default, own = start_guest(daemon.uri), start_guest(daemon.uri)
    default.call("open", image="d", guest="default")
    own.call("open", image="d", guest="own", quota_bytes=8 * KIB, on_quota="stop")
    terms = [(guest["quota_bytes"], guest["policy"]) for guest in daemon.status()["guests"]]
    assert terms == [(12 * KIB, "kill"), (8 * KIB, "stop")]
    default.start("poke", pages=[0, 1, 2, 3], byte=1)
    assert default.process.wait(60) == -signal.SIGBUS


def test_private_bytes_are_exact_after_odd_writes(
    daemon: Daemon, start_guest: StartGuest, rng: random.Random
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    private: set[int] = set()
    for step in range(120):
        offset = rng.randrange(4 * MIB - 80_000)
        length = rng.choice((1, 2, PAGE - 1, PAGE, PAGE + 1, 20_001, 66_000))
        pages = range(offset // PAGE, (offset + length - 1) // PAGE + 1)
        kind = rng.randrange(8)
        if kind < 3:
            guest.call("fill", offset=offset, length=length, byte=step % 256)
            private.update(pages)
        elif kind == 3:
            chosen = [rng.randrange(1024) for _ in range(9)]
            guest.call("poke", pages=chosen, byte=step % 256)
            private.update(chosen)
        elif kind == 4:
            guest.call("discard", offset=pages.start * PAGE, length=len(pages) * PAGE)
            private.difference_update(pages)
        elif kind == 5:
            daemon.request("evict", image="d")
        else:
            guest.call("hash", offset=offset, length=length)
        # A discard returns once it was read of, and is counted a moment later.
        until(lambda: daemon.guest_status("g")["private_bytes"] == len(private) * PAGE)
    status = daemon.status()
    assert status["guests"][0]["private_bytes"] == len(private) * PAGE
    assert status["cow_breaks"] == status["guests"][0]["cow_breaks"] >= len(private)
    assert daemon.mismatches() == []
