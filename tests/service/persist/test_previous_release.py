# SPDX-License-Identifier: Apache-2.0
"""A backend of the release before is succeeded by this one, under guests of every kind."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attached import ROOM
from domains import (
    ANSWER_SECONDS,
    NOBODY,
    SUPPORT,
    Daemon,
    Guest,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    kill_backend,
    until,
)
from machine_guests import new_machine, restore
from releases import ROOT, Installation, previous_release

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1 << 20
PAGE = 4096
SIZE = 4 * MIB


class Cast:
    """A guest of each kind, and what each must read."""

    def __init__(
        self, old: Daemon, image: Path, start_guest: StartGuest, installed: Installation
    ) -> None:
        self.daemon = old
        self.image = image.read_bytes()
        self.models: dict[str, bytearray] = {}
        self.readers: dict[str, Guest] = {}
        scripted = installed_script(installed)
        (far,) = re.findall(r"event=listening uri=\"?([^\"\s]+)", old.log())
        for name, uri in (("unix", old.uri), ("tcp", far), ("stopped", old.uri)):
            guest = start_guest(uri, uid=None if name == "tcp" else NOBODY, **scripted)
            quota = PAGE if name == "stopped" else MIB
            guest.call("open", image="d", guest=name, quota_bytes=quota)
            self.readers[name] = guest
        nbd = Guest.of(["/usr/bin/python3", str(SUPPORT / "block_guest.py")])
        self.nbd_uri = f"nbd+unix:///d@nbd?socket={old.run_dir}/nbd.sock"
        nbd.call("open", uri=self.nbd_uri)
        self.readers["nbd"] = nbd
        for name in self.readers:
            self.models[name] = bytearray(self.image)
            self.write(name, 10, b"\xab")
        self.readers["stopped"].start("write", offset=20 * PAGE, hex="cd" * PAGE)
        until(lambda: old.guest_status("stopped")["state"] == "stopped-quota")
        self.models["stopped"][20 * PAGE : 21 * PAGE] = b"\xcd" * PAGE
        attach = command("attach", "d", "--run-dir", str(old.run_dir), "--guest", "program", "--")
        reader = ["python3", str(ROOM / "reader.py"), "{image}", str(image)]
        self.program = Guest.of([*attach, *reader], installed.environment())
        self.program.call("map", writable=True)
        self.program.call("write", no=0, page=7, nr_pages=2, byte=9)
        self.machines = [restore(old, start_guest, image, [MIB, 3 * MIB])]
        for policy in (0, 1):
            self.machines.append(new_machine(old, start_guest, [SIZE]))
            self.machines[-1].call("nydus", image=str(image), policy=policy)
        self.machines[0].call("fill", page=20, nr_pages=8, byte=7)
        self.check_machines()
        self.guests = sorted(guest["name"] for guest in old.status()["guests"])

    def write(self, name: str, page: int, byte: bytes) -> None:
        """Write a page; who does not reconnect by itself is reconnected."""
        if name == "nbd":
            self.readers[name].call("open", uri=self.nbd_uri)
        self.readers[name].call("write", offset=page * PAGE, hex=(byte * PAGE).hex())
        self.models[name][page * PAGE : (page + 1) * PAGE] = byte * PAGE

    def go_on(self) -> None:
        """Have the guest that waits at its quota go on."""
        # The successor woke it, and it stops again.
        until(lambda: self.daemon.guest_status("stopped")["state"] == "stopped-quota")
        assert not self.readers["stopped"].answered()
        self.daemon.request("quota", guest="stopped", quota_bytes=MIB)
        self.readers["stopped"].finish()

    def check_machines(self) -> None:
        for machine in self.machines:
            assert machine.call("compare", nr_threads=2) == []

    def check(self, byte: bytes) -> None:
        """Everybody is there, has its bytes, and may write more."""
        assert sorted(each["name"] for each in self.daemon.status()["guests"]) == self.guests
        self.daemon.request("evict", image="d")
        for no, name in enumerate(self.readers):
            self.write(name, 30 + no, byte)
            read = self.readers[name].call("read", offset=0, length=SIZE)
            assert bytes.fromhex(read) == self.models[name], name
        assert self.program.call("check") == []
        self.program.call("write", no=0, page=40, byte=byte[0])
        assert self.program.call("check") == []
        self.machines[0].call("fill", page=50, nr_pages=1, byte=byte[0])
        self.check_machines()
        assert self.daemon.mismatches() == []

    def close(self) -> None:
        """End those that no fixture ends."""
        for guest in (self.program, self.readers["nbd"]):
            guest.close()


def installed_script(installed: Installation) -> dict[str, Any]:
    """How to start the previous release's own script of a guest."""
    script = previous_release() / "tests/support/scripted_guest.py"
    return {"script": str(script), "before": installed.before}


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def installed(run_dir: Path) -> Installation:
    return Installation(run_dir / "installed", previous_release())


@pytest.fixture(params=["memory", "files"])
def words(request: pytest.FixtureRequest, image: Path, run_dir: Path) -> list[str]:
    words = [f"--image=d={image}", "--listen=tcp://127.0.0.1:0"]
    return [*words, f"--overlay-dir={run_dir}/overlays"] if request.param == "files" else words


@pytest.fixture
def old(start_daemon: StartDaemon, words: list[str], installed: Installation) -> Daemon:
    return start_daemon(*words, "--verbose", kept=True, before=installed.before)


Succeed = Callable[[Daemon], None]


@pytest.fixture(params=["reload", "takeover"])
def succeed(
    request: pytest.FixtureRequest, words: list[str], installed: Installation
) -> Iterator[Succeed]:
    """Have this release serve in the place of the one before."""
    takers: list[subprocess.Popen[bytes]] = []

    def by_reload(old: Daemon) -> None:
        installed.install(ROOT)
        kill_backend(old, signal.SIGHUP)

    def by_takeover(old: Daemon) -> None:
        pid = old.status()["pid"]
        serve = command("serve", "--takeover", "--run-dir", str(old.run_dir), *words)
        with old.log_path.open("ab") as log:
            takers.append(subprocess.Popen(serve, stdout=log, stderr=log))
        assert old.process.wait(ANSWER_SECONDS) == 0
        until(lambda: old.status()["pid"] != pid)

    yield by_takeover if request.param == "takeover" else by_reload
    for taker in takers:
        taker.send_signal(signal.SIGTERM)
        assert taker.wait(ANSWER_SECONDS) == 0


def test_guests_of_every_kind_go_on_under_this_release(
    old: Daemon,
    image: Path,
    start_guest: StartGuest,
    installed: Installation,
    succeed: Succeed,
) -> None:
    cast = Cast(old, image, start_guest, installed)
    try:
        before = {guest["name"]: guest["hits"] for guest in old.status()["guests"]}
        succeed(old)
        assert f"{ROOT}/cache/_core" in Path(f"/proc/{old.status()['pid']}/maps").read_text()
        cast.go_on()
        cast.check(b"\x01")
        for guest in old.status()["guests"]:
            assert guest["hits"] >= before[guest["name"]]
        kill_backend(old)
        cast.check(b"\x02")
        mine = start_guest(old.uri)
        mine.call("open", image="d", guest="new")
        assert mine.call("compare", path=str(image), offset=0, length=SIZE) == 0
    finally:
        cast.close()
