# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear line (what, which value, what to do), a status, and the others served on."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    cowshed,
    new_run_dir,
    until,
    write_image,
)

from cowshed.cache import CowshedError

MIB = 1 << 20
KIB = 1 << 10

refuses_userfaultfd = pytest.mark.skipif(
    os.geteuid() != 0
    or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n"
    or bool(os.stat("/dev/userfaultfd").st_mode & 0o6),
    reason="needs root, and a machine that refuses userfaultfd to nobody",
)


def refusal(*arguments: str | Path, status: int, **how: Any) -> str:
    """The one line of a command that fails with this status."""
    ended = cowshed(*arguments, **how)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("cowshed: ")
    return lines[0]


def has(line: str, *words: str) -> bool:
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"
    return True


def other_dev(*lines: str) -> list[str]:
    """A command that runs another in a mount namespace with a /dev of these lines' making."""
    script = ["mount -t tmpfs -o mode=755 none /dev", "mknod -m 666 /dev/null c 1 3", *lines]
    return ["unshare", "-m", "sh", "-c", " && ".join([*script, 'exec "$@"']), "sh"]


# Serving.


def test_a_source_that_is_missing_is_one_line(run_dir: Path) -> None:
    line = refusal("serve", "--run-dir", run_dir, "--image", "d=/none/such.raw", status=1)
    assert has(line, "'/none/such.raw'", "No such file", "name a file")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it serves as nobody")
def test_a_source_that_may_not_be_read_is_one_line(run_dir: Path, make_image: MakeImage) -> None:
    image = make_image(MIB)
    image.chmod(0o600)
    before = other_dev(f"mknod -m 666 /dev/userfaultfd c {device_numbers()}")
    run_dir.chmod(0o777)
    arguments = ("serve", "--run-dir", run_dir, "--image", f"d={image}")
    line = refusal(*arguments, status=1, uid=NOBODY, before=before)
    assert has(line, str(image), "Permission denied", "name a file that the backend can read")


def device_numbers() -> str:
    device = os.stat("/dev/userfaultfd").st_rdev
    return f"{os.major(device)} {os.minor(device)}"


def test_a_source_that_is_no_file_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for source in (tmp_path, fifo, Path("/dev/null")):
        line = refusal("serve", "--run-dir", run_dir, "--image", f"d={source}", status=1)
        assert has(line, str(source), "neither a file nor a block device", "raw image")


def test_an_empty_source_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    line = refusal("serve", "--run-dir", run_dir, "--image", f"d={empty}", status=1)
    assert has(line, str(empty), "has 0 bytes", "at least 1")


@pytest.mark.parametrize("capacity", ["0", "1", "64K", "127K"])
def test_less_capacity_than_two_extents_is_one_line(
    run_dir: Path, make_image: MakeImage, capacity: str
) -> None:
    arguments = ("serve", "--run-dir", run_dir, "--image", f"d={make_image(MIB)}")
    line = refusal(*arguments, "--capacity", capacity, status=2)
    assert has(line, "capacity of", "128K or more")


@pytest.mark.parametrize("capacity", ["128K", "192K", "256K", "1M"])
def test_a_tiny_capacity_serves_several_guests(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, capacity: str
) -> None:
    image = make_image(2 * MIB + 5)
    daemon = start_daemon("--image", f"d={image}", "--capacity", capacity)
    guests = [start_guest(daemon.uri) for _ in range(3)]
    for guest in guests:
        guest.call("open", image="d")
        guest.call("fill", offset=300 * KIB, length=4, byte=9)
    for guest in guests:
        guest.start("compare", path=str(image), offset=0, length=2 * MIB + 5, step=10_000)
    assert [guest.finish() for guest in guests] == [4, 4, 4]
    assert daemon.status()["resident_bytes"] <= daemon.status()["capacity_bytes"]
    assert daemon.mismatches() == []
    assert daemon.stop() == 0


def test_a_run_dir_in_use_is_one_line(make_image: MakeImage, start_daemon: StartDaemon) -> None:
    image = make_image(MIB)
    daemon = start_daemon("--image", f"d={image}")
    line = refusal("serve", "--run-dir", daemon.run_dir, "--image", f"d={image}", status=1)
    assert has(line, str(daemon.run_dir), f"pid {daemon.pid}", "--run-dir")
    assert daemon.status()["pid"] == daemon.pid


