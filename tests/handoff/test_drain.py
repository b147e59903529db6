# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from domains import in_thread, is_stopped, stop, until
from two_hosts import Host, Model

from cowshed.transport import connect
from cowshed.transport.messages.fields import MovedError

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


def test_private_pages_are_byte_exact_after_a_drain_and_after_the_drain_back(
    pair: Pair, image: Path
) -> None:
    a, b = pair
    models = {name: Model(image, seed) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        with a.open(name, f"token of {name}") as disk:
            model.write(disk)
            model.discard(disk, 3, image)
    for source, target in ((a, b), (b, a), (a, b)):
        report = source.drain("--to", target.unix)
        assert (report["phase"], report["guests"], report["blockers"]) == ("moved", 2, [])
        until(lambda s=source: s.guests() == set())
        assert target.guests() == {"one", "two"}
        for name, model in models.items():
            with target.open(name, f"token of {name}") as disk:
                model.check(disk)
                model.write(disk)
        assert target.the_daemon.mismatches() == []
        assert source.the_daemon.mismatches() == []


def test_what_was_warmed_and_not_touched_yet_is_resident_at_the_target_too(pair: Pair) -> None:
    a, b = pair
    a.the_daemon.request("warm", image="d")
    b.the_daemon.request("evict", image="d")
    (warm,) = a.the_daemon.status()["images"]
    with a.open("g") as disk:
        disk.read(0, 1)
    a.drain("--to", b.unix)
    (image,) = b.the_daemon.status()["images"]
    assert image["resident_bytes"] == warm["resident_bytes"] == image["size_bytes"]


def test_who_comes_to_a_drained_backend_is_sent_to_the_target(pair: Pair) -> None:
    a, b = pair
    a.drain("--to", b.unix)
    for uri in (a.tcp, a.unix):
        with connect(uri) as backend, pytest.raises(MovedError) as caught:
            backend.open("d", guest="g", follow_moves=False)
        assert caught.value.uri == b.unix
    with connect(a.unix) as backend, backend.open("d", guest="g") as disk:
        assert disk.origin == b.unix
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert "was drained to" in done.stderr
    done = a.run("drain", "--abort")
    assert "too late" in done.stderr


def test_a_dry_run_says_what_would_move_and_what_blocks_and_moves_nothing(
    pair: Pair, image: Path
) -> None:
    a, b = pair
    with a.open("g") as disk:
        Model(image, 1).write(disk)
    done = a.run("drain", "--dry-run", "--to", b.unix)
    assert (done.returncode, done.stdout) == (0, f"1 guests would move to {b.unix}\n")
    with b.open("g"):
        pass
    done = a.run("drain", "--dry-run", "--json", "--to", b.unix)
    assert done.returncode == 1
    (blocker,) = json.loads(done.stdout)["blockers"]
    assert blocker["guest"] == "g"
    assert "taken" in blocker["reason"]
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert "guest 'g'" in done.stderr
    assert "taken" in done.stderr
    assert (a.guests(), b.guests()) == ({"g"}, {"g"})
    with a.open("g") as disk:
        Model(image, 2).write(disk)


def test_an_image_that_the_target_does_not_serve_blocks_and_says_the_cure(
    hosts: Pair, tmp_path: Path
) -> None:
    a, b = hosts
    b.image = tmp_path / "other.raw"
    b.image.write_bytes(b"other" * 100000)
    a.start()
    b.start()
    with a.open("g") as disk:
        disk.write(0, b"x")
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert "image 'default/d'" in done.stderr
    assert f"--image d={a.image}" in done.stderr
    assert a.guests() == {"g"}


def test_a_target_that_does_not_answer_is_named_and_the_timeout_rolls_back(
    pair: Pair, image: Path
) -> None:
    a, b = pair
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    stop(b.the_daemon.pid)
    try:
        done = a.run("drain", "--timeout", "3", "--to", b.unix)
    finally:
        os.kill(b.the_daemon.pid, signal.SIGCONT)
    assert done.returncode == 1
    waited = f"did not end in 3 s, while it waited for a connection to {b.unix}"
    assert waited in done.stderr
    with a.open("g") as disk:
        model.check(disk)
        model.write(disk)


def test_an_abort_rolls_everything_back(pair: Pair, hosts: Pair, image: Path) -> None:
    a, b = pair
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    b.kill()
    b.start(before=("env", "COWSHED_TEST_STOP_AT=target-receive"))
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(b.the_daemon.pid))
    until(lambda: _state(a)["waits_for"] == "the target's check of the offer")
    assert _state(a)["phase"] == "prepare"
    shown = " ".join(a.run("status").stdout.split())
    assert f"prepare to {b.unix}, 1 guest: " in shown
    assert "waits for the target's check of the offer" in shown
    done = a.run("drain", "--abort")
    assert (done.returncode, done.stderr) == (0, "")
    drain.join()
    os.kill(b.the_daemon.pid, signal.SIGCONT)
    with a.open("g") as disk:
        model.check(disk)
        model.write(disk)
    until(lambda: "handoff-broken-off" in b.the_daemon.log() or b.guests() == set())
    b.kill()
    b.start(before=("env", "COWSHED_TEST_STOP_AT="))
    a.drain("--to", b.tcp)
    with b.open("g") as disk:
        model.check(disk)


PHASES = [
    "source-connect",
    "source-prepare",
    "source-warm",
    "source-precopy",
    "source-freeze",
    "source-commit",
    "source-moved",
    "target-check",
    "target-receive",
    "target-ready",
    "target-owner",
]


@pytest.mark.parametrize("phase", PHASES)
def test_one_owner_is_left_wherever_one_end_is_killed(
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
        model.write(disk)
        disk.flush()
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    killed = a if is_source else b
    until(lambda: is_stopped(killed.the_daemon.pid))
    killed.kill()
    killed.start()
    drain.join()
    until(lambda: _nr_owners(a, b) == 1)
    owner = b if "g" in b.guests() else a
    with owner.open("g") as disk:
        model.check(disk)
        model.write(disk)
    if phase == "source-moved":
        assert owner is b
    if owner is a:
        a.wait_movable("--to", b.unix)
        a.drain("--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
    assert _nr_owners(a, b) == 1


def _nr_owners(a: Host, b: Host) -> int:
    return sum("g" in host.guests() and not _is_drained(host) for host in (a, b))


def _is_drained(host: Host) -> bool:
    drain = _state(host)
    return bool(drain) and drain["phase"] in ("commit", "moved")


def _state(host: Host) -> dict[str, Any]:
    return dict(host.the_daemon.request("drain-state")["drain"] or {})


def test_guests_go_on_after_a_drain_that_could_not_be_recorded(pair: Pair, image: Path) -> None:
    a, b = pair
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    in_the_way = a.run_dir / "state"
    in_the_way.write_text("no folder")
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    with a.open("g") as disk:
        model.check(disk)
        model.write(disk)
    in_the_way.unlink()
    a.drain("--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
