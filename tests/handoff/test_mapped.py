# SPDX-License-Identifier: Apache-2.0
"""Guests that map: their pages are taken out of their memory, and wait for them at the target."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from domains import Guest, StartGuest, in_thread, is_stopped, stop, until
from two_hosts import PAGE, SIZE, Host

from cowshed.transport import connect

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]
# Who stays where it is, and leaves its pages to who comes with its token.
KEPT = {"token": "secret", "follow_moves": False}


def _fill(guest: object, page: int, nr: int, byte: int, model: bytearray) -> None:
    guest.call("fill", offset=page * PAGE, length=nr * PAGE, byte=byte)  # type: ignore[attr-defined]
    model[page * PAGE : (page + nr) * PAGE] = bytes([byte]) * nr * PAGE


def test_a_mapped_guests_pages_are_byte_exact_at_the_target_and_frozen_at_the_source(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", **KEPT, quota_bytes=1 << 20)
    for page, nr, byte in ((0, 3, 1), (100, 40, 2), (SIZE // PAGE - 1, 1, 3)):
        _fill(guest, page, nr, byte, model)
    report = a.drain("--to", b.unix)
    assert (report["phase"], report["guests"]) == ("moved", 1)
    # Here it can read and not write any more.
    guest.start("fill", offset=0, length=PAGE, byte=9)
    until(lambda: a.the_daemon.guest_status("g")["state"] == "frozen")
    assert not guest.answered(0.2)
    with connect(b.unix) as backend, backend.open("d", guest="g", token="secret") as disk:
        assert disk.read(0, SIZE) == model
        status = b.the_daemon.guest_status("g")
        assert status["private_bytes"] == 44 * PAGE
        assert status["quota_bytes"] == 1 << 20
        disk.write(5 * PAGE, b"more")
        assert disk.read(5 * PAGE, 4) == b"more"
        assert b.the_daemon.mismatches() == []
    guest.kill()


def test_a_guest_over_a_network_finds_what_it_wrote_while_it_mapped(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", **KEPT)
    _fill(guest, 7, 5, 4, model)
    a.drain("--to", b.tcp)
    guest.kill()
    with b.open("g", "secret") as disk:
        assert disk.read(0, SIZE) == model


def test_who_does_not_know_the_token_does_not_find_the_guest(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", **KEPT)
    guest.call("fill", offset=0, length=PAGE, byte=1)
    a.drain("--to", b.unix)
    stranger = start_guest(b.unix)
    for token in (None, "other"):
        try:
            stranger.call("open", image="d", guest="g", token=token)
        except AssertionError as error:
            said = str(error)
        assert "taken" in said
    guest.kill()


def test_a_guest_that_its_quota_stopped_blocks_and_goes_on_after_the_failed_drain(
    pair: Pair, start_guest: StartGuest
) -> None:
    a, b = pair
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", quota_bytes=4 * PAGE)
    guest.start("fill", offset=0, length=8 * PAGE, byte=1)
    until(lambda: a.the_daemon.guest_status("g")["state"] == "stopped-quota")
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert "guest 'g': it is stopped at its quota" in done.stderr
    a.the_daemon.request("quota", guest="g", quota_bytes=16 * PAGE)
    guest.finish()
    a.drain("--to", b.unix)
    guest.kill()


def test_pages_that_a_guest_discards_before_they_are_read_do_not_end_the_drain(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-warm"))
    b.start()
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", token="secret", follow_moves=False)
    for offset in range(0, SIZE, 1 << 16):
        data = random.Random(offset).randbytes(1 << 16)  # which no compression makes smaller
        guest.call("write", offset=offset, hex=data.hex())
        model[offset : offset + len(data)] = data
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    stop(b.the_daemon.pid)
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    # The source has seen what is private, and waits to send the first half of it.
    until(lambda: a.the_daemon.request("drain-state")["drain"]["total_bytes"] == SIZE)
    assert a.the_daemon.mismatches() == []
    gone = slice(SIZE - 64 * PAGE, SIZE)
    guest.call("discard", offset=gone.start, length=64 * PAGE)
    model[gone] = a.image.read_bytes()[gone]
    _fill(guest, SIZE // PAGE - 1, 1, 7, model)
    os.kill(b.the_daemon.pid, signal.SIGCONT)
    drain.join()
    assert a.the_daemon.request("drain-state")["drain"]["phase"] == "moved", a.the_daemon.log()
    with connect(b.unix) as backend, backend.open("d", guest="g", token="secret") as disk:
        assert disk.read(0, SIZE) == model
        assert b.the_daemon.mismatches() == []
    guest.kill()


def test_a_guest_frozen_by_a_backend_that_died_before_the_commit_goes_on_at_its_successor(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"), kept=True)
    b.start()
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", **KEPT)
    guest.call("fill", offset=0, length=PAGE, byte=1)
    in_thread(lambda: a.run("drain", "--to", b.unix))
    backend = a.the_daemon.status()["pid"]
    until(lambda: is_stopped(backend))
    os.kill(backend, signal.SIGKILL)
    guest.call("fill", offset=PAGE, length=PAGE, byte=2)
    assert guest.call("read", offset=0, length=1)
    assert b.guests() == set()
    guest.kill()


def _at_stop(
    hosts: Pair, start_guest: StartGuest, point: str
) -> tuple[Guest, bytearray, threading.Thread]:
    """Stop the source's drain of guests g and h at a point, where g loses its memory; return h.

    What holds g's connection open is the program that it executed, so the source still has it.
    """
    a, b = hosts
    a.start(before=("env", f"COWSHED_TEST_STOP_AT={point}"))
    b.start()
    model = bytearray(a.image.read_bytes())
    gone, other = start_guest(a.unix), start_guest(a.unix)
    gone.call("open", image="d", guest="g", **KEPT)
    gone.call("fill", offset=0, length=8 * PAGE, byte=1)
    other.call("open", image="d", guest="h", **KEPT)
    _fill(other, 4, 8, 2, model)
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    gone.start("execute_another")
    comm = Path(f"/proc/{gone.pid}/comm")
    until(lambda: comm.read_text() == "sleep\n")
    return other, model, drain


@pytest.mark.parametrize(
    ("point", "was_sent"), [("source-precopy", False), ("source-freeze", True)]
)
def test_a_guest_that_executes_another_program_moves_with_what_was_sent_of_it_in_whole(
    hosts: Pair, start_guest: StartGuest, point: str, was_sent: bool
) -> None:
    a, b = hosts
    of_gone = bytearray(a.image.read_bytes())
    if was_sent:
        of_gone[: 8 * PAGE] = b"\1" * 8 * PAGE
    other, model, drain = _at_stop(hosts, start_guest, point)
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    drain.join()
    assert a.the_daemon.request("drain-state")["drain"]["phase"] == "moved", a.the_daemon.log()
    for name, right in (("g", of_gone), ("h", model)):
        with connect(b.unix) as backend, backend.open("d", guest=name, token="secret") as disk:
            assert disk.read(0, SIZE) == right
    assert b.the_daemon.mismatches() == []
    other.kill()


def test_a_guest_that_executes_another_program_leaves_no_other_frozen_if_the_drain_fails(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    other, model, drain = _at_stop(hosts, start_guest, "source-freeze")
    b.kill()
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    drain.join()
    assert a.the_daemon.request("drain-state")["drain"]["phase"] == "aborted", a.the_daemon.log()
    _fill(other, 100, 8, 3, model)
    assert other.call("read", offset=0, length=SIZE) == model.hex()
    assert "Traceback" not in a.the_daemon.log()
    other.kill()
