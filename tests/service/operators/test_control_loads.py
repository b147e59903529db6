# SPDX-License-Identifier: Apache-2.0
"""Pin and warm, while the store has other loads on its hands."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from domains import MakeImage, in_thread, until

from cowshed.cache import CapacityError, ExtentState, FileSource, Image, PageStore, SourceError
from cowshed.cache._core import lib
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.host import Host
from cowshed.service.images import loading
from cowshed.service.images.access import Access
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.warming import Warming
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.metrics.service_counters import ServiceCounters
from cowshed.service.operators.control import Control
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.reports.status import StatusReader
from cowshed.service.settings.domains import Domains
from cowshed.service.supervise.history import RestartHistory
from cowshed.transport.nbd.serving import NbdServer

EXTENT_BYTES = 4096
WAIT_MS = 60_000


@pytest.fixture
def store() -> Iterator[PageStore]:
    with PageStore(32 * EXTENT_BYTES, extent_bytes=EXTENT_BYTES, nr_loaders=1) as store:
        yield store


@pytest.fixture
def image(store: PageStore, make_image: MakeImage) -> Image:
    return store.open_image("disk", FileSource.open(make_image(20 * EXTENT_BYTES)))


@pytest.fixture
def control(store: PageStore, run_dir: Path) -> Iterator[Control]:
    evictor, guests = Evictor(store), GuestTable()
    evictor.start()
    core = NbdServer(1)
    overlays = OverlayTable(core, guests, Admission(1024), OverlayLimits())
    parts = SimpleNamespace(  # of a host, those that operators' requests use
        config=SimpleNamespace(run_dir=run_dir),
        store=store,
        evictor=evictor,
        guests=guests,
        overlays=overlays,
        access=Access(Domains(), []),
        counters=ServiceCounters(),
        history=RestartHistory(),
        warming=Warming(),
        working_sets=WorkingSets(run_dir),
    )
    host = cast(Host, parts)
    yield Control(host, StatusReader(host))
    core.close()
    evictor.stop()


@pytest.mark.parametrize("op", ["pin", "warm"])
def test_what_is_pinned_or_warmed_is_resident_although_readahead_fills_the_queue(
    op: str, image: Image, control: Control
) -> None:
    lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_STOP, 0, 1)
    image.prefetch(0, 1)
    assert lib.point_wait(lib.POINT_LOAD_READ, 1, WAIT_MS) == 0
    image.prefetch(1, 1)  # behind it: the store takes no more readahead on
    assert image.prefetch(2, 1) == 0
    request = {"image": "disk", "offset": 10 * EXTENT_BYTES, "length": 3 * EXTENT_BYTES}
    replies: list[object] = []
    thread = in_thread(lambda: replies.extend(control.perform(op, request)))
    thread.join(0.1)
    lib.point_release(lib.POINT_LOAD_READ)
    thread.join(WAIT_MS / 1000)
    assert replies
    assert image.states(10, 3) == bytes([ExtentState.RESIDENT] * 3)


def test_a_pin_is_broken_off_when_all_is_to_end(image: Image, control: Control) -> None:
    lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_STOP, 0, 1)
    failed: list[str] = []

    def pin() -> None:
        try:
            list(control.perform("pin", {"image": "disk"}))
        except CapacityError as error:
            failed.append(str(error))

    thread = in_thread(pin)
    assert lib.point_wait(lib.POINT_LOAD_READ, 1, WAIT_MS) == 0
    control.is_stopping = lambda: True
    thread.join(WAIT_MS / 1000)
    lib.point_release(lib.POINT_LOAD_READ)
    assert failed == ["'disk' is pinned and not loaded: the daemon ends"]


def test_a_warm_gives_up_a_source_that_hangs(
    image: Image, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_STOP, 0, 1)
    with monkeypatch.context() as impatient:
        impatient.setattr(loading, "_PATIENCE_SECONDS", 0.05)
        with pytest.raises(SourceError, match="has not answered a read"):
            list(control.perform("warm", {"image": "disk"}))
    lib.point_release(lib.POINT_LOAD_READ)
    until(lambda: image.read_wait_seconds == 0.0)
    *_, reply = control.perform("warm", {"image": "disk"})
    assert reply["left_out_bytes"] == 0
    assert image.states() == bytes([ExtentState.RESIDENT] * 20)


def test_a_part_is_evicted_and_what_is_warmed_fits(image: Image, control: Control) -> None:
    list(control.perform("warm", {"image": "disk"}))
    part = {"image": "disk", "offset": 3 * EXTENT_BYTES, "length": 4 * EXTENT_BYTES}
    *_, reply = control.perform("evict", part)
    assert reply["evicted_bytes"] == 4 * EXTENT_BYTES
    gone = [no for no, state in enumerate(image.states()) if state == ExtentState.ABSENT]
    assert gone == [3, 4, 5, 6]
