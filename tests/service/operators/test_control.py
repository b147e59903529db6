# SPDX-License-Identifier: Apache-2.0
"""What operators ask is answered soon and truly, however hard guests run."""

import random
import subprocess

import pytest
from domains import Daemon, MakeImage, StartDaemon, command, until
from swarms import Swarm
from switches import BEFORE, switch

pytestmark = pytest.mark.slow

MIB = 1 << 20
IMAGE_BYTES = 32 * MIB
BATCH_BYTES = 64 * (64 << 10)  # what a warm asks for at a time


@pytest.mark.timeout(300)
def test_audit_and_status_are_true_and_quick_while_guests_run_hard(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    image = make_image(8 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "3M")
    with (
        daemon.connect() as backend,
        Swarm(daemon.uri, "churn", 6, rng, path=str(image)) as swarm,
    ):
        until(lambda: len(daemon.status()["guests"]) == 6)
        nr_looks, fewest_faults = 0, 0
        while nr_looks < 400 or fewest_faults < 100:
            if nr_looks % 20 == 0:
                backend.request("evict", image="d")
            nr_looks += 1
            for op in ("status", "audit"):
                reply = backend.request(op)  # PeerError if it waits for the guests to rest
                if op == "status":
                    guests = reply["status"]["guests"]
                    fewest_faults = min(guest["hits"] + guest["misses"] for guest in guests)
                else:
                    assert reply["mismatches"] == []
        swarm.end()
        results = swarm.results()
    assert [result["wrong"] for result in results] == [0] * 6
    assert all(result["steps"] for result in results)
    assert daemon.mismatches() == []


def test_counts_never_fall_while_guests_come_and_go(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}", "--capacity", "1M")
    names = ("hits", "misses", "cow_breaks", "evicted_extents", "loads")
    before = dict.fromkeys(names, 0)
    with (
        daemon.connect() as backend,
        Swarm(daemon.uri, "rounds", 3, rng, nr_rounds=300) as swarm,
    ):
        is_running = True
        while is_running:
            is_running = swarm.running  # one look more when all have gone
            status = backend.request("status")["status"]
            now = {name: status[name] for name in names}
            assert all(now[name] >= before[name] for name in names), (before, now)
            before = now
        swarm.results()
    assert before["hits"] > 0


@pytest.fixture
def held_up(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    """A daemon that loads nothing to its end until it is let_go_on(), so that a warm lasts."""
    daemon = start_daemon(f"--image=d={make_image(IMAGE_BYTES)}", "--capacity=64M", before=BEFORE)
    switch(daemon, "LOAD_PUBLISH", "stop")
    return daemon


def let_go_on(daemon: Daemon) -> None:
    switch(daemon, "LOAD_PUBLISH", "off")


def is_warming(daemon: Daemon) -> bool:
    return daemon.status()["images"][0]["warming"] is not None


def test_status_does_not_wait_for_a_warm(held_up: Daemon) -> None:
    with held_up.connect() as backend, held_up.connect() as other:
        replies = backend.stream("warm", image="d")
        assert "progress" in next(replies)
        assert other.request("status")["status"]["images"][0]["warming"] is not None
        assert "progress" in next(replies)
        let_go_on(held_up)
        *_, last = replies
    assert last["loaded_bytes"] == IMAGE_BYTES


def test_a_warm_that_nobody_waits_for_ends(held_up: Daemon) -> None:
    backend = held_up.connect()
    replies = backend.stream("warm", image="d")  # who drops it has closed the connection
    assert "progress" in next(replies)
    assert is_warming(held_up)
    backend.close()
    until(lambda: not is_warming(held_up))
    let_go_on(held_up)
    # What it had asked for by then comes in, and no more.
    until(lambda: held_up.status()["resident_bytes"] == BATCH_BYTES)
    assert held_up.request("warm", image="d")["already_bytes"] == BATCH_BYTES


def test_a_daemon_ends_in_the_middle_of_a_warm(held_up: Daemon) -> None:
    words = command("warm", "d", "--run-dir", str(held_up.run_dir))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as warming:
        until(lambda: is_warming(held_up))
        assert held_up.stop() == 0
        _, complaint = warming.communicate(timeout=60)
    assert warming.returncode == 1
    assert complaint.count("\n") == 1
    assert "hung up" in complaint or "closed the connection" in complaint


def test_totals_are_the_sums_of_the_parts(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    first, second = make_image(2 * MIB), make_image(MIB, "second.raw")
    daemon = start_daemon("--image", f"d={first}", "--image", f"e={second}", "--capacity", "8M")
    with Swarm(daemon.uri, "hold", 4, rng, path=str(first)) as swarm:
        assert swarm.results() == [{"wrong": 0}] * 4
        daemon.request("warm", image="e")
        status = daemon.status()
        for name in ("hits", "misses", "cow_breaks"):
            assert status[name] == sum(guest[name] for guest in status["guests"])
        assert [image["resident_bytes"] for image in status["images"]] == [2 * MIB, MIB]
        assert status["resident_bytes"] == 3 * MIB
        assert status["saved_bytes"] == 3 * 2 * MIB
        kinds = status["latency_us"]
        assert kinds["hit"]["count"] + kinds["miss"]["count"] >= 4
        for figures in kinds.values():
            ordered = [figures[name] for name in ("p50", "p90", "p99", "max")]
            assert ordered == sorted(ordered)
