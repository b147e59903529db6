# SPDX-License-Identifier: Apache-2.0
"""Drains by post-copy: guests go on at the target, and their pages follow."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from domains import in_thread, is_stopped, kill_backend, until
from two_hosts import PAGE, SIZE, Host, Model

from cowshed.transport import connect

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


def _state(host: Host) -> dict[str, Any]:
    return dict(host.the_daemon.request("drain-state")["drain"] or {})


def _private(model: Model, image: Path) -> list[int]:
    """The pages that a guest wrote."""
    plain = image.read_bytes()
    return [
        no
        for no in range(SIZE // PAGE)
        if model.bytes[no * PAGE : (no + 1) * PAGE] != plain[no * PAGE : (no + 1) * PAGE]
    ]


def _late_wait(tmp_path: Path, seconds: int) -> str:
    path = tmp_path / f"wait-{seconds}.toml"
    path.write_text(f"late_wait = {seconds}\n")
    return f"--config={path}"


class Begun:
    """A drain whose source stopped when the target owns and has no page yet."""

    def __init__(self, a: Host, b: Host, model: Model, to: str = "") -> None:
        with a.open("g") as disk:
            model.write(disk, 100)  # so that they are pushed in more than one piece
            disk.flush()
        self.a, self.b = a, b
        self.drain = in_thread(lambda: a.run("drain", "--post-copy", "--to", to or b.unix))
        until(lambda: is_stopped(a.the_daemon.pid))

    def go_on(self) -> None:
        os.kill(self.a.the_daemon.pid, signal.SIGCONT)


AT_PUSH = ("env", "COWSHED_TEST_STOP_AT=source-push")
AFTER_SOME = ("env", "COWSHED_TEST_STOP_AT=source-pushed")


def test_guests_go_on_at_once_and_read_what_follows(hosts: Pair, image: Path) -> None:
    a, b = hosts
    a.start(before=AT_PUSH)
    b.start()
    model = Model(image, 1)
    begun = Begun(a, b, model)
    private = _private(model, image)
    plain = next(no for no in range(SIZE // PAGE) if no not in private)
    with b.open("g") as disk:
        at = plain * PAGE
        assert disk.read(at, PAGE) == model.bytes[at : at + PAGE]
        at = private[-1] * PAGE
        got: list[bytes] = []
        reader = Thread(target=lambda: got.append(disk.read(at, PAGE)), daemon=True)
        reader.start()
        assert reader.is_alive()
        begun.go_on()
        reader.join(60)
        assert got == [bytes(model.bytes[at : at + PAGE])]
        begun.drain.join()
        model.check(disk)
        model.write(disk)
        model.check(disk)
    assert _state(a)["phase"] == "moved"
    assert a.guests() == set()
    assert a.the_daemon.mismatches() == b.the_daemon.mismatches() == []
    a.kill()
    with b.open("g") as disk:
        model.check(disk)


def test_who_maps_waits_for_all_pages_and_an_abort_is_too_late(
    hosts: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = hosts
    a.start(before=AT_PUSH)
    b.start()
    done = a.run("drain", "--post-copy", "--to", str(tmp_path / "file"))
    assert "a file cannot ask for pages later" in done.stderr
    model = Model(image, 4)
    begun = Begun(a, b, model)
    opened: list[bool] = []

    def map_it() -> None:
        with (
            connect(b.unix) as backend,
            backend.open("d", guest="g", token="token") as disk,
        ):
            opened.append(disk.mapped)
            model.check(disk)
            model.write(disk)
            model.check(disk)
            opened.append(True)

    mapper = in_thread(map_it)
    until(lambda: "event=open-waits" in b.the_daemon.log())
    assert opened == []
    done = b.run("drain", "--dry-run", "--to", str(tmp_path / "file"))
    assert "have not arrived yet" in done.stderr + done.stdout
    said: list[str] = []
    abort = in_thread(lambda: said.append(a.run("drain", "--abort").stderr))
    begun.go_on()
    mapper.join(60)
    assert opened == [True, True]
    begun.drain.join()
    abort.join()
    assert "it is too late" in said[0]
    assert b.the_daemon.mismatches() == []


def _came(b: Host, model: Model, private: list[int]) -> list[int]:
    """Which private pages came before their source was lost; each must be right."""
    came = []
    with b.open("g") as disk:
        for no in private:
            at = no * PAGE
            failed = 0
            try:
                got = disk.read(at, PAGE)
            except OSError as error:
                failed = error.errno or 0
            if failed:
                assert failed == errno.EIO
                continue
            assert got == model.bytes[at : at + PAGE]
            came.append(no)
    return came


def test_a_lost_source_is_an_error_for_what_it_had_and_what_came_is_kept(
    hosts: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = hosts
    a.start(before=AFTER_SOME)
    b.start(_late_wait(tmp_path, 1))
    model = Model(image, 2)
    Begun(a, b, model)
    private = _private(model, image)
    a.kill()
    until(lambda: "pages-lost" in b.the_daemon.log())
    came = _came(b, model, private)
    assert came == private[: len(came)]
    assert 0 < len(came) < len(private)
    lost = len(private) - len(came)
    (said,) = [line for line in b.the_daemon.log().splitlines() if "pages-lost" in line]
    assert "d@g" in said
    assert f"pages={lost}" in said
    (guest,) = b.the_daemon.status()["guests"]
    assert (guest["late_bytes"], guest["lost_bytes"]) == (lost * PAGE, lost * PAGE)
    done = b.run("drain", "--dry-run", "--to", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "were lost" in done.stdout
    with b.open("g") as disk:
        for no in private[len(came) :]:
            disk.write(no * PAGE, bytes(model.bytes[no * PAGE : (no + 1) * PAGE]))
        model.check(disk)
    until(lambda: "pages-arrived" in b.the_daemon.log())
    (guest,) = b.the_daemon.status()["guests"]
    assert (guest["late_bytes"], guest["lost_bytes"]) == (0, 0)
    assert b.the_daemon.mismatches() == []


def test_a_source_that_comes_late_heals_what_was_lost(
    hosts: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = hosts
    a.start(f"--overlay-dir={tmp_path / 'a'}", before=AT_PUSH)
    b.start(_late_wait(tmp_path, 0))
    model = Model(image, 3)
    Begun(a, b, model)
    private = _private(model, image)
    a.kill()
    until(lambda: "pages-lost" in b.the_daemon.log())
    assert _came(b, model, private) == []
    a.start()
    until(lambda: _state(a).get("phase") == "moved")
    with b.open("g") as disk:
        model.check(disk)


def _keep_going(begun: Begun) -> None:
    """Until the drain is over; it stops at each piece."""
    pid = begun.a.the_daemon.pid

    def step() -> bool:
        if is_stopped(pid):
            os.kill(pid, signal.SIGCONT)
        return not begun.drain.is_alive()

    until(step)


# Those before the commit are as without post-copy: test_drain.py.
PHASES = ["source-commit", "source-push", "source-pushed", "target-ready"]


@pytest.mark.parametrize("phase", PHASES)
def test_wherever_one_end_is_killed_every_byte_comes_to_one_owner(
    hosts: Pair, image: Path, phase: str, tmp_path: Path
) -> None:
    """Private pages are in files, so that a killed backend's are there after its restart."""
    a, b = hosts
    folders = [f"--overlay-dir={tmp_path / name}" for name in ("a", "b")]
    stop = ("env", f"COWSHED_TEST_STOP_AT={phase}")
    is_source = phase.startswith("source")
    a.start(folders[0], before=stop if is_source else ())
    b.start(folders[1], before=() if is_source else stop)
    model = Model(image, PHASES.index(phase))
    with a.open("g") as disk:
        model.write(disk, 100)
        disk.flush()
    drain = in_thread(lambda: a.run("drain", "--post-copy", "--to", b.unix))
    killed = a if is_source else b
    until(lambda: is_stopped(killed.the_daemon.pid))
    killed.kill()
    killed.start()
    drain.join()
    until(lambda: _state(a).get("phase", "aborted") in ("moved", "aborted"))
    owner = b if _state(a).get("phase") == "moved" else a
    if phase in ("source-push", "source-pushed"):
        assert owner is b
    with owner.open("g") as disk:
        model.check(disk)
        model.write(disk)
    if owner is a:
        a.wait_movable("--to", b.unix)
        a.drain("--post-copy", "--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
    assert a.guests() == set()


@pytest.mark.parametrize("how", ["files", "kept"])
def test_a_target_that_dies_with_pages_lacking_asks_for_them_again(
    hosts: Pair, image: Path, how: str, tmp_path: Path
) -> None:
    a, b = hosts
    a.start(before=AFTER_SOME)
    b.start(*([f"--overlay-dir={tmp_path / 'b'}"] if how == "files" else []), kept=how == "kept")
    model = Model(image, 5)
    begun = Begun(a, b, model)
    private = _private(model, image)
    with b.open("g") as disk:
        # What the guest wrote at the target stays: of a page that is there, and of one that is not.
        for no in (private[0], private[-1]):
            data = bytes([no % 251]) * PAGE
            disk.write(no * PAGE, data)
            model.bytes[no * PAGE : (no + 1) * PAGE] = data
        disk.flush()
    if how == "files":
        b.kill()
        b.start()
    else:
        kill_backend(b.the_daemon)
    with b.open("g") as disk:
        plain = next(no for no in range(SIZE // PAGE) if no not in private)
        assert disk.read(plain * PAGE, 1) == model.bytes[plain * PAGE : plain * PAGE + 1]
        _keep_going(begun)
        model.check(disk)
    assert _state(a)["phase"] == "moved"
    assert b.the_daemon.mismatches() == []
