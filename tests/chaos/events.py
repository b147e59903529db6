# SPDX-License-Identifier: Apache-2.0
"""What befalls the world of the chaos test. Each event ends when the system says that it is over.

An event takes the world, draws from its random numbers, and notes what it does.
"""

from __future__ import annotations

import errno
import json
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

from actors import IMAGE, FarActor, MappedActor
from hosts import ChaosHost
from page_model import PAGE
from world import World

from cowshed.cache import CapacityError

Event = Callable[[World], None]

_REGION_BYTES: Final = 2 << 20
_PHASES: Final = ("connect", "prepare", "warm", "precopy", "freeze", "commit", "moved")
_PHASES_OF_POST_COPY: Final = (
    *("connect", "prepare", "warm", "freeze", "commit", "push"),
    "moved",
)


def _await_successor(world: World, host: ChaosHost, pid: int) -> None:
    world.wait(lambda: host.status()["pid"] != pid, f"a successor serves at {host.name}")


def _await_held(world: World, host: ChaosHost) -> None:
    """Until its keeper, another one maybe, has everything, its backend's death would be final."""
    world.wait(lambda: host.status()["not_held"] == 0, f"everything is held for {host.name}")


def kill_backend(world: World) -> None:
    host = world.rng.choice(world.hosts)
    with world.cause("death"):
        pid = host.kill_backend()
        world.note(f"killed backend {pid} of {host.name}")
        _await_successor(world, host, pid)
        world.wait_progress()


def kill_backend_twice(world: World) -> None:
    """The successor dies before it has served long, or at all."""
    host = world.rng.choice(world.hosts)
    with world.cause("death"):
        pid = host.kill_backend()
        world.note(f"killed backend {pid} of {host.name}, and another as soon as it is there")
        world.wait(lambda: host.backend_pid != pid, "a successor is there")
        again = host.kill_backend()
        _await_successor(world, host, again)
        world.wait_progress()


def reload(world: World) -> None:
    host = world.rng.choice(world.hosts)
    with world.cause("death"):
        pid = host.reload()
        world.note(f"SIGHUP to {host.name}, whose backend is {pid}")
        _await_successor(world, host, pid)
        world.wait_progress()


def kill_keeper(world: World) -> None:
    host = world.rng.choice(world.hosts)
    before = host.nr_keepers
    world.note(f"killing keeper {host.keeper_pid} of {host.name}")
    host.kill_keeper()
    world.wait(lambda: host.nr_keepers > before, f"another keeper of {host.name}")
    _await_held(world, host)
    world.wait_progress()


def kill_guest(world: World) -> None:
    actor = world.rng.choice(world.actors)
    world.note(f"killing guest {actor.name}")
    if actor.kill("killed"):
        world.wait_progress()


def kill_guest_and_backend(world: World) -> None:
    """Both at once: the keeper hands over what nobody wants any more."""
    actor = world.rng.choice(world.actors)
    host = world.hosts[world.owner]
    world.note(f"killing guest {actor.name} and the backend of {host.name}")
    with world.cause("death"):
        actor.kill("killed")
        pid = host.kill_backend()
        _await_successor(world, host, pid)
        world.wait_progress()


def take_over(world: World) -> None:
    """Another program serves on at one host."""
    host = world.rng.choice(world.hosts)
    with world.cause("death"):
        taker = host.begin_takeover()
        world.note(f"{taker.pid} takes {host.name} over from {host.backend_pid}")
        world.wait(lambda: _is_settled(host, taker), f"{taker.pid} serves at {host.name}")
        assert taker.poll() is None, f"the takeover failed: {taker.returncode}"
        host.end_takeover(taker)
        _await_held(world, host)
        world.wait_progress()


