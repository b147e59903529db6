# SPDX-License-Identifier: Apache-2.0
"""NBD clients read an image whose frames are made huge pages, and single ones again, meanwhile."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

from domains import MakeImage, StartDaemon, StartGuest, until

MIB = 1 << 20
SIZE = 8 * MIB
NR_ROUNDS = 12


def test_copies_are_right_while_regions_are_collapsed_and_dissolved(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, tmp_path: Path
) -> None:
    image = make_image(SIZE)
    daemon = start_daemon(f"--image=d={image}", "--capacity=64M")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    ended = threading.Event()
    wrong: list[int] = []

    def copy() -> None:
        uri = f"nbd+unix:///d?socket={daemon.run_dir}/nbd.sock"
        copied = tmp_path / "copy"
        while not ended.is_set() or not wrong:
            subprocess.run(["nbdcopy", uri, str(copied)], check=True)
            wrong.append(int(copied.read_bytes() != image.read_bytes()))

    client = threading.Thread(target=copy)
    client.start()
    for i in range(NR_ROUNDS):
        daemon.request("pin", image="d")
        until(lambda: daemon.guest_status("g")["open_regions"] == SIZE // (2 * MIB))
        daemon.request("unpin", image="d")
        daemon.request("evict", image="d", offset=(i % 8) * MIB, length=MIB // 4)
        assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0
    ended.set()
    client.join()
    assert not any(wrong)
    assert daemon.status()["open_regions"]["opens"] >= NR_ROUNDS
    assert daemon.mismatches() == []