def test_a_run_dir_of_a_killed_daemon_is_taken_over(
    make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    arguments = ("--image", f"d={make_image(MIB)}")
    start_daemon(*arguments).kill()
    assert start_daemon(*arguments).stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it serves as nobody")
def test_a_run_dir_that_cannot_be_written_is_one_line(run_dir: Path, make_image: MakeImage) -> None:
    image = make_image(MIB)
    arguments = ("serve", "--run-dir", run_dir, "--image", f"d={image}")
    line = refusal(*arguments, status=1, uid=NOBODY)
    assert has(line, str(run_dir), "Permission denied", "--run-dir")
    line = refusal("serve", "--run-dir", image, "--image", f"d={image}", status=1)
    assert has(line, str(image), "--run-dir")


def test_a_configuration_that_is_not_there_is_one_line(run_dir: Path) -> None:
    line = refusal("serve", "--config", "/none/cowshed.toml", "--run-dir", run_dir, status=2)
    assert has(line, "/none/cowshed.toml", "No such file", "--config")


@refuses_userfaultfd
def test_a_daemon_without_userfaultfd_is_told_the_cure(
    run_dir: Path, make_image: MakeImage
) -> None:
    run_dir.chmod(0o777)
    arguments = ("serve", "--run-dir", run_dir, "--image", f"d={make_image(MIB)}")
    line = refusal(*arguments, status=1, uid=NOBODY)
    assert has(line, "/dev/userfaultfd", "Permission denied", "run as root", "sysctl")


@refuses_userfaultfd
def test_a_daemon_of_nobody_serves_other_users(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(2 * MIB)
    run_dir.chmod(0o777)
    before = other_dev(f"mknod -m 666 /dev/userfaultfd c {device_numbers()}")
    daemon = start_daemon("--image", f"d={image}", uid=NOBODY, before=before)
    for uid in (NOBODY, NOBODY - 1, None):
        guest = start_guest(daemon.uri, uid)
        guest.call("open", image="d")
        guest.call("poke", pages=[3], byte=255)
        assert guest.call("compare", path=str(image), offset=0, length=2 * MIB) == 1
    assert [guest["private_bytes"] for guest in daemon.status()["guests"]] == [4096] * 3
    assert daemon.mismatches() == []


@refuses_userfaultfd
def test_a_guest_without_userfaultfd_is_told_the_cure(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(MIB)
    daemon = start_daemon("--image", f"d={image}", before=other_dev())
    daemon.wait_logged("no /dev/userfaultfd to lend")
    nobody, root = start_guest(daemon.uri, NOBODY), start_guest(daemon.uri)
    with pytest.raises(AssertionError, match=r"UsageError: .*'d'.*userfaultfd.*run the backend"):
        nobody.call("open", image="d")
    root.call("open", image="d")
    assert root.call("compare", path=str(image), offset=0, length=MIB) == 0


# An image that goes away.


def test_an_image_that_shrinks_fails_only_what_it_lost(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    kept = image.with_name("kept")
    kept.write_bytes(image.read_bytes())
    daemon = start_daemon("--image", f"d={image}", "--capacity", "1M")
    guest, other = start_guest(daemon.uri), start_guest(daemon.uri)
    for each in (guest, other):
        each.call("open", image="d")
    assert guest.call("compare", path=str(kept), offset=0, length=4 * MIB) == 0
    daemon.request("evict", image="d")
    os.truncate(image, 2 * MIB)
    lost = r"OSError: .*Input/output error.*'d'|OSError: \[Errno 5\].*'d'"
    with pytest.raises(AssertionError, match=lost):
        guest.call("read", offset=3 * MIB, length=10)
    for each in (guest, other):
        assert each.call("compare", path=str(kept), offset=0, length=2 * MIB) == 0
    with pytest.raises(AssertionError, match=lost):
        other.call("read", offset=2 * MIB, length=1)
    until(lambda: daemon.status()["images"][0]["source_changed"] is True)
    lines = [line for line in daemon.log().splitlines() if "event=source-changed" in line]
    assert len(lines) == 1
    assert has(lines[0], "image=d", str(image), str(4 * MIB), str(2 * MIB), "restart")
    assert daemon.status()["load_errors"] > 0
    assert daemon.mismatches() == []
    # Whole again, and so are the reads.
    image.write_bytes(kept.read_bytes())
    for each in (guest, other):
        assert each.call("compare", path=str(kept), offset=0, length=2 * MIB) == 0
    assert start_and_compare(start_guest, daemon, kept) == 0


def start_and_compare(start_guest: StartGuest, daemon: Daemon, path: Path) -> int:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    return int(guest.call("compare", path=str(path), offset=0, length=path.stat().st_size))


# Asking.


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One for all that follows: each bad request leaves it good."""
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", 4 * MIB)
        daemon = Daemon(run_dir, ["--image", f"d={image}", "--capacity", "2M"])
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.kill()


@pytest.fixture(scope="module")
def guest(daemon: Daemon) -> Iterator[Guest]:
    guest = Guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    yield guest
    guest.close()


def served(daemon: Daemon, guest: Guest) -> bool:
    image = str(daemon.run_dir / "image.raw")
    assert guest.call("compare", path=image, offset=0, length=4 * MIB) == 0
    assert daemon.mismatches() == []
    return True


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pin", "e"], 1, ["no image 'e'", "there is d"]),
        (["quota", "h", "1M"], 1, ["no guest 'h'", "there is g"]),
        (["quota", "g", "0"], 2, ["quota of 0 bytes", "4K or more", "none"]),
        (["quota", "g", "4095"], 2, ["quota of 4095 bytes", "4K or more"]),
        (["pin", "d", "4M", "1"], 1, ["1 bytes at 4194304", "'d'", "4194304 bytes", "inside"]),
        (["warm", "d", "0", "5M"], 1, ["5242880 bytes at 0", "inside"]),
        (["evict", "d", "1", "4M"], 1, ["4194304 bytes at 1", "inside"]),
        (["evict", "d", "1"], 2, ["OFFSET and LENGTH"]),
        (["evict", "d", "0", "0"], 2, ["LENGTH is 0"]),
        (["evict", "d", "-1", "1"], 2, ["-1"]),
        (["pin", "d", "0", "8E"], 2, ["LENGTH '8E'", "smaller"]),
        (["pin", "d", "0", "7E"], 1, ["inside"]),
        (["pin", "d"], 1, ["cannot pin 4M", "'d'", "at most 1.", "can be pinned", "capacity"]),
        (["unpin", "d", "0", "64K"], 1, ["64K", "'d'", "pinned", "see status"]),
    ],
)
def test_a_bad_request_is_one_line(
    daemon: Daemon, guest: Guest, arguments: list[str], status: int, words: list[str]
) -> None:
    line = refusal(*arguments, "--run-dir", daemon.run_dir, status=status)
    assert has(line, *words)
    assert daemon.status()["images"][0]["pinned_bytes"] == 0
    assert served(daemon, guest)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"op": "frobnicate"}, "no request 'frobnicate' is known"),
        ({"op": "quota", "guest": "g", "quota_bytes": 0}, "quota of 0 bytes"),
        ({"op": "quota", "guest": "nobody"}, "no guest 'nobody'"),
        ({"op": "pin", "image": "d", "offset": (1 << 63) - 1}, "inside"),
        ({"op": "warm", "image": "d", "offset": (1 << 63) - 1, "length": (1 << 63) - 1}, "inside"),
        ({"op": "evict", "image": "d", "offset": -1}, "'offset' is -1"),
        ({"op": "evict", "image": "d", "length": 1.5}, "'length' is 1.5"),
        ({"op": "evict", "image": ["d"]}, "'image' is"),
        ({"op": "pin"}, "'image' is None"),
    ],
)
def test_a_request_of_nonsense_is_refused_in_one_line(
    daemon: Daemon, guest: Guest, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(CowshedError) as refused:
        daemon.request(**fields)
    assert has(str(refused.value), words)
    assert "\n" not in str(refused.value)
    assert served(daemon, guest)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"image": "e"}, "no image 'e'; there is d"),
        ({"guest": "g"}, "guest name 'g' is taken"),
        ({"quota_bytes": 0}, "quota of 0 bytes"),
        ({"quota_bytes": 4095}, "quota of 4095 bytes"),
        ({"on_quota": "explode"}, "'on_quota' is 'explode'; needed: one of stop, kill, allow"),
        ({"window_bytes": 5000}, "window of 5000 bytes"),
        ({"window_bytes": 1 << 40}, "a power of two from 4096"),
        ({"write_window_bytes": 12288}, "write window of 12288 bytes"),
        ({"guest": "a\nb"}, "printable"),
        ({"guest": "x" * 65}, "1 to 64 printable"),
    ],
)
def test_terms_that_cannot_be_met_are_refused_in_one_line(
    daemon: Daemon, guest: Guest, start_guest: StartGuest, terms: dict[str, Any], words: str
) -> None:
    second = start_guest(daemon.uri)
    with pytest.raises(AssertionError) as refused:
        second.call("open", **{"image": "d", **terms})
    assert has(str(refused.value), words)
    second.call("open", image="d", guest="second")
    assert served(daemon, second)
    assert served(daemon, guest)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it asks as nobody")
def test_another_user_may_read_and_not_command(
    daemon: Daemon, guest: Guest, start_guest: StartGuest
) -> None:
    stranger = start_guest(daemon.uri, NOBODY)
    for op in ("status", "audit", "pin", "evict", "shutdown"):
        with pytest.raises(AssertionError, match=f"UsageError: '{op}' is for root .* uid 65534"):
            stranger.call("request", op=op)
    line = refusal("status", "--run-dir", daemon.run_dir, status=1, uid=NOBODY)
    assert has(line, "'status'", "uid 65534")
    stranger.call("open", image="d")
    assert served(daemon, stranger)
    assert served(daemon, guest)


def test_no_daemon_is_one_line(run_dir: Path) -> None:
    line = refusal("status", "--run-dir", run_dir, status=1)
    assert has(line, str(run_dir), "cowshed serve")


def test_serving_ends_by_a_second_signal_too_and_with_status_0(
    run_dir: Path, make_image: MakeImage
) -> None:
    words = command("serve", "--run-dir", str(run_dir), "--image", f"d={make_image(MIB)}")
    with subprocess.Popen(words, stderr=subprocess.PIPE) as serving:
        assert serving.stderr is not None
        assert b"event=serving " in serving.stderr.readline()
        # The second comes while it ends because of the first, and not when it has ended.
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            serving.send_signal(number)
        assert serving.wait(ANSWER_SECONDS) == 0
    assert not (run_dir / "cowshed.sock").exists()
