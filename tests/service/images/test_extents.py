# SPDX-License-Identifier: Apache-2.0
"""Images whose extents have another size than the others': served, counted, and restored."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from domains import (
    ANSWER_SECONDS,
    NOBODY,
    Daemon,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    cowshed,
    kill_backend,
    until,
)
from nbd_site import Site
from swarms import Swarm

from cowshed.cache import probe_huge_frames
from cowshed.service.images.extents import resolve_extents
from cowshed.service.settings.config import Config, config_load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        probe_huge_frames() is not None, reason="needs to mount a tmpfs: run as root"
    ),
]

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
# Not a whole number of extents, of either size.
SIZE = 21 * MIB + 3 * PAGE + 100
UNPRIVILEGED = ("setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin")


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


def of(daemon: Daemon, name: str) -> dict[str, Any]:
    (found,) = [each for each in daemon.status()["images"] if each["name"] == name]
    return dict(found)


def test_both_sizes_share_one_capacity_which_is_never_exceeded(
    image: Path, start_daemon: StartDaemon, rng: random.Random
) -> None:
    daemon = start_daemon(
        f"--image=big={image},extent=2M", f"--image=small={image}", "--capacity=12M"
    )
    assert [of(daemon, name)["extent_bytes"] for name in ("big", "small")] == [2 * MIB, 64 * KIB]
    reads = {"path": str(image), "nr_reads": 100}
    with (
        Swarm(daemon.uri, "read_randomly", 4, rng, name="big", **reads) as big,
        Swarm(daemon.uri, "read_randomly", 4, rng, name="small", **reads) as small,
    ):
        assert [*big.results(), *small.results()] == [{"wrong": 0}] * 8
    status = daemon.status()
    assert 6 * MIB < status["resident_bytes"] + status["standby"]["bytes"] <= 12 * MIB
    assert status["evictions"]["pressure"] > 0
    frames = [
        fd
        for fd in Path(f"/proc/{daemon.pid}/fd").iterdir()
        if os.readlink(fd).startswith("/memfd:cowshed-image")
    ]
    memory = {(found.st_dev, found.st_ino): found.st_blocks * 512 for found in map(os.stat, frames)}
    assert sum(memory.values()) == status["resident_bytes"]
    assert len(memory) == 2
    assert daemon.mismatches() == []


def test_a_capacity_of_two_large_extents_serves_both_sizes(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon(
        f"--image=big={image},extent=2M", f"--image=small={image}", "--capacity=4M"
    )
    digests = set()
    for name in ("big", "small", "big", "small"):
        guest = start_guest(daemon.uri)
        guest.call("open", image=name)
        digests.add(guest.call("hash", offset=0, length=SIZE))
    assert len(digests) == 1
    assert daemon.status()["resident_bytes"] <= 4 * MIB
    assert daemon.mismatches() == []


@pytest.mark.parametrize("standby", [0, 20])
def test_only_large_extents_fill_the_capacity_but_for_the_watermarks(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, standby: int
) -> None:
    daemon = start_daemon(
        f"--image=d={image}", "--extent=2M", "--capacity=16M", f"--standby={standby}"
    )
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    guest.call("hash", offset=0, length=SIZE)
    assert of(daemon, "d")["extent_bytes"] == 2 * MIB
    assert daemon.status()["resident_bytes"] + daemon.status()["standby"]["bytes"] >= 10 * MIB
    assert daemon.mismatches() == []


def test_operators_commands_and_nbd_clients_see_the_images_extents(
    image: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(f"--image=d={image},extent=2M", "--capacity=32M")
    daemon.request("warm", image="d", offset=3 * MIB, length=1)
    assert daemon.status()["resident_bytes"] == 2 * MIB
    assert daemon.request("pin", image="d", offset=0, length=2 * MIB)["pinned_bytes"] == 2 * MIB
    site = Site(daemon, image)
    content = image.read_bytes()
    told = site.nbdsh(
        f"import hashlib; print(hashlib.sha256(h.pread({5 * MIB}, {MIB} + 7)).hexdigest())"
    )
    assert told.strip() == hashlib.sha256(content[MIB + 7 : 6 * MIB + 7]).hexdigest()
    evicted = daemon.request("evict", image="d")
    assert (evicted["kept_bytes"], evicted["kept_why"]) == (2 * MIB, "pinned")
    assert daemon.status()["resident_bytes"] == 2 * MIB
    assert daemon.mismatches() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_successor_has_the_frames_of_large_extents(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, number: signal.Signals
) -> None:
    kept = start_daemon(
        f"--image=big={image},extent=2M", f"--image=small={image}", "--capacity=64M", kept=True
    )
    guest = start_guest(kept.uri, uid=NOBODY)
    guest.call("open", image="big", guest="g", quota_bytes=MIB)
    digest = guest.call("hash", offset=0, length=SIZE)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    kept.request("pin", image="big", offset=0, length=2 * MIB)
    before = of(kept, "big")
    kill_backend(kept, number)
    after = of(kept, "big")
    for key in ("extent_bytes", "resident_bytes", "pinned_bytes", "loads"):
        assert after[key] == before[key], key
    guest.call("discard", offset=10 * PAGE, length=PAGE)
    kept.request("evict", image="big")
    assert of(kept, "big")["resident_bytes"] == 2 * MIB
    assert guest.call("hash", offset=0, length=SIZE) == digest
    assert kept.mismatches() == []


def test_a_takeover_keeps_the_extents_and_refuses_to_change_them(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    same = [f"--image=big={image},extent=2M", f"--image=small={image}"]
    old = start_daemon(*same, kept=True)
    guest = start_guest(old.uri)
    guest.call("open", image="big", guest="g")
    digest = guest.call("hash", offset=0, length=SIZE)
    loads = of(old, "big")["loads"]
    takes = ("serve", "--takeover", "--run-dir", old.run_dir)
    for other, why in (
        ([f"--image=big={image}", same[1]], "image 'big' has extents of 2097152 bytes, and of 65"),
        ([same[0], f"--image=small={image},extent=32K"], "image 'small' has extents of 65536"),
        ([*same, "--extent=32K"], "the daemon has extents of 65536 bytes"),
    ):
        refused = cowshed(*takes, *other)
        assert (refused.returncode, why in refused.stderr) == (1, True), refused.stderr
    taker = subprocess.Popen(
        command(*map(str, takes), *same), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert old.process.wait(ANSWER_SECONDS) == 0
        until(lambda: old.status()["pid"] == int((old.run_dir / "lock").read_text()))
        assert (of(old, "big")["extent_bytes"], of(old, "big")["loads"]) == (2 * MIB, loads)
        old.request("evict", image="big")
        assert guest.call("hash", offset=0, length=SIZE) == digest
        assert old.mismatches() == []
    finally:
        os.kill(int((old.run_dir / "lock").read_text()), signal.SIGTERM)
        taker.wait(ANSWER_SECONDS)


def test_a_daemon_that_may_not_mount_says_so_once_and_serves_smaller_extents(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    kept = start_daemon(
        f"--image=d={image},extent=2M", f"--image=e={image}", before=UNPRIVILEGED, kept=True
    )
    line = "event=huge-frames-refused images=d "
    kept.wait_logged(line, 1)
    assert "mounting one failed (Operation not permitted)" in kept.log()
    assert "give the daemon CAP_SYS_ADMIN" in kept.log()
    assert of(kept, "d")["extent_bytes"] == 64 * KIB
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    digest = guest.call("hash", offset=0, length=SIZE)
    assert digest == guest.call("hash", offset=0, length=SIZE)
    loads = of(kept, "d")["loads"]
    kill_backend(kept)
    assert of(kept, "d")["loads"] == loads
    assert kept.mismatches() == []


def refused() -> OSError:
    return OSError(1, "Operation not permitted")


def test_what_is_configured_decides_which_images_change_if_no_tmpfs_can_be_mounted() -> None:
    """The others keep theirs, and the default is never raised."""

    def extents(config: Config) -> list[int]:
        config = resolve_extents(config, is_logged=False, probe=refused)
        return [config.extent_bytes, *map(config.extent_of, config.images)]

    images = ["a=/a,extent=2M", "b=/b,extent=32K", "c=/c"]
    assert extents(config_load(images=images)) == [64 * KIB, 64 * KIB, 32 * KIB, 64 * KIB]
    assert extents(config_load(images=images, extent="16K")) == [
        *(16 * KIB, 16 * KIB, 32 * KIB, 16 * KIB)
    ]
    assert extents(config_load(images=images, extent="2M")) == [
        *(64 * KIB, 64 * KIB, 32 * KIB, 64 * KIB)
    ]
