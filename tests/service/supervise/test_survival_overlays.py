# SPDX-License-Identifier: Apache-2.0
"""A backend is killed under guests whose pages it keeps: they come again and find all of them."""

import random
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, kill_backend, until
from nbd_site import Site, run

from cowshed.transport import ByteDisk, connect

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 4 * MIB
PAGE = 4096


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon(
        f"--image=d={image}",
        "--nbd=127.0.0.1:0",
        "--listen=tcp://127.0.0.1:0",
        "--metrics=127.0.0.1:0",
        "--verbose",
        kept=True,
    )


def far_uri(kept: Daemon) -> str:
    return re.findall(r"event=listening uri=\"?([^\"\s]+)", kept.log())[0]


def test_an_nbd_guest_comes_again_and_finds_its_pages(kept: Daemon, image: Path) -> None:
    site = Site(kept, image)
    site.nbdsh("h.pwrite(b'mine' * 1024, 8192); h.zero(4096, 65536)", "d@g")
    site.nbdsh("h.pwrite(b'more' * 1024, 8192); h.trim(4096, 8192)", "d@trimmed")
    for number in (signal.SIGKILL, signal.SIGHUP, signal.SIGKILL):
        kill_backend(kept, number)
        assert kept.guest_status("g")["private_bytes"] == 2 * PAGE
        assert kept.guest_status("trimmed")["private_bytes"] == 0
        read = "print(h.pread(4096, 8192) == b'mine' * 1024, h.pread(4096, 65536) == bytes(4096))"
        assert site.nbdsh(read, "d@g").split() == ["True", "True"]
        site.nbdsh("h.pwrite(b'mine' * 1024, 8192)", "d@g")
        assert kept.mismatches() == []
    until(lambda: kept.guest_status("g")["state"] == "away")
    assert site.cowshed("discard", "d@g") == "d@g: 8K discarded\n"
    kill_backend(kept)
    assert [guest["name"] for guest in kept.status()["guests"]] == ["trimmed"]
    assert kept.mismatches() == []


def test_a_quota_holds_for_an_overlay_that_was_adopted(kept: Daemon, image: Path) -> None:
    site = Site(kept, image)
    site.nbdsh(f"h.pwrite(b'x' * {2 * PAGE}, 0)", "d@g")
    site.cowshed("quota", "g", str(3 * PAGE))
    kill_backend(kept)
    assert kept.guest_status("g")["quota_bytes"] == 3 * PAGE
    told = site.nbdsh(
        f"h.pwrite(b'y' * {PAGE}, {2 * PAGE})\n"
        f"try:\n    h.pwrite(b'z' * {PAGE}, {3 * PAGE})\n"
        "except nbd.Error as error: print(error.errno)",
        "d@g",
    )
    assert told.split() == ["ENOSPC"]


