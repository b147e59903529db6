# SPDX-License-Identifier: Apache-2.0
"""Stock QEMU on a daemon's images: machines that share, write, stop, are evicted under, and die.

The machines are booted once, eight of one ext4 image, and used by one test after the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Daemon, cowshed, new_run_dir, until
from filesystems import add_system, make_disk, make_files, sums_of
from herds import Herd, image_memory
from machines import Kit, Machine
from scraping import ANY_PORT, scrape, value

KIB = 1 << 10
MIB = 1 << 20
NAMES = [f"vm{number}" for number in range(8)]
KINDS = ("ext4", "erofs", "squashfs")
# What the first of all boots and fetches is in its test's time.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the disks."""
    folder = tmp_path_factory.mktemp("disk")
    make_files(folder, 16 * MIB, random.Random(11))
    add_system(folder)
    return folder


@pytest.fixture(scope="module")
def sums(folder: Path) -> str:
    return sums_of(folder)


@pytest.fixture(scope="module")
def run_dir() -> Iterator[Path]:
    with new_run_dir() as path:
        yield path


@pytest.fixture(scope="module")
def sizes(folder: Path, run_dir: Path) -> dict[str, int]:
    """The images' sizes, by kind; the files are in run_dir."""
    disks = {kind: make_disk(kind, folder, run_dir / kind, 8 * MIB) for kind in KINDS}
    return {kind: path.stat().st_size for kind, path in disks.items()}


@pytest.fixture(scope="module")
def daemon(sizes: dict[str, int], run_dir: Path) -> Iterator[Daemon]:
    words = [word for kind in KINDS for word in ("--image", f"{kind}={run_dir / kind}")]
    daemon = Daemon(run_dir, [*words, "--capacity", "256M", *ANY_PORT])
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.kill()


@pytest.fixture(scope="module")
def herd(kit: Kit, daemon: Daemon, sizes: dict[str, int]) -> Iterator[Herd]:
    """The machines; of the image, nothing is in memory."""
    with Herd(kit, daemon.run_dir) as herd:
        yield herd


@pytest.fixture(scope="module")
def first(herd: Herd, daemon: Daemon, sizes: dict[str, int], sums: str) -> Machine:
    """The first machine, which has read everything."""
    herd.start(NAMES[0], "ext4", sizes["ext4"]).wait_ready()
    assert herd[NAMES[0]].call("sums /") == sums
    return herd[NAMES[0]]


def nr_waits(daemon: Daemon) -> float:
    """How many faults have waited for a load of the image."""
    samples = scrape(daemon)
    return sum(
        value(samples, "faults_total", image="ext4", kind=kind, outcome="loaded")
        for kind in ("missing", "minor")
    )


@pytest.fixture(scope="module")
def waits_of_one(first: Machine, daemon: Daemon) -> float:
    """How often the first machine waited for a load, before there is a second."""
    return nr_waits(daemon)


@pytest.fixture(scope="module")
def second(herd: Herd, waits_of_one: float, sizes: dict[str, int]) -> Machine:
    herd.start(NAMES[1], "ext4", sizes["ext4"]).wait_ready()
    return herd[NAMES[1]]


@pytest.fixture(scope="module")
def everybody(herd: Herd, second: Machine, sizes: dict[str, int]) -> Herd:
    """All eight; the third has a quota."""
    for pair in (NAMES[2:4], NAMES[4:6], NAMES[6:8]):
        for name in pair:
            quota = "4M" if name == NAMES[2] else "none"
            herd.start(name, "ext4", sizes["ext4"], quota=quota)
        herd.wait_ready(pair)
    return herd


def cached_bytes(machine: Machine) -> int:
    """What a machine has in its page cache, by its own account."""
    words = machine.call("grep -E '^(Cached|Buffers):' /proc/meminfo").split()
    return (int(words[1]) + int(words[4])) * KIB


def test_a_machine_reads_everything_and_caches_next_to_nothing(
    first: Machine, sums: str, sizes: dict[str, int]
) -> None:
    before = cached_bytes(first)
    assert first.call("sums /") == sums
    assert cached_bytes(first) - before < sizes["ext4"] // 16
    assert before < sizes["ext4"]


def test_a_machine_booted_second_waits_for_no_load(
    waits_of_one: float, second: Machine, daemon: Daemon, sums: str
) -> None:
    assert second.call("sums /") == sums
    # Its faults come in an order of their own: readahead may load what neither machine ever needs.
    assert nr_waits(daemon) == waits_of_one > 0
    assert daemon.guest_status(NAMES[1])["hits"] > 0


def test_eight_machines_read_what_was_made_from_one_copy(
    everybody: Herd, daemon: Daemon, run_dir: Path, sums: str, sizes: dict[str, int]
) -> None:
    for machine in everybody.machines.values():
        ticket = machine.start("sums /")
        assert machine.finish(ticket) == sums
    status = daemon.status()
    guests = {guest["name"]: guest for guest in status["guests"]}
    assert sorted(guests) == NAMES
    assert {guest["pid"] for guest in guests.values()} == {
        machine.pid for machine in everybody.machines.values()
    }
    # Each frame once, however many map it; PSS rounds down by less than a page a mapping. The first
    # machine waited for loads, and a load maps its whole extent: it alone has what others skip.
    shares = [image_memory(m.pid, run_dir / "ext4") for m in everybody.machines.values()]
    private = sum(guest["private_bytes"] for guest in guests.values())
    assert sum(shares) <= sizes["ext4"] + private
    assert max(shares) < sizes["ext4"] // 2 + private
    assert daemon.mismatches() == []


