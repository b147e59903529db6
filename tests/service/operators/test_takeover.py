# SPDX-License-Identifier: Apache-2.0
"""`cowshed serve --takeover`: another process serves on, and whoever dies on the way, one does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import (
    ANSWER_SECONDS,
    NOBODY,
    Daemon,
    Guest,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    is_stopped,
    until,
)
from supervisor import Supervisor

# Each starts several daemons, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MIB = 1 << 20
PAGE = 4096


class Taker:
    """A process that takes over; what it says is at log_path. Ended by its backend's end."""

    def __init__(self, old: Daemon, arguments: list[str], stop_at: str, uid: int | None) -> None:
        self.log_path = old.run_dir / f"taker-{stop_at}"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command("serve", "--takeover", "--run-dir", str(old.run_dir), *arguments, uid=uid),
                env={**os.environ, "COWSHED_TEST_STOP_AT": stop_at},
                stdout=log,
                stderr=log,
            )
        self.pid = self.process.pid

    def log(self) -> str:
        return self.log_path.read_text()


StartTaker = Callable[..., Taker]


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(4 * MIB)


@pytest.fixture
def old(start_daemon: StartDaemon, image: Path) -> Daemon:
    return start_daemon("--image", f"d={image}", kept=True)


@pytest.fixture
def take_over(start_daemon: StartDaemon, image: Path) -> Iterator[StartTaker]:
    """Start a process that takes over; stop_at has it stop itself at that phase."""
    takers: list[Taker] = []

    def start(old: Daemon, *arguments: str, stop_at: str = "", uid: int | None = None) -> Taker:
        taker = Taker(old, list(arguments) or ["--image", f"d={image}"], stop_at, uid)
        takers.append(taker)
        return taker

    yield start
    for taker in takers:
        if taker.process.poll() is None:
            pid = int((taker.log_path.parent / "lock").read_text())
            os.kill(pid, signal.SIGTERM)
            taker.process.wait(ANSWER_SECONDS)


