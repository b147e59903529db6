# SPDX-License-Identifier: Apache-2.0
"""What all of the chaos test shares: two backends, the guests, what may fail now, what was done."""

from __future__ import annotations

import contextlib
import random
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from actors import (
    IMAGE,
    Actor,
    AttachedActor,
    BlockActor,
    FarActor,
    MachineActor,
    MappedActor,
    OverError,
)
from certificates import Authority
from chaos_machine import FIRECRACKER, NYDUS_COPY, ZEROCOPY
from domains import serving, write_image
from hosts import ChaosHost
from page_model import PAGE

from cowshed.cache.errors import PeerError

NR_PAGES: Final = 1024
WAIT_SECONDS: Final = 90.0
# What an error may still be put down to after its cause has gone: requests take that long to fail.
_NR_STEPS_SHOWN: Final = 60


class World:
    """Invariants: (1) guests are at hosts[owner], or, is_moving, on their way; (2) _causes has
    (cause, begin, end) of whatever may make guests fail, end None while it lasts.
    """

    def __init__(self, folder: Path, run_dirs: tuple[Path, Path], seed: str) -> None:
        self.rng = random.Random(seed)
        image = write_image(run_dirs[0] / "image.raw", NR_PAGES * PAGE)
        self.content = image.read_bytes()
        authority = Authority(folder / "ca")
        self._client = urlencode(authority.issue("alice", "DNS:alice.example"))
        self.guest_log_path = folder / "guests.log"
        self.guest_log = self.guest_log_path.open("wb")
        # Of small extents enough are resident for the sampler to make probes.
        extent = random.Random(f"{seed}:extent").choice(("8K", "64K"))
        self.hosts = [
            ChaosHost(name, run_dir, image, authority, extent)
            for name, run_dir in zip("AB", run_dirs, strict=True)
        ]
        self.owner = 0
        self.is_moving = False
        self.steps: deque[str] = deque(maxlen=_NR_STEPS_SHOWN)
        self.events: list[str] = []
        self.failed = ""
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._is_paused = self._is_over = False
        self._waiting: set[Actor] = set()
        self._causes: list[tuple[str, float, float | None]] = []
        self._impatient_with: set[Actor] = set()
        self.actors: list[Actor] = []
        makers: list[Callable[[str, random.Random], Actor]] = [
            lambda name, rng: MappedActor(self, name, rng, follows=True),
            lambda name, rng: MappedActor(self, name, rng, follows=False),
            lambda name, rng: FarActor(self, name, rng, "tcp"),
            lambda name, rng: FarActor(self, name, rng, "tls"),
            lambda name, rng: BlockActor(self, name, rng),
            lambda name, rng: AttachedActor(self, name, rng),
            lambda name, rng: MachineActor(self, name, rng, FIRECRACKER),
            lambda name, rng: MachineActor(self, name, rng, NYDUS_COPY),
            lambda name, rng: MachineActor(self, name, rng, ZEROCOPY),
        ]
        names = (
            *("follows", "mapped", "tcp", "tls", "nbd", "attached"),
            *("firecracker", "nydus", "zerocopy"),
        )
        for name, make in zip(names, makers, strict=True):
            self.actors.append(make(name, random.Random(f"{seed}:{name}")))

    # For actors.

    def pass_gate(self, actor: Actor) -> bool:
        """Wait while all are paused; whether to go on."""
        with self._changed:
            self._waiting.add(actor)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_paused or self._is_over or self.failed)
            self._waiting.discard(actor)
            if self.failed:
                raise OverError
            return not self._is_over

    def home(self) -> ChaosHost:
        """Where guests are; waits until it is known."""
        self.wait(lambda: not self.is_moving, "the move ends", 2 * WAIT_SECONDS)
        return self.hosts[self.owner]

    def far_uri(self, host: ChaosHost, scheme: str) -> str:
        return host.far[scheme] + (f"?{self._client}" if scheme == "tls" else "")

    def excuses(self, cause: str, since: float) -> bool:
        """Whether something of that kind went on at any time since."""
        return any(each == cause and (end is None or end >= since) for each, _, end in self._causes)

    def has_patience(self, actor: Actor) -> bool:
        """Whether an order's time counts: not while something keeps it from being answered."""
        return not (self.is_moving or actor in self._impatient_with)

    def mend(self) -> None:
        """Have pages that could not be loaded be loaded, poisoned ones too."""
        host = self.hosts[self.owner]
        self.pause()
        with contextlib.suppress(Exception):
            host.request("warm", image=IMAGE)

    def pause(self) -> None:
        """Let others go on before something is tried again."""
        if self.failed:
            raise OverError
        select.select([], [], [], 0.02)

    def status(self, host: ChaosHost) -> dict[str, Any]:
        return host.status()

    def note(self, text: str) -> None:
        """Put down what was done, for who reads of a failure."""
        self.steps.append(f"{time.monotonic() - self._began:7.2f} {text}")

    def begin(self, event: str) -> None:
        """Put down that an event begins."""
        self.events.append(f"{time.monotonic() - self._began:7.2f} {event}")
        self.note(event)

    def causes_told(self) -> list[str]:
        """What has gone on that may make guests fail, and when; for a report."""
        return [
            f"{begin - self._began:7.2f} to "
            + ("now" if end is None else f"{end - self._began:7.2f}")
            + f" {cause}"
            for cause, begin, end in self._causes
        ]

    def fail(self, text: str, error: BaseException | None = None) -> None:
        with self._changed:
            self.failed = self.failed or text
            self._changed.notify_all()

    # For events.

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait for what nobody announces. AssertionError if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.failed:
                raise OverError
            assert time.monotonic() < deadline, f"never: {what}"
            select.select([], [], [], 0.005)

    @contextlib.contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """Something that may make guests fail goes on inside `with`."""
        began = time.monotonic()
        entry = (name, began, None)
        self._causes.append(entry)
        try:
            yield
        finally:
            self._causes[self._causes.index(entry)] = (name, began, time.monotonic())

    @contextlib.contextmanager
    def patience_with(self, actor: Actor) -> Iterator[None]:
        """Inside `with`, that actor may wait as long as it likes."""
        self._impatient_with.add(actor)
        try:
            yield
        finally:
            self._impatient_with.discard(actor)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `with`, every guest is open and none has an order under way."""
        with self._changed:
            self._is_paused = True
        self.wait(self._all_rest, "all rest")
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def _all_rest(self) -> bool:
        with self._changed:  # or one that just passes the gate would count
            return all(actor in self._waiting or actor.is_stopped for actor in self.actors)

    def wait_progress(self, *but: Actor) -> None:
        """Wait until every guest has done something more: nobody hangs, or is yet to come again."""
        before = {actor: actor.nr_done for actor in self.actors if actor not in but}
        for actor, nr in before.items():
            self.wait(
                lambda a=actor, n=nr: (  # type: ignore[misc]
                    (a.nr_done > n and not a.is_to_end) or a.is_stopped
                ),
                f"{actor.name} goes on (it is at: {actor.doing})",
            )

    def start(self) -> None:
        for actor in self.actors:
            actor.start()
        self.wait_progress()

    def finish(self) -> None:
        """Have every guest look at every byte, and leave; nothing may be left of them."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for actor in self.actors:
            self.wait(lambda a=actor: not a.is_alive(), f"{actor.name} ends")  # type: ignore[misc]
        if self.failed:
            raise OverError
        for host in self.hosts:
            self._leave_nothing(host)

    def _leave_nothing(self, host: ChaosHost) -> None:
        def nobody() -> bool:
            return all(guest["state"] == "away" for guest in host.status()["guests"])

        self.wait(nobody, f"no guest is left at {host.name}")
        for guest in host.status()["guests"]:
            host.request("discard", overlay=f"{IMAGE}@{guest['name']}")
        assert host.request("audit")["mismatches"] == []
        try:
            self.wait(lambda: not host.leaked(), "nothing is leaked; see the log")
        except AssertionError as error:
            raise AssertionError(f"{error}: {host.leaked()}") from error
        bad = re.findall(
            r"^.*(?:Traceback|event=internal-error|invariant).*$", host.daemon.log(), re.MULTILINE
        )
        assert not bad, bad
        host.stop()
        self.wait(lambda: not serving(host.run_dir), f"no process of {host.name} is left")

    def check(self) -> None:
        """Have every backend recompute its invariants; one that is just dying is asked again."""
        for host in self.hosts:
            self.wait(lambda host=host: self._is_sound(host), f"{host.name} is checked")  # type: ignore[misc]

    def _is_sound(self, host: ChaosHost) -> bool:
        try:
            broken = host.request("check")["broken"]
        except (PeerError, OSError):
            return False
        assert broken == [], f"{host.name}: {broken}"
        return True

    def audit(self) -> None:
        for host in self.hosts:
            mismatches = host.request("audit")["mismatches"]
            assert mismatches == [], f"{host.name}: {mismatches}"
