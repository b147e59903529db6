# SPDX-License-Identifier: Apache-2.0
"""Overlays in files: what a flush promised is there after a kill at any point, and torn maps."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nbd_client import FLUSH, FUA, TRIM
from nbd_stage import NbdStage
from stage import PAGE, MakeStage, fail_at, let_go, stop_at, wait_at

from cowshed.cache import SourceError, UsageError
from cowshed.cache._core import lib

CHILD = Path(__file__).parents[2] / "support/overlay_child.py"
BLOCK = 4096


@pytest.mark.parametrize("point", ["WRITTEN", "FLUSH", "SYNCED", "MAPPED"])
def test_a_kill_loses_nothing_that_was_flushed(
    point: str, tmp_path: Path, make_stage: MakeStage
) -> None:
    child = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path), str(getattr(lib, f"POINT_OVERLAY_{point}"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stdout + child.stderr
    nbd = NbdStage(make_stage(nr_pages=64))
    try:
        overlay = nbd.overlay(files=tmp_path)
        got = nbd.client(nbd.export(overlay)).read(0, nbd.size_bytes)
        # What was trimmed and not flushed is as it was before or as the image; never anything else.
        trimmed = nbd.bytes[: 5 * PAGE] if point == "MAPPED" else b"\1" * 5 * PAGE
        assert got[: 5 * PAGE] == trimmed
        # A page that was the guest's already has its old bytes or its new ones.
        new = {
            page for page in range(5, 10) if got[page * PAGE : (page + 1) * PAGE] == b"\2" * PAGE
        }
        for page in set(range(5, 10)) - new:
            assert got[page * PAGE : (page + 1) * PAGE] == b"\1" * PAGE
        fresh = b"\2" * 5 * PAGE if point == "MAPPED" else nbd.bytes[10 * PAGE : 15 * PAGE]
        assert got[10 * PAGE : 15 * PAGE] == fresh
        assert got[15 * PAGE :] == nbd.bytes[15 * PAGE :]
        private = int.from_bytes(overlay.account.private_bitmap(), "little")
        assert int.from_bytes(overlay.stored_bitmap(), "little") & ~private == 0
    finally:
        nbd.close()


def fill(nbd: NbdStage, folder: Path, page: int, *, flags: int = 0) -> None:
    client = nbd.client(nbd.export(nbd.overlay(files=folder)))
    assert client.write(page * PAGE, b"%c" % (page + 1) * PAGE, flags) == 0
    nbd.disconnect()


def read(nbd: NbdStage, folder: Path, page: int) -> bytes:
    data = nbd.client(nbd.export(nbd.overlay(files=folder))).read(page * PAGE, PAGE)
    nbd.disconnect()
    return data


def slots(folder: Path) -> list[bytes]:
    """The two slots of the first block, the older one first."""
    both = (folder / "x.map").read_bytes()[BLOCK : 3 * BLOCK]
    return sorted((both[:BLOCK], both[BLOCK:]), key=lambda slot: int.from_bytes(slot[:8], "little"))


def put_slot(folder: Path, slot: bytes, content: bytes) -> None:
    with (folder / "x.map").open("r+b") as table:
        table.seek(BLOCK * (1 + (slot[0] & 1)))
        table.write(content)


@pytest.mark.parametrize("nr_bytes", [0, 1, 512, 2048, 4095])
def test_a_torn_map_is_as_it_was_before(nbd: NbdStage, tmp_path: Path, nr_bytes: int) -> None:
    fill(nbd, tmp_path, 3)
    before = slots(tmp_path)[0]
    fill(nbd, tmp_path, 9)
    newest = slots(tmp_path)[1]
    put_slot(tmp_path, newest, newest[:nr_bytes] + before[nr_bytes:])
    assert read(nbd, tmp_path, 3) == b"\4" * PAGE
    assert read(nbd, tmp_path, 9) == nbd.bytes[9 * PAGE : 10 * PAGE]


def test_a_map_with_no_whole_slot_is_refused_and_left_alone(nbd: NbdStage, tmp_path: Path) -> None:
    fill(nbd, tmp_path, 3)
    for slot in slots(tmp_path):
        put_slot(tmp_path, slot, slot[:100] + bytes(BLOCK - 100))
    damaged = (tmp_path / "x.map").read_bytes()
    with pytest.raises(SourceError, match="damaged"):
        nbd.overlay(files=tmp_path)
    assert (tmp_path / "x.map").read_bytes() == damaged


def test_files_of_another_image_or_of_somebody_else_are_refused(
    nbd: NbdStage, tmp_path: Path
) -> None:
    fill(nbd, tmp_path, 3)
    with pytest.raises(UsageError, match="another image"):
        nbd.overlay(files=tmp_path, identity=b"j" * 32)
    nbd.overlay(files=tmp_path)
    with pytest.raises(UsageError, match="open in another process"):
        nbd.overlay(files=tmp_path)


def test_pages_found_in_files_are_charged_past_the_quota(nbd: NbdStage, tmp_path: Path) -> None:
    client = nbd.client(nbd.export(nbd.overlay(files=tmp_path)))
    assert client.write(0, b"x" * 20 * PAGE) == 0
    nbd.disconnect()
    overlay = nbd.overlay(quota=10, files=tmp_path)
    assert overlay.account.status().private_pages == 20
    client = nbd.client(nbd.export(overlay))
    assert client.write(0, b"y" * PAGE) == 0
    assert client.write(30 * PAGE, b"y" * PAGE) == errno.ENOSPC


def test_a_flush_waits_for_the_disk_and_nobody_else_does(nbd: NbdStage, tmp_path: Path) -> None:
    export = nbd.export(nbd.overlay(files=tmp_path))
    client, other = nbd.client(export), nbd.client(export)
    assert client.write(0, b"x" * PAGE) == 0
    stop_at(lib.POINT_OVERLAY_SYNCED)
    flush = client.start(FLUSH)
    durable = other.start(1, PAGE, flags=FUA, payload=b"y" * PAGE)
    wait_at(lib.POINT_OVERLAY_SYNCED)
    assert client.read(0, PAGE) == b"x" * PAGE
    assert other.write(2 * PAGE, b"z" * PAGE) == 0
    assert client.order[-1] != flush
    let_go(lib.POINT_OVERLAY_SYNCED)
    assert client.finish(flush).error == 0
    assert other.finish(durable).error == 0


def test_a_flush_that_fails_says_so_and_the_next_one_tries_again(
    nbd: NbdStage, tmp_path: Path
) -> None:
    client = nbd.client(nbd.export(nbd.overlay(files=tmp_path)))
    assert client.write(0, b"x" * PAGE) == 0
    fail_at(lib.POINT_OVERLAY_MAPPED, errno.EIO)
    assert client.call(FLUSH).error == errno.EIO
    assert client.write(PAGE, b"y" * PAGE, FUA) == errno.EIO
    let_go(lib.POINT_OVERLAY_MAPPED)
    assert client.call(FLUSH).error == 0
    nbd.disconnect()
    assert read(nbd, tmp_path, 0) == b"x" * PAGE


@pytest.mark.parametrize("kind", ["write", "part"])
def test_a_full_disk_is_no_space_for_that_request_alone(
    nbd: NbdStage, tmp_path: Path, kind: str
) -> None:
    overlay = nbd.overlay(files=tmp_path)
    client = nbd.client(nbd.export(overlay))
    assert client.write(0, b"x" * PAGE) == 0
    fail_at(lib.POINT_OVERLAY_WRITTEN, errno.ENOSPC)
    data = b"y" * (PAGE if kind == "write" else 9)
    assert client.write(5 * PAGE, data) == errno.ENOSPC
    let_go(lib.POINT_OVERLAY_WRITTEN)
    assert overlay.account.status().private_pages == 1
    assert client.read(0, 6 * PAGE) == b"x" * PAGE + nbd.bytes[PAGE : 6 * PAGE]
    assert client.call(TRIM, 0, PAGE).error == 0
    assert client.read(0, PAGE) == nbd.bytes[:PAGE]
