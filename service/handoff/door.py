# SPDX-License-Identifier: Apache-2.0
"""The target's role in handoffs: one thread for each, from its first byte until it is over.

Operators hand over at the unix socket, with a descriptor of a stream socket for the bytes; backends
elsewhere at the network door, whose connection then carries them. What became of a handoff is
decided under one lock, so that a source that asks over a second connection hears the truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from cowshed.accounting.handoff import Action, Event, Handoff, Phase, Role
from cowshed.cache import CowshedError, PageStore, PeerError
from cowshed.service.handoff.link import Link
from cowshed.service.handoff.receiver import Load, Receiver
from cowshed.service.handoff.record import HandoffRecord
from cowshed.service.images.evictor import Evictor
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.test_points import reach
from cowshed.transport.handoff_sections import (
    End,
    GuestSection,
    Header,
    ImageSection,
    Section,
    StateReader,
    StateWriter,
    Word,
    WorkingSetSection,
)
from cowshed.transport.messages import take_text

__all__ = ["HandoffDoor"]

_log = EventLog("cowshed.handoff")

_WARM_SECONDS: Final = 60.0
_MAX_FORGOTTEN: Final = 1000


class HandoffDoor:
    """Receives handoffs; begin() for each connection.

    Invariant: a handoff that is being received is in _machines; _lock is held while an event and
    what it asks for are done that others may not see half of.
    """

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        overlays: OverlayTable,
        record: HandoffRecord,
        load: Load,
        on_owner: Callable[[list[str]], None],
    ) -> None:
        """on_owner(names) is told of guests that were admitted, in a handoff's thread."""
        self._store = store
        self._evictor = evictor
        self._overlays = overlays
        self._record = record
        self._load = load
        self._on_owner = on_owner
        self._lock = threading.RLock()
        self._machines: dict[str, _Reception] = {}
        self._forgotten: dict[str, None] = {}
        self._stopping = False

    def receiver(self) -> Receiver:
        """Give what stages guests."""
        return Receiver(self._store, self._evictor, self._overlays, self._load)

    def begin(self, link: Link, whose: str) -> None:
        """Receive in a thread what comes over a link, now its own; whose is for the log."""
        reception = _Reception(self, link, whose)
        threading.Thread(target=reception.run, name="handoff", daemon=True).start()

    def stop(self) -> None:
        """Let go of everything that is not ours yet."""
        self._stopping = True
        with self._lock:
            for reception in list(self._machines.values()):
                reception.lose()

    @property
    def stopping(self) -> bool:
        """Whether receptions are to end."""
        return self._stopping

    def on(self, reception: _Reception, event: Event) -> None:
        """Take an event and do what it asks for."""
        with self._lock:
            actions = reception.machine.on(event)
            stop_at(f"target-{reception.machine.phase}")
            for action in actions:
                reception.do(action)
            if reception.machine.is_over and self._machines.get(reception.handoff) is reception:
                del self._machines[reception.handoff]
                if reception.machine.phase is Phase.FORGOTTEN:
                    self._forget(reception.handoff)

    def open(self, reception: _Reception, handoff: str) -> None:
        """A source offers a handoff."""
        with self._lock:
            if handoff in self._machines or handoff in self._forgotten:
                raise PeerError(f"handoff {handoff} was offered before")
            if handoff in self._record.owned:
                raise PeerError(f"handoff {handoff} is over")
            reception.handoff = handoff
            self._machines[handoff] = reception

    def verdict(self, handoff: str) -> str:
        """What became of a handoff: "committed", or "denied", which it is from now on."""
        with self._lock:
            if handoff in self._record.owned:
                return "committed"
            if (reception := self._machines.get(handoff)) is not None:
                self.on(reception, Event.ASKED)
            self._forget(handoff)
            return "denied"

    def own(self, handoff: str) -> None:
        """Record that a handoff's guests are ours."""
        self._record.add_owned(handoff)

    def admitted(self, names: list[str]) -> None:
        """Guests were admitted."""
        self._on_owner(names)

    def _forget(self, handoff: str) -> None:
        self._forgotten[handoff] = None
        while len(self._forgotten) > _MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]


