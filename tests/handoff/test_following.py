# SPDX-License-Identifier: Apache-2.0
"""Open mappings follow their guests to another backend by themselves."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from domains import SUPPORT, StartGuest, in_thread, is_stopped, stop, until
from two_hosts import PAGE, SIZE, Host

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]
MOVING = SUPPORT / "moving_guest.py"


def _fill(guest: Any, page: int, nr: int, byte: int, model: bytearray) -> None:
    guest.call("fill", offset=page * PAGE, length=nr * PAGE, byte=byte)
    model[page * PAGE : (page + nr) * PAGE] = bytes([byte]) * nr * PAGE


def _check(guest: Any, model: bytearray) -> None:
    assert guest.call("hash", offset=0, length=SIZE) == hashlib.sha256(model).hexdigest()


def _is_at(host: Host, name: str = "g") -> bool:
    return any(
        guest["name"] == name and guest["transport"] == "unix" and guest["pid"]
        for guest in host.the_daemon.status()["guests"]
    )


def test_an_open_mapping_goes_to_the_target_and_back_at_the_same_addresses(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g", quota_bytes=1 << 20)
    address = guest.call("hold_view")
    for page, nr, byte in ((0, 3, 1), (100, 40, 2), (SIZE // PAGE - 1, 1, 3)):
        _fill(guest, page, nr, byte, model)
    for turn, (source, target) in enumerate(((a, b), (b, a), (a, b))):
        source.drain("--to", target.unix)
        until(lambda t=target: _is_at(t))  # type: ignore[misc]
        until(lambda s=source: s.guests() == set())  # type: ignore[misc]
        _check(guest, model)
        _fill(guest, 50 + turn, 60, 10 + turn, model)
        guest.call("discard", offset=101 * PAGE, length=PAGE)
        with source.image.open("rb") as file:
            file.seek(101 * PAGE)
            model[101 * PAGE : 102 * PAGE] = file.read(PAGE)
        _check(guest, model)
        assert guest.call("view_hash") == hashlib.sha256(model).hexdigest()
        assert guest.call("hold_view") == address
        assert guest.call("where") == [target.unix, True, ""]
        until(lambda t=target: t.the_daemon.mismatches() == [])  # type: ignore[misc]
    guest.call("release_view")
    guest.call("close")
    until(lambda: b.guests() == set())


def test_writes_that_were_withheld_are_done_at_the_target_whoever_holds_the_lock(
    hosts: Pair, start_guest: StartGuest
) -> None:
    """By a view, which waits with the interpreter's lock, and by threads."""
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"))
    b.start()
    model = bytearray(a.image.read_bytes())
    names = ("poking", "writing")
    guests = {}
    for name in names:
        guest = guests[name] = start_guest(a.unix, script=MOVING)
        guest.call("open", image="d", guest=name)
        guest.call("hold_view")
        _fill(guest, 7, 20, 4, model)
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    guests["poking"].start("poke", pages=[8, 200], byte=77)
    guests["writing"].call("write_on", pages=[8, 200, 300], nr=3, byte=0)
    assert not guests["poking"].answered(0.2)
    assert guests["writing"].call("nr_written") == 0
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    guests["poking"].finish()
    assert guests["writing"].call("join") == []
    drain.join()
    poked, written = bytearray(model), bytearray(model)
    for page in (8, 200):
        poked[page * PAGE] = 77
    for page in (8, 200, 300):
        written[page * PAGE : (page + 1) * PAGE] = bytes([3]) * PAGE
    _check(guests["poking"], poked)
    _check(guests["writing"], written)
    assert b.guests() == set(names)
    until(lambda: b.the_daemon.mismatches() == [])
    until(lambda: a.guests() == set())


