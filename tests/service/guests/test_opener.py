# SPDX-License-Identifier: Apache-2.0
"""A daemon opens regions for guests that map, and closes them when something else needs them."""

from __future__ import annotations

import errno
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from domains import (
    Daemon,
    Guest,
    MakeImage,
    StartDaemon,
    StartGuest,
    cowshed,
    kill_backend,
    until,
)
from scraping import ANY_PORT, scrape, value
from switches import BEFORE, switch

from cowshed.cache import UsageError
from cowshed.transport import connect

MIB = 1 << 20
REGION = 2 * MIB
SIZE = 4 * REGION
PAGE = 4096


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def daemon(image: Path, start_daemon: StartDaemon) -> Daemon:
    return start_daemon(f"--image=d={image}", "--capacity=64M")


def regions(daemon: Daemon) -> dict[str, Any]:
    return dict(daemon.status()["open_regions"])


def nr_open(daemon: Daemon, guest: str) -> int:
    return int(daemon.guest_status(guest)["open_regions"])


def open_guest(daemon: Daemon, start_guest: StartGuest, name: str, **fields: Any) -> Guest:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest=name, **fields)
    return guest


def compare(guest: Guest, image: Path) -> None:
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0


def touch_all(guest: Guest, seed: int) -> None:
    """Read some pages of each region, at random."""
    for region in range(SIZE // REGION):
        for i in range(40):
            page = (seed * 7919 + i * 104729) % 512
            guest.call("read", offset=region * REGION + page * PAGE, length=8)


def evict_first(daemon: Daemon) -> None:
    """Evict the first region, which a look for pins just before the unpin may open anew."""
    until(
        lambda: (
            daemon.request("evict", image="d", offset=0, length=REGION)["evicted_bytes"] == REGION
        )
    )


def test_what_is_pinned_is_open_for_every_guest(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    before = open_guest(daemon, start_guest, "before")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "before") == 4)
    after = open_guest(daemon, start_guest, "after")
    until(lambda: nr_open(daemon, "after") == 4)
    for guest in (before, after):
        faults = daemon.status()["faults"]
        compare(guest, image)
        guest.call("write", offset=PAGE, hex="ab" * PAGE)
        assert daemon.status()["faults"] == faults
    status = daemon.guest_status("after")
    assert (status["private_bytes"], status["reserved_bytes"]) == (PAGE, SIZE - PAGE)
    assert daemon.status()["images"][0]["pinned_bytes"] == SIZE
    assert regions(daemon)["reserved_bytes"] == 2 * (SIZE - PAGE)
    assert daemon.mismatches() == []
    shown = cowshed("status", "--run-dir", str(daemon.run_dir)).stdout
    assert "Regions      8 open, 16M reserved; 8 opened, 0 closed" in shown


