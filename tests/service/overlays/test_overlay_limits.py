# SPDX-License-Identifier: Apache-2.0
"""Guests whose pages the backend keeps: what they may ask for, and quotas of those that go."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import MakeImage, StartDaemon

from cowshed.accounting import QuotaPolicy
from cowshed.cache import FileSource, Image, PageStore, UsageError
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.overlays.claims import Claim
from cowshed.service.overlays.files import OverlayFiles
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.transport import connect
from cowshed.transport.nbd.serving import NbdServer

MIB = 1 << 20
STOP, KILL, ALLOW = QuotaPolicy.STOP, QuotaPolicy.KILL, QuotaPolicy.ALLOW


@pytest.mark.parametrize(
    ("terms", "asked", "given"),
    [
        (OverlayLimits(), (None, None), (None, STOP)),
        (OverlayLimits(), (MIB, KILL), (MIB, KILL)),
        (OverlayLimits(MIB, STOP, 2 * MIB), (None, None), (MIB, STOP)),
        (OverlayLimits(MIB, STOP, 2 * MIB), (2 * MIB, None), (2 * MIB, STOP)),
        (OverlayLimits(None, STOP, MIB), (None, None), (MIB, STOP)),
        (OverlayLimits(2 * MIB, ALLOW, MIB), (None, ALLOW), (MIB, ALLOW)),
    ],
)
def test_a_guest_gets_what_it_asks_for_within_the_terms(
    terms: OverlayLimits, asked: tuple[int | None, QuotaPolicy | None], given: tuple[object, object]
) -> None:
    assert terms.agree(*asked) == given


def test_more_than_the_terms_is_refused_with_the_cure(
    make_image: MakeImage, start_daemon: StartDaemon, run_dir: Path
) -> None:
    config = run_dir / "cowshed.toml"
    config.write_text('quota = "1M"\nnetwork_quota = "2M"\n')
    image = make_image(MIB)
    daemon = start_daemon(f"--config={config}", f"--image=d={image}", "--listen=tcp://127.0.0.1:0")
    (uri,) = re.findall(r"event=listening uri=\"?([^\"\s]+)", daemon.log())
    with connect(uri) as backend:
        with pytest.raises(UsageError, match=r"3M is more than the 2M .* raise network_quota"):
            backend.open("d", guest="g", quota_bytes=3 * MIB)
        with pytest.raises(UsageError, match=r"'allow' is not for guests .*: ask for 'stop'"):
            backend.open("d", guest="g", on_quota="allow")
        with backend.open("d", guest="g", quota_bytes=2 * MIB):
            assert daemon.guest_status("g")["quota_bytes"] == 2 * MIB
        with backend.open("d", guest="h"):
            assert daemon.guest_status("h")["quota_bytes"] == MIB


@pytest.fixture
def image(make_image: MakeImage) -> Iterator[Image]:
    with PageStore(4 * MIB) as store:
        image = store.open_image("d", FileSource.open(make_image(MIB)))
        image.digest = "sha256:" + "0" * 64
        yield image


def test_a_quota_for_an_overlay_that_was_discarded_meanwhile_changes_nothing(
    image: Image, tmp_path: Path
) -> None:
    core = NbdServer(1)
    files = OverlayFiles(tmp_path / "overlays")
    table = OverlayTable(core, GuestTable(), Admission(1024), OverlayLimits(), files)
    guest = table.enter(image, "g", Claim(("me",), 0, False, "nbd"))
    table.leave(guest)
    table.set_quota(guest, MIB)
    assert guest.quota_bytes == MIB
    found = table.find("d@g")
    table.discard("d@g")
    with pytest.raises(UsageError, match="'d@g' is gone"):
        table.set_quota(found, 2 * MIB)
    assert list(files.records()) == []
    table.close()
    files.close()
    core.close()