class _Reception:
    """One connection over which a handoff comes, or is asked about."""

    def __init__(self, door: HandoffDoor, link: Link, whose: str) -> None:
        self.machine = Handoff(Role.TARGET)
        self.handoff = ""
        self._door = door
        self._link = link
        self._whose = whose
        self._reader = StateReader(words=True)
        self._writer = StateWriter()
        self._receiver = door.receiver()
        self._blockers: list[dict[str, str]] = []
        self._extents: list[WorkingSetSection] = []
        self._gone = False
        # Held while guests are staged or discarded; never while waiting for the door's lock.
        self._staging = threading.Lock()

    def run(self) -> None:
        """Receive until it is over."""
        why = ""
        try:
            while raw := self._link.receive():
                for section in self._reader.feed(raw):
                    self._take(section)
            why = "its source hung up"
        except CowshedError as error:
            why = str(error)
            self._say_failed(why)
        except Exception:
            _log.crash("handoff-failed", "a defect of cowshed: please report it")
            why = "a defect of the target"
            self._say_failed(why)
        finally:
            if not self.machine.is_over and self.handoff:
                _log.warning("handoff-broken-off", why, whose=self._whose, handoff=self.handoff)
            self.lose()
            self._link.close()

    def look(self) -> None:
        """End a wait if the daemon ends, or the source asked elsewhere."""
        if self._gone or self._door.stopping:
            raise PeerError("the handoff was given up")

    def lose(self) -> None:
        """The source is gone."""
        self._gone = True
        if self.machine.allows(Event.LOST):
            self._door.on(self, Event.LOST)

    def _take(self, section: Section) -> None:
        if isinstance(section, Header):
            self._door.open(self, section.handoff)
        elif isinstance(section, ImageSection | GuestSection):
            pass  # the reader has them
        elif isinstance(section, Word):
            self._take_word(section)
        elif isinstance(section, WorkingSetSection):
            self._extents.append(section)
        else:
            with self._staging:
                if self.machine.phase is not Phase.RECEIVE:
                    raise PeerError("pages come when no offer is accepted")
                if isinstance(section, End):
                    self._receiver.finish(self._reader)
                else:
                    self._receiver.take(section)
            if isinstance(section, End):
                self._door.on(self, Event.COMPLETE)

    def _take_word(self, word: Word) -> None:
        if word.say in ("offer", "dry-run"):
            self._check(is_dry=word.say == "dry-run")
        elif word.say == "warm":
            self._warm()
            self._say("warmed")
        elif word.say == "commit":
            self._door.on(self, Event.COMMIT)
        elif word.say == "abort":
            if self.machine.allows(Event.ABORT):
                self._door.on(self, Event.ABORT)
        elif word.say == "ask":
            self._say(self._door.verdict(take_text(word.body, "handoff", max_length=64)))
        else:
            raise PeerError(f"no word {word.say!r} is known here")

    def _check(self, *, is_dry: bool) -> None:
        if not self.handoff:
            raise PeerError("an offer begins with a header")
        self._door.on(self, Event.OFFERED)
        with self._staging:
            self._blockers = self._receiver.check(self._reader, self.look)
            if self.machine.phase is not Phase.CHECK:
                self._receiver.discard()  # it was asked about meanwhile, and denied
        if self._blockers:
            self._door.on(self, Event.REFUSED)
            return
        if not is_dry:
            _log.notice("handoff-begins", whose=self._whose, guests=len(self._reader.guests))
        self._door.on(self, Event.ACCEPTED)

    def _warm(self) -> None:
        """Load the working sets; the time is bounded, since guests can do without."""
        deadline = time.monotonic() + _WARM_SECONDS
        for section in self._extents:
            for _ in self._receiver.warm(section):
                self.look()
                if time.monotonic() > deadline:
                    return

    def do(self, action: Action) -> None:
        """Do what the machine asks for."""
        if action is Action.SEND_ACCEPTED:
            self._say("accepted")
        elif action is Action.SEND_REFUSED:
            self._say("refused", blockers=self._blockers)
        elif action is Action.SEND_READY:
            self._say("ready")
        elif action is Action.SEND_COMMITTED:
            self._say("committed")
        elif action is Action.SEND_DENIED:
            self._say("denied")
        elif action is Action.RECORD_OWNER:
            self._door.own(self.handoff)
            reach("HANDOFF_OWNED")
        elif action is Action.ADMIT:
            names = self._receiver.admit()
            reach("HANDOFF_ADMITTED")
            _log.notice("handoff-received", whose=self._whose, guests=len(names))
            self._door.admitted(names)
        elif action is Action.DISCARD:
            with self._staging:
                self._receiver.discard()
        elif action is Action.KEEP:
            self._receiver.keep(self.handoff)
            reach("HANDOFF_KEPT")

    def _say(self, what: str, **fields: Any) -> None:
        self._link.send(self._writer.write(Word({"say": what, **fields})))

    def _say_failed(self, why: str) -> None:
        try:
            self._say("failed", why=why)
        except CowshedError as error:
            _log.info("handoff-unsaid", str(error), whose=self._whose)
