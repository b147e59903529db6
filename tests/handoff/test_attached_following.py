# SPDX-License-Identifier: Apache-2.0
"""Programs under `cowshed attach` follow a drain by themselves, children too."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import NOBODY, Guest, command, in_thread, is_stopped, plain_environment, stop, until
from switches import BEFORE, switch
from two_hosts import PAGE, SIZE, Host

from cowshed.cache.errors import UsageError

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]
MOVER = Path(__file__).parents[1] / "attach" / "mover.py"


class Program(Guest):
    """A mover.py under cowshed attach; what it says to stderr is in a file."""

    def __init__(
        self,
        host: Host,
        name: str,
        *options: str,
        before: tuple[str, ...] = (),
        uid: int | None = None,
    ) -> None:
        copy = host.run_dir / "copy.raw"  # which every user may read
        shutil.copy(host.image, copy)
        self.told = host.run_dir / f"{name}.stderr"
        words = command(
            *("attach", "d", "--run-dir", str(host.run_dir), "--guest", name, *options, "--"),
            *("python3", "-Wignore", str(MOVER), "{image}", str(copy)),
            uid=uid,
        )
        with self.told.open("wb") as told:
            self.process = subprocess.Popen(
                [*before, *words],
                env=plain_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
            )
        self.pid = self.process.pid
        self.finish()

    def says(self) -> str:
        return self.told.read_text()


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program: start(host, name, *options of cowshed attach)."""
    programs: list[Program] = []

    def start_one(host: Host, name: str = "g", *options: str, **how: Any) -> Program:
        programs.append(Program(host, name, *options, **how))
        return programs[-1]

    yield start_one
    for program in programs:
        program.close()


def _mapped(host: Host, name: str = "g") -> bool:
    """Whether a guest maps there."""
    return any(
        guest["name"] == name and guest["transport"] == "unix" and guest["pid"]
        for guest in host.the_daemon.status()["guests"]
    )


def _wait_moved(source: Host, target: Host, name: str = "g") -> None:
    until(lambda: name not in source.guests())
    until(lambda: _mapped(target, name))


