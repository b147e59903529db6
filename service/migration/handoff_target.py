# SPDX-License-Identifier: Apache-2.0
"""The target's role in handoffs: one thread for each, from its first byte until it is over.

Operators hand over at the unix socket, with the descriptor of a stream socket for the bytes; other
backends at a network listener, whose connection then carries them. The outcome of a handoff is
decided under one lock, so that a source that asks over a second connection gets the true answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from cowshed.accounting import MissingPages
from cowshed.cache import CapacityError, CowshedError, PageStore, PeerError
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.incoming_images import ImageFolder
from cowshed.service.migration.image_intake import ImageIntake, Publish
from cowshed.service.migration.link import Link
from cowshed.service.migration.postcopy_source import take_runs
from cowshed.service.migration.postcopy_target import PostcopyTarget
from cowshed.service.migration.receiver import Load, Receiver
from cowshed.service.migration.record import HandoffRecord
from cowshed.service.migration.state import Action, Event, Handoff, Phase, Role
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.test_points import reach
from cowshed.transport.handoff.sections import (
    XXH128,
    ControlMessage,
    End,
    GuestSection,
    Header,
    ImageSection,
    ImageWhole,
    Pages,
    Section,
    StateReader,
    StateWriter,
    WorkingSetSection,
)
from cowshed.transport.links.no_room import start_thread
from cowshed.transport.messages.fields import take_number, take_text

__all__ = ["HandoffTarget"]

_log = EventLog("cowshed.handoff")

_FEATURES: Final = ("post-copy", "carried", XXH128)
_WARM_SECONDS: Final = 60.0
_MAX_FORGOTTEN: Final = 1000
_CHECKING_SECONDS: Final = 1.0
_HEAR_OUT_SECONDS: Final = 10.0


class HandoffTarget:
    """Receives handoffs; begin() for each connection.

    Invariant: a handoff in progress is in _machines; an event and its actions are performed under
    _lock, so that other threads see all of them or none.
    """

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        overlays: OverlayTable,
        record: HandoffRecord,
        load: Load,
        on_owner: Callable[[list[str]], None],
        late_wait_seconds: float,
        image_folder: ImageFolder | None,
        publish: Publish,
        why_not: Callable[[], str],
    ) -> None:
        """on_owner(names) is called when guests were admitted, in a handoff's thread.

        why_not() returns why no guests can be accepted now, "" if they can; called at an offer and
        again at its commit. late_wait_seconds is how long to wait for a lost source that still has
        pages. image_folder stores received images; publish is as in ImageIntake.
        """
        self._late_wait_seconds = late_wait_seconds
        self._postcopy_targets: dict[str, PostcopyTarget] = {}
        self._store = store
        self._evictor = evictor
        self._overlays = overlays
        self._record = record
        self._load = load
        self._on_owner = on_owner
        self._image_folder = image_folder
        self._publish = publish
        self._why_not = why_not
        self._lock = threading.RLock()
        self._machines: dict[str, _Reception] = {}
        self._forgotten: dict[str, None] = {}
        self._stopping = False

    def receiver(self) -> Receiver:
        """Return a new Receiver, which stages guests."""
        intake = ImageIntake(self._store, self._evictor, self._image_folder, self._publish)
        return Receiver(self._store, self._evictor, self._overlays, self._load, intake)

    def begin(self, link: Link, whose: str) -> None:
        """Receive from a link, taken over, in a new thread; whose names the source in the log.

        CapacityError, and the link is closed, if no thread can be started.
        """
        reception = _Reception(self, link, whose)
        try:
            start_thread(threading.Thread(target=reception.run, name="handoff", daemon=True))
        except CapacityError:
            link.close()
            raise

    def stop(self) -> None:
        """Discard all guests that are not ours yet."""
        self._stopping = True
        with self._lock:
            for reception in list(self._machines.values()):
                reception.lose()
            for postcopy in self._postcopy_targets.values():
                postcopy.close()

    def resume(self) -> None:
        """After a restart, resume post-copy of guests with missing pages."""
        for handoff, keys in list(self._record.incomplete.items()):
            guests = [self._overlays.get(domain, name) for domain, name in keys]
            self.begin_postcopy(handoff, guests)

    # Post-copy.

    def postcopy_targets(self) -> list[PostcopyTarget]:
        """Return the handoffs with missing pages."""
        with self._lock:
            return list(self._postcopy_targets.values())

    def begin_postcopy(self, handoff: str, guests: Sequence[OverlayGuest | None]) -> PostcopyTarget:
        """Begin to receive the missing pages of guests that are ours."""
        postcopy = PostcopyTarget(
            handoff, guests, self._overlays, self._late_wait_seconds, self._filled_itself
        )
        with self._lock:
            self._postcopy_targets[handoff] = postcopy
        postcopy.start()
        return postcopy

    def postcopy_target(self, handoff: str) -> PostcopyTarget | None:
        """Return the post-copy of a handoff in progress, or None. PeerError if it is not ours."""
        with self._lock:
            if handoff not in self._record.owned:
                raise PeerError(f"unknown handoff {handoff}")
            return self._postcopy_targets.get(handoff)

    def is_filled(self, handoff: str) -> bool:
        """Whether a handoff of ours is recorded as having all pages."""
        return handoff not in self._record.incomplete

    def record_filled(self, postcopy: PostcopyTarget) -> None:
        """Record that all pages of a handoff are here and durable; idempotent."""
        with self._lock:
            if self.is_filled(postcopy.handoff):
                return
            postcopy.flush()
            self._record.set_filled(postcopy.handoff)
            self._postcopy_targets.pop(postcopy.handoff, None)
        postcopy.close()
        _log.notice("pages-arrived", handoff=postcopy.handoff, guests=len(postcopy.keys))

    def _filled_itself(self, postcopy: PostcopyTarget) -> None:
        """Record that nothing is missing: guests wrote the missing pages anew, or are gone."""
        try:
            self.record_filled(postcopy)
        except CowshedError as error:
            _log.error("not-recorded", str(error), handoff=postcopy.handoff)

    @property
    def stopping(self) -> bool:
        """Whether receptions are to end."""
        return self._stopping

    def on(self, reception: _Reception, event: Event) -> None:
        """Take an event and perform its actions."""
        with self._lock:
            actions = reception.machine.on(event)
            stop_at(f"target-{reception.machine.phase}")
            for action in actions:
                reception.do(action)
            if reception.machine.is_over and self._machines.get(reception.handoff) is reception:
                del self._machines[reception.handoff]
                if reception.machine.phase is Phase.FORGOTTEN:
                    self._forget(reception.handoff)

    def wait_admitted(self) -> None:
        """Wait until no handoff is between its commit and its guests' admission."""
        with self._lock:
            pass

    def why_not(self) -> str:
        """Return why no guests can be accepted now; "" if they can."""
        return self._why_not()

    def commit(self, reception: _Reception) -> None:
        """Answer a source's "commit": grant it, or deny it if guests can no longer be accepted."""
        with self._lock:
            reception.denied_for = self.why_not() if reception.machine.phase is Phase.READY else ""
            self.on(reception, Event.ASKED if reception.denied_for else Event.COMMIT)

    def open(self, reception: _Reception, handoff: str) -> None:
        """Register the handoff that a source offers. PeerError if it was offered before."""
        with self._lock:
            if handoff in self._machines or handoff in self._forgotten:
                raise PeerError(f"handoff {handoff} was offered before")
            if handoff in self._record.owned:
                raise PeerError(f"handoff {handoff} is over")
            reception.handoff = handoff
            self._machines[handoff] = reception

    def verdict(self, handoff: str) -> str:
        """Return a handoff's outcome: "committed" or, making it so for good, "denied"."""
        with self._lock:
            if handoff in self._record.owned:
                return "committed"
            if (reception := self._machines.get(handoff)) is not None:
                self.on(reception, Event.ASKED)
            self._forget(handoff)
            return "denied"

    def prepare(self, handoff: str) -> None:
        """Have little left to write in own(), when guests wait for it."""
        self._record.prepare_owned(handoff)

    def own(self, handoff: str, incomplete: Sequence[tuple[str, str]] = ()) -> None:
        """Record that a handoff's guests are ours; incomplete: their keys if pages are missing."""
        self._record.add_owned(handoff, incomplete)

    def admitted(self, names: list[str]) -> None:
        """Note that guests were admitted."""
        self._on_owner(names)

    def _forget(self, handoff: str) -> None:
        self._forgotten[handoff] = None
        while len(self._forgotten) > _MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]


class _Reception:
    """One connection that brings a handoff, resumes one, or asks for an outcome."""

    def __init__(self, target: HandoffTarget, link: Link, whose: str) -> None:
        self.machine = Handoff(Role.TARGET)
        self.handoff = ""
        self.denied_for = ""
        self._target = target
        self._link = link
        self._whose = whose
        self._reader = StateReader(messages=True)
        self._writer = StateWriter()
        self._receiver = target.receiver()
        self._blockers: list[dict[str, str]] = []
        self._extents: list[WorkingSetSection] = []
        self._gone = False
        self._postcopy: PostcopyTarget | None = None
        self._sending = threading.Lock()
        # Held while guests are staged or discarded; never while waiting for the target's lock.
        self._staging = threading.Lock()

    def run(self) -> None:
        """Receive until it is over."""
        why = ""
        try:
            while nr_bytes := self._link.receive_into(self._reader.room()):
                for section in self._reader.advance(nr_bytes):
                    self._take(section)
            why = "its source hung up"
        except CowshedError as error:
            why = str(error)
            self._log_failed(why)
        except Exception:
            _log.crash("handoff-failed", "a defect of cowshed: please report it")
            why = "a defect of the target"
            self._log_failed(why)
        finally:
            if not self.machine.is_over and self.handoff:
                _log.warning("handoff-broken-off", why, whose=self._whose, handoff=self.handoff)
            self.lose()
            if why:
                self._hear_out()
            self._link.close()

    def _hear_out(self) -> None:
        """Read until the source has closed: unread bytes would discard what was sent to it."""
        self._gone = False
        deadline = time.monotonic() + _HEAR_OUT_SECONDS
        try:
            while time.monotonic() < deadline and self._link.receive():
                pass
        except CowshedError as error:
            _log.info("handoff-unheard", str(error), whose=self._whose)

    def look(self) -> None:
        """Raise PeerError, to end a wait, if the daemon ends or the source is lost."""
        if self._gone or self._target.stopping:
            raise PeerError("the handoff was given up")

    def lose(self) -> None:
        """Note that the source is gone; discards what is not ours yet."""
        self._gone = True
        if self._postcopy is not None:
            self._postcopy.disconnect(self._send_message)
        if self.machine.allows(Event.LOST):
            self._target.on(self, Event.LOST)

    def _take(self, section: Section) -> None:
        if isinstance(section, Header):
            self._target.open(self, section.handoff)
        elif isinstance(section, ImageSection | GuestSection):
            pass  # the reader has them
        elif isinstance(section, ControlMessage):
            self._take_message(section)
        elif isinstance(section, WorkingSetSection):
            self._extents.append(section)
        elif isinstance(section, Pages) and self._postcopy is not None:
            self._postcopy.take(section)
            self._look_filled()
        elif isinstance(section, ImageWhole):
            self._open_image(section.image)
        else:
            with self._staging:
                if self.machine.phase is not Phase.RECEIVE:
                    raise PeerError("peer sent pages before an offer was accepted")
                if isinstance(section, End):
                    self._receiver.finish(self._reader)
                else:
                    self._receiver.take(section)
            if isinstance(section, End):
                self._target.on(self, Event.COMPLETE)

    def _open_image(self, no: int) -> None:
        """Check a received image, sending "checking" to the source meanwhile, and open it."""
        sent = time.monotonic()

        def look() -> None:
            nonlocal sent
            self.look()
            if time.monotonic() > sent + _CHECKING_SECONDS:
                sent = time.monotonic()
                self._send("checking")

        source = self._receiver.seal(no, look)
        if source is None:
            raise PeerError(f"peer sent image {no}, which was not requested")
        with self._staging:
            if self.machine.phase is not Phase.RECEIVE:
                source.close()
                raise PeerError("the handoff was given up")
            self._receiver.open(no, source)
        self._send("imaged")

    def _take_message(self, message: ControlMessage) -> None:
        if message.kind in ("offer", "dry-run"):
            self._check(is_dry=message.kind == "dry-run")
        elif message.kind == "warm":
            self._warm()
            self._target.prepare(self.handoff)
            self._send("warmed")
        elif message.kind == "commit":
            self._target.commit(self)
        elif message.kind == "abort":
            if self.machine.allows(Event.ABORT):
                self._target.on(self, Event.ABORT)
        elif message.kind == "ask":
            self._send(self._target.verdict(take_text(message.body, "handoff", max_length=64)))
        elif message.kind == "features":
            self._send("features", has=list(_FEATURES))
        elif message.kind == "resume":
            self._resume(take_text(message.body, "handoff", max_length=64))
        elif message.kind == "gone" and self._postcopy is not None:
            guest = take_number(message.body, "guest")
            self._postcopy.lose(guest, take_runs(message))
            self._look_filled()
        else:
            raise PeerError(f"unknown control message {message.kind!r}")

    def _resume(self, handoff: str) -> None:
        """Resume post-copy with a source that connected again."""
        self._postcopy = self._target.postcopy_target(handoff)
        self.machine = Handoff.restarted(Role.TARGET, Phase.OWNER)
        if self._postcopy is None:
            self._send("filled")
            return
        self.handoff = handoff
        self._reader.expect_missing(self._postcopy.sizes_bytes)
        _log.notice("handoff-resumed", whose=self._whose, handoff=handoff)
        self._target.on(self, Event.RESUMED)

    def _look_filled(self) -> None:
        """Send "filled" once no page is missing, or the source can give no more."""
        assert self._postcopy is not None
        if self._postcopy.is_filled or self._target.is_filled(self.handoff):
            self._target.on(self, Event.FILLED)
        elif self._postcopy.is_hopeless:
            self._send("filled", lost=self._postcopy.nr_missing)

    def _own(self) -> None:
        """Record that the guests are ours."""
        guests = self._receiver.guests()
        lack = any(MissingPages(guest.overlay).nr_left for guest in guests)
        self._target.own(self.handoff, [guest.request.key for guest in guests] if lack else [])

    def _admit(self) -> None:
        guests = self._receiver.guests()
        lack = any(MissingPages(guest.overlay).nr_left for guest in guests)
        names = self._receiver.admit(is_owned=True)
        reach("HANDOFF_ADMITTED")
        if lack:
            self._reader.expect_missing([guest.image.size_bytes for guest in guests])
            self._postcopy = self._target.begin_postcopy(self.handoff, guests)
            self._postcopy.connect(self._send_message)
        _log.notice("handoff-received", whose=self._whose, guests=len(names))
        self._target.admitted(names)

    def _check(self, *, is_dry: bool) -> None:
        if not self.handoff:
            raise PeerError("peer sent an offer without a header")
        self._target.on(self, Event.OFFERED)
        with self._staging:
            if why := self._target.why_not():
                self._blockers = [{"reason": f"at the target: {why}"}]
            else:
                self._blockers = self._receiver.check(self._reader, self.look)
            if self.machine.phase is not Phase.CHECK:
                self._receiver.discard()  # denied meanwhile, over another connection
        if self._blockers:
            self._target.on(self, Event.REFUSED)
            return
        if not is_dry:
            _log.notice("handoff-begins", whose=self._whose, guests=len(self._reader.guests))
        self._target.on(self, Event.ACCEPTED)

    def _warm(self) -> None:
        """Load the working sets, for a bounded time, since guests can run without."""
        deadline = time.monotonic() + _WARM_SECONDS
        for section in self._extents:
            for _ in self._receiver.warm(section):
                self.look()
                if time.monotonic() > deadline:
                    return

    def do(self, action: Action) -> None:
        """Perform an action of the state machine."""
        if action is Action.SEND_ACCEPTED:
            self._send("accepted", images=self._receiver.wanted, has=list(_FEATURES))
        elif action is Action.SEND_REFUSED:
            self._send("refused", blockers=self._blockers)
        elif action is Action.SEND_READY:
            self._send("ready")
        elif action is Action.SEND_COMMITTED:
            self._send("committed")
        elif action is Action.SEND_DENIED:
            self._send("denied", **({"why": self.denied_for} if self.denied_for else {}))
        elif action is Action.RECORD_OWNER:
            self._own()
            reach("HANDOFF_OWNED")
        elif action is Action.ADMIT:
            self._admit()
        elif action is Action.SEND_MISSING:
            assert self._postcopy is not None
            for message in self._postcopy.missing_messages():
                self._send_message(message)
            self._postcopy.connect(self._send_message)
            self._look_filled()
        elif action is Action.RECORD_FILLED:
            assert self._postcopy is not None
            self._target.record_filled(self._postcopy)
        elif action is Action.SEND_FILLED:
            self._send("filled")
        elif action is Action.DISCARD:
            with self._staging:
                self._receiver.discard()
        elif action is Action.KEEP:
            self._receiver.keep(self.handoff)
            reach("HANDOFF_KEPT")

    def _send(self, kind: str, **fields: Any) -> None:
        self._send_message(ControlMessage({"say": kind, **fields}))

    def _send_message(self, message: ControlMessage) -> None:
        """Send a control message; for any thread."""
        with self._sending:
            self._link.send(self._writer.write(message))

    def _log_failed(self, why: str) -> None:
        try:
            self._send("failed", why=why)
        except CowshedError as error:
            _log.info("handoff-unsaid", str(error), whose=self._whose)
