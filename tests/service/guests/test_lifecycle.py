# SPDX-License-Identifier: Apache-2.0
"""Guests and the daemon come and go, in every way there is, and leave nothing behind."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS, NOBODY, Daemon, MakeImage, StartDaemon, StartGuest, until
from swarms import Swarm

pytestmark = pytest.mark.slow

MIB = 1 << 20


def test_64_guests_read_all_of_one_image_at_once(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    image = make_image(8 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "32M")
    with Swarm(daemon.uri, "hold", 64, rng, path=str(image)) as swarm:
        assert swarm.results(150) == [{"wrong": 0}] * 64
        status = daemon.status()
        assert [guest["granted_bytes"] for guest in status["guests"]] == [8 * MIB] * 64
        assert status["images"][0]["refs"] == 64 * 128
        assert status["resident_bytes"] == 8 * MIB
        assert status["saved_bytes"] == 63 * 8 * MIB
        assert status["loads"] == 128  # each extent once, however many wanted it
        audit = daemon.request("audit")
        assert audit["mismatches"] == []
        assert (audit["checked"]["guests"], audit["checked"]["refs"]) == (64, 64 * 128)
        swarm.end()
        swarm.process.wait(ANSWER_SECONDS)
    until(lambda: daemon.status()["guests"] == [])
    assert daemon.status()["images"][0]["refs"] == 0
    assert daemon.mismatches() == []


@pytest.mark.timeout(300)
def test_10000_comings_and_goings_leave_nothing_behind(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}", "--capacity", "1M")

    def come_and_go(nr_rounds: int) -> tuple[int, int, int]:
        with Swarm(daemon.uri, "rounds", 4, rng, nr_rounds=nr_rounds) as swarm:
            assert swarm.results(140) == [nr_rounds] * 4
        until(lambda: daemon.status()["guests"] == [])
        assert daemon.mismatches() == []
        assert daemon.status()["images"][0]["refs"] == 0
        return daemon.nr_fds(), daemon.nr_threads(), daemon.resident_set_bytes()

    fds, threads, bytes_before = come_and_go(250)
    _, _, bytes_after = come_and_go(2250)
    until(lambda: daemon.nr_fds() <= fds)
    daemon.until_threads_end(threads)
    assert bytes_after < bytes_before + 4 * MIB
    frames = daemon.frames_path()

    def is_empty() -> bool:
        """Once evicted: what the last guests' readahead asked for may come late."""
        kept = daemon.request("evict", image="d")["kept_bytes"]
        return (kept, os.stat(frames).st_blocks) == (0, 0)

    until(is_empty)
    assert daemon.stop() == 0


def test_a_killed_guest_returns_its_grants(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}")
    guest = start_guest(daemon.uri, NOBODY if os.geteuid() == 0 else None)
    guest.call("open", image="d", guest="g")
    guest.call("fill", offset=0, length=2 * MIB, byte=1)
    assert daemon.guest_status("g")["private_bytes"] == 2 * MIB
    assert daemon.status()["images"][0]["refs"] == 32
    guest.kill()
    until(lambda: daemon.status()["guests"] == [])
    assert daemon.status()["images"][0]["refs"] == 0
    assert daemon.mismatches() == []


def test_a_killed_guest_is_detached_though_another_process_holds_its_connection(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    guest.call("hash", offset=0, length=2 * MIB)
    holder = guest.call("lend_connection")
    try:
        guest.process.kill()
        until(lambda: daemon.status()["guests"] == [])
        assert daemon.status()["images"][0]["refs"] == 0
    finally:
        os.kill(holder, signal.SIGKILL)
    again = start_guest(daemon.uri)
    assert again.call("open", image="d", guest="g") == 2 * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes a pid namespace")
def test_a_guest_with_a_proc_of_its_own_attaches(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(MIB)
    daemon = start_daemon("--image", f"d={image}")
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    guests = [start_guest(daemon.uri, uid, before=container) for uid in (None, NOBODY)]
    for guest in guests:
        assert guest.call("pid") == 1
        guest.call("open", image="d", guest=f"g{id(guest)}")
        guest.call("fill", offset=4096 - 1, length=2, byte=3)
        assert guest.call("compare", path=str(image), offset=0, length=MIB) == 2
    assert [guest["private_bytes"] for guest in daemon.status()["guests"]] == [8192, 8192]
    assert daemon.mismatches() == []
    assert daemon.request("audit")["checked"]["private_pages"] == 4


def test_sigterm_ends_the_daemon_with_guests_attached(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(4 * MIB)}", "--capacity", "1M")
    idle, stopped, busy = guests = [start_guest(daemon.uri) for _ in range(3)]
    for no, guest in enumerate(guests):
        guest.call("open", image="d", guest=f"g{no}", quota_bytes=8192)
    idle.call("hash", offset=0, length=4 * MIB)
    stopped.start("fill", offset=0, length=4 * MIB, byte=1)
    until(lambda: daemon.guest_status("g1")["state"] == "stopped-quota")
    busy.start("compare", path=str(daemon.run_dir / "image.raw"), offset=0, length=4 * MIB, step=7)
    assert daemon.stop() == 0
    left = {path.name for path in daemon.run_dir.iterdir()}
    # What guests touched is kept in "state", unless that takes long.
    assert left - {"state"} == {"image.raw", "lock", "log"}
    log = daemon.log()
    assert "event=stopping" in log
    assert "traceback" not in log


def test_shutdown_on_request_answers_before_it_ends(
    make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    assert daemon.request("shutdown") == {"ok": True}
    assert daemon.process.wait(ANSWER_SECONDS) == 0


def test_a_daemon_at_once_after_another_serves_the_same_run_dir(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(MIB)
    first = start_daemon("--image", f"d={image}")
    assert first.stop() == 0
    second: Daemon = start_daemon("--image", f"d={image}")
    guest = start_guest(second.uri)
    guest.call("open", image="d")
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0


STOPPED = """
import contextlib, sys
from cowshed.service.daemon import Daemon
from cowshed.service.settings.config import config_load
with contextlib.ExitStack() as stack:
    daemon = Daemon(config_load(images=[f"d={sys.argv[1]}"], run_dir=sys.argv[2]), stack)
    print(daemon.control.is_stopping())
    daemon.workers.stop()
    print(daemon.control.is_stopping())
"""


def test_operators_requests_are_told_that_the_daemon_is_to_stop(
    make_image: MakeImage, run_dir: Path
) -> None:
    command = [sys.executable, "-c", STOPPED, str(make_image(MIB)), str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr
