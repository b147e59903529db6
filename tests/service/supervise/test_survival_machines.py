# SPDX-License-Identifier: Apache-2.0
"""A backend is killed under machines that handed their memory over: they never know."""

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from domains import Daemon, Guest, MakeImage, StartDaemon, StartGuest, stop, until
from machine_guests import new_machine, restore, status_of

pytestmark = pytest.mark.slow

PAGE = 4096
MIB = 1 << 20
SIZE = 4 * MIB
NR_PAGES = SIZE // PAGE
HANDSHAKE_POINTS = ("MACHINE_CAME", "MACHINE_ATTACHED", "MACHINE_HELD")
FAULT_POINTS = ("FAULT_READ", "FAULT_HELD", "WRITE_CHARGED")
LOAD_POINTS = ("LOAD_READ", "LOAD_FILL", "LOAD_PUBLISH", "LOAD_ANSWER")


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    return start_daemon("--image", f"d={image}", "--capacity", "16M", kept=True)


def backend_of(kept: Daemon) -> int:
    return int((kept.run_dir / "lock").read_text())


def kill_backend(kept: Daemon) -> None:
    pid = backend_of(kept)
    os.kill(pid, signal.SIGKILL)
    until(lambda: kept.status()["pid"] != pid)


def nydus(kept: Daemon, start_guest: StartGuest, image: Path, policy: int, **how: Any) -> Guest:
    machine = new_machine(kept, start_guest, [SIZE])
    machine.call("nydus", image=str(image), policy=policy, **how)
    return machine


def pinned_bytes(kept: Daemon) -> int:
    return int(kept.status()["images"][0]["pinned_bytes"])


def test_a_machine_goes_on_with_its_memory_as_it_was(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    machine = restore(kept, start_guest, image, [MIB, 3 * MIB])
    assert machine.call("compare", nr_pages=300) == []
    machine.call("fill", page=20, nr_pages=8, byte=7)
    machine.call("balloon", page=24, nr_pages=8)
    kept.request("quota", guest=status_of(kept, machine)["name"], quota_bytes=8 * MIB)
    before = status_of(kept, machine)
    for _ in range(2):
        kill_backend(kept)
        after = status_of(kept, machine)
        same = ("name", "transport", "state", "private_bytes", "quota_bytes", "mappings")
        assert {k: after[k] for k in same} == {k: before[k] for k in same}
        assert after["hits"] >= before["hits"]
        machine.call("fill", page=25, nr_pages=1, byte=8)
        assert machine.call("compare", nr_pages=400) == []
        assert kept.mismatches() == []
        before = status_of(kept, machine)
    assert machine.call("compare", nr_threads=3) == []
    machine.call("close")
    until(lambda: kept.status()["guests"] == [])
    assert kept.mismatches() == []


@pytest.mark.parametrize("point", HANDSHAKE_POINTS)
def test_a_machine_hands_its_memory_over_once_whoever_dies_meanwhile(
    kept: Daemon, start_guest: StartGuest, image: Path, point: str
) -> None:
    machine = new_machine(kept, start_guest, [SIZE])
    pid = backend_of(kept)
    kept.request("point", name=point)
    machine.call("restore", image=str(image))
    assert machine.call("compare", nr_threads=2) == []
    assert backend_of(kept) != pid
    assert [each["pid"] for each in kept.status()["guests"]] == [machine.pid]
    assert kept.mismatches() == []
    machine.kill()
    until(lambda: kept.status()["guests"] == [])


@pytest.mark.parametrize(
    ("point", "policy"), [("MACHINE_CAME", 0), ("MACHINE_HELD", 0), ("MACHINE_ATTACHED", 1)]
)
def test_a_disk_is_told_its_size_and_attached_whoever_dies_meanwhile(
    kept: Daemon, start_guest: StartGuest, image: Path, point: str, policy: int
) -> None:
    kept.request("point", name=point)
    machine = nydus(kept, start_guest, image, policy)
    assert machine.call("compare", nr_threads=2) == []
    kept.wait_logged("event=backend-died")
    assert kept.mismatches() == []


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        *(("machine", point) for point in (*FAULT_POINTS, *LOAD_POINTS)),
        ("disk", "WRITE_CHARGED"),
        ("shared disk", "FAULT_READ"),
        ("shared disk", "LOAD_ANSWER"),
    ],
)
def test_a_stalled_fault_is_answered_by_the_successor(
    kept: Daemon, start_guest: StartGuest, image: Path, kind: str, point: str
) -> None:
    if kind == "machine":
        machine = restore(kept, start_guest, image, [SIZE])
    else:
        machine = nydus(kept, start_guest, image, int(kind == "disk"))
    assert machine.call("compare", nr_pages=20) == []
    pid = backend_of(kept)
    if point in FAULT_POINTS:
        kept.request("warm", image="d")
    kept.request("point", name=point)
    assert machine.call("compare", nr_threads=2) == []
    assert backend_of(kept) != pid
    until(lambda: kept.status()["pid"] != pid)
    assert machine.call("compare", nr_pages=50) == []
    assert kept.mismatches() == []


