# SPDX-License-Identifier: Apache-2.0
"""The capacity holds at every instant, pins hold, and warm brings first what was needed first."""

import os
import random
from functools import partial
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, cowshed, until
from swarms import Swarm

pytestmark = pytest.mark.slow

MIB = 1 << 20
EXTENT = 64 << 10


def filled_extents(daemon: Daemon) -> list[int]:
    """Which extents have frames, from the kernel's own map of the memfd."""
    extents: set[int] = set()
    with daemon.frames_path().open("rb") as frames:
        end = 0
        while True:
            try:
                start = os.lseek(frames.fileno(), end, os.SEEK_DATA)
                end = os.lseek(frames.fileno(), start, os.SEEK_HOLE)
            except OSError:
                return sorted(extents)
            extents.update(range(start // EXTENT, (end - 1) // EXTENT + 1))


@pytest.mark.timeout(300)
def test_16_guests_on_an_image_of_8_capacities_never_exceed_it(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    image = make_image(32 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "4M")
    daemon.request("pin", image="d", offset=5 * MIB, length=MIB)
    pinned = range(5 * MIB // EXTENT, 6 * MIB // EXTENT)
    frames = os.open(daemon.frames_path(), os.O_RDONLY)
    highest = highest_told = 0
    with (
        daemon.connect() as backend,
        Swarm(daemon.uri, "read_randomly", 16, rng, path=str(image), nr_reads=400) as swarm,
    ):
        while swarm.running:
            for _ in range(200):
                highest = max(highest, os.fstat(frames).st_blocks * 512)
            highest_told = max(highest_told, backend.request("status")["status"]["resident_bytes"])
            assert os.lseek(frames, 5 * MIB, os.SEEK_HOLE) >= 6 * MIB, "a pinned extent went"
        assert swarm.results() == [{"wrong": 0}] * 16
    highest = max(highest, os.fstat(frames).st_blocks * 512)  # they may have been quick
    os.close(frames)
    assert highest <= 4 * MIB
    assert highest_told <= 4 * MIB
    assert highest > 3 * MIB, "there was no pressure"
    status = daemon.status()
    assert status["evictions"]["pressure"] > 500
    assert daemon.mismatches() == []
    until(lambda: daemon.status()["guests"] == [])  # nothing is held for them
    kept = daemon.request("evict", image="d")
    assert (kept["kept_bytes"], kept["kept_why"]) == (MIB, "pinned")
    assert filled_extents(daemon) == list(pinned)


def test_commands_warm_pin_evict_and_unpin(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(2 * MIB + 10)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "4M")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")

    def run(*arguments: str) -> str:
        ended = cowshed(*arguments, "--run-dir", daemon.run_dir)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    assert run("warm", "d", "64K", "128K") == "d: 128K loaded, 0 already resident\n"
    assert filled_extents(daemon) == [1, 2]
    # Whatever a range touches: one byte is an extent.
    assert run("pin", "d", "64K", "65537") == "d: 128K pinned\n"
    assert run("pin", "d", "128K", "1") == "d: 128K pinned\n"
    assert run("warm", "d").startswith("d: 1.")
    assert filled_extents(daemon) == list(range(33))
    assert daemon.status()["resident_bytes"] == 2 * MIB + 4096
    assert guest.call("compare", path=str(image), offset=0, length=2 * MIB + 10) == 0
    assert "kept (pinned)" in run("evict", "d")
    # What the guest's handler maps behind the page that was wanted, it holds; the guest goes on.
    until(lambda: bool(run("evict", "d")) and filled_extents(daemon) == [1, 2])
    assert daemon.status()["evictions"]["request"] == 31
    assert run("unpin", "d", "64K", "128K") == "d: 64K still pinned\n"
    assert run("evict", "d", "64K", "128K") == "d: 64K evicted, 64K kept (pinned)\n"
    assert filled_extents(daemon) == [2]
    assert run("unpin", "d", "128K", "64K") == "d: 0 still pinned\n"
    assert run("evict", "d") == "d: 64K evicted\n"
    assert os.stat(daemon.frames_path()).st_blocks == 0
    assert guest.call("compare", path=str(image), offset=0, length=2 * MIB + 10) == 0
    assert daemon.mismatches() == []


def test_a_pin_is_loaded_when_it_is_granted_and_refused_whole(
    make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--image", f"d={make_image(8 * MIB)}", "--capacity", "2M")
    assert daemon.request("pin", image="d", offset=MIB, length=MIB)["pinned_bytes"] == MIB
    assert filled_extents(daemon) == list(range(16, 32))
    ended = cowshed("pin", "d", "4M", "1M", "--run-dir", daemon.run_dir)
    assert ended.returncode == 1
    assert "cannot pin 1M" in ended.stderr
    assert daemon.status()["images"][0]["pinned_bytes"] == MIB
    assert filled_extents(daemon) == list(range(16, 32))


def wait_for_digest(daemon: Daemon) -> None:
    until(lambda: bool(daemon.status()["images"][0]["digest"]))


@pytest.fixture
def start_by_hand(run_dir: Path, start_daemon: StartDaemon) -> StartDaemon:
    """A daemon that warms only when it is asked to, so that what is asked for is not there yet."""
    config = run_dir / "by-hand.toml"
    config.write_text("autowarm = false\n")
    return partial(start_daemon, "--config", str(config))


def test_warm_after_a_restart_replays_the_order_of_first_touches(
    make_image: MakeImage, start_by_hand: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    touched = [40, 7, 63, 1, 22]
    daemon = start_by_hand("--image", f"d={image}", "--capacity", "8M")
    wait_for_digest(daemon)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", window_bytes=4096)
    for extent in [*touched, *touched]:
        guest.call("read", offset=extent * EXTENT, length=1)
    assert daemon.status()["images"][0]["working_set_bytes"] == len(touched) * EXTENT
    assert daemon.stop() == 0
    # A cache that has room for n extents but one gets the first n - 1 of them.
    for nr_extents in (3, 4, 5, 8):
        daemon = start_by_hand("--image", f"d={image}", "--capacity", str(nr_extents * EXTENT))
        wait_for_digest(daemon)
        assert daemon.request("warm", image="d")["loaded_bytes"] == (nr_extents - 1) * EXTENT
        assert filled_extents(daemon) == sorted([*touched, 0, 2][: nr_extents - 1])
        assert daemon.stop() == 0


def test_a_short_run_keeps_what_a_longer_one_had_recorded_behind_its_own(
    make_image: MakeImage, start_by_hand: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    for touched in ([40, 7, 63, 1, 22], [22, 30]):
        daemon = start_by_hand("--image", f"d={image}", "--capacity", "8M")
        wait_for_digest(daemon)
        guest = start_guest(daemon.uri)
        guest.call("open", image="d", window_bytes=4096)
        for extent in touched:
            guest.call("read", offset=extent * EXTENT, length=1)
        assert daemon.stop() == 0
    daemon = start_by_hand("--image", f"d={image}", "--capacity", str(6 * EXTENT))
    wait_for_digest(daemon)
    assert daemon.request("warm", image="d")["loaded_bytes"] == 5 * EXTENT
    assert filled_extents(daemon) == sorted([22, 30, 40, 7, 63])


def test_a_working_set_of_another_image_is_not_replayed(
    make_image: MakeImage, start_by_hand: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_by_hand("--image", f"d={make_image(4 * MIB)}")
    wait_for_digest(daemon)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", window_bytes=4096)
    guest.call("read", offset=40 * EXTENT, length=1)
    assert daemon.stop() == 0
    image = make_image(5 * MIB, "other.raw")
    daemon = start_by_hand("--image", f"d={image}", "--capacity", str(3 * EXTENT))
    wait_for_digest(daemon)
    daemon.request("warm", image="d")
    assert filled_extents(daemon) == [0, 1]
    daemon.wait_logged("event=working-set-unusable image=d ")


def test_a_state_dir_that_cannot_be_written_costs_only_the_working_set(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    (run_dir / "state").write_text("in the way")
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    wait_for_digest(daemon)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    guest.call("read", offset=0, length=1)
    assert daemon.stop() == 0
    (line,) = [line for line in daemon.log().splitlines() if "event=working-set-unsaved" in line]
    assert "image=d" in line
    assert str(run_dir / "state") in line