def test_a_machine_that_reconnects_goes_on(kept: Daemon, image: Path) -> None:
    run("qemu-io", "--version")
    at = f"server.type=unix,server.path={kept.run_dir}/nbd.sock,export=d@q,reconnect-delay=30"
    machine = subprocess.Popen(
        ["qemu-io", "--image-opts", f"driver=nbd,{at}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert machine.stdin is not None
    assert machine.stdout is not None

    def order(words: str) -> str:
        assert machine.stdin is not None
        assert machine.stdout is not None
        machine.stdin.write(words + "\n")
        machine.stdin.flush()
        while (line := machine.stdout.readline()) and "bytes" not in line and "failed" not in line:
            pass
        return line

    try:
        for no in range(4):
            assert "wrote 65536/65536" in order(f"write -P {no + 1} {no}M 64k")
            kill_backend(kept)
            for earlier in range(no + 1):
                assert "read 65536/65536" in order(f"read -P {earlier + 1} {earlier}M 64k")
        assert kept.mismatches() == []
    finally:
        machine.communicate("q\n", timeout=60)


def test_unflushed_writes_to_files_outlive_a_backend(
    start_daemon: StartDaemon, image: Path, run_dir: Path
) -> None:
    folder = run_dir / "overlays"
    kept = start_daemon(f"--image=d={image}", f"--overlay-dir={folder}", kept=True)
    site = Site(kept, image)
    site.nbdsh("h.pwrite(b'mine' * 1024, 8192)", "d@g")
    kill_backend(kept)
    assert kept.guest_status("g")["private_bytes"] == PAGE
    read = "print(h.pread(4096, 8192) == b'mine' * 1024)"
    assert "True" in site.nbdsh(read, "d@g")
    assert kept.stop() == 0
    until(lambda: not (kept.run_dir / "cowshed.sock").exists())
    again = start_daemon(f"--image=d={image}", f"--overlay-dir={folder}")
    assert "True" in Site(again, image).nbdsh(read, "d@g")


def test_files_of_an_overlay_that_were_replaced_meanwhile_are_not_gone_on_with(
    start_daemon: StartDaemon, image: Path, run_dir: Path
) -> None:
    folder = run_dir / "overlays"
    kept = start_daemon(f"--image=d={image}", f"--overlay-dir={folder}", kept=True)
    site = Site(kept, image)
    for name in ("g", "other"):
        site.nbdsh(f"h.pwrite(b'{name[:4]:4}' * 1024, 8192); h.flush()", f"d@{name}")
    (pages,) = folder.glob("*@g.pages")
    copy = pages.with_suffix(".copy")
    copy.write_bytes(pages.read_bytes())
    copy.rename(pages)
    kill_backend(kept)
    assert [guest["name"] for guest in kept.status()["guests"]] == ["other"]
    kept.wait_logged("event=overlay-unusable")
    kept.wait_logged("are not those that the last backend wrote to")


def test_a_far_guest_never_notices(kept: Daemon, image: Path) -> None:
    model = bytearray(image.read_bytes())
    rng = random.Random(random.randrange(1 << 32))
    with connect(far_uri(kept)) as backend, backend.open("d", guest="far") as disk:
        assert isinstance(disk, ByteDisk)
        for round_no in range(8):
            for _ in range(20):
                offset, data = rng.randrange(SIZE - 30_000), rng.randbytes(rng.randrange(1, 30_000))
                disk.write(offset, data)
                model[offset : offset + len(data)] = data
            killer = threading.Thread(
                target=kill_backend, args=(kept, [signal.SIGKILL, signal.SIGHUP][round_no % 2])
            )
            killer.start()
            assert disk.read(0, SIZE) == bytes(model)
            offset, data = rng.randrange(SIZE - 30_000), rng.randbytes(30_000)
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
            killer.join()
        assert disk.read(0, SIZE) == bytes(model)
        assert kept.mismatches() == []
    until(lambda: kept.status()["guests"] == [])


def test_nobody_who_connects_is_refused_at_any_server(kept: Daemon, image: Path) -> None:
    def unix(path: Path, kind: int = socket.SOCK_STREAM) -> Callable[[], None]:
        def call() -> None:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.connect(str(path))

        return call

    def tcp(pattern: str) -> Callable[[], None]:
        found = re.search(pattern, kept.log())
        assert found, pattern

        def call() -> None:
            with socket.create_connection((found[1], int(found[2])), 60):
                pass

        return call

    servers = [
        unix(kept.run_dir / "cowshed.sock", socket.SOCK_SEQPACKET),
        unix(kept.run_dir / "nbd.sock"),
        unix(kept.run_dir / "images" / "d.sock"),
        tcp(r"event=nbd url=nbd://([0-9.]+):(\d+)"),
        tcp(r"event=listening uri=tcp://([0-9.]+):(\d+)"),
        tcp(r"event=metrics url=http://([0-9.]+):(\d+)"),
    ]
    refused: list[tuple[int, OSError]] = []
    counts = [0] * len(servers)
    is_over = threading.Event()

    def knock(no: int) -> None:
        while not is_over.wait(0.002):
            try:
                servers[no]()
                counts[no] += 1
            except OSError as error:
                refused.append((no, error))

    threads = [threading.Thread(target=knock, args=(no,)) for no in range(len(servers))]
    for thread in threads:
        thread.start()
    for number in (signal.SIGKILL, signal.SIGHUP, signal.SIGKILL, signal.SIGHUP):
        kill_backend(kept, number)
    until(lambda: min(counts) > 5 or refused != [])
    is_over.set()
    for thread in threads:
        thread.join()
    assert refused == []
