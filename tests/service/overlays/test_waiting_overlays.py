# SPDX-License-Identifier: Apache-2.0
"""Overlays whose image's source has another time wait for its digest, and no client waits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import MakeImage

from cowshed.cache import FileSource, Image, PageStore, UsageError
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.images.digests import digest_of
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.entrance import Entering, Entrance, NotYetError
from cowshed.service.overlays.files import OverlayFiles
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlay_restorer import OverlayRestorer
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.transport.nbd.serving import NbdServer

MIB = 1 << 20
CLAIM = Claim(("me",), 0, False, "nbd")


@contextlib.contextmanager
def served(path: Path, folder: Path) -> Iterator[tuple[OverlayTable, Image]]:
    """A table as a daemon has it that has just begun: digests are not known."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(PageStore(4 * MIB))
        image = store.open_image("d", FileSource.open(path))
        core = NbdServer(1)
        stack.callback(core.close)
        files = OverlayFiles(folder)
        stack.callback(files.close)
        table = OverlayTable(core, GuestTable(), Admission(1024), OverlayLimits(), files)
        stack.callback(table.close)
        OverlayRestorer(table).restore([image])
        yield table, image


def find_digest(table: OverlayTable, image: Image) -> None:
    image.digest = digest_of(image.source)
    OverlayRestorer(table).note_digest(image)


@pytest.fixture
def touched(make_image: MakeImage, tmp_path: Path) -> Path:
    """An image of which there is an overlay, and that has another time since."""
    path = make_image(MIB)
    with served(path, tmp_path) as (table, image):
        find_digest(table, image)
        table.leave(table.enter(image, "g", CLAIM))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return path


def test_a_client_is_told_to_try_again_until_the_digest_is_known(
    touched: Path, tmp_path: Path
) -> None:
    with served(touched, tmp_path) as (table, image):
        for ask in (table.check, table.enter):
            with pytest.raises(UsageError, match=r"'d@g' cannot be used yet: .* try again"):
                ask(image, "g", CLAIM)
        with pytest.raises(UsageError, match="taken"):
            table.check_name(image.domain, "g")
        find_digest(table, image)
        assert table.enter(image, "g", CLAIM).label == "d@g"


def test_an_overlay_that_waited_in_vain_is_refused_and_left_as_it_is(
    touched: Path, tmp_path: Path
) -> None:
    written = touched.read_bytes()
    touched.write_bytes(b"changed" + written[7:])
    before = (tmp_path / "d@g.json").read_bytes()
    with served(touched, tmp_path) as (table, image):
        find_digest(table, image)
        with pytest.raises(UsageError, match="unusable when the daemon started"):
            table.enter(image, "g", CLAIM)
    assert (tmp_path / "d@g.json").read_bytes() == before
    touched.write_bytes(written)
    with served(touched, tmp_path) as (table, image):
        find_digest(table, image)
        assert table.enter(image, "g", CLAIM).label == "d@g"


def test_the_digest_of_a_source_that_was_written_to_meanwhile_is_not_kept(
    make_image: MakeImage, tmp_path: Path
) -> None:
    path = make_image(MIB)
    with served(path, tmp_path) as (table, image):
        table.leave(table.enter(image, "g", CLAIM))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        find_digest(table, image)
    assert "source_digest" not in (tmp_path / "d@g.json").read_text()


def test_a_digest_that_comes_while_an_overlay_is_made_is_kept_with_it(
    make_image: MakeImage, tmp_path: Path
) -> None:
    side = SideThreads()
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    with served(make_image(MIB), tmp_path) as (table, image):
        entrance = Entrance(table, side, calls.put)
        client = Entering(lambda: entrance.enter(client, image, "g", CLAIM))
        with pytest.raises(NotYetError):
            entrance.enter(client, image, "g", CLAIM)
        end = calls.get(timeout=60)
        assert "source_digest" not in json.loads((tmp_path / "d@g.json").read_text())
        find_digest(table, image)
        end()
        assert side.wait_all(60)
        written = json.loads((tmp_path / "d@g.json").read_text())
        assert written["source_digest"] == image.digest
        entrance.close()
