# SPDX-License-Identifier: Apache-2.0
"""An --overlay-dir that hangs holds up who asked for that overlay, and nobody else."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, in_thread, until
from nbd_site import Site
from switches import BEFORE, is_reached, switch

from cowshed.cache.errors import SourceError
from cowshed.transport import connect
from cowshed.transport.channels.exchange import greet

MIB = 1 << 20
# More than the buffers of both ends of a connection hold.
SOCKETS_BYTES = 24 << 20


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(MIB)


@pytest.fixture
def folder(run_dir: Path) -> Path:
    return run_dir / "overlays"


@pytest.fixture
def daemon(start_daemon: StartDaemon, image: Path, folder: Path) -> Daemon:
    config = folder.parent / "cowshed.toml"
    config.write_text('log_level = "info"\n')
    return start_daemon(
        f"--config={config}",
        f"--image=d={image}",
        f"--overlay-dir={folder}",
        "--listen=tcp://127.0.0.1:0",
        before=BEFORE,
    )


def uri_of(daemon: Daemon) -> str:
    (uri,) = re.findall(r"event=listening uri=\"?([^\"\s]+)", daemon.log())
    return str(uri)


def client(daemon: Daemon, image: Path, code: str = "print('in')") -> subprocess.Popen[str]:
    """A client that enters d@g, which is hung."""
    command = ["nbdsh", "-u", Site(daemon, image).uri("d@g"), "-c", code]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # nbdsh is a shell's child
        env={**os.environ, "HOME": "/", "PATH": f"/usr/bin:{os.environ['PATH']}"},
    )


def test_making_an_overlay_holds_up_nobody_else(daemon: Daemon, image: Path, folder: Path) -> None:
    site = Site(daemon, image)
    switch(daemon, "OVERLAY_OPEN", "stop")
    first = client(daemon, image, "h.pwrite(b'x' * 4096, 0); print('in')")
    until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
    second = client(daemon, image)
    assert daemon.status()["guests"] == []
    assert site.nbdsh("print(len(h.pread(65536, 0)))").split() == ["65536"]
    assert site.nbdsh("print(len(h.pread(65536, 0)))", "d@h").split() == ["65536"]
    with connect(uri_of(daemon)) as backend, backend.open("d", guest="i"):
        assert daemon.guest_status("i")["state"] == "running"
    assert first.poll() is None
    assert second.poll() is None
    switch(daemon, "OVERLAY_OPEN", "off")
    for each in (first, second):
        assert each.communicate(timeout=60)[0].split() == ["in"]
    assert daemon.guest_status("g")["private_bytes"] == 4096
    daemon.wait_logged("event=overlay-made overlay=d@g", 1)


def test_a_network_guest_waits_alone(daemon: Daemon, image: Path, folder: Path) -> None:
    switch(daemon, "OVERLAY_OPEN", "stop")
    said: list[int] = []

    def enter() -> None:
        with connect(uri_of(daemon)) as backend, backend.open("d", guest="g") as disk:
            said.append(disk.size_bytes)

    entering = in_thread(enter)
    until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
    assert Site(daemon, image).nbdsh("print(len(h.pread(4096, 0)))").split() == ["4096"]
    assert daemon.status()["guests"] == []
    assert said == []
    switch(daemon, "OVERLAY_OPEN", "off")
    entering.join(60)
    assert said == [MIB]
    until(lambda: not list(folder.glob("d@g.*")))  # it wanted nothing kept


def test_a_network_guest_that_waits_and_says_more_is_read_no_further(
    daemon: Daemon, folder: Path
) -> None:
    switch(daemon, "OVERLAY_OPEN", "stop")
    with greet(uri_of(daemon)) as connection:
        connection.queue({"op": "open", "image": "d", "guest": "g", "token": "t"})
        connection.flush()
        until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
        nr_bytes = 0
        for _ in range(20):
            while connection.flush():  # until the kernel has no more room
                connection.queue({"op": "describe", "image": "d", "more": "x" * 60_000})
                nr_bytes += 60_000
            daemon.status()
        assert nr_bytes < SOCKETS_BYTES
    switch(daemon, "OVERLAY_OPEN", "off")
    until(lambda: not list(folder.glob("d@g.*")))


def test_a_client_that_goes_while_its_overlay_is_made_leaves_nothing(
    daemon: Daemon, image: Path, folder: Path
) -> None:
    switch(daemon, "OVERLAY_OPEN", "stop")
    gone = client(daemon, image)
    until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
    os.killpg(gone.pid, signal.SIGKILL)
    gone.communicate(timeout=60)
    daemon.nr_fds()  # it has hung up
    switch(daemon, "OVERLAY_OPEN", "off")
    until(lambda: "event=overlay-discarded overlay=d@g" in daemon.log())
    assert not list(folder.glob("d@g.*"))
    assert daemon.status()["guests"] == []
    assert Site(daemon, image).nbdsh("print('in')", "d@g").split() == ["in"]


def test_a_network_guest_that_goes_while_its_overlay_is_made_leaves_nothing(
    daemon: Daemon, image: Path, folder: Path
) -> None:
    switch(daemon, "OVERLAY_OPEN", "stop")
    with greet(uri_of(daemon)) as connection:
        connection.queue({"op": "open", "image": "d", "guest": "g", "token": "t"})
        connection.flush()
        until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
    daemon.nr_fds()  # it has hung up
    switch(daemon, "OVERLAY_OPEN", "off")
    until(lambda: "event=overlay-discarded overlay=d@g" in daemon.log())
    assert not list(folder.glob("d@g.*"))
    assert daemon.status()["guests"] == []


def test_an_overlay_that_cannot_be_opened_is_an_error_and_leaves_nothing(
    daemon: Daemon, image: Path, folder: Path
) -> None:
    switch(daemon, "OVERLAY_OPEN", "fail", errno=errno.EIO)
    with connect(uri_of(daemon)) as backend, pytest.raises(SourceError, match=r"d@g\.pages: Input"):
        backend.open("d", guest="g")
    assert not list(folder.glob("d@g.*"))
    assert Site(daemon, image).nbdsh("print('in')", "d@g").split() == ["in"]


def test_a_daemon_stops_though_an_overlay_hangs(daemon: Daemon, image: Path, folder: Path) -> None:
    switch(daemon, "OVERLAY_OPEN", "stop")
    waiting = client(daemon, image)
    until(lambda: is_reached(daemon, "OVERLAY_OPEN"))
    assert daemon.stop() == 0
    waiting.communicate(timeout=60)


def test_a_quota_that_waits_for_the_disk_holds_up_no_status(
    daemon: Daemon, image: Path, folder: Path
) -> None:
    site = Site(daemon, image)
    site.nbdsh("h.pwrite(b'x' * 4096, 0)", "d@g")
    # Else the digest, which is kept with the record, would be what waits.
    until(lambda: "source_digest" in (folder / "d@g.json").read_text())
    pipe = folder / "d@g.new"  # the record is written there first
    os.mkfifo(pipe)

    def change() -> None:
        with pytest.raises(SourceError, match="cannot write"):  # a pipe is not durable
            daemon.request("quota", guest="g", quota_bytes=MIB)

    changing = in_thread(change)
    until(lambda: daemon.guest_status("g")["quota_bytes"] == MIB)
    assert changing.is_alive()
    assert site.nbdsh("print(len(h.pread(4096, 0)))", "d@g").split() == ["4096"]
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    changing.join(60)
    os.close(reader)
    assert not changing.is_alive()
