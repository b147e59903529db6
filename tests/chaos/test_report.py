# SPDX-License-Identifier: Apache-2.0
"""A failing run of the chaos test is told of in full, whoever of it is gone by then."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
from domains import new_run_dir
from report import report, threads
from world import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: userfaultfd and points")


def test_a_process_that_is_gone_is_said_to_be_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert threads(process.pid) == "gone"
    assert str(os.getpid()) in threads(os.getpid())


def test_a_report_tells_of_events_actors_and_logs_even_if_a_backend_is_gone(
    tmp_path: Path,
) -> None:
    with new_run_dir() as one, new_run_dir() as two:
        world = World(tmp_path, (one, two), "a seed")
        try:
            world.begin("an_event")
            world.note("a step")
            with world.cause("death"):
                pass
            world.guest_log.write(b"a guest's last words\n")
            world.guest_log.flush()
            gone, there = world.hosts
            there_pid = there.backend_pid
            gone.daemon.end()
            (one / "lock").unlink()
            world.fail("never: what was waited for")
            out = io.StringIO()
            report(world, out)
            told = out.getvalue()
            assert told.startswith("chaos failed: never: what was waited for\n")
            for part in ("an_event", "a step", " death\n", "a guest's last words", "event=serving"):
                assert part in told, part
            for actor in world.actors:
                assert f"  {actor.name}: 0 orders done, at begins; not open nowhere yet" in told
            # Of whom there is nothing to see, that is said; of whom there is, all of it.
            assert "  backend A, 0: gone\n" in told
            assert f"  keeper A, {gone.daemon.pid}: gone\n" in told
            assert f"  backend B, {there_pid}: {there_pid} " in told
            assert "the status of A:\n  cowshed: no daemon" in told
            assert f"the status of B:\n  pid {there_pid}" in told
        finally:
            world.guest_log.close()
            for host in world.hosts:
                host.end()
