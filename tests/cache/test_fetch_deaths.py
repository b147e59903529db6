# SPDX-License-Identifier: Apache-2.0
"""A process that dies while it fetches leaves whole extents, and the rest ABSENT."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from domains import plain_environment
from stage import EXTENT_PAGES, PAGE, content

from cowshed.cache import ExtentState, InheritedImage, PageStore, RemoteSource
from cowshed.cache._core import lib

SCRIPT = Path(__file__).parents[1] / "support" / "doomed_fetch.py"
EXTENT = EXTENT_PAGES * PAGE
SIZE = 7 * EXTENT + 3 * PAGE + 100


def left_by(path: Path, point: int) -> InheritedImage:
    """Let a fetch begin and its process die; return what it left."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(theirs.fileno()), str(path), str(point)],
        env=plain_environment(),
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    with ours:
        _, fds, _, _ = socket.recv_fds(ours, 16, 3)
        said = ours.recv(16)
    assert process.wait() == -signal.SIGKILL
    assert said == (b"" if point >= 0 else b"done")
    return InheritedImage(*fds)


@pytest.mark.parametrize(
    ("point", "nr_whole"),
    [
        ("FETCH_TAKEN", 0),
        ("FETCH_FILL", 2),
        ("LOAD_FILL", 2),
        ("LOAD_PUBLISH", 2),
        ("LOAD_ANSWER", 3),
        (None, 2),
    ],
)
def test_a_fetch_cut_short_leaves_whole_extents_and_is_fetched_again(
    tmp_path: Path, point: str | None, nr_whole: int
) -> None:
    path, bytes_of_source = tmp_path / "source", content(0, 8 * EXTENT_PAGES)[:SIZE]
    path.write_bytes(bytes_of_source)
    left = left_by(path, -1 if point is None else getattr(lib, f"POINT_{point}"))
    with PageStore(80 * EXTENT) as store:
        queue = store.open_queue()
        source = RemoteSource("http://origin/image", SIZE, '"1"', 0)
        image = store.adopt_image("image", source, left, queue=queue)
        expected = [ExtentState.RESIDENT] * nr_whole + [ExtentState.ABSENT] * (8 - nr_whole)
        assert list(image.states()) == expected
        assert os.fstat(image.frames_fd).st_blocks * 512 == nr_whole * EXTENT
        assert store.counters().reserved_extents == nr_whole
        assert store.counters().loading_extents == 0
        store.check()
        assert image.prefetch(0, 8) == 8 - nr_whole
        fetch = queue.take(60.0)
        assert fetch is not None
        assert (fetch.offset_bytes, fetch.length_bytes) == (
            nr_whole * EXTENT,
            SIZE - nr_whole * EXTENT,
        )
        assert fetch.fill(bytes_of_source[fetch.offset_bytes :])
        fetch.end()
        assert set(image.states()) == {ExtentState.RESIDENT}
        whole = bytes_of_source + bytes(-SIZE % PAGE)
        assert os.pread(image.frames_fd, len(whole), 0) == whole
        store.check()