def take_over_and_kill(world: World) -> None:
    """One of the two dies at any time in between; the other serves on."""
    host = world.rng.choice(world.hosts)
    victim = world.rng.choice(("the taker", "the backend"))
    when = time.monotonic() + 2 * world.rng.random()
    with world.cause("death"):
        taker = host.begin_takeover()
        world.note(f"{taker.pid} takes {host.name} over; {victim} is killed meanwhile")
        world.wait(lambda: time.monotonic() > when, "the time to kill has come")
        if victim == "the taker":
            before, is_keeper = host.nr_keepers, host.is_taken_over_by(taker)
            taker.kill()
            taker.wait()
            if is_keeper:
                world.wait(lambda: host.nr_keepers > before, f"another keeper of {host.name}")
        else:
            host.kill_backend()
        world.wait(lambda: _is_settled(host, taker), f"somebody serves at {host.name}")
        if taker.poll() is None:
            host.end_takeover(taker)
        world.note(f"{host.backend_pid} serves at {host.name}")
        _await_held(world, host)
        world.wait_progress()


def _is_settled(host: ChaosHost, taker: subprocess.Popen[bytes]) -> bool:
    """Whether a takeover is over, one way or the other, and somebody serves."""
    if taker.poll() is None and not host.is_taken_over_by(taker):
        return False
    pid = host.status()["pid"]
    return taker.poll() is not None or (host.is_taken_over_by(taker) and pid == host.backend_pid)


def evict(world: World) -> None:
    for _ in range(world.rng.randrange(1, 20)):
        world.hosts[world.owner].request("evict", image=IMAGE)
    world.note("evicted everything, again and again")
    world.wait_progress()


def open_regions(world: World) -> None:
    """Pin a region, which opens it for mapped guests; then let it be closed and evicted again."""
    host = world.hosts[world.owner]
    region = {"image": IMAGE, "offset": 0, "length": _REGION_BYTES}
    try:
        host.request("pin", **region)
    except CapacityError:  # machines have too much lent
        return
    world.note("pinned a region")
    world.wait_progress()
    nr_open = host.status()["open_regions"]["open"]
    host.request("unpin", **region)
    if world.rng.random() < 0.5:
        host.request("evict", **region)
    world.note(f"unpinned it, with {nr_open} open")
    world.wait_progress()


def squeeze(world: World) -> None:
    """A quota below what is used, until its writer has met it; then none again."""
    kinds = (MappedActor, FarActor)
    actor = world.rng.choice([each for each in world.actors if isinstance(each, kinds)])
    host = world.hosts[world.owner]
    world.note(f"quota of {actor.name}")
    with world.cause("space"), world.patience_with(actor):
        if not any(guest["name"] == actor.name for guest in host.status()["guests"]):
            return
        host.request("quota", guest=actor.name, quota_bytes=PAGE)
        world.wait_progress(actor)
        host.request("quota", guest=actor.name, quota_bytes=None)
        world.wait_progress()


def look(world: World) -> None:
    """Audits, with everybody at rest."""
    with world.paused():
        world.note("audit")
        world.audit()


def look_while_busy(world: World) -> None:
    world.note("audit under load")
    world.audit()


def _fault(world: World, cause: str, name: str, number: int, times: int) -> None:
    host = world.hosts[world.owner]
    world.note(f"{name} fails {times} times with {errno.errorcode[number]}")
    with world.cause(cause):
        host.request("evict", image=IMAGE)
        host.point(name, "fail", times, errno=number)
        world.wait_progress()
        host.point(name, "off")
        host.request("warm", image=IMAGE)
        world.wait_progress()


def source_fails(world: World) -> None:
    _fault(world, "source", "LOAD_READ", errno.EIO, world.rng.choice((1, 2, 5, 40)))


def memory_is_short(world: World) -> None:
    _fault(world, "source", "LOAD_FILL", errno.ENOMEM, world.rng.choice((1, 5, 20)))


def disk_is_full(world: World) -> None:
    _fault(world, "space", "OVERLAY_WRITTEN", errno.ENOSPC, world.rng.choice((1, 3, 10)))


def drain(world: World) -> None:
    _drain(world, "")


def drain_and_kill(world: World) -> None:
    _drain(world, world.rng.choice(("source", "target")))


