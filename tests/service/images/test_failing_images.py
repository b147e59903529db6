# SPDX-License-Identifier: Apache-2.0
"""An image, a source or a socket that fails costs itself, and no other image anything."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import (
    ANSWER_SECONDS,
    Daemon,
    MakeImage,
    StartDaemon,
    StartGuest,
    cowshed,
    kill_backend,
    listens,
    stop,
    until,
)
from nbd_site import Site
from switches import BEFORE, switch

# Some start several backends, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MIB = 1 << 20
NR_LOADERS = 4


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(4 * MIB, "d.raw")


@pytest.fixture
def other(make_image: MakeImage) -> Path:
    return make_image(MIB, "other.raw")


def image_status(daemon: Daemon, name: str) -> dict[str, Any]:
    (image,) = [image for image in daemon.status()["images"] if image["name"] == name]
    return dict(image)


def test_at_a_first_start_an_image_that_is_not_there_is_an_error(
    run_dir: Path, image: Path
) -> None:
    for keeper in ([], ["--no-keeper"]):
        ended = cowshed(
            "serve",
            *("--run-dir", run_dir, *keeper),
            *("--image", f"d={image}", "--image", f"e={run_dir}/none"),
        )
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith("cowshed: ")
        assert "none" in line


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_an_image_that_a_successor_cannot_open_is_served_once_it_can(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    image: Path,
    run_dir: Path,
    end: signal.Signals,
) -> None:
    settings = run_dir / "cowshed.toml"
    settings.write_text(f'[images]\nd = "{image}"\n')
    overlays = run_dir / "overlays"
    kept = start_daemon("--config", str(settings), f"--overlay-dir={overlays}", kept=True)
    late = run_dir / "late.raw"
    settings.write_text(f'[images]\nd = "{image}"\nlate = "{late}"\n')
    kill_backend(kept, signal.SIGHUP)
    if end == signal.SIGKILL:
        kill_backend(kept, end)
    status = kept.status()
    assert [image["name"] for image in status["images"]] == ["d"]
    (unserved,) = status["unserved_images"]
    assert (unserved["name"], unserved["source"]) == ("late", str(late))
    assert "cannot open image source" in unserved["why"]
    assert "late" in cowshed("status", "--run-dir", run_dir).stdout
    kept.wait_logged("event=image-unserved image=late")
    guest = start_guest(kept.uri)
    guest.call("open", image="d")
    assert guest.call("compare", path=str(image), offset=0, length=4 * MIB) == 0
    new = run_dir / "new"
    new.write_bytes(image.read_bytes())
    new.rename(late)
    until(lambda: kept.status()["unserved_images"] == [])
    kept.wait_logged("event=image-served image=late")
    newcomer = start_guest(kept.uri)
    newcomer.call("open", image="late")
    assert newcomer.call("compare", path=str(image), offset=0, length=4 * MIB) == 0
    until(lambda: image_status(kept, "late")["digest"] == image_status(kept, "d")["digest"] != "")
    assert (run_dir / "images" / "late.sock").is_socket()
    kill_backend(kept)
    assert newcomer.call("compare", path=str(image), offset=0, length=4 * MIB) == 0


@pytest.fixture
def hung(start_daemon: StartDaemon, image: Path, other: Path) -> Iterator[Daemon]:
    """A daemon of two images: reads of "d" hang, as many as there are loaders."""
    daemon = start_daemon(f"--image=d={image}", f"--image=other={other}", before=BEFORE)
    switch(daemon, "LOAD_READ", "stop", times=NR_LOADERS)
    clients = [
        subprocess.Popen(["nbdcopy", Site(daemon, image).uri(), "null:"], stderr=subprocess.DEVNULL)
        for _ in range(NR_LOADERS)
    ]
    until(lambda: image_status(daemon, "d")["source_wait_seconds"] > 0)
    yield daemon
    for client in clients:
        client.kill()
        client.wait()


def test_an_image_whose_source_hangs_holds_up_no_other_and_no_status(
    hung: Daemon, start_guest: StartGuest, other: Path
) -> None:
    guest = start_guest(hung.uri)
    guest.call("open", image="other")
    assert guest.call("compare", path=str(other), offset=0, length=MIB) == 0
    until(lambda: "event=source-hangs image=d" in hung.log())
    assert image_status(hung, "d")["source_wait_seconds"] >= 3
    assert "d: its source does not answer" in cowshed("status", "--run-dir", hung.run_dir).stdout
    switch(hung, "LOAD_READ", "off")
    until(lambda: "event=source-answers image=d" in hung.log())
    until(lambda: image_status(hung, "d")["source_wait_seconds"] < 3)


def test_a_daemon_stops_though_a_source_hangs(hung: Daemon) -> None:
    assert hung.stop() == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_a_socket_that_was_removed_is_made_again(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path, end: signal.Signals
) -> None:
    kept = start_daemon(f"--image=d={image}", kept=True)
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    pid = int((kept.run_dir / "lock").read_text())
    for name in ("cowshed.sock", "nbd.sock", "images/d.sock"):
        (kept.run_dir / name).unlink()
    until(lambda: kept.log().count("event=socket-removed") == 3)
    os.kill(pid if end == signal.SIGKILL else kept.pid, end)
    until(lambda: listens(kept.run_dir / "cowshed.sock"))
    assert kept.guest_status("g")["state"] == "running"
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
    assert Site(kept, image).nbdsh("print(h.get_size())").split() == [str(4 * MIB)]
    kept.wait_logged("event=socket-made-again", 3)
    kill_backend(kept)
    assert kept.guest_status("g")["state"] == "running"


def test_something_in_the_place_of_a_socket_does_not_end_the_service(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path
) -> None:
    kept = start_daemon(f"--image=d={image}", kept=True)
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    path = kept.run_dir / "cowshed.sock"
    path.unlink()
    path.write_text("not a socket")
    os.kill(int((kept.run_dir / "lock").read_text()), signal.SIGKILL)
    assert guest.call("compare", path=str(image), offset=0, length=4 * MIB) == 0
    until(lambda: "event=not-reachable" in kept.log())
    path.unlink()
    os.kill(kept.pid, signal.SIGHUP)
    until(lambda: listens(path))
    assert kept.guest_status("g")["state"] == "running"


@pytest.fixture
def stopped_server(image: Path, run_dir: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A file of a file system in user space, and its server, to be stopped."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs the right to mount")
    path, socket = run_dir / "far.raw", run_dir / "far.sock"
    path.touch()
    disk = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "file", str(image)])
    until(lambda: listens(socket))
    server = subprocess.Popen(["nbdfuse", "-r", str(path), f"nbd+unix:///?socket={socket}"])
    try:
        until(lambda: server.poll() is not None or path.stat().st_size > 0)
        if server.poll() is not None:
            pytest.skip("needs the right to mount")
        yield path, server
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "--lazy", str(path)], check=False)
        for process in (server, disk):
            process.terminate()
            process.wait(ANSWER_SECONDS)


def test_a_file_system_that_hangs_holds_up_no_other_image(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    other: Path,
    stopped_server: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    far, server = stopped_server
    daemon = start_daemon(f"--image=far={far}", f"--image=other={other}")
    waiting = start_guest(daemon.uri)
    waiting.call("open", image="far")
    stop(server.pid)  # a thread that still runs would answer
    waiting.start("read", offset=0, length=1)
    until(lambda: image_status(daemon, "far")["source_wait_seconds"] > 3)
    guest = start_guest(daemon.uri)
    guest.call("open", image="other")
    assert guest.call("compare", path=str(other), offset=0, length=MIB) == 0
    # What the server has taken and not answered cannot be killed: it goes on before the end.
    server.send_signal(signal.SIGCONT)
    waiting.finish()
    until(lambda: image_status(daemon, "far")["source_wait_seconds"] < 3)


def test_a_file_system_that_ended_is_one_line_and_holds_up_no_other_image(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    other: Path,
    stopped_server: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    far, server = stopped_server
    daemon = start_daemon(f"--image=far={far}", f"--image=other={other}")
    server.kill()
    server.wait(ANSWER_SECONDS)
    until(lambda: "event=source-lost image=far" in daemon.log())
    guest = start_guest(daemon.uri)
    guest.call("open", image="other")
    assert guest.call("compare", path=str(other), offset=0, length=MIB) == 0
    assert "defect" not in daemon.log()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_a_successor_begins_though_a_source_hung(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    image: Path,
    other: Path,
    end: signal.Signals,
) -> None:
    kept = start_daemon(f"--image=d={image}", f"--image=other={other}", before=BEFORE, kept=True)
    waiting = start_guest(kept.uri)
    waiting.call("open", image="d")
    switch(kept, "LOAD_READ", "stop", times=NR_LOADERS)
    waiting.start("read", offset=0, length=1)
    until(lambda: image_status(kept, "d")["source_wait_seconds"] > 0)
    kill_backend(kept, end)
    waiting.finish()  # the successor's reads do not hang
    guest = start_guest(kept.uri)
    guest.call("open", image="other")
    assert guest.call("compare", path=str(other), offset=0, length=MIB) == 0
