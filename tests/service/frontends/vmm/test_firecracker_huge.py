# SPDX-License-Identifier: Apache-2.0
"""Machines in huge pages: each is installed whole, from extents that were loaded one by one."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, until
from machine_guests import MIB, PAGE, restore, status_of

HUGE = 2 * MIB
SIZE = 8 * MIB
NR_HUGE = Path("/proc/sys/vm/nr_hugepages")
NR_NEEDED = 2 * SIZE // HUGE


@pytest.fixture(autouse=True, scope="module")
def huge_pages() -> Iterator[None]:
    """Enough huge pages for two machines, for as long as this file's tests last."""
    before = int(NR_HUGE.read_text())
    try:
        NR_HUGE.write_text(str(before + NR_NEEDED))
    except OSError as error:
        pytest.skip(f"needs {NR_NEEDED} huge pages: {NR_HUGE} is {before}: {error.strerror}")
    try:
        nr = int(NR_HUGE.read_text())
        if nr < before + NR_NEEDED:
            pytest.skip(
                f"needs {NR_NEEDED} huge pages and the kernel has only {nr - before} to give"
            )
        yield
    finally:
        NR_HUGE.write_text(str(before))


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    """Its end is in the middle of a huge page."""
    return make_image(SIZE - 300 * PAGE - 100)


@pytest.fixture(params=[("64K", "1M"), ("2M", "4M")])
def small(image: Path, start_daemon: StartDaemon, request: pytest.FixtureRequest) -> Daemon:
    """Holds less than one huge page, or two if extents are as large."""
    extent, capacity = request.param
    return start_daemon("--image", f"d={image},extent={extent}", "--capacity", capacity)


def pages_of(image: Path) -> int:
    return -(-image.stat().st_size // PAGE)


def test_memory_in_huge_pages_reads_as_its_snapshot(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machines = [
        restore(small, start_guest, image, sizes, page_bytes=HUGE)
        for sizes in ([HUGE, 3 * HUGE], [SIZE])
    ]
    for machine in machines:
        machine.start("compare", nr_threads=4, seed=1)
    assert [machine.finish() for machine in machines] == [[], []]
    assert status_of(small, machines[0])["private_bytes"] == pages_of(image) * PAGE
    assert small.mismatches() == []


def test_a_huge_page_given_back_reads_as_zeros(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, [SIZE], page_bytes=HUGE)
    machine.call("balloon", page=512, nr_pages=512)
    assert machine.call("compare", nr_threads=3) == []
    machine.call("fill", page=0, nr_pages=5, byte=8)
    machine.call("balloon", page=0, nr_pages=512)
    assert machine.call("compare", nr_threads=3) == []
    assert small.mismatches() == []


def test_huge_pages_stop_at_the_quota_and_go_on(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, tmp_path: Path
) -> None:
    """A quota with room for pages, and for no huge page, is stopped once, not again and again."""
    config = tmp_path / "c.toml"
    config.write_text('quota = "3M"\n')
    daemon = start_daemon("--config", str(config), "--image", f"d={image}")
    machine = restore(daemon, start_guest, image, [SIZE], page_bytes=HUGE)
    machine.call("begin_compare", nr_threads=2)
    until(lambda: status_of(daemon, machine)["state"] == "stopped-quota")
    assert status_of(daemon, machine)["private_bytes"] == HUGE
    until(lambda: status_of(daemon, machine)["stopped_seconds"] > 0.3)
    assert status_of(daemon, machine)["quota_stops"] == 1
    daemon.request("quota", guest=f"fc-{machine.pid}", quota_bytes=4 * SIZE)
    assert machine.call("end_compare") == []
    assert daemon.mismatches() == []


def test_a_huge_page_whose_frames_cannot_be_read_is_poisoned(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}", before=("env", "COWSHED_TEST_POINTS=1"))
    machine = restore(daemon, start_guest, image, [SIZE], page_bytes=HUGE)
    assert machine.call("compare", nr_pages=1) == []
    daemon.request("warm", image="d")
    daemon.request("point", name="FRAMES_READ", action="fail", errno=errno.EIO)
    (failure,) = machine.call("compare")
    assert f"OSError({errno.EFAULT}," in failure  # SIGBUS for plain loads
    assert status_of(daemon, machine)["poisoned_pages"] > 0
    assert daemon.mismatches() == []
