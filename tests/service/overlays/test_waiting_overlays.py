# SPDX-License-Identifier: Apache-2.0
"""Overlays whose image's source has another time wait for its digest, and no client waits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import SUPPORT, MakeImage

from cowshed.cache import FileSource, Image, PageStore, UsageError
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.images.digests import digest_of
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.entrance import Entering, Entrance, NotYetError
from cowshed.service.overlays.files import OverlayFiles
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlay_records import OverlayRecords
from cowshed.service.overlays.overlay_restorer import OverlayRestorer
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.transport.nbd.serving import NbdServer

MIB = 1 << 20
CLAIM = Claim(("me",), 0, False, "nbd")


# Writes a page to an overlay, gives its descriptors away, and dies: nothing is flushed.
DYING = """
import os, socket, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_waiting_overlays import CLAIM, find_digest, served
from cowshed.service.persist.fd_store import FdStore
kept = FdStore(None)
with served(Path(sys.argv[1]), Path(sys.argv[2]), kept) as (table, image):
    find_digest(table, image)
    table.enter(image, "g", CLAIM).overlay.store(0, b"w" * 4096)
    ((name, fds),) = kept.groups.items()
    with socket.socket(fileno=int(sys.argv[3])) as sock:
        socket.send_fds(sock, [name.encode()], fds)
    os._exit(0)
"""


@contextlib.contextmanager
def served(
    path: Path,
    folder: Path,
    kept: FdStore | None = None,
    inherited: InheritedFds | None = None,
) -> Iterator[tuple[OverlayTable, Image]]:
    """A table as a daemon has it that has just begun: digests are not known."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(PageStore(4 * MIB))
        image = store.open_image("d", FileSource.open(path))
        core = NbdServer(1)
        stack.callback(core.close)
        files = OverlayFiles(folder)
        stack.callback(files.close)
        records = OverlayRecords(kept or FdStore(None))
        table = OverlayTable(core, GuestTable(), Admission(1024), OverlayLimits(), files, records)
        stack.callback(table.close)
        OverlayRestorer(table).restore([image], inherited)
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


@pytest.mark.parametrize("is_the_same", [True, False])
def test_what_a_dead_backend_had_not_flushed_is_there_after_the_wait(
    make_image: MakeImage, tmp_path: Path, is_the_same: bool
) -> None:
    path = make_image(MIB)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [path, tmp_path, str(theirs.fileno()), Path(__file__).parent, SUPPORT]
        subprocess.run(
            [sys.executable, "-c", DYING, *words], pass_fds=[theirs.fileno()], check=True
        )
        name, fds, _, _ = socket.recv_fds(ours, 256, 16)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    groups = {name.decode(): fds}
    kept = FdStore(None, groups)
    inherited = InheritedFds(groups)
    with served(path, tmp_path, kept, inherited) as (table, image):
        assert list(kept.groups) == [name.decode()], "it waits with what was left of it"
        if not is_the_same:
            image.digest = "sha256:" + "0" * 64
            OverlayRestorer(table).note_digest(image)
            assert kept.groups == {}
            return
        find_digest(table, image)
        guest = table.enter(image, "g", CLAIM)
        assert guest.overlay.load(0, 1) == b"w" * 4096
        assert guest.account.private_bitmap()[0] == 1
        table.leave(guest)
    inherited.close()
