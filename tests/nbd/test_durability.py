# SPDX-License-Identifier: Apache-2.0
"""Overlays in --overlay-dir: what a flush promises, and what is done when there is no room."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import StartDaemon, command, until
from nbd_site import MIB, SECONDS, SIZE, Site, run

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder))
    yield folder
    run("umount", str(folder))


def test_what_was_flushed_is_there_after_kill_9(
    make_site: Callable[..., Site], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    overlays = tmp_path / "overlays"
    arguments = ["--overlay-dir", str(overlays)]
    site = make_site(*arguments)
    site.nbdsh(
        """
h.pwrite(b"flushed" * 1000, 10000)
h.zero(65536, 1 << 20)
h.flush()
h.pwrite(b"fua" * 1000, 2 << 20, nbd.CMD_FLAG_FUA)
""",
        "d@g",
    )
    site.cowshed("quota", "g", "1M")
    site.daemon.kill()
    again = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    status = again.daemon.guest_status("g")
    assert (status["state"], status["transport"]) == ("away", "nbd")
    assert status["quota_bytes"] == MIB
    told = again.nbdsh(
        """
print(h.pread(7000, 10000) == b"flushed" * 1000)
print(h.pread(65536, 1 << 20) == bytes(65536))
print(h.pread(3000, 2 << 20) == b"fua" * 1000)
h.pwrite(b"more", 0)
h.flush()
""",
        "d@g",
    )
    assert told.split() == ["True"] * 3
    assert again.daemon.stop() == 0
    third = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    assert "True" in third.nbdsh("print(h.pread(4, 0) == b'more')", "d@g")
    until(lambda: third.daemon.guest_status("g")["state"] == "away")
    third.cowshed("discard", "d@g")
    assert [path.name for path in overlays.iterdir()] == ["lock"]
    assert third.map("cowshed:private", "d@g") == [(0, SIZE, 0)]


def test_an_overlay_of_a_source_that_changed_is_not_used(
    make_site: Callable[..., Site], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    arguments = ["--overlay-dir", str(tmp_path / "overlays")]
    site = make_site(*arguments)
    site.nbdsh("h.pwrite(b'x', 0)", "d@g")
    assert site.daemon.stop() == 0
    with site.path.open("r+b") as image:
        image.write(b"changed")
    again = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    until(lambda: "changed since overlay 'd@g' was made" in again.daemon.log())
    names = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    run("nbdinfo", again.uri("d@g"), status=1)
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == names
    assert len(names) == 4
    assert "True" in again.nbdsh("print(h.pread(7, 0) == b'changed')")


def has_digest(overlays: Path) -> bool:
    """Whether the digest is written with the overlay."""
    return "source_digest" in json.loads((overlays / "d@g.json").read_text())


def touch(path: Path) -> None:
    """Change a file's times, as a backup does."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def ready(site: Site) -> bool:
    """Whether the overlay is served, or refused for good."""
    guests = [guest["name"] for guest in site.daemon.status()["guests"]]
    return guests == ["g"] or "event=overlay-unusable" in site.daemon.log()


def test_an_overlay_of_a_source_that_was_touched_is_used_once_its_digest_is_known(
    make_site: Callable[..., Site], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    overlays = tmp_path / "overlays"
    arguments = ["--overlay-dir", str(overlays)]
    site = make_site(*arguments)
    site.nbdsh("h.pwrite(b'mine', 0)", "d@g")
    until(lambda: has_digest(overlays))
    for _ in range(2):
        assert site.daemon.stop() == 0
        touch(site.path)
        site = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
        until(lambda: ready(site))  # noqa: B023
        site.daemon.wait_logged("event=overlay-waits")
        assert "True" in site.nbdsh("print(h.pread(4, 0) == b'mine')", "d@g")
        site.cowshed("quota", "g", "1M")  # writes the record again
    # What is known is kept: nobody waits for the same time twice.
    site.daemon.kill()
    site = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    assert "event=overlay-waits" not in site.daemon.log()
    assert "True" in site.nbdsh("print(h.pread(4, 0) == b'mine')", "d@g")
    assert site.daemon.mismatches() == []
    assert site.daemon.stop() == 0
    with site.path.open("r+b") as image:
        image.write(b"changed")
    site = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    until(lambda: ready(site))
    site.daemon.wait_logged("changed since overlay 'd@g' was made")
    run("nbdinfo", site.uri("d@g"), status=1)


def test_an_overlay_of_the_release_before_is_used_and_its_digest_kept(
    make_site: Callable[..., Site], start_daemon: StartDaemon, tmp_path: Path
) -> None:
    overlays = tmp_path / "overlays"
    arguments = ["--overlay-dir", str(overlays)]
    site = make_site(*arguments)
    site.nbdsh("h.pwrite(b'mine', 0)", "d@g")
    until(lambda: has_digest(overlays))
    assert site.daemon.stop() == 0
    table = json.loads((overlays / "d@g.json").read_text())
    del table["source_digest"]
    (overlays / "d@g.json").write_text(json.dumps(table))
    site = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    assert "True" in site.nbdsh("print(h.pread(4, 0) == b'mine')", "d@g")
    until(lambda: has_digest(overlays))
    assert site.daemon.stop() == 0
    touch(site.path)
    site = Site(start_daemon("--image", f"d={site.path}", *arguments), site.path)
    until(lambda: ready(site))
    assert "True" in site.nbdsh("print(h.pread(4, 0) == b'mine')", "d@g")


def test_one_folder_is_for_one_daemon(make_site: Callable[..., Site], tmp_path: Path) -> None:
    overlays = str(tmp_path / "overlays")
    site = make_site("--overlay-dir", overlays)
    second = tmp_path / "second"
    second.mkdir()
    words = command("serve", "--run-dir", str(second), "--image", f"d={site.path}")
    done = subprocess.run(
        [*words, "--overlay-dir", overlays],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode != 0
    assert "is in use by another daemon" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_an_error_for_who_writes_and_for_nobody_else(
    make_site: Callable[..., Site], small_disk: Path
) -> None:
    site = make_site("--overlay-dir", str(small_disk))
    told = site.nbdsh(
        f"""
other = nbd.NBD()
other.connect_uri({site.uri("d@other")!r})
other.pwrite(b"o" * 8192, 0)
other.flush()
nr_written = 0
for at in range(0, {4 * MIB}, 65536):
    try:
        h.pwrite(b"w" * 65536, at)
        nr_written += 1
    except nbd.Error as error:
        print(error.errno)
        break
print(0 < nr_written < 64)
print(h.pread(65536, 0) == b"w" * 65536)
print(other.pread(8192, 0) == b"o" * 8192)
print(h.pread(8, 6 << 20) == other.pread(8, 6 << 20))
h.trim({MIB}, 0)
h.flush()
h.pwrite(b"again", 0)
print(h.pread(5, 0) == b"again")
""",
        "d@g",
    )
    assert told.split() == ["ENOSPC", *["True"] * 5]
    assert site.daemon.mismatches() == []
    assert site.daemon.stop() == 0
