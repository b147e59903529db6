# SPDX-License-Identifier: Apache-2.0
"""A daemon's standby list: what operators and guests see of it, and what a successor has."""

from __future__ import annotations

import signal
import time
from pathlib import Path

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

MIB = 1 << 20
EXTENT = 65536
# All of an image that guests read is in memory, but not all in frames, since another may need room.
SIZE, CAPACITY = 7 * MIB, "8M"
NR_EXTENTS = SIZE // EXTENT


def fill(daemon: Daemon, guest: Guest) -> None:
    """Have the guest read all, until some of it is in standby."""
    guest.call("open", image="d")
    guest.call("hash", offset=0, length=SIZE)
    until(lambda: daemon.status()["standby"]["bytes"] > 0)
    assert daemon.status()["loads"] == NR_EXTENTS


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def options(image: Path, make_image: MakeImage) -> list[str]:
    return ["--image", f"d={image}", "--image", f"e={make_image(SIZE)}", "--capacity", CAPACITY]


@pytest.fixture
def daemon(options: list[str], start_daemon: StartDaemon) -> Daemon:
    return start_daemon(*options)


def test_what_is_unmapped_comes_back_for_guests_warms_and_pins_without_a_read(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    guest = start_guest(daemon.uri)
    fill(daemon, guest)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE // 2) == 0
    warmed = daemon.request("warm", image="d")
    assert warmed["loaded_bytes"] == 0
    assert warmed["already_bytes"] + warmed["left_out_bytes"] == SIZE
    daemon.request("pin", image="d", offset=0, length=2 * MIB)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    status = daemon.status()
    assert status["loads"] == NR_EXTENTS
    assert status["standby"]["victim_hits"] > 0
    assert status["evicted_extents"] == 0
    assert status["resident_bytes"] + status["standby"]["bytes"] == SIZE
    assert status["standby"]["bytes"] <= status["standby"]["limit_bytes"]
    assert daemon.mismatches() == []


def test_an_eviction_on_request_drops_standby_bytes_too(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(daemon.uri)
    fill(daemon, guest)
    guest.kill()
    evicted = 0

    def is_empty() -> bool:
        nonlocal evicted
        evicted += daemon.request("evict", image="d")["evicted_bytes"]
        status = daemon.status()
        return status["resident_bytes"] + status["standby"]["bytes"] == 0

    until(is_empty)
    assert evicted == SIZE
    assert daemon.status()["evictions"] == {"pressure": 0, "request": NR_EXTENTS}
    assert daemon.mismatches() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_a_successor_begins_with_an_empty_list_and_guests_read_what_they_should(
    image: Path,
    options: list[str],
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    how: signal.Signals,
    tmp_path: Path,
) -> None:
    settings = tmp_path / "cowshed.toml"
    settings.write_text("autowarm = false\n")
    daemon = start_daemon("--config", str(settings), *options, kept=True)
    guest = start_guest(daemon.uri)
    fill(daemon, guest)
    before = daemon.status()
    kill_backend(daemon, how)
    after = daemon.status()
    assert after["pid"] != before["pid"]
    assert 0 < after["resident_bytes"] <= before["resident_bytes"]
    assert (after["standby"]["bytes"], after["loads"]) == (0, NR_EXTENTS)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    assert daemon.mismatches() == []


def test_while_all_images_fit_nothing_is_unmapped_to_make_room(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}", "--capacity", CAPACITY)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    for _ in range(2):
        assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
        time.sleep(1.1)  # the evictor looks once a second
    status = daemon.status()
    assert (status["resident_bytes"], status["standby"]["victims"]) == (SIZE, 0)
    assert status["loads"] == NR_EXTENTS


def test_while_nothing_is_read_nothing_is_unmapped(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    guest = start_guest(daemon.uri)
    fill(daemon, guest)

    def is_left_alone() -> bool:
        assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
        before = daemon.status()["standby"]["victims"]
        time.sleep(1.1)  # the evictor looks once a second
        return daemon.status()["standby"]["victims"] == before

    until(is_left_alone)  # it may learn of the last reads at its next look
    assert (daemon.status()["loads"], daemon.status()["resident_bytes"]) == (NR_EXTENTS, SIZE)


def test_a_successor_with_less_capacity_drops_what_is_too_much(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, tmp_path: Path
) -> None:
    settings = tmp_path / "cowshed.toml"
    settings.write_text(f'capacity = "{CAPACITY}"\n')
    daemon = start_daemon("--config", str(settings), "--image", f"d={image}", kept=True)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    settings.write_text('capacity = "4M"\n')
    kill_backend(daemon, signal.SIGHUP)

    def fits() -> bool:
        status = daemon.status()
        return status["resident_bytes"] + status["standby"]["bytes"] <= 4 * MIB

    until(fits)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    assert daemon.mismatches() == []


def test_without_a_list_nothing_is_unmapped_and_nothing_is_estimated(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}", "--capacity", "4M", "--standby", "0")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    for _ in range(2):
        assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    status = daemon.status()
    assert set(status["standby"].values()) == {0}
    assert status["evictions"]["pressure"] > NR_EXTENTS // 2
    assert [use["hit_rate"] for use in status["use"]] == [None] * 3
    shown = cowshed("status", "--run-dir", str(daemon.run_dir)).stdout
    assert "Hit rate     unknown: standby is 0, so that nothing is measured" in shown


@pytest.mark.parametrize("percent", ["51", "-1"])
def test_a_list_that_is_too_long_is_refused_in_one_line(image: Path, percent: str) -> None:
    done = cowshed("serve", "--image", f"d={image}", "--standby", percent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cowshed: standby is {percent}: use 0 to 50 percent\n"