def test_a_discard_that_died_with_its_reader_is_not_forgotten(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    machine = restore(kept, start_guest, image, [SIZE])
    machine.call("fill", page=100, nr_pages=4, byte=9)
    pid = backend_of(kept)
    kept.request("point", name="FAULT_READ")
    machine.call("balloon", page=90, nr_pages=600)  # used and never used
    until(lambda: kept.status()["pid"] != pid)
    assert machine.call("compare", nr_threads=2) == []
    assert kept.mismatches() == []


@pytest.mark.parametrize("point", [*HANDSHAKE_POINTS, "FAULT_READ"])
def test_a_discard_in_the_middle_of_the_handshake_is_not_forgotten(
    kept: Daemon, start_guest: StartGuest, image: Path, point: str
) -> None:
    machine = new_machine(kept, start_guest, [SIZE])
    machine.call("begin_balloon", page=90, nr_pages=600)
    pid = backend_of(kept)
    kept.request("point", name=point)
    machine.call("restore", image=str(image))
    assert machine.call("compare", nr_threads=2) == []
    assert backend_of(kept) != pid
    assert kept.mismatches() == []


def test_what_was_lent_is_lent_again_and_what_nobody_has_is_not(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    machine, doomed = (nydus(kept, start_guest, image, 0) for _ in range(2))
    kept.request("pin", image="d", offset=0, length=65536)
    doomed.call("begin_touch", pages=[0, 200, 900])
    doomed.call("end_compare")
    machine.call("begin_touch", pages=[0, 500])
    machine.call("end_compare")
    assert pinned_bytes(kept) == 4 * 65536
    stop(kept.pid)  # the keeper sees both deaths at once
    pid = backend_of(kept)
    os.kill(pid, signal.SIGKILL)
    doomed.kill()
    os.kill(kept.pid, signal.SIGCONT)
    until(lambda: [each["pid"] for each in kept.status()["guests"]] == [machine.pid])
    until(lambda: pinned_bytes(kept) == 2 * 65536)
    kept.request("evict", image="d")
    assert machine.call("compare", nr_pages=200) == []
    machine.call("close")
    until(lambda: pinned_bytes(kept) == 65536)
    kept.request("unpin", image="d", offset=0, length=65536)
    assert pinned_bytes(kept) == 0


def test_kills_at_random_under_machines_that_never_rest(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    machines = [restore(kept, start_guest, image, [SIZE]) for _ in range(2)]
    is_over = threading.Event()

    def kill() -> None:
        for _ in range(6):  # the keeper waits longer after each
            if is_over.wait(random.uniform(0.2, 0.8)):
                return
            kill_backend(kept)

    killer = threading.Thread(target=kill)
    for no, machine in enumerate(machines):
        machine.start("churn", rounds=1500, seed=no, nr_pages=NR_PAGES)
    killer.start()
    try:
        assert [machine.finish() for machine in machines] == [[], []]
    finally:
        is_over.set()
        killer.join()
    until(lambda: len(kept.status()["guests"]) == 2)
    for machine in machines:
        assert machine.call("compare") == []
    assert kept.mismatches() == []


def test_another_keeper_has_connections_too(
    kept: Daemon, start_guest: StartGuest, image: Path
) -> None:
    machine = restore(kept, start_guest, image, [SIZE])
    caller = new_machine(kept, start_guest, [SIZE])
    caller.call("connect")
    kept.status()
    os.kill(kept.pid, signal.SIGKILL)
    until(lambda: "event=held" in kept.log())
    kill_backend(kept)
    assert machine.call("compare", nr_pages=100) == []
    caller.call("hand_over")
    assert caller.call("read", page=700) == image.read_bytes()[700 * PAGE :][:8].hex()
