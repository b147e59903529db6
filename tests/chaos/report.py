# SPDX-License-Identifier: Apache-2.0
"""What one needs to know of a chaos run that failed, printed once.

Whoever it tells of may be gone, or go meanwhile: each part is told as far as it can be, and a part
that cannot be told says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TextIO

from actors import Actor
from domains import until
from hosts import ChaosHost
from world import World

__all__ = ["report"]

SHOWN_LOG_LINES: Final = 60
SHOWN_GUEST_LOG_BYTES: Final = 6000


def report(world: World, out: TextIO | None = None) -> None:
    """Print the events, the last steps, every actor, process and backend, and the logs' tails."""
    out = out or sys.stderr
    print(f"chaos failed: {world.failed}", file=out)
    _tell(out, "the events", lambda: world.events)
    _tell(out, "the last steps", lambda: list(world.steps))
    _tell(out, "what may make guests fail", lambda: world.causes_told())
    owner = "on their way" if world.is_moving else f"at {world.hosts[world.owner].name}"
    _tell(out, f"the guests ({owner})", lambda: [_actor(actor) for actor in world.actors])
    _tell(
        out,
        "the processes",
        lambda: [f"{name}, {pid}: {threads(pid)}" for name, pid in _processes(world)],
    )
    for host in world.hosts:
        _tell(out, f"the status of {host.name}", lambda h=host: _status(h))  # type: ignore[misc]
        _tell(
            out,
            f"the log of {host.name}",
            lambda h=host: h.daemon.log().splitlines()[-SHOWN_LOG_LINES:],  # type: ignore[misc]
        )
        if "HANG" in world.failed or "never" in world.failed:
            _tell(out, f"the stacks of {host.name}", lambda h=host: _stacks(h))  # type: ignore[misc]
    _tell(
        out,
        "the guests' log",
        lambda: world.guest_log_path.read_text()[-SHOWN_GUEST_LOG_BYTES:].splitlines(),
    )


def _tell(out: TextIO, what: str, lines: Callable[[], list[str]]) -> None:
    print(f"{what}:", file=out)
    try:
        told = lines()
    except Exception as error:
        told = [f"cannot be told: {error!r}"]
    for line in told:
        print(f"  {line}", file=out)


def _actor(actor: Actor) -> str:
    return (
        f"{actor.name}: {actor.nr_done} orders done, at {actor.doing}; {actor.state}; "
        f"{actor.model.nr_changed} pages of its own"
    )


def _processes(world: World) -> Iterator[tuple[str, int]]:
    """Who is, or was, about; 0 for whom nothing names any more."""
    for actor in world.actors:
        yield actor.name, actor.pid
    for host in world.hosts:
        for name, pid in (("backend", lambda h: h.backend_pid), ("keeper", lambda h: h.keeper_pid)):
            try:
                yield f"{name} {host.name}", pid(host)
            except (OSError, AssertionError):
                yield f"{name} {host.name}", 0


def _status(host: ChaosHost) -> list[str]:
    done = host.run("status", "--json")
    if done.returncode:
        return [done.stderr.strip()]
    status = json.loads(done.stdout)
    guests = [
        f"{guest['name']}: {guest['state']} by {guest['transport']}" for guest in status["guests"]
    ]
    return [f"pid {status['pid']}; drain {status.get('drain')}", *guests]


def _stacks(host: ChaosHost) -> list[str]:
    """Have its backend print them into its log, of which it dies."""
    nr_bytes = len(host.daemon.log())
    pid = host.backend_pid
    os.kill(pid, signal.SIGABRT)
    with contextlib.suppress(AssertionError):
        until(lambda: host.backend_pid != pid, 5)
    return host.daemon.log()[nr_bytes:].splitlines()


def threads(pid: int) -> str:
    """What each thread of a process is about; "gone" if there is no such process."""
    told = []
    try:
        tasks = sorted(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return "gone"
    for task in tasks:
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            told.append(
                f"{task.name} {(task / 'comm').read_text().strip()} {state} "
                f"{(task / 'wchan').read_text()}"
            )
        except OSError:
            continue
    return "; ".join(told) or "gone"
