# SPDX-License-Identifier: Apache-2.0
"""Open regions under programs that know nothing of cowshed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from attached import Attached, AttachedReader
from domains import Daemon, MakeImage, StartDaemon, until

MIB = 1 << 20
REGION = 2 * MIB
PAGE = 4096
NR_REGIONS = 4
SIZE = NR_REGIONS * REGION + 3 * PAGE + 100


@pytest.fixture
def pinned(run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon) -> Attached:
    """A daemon whose image is pinned, so that its regions are open for everybody."""
    source = make_image(SIZE)
    copy = run_dir / "copy.raw"
    shutil.copy(source, copy)
    daemon = start_daemon(f"--image=disk={source}", "--capacity=64M")
    daemon.request("pin", image="disk")
    return Attached(daemon, source, copy)


@pytest.fixture
def readers() -> Iterator[list[AttachedReader]]:
    started: list[AttachedReader] = []
    yield started
    for reader in started:
        reader.close()


def nr_open(daemon: Daemon, guest: str = "g") -> int:
    return sum(
        guest_status["open_regions"]
        for guest_status in daemon.status()["guests"]
        if guest_status["name"] == guest
    )


def charged(daemon: Daemon) -> tuple[int, int]:
    status = daemon.guest_status("g")
    return status["private_bytes"], status["reserved_bytes"]


def test_a_program_reads_and_writes_open_regions(
    pinned: Attached, readers: list[AttachedReader]
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g"))
    no = reader.call("map", writable=True)
    assert reader.call("address", no=no) % REGION == 0
    until(lambda: nr_open(daemon) == NR_REGIONS)
    before = daemon.status()["faults"]["write"]
    reader.call("write", no=no, page=3, nr_pages=4)
    assert daemon.status()["faults"]["write"] == before
    assert reader.call("check") == []
    assert charged(daemon) == (4 * PAGE, NR_REGIONS * REGION - 4 * PAGE)
    assert daemon.mismatches() == []


def test_with_read_only_nothing_is_charged_and_nothing_is_writable(
    pinned: Attached, readers: list[AttachedReader]
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g", ["--read-only", "--quota", "4K"]))
    no = reader.call("map_private")
    until(lambda: nr_open(daemon) == NR_REGIONS)
    assert reader.call("check") == []
    assert charged(daemon) == (0, 0)
    assert reader.call("protect", no=no, page=0, nr_pages=1) == errno.EACCES
    ended = pinned.run(
        "python3",
        "-c",
        "import mmap, sys; f = open(sys.argv[1], 'rb'); "
        "mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)",
        "{image}",
        options=["--read-only"],
    )
    assert "PermissionError" in ended.stderr
    assert "it is attached with --read-only" in ended.stderr
    assert daemon.mismatches() == []


@pytest.mark.parametrize("how", ["map", "map_private"])
def test_a_mapping_for_reading_alone_costs_no_quota(
    how: str, pinned: Attached, readers: list[AttachedReader]
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g", ["--quota", "4K"]))
    reader.call(how)
    until(lambda: nr_open(daemon) == NR_REGIONS)
    assert reader.call("check") == []
    assert charged(daemon) == (0, 0)
    assert daemon.mismatches() == []


@pytest.mark.parametrize("call", ["mprotect", "pkey_mprotect"])
def test_once_it_may_be_written_it_is_charged(
    pinned: Attached, readers: list[AttachedReader], call: str
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g", ["--quota", "64K"]))
    no = reader.call("map_private")
    until(lambda: nr_open(daemon) == NR_REGIONS)
    assert reader.call("protect", no=no, page=3, nr_pages=8, call=call) == 0
    assert nr_open(daemon) == 0
    reader.call("fill", no=no, page=3, nr_pages=8)
    assert charged(daemon) == (8 * PAGE, 0)
    assert reader.call("check") == []
    assert daemon.mismatches() == []


def test_a_mapping_is_moved_with_some_of_its_regions_open(
    pinned: Attached, readers: list[AttachedReader]
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g"))
    no = reader.call("map_private", writable=True)
    until(lambda: nr_open(daemon) == NR_REGIONS)
    assert reader.call("move", no=no)
    daemon.request("unpin", image="disk")
    daemon.request("evict", image="disk")
    assert reader.call("check") == []
    assert daemon.mismatches() == []


def test_a_child_has_the_image_while_regions_are_open(
    pinned: Attached, readers: list[AttachedReader]
) -> None:
    daemon = pinned.daemon
    readers.append(reader := AttachedReader(pinned, "g"))
    no = reader.call("map", writable=True)
    until(lambda: nr_open(daemon) == NR_REGIONS)
    reader.call("write", no=no, page=3, nr_pages=4)
    assert reader.call("child_check") == 0
    assert reader.call("check") == []
    assert daemon.mismatches() == []
