# SPDX-License-Identifier: Apache-2.0
"""The target is killed at named points, and its keeper's successor has the guests that came."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from domains import StartGuest, until
from two_hosts import PAGE, SIZE, Host, Model

from cowshed.transport import connect
from cowshed.transport.messages.fields import MovedError

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


@pytest.fixture
def with_target(
    hosts: Pair, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Pair:
    """The target is kept, and has its overlays where the test says: in "memory" or in "files"."""
    a, b = hosts
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    b.start(*([f"--overlay-dir={tmp_path / 'b'}"] if request.param == "files" else []), kept=True)
    monkeypatch.delenv("COWSHED_TEST_POINTS")
    a.start()
    return a, b


def _kill_backend(host: Host) -> None:
    pid = host.the_daemon.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: host.the_daemon.status()["pid"] != pid)


@pytest.mark.parametrize(
    ("with_target", "point"),
    [
        ("memory", "HANDOFF_KEPT"),
        ("files", "HANDOFF_KEPT"),
        ("memory", "HANDOFF_OWNED"),
        ("files", "HANDOFF_OWNED"),
        ("memory", "HANDOFF_ADMITTED"),
    ],
    indirect=["with_target"],
)
def test_guests_that_came_are_at_the_successor_of_a_target_killed_around_the_commit(
    with_target: Pair, image: Path, point: str
) -> None:
    a, b = with_target
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    b.the_daemon.request("point", name=point)
    done = a.run("drain", "--to", b.unix)
    # It owns once it has recorded that, and the source asks until it knows.
    owner = a if point == "HANDOFF_KEPT" else b
    assert done.returncode == (1 if owner is a else 0), done.stderr
    until(lambda: (a.guests(), b.guests()) == (({"g"}, set()) if owner is a else (set(), {"g"})))
    with owner.open("g") as disk:
        model.check(disk)
        model.write(disk)
    if owner is a:
        a.wait_movable("--to", b.unix)
        a.drain("--to", b.unix)
        until(lambda: b.guests() == {"g"})
    _kill_backend(b)
    with b.open("g") as disk:
        model.check(disk)
    assert b.the_daemon.mismatches() == []


@pytest.mark.parametrize(
    ("with_target", "point"),
    [("memory", "HANDOFF_KEPT"), ("memory", "HANDOFF_OWNED"), ("files", "HANDOFF_ADMITTED")],
    indirect=["with_target"],
)
def test_a_backend_that_had_given_its_guests_away_serves_them_if_it_dies_as_they_come_back(
    with_target: Pair, image: Path, point: str
) -> None:
    """What is recorded of the handoff out and of the handoff in says one thing at every instant."""
    a, b = with_target
    model = Model(image, 2)
    with b.open("g") as disk:
        model.write(disk)
    b.drain("--to", a.unix)
    b.the_daemon.request("point", name=point)
    done = a.run("drain", "--to", b.unix)
    owner, other = (a, b) if point == "HANDOFF_KEPT" else (b, a)
    assert done.returncode == (1 if owner is a else 0), done.stderr
    with owner.open("g") as disk:
        model.check(disk)
        model.write(disk)
    with connect(other.tcp) as backend, pytest.raises(MovedError, match=owner.unix):
        backend.open("d", guest="new", follow_moves=False)


@pytest.mark.parametrize(
    ("with_target", "point"),
    [
        ("memory", "OPEN_TOLD"),
        ("files", "REGION_ATTACHED"),
        ("memory", "REGION_HELD"),
        ("files", "REGION_HELD"),
        ("files", "REGION_TOLD"),
    ],
    indirect=["with_target"],
)
def test_a_mapping_that_follows_finds_its_pages_wherever_the_target_is_killed(
    with_target: Pair, start_guest: StartGuest, point: str
) -> None:
    a, b = with_target
    model = bytearray(a.image.read_bytes())
    guest = start_guest(a.unix, script="moving_guest.py")
    guest.call("open", image="d", guest="g")
    _fill(guest, 3, 700, 5, model)
    pid = b.the_daemon.status()["pid"]
    b.the_daemon.request("point", name=point)
    # Until then its pages stay where they came, but for those that it asks for.
    b.the_daemon.request("point", name="PRELOAD_PUSH", action="fail", errno=5, times=1 << 30)
    a.drain("--to", b.unix)
    until(lambda: guest.call("where") == [b.unix, True, ""])
    assert b.the_daemon.status()["pid"] != pid
    guest.call("discard", offset=690 * PAGE, length=PAGE)
    with a.image.open("rb") as file:
        file.seek(690 * PAGE)
        model[690 * PAGE : 691 * PAGE] = file.read(PAGE)
    _kill_backend(b)
    assert guest.call("hash", offset=0, length=SIZE) == hashlib.sha256(model).hexdigest()
    _fill(guest, 800, 2, 6, model)
    assert guest.call("hash", offset=0, length=SIZE) == hashlib.sha256(model).hexdigest()
    assert b.the_daemon.mismatches() == []
    # Nothing is left of it, once it has ended, for who comes under its name.
    guest.call("close")
    until(lambda: b.guests() == set())
    _kill_backend(b)
    assert b.guests() == set()
    with connect(b.unix) as backend, backend.open("d", guest="g") as disk:
        assert disk.read(0, SIZE) == a.image.read_bytes()


def _fill(guest: Any, page: int, nr: int, byte: int, model: bytearray) -> None:
    guest.call("fill", offset=page * PAGE, length=nr * PAGE, byte=byte)
    model[page * PAGE : (page + nr) * PAGE] = bytes([byte]) * nr * PAGE


@pytest.mark.parametrize("with_target", ["memory"], indirect=True)
def test_a_mapped_guest_that_came_outlives_the_targets_keeper_and_then_the_target(
    with_target: Pair, image: Path, start_guest: StartGuest
) -> None:
    """What its pages came in was closed when it had them all, and is not to be given away again."""
    a, b = with_target
    model = bytearray(image.read_bytes())
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g", token="secret")
    guest.call("fill", offset=7 * PAGE, length=9 * PAGE, byte=5)
    model[7 * PAGE : 16 * PAGE] = bytes([5]) * 9 * PAGE
    b.the_daemon.request("point", name="PRELOAD_PUSH", action="fail", errno=11, times=0)
    a.drain("--to", b.unix)
    # It has its pages once it has read them.
    until(lambda: b.guests() == {"g"} and b.the_daemon.guest_status("g")["state"] == "running")
    assert guest.call("hash", offset=0, length=SIZE) == hashlib.sha256(model).hexdigest()
    others = [start_guest(b.unix) for _ in range(2)]  # who are given the numbers that came free
    for no, other in enumerate(others):
        other.call("open", image="d", guest=f"o{no}")
    backend = b.the_daemon.status()["pid"]
    b.the_daemon.kill()
    until(lambda: "event=held" in b.the_daemon.log())
    _kill_backend(b)
    assert b.the_daemon.status()["pid"] != backend
    assert b.guests() == {"g", "o0", "o1"}
    guest.call("fill", offset=3 * PAGE, length=PAGE, byte=6)
    model[3 * PAGE : 4 * PAGE] = bytes([6]) * PAGE
    assert guest.call("hash", offset=0, length=SIZE) == hashlib.sha256(model).hexdigest()
    assert b.the_daemon.mismatches() == []
    guest.kill()