def test_a_discard_that_waits_over_the_move_is_done_at_the_target(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"))
    b.start()
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g")
    image = bytes(model[5 * PAGE : 6 * PAGE])
    _fill(guest, 4, 3, 9, model)
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    guest.start("discard", offset=5 * PAGE, length=PAGE)
    assert not guest.answered(0.2)
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    guest.finish()
    drain.join()
    model[5 * PAGE : 6 * PAGE] = image
    _check(guest, model)
    until(lambda: b.guests() == {"g"} and b.the_daemon.mismatches() == [])
    assert b.the_daemon.guest_status("g")["private_bytes"] == 2 * PAGE


def test_beyond_a_network_it_goes_on_by_bytes_once_nobody_looks_at_its_memory(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"))
    b.start()
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g", token="secret")
    guest.call("hold_view")
    _fill(guest, 7, 5, 4, model)
    drain = in_thread(lambda: a.run("drain", "--to", b.tcp))
    until(lambda: is_stopped(a.the_daemon.pid))
    guest.call("write_on", pages=[8, 200], nr=2, byte=0)
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    drain.join()
    # What it looks at stays as it is, and cannot be changed any more.
    until(lambda: "release every view" in guest.call("where")[2])
    assert guest.call("view_hash") == hashlib.sha256(model).hexdigest()
    assert guest.call("nr_written") == 0
    guest.call("release_view")
    assert guest.call("join") == []
    for page in (8, 200):
        model[page * PAGE : (page + 1) * PAGE] = bytes([2]) * PAGE
    _check(guest, model)
    _fill(guest, 20, 3, 8, model)
    guest.call("discard", offset=8 * PAGE, length=PAGE)
    with a.image.open("rb") as file:
        file.seek(8 * PAGE)
        model[8 * PAGE : 9 * PAGE] = file.read(PAGE)
    _check(guest, model)
    assert guest.call("where") == [b.tcp, False, ""]
    with pytest.raises(AssertionError, match="has no view any more"):
        guest.call("hold_view")
    assert b.the_daemon.guest_status("g")["transport"] == "tcp"
    until(lambda: a.guests() == set())
    guest.call("close")


def test_a_target_beyond_a_network_that_is_away_for_a_moment_is_waited_for(
    hosts: Pair, start_guest: StartGuest, tmp_path: Path
) -> None:
    """It dies before the guest has come, and has its pages in files."""
    a, b = hosts
    a.start()
    b.start(f"--overlay-dir={tmp_path}")
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g", token="secret")
    _fill(guest, 7, 5, 4, model)
    a.drain("--to", b.tcp)
    until(lambda: not guest.call("where")[1])
    b.kill()
    guest.start("hash", offset=0, length=SIZE)
    assert not guest.answered(0.3)
    b.start()
    assert guest.finish() == hashlib.sha256(model).hexdigest()


def test_it_is_no_new_guest_without_a_page_where_its_pages_are_lost(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g")
    _fill(guest, 7, 5, 4, model)
    stop(guest.pid)
    a.drain("--to", b.unix)
    b.kill()
    b.start()
    os.kill(guest.pid, signal.SIGCONT)
    until(lambda: "in use or lost" in guest.call("where")[2])
    _check(guest, model)  # as it was
    assert b.guests() == set()
    guest.start("fill", offset=0, length=PAGE, byte=9)
    assert not guest.answered(0.2)
    guest.kill()


def test_status_tells_who_has_not_followed(pair: Pair, start_guest: StartGuest) -> None:
    a, b = pair
    for name, follows in (("goes", True), ("stays", False)):
        guest = start_guest(a.unix, script=MOVING)
        guest.call("open", image="d", guest=name, token="secret", follow_moves=follows)
    assert a.the_daemon.status()["drain"] is None
    a.drain("--to", b.unix)
    until(lambda: a.the_daemon.status()["drain"]["guests_here"] == 1)
    done = a.run("status")
    words = " ".join(done.stdout.split())
    assert f"moved to {b.unix}: 2 guests, 1 of them still here" in words
    top = " ".join(a.run("top", "--once").stdout.split())
    assert f"moved to {b.unix}" in top


def test_it_does_not_follow_if_told_not_to(pair: Pair, start_guest: StartGuest) -> None:
    a, b = pair
    guest = start_guest(a.unix, script=MOVING)
    guest.call("open", image="d", guest="g", token="secret", follow_moves=False)
    a.drain("--to", b.unix)
    guest.start("fill", offset=0, length=PAGE, byte=9)
    until(lambda: a.the_daemon.guest_status("g")["state"] == "frozen")
    assert not guest.answered(0.2)
    guest.kill()
