# SPDX-License-Identifier: Apache-2.0
"""The main job, end to end: a real daemon, and guests in processes of their own."""

from domains import NOBODY, MakeImage, StartDaemon, StartGuest

MIB = 1 << 20


def test_a_guest_reads_the_image_and_keeps_its_writes_to_itself(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(8 * MIB + 100)
    daemon = start_daemon("--image", f"disk={image}", "--capacity", "4M")
    writer, reader = start_guest(daemon.uri, NOBODY), start_guest(daemon.uri, NOBODY)
    for guest, name in ((writer, "writer"), (reader, "reader")):
        assert guest.call("open", image="disk", guest=name) == 8 * MIB + 100
    writer.call("fill", offset=MIB - 10, length=20, byte=7)
    assert reader.call("compare", path=str(image), offset=0, length=8 * MIB + 100) == 0
    daemon.request("evict", image="disk")
    assert reader.call("compare", path=str(image), offset=0, length=8 * MIB + 100) == 0
    assert writer.call("compare", path=str(image), offset=0, length=8 * MIB + 100) == 20
    assert daemon.guest_status("writer")["private_bytes"] == 8192
    assert daemon.guest_status("reader")["private_bytes"] == 0
    assert daemon.mismatches() == []
    assert daemon.stop() == 0