def drain_by_post_copy(world: World) -> None:
    _drain(world, "", post_copy=True)


def drain_by_post_copy_and_kill(world: World) -> None:
    _drain(world, world.rng.choice(("source", "target")), post_copy=True)


def _drain(world: World, killed: str, *, post_copy: bool = False) -> None:
    source, target = world.hosts[world.owner], world.hosts[1 - world.owner]
    uri = world.rng.choice((target.unix, target.far["tcp"]))
    phases = _PHASES_OF_POST_COPY if post_copy else _PHASES
    phase = world.rng.choice(phases)
    with world.paused():
        world.is_moving = True
        for actor in world.actors:
            if not actor.can_move(is_same_host=uri == target.unix):
                actor.kill("killed")
    how = ["--post-copy"] if post_copy else []
    world.note(
        f"drain from {source.name} to {uri} {' '.join(how)}"
        + (f", {killed} dies at {phase}" * bool(killed))
    )
    with world.cause("move"):
        done: list[subprocess.CompletedProcess[str]] = []
        command = threading.Thread(
            target=lambda: done.append(source.run("drain", "--json", *how, "--to", uri)),
            daemon=True,
        )
        command.start()
        if killed:
            _kill_at(world, source, target, killed, phases[phases.index(phase) :], command)
        world.wait(lambda: not command.is_alive(), "the drain ends")
        said = done[0]
        if not killed:
            assert said.returncode == 0, f"drain: {said.stderr}"
            report = json.loads(said.stdout)
            world.note(f"{report['guests']} guests moved")
        _find_owner(world, source, target)
        if world.hosts[world.owner] is target:
            for actor in world.actors:
                # Who follows goes on by bytes over a network, and is to map again.
                if isinstance(actor, MappedActor) and not (actor.follows and uri == target.unix):
                    actor.kill("moved")
        for actor in world.actors:
            actor.look_at_all()
        world.is_moving = False
        world.wait_progress()
    world.note(f"owner is {world.hosts[world.owner].name}")


def _kill_at(
    world: World,
    source: ChaosHost,
    target: ChaosHost,
    killed: str,
    wanted: tuple[str, ...],
    command: threading.Thread,
) -> None:
    """Kill one end once the source is in a phase that is wanted, or the drain is over."""

    def is_there() -> bool:
        state = source.request("drain-state")["drain"]
        return not command.is_alive() or (state is not None and state["phase"] in wanted)

    world.wait(is_there, f"the drain comes to {wanted[0]}")
    host = source if killed == "source" else target
    pid = host.kill_backend()
    _await_successor(world, host, pid)


def _find_owner(world: World, source: ChaosHost, target: ChaosHost) -> None:
    found: list[str] = []

    def is_known() -> bool:
        state = source.request("drain-state")["drain"]
        found[:] = [state["phase"] if state else "none"]
        return found[0] in ("none", "aborted", "moved")

    world.wait(is_known, "one end owns the guests")
    if found[0] == "moved":
        world.owner = world.hosts.index(target)
    world.note(f"the drain ended {found[0]}")


EVENTS: Final[list[tuple[int, Event]]] = [
    (4, kill_backend),
    (1, kill_backend_twice),
    (2, reload),
    (2, kill_keeper),
    (3, kill_guest),
    (2, kill_guest_and_backend),
    (2, evict),
    (3, open_regions),
    (2, squeeze),
    (2, look),
    (1, look_while_busy),
    (2, source_fails),
    (1, memory_is_short),
    (1, disk_is_full),
    (3, drain),
    (2, drain_and_kill),
    (2, drain_by_post_copy),
    (1, drain_by_post_copy_and_kill),
    (1, take_over),
    (1, take_over_and_kill),
]


def choose(world: World) -> Event:
    """The next event; all kinds come by once before chance decides alone."""
    weights = [weight for weight, _ in EVENTS]
    return world.rng.choices([event for _, event in EVENTS], weights)[0]