def test_what_guests_use_is_opened_for_them(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    daemon.request("warm", image="d")
    guests = [open_guest(daemon, start_guest, name, window_bytes=PAGE) for name in ("one", "two")]
    seeds = count()

    def is_open_after_use() -> bool:
        for guest in guests:
            touch_all(guest, next(seeds))
        return regions(daemon)["open"] > 0

    until(is_open_after_use)
    for guest in guests:
        compare(guest, image)
    assert daemon.mismatches() == []


@pytest.mark.parametrize("which", ["off", "pinned"])
def test_the_setting_limits_what_is_opened(
    which: str, image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", f"--open-regions={which}")
    guests = [open_guest(daemon, start_guest, name) for name in ("one", "two")]
    daemon.request("warm", image="d")
    for seed, guest in enumerate(guests):
        touch_all(guest, seed)
    daemon.request("pin", image="d")
    if which == "pinned":
        until(lambda: regions(daemon)["open"] == 8)
    for seed, guest in enumerate(guests):
        touch_all(guest, seed + 9)
    assert regions(daemon)["opens"] == (8 if which == "pinned" else 0)


def test_a_small_store_opens_only_what_is_pinned(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", "--capacity=7M")
    guests = [open_guest(daemon, start_guest, name) for name in ("one", "two")]
    daemon.request("warm", image="d", offset=0, length=2 * REGION)
    for seed, guest in enumerate(guests):
        touch_all(guest, seed)
    daemon.request("pin", image="d", offset=0, length=REGION)
    until(lambda: regions(daemon)["open"] == 2)
    for seed, guest in enumerate(guests):
        touch_all(guest, seed + 9)
        compare(guest, image)
    assert regions(daemon)["opens"] == 2
    assert daemon.mismatches() == []


def test_an_eviction_on_request_closes_first(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    guest.call("write", offset=PAGE, hex="ab" * PAGE)
    daemon.request("unpin", image="d")
    evict_first(daemon)
    assert regions(daemon)["closes"]["request"] >= 1
    assert guest.call("read", offset=PAGE, length=4) == "abababab"
    assert guest.call("compare", path=str(image), offset=REGION, length=SIZE - REGION) == 0
    assert daemon.mismatches() == []


def test_a_smaller_quota_closes_and_a_guest_at_its_quota_goes_on(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = open_guest(daemon, start_guest, "g", quota_bytes=SIZE + 4 * REGION)
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    daemon.request("quota", guest="g", quota_bytes=8 * PAGE)
    status = daemon.guest_status("g")
    assert (status["open_regions"], status["reserved_bytes"]) == (0, 0)
    for page in range(8):
        guest.call("write", offset=page * PAGE, hex="ab" * PAGE)
    assert daemon.guest_status("g")["private_bytes"] == 8 * PAGE
    assert regions(daemon)["closes"]["quota"] == 4


def test_a_store_whose_every_region_is_open_makes_room(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    one, two = make_image(SIZE, "one"), make_image(SIZE, "two")
    daemon = start_daemon(f"--image=d={one}", f"--image=e={two}", "--capacity=12M")
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    daemon.request("unpin", image="d")
    other = start_guest(daemon.uri)
    other.call("open", image="e", guest="other")
    assert other.call("compare", path=str(two), offset=0, length=SIZE) == 0
    assert regions(daemon)["closes"]["pressure"] > 0
    compare(guest, one)
    assert daemon.mismatches() == []


def test_what_is_pinned_stays_open_while_room_is_short(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    one, two = make_image(SIZE, "one"), make_image(4 * SIZE, "two")
    daemon = start_daemon(f"--image=d={one}", f"--image=e={two}", "--capacity=12M")
    open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    other = start_guest(daemon.uri)
    other.call("open", image="e", guest="other")
    assert other.call("compare", path=str(two), offset=0, length=4 * SIZE) == 0
    assert regions(daemon)["closes"]["pressure"] == 0
    assert nr_open(daemon, "g") == 4
    assert daemon.mismatches() == []


def test_what_operators_pin_goes_before_what_guests_use(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    one, two = make_image(SIZE, "one"), make_image(SIZE, "two")
    daemon = start_daemon(f"--image=d={one}", f"--image=e={two}", "--capacity=12M")
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    daemon.request("unpin", image="d")
    daemon.request("pin", image="e")
    compare(guest, one)
    assert daemon.mismatches() == []


def test_a_region_nobody_uses_is_closed_in_time_and_one_that_is_used_is_opened_again(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    daemon.request("unpin", image="d")
    until(lambda: regions(daemon)["closes"]["sample"] == 4, seconds=90)
    assert regions(daemon)["open"] == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_regions_are_open_under_a_successor(
    how: signal.Signals, image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", "--capacity=64M", kept=True)
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    guest.call("write", offset=PAGE, hex="ab" * PAGE)
    kill_backend(daemon, how)
    until(lambda: nr_open(daemon, "g") == 4)
    status = daemon.guest_status("g")
    assert (status["private_bytes"], status["reserved_bytes"]) == (PAGE, SIZE - PAGE)
    guest.call("write", offset=2 * PAGE, hex="cd" * PAGE)
    assert guest.call("compare", path=str(image), offset=3 * PAGE, length=SIZE - 3 * PAGE) == 0
    assert daemon.guest_status("g")["private_bytes"] == 2 * PAGE
    assert daemon.mismatches() == []


def test_a_disk_opened_read_only_costs_no_quota(daemon: Daemon, image: Path) -> None:
    daemon.request("pin", image="d")
    with connect(daemon.uri) as backend:
        disk = backend.open("d", guest="g", quota_bytes=PAGE, read_only=True)
        assert disk.read_only
        until(lambda: nr_open(daemon, "g") == 4)
        assert disk.read(0, SIZE) == image.read_bytes()
        view = disk.view
        assert view.readonly
        assert bytes(view[:PAGE]) == image.read_bytes()[:PAGE]
        view.release()
        with pytest.raises(UsageError, match="opened read-only; open it without read_only"):
            disk.write(0, b"x")
        status = daemon.guest_status("g")
        assert (status["private_bytes"], status["reserved_bytes"]) == (0, 0)
        assert daemon.mismatches() == []
        disk.close()


def test_a_collapse_that_the_system_forbids_is_counted_and_said_once(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", "--capacity=64M", before=BEFORE)
    daemon.request("point", name="COLLAPSE", action="fail", errno=errno.EINVAL, times=0)
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: regions(daemon)["collapse_failures"] >= 4)
    daemon.wait_logged("event=collapse-refused", 1)
    compare(guest, image)
    assert regions(daemon)["open"] == 0
    assert daemon.mismatches() == []


def test_what_cannot_be_collapsed_is_left_alone_for_a_while(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", "--capacity=64M", before=BEFORE)
    switch(daemon, "COLLAPSE", "fail", errno=errno.ENOMEM, times=0)
    guests = [open_guest(daemon, start_guest, f"g{no}") for no in range(4)]
    daemon.request("pin", image="d")
    until(lambda: regions(daemon)["collapse_failures"] == 4)
    for seed, guest in enumerate(guests):
        touch_all(guest, seed)
    daemon.request("pin", image="d", offset=0, length=REGION)  # has it look again
    assert regions(daemon)["collapse_failures"] == 4


def test_regions_that_guests_use_give_way_to_pins_of_an_image_with_larger_extents(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    small, large = make_image(SIZE, "small"), make_image(10 * REGION, "large")
    daemon = start_daemon(f"--image=d={small}", f"--image=e={large},extent=1M", "--capacity=24M")
    open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    daemon.request("unpin", image="d")
    daemon.request("pin", image="e", offset=0, length=19 * MIB)
    assert regions(daemon)["closes"]["pressure"] >= 3
    assert daemon.mismatches() == []


def test_metrics_tell_of_open_regions(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(f"--image=d={image}", *ANY_PORT, "--capacity=64M")
    guest = open_guest(daemon, start_guest, "g")
    daemon.request("pin", image="d")
    until(lambda: nr_open(daemon, "g") == 4)
    guest.call("write", offset=PAGE, hex="ab" * PAGE)
    daemon.request("unpin", image="d")
    evict_first(daemon)
    found = scrape(daemon)
    assert value(found, "open_regions", image="d") == 3
    assert value(found, "open_region_reserved_bytes", image="d") == 3 * REGION
    assert value(found, "private_bytes", image="d") == PAGE
    shown = regions(daemon)
    assert value(found, "region_opens_total", image="d") == shown["opens"] >= 4
    closes = value(found, "region_closes_total", image="d", reason="request")
    assert closes == shown["closes"]["request"] >= 1
    assert value(found, "lost_regions", image="d") == 0
    assert value(found, "collapse_failures_total", image="d") == shown["collapse_failures"]