def test_every_mapping_goes_to_the_target_and_back_with_its_own_private_pages(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a, "g", "--quota", "8M")
    program.call("map")
    one = program.call("map", writable=True)
    two = program.call("map", first=100, nr_pages=300, writable=True)
    program.call("write", no=one, page=0, nr_pages=40, byte=1)
    program.call("write", no=one, page=SIZE // PAGE - 1, byte=2)
    program.call("write", no=two, page=5, nr_pages=20, byte=3)
    assert program.call("check") == []
    program.call("spin")
    for turn, (source, target) in enumerate(((a, b), (b, a), (a, b))):
        looks = program.call("looks")
        source.drain("--to", target.unix)
        _wait_moved(source, target)
        until(lambda n=looks: program.call("looks") > n)  # type: ignore[misc]
        assert program.call("check") == []
        program.call("write", no=two, page=50 + turn, nr_pages=2, byte=10 + turn)
        program.call("write", no=one, page=7, byte=20 + turn)
        program.call("discard", no=two, page=6 + turn)
        program.call("map", first=turn, nr_pages=9)
        assert program.call("check") == []
        until(lambda t=target: t.the_daemon.mismatches() == [])  # type: ignore[misc]
        nr_private = 41 + 20 - (turn + 1) + (turn + 2)
        assert target.the_daemon.guest_status("g")["private_bytes"] == nr_private * PAGE
        assert target.the_daemon.guest_status("g")["quota_bytes"] == 8 << 20
    assert program.call("spun") == []
    assert program.says() == ""


def test_children_go_each_with_what_it_had_when_it_was_made_and_wrote_since(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    no = program.call("map", writable=True)
    program.call("map", first=3, nr_pages=20)
    program.call("write", no=no, page=0, nr_pages=30, byte=1)
    child = program.call("fork")
    program.call("write", no=no, page=10, nr_pages=30, byte=2)
    program.call("child", order={"do": "write", "no": no, "page": 20, "nr_pages": 40, "byte": 3})
    a.drain("--to", b.unix)
    _wait_moved(a, b)
    assert program.call("check") == []
    assert program.call("child", order={"do": "check"}) == []
    # One that is made there, and one that its child makes.
    assert program.call("child_check") == 0
    assert program.call("child", order={"do": "child_check"}) == 0
    program.call("child", order={"do": "write", "no": no, "page": 90, "byte": 4})
    assert program.call("check") == []
    assert program.call("child", order={"do": "check"}) == []
    until(lambda: b.the_daemon.mismatches() == [])
    os.kill(child, signal.SIGKILL)
    assert program.says() == ""


def test_a_mapping_in_pieces_goes_piece_by_piece_at_the_same_addresses(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    at = program.call("cut_up", first=SIZE // PAGE - 103, nr_pages=100)
    assert program.call("check_pieces", hidden=at) == []
    for byte, (source, target) in enumerate(((a, b), (b, a)), 1):
        source.drain("--to", target.unix)
        _wait_moved(source, target)
        assert program.call("check_pieces", hidden=at) == []
        assert program.call("write_pieces", byte=byte) > 80
        assert program.call("check_pieces", hidden=at) == []
        until(lambda t=target: t.the_daemon.mismatches() == [])  # type: ignore[misc]
    assert program.call("fork")
    assert program.call("child", order={"do": "check_pieces", "hidden": at}) == []
    program.call("open_up", address=at)
    assert program.call("check_pieces") == []
    assert program.says() == ""


def test_the_source_can_stop_and_a_death_of_the_target_is_survived(
    hosts: Pair, start: Start
) -> None:
    a, b = hosts
    a.start()
    b.start(kept=True)
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=8, nr_pages=20, byte=5)
    a.drain("--to", b.unix)
    _wait_moved(a, b)
    a.the_daemon.process.terminate()
    assert a.the_daemon.process.wait() == 0
    assert program.call("check") == []
    before = b.the_daemon.status()["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: b.the_daemon.status()["pid"] != before)
    b.the_daemon.request("evict", image="d")
    assert program.call("check") == []
    program.call("write", no=no, page=100, nr_pages=20, byte=6)
    # And where it asks now is the target.
    program.call("map", first=5, nr_pages=50, writable=True)
    assert program.call("child_check") == 0
    assert program.call("check") == []
    b.end()
    until(lambda: "lost its backend, and none comes after it" in program.says())


def test_a_program_that_maps_and_forks_during_the_drain_sees_nothing_of_it(
    hosts: Pair, start: Start
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"))
    b.start()
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=0, nr_pages=30, byte=1)
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    program.start("child_check")
    assert not program.answered(0.2)
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    assert program.finish() == 0
    drain.join()
    program.call("map", first=10, nr_pages=10, writable=True)
    _wait_moved(a, b)
    assert program.call("check") == []
    assert program.call("child_check") == 0
    until(lambda: b.the_daemon.mismatches() == [])


def test_programs_that_only_read_and_copy_go_on(pair: Pair, start: Start, image: Path) -> None:
    """Shell tools under one attach: the file is read before and after, and mapped by dd's like."""
    a, b = pair
    script = 'cat {image}; read line; dd if={image} bs=64K status=none; cmp {image} "$1"'
    words = command("attach", "d", "--run-dir", str(a.run_dir), "--", "sh", "-c", script, "sh")
    with subprocess.Popen(
        [*words, str(image)],
        env=plain_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(SIZE) == image.read_bytes()
        a.drain("--to", b.unix)
        shown, _ = process.communicate(b"\n")
    assert (process.returncode, shown) == (0, image.read_bytes())


def test_where_it_cannot_follow_it_is_told_in_one_line_and_stays(pair: Pair, start: Start) -> None:
    a, b = pair
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=4, byte=9)
    a.drain("--to", b.tcp)
    until(lambda: "this program cannot follow" in program.says())
    assert len(program.says().splitlines()) == 1
    assert program.call("check") == []
    assert a.guests() == {"g"}
    program.start("write", no=no, page=50, byte=1)
    assert not program.answered(0.2)


def test_several_mappings_keep_a_drain_from_where_they_cannot_follow(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    for _ in range(2):
        program.call("map", writable=True)
    done = a.run("drain", "--to", b.tcp)
    assert done.returncode != 0
    assert "it has 2 mappings" in done.stderr
    assert program.call("check") == []


def test_a_target_that_dies_before_it_has_come_is_tried_again(hosts: Pair, start: Start) -> None:
    a, b = hosts
    a.start()
    b.start()
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=4, byte=9)
    stop(program.pid)
    a.drain("--to", b.unix)
    b.kill()
    os.kill(program.pid, signal.SIGCONT)
    until(lambda: "tries again" in program.says())
    # The source serves it meanwhile, as ever.
    program.call("write", no=no, page=30, nr_pages=4, byte=8)
    a.the_daemon.request("evict", image="d")
    assert program.call("check") == []
    b.start()
    _wait_moved(a, b)
    assert program.call("check") == []
    until(lambda: b.the_daemon.mismatches() == [])
    assert len(program.says().splitlines()) == 1


def test_a_program_that_writes_and_gives_back_all_the_time_loses_nothing(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    program.call("map", first=7, nr_pages=3)
    program.call("map", writable=True)
    program.call("write_on")
    for source, target in ((a, b), (b, a), (a, b), (b, a)):
        looks = program.call("looks")
        until(lambda n=looks: program.call("looks") > n + 500)  # type: ignore[misc]
        source.drain("--to", target.unix)
        _wait_moved(source, target)
    assert program.call("spun") == []
    assert program.call("check") == []
    until(lambda: a.the_daemon.mismatches() == [])
    assert program.says() == ""


def test_what_is_written_while_its_pages_are_carried_over_is_carried_too(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    program.call("map", first=7, nr_pages=3)
    program.call("map", writable=True)
    program.call("count_on", first=0, nr_pages=SIZE // PAGE)
    for source, target in ((a, b), (b, a), (a, b), (b, a)):
        looks = program.call("looks")
        until(lambda n=looks: program.call("looks") > n + 20)  # type: ignore[misc]
        source.drain("--to", target.unix)
        _wait_moved(source, target)
    assert program.call("spun") == []
    assert program.call("check") == []


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        *((point, True) for point in ("OPEN_TOLD", "REGION_ATTACHED", "REGION_HELD")),
        *((point, False) for point in ("OPEN_TOLD", "REGION_ATTACHED", "REGION_HELD")),
        ("REGION_TOLD", True),  # it has come by then, and without a successor it is an orphan
    ],
)
def test_a_target_killed_while_a_program_comes_has_it_in_the_end(
    hosts: Pair, start: Start, monkeypatch: pytest.MonkeyPatch, point: str, kept: bool
) -> None:
    """With a successor, or started anew: what was private was never the target's to lose."""
    a, b = hosts
    a.start()
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    b.start(kept=kept)
    monkeypatch.delenv("COWSHED_TEST_POINTS")
    program = start(a)
    no = program.call("map", writable=True)
    other = program.call("map", first=50, nr_pages=100, writable=True)
    program.call("map")
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    program.call("write", no=other, page=3, nr_pages=20, byte=8)
    program.call("write_on") if kept else program.call("spin")
    b.the_daemon.request("point", name=point)
    before = b.the_daemon.status()["pid"]
    a.drain("--to", b.unix)
    if kept:
        until(lambda: b.the_daemon.status()["pid"] != before)
    else:
        b.the_daemon.process.wait()
        b.start()
    _wait_moved(a, b)
    looks = program.call("looks")
    until(lambda: program.call("looks") > looks)
    assert program.call("spun") == []
    assert program.call("check") == []
    until(lambda: b.the_daemon.mismatches() == [])


def test_a_source_killed_before_its_program_has_gone_tells_it_again(
    hosts: Pair, start: Start
) -> None:
    """And by post-copy, of which nothing is left to follow."""
    a, b = hosts
    a.start(kept=True)
    b.start()
    program = start(a, "g", "--quota", "1M")
    no = program.call("map", writable=True)
    program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    a.the_daemon.request("quota", guest="g", quota_bytes=3 << 20)
    stop(program.pid)
    a.drain("--post-copy", "--to", b.unix)
    before = a.the_daemon.status()["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: a.the_daemon.status()["pid"] != before)
    os.kill(program.pid, signal.SIGCONT)
    _wait_moved(a, b)
    assert program.call("check") == []
    until(lambda: b.the_daemon.mismatches() == [])
    status = b.the_daemon.guest_status("g")
    assert (status["private_bytes"], status["quota_bytes"]) == (40 * PAGE, 3 << 20)
    assert program.says() == ""


def test_nobody_else_gets_the_place_of_a_program_on_its_way(pair: Pair, start: Start) -> None:
    """An overlay without its pages would be other bytes than the program's."""
    a, b = pair
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    stop(program.pid)
    a.drain("--to", b.unix)
    with pytest.raises(UsageError, match="taken"), b.open("g"):
        pass
    export = f"nbd+unix:///d@g?socket={b.run_dir}/nbd.sock"
    assert subprocess.run(["nbdinfo", export], capture_output=True, check=False).returncode != 0
    done = b.run("drain", "--to", a.unix)
    assert "has not yet moved here" in done.stderr
    os.kill(program.pid, signal.SIGCONT)
    _wait_moved(a, b)
    assert program.call("check") == []


def test_a_place_whose_program_has_ended_on_its_way_can_be_given_up(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a)
    program.call("map")
    stop(program.pid)
    a.drain("--to", b.unix)
    program.kill()
    assert b.guests() == {"g"}
    assert b.run("discard", "d@g").returncode == 0
    assert b.guests() == set()


def test_a_program_in_another_folder_tree_does_not_try_to_follow(hosts: Pair, start: Start) -> None:
    """Where the target's socket is something else to it."""
    a, b = hosts
    a.start()
    b.start()
    program = start(
        a,
        "g",
        before=(
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs none {b.run_dir}; exec "$@"',
            "sh",
        ),
    )
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    a.drain("--to", b.unix)
    until(lambda: "this program cannot follow" in program.says())
    assert program.call("check") == []
    assert b.the_daemon.guest_status("g")["private_bytes"] == 40 * PAGE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_program_that_may_not_look_at_its_own_memory_stays_and_is_served(
    pair: Pair, start: Start
) -> None:
    a, b = pair
    program = start(a, uid=NOBODY)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    program.call("hide")
    a.drain("--to", b.unix)
    until(lambda: "tries again" in program.says())
    a.the_daemon.request("evict", image="d")
    program.call("write", no=no, page=90, nr_pages=40, byte=8)
    assert program.call("check") == []
    assert a.guests() == {"g"}


def test_who_maps_or_forks_before_it_is_decided_waits_for_that(hosts: Pair, start: Start) -> None:
    """The source sends on whoever comes, and the target does not know them yet."""
    a, b = hosts
    a.start()
    b.start(before=BEFORE)
    program = start(a)
    no = program.call("map", writable=True)
    program.call("write", no=no, page=3, nr_pages=40, byte=9)
    assert program.call("check") == []
    child = program.call("fork")
    switch(b.the_daemon, "LOAD_READ", "stop", times=0)
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: "working sets" in (a.the_daemon.status()["drain"] or {}).get("waits_for", ""))
    program.start("map", first=5, nr_pages=50)
    assert not program.answered(0.3)
    switch(b.the_daemon, "LOAD_READ", "off")
    program.finish()
    drain.join()
    assert program.call("check") == []
    assert program.call("child", order={"do": "child_check"}) == 0
    _wait_moved(a, b)
    os.kill(child, signal.SIGKILL)
    assert program.says() == ""
