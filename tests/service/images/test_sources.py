# SPDX-License-Identifier: Apache-2.0
"""An image's source outlives the backend with the image, whatever becomes of its path."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import (
    Daemon,
    Guest,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    kill_backend,
    until,
)
from supervisor import Supervisor

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 4 * MIB


def image_status(daemon: Daemon, name: str = "d") -> dict[str, Any]:
    (image,) = [image for image in daemon.status()["images"] if image["name"] == name]
    return dict(image)


def replace(path: Path, content: bytes) -> None:
    """Have another file at a path, in one step."""
    new = path.with_name("new")
    new.write_bytes(content)
    os.replace(new, path)


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE, "d.raw")


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon("--image", f"d={image}", kept=True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_a_guest_goes_on_with_the_file_that_it_began_with(
    kept: Daemon, start_guest: StartGuest, image: Path, end: signal.Signals
) -> None:
    content = image.read_bytes()
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    assert read(guest, 0) == content[:MIB]
    replace(image, bytes(SIZE))
    until(lambda: image_status(kept)["source_at_path"] == "other")
    kept.wait_logged("event=source-replaced", 1)
    kill_backend(kept, end)
    for offset in range(0, SIZE, MIB):
        assert read(guest, offset) == content[offset : offset + MIB]
    newcomer = start_guest(kept.uri)
    newcomer.call("open", image="d", guest="h")
    assert read(newcomer, 3 * MIB) == content[3 * MIB :]
    until(lambda: image_status(kept)["source_at_path"] == "other")
    kept.wait_logged("event=source-replaced", 2)  # once by each backend that saw it
    assert not image_status(kept)["source_changed"]
    image.unlink()
    until(lambda: image_status(kept)["source_at_path"] == "gone")
    kept.wait_logged("event=source-gone", 1)
    kill_backend(kept, end)
    kept.request("evict", image="d")
    assert read(guest, 2 * MIB) == content[2 * MIB : 3 * MIB]
    kept.wait_logged("event=source-gone", 2)
    kept.wait_logged("event=source-replaced", 2)


def read(guest: Guest, offset: int, length: int = MIB) -> bytes:
    return bytes.fromhex(guest.call("read", offset=offset, length=length))


def test_a_new_file_is_served_once_the_daemon_was_stopped(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path
) -> None:
    daemon = start_daemon("--image", f"d={image}", kept=True)
    daemon.request("warm", image="d")
    replace(image, bytes(SIZE))
    assert daemon.stop() == 0
    daemon = start_daemon("--image", f"d={image}", kept=True)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    assert read(guest, MIB) == bytes(MIB)
    assert image_status(daemon)["source_at_path"] == "same"


def test_a_digest_is_of_the_file_that_is_served(kept: Daemon, image: Path) -> None:
    until(lambda: image_status(kept)["digest"] != "")
    digest = image_status(kept)["digest"]
    replace(image, bytes(SIZE))
    kill_backend(kept)
    until(lambda: image_status(kept)["digest"] != "")
    assert image_status(kept)["digest"] == digest


def test_an_image_that_came_in_a_handoff_is_served_on_without_its_file(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path, run_dir: Path
) -> None:
    content = image.read_bytes()
    arrived = run_dir / "arrived" / "default"
    arrived.mkdir(parents=True)
    image.rename(arrived / "d.raw")
    fields = {"name": "d", "domain": "default", "size_bytes": SIZE, "digest": ""}
    table = {"version": 1, **fields, "allowed": None, "pending": None}
    (arrived / "d.json").write_text(json.dumps(table))
    kept = start_daemon(f"--image-dir={arrived.parent}", kept=True)
    (arrived / "d.raw").unlink()
    kill_backend(kept)
    guest = start_guest(kept.uri)
    guest.call("open", image="d")
    assert read(guest, MIB) == content[MIB : 2 * MIB]


def test_a_touch_is_no_alarm_and_other_bytes_are(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path
) -> None:
    daemon = start_daemon("--image", f"d={image}")
    until(lambda: image_status(daemon)["digest"] != "")
    os.utime(image, ns=(1, 1))
    until(lambda: "event=source-touched image=d" in daemon.log())
    assert not image_status(daemon)["source_changed"]
    elsewhere = image.with_name("elsewhere")
    for before, after, found in ((image, elsewhere, "gone"), (elsewhere, image, "same")):
        before.rename(after)
        until(lambda found=found: image_status(daemon)["source_at_path"] == found)  # type: ignore[misc]
    daemon.wait_logged("event=source-touched", 1)  # and not at each look
    with image.open("r+b") as file:
        file.write(b"other bytes, of the same length")
    until(lambda: image_status(daemon)["source_changed"])
    daemon.wait_logged("event=source-changed", 1)


class Host:
    """A daemon of a supervisor, that can be made to forget what older releases do not hold."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.uri = f"unix://{run_dir}/cowshed.sock"
        self.log = run_dir / "log"
        self.supervisor = Supervisor(
            command("serve", "--run-dir", str(run_dir), *arguments), self.log
        )

    def kill(self) -> None:
        self.supervisor.process.kill()
        self.supervisor.process.wait()

    def forget_sources(self) -> None:
        """Hold what an older release holds."""
        for name in [name for name in self.supervisor.groups if name.startswith("source/")]:
            for fd in self.supervisor.groups.pop(name):
                os.close(fd)

    def images(self) -> dict[str, Any]:
        with connect(self.uri) as backend:
            status = backend.request("status")["status"]
        return {image["name"]: image for image in status["images"]}


@pytest.fixture
def host(run_dir: Path, image: Path, make_image: MakeImage) -> Iterator[Host]:
    other = make_image(MIB, "e.raw")
    host = Host(run_dir, "--image", f"d={image}", "--image", f"e={other}")
    yield host
    host.supervisor.close()


def test_what_an_older_release_held_is_gone_on_with_if_its_source_is_there(
    host: Host, image: Path
) -> None:
    with connect(host.uri) as backend:
        backend.request("warm", image="d")
    host.kill()
    host.forget_sources()
    host.supervisor.start()
    assert host.images()["d"]["resident_bytes"] == SIZE
    replace(image, bytes(SIZE))  # from now on its source is held
    host.kill()
    host.supervisor.start()
    assert host.images()["d"]["resident_bytes"] == SIZE
    assert "image-unserved" not in host.log.read_text()


def test_what_an_older_release_held_is_refused_if_its_source_is_another(
    host: Host, image: Path, start_guest: StartGuest
) -> None:
    with connect(host.uri) as backend:
        for name in ("d", "e"):
            backend.request("warm", image=name)
    host.kill()
    host.forget_sources()
    replace(image, bytes(SIZE))
    host.supervisor.start()
    assert host.images()["e"]["resident_bytes"] == MIB
    until(lambda: "d" in host.images())  # anew, with nothing of the old one
    guest = start_guest(host.uri)
    guest.call("open", image="d")
    assert read(guest, 0) == bytes(MIB)
    until(lambda: "is not the file that image 'd' was served from" in host.log.read_text())
