# SPDX-License-Identifier: Apache-2.0
"""Hosts whose extents have different sizes hand their guests over to each other."""

from __future__ import annotations

import pytest
from domains import StartGuest, until
from two_hosts import PAGE, SIZE, Host, Model

from cowshed.cache import probe_huge_frames
from cowshed.transport import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        probe_huge_frames() is not None, reason="needs to mount a tmpfs: run as root"
    ),
]

MIB = 1 << 20


@pytest.mark.parametrize("sizes", [("64K", "2M"), ("2M", "64K"), ("2M", "2M")])
def test_a_guest_and_a_working_set_come_over(
    hosts: tuple[Host, Host], start_guest: StartGuest, sizes: tuple[str, str]
) -> None:
    a, b = (host.start(f"--extent={size}") for host, size in zip(hosts, sizes, strict=True))
    model = Model(a.image, 5)
    with a.open("network") as disk:
        model.write(disk)
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="mapped", token="secret", follow_moves=False)
    guest.call("fill", offset=PAGE, length=3 * PAGE, byte=7)
    guest.call("read", offset=3 * MIB + PAGE, length=1)
    report = a.drain("--to", b.tcp)
    assert report["phase"] == "moved"
    with b.open("network") as disk:
        model.check(disk)
    with connect(b.unix) as backend, backend.open("d", guest="mapped", token="secret") as disk:
        content = bytearray(b.image.read_bytes())
        content[PAGE : 4 * PAGE] = bytes([7]) * 3 * PAGE
        assert disk.read(0, SIZE) == content
    assert b.the_daemon.mismatches() == []
    guest.kill()


def test_all_of_a_large_extent_that_was_touched_is_warmed(
    hosts: tuple[Host, Host], start_guest: StartGuest
) -> None:
    a, b = hosts[0].start("--extent=2M"), hosts[1].start()
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="mapped", token="secret", follow_moves=False)
    guest.call("read", offset=3 * MIB, length=1)
    a.drain("--to", b.tcp)
    until(lambda: b.the_daemon.status()["resident_bytes"] == 2 * MIB)
    guest.kill()