def test_evictions_under_mounted_disks_change_no_byte(
    everybody: Herd, daemon: Daemon, sums: str
) -> None:
    machines = [everybody[name] for name in NAMES[3:6]]
    tickets = [machine.start("sums /; sums /") for machine in machines]
    evicted = 0
    with daemon.connect() as backend:
        for machine, ticket in zip(machines, tickets, strict=True):
            while not machine.answered(ticket, 0.1):
                evicted += backend.request("evict", image="ext4")["evicted_bytes"]
    assert [m.finish(t) for m, t in zip(machines, tickets, strict=True)] == [2 * sums] * 3
    assert evicted > 20 * MIB
    assert daemon.mismatches() == []


def test_what_is_pinned_is_open_for_a_machine(
    everybody: Herd, daemon: Daemon, sums: str, sizes: dict[str, int]
) -> None:
    machine, name = everybody[NAMES[4]], NAMES[4]
    daemon.request("pin", image="ext4")
    until(lambda: daemon.guest_status(name)["open_regions"] == sizes["ext4"] // (2 * MIB))
    before = daemon.guest_status(name)["faults"]
    assert machine.call("sums /") == sums
    machine.call("mount -o remount,rw / && echo mine > /open && sync")
    after = daemon.guest_status(name)["faults"]
    # What is behind the last whole region faults as before.
    assert sum(after.values()) - sum(before.values()) < 512
    assert machine.call("cat /open") == "mine\n"
    assert 0 < daemon.guest_status(name)["private_bytes"] < 2 * MIB
    assert daemon.mismatches() == []
    daemon.request("unpin", image="ext4")
    # It runs: what it uses at the moment is kept.
    until(lambda: daemon.request("evict", image="ext4")["kept_bytes"] == 0)
    assert machine.call("rm /open; sums /") == sums
    assert daemon.mismatches() == []


def test_what_one_machine_writes_no_other_sees(
    everybody: Herd, daemon: Daemon, sums: str, folder: Path
) -> None:
    writer, reader = everybody[NAMES[6]], everybody[NAMES[7]]
    writer.call("mount -o remount,rw / && echo mine > /d0/f0 && rm /d1/f1")
    writer.call("dd if=/dev/urandom of=/new bs=64k count=32 && sync")
    told = writer.call("md5sum /new; cat /d0/f0")
    assert daemon.guest_status(NAMES[6])["private_bytes"] >= 2 * MIB
    daemon.request("evict", image="ext4")
    # Its own are kept, the rest comes back, and of the others each has what it had.
    mine = dict(line.split("  ")[::-1] for line in writer.call("sums /").splitlines())
    for line in sums.splitlines():
        total, name = line.split("  ")
        if name not in ("./d0/f0", "./d1/f1"):
            assert mine[name] == total
    assert "./d1/f1" not in mine
    assert writer.call("md5sum /new; cat /d0/f0") == told
    assert reader.call("sums /") == sums
    assert (
        daemon.guest_status(NAMES[7])["private_bytes"]
        < daemon.guest_status(NAMES[6])["private_bytes"]
    )
    assert daemon.mismatches() == []


def test_a_machine_at_its_quota_pauses_until_it_is_raised(
    everybody: Herd, daemon: Daemon, run_dir: Path, sums: str
) -> None:
    machine, other = everybody[NAMES[2]], everybody[NAMES[3]]
    machine.call("mount -o remount,rw /")
    ticket = machine.start("dd if=/dev/zero of=/big bs=64k count=96 && sync && md5sum /big")
    until(lambda: daemon.guest_status(NAMES[2])["state"] == "stopped-quota", 180)
    status = daemon.guest_status(NAMES[2])
    assert (status["private_bytes"], status["quota_bytes"]) == (4 * MIB, 4 * MIB)
    shown = cowshed("status", "--run-dir", run_dir).stdout
    assert any(NAMES[2] in line and "stopped" in line for line in shown.splitlines())
    # It stands still; nobody else does.
    assert not machine.answered(ticket)
    assert other.call("sums /") == sums
    assert not machine.answered(ticket)
    assert cowshed("quota", NAMES[2], "64M", "--run-dir", run_dir).returncode == 0
    zeros = "da6a0d097e307ac52ed9b4ad551801fc"  # 6 MiB of them
    assert machine.finish(ticket).splitlines()[-1] == f"{zeros}  /big"
    assert daemon.guest_status(NAMES[2])["state"] == "running"
    assert daemon.mismatches() == []


@pytest.mark.parametrize("kind", ["erofs", "squashfs"])
def test_other_file_systems_are_read_as_they_were_made(
    herd: Herd, daemon: Daemon, sizes: dict[str, int], sums: str, kind: str
) -> None:
    machine = herd.start(kind, kind, sizes[kind], kind)
    try:
        machine.wait_ready()
        assert machine.call("sums /") == sums
        daemon.request("evict", image=kind)
        machine.call("echo 3 > /proc/sys/vm/drop_caches")
        assert machine.call("sums /") == sums
    finally:
        herd.machines.pop(kind).close()


def test_a_killed_machine_gives_its_grants_back(everybody: Herd, daemon: Daemon) -> None:
    def is_gone(name: str) -> bool:
        return all(guest["name"] != name for guest in daemon.status()["guests"])

    for name in NAMES[5:8]:
        everybody[name].call("sums /")
        assert daemon.guest_status(name)["granted_bytes"] > 0
        everybody[name].kill()
        until(lambda name=name: is_gone(name))
    assert daemon.mismatches() == []
    assert everybody[NAMES[0]].call("echo alive") == "alive\n"