def end_backend(run_dir: Path) -> None:
    """End who serves now; its keeper ends too."""
    pid = int((run_dir / "lock").read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def backend_pid(daemon: Daemon) -> int:
    """Who serves now; the number is written after the lock is taken."""
    text = ""

    def is_written() -> bool:
        nonlocal text
        text = (daemon.run_dir / "lock").read_text()
        return text.endswith("\n")

    until(is_written)
    return int(text)


@pytest.fixture
def guest(old: Daemon, start_guest: StartGuest) -> Guest:
    """A guest with a page of its own, the eleventh."""
    guest = start_guest(old.uri, uid=NOBODY)
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    return guest


def check_served(old: Daemon, guest: Guest, image: Path) -> None:
    """One backend serves what there was, and the guest sees its bytes."""
    old.request("evict", image="d")
    content = bytearray(image.read_bytes())
    content[10 * PAGE : 11 * PAGE] = b"\xab" * PAGE
    assert bytes.fromhex(guest.call("read", offset=0, length=MIB)) == content[:MIB]
    guest.call("write", offset=20 * PAGE, hex="cd")
    guest.call("discard", offset=20 * PAGE, length=PAGE)
    assert old.guest_status("g")["private_bytes"] == PAGE
    assert old.mismatches() == []


def test_the_new_process_serves_on_and_the_old_ones_end(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    old.request("warm", image="d")
    before = old.status()
    taker = take_over(old)
    assert old.process.wait(ANSWER_SECONDS) == 0
    after = old.status()
    assert after["pid"] not in (before["pid"], taker.pid)
    assert not alive(before["pid"])
    assert (after["resident_bytes"], after["loads"]) == (4 * MIB, before["loads"])
    check_served(old, guest, image)
    os.kill(after["pid"], signal.SIGKILL)  # its keeper keeps as any other
    check_served(old, guest, image)
    second = take_over(old)
    assert taker.process.wait(ANSWER_SECONDS) == 0
    check_served(old, guest, image)
    status = old.status()
    assert (before["generation"], before["adoption_seconds"]) == (1, 0)
    assert (status["generation"], status["keeper"]) == (4, "own")
    assert status["restarts"] == {"crash": 1, "reload": 0, "takeover": 2}
    assert 0 < status["adoption_seconds"] < ANSWER_SECONDS
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(ANSWER_SECONDS) == 0
    assert not (old.run_dir / "cowshed.sock").exists()
    assert list(old.run_dir.glob("keeper.*")) == []


def test_a_reload_after_a_takeover_takes_over_no_second_time(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    taker = take_over(old)
    assert old.process.wait(ANSWER_SECONDS) == 0
    pid = old.status()["pid"]
    taker.process.send_signal(signal.SIGHUP)
    until(lambda: old.status()["pid"] != pid)
    check_served(old, guest, image)
    assert old.status()["restarts"] == {"crash": 0, "reload": 1, "takeover": 1}
    assert taker.process.poll() is None


@pytest.mark.parametrize("phase", ["takeover-held", "takeover-follows"])
def test_if_the_taker_dies_the_old_program_serves_on(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker, phase: str
) -> None:
    pid = backend_pid(old)
    taker = take_over(old, stop_at=phase)
    until(lambda: is_stopped(taker.pid))
    taker.process.kill()
    taker.process.wait()
    check_served(old, guest, image)
    assert (old.status()["pid"] == pid) == (phase == "takeover-held")
    assert old.process.poll() is None
    old.wait_logged("event=takeover-failed")
    take_over(old)  # and all can be done again
    assert old.process.wait(ANSWER_SECONDS) == 0
    check_served(old, guest, image)


def test_if_the_new_backend_dies_before_it_serves_the_old_program_serves_on(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    taker = take_over(old, stop_at="takeover-adopted")
    until(lambda: is_stopped(backend_pid(old)))
    os.kill(backend_pid(old), signal.SIGKILL)
    assert taker.process.wait(ANSWER_SECONDS) != 0
    check_served(old, guest, image)
    assert old.process.poll() is None


def test_if_the_new_keeper_dies_with_its_backend_serving_that_has_another(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    taker = take_over(old, stop_at="takeover-adopted")
    until(lambda: is_stopped(backend_pid(old)))
    pid = backend_pid(old)
    taker.process.kill()
    # The old keeper starts a backend of its own, which finds that one there.
    assert old.process.wait(ANSWER_SECONDS) == 0
    os.kill(pid, signal.SIGCONT)
    check_served(old, guest, image)
    assert old.status()["pid"] == pid
    until(lambda: "event=held" in taker.log())
    os.kill(pid, signal.SIGKILL)
    until(lambda: backend_pid(old) != pid and is_stopped(backend_pid(old)))  # as its parent was to
    os.kill(backend_pid(old), signal.SIGCONT)
    check_served(old, guest, image)
    end_backend(old.run_dir)


@pytest.mark.parametrize("phase", ["takeover-holding", "takeover-leaving", "takeover-told"])
def test_if_the_old_backend_dies_on_the_way_its_own_keeper_has_another_serve(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    image: Path,
    take_over: StartTaker,
    phase: str,
) -> None:
    env = ("env", f"COWSHED_TEST_STOP_AT={phase}")
    old = start_daemon("--image", f"d={image}", kept=True, before=env)
    guest = start_guest(old.uri)
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    pid = backend_pid(old)
    taker = take_over(old)
    until(lambda: is_stopped(pid))
    os.kill(pid, signal.SIGKILL)
    assert taker.process.wait(ANSWER_SECONDS) == 1
    assert taker.log().count("cowshed: ") == 1
    check_served(old, guest, image)
    assert old.process.poll() is None
    assert backend_pid(old) != pid


def test_once_it_was_left_to_the_new_one_serves_whoever_dies(
    start_daemon: StartDaemon, start_guest: StartGuest, image: Path, take_over: StartTaker
) -> None:
    env = ("env", "COWSHED_TEST_STOP_AT=takeover-left")
    old = start_daemon("--image", f"d={image}", kept=True, before=env)
    guest = start_guest(old.uri)
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    pid = backend_pid(old)
    taker = take_over(old)
    until(lambda: is_stopped(pid))
    old.kill()  # its keeper
    os.kill(pid, signal.SIGKILL)
    check_served(old, guest, image)
    assert taker.process.poll() is None


@pytest.mark.parametrize("keeper", ["old", "new"])
def test_without_a_keeper_on_one_side(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    image: Path,
    take_over: StartTaker,
    keeper: str,
) -> None:
    old = start_daemon("--image", f"d={image}", kept=keeper == "old")
    guest = start_guest(old.uri)
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    guest.call("write", offset=10 * PAGE, hex="ab" * PAGE)
    alone = ["--no-keeper"] if keeper == "old" else []
    taker = take_over(old, "--image", f"d={image}", *alone)
    assert old.process.wait(ANSWER_SECONDS) == 0
    check_served(old, guest, image)
    status = old.status()
    assert (status["pid"] == taker.pid) == bool(alone)
    assert status["keeper"] == ("none" if alone else "own")


def test_a_service_of_systemd_takes_over_and_is_not_taken_over_from(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    words = command("serve", "--run-dir", str(old.run_dir), "--image", f"d={image}")
    supervisor = Supervisor([*words, "--takeover"], old.run_dir / "service")
    try:
        assert old.process.wait(ANSWER_SECONDS) == 0
        check_served(old, guest, image)
        assert old.status()["keeper"] == "systemd"
        assert "'systemctl reload'" in refused(take_over(old))
        supervisor.words = words
        supervisor.process.kill()
        supervisor.process.wait()
        supervisor.start()
        check_served(old, guest, image)
        assert old.status()["restarts"] == {"crash": 1, "reload": 0, "takeover": 1}
    finally:
        supervisor.close()


def refused(taker: Taker) -> str:
    """Why it took nothing over, in one line."""
    assert taker.process.wait(ANSWER_SECONDS) == 1
    (line,) = [line for line in taker.log().splitlines() if line.startswith("cowshed: ")]
    return line


def test_what_cannot_be_served_on_is_refused_in_one_line(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker, run_dir: Path
) -> None:
    pid = backend_pid(old)
    other = run_dir / "other.raw"
    other.write_bytes(bytes(MIB))
    same = ["--image", f"d={image}"]
    settings = run_dir / "cowshed.toml"
    settings.write_text('extent = "128K"\n')
    for no, (arguments, why) in enumerate(
        (
            (["--image", f"e={other}"], "image 'd' is not in the new configuration"),
            (["--image", f"d={other}"], "image 'd' has 4194304 bytes, and 1048576"),
            ([*same, "--image", f"e={run_dir}/none"], "none"),
            ([*same, "--config", str(settings)], "extents of 65536 bytes"),
        )
    ):
        assert why in refused(take_over(old, *arguments, stop_at=str(no)))
    empty = run_dir / "empty"
    empty.mkdir()
    assert "no daemon at" in refused(take_over(old, *same, "--run-dir", str(empty)))
    assert old.status()["pid"] == pid
    check_served(old, guest, image)
    assert old.process.poll() is None


def test_another_user_takes_nothing_over(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    pid = backend_pid(old)
    assert "uid" in refused(take_over(old, uid=NOBODY))
    assert old.status()["pid"] == pid
    check_served(old, guest, image)


def test_an_image_is_served_on_whose_source_was_replaced(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    kept = image.with_name("kept")
    kept.write_bytes(image.read_bytes())
    image.unlink()
    first = take_over(old, stop_at="gone")
    assert old.process.wait(ANSWER_SECONDS) == 0
    assert guest.call("compare", path=str(kept), offset=MIB, length=MIB) == 0
    image.write_bytes(bytes(4 * MIB))
    until(lambda: old.status()["images"][0]["source_at_path"] == "other")
    take_over(old, stop_at="another")
    assert first.process.wait(ANSWER_SECONDS) == 0
    assert guest.call("compare", path=str(kept), offset=2 * MIB, length=MIB) == 0
    check_served(old, guest, kept)


def test_another_capacity_is_taken_over_with(
    old: Daemon, guest: Guest, image: Path, take_over: StartTaker
) -> None:
    old.request("warm", image="d")
    take_over(old, "--image", f"d={image}", "--capacity", "2M")
    assert old.process.wait(ANSWER_SECONDS) == 0
    assert old.status()["resident_bytes"] <= 2 * MIB
    check_served(old, guest, image)
