# SPDX-License-Identifier: Apache-2.0
"""Faults switched on in a daemon: notifications that are lost, memory and disk that are full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, until
from nbd_site import Site
from switches import BEFORE, switch

from cowshed.cache import UsageError

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096
SIZE = 6 * MIB
LOST = {"errno": errno.EAGAIN, "times": 0}


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def daemon(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon("--image", f"d={image}", "--capacity", "4M", before=BEFORE)


def test_nothing_can_be_switched_in_production(start_daemon: StartDaemon, image: Path) -> None:
    daemon = start_daemon("--image", f"d={image}")
    with pytest.raises(UsageError, match="point"):
        switch(daemon, "LOAD_READ", "fail", errno=5)


def test_an_unknown_switch_is_refused(daemon: Daemon) -> None:
    for name in ("NO_SUCH", "DELAY", "NR"):
        with pytest.raises(UsageError, match="no point"):
            switch(daemon, name, "fail", errno=5)


def test_loaders_are_given_room_though_the_evictor_is_not_told(
    daemon: Daemon, start_guest: StartGuest, image: Path
) -> None:
    switch(daemon, "WAKE_EVICTOR", "fail", **LOST)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    assert daemon.status()["evicted_extents"] > 0


def test_a_guest_that_stopped_is_said_to_have_though_the_daemon_is_not_told(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    switch(daemon, "WAKE_SERVICE", "fail", **LOST)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g", quota_bytes=PAGE)
    guest.start("fill", offset=0, length=2 * PAGE, byte=1)
    until(lambda: "event=quota-stop guest=g" in daemon.log())
    daemon.request("quota", guest="g", quota_bytes=2 * PAGE)
    guest.finish()
    until(lambda: "event=quota-resume guest=g" in daemon.log())


def test_a_client_is_answered_though_no_thread_is_woken(daemon: Daemon, image: Path) -> None:
    site = Site(daemon, image)
    switch(daemon, "WAKE_NBD", "fail", **LOST)
    read = f"print(h.pread(65536, 0) == open({str(image)!r}, 'rb').read(65536))"
    assert site.nbdsh(read, "d@g").split() == ["True"]


def test_a_client_that_left_is_let_go_though_the_daemon_is_not_told(
    daemon: Daemon, image: Path
) -> None:
    switch(daemon, "WAKE_NBD_ENDED", "fail", **LOST)
    Site(daemon, image).nbdsh("h.pwrite(b'x' * 4096, 0)", "d@g")
    until(lambda: daemon.guest_status("g")["state"] == "away")


@pytest.mark.parametrize("in_files", [False, True], ids=["in memory", "in files"])
def test_a_write_that_finds_no_room_is_enospc_and_changes_nothing(
    start_daemon: StartDaemon, image: Path, run_dir: Path, in_files: bool
) -> None:
    more = [f"--overlay-dir={run_dir}/overlays"] if in_files else []
    daemon = start_daemon("--image", f"d={image}", *more, before=BEFORE)
    site = Site(daemon, image)
    site.nbdsh("h.pwrite(b'old!' * 1024, 8192)", "d@g")
    switch(daemon, "OVERLAY_WRITTEN", "fail", errno=errno.ENOSPC)
    told = site.nbdsh(
        "try:\n    h.pwrite(b'new!' * 1024, 12288)\nexcept nbd.Error as error: print(error.errno)\n"
        "print(h.pread(4096, 8192) == b'old!' * 1024)\n"
        f"print(h.pread(4096, 12288) == open({str(image)!r}, 'rb').read(16384)[12288:])\n"
        "h.pwrite(b'new!' * 1024, 12288)\n"
        "print(h.pread(4096, 12288) == b'new!' * 1024)",
        "d@g",
    )
    assert told.split() == ["ENOSPC", "True", "True", "True"]
    assert daemon.guest_status("g")["private_bytes"] == 2 * PAGE
    assert daemon.mismatches() == []


@pytest.mark.parametrize("point", ["OVERLAY_FLUSH", "OVERLAY_SYNCED", "OVERLAY_MAPPED"])
def test_a_flush_that_finds_no_room_is_an_error_and_the_next_one_is_good(
    start_daemon: StartDaemon, image: Path, run_dir: Path, point: str
) -> None:
    folder = run_dir / "overlays"
    daemon = start_daemon("--image", f"d={image}", f"--overlay-dir={folder}", before=BEFORE)
    site = Site(daemon, image)
    switch(daemon, point, "fail", errno=errno.ENOSPC)
    told = site.nbdsh(
        "h.pwrite(b'mine' * 1024, 8192)\n"
        "try:\n    h.flush()\nexcept nbd.Error as error: print(error.errno)\n"
        "h.flush()\nprint('flushed')",
        "d@g",
    )
    assert told.split()[-1] == "flushed"
    assert told.split()[0] in ("ENOSPC", "EIO")
    daemon.kill()
    os.unlink(daemon.run_dir / "cowshed.sock")
    again = start_daemon("--image", f"d={image}", f"--overlay-dir={folder}")
    assert "True" in Site(again, image).nbdsh("print(h.pread(4096, 8192) == b'mine' * 1024)", "d@g")
