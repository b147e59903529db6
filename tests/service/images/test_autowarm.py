# SPDX-License-Identifier: Apache-2.0
"""Images are warm again after a restart: behind what guests ask for, until somebody aborts it."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import MakeImage, StartDaemon, StartGuest, cowshed, in_thread, until
from nbd_client import Client
from stage import Stage

from cowshed.accounting import WorkingSet, read_working_set, write_working_set
from cowshed.cache import ExtentState, FileSource, Image, PageStore
from cowshed.cache._core import lib
from cowshed.service.images.autowarm import Autowarm
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.loading import load
from cowshed.service.images.warming import Warming
from cowshed.service.images.working_sets import WorkingSets
from cowshed.transport.nbd.serving import NbdExport, NbdServer

EXTENT = 65536
NR_EXTENTS = 128
WAIT_MS = 60_000


def test_what_guests_touched_is_resident_again_after_a_restart(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 << 20)
    arguments = ("--image", f"d={image}", "--capacity", "64M", "--verbose")
    daemon = start_daemon(*arguments)
    until(lambda: bool(daemon.status()["images"][0]["digest"]))
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    guest.call("fill", offset=1 << 20, length=4096, byte=1)
    status = daemon.status()
    touched = status["images"][0]["working_set_bytes"]
    assert 0 < touched <= status["resident_bytes"]
    guest.kill()
    assert daemon.stop() == 0
    daemon = start_daemon(*arguments)
    until(lambda: "event=autowarmed" in daemon.log())
    assert daemon.status()["resident_bytes"] >= touched
    assert daemon.stop() == 0
    config = image.with_name("cold.toml")
    config.write_text("autowarm = false\n")
    daemon = start_daemon("--config", str(config), *arguments)
    until(lambda: bool(daemon.status()["images"][0]["digest"]))
    assert daemon.status()["resident_bytes"] == 0
    assert "autowarm" not in daemon.log()
    assert cowshed("warm", "--run-dir", str(daemon.run_dir), "--abort", "d").stderr == (
        "cowshed: image 'd' is not being warmed; 'cowshed status' shows which are\n"
    )
    refused = cowshed("warm", "--run-dir", str(daemon.run_dir), "--abort", "d", "0", "4096")
    assert "give no OFFSET and LENGTH" in refused.stderr


@pytest.fixture
def image(make_image: MakeImage) -> Iterator[Image]:
    """Of a store with one loader, which is to stop at its first read; its digest is known."""
    with PageStore(512 * EXTENT, nr_loaders=1) as store:
        image = store.open_image("d", FileSource.open(make_image(NR_EXTENTS * EXTENT)))
        image.digest = "sha256:known"
        lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_STOP, 0, 1)
        yield image
        lib.point_release(lib.POINT_LOAD_READ)


@pytest.fixture
def sets(image: Image, tmp_path: Path) -> WorkingSets:
    """Of an earlier run, which touched every extent."""
    sets = WorkingSets(tmp_path)
    touched = WorkingSet(image.digest, EXTENT, NR_EXTENTS, tuple(range(NR_EXTENTS)))
    write_working_set(sets.path(image), touched)
    return sets


def test_what_is_asked_for_is_loaded_before_what_is_warmed(image: Image, sets: WorkingSets) -> None:
    warming = Warming()
    server = NbdServer(3)
    export = NbdExport(server, image)
    warm = Autowarm(image.store, Evictor(image.store), sets, load, warming)
    warm.start()
    assert lib.point_wait(lib.POINT_LOAD_READ, 1, WAIT_MS) == 0
    until(lambda: image.states().count(ExtentState.LOADING) == 64)
    in_hand = 16  # the loader's, of the 64 that were asked for so far
    ours, theirs = socket.socketpair()
    client = Client(ours, structured=True, extended=False)
    client.connection_no = server.attach(export, theirs.detach(), structured=True)
    wanted = (40, 100)  # one waits in line to be warmed, of the other nobody knows yet
    readers = [in_thread(lambda at=at: client.read(at * EXTENT, 4096)) for at in wanted[:1]]
    until(lambda: export.counters().parked == 1)
    other_ours, other_theirs = socket.socketpair()
    other = Client(other_ours, structured=True, extended=False)
    other.connection_no = server.attach(export, other_theirs.detach(), structured=True)
    readers.append(in_thread(lambda: other.read(wanted[1] * EXTENT, 4096)))
    until(lambda: export.counters().parked == 2)
    (under_way,) = warming.of(image)
    assert (under_way.why, under_way.done_extents, under_way.total_extents) == (
        "autowarm",
        0,
        NR_EXTENTS,
    )
    assert warming.left_bytes(image) == NR_EXTENTS * EXTENT
    lib.point_release(lib.POINT_LOAD_READ)
    until(lambda: not warming.of(image))
    for reader in readers:
        reader.join()
    order = [extent for _, (_, extent), _ in image.store.take_events() or ()]
    assert sorted(order) == list(range(NR_EXTENTS))
    assert sorted(order[:in_hand]) == list(range(in_hand))
    # The run that one of the two is in comes with it.
    assert sorted(order[in_hand : in_hand + 17]) == [*range(32, 48), 100]
    warm.stop()
    server.drain()
    for each in (client, other):
        each.link.close()
    export.close()
    server.close()


def test_a_warming_that_is_aborted_brings_in_what_is_in_hand_and_no_more(
    image: Image, sets: WorkingSets
) -> None:
    warming = Warming()
    warm = Autowarm(image.store, Evictor(image.store), sets, load, warming)
    warm.start()
    assert lib.point_wait(lib.POINT_LOAD_READ, 1, WAIT_MS) == 0
    until(lambda: image.states().count(ExtentState.LOADING) == 64)
    (aborted,) = warming.abort(image)
    assert aborted.is_aborted
    lib.point_release(lib.POINT_LOAD_READ)
    until(lambda: not warming.of(image))
    assert image.wait_loaded(0, NR_EXTENTS, WAIT_MS)
    resident = [no for no, state in enumerate(image.states()) if state == ExtentState.RESIDENT]
    assert resident == list(range(64))
    warm.stop()


def test_a_warming_can_be_aborted_before_its_turn(image: Image, sets: WorkingSets) -> None:
    warming = Warming()
    image.digest = ""  # nobody knows yet what is to be loaded
    warm = Autowarm(image.store, Evictor(image.store), sets, load, warming)
    warm.start()
    until(lambda: bool(warming.of(image)))
    assert warming.abort(image)[0].total_bytes is None
    until(lambda: not warming.of(image))
    image.digest = "sha256:known"
    warm.stop()
    assert image.resident_bytes == 0


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.W_OK), reason="needs /dev/userfaultfd")
def test_what_this_run_alone_touched_is_not_warmed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path)
    try:
        stage.guest(window=1).read(0)
        stage.image.digest = "sha256:known"  # later than the first guest came
        sets = WorkingSets(tmp_path)
        assert sets.recorded(stage.image) == [0]
        warming = Warming()
        with caplog.at_level(logging.INFO):
            warm = Autowarm(stage.store, Evictor(stage.store), sets, load, warming)
            warm.start()
            until(lambda: not warming.of(stage.image))
            warm.stop()
        assert caplog.records == []
    finally:
        stage.close()


def test_a_damaged_working_set_is_told_of_once_and_gone_on_without(
    image: Image, sets: WorkingSets, caplog: pytest.LogCaptureFixture
) -> None:
    path = sets.path(image)
    assert sets.recorded(image) == list(range(NR_EXTENTS))
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(3):
        assert sets.recorded(image) == []
    assert [record.event for record in caplog.records] == ["working-set-unusable"]
    assert "delete it" in caplog.text


def test_a_kill_in_a_save_leaves_the_last_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "d.workingset"
    given = {"digest": "sha256:known", "extent_bytes": EXTENT, "nr_image_extents": 100_000}
    ways = (tuple(range(20_000)), tuple(range(19_999, -1, -1)))
    for turn in range(8):
        child = os.fork()
        if child == 0:
            while True:
                for way in ways:
                    write_working_set(path, WorkingSet(extents=way, **given))  # type: ignore[arg-type]
        before = path.stat().st_mtime_ns if turn else 0
        until(lambda before=before: path.exists() and path.stat().st_mtime_ns != before)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found = read_working_set(path, **given)  # type: ignore[arg-type]
        assert found is not None
        assert found.extents in ways
