# SPDX-License-Identifier: Apache-2.0
"""Who comes while the last overlay of the same name is being removed waits, and gets a new one."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from domains import MakeImage, in_thread, until

from cowshed.cache import FileSource, Image, PageStore, UsageError
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.entrance import Entering, Entrance, NotYetError
from cowshed.service.overlays.files import OverlayFiles
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.transport.nbd.serving import NbdServer

MIB = 1 << 20
CLAIM = Claim(("me",), 0, False, "nbd")


@dataclass
class Place:
    """A table and its entrance, with a loop that runs one call at a time."""

    image: Image
    table: OverlayTable
    entrance: Entrance
    posted: queue.SimpleQueue[Callable[[], None]]
    entered: list[OverlayGuest] = field(default_factory=list)

    def client(self) -> Entering:
        """A client that enters "g" whenever it may."""
        client = Entering(lambda: self.enter(client))
        return client

    def enter(self, client: Entering) -> None:
        try:
            self.entered.append(self.entrance.enter(client, self.image, "g", CLAIM))
        except NotYetError:
            return

    def run(self) -> None:
        """Run what was posted, until a client has entered."""
        while not self.entered:
            self.posted.get(timeout=60)()


@pytest.fixture(params=["memory", "files"])
def place(request: pytest.FixtureRequest, make_image: MakeImage, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        store = stack.enter_context(PageStore(4 * MIB))
        image = store.open_image("d", FileSource.open(make_image(MIB)))
        image.digest = "sha256:" + "0" * 64
        core = NbdServer(1)
        stack.callback(core.close)
        files = None
        if request.param == "files":
            files = OverlayFiles(tmp_path / "overlays")
            stack.callback(files.close)
        table = OverlayTable(core, GuestTable(), Admission(1024), OverlayLimits(), files)
        stack.callback(table.close)
        posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        entrance = Entrance(table, SideThreads(), posted.put)
        stack.callback(entrance.close)
        yield Place(image, table, entrance, posted)


@pytest.fixture
def left(place: Place) -> OverlayGuest:
    """The overlay of a guest that has left it."""
    place.enter(place.client())
    place.run()
    guest = place.entered.pop()
    place.table.leave(guest)
    return guest


@pytest.mark.parametrize("how", ["discard", "withdraw"])
def test_a_client_that_comes_during_the_removal_enters_after_it(
    place: Place, left: OverlayGuest, how: str
) -> None:
    remove = {
        "discard": lambda: place.table.discard("d@g"),
        "withdraw": lambda: place.table.withdraw(left),
    }[how]
    with place.table.using(left):  # the removal waits for it, with the name still taken
        thread = in_thread(remove)
        until(lambda: place.table.get("default", "g") is None)
        gone = place.client()
        for client in (place.client(), gone):
            place.enter(client)
        gone.give_up()
        place.entrance.check(place.image, "g", CLAIM)
        assert place.entered == []
    thread.join()
    place.run()
    (guest,) = place.entered
    assert guest is not left
    assert guest.nr_clients == 1
    assert place.table.get("default", "g") is guest


@pytest.mark.parametrize("place", ["files"], indirect=True)
def test_the_name_is_free_and_the_cure_is_given_if_files_cannot_be_removed(
    place: Place, left: OverlayGuest, tmp_path: Path
) -> None:
    files = list((tmp_path / "overlays").glob("d@g.*"))
    files[0].unlink()
    files[0].mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        place.table.discard("d@g")
    place.enter(place.client())
    with pytest.raises(UsageError, match=r"files of an earlier overlay .* move \S+d@g\.\* away"):
        place.run()
    for path in (tmp_path / "overlays").glob("d@g.*"):
        path.rename(tmp_path / path.name)
    place.enter(place.client())
    place.run()
    assert place.entered[0] is not left


def test_an_overlay_that_is_not_removed_after_all_lets_waiting_clients_in(
    place: Place, left: OverlayGuest
) -> None:
    assert place.table.withdraw_unused(left)
    place.enter(place.client())
    assert place.entered == []
    place.table.insert(left)
    place.run()
    assert place.entered == [left]
    with pytest.raises(UsageError, match="has 1 client"):
        place.table.discard("d@g")
    place.table.leave(left)
