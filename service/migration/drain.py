# SPDX-License-Identifier: Apache-2.0
"""The source's role in a handoff: hands over every guest, or rolls everything back.

A drain runs in a thread of its own, which owns the state machine and performs its actions.
Operators read report() and may abort; the drain does not depend on the client that started it. Each
wait has a name in the report, and ends by an abort, the deadline, or the peer's silence.

After the commit was requested the source cannot roll back on its own: guests stay frozen, and the
source asks the target for the outcome until it knows it.

In post-copy the pages are sent after the commit, while guests run at the target. The pages here
stay frozen. If the target is lost, the source connects again and pushes what is missing, until the
target reports that it has all.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from cowshed.cache import CowshedError, Image, PeerError, SourceError, UsageError
from cowshed.service.metrics.service_counters import DrainStatistics
from cowshed.service.migration.blockers import Blocker, print_blockers, wait_for_digests
from cowshed.service.migration.carriers import MigratingCarrier
from cowshed.service.migration.dial import REPLY_SECONDS
from cowshed.service.migration.drain_host import DrainHost
from cowshed.service.migration.link import FileLink, Link
from cowshed.service.migration.migrating import MigratingGuest, MigratingMapping
from cowshed.service.migration.postcopy_source import PostcopySource, bitmap_of_runs, take_runs
from cowshed.service.migration.sender import Progress, Sender
from cowshed.service.migration.state import Action, Event, Handoff, Phase, Role
from cowshed.service.migration.target_link import LostError, TargetLink
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.stops import stop_at
from cowshed.transport.handoff.sections import ControlMessage
from cowshed.transport.links.no_room import start_thread
from cowshed.transport.messages.fields import take_number

__all__ = ["Drain", "StoppedError"]

_log = EventLog("cowshed.drain")

_ASK_SECONDS: Final = 0.5
_FILE: Final = "file:"


class StoppedError(UsageError):
    """The drain was aborted or timed out; every guest is as it was before."""


class Drain:
    """One drain, from start() until over."""

    def __init__(
        self,
        host: DrainHost,
        uri: str,
        *,
        link: Link | None = None,
        timeout: float | None = None,
        dry_run: bool = False,
        with_images: bool = False,
        post_copy: bool = False,
        handoff: str = "",
    ) -> None:
        """link is a file that the client opened, or None; uri is then file:PATH.

        with_images: send the bytes of images that the target does not serve.
        """
        self.post_copy: Final = post_copy
        self._postcopy: PostcopySource | None = None
        self._numbered: list[MigratingGuest | None] = []
        self._host = host
        # Guests and operators see the address without the options, which name our key.
        self.uri: Final = uri if uri.startswith(_FILE) else uri.partition("?")[0]
        self._address: Final = uri
        self.dry_run: Final = dry_run
        self._with_images: Final = with_images
        self._images: list[Image] = []
        self._wanted: list[int] = []
        self.handoff: Final = handoff or secrets.token_hex(16)
        self._machine = Handoff(Role.SOURCE)
        self._file = link
        self._target = TargetLink(self.uri, self._wait_name)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout
        self._abort = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._progress = Progress()
        self._sender: Sender | None = None
        self._migrating: list[MigratingGuest] = []
        self._waits_for = ""
        self._blockers: list[Blocker] = []
        self._error: CowshedError | None = None
        self._admission_closed = False
        # Reported until a rollback is over: "aborted" says that guests are served again.
        self._undoes: Phase | None = None
        self.would_move = False
        self.over = threading.Event()

    @classmethod
    def resume(cls, host: DrainHost) -> Drain:
        """Resume a drain recorded before a restart (COMMIT, PUSH or MOVED), its guests frozen."""
        record = host.record.source
        assert record is not None
        drain = cls(host, record["uri"], handoff=record["handoff"], post_copy=record["post_copy"])
        drain._machine = Handoff.restarted(Role.SOURCE, record["phase"])
        migrating = host.migrating(carried=record["carried"])
        drain._migrating = [each for each in migrating if each.name in record["guests"]]
        here = {(each.image.domain, each.name): each for each in drain._migrating}
        keys = zip(record["domains"], record["guests"], strict=False)
        drain._numbered = [here.get(key) for key in keys] or list(drain._migrating)
        host.close_admission(drain.uri)
        drain._admission_closed = True
        drain._sender = Sender(Link(lambda: None), drain._migrating, [], drain._progress)
        drain._sender.track()
        drain._sender.freeze()
        return drain

    @property
    def phase(self) -> Phase:
        """The phase of the state machine."""
        return self._machine.phase

    def start(self) -> None:
        """Start the thread; CapacityError if that is impossible."""
        self._note()
        start_thread(self._thread)

    def abort(self) -> None:
        """Request a stop and rollback; UsageError, and nothing is done, if it is too late."""
        if not self._machine.allows(Event.ABORT) and self.phase is not Phase.IDLE:
            why = {
                Phase.COMMIT: "the target was asked to commit and has not answered yet: "
                "the drain continues by itself once it does",
                Phase.PUSH: f"the guests are at {self.uri}, where their pages follow them; once "
                "all are there, drain that backend to have them back",
                Phase.MOVED: f"the guests are at {self.uri}: drain that backend to have them back",
            }.get(self.phase, "there is nothing left to abort")
            raise UsageError(f"it is too late: {why}")
        self._abort.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its thread."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def report(self) -> dict[str, Any]:
        """Return the state of the drain, for the command and for status."""
        return {
            "to": self.uri,
            "handoff": self.handoff,
            "phase": str(self._undoes or self.phase),
            "dry_run": self.dry_run,
            "post_copy": self.post_copy,
            "waits_for": self._waits_for,
            "guests": len(self._migrating),
            "guests_here": sum(
                isinstance(each, MigratingMapping) and each.is_here for each in self._migrating
            ),
            "images": [self._images[no].label for no in self._wanted],
            "blockers": list(self._blockers),
            "frozen_seconds": round(self._progress.frozen_seconds, 6),
            **self._progress.as_json(),
        }

    @property
    def migrating(self) -> list[MigratingGuest]:
        """The guests that move."""
        return self._migrating

    @property
    def blockers(self) -> list[Blocker]:
        """The reasons that block it."""
        return self._blockers

    @property
    def error(self) -> CowshedError | None:
        """Why it failed, or None; valid once it is over."""
        return self._error

    # The thread.

    def _run(self) -> None:
        try:
            if self.phase is Phase.COMMIT:
                self._find_out()
            elif self.phase is Phase.PUSH:
                self._push_again()
            elif self.phase is not Phase.MOVED:
                self._do(Event.BEGIN)
        except CowshedError as error:
            self._fail(error)
        except OSError as error:
            self._fail(PeerError(f"drain to {self.uri}: {error}"))
        finally:
            self._target.close()
            self._wait_name("")
            self._note()
            self.over.set()

    def _fail(self, error: CowshedError) -> None:
        """Roll back by the table, or find out the outcome of the commit."""
        if isinstance(error, PeerError):
            try:
                self._target.listen()  # it may have sent the reason before it hung up
            except PeerError as reason:
                error = reason if isinstance(reason, LostError) else error
        self._error = error
        if self.phase is Phase.COMMIT:
            self._find_out()
            return
        if self.phase is Phase.PUSH:
            _log.warning("pages-not-pushed", str(error), to=self.uri)
            self._push_again()
            return
        event = Event.ABORT if isinstance(error, StoppedError) else Event.LOST
        if self._machine.allows(event):
            self._do(event)
        _log.warning("drain-failed", str(error), to=self.uri, phase=str(self.phase))

    def _look(self) -> None:
        """Raise StoppedError if there is a reason to end a wait."""
        if self.phase in (Phase.COMMIT, Phase.PUSH):
            self._note()
            return
        if self._abort.is_set():
            raise StoppedError("the drain was aborted; every guest is as it was")
        if self._deadline is not None and time.monotonic() > self._deadline:
            waited = f", while it waited for {self._waits_for}" if self._waits_for else ""
            raise StoppedError(
                f"the drain did not end in {self._timeout:g} s{waited}; every guest is as it was"
            )
        self._note()

    def _do(self, event: Event) -> None:
        """Take an event, perform its actions, and do the same with the event that they return."""
        following: Event | None = event
        while following is not None:
            before = self._undoes = self.phase
            actions = self._machine.on(following)
            if self.phase is not Phase.ABORTED:
                self._undoes = None
            self._note()
            if self.phase is not before:
                stop_at(f"source-{self.phase}")
            following = None
            for action in actions:
                following = _ACTIONS[action](self) or following
            self._undoes = None

    def _wait_name(self, what: str) -> None:
        self._waits_for = what

    # Actions.

    def _close_admission(self) -> None:
        if not self.dry_run:
            self._host.close_admission(self.uri)
            self._admission_closed = True
            self._host.wait_admitted()

    def _open_admission(self) -> None:
        if self._admission_closed:
            self._host.close_admission(None)

    def _connect(self) -> Event:
        self._wait_name(f"a connection to {self.uri}")
        self._target.use(self._file or self._dial())
        return Event.CONNECTED

    def _dial(self) -> Link:
        left = math.inf if self._deadline is None else self._deadline - time.monotonic()
        try:
            return self._host.connect(self._address, self._look, min(REPLY_SECONDS, max(0.0, left)))
        except PeerError:
            self._look()  # report the drain's own timeout rather than the connection's
            raise

    def _offer(self) -> Event:
        self._wait_name("the digests of images")
        images = self._host.images()
        self._migrating = self._host.migrating(carry_to="" if self._file is not None else self.uri)
        self._sender = Sender(self._target.link, [], [], self._progress)
        if any(isinstance(each, MigratingCarrier) for each in self._migrating):
            self._have_carried()
        used = [each.image for each in self._migrating]
        awaited = [each for each in images if self._with_images or each in used]
        self._blockers = wait_for_digests(awaited, self._look)
        self._blockers += [
            {"guest": each.name, "reason": reason}
            for each in self._migrating
            for reason in each.blockers()
        ]
        images = [image for image in images if image.digest]
        if self._blockers:
            raise StoppedError(print_blockers("drain", self._blockers))
        self._numbered = list(self._migrating)
        self._images = images
        self._sender = self._sender.of(self._migrating, images)
        if self.post_copy:
            self._target.require_post_copy(self._the_sender)
        self._sender.offer(self.handoff, with_images=self._with_images, allowed=self._host.allowed)
        if self._file is not None:
            self._wanted = list(range(len(images))) if self._with_images else []
            return self._accepted()
        self._sender.send("dry-run" if self.dry_run else "offer")
        message = self._target.hear("the target's check of the offer")
        if message.kind == "refused":
            found = message.body.get("blockers")
            self._blockers = [
                {str(key): str(value) for key, value in each.items()}
                for each in (found if isinstance(found, list) else [])
                if isinstance(each, dict)
            ]
            self._error = UsageError(print_blockers("drain", self._blockers))
            return Event.REFUSED
        self._target.check(message, "accepted")
        self._the_sender.use_features(message.body.get("has"))
        wanted = message.body.get("images")
        if self._with_images and isinstance(wanted, list):
            self._wanted = [no for no in range(len(images)) if no in wanted]
        return self._accepted()

    def _accepted(self) -> Event:
        self.would_move = True
        if self.dry_run:
            raise StoppedError("a dry run ends here")
        return Event.ACCEPTED

    def _send_working_set(self) -> Event:
        for no in self._wanted:
            self._send_image(no, self._images[no])
        self._wait_name("the working sets to be sent")
        self._the_sender.send_working_sets(self._host.working_sets)
        if self.post_copy:
            self._have_warmed()
            for each in self._migrating:
                each.flush()  # so that little is left to flush once they are frozen
            return Event.POSTPONED
        return Event.SENT

    def _send_image(self, no: int, image: Image) -> None:
        """Send an image's bytes, and wait until the target has checked them."""
        self._wait_name(f"the bytes of image {image.label!r} to be sent")
        hot = self._host.working_sets.recorded(image)
        self._the_sender.send_image(no, hot, self._look_and_listen)
        if self._file is None:
            waits_for = f"the target to check the bytes of image {image.label!r}"
            while (message := self._target.hear(waits_for)).kind == "checking":
                pass
            self._target.check(message, "imaged")

    def _track(self) -> None:
        self._the_sender.track()

    def _send_pages(self) -> Event:
        self._wait_name("private pages to be sent")
        sender = self._the_sender
        sender.send_private()
        if self._file is None:
            self._have_warmed()
        self._wait_name("pages written meanwhile to be sent")
        sender.send_until_few()
        return Event.CONVERGED

    def _have_warmed(self) -> None:
        self._the_sender.send("warm")
        self._target.expect("the target to load the working sets", "warmed")

    def _freeze(self) -> None:
        self._the_sender.freeze()

    def _send_last(self) -> Event:
        self._wait_name("the last pages to be sent")
        if self.post_copy:
            for each in self._migrating:
                each.flush()
            self._postcopy = PostcopySource(self._numbered, self._the_sender.send_missing())
        else:
            self._the_sender.send_last()
        if isinstance(self._file, FileLink):
            self._file.make_durable()
        elif self._file is None:
            self._target.expect("the target to have everything", "ready")
        return Event.ARRIVED_READY

    def _record_committing(self) -> None:
        if self._file is None:
            self._record(Phase.COMMIT)

    def _send_commit(self) -> Event:
        if self._file is not None:
            self._record(Phase.COMMIT)  # not before: nobody could be asked for the outcome
            return Event.COMMITTED
        self._the_sender.send("commit", handoff=self.handoff)
        return self._outcome(self._target.hear("the target's commit"))

    def _ask(self) -> Event | None:
        """Ask for the outcome over a new connection; None if the target cannot be reached."""
        self._wait_name(f"{self.uri} to say whether it has the guests")
        self._target.close()
        self._postcopy = None
        try:
            self._target.use(self._host.connect(self._address, lambda: None))
            sender = Sender(self._target.link, [], [], Progress())
            sender.send("ask", handoff=self.handoff)
            return self._outcome(self._target.hear(self._waits_for))
        except (CowshedError, OSError) as error:
            _log.warning("drain-unsure", f"{error}; guests wait", to=self.uri)
            return None

    def _find_out(self) -> None:
        """Ask for the outcome until it is known."""
        while self.phase is Phase.COMMIT:
            try:
                self._do(Event.LOST)
            except PeerError as error:
                _log.warning("pages-not-pushed", str(error), to=self.uri)
            if self.phase is Phase.COMMIT:
                self._note()
                time.sleep(_ASK_SECONDS)
        if self.phase is Phase.PUSH:
            self._push_again()

    def _have_carried(self) -> None:
        """Let programs carry their pages along if the target knows how; else move them as others.

        Raises UsageError if the target cannot even list its features.
        """
        try:
            knows = self._target.knows(self._the_sender, "carried")
        except PeerError as error:
            raise UsageError(
                f"{self.uri} does not know programs that carry their pages ({error}); upgrade it, "
                "or end the programs under 'cowshed attach' here"
            ) from error
        if not knows:
            _log.warning(
                "cannot-follow", "the target does not know programs that carry pages", to=self.uri
            )
            self._migrating = self._host.migrating()

    # Post-copy.

    def _record_postcopy(self) -> None:
        self._record(Phase.PUSH)
        if self._sender is not None:
            self._sender.end_frozen()
        self._error = None

    def _send_on(self) -> None:
        _log.notice("drained-by-post-copy", to=self.uri, guests=len(self._migrating))
        self._host.send_on(self._migrating, self.uri)

    def _push(self) -> Event | None:
        """Push the remaining pages, until the target has all; PeerError once it is gone."""
        if self._postcopy is None:  # this connection only asked for the outcome
            return self._resume()
        self._wait_name("pages to be pushed")
        message = self._postcopy.run(self._the_sender, self._target.hear_of_pages)
        lost = message.body.get("lost")
        if isinstance(lost, int) and lost:
            _log.error("pages-lost-there", "the target cannot get them any more", pages=lost)
        return Event.FILLED

    def _resume(self) -> Event:
        """Connect again and receive what is missing; PeerError if the target cannot be reached."""
        self._wait_name(f"{self.uri} to say which pages it lacks")
        self._target.close()
        self._postcopy = None
        self._target.use(self._host.connect(self._address, self._look))
        self._sender = Sender(self._target.link, self._migrating, [], self._progress)
        self._sender.send("resume", handoff=self.handoff)
        left = [0] * len(self._numbered)
        while (message := self._target.hear(self._waits_for)).kind == "lacking":
            guest = take_number(message.body, "guest", maximum=max(0, len(left) - 1))
            if runs := take_runs(message):
                left[guest] |= bitmap_of_runs(runs)
            if message.body.get("more") is not True:
                self._postcopy = PostcopySource(self._numbered, left)
                self._progress.expect(self._postcopy.nr_pages)
                return Event.MISSING
        if message.kind == "filled":
            return Event.FILLED
        raise LostError(f"{self.uri} sent {message.kind!r} instead of the missing pages")

    def _push_again(self) -> None:
        """Resume and push until the target has all pages."""
        while self.phase is Phase.PUSH:
            try:
                self._do(Event.LOST)
            except (CowshedError, OSError) as error:
                _log.warning("pages-not-pushed", str(error), to=self.uri)
                self._note()
                time.sleep(_ASK_SECONDS)

    def _outcome(self, message: ControlMessage) -> Event:
        if message.kind == "committed":
            return Event.COMMITTED_MISSING if self.post_copy else Event.COMMITTED
        if message.kind == "denied":
            why = message.body.get("why")
            did = f"denied it ({why[:500]})" if isinstance(why, str) else "has dropped it"
            self._error = self._error or PeerError(
                f"handoff to {self.uri}: the target {did}; every guest is as it was"
            )
            return Event.DENIED
        raise LostError(f"the target sent {message.kind!r} instead of its verdict")

    def _record_moved(self) -> None:
        self._record(Phase.MOVED)
        if self._sender is not None:
            self._sender.end_frozen()
        self._error = None

    def _notify_guests(self) -> None:
        _log.notice("drained", to=self.uri, guests=len(self._migrating))
        self._host.notify_moved(self._migrating, "" if self.uri.startswith(_FILE) else self.uri)

    def _forget_record(self) -> None:
        try:
            self._host.record.set_source(None)
        except SourceError as error:
            # Guests need not wait for that: a restart asks the target, whose denial is final.
            _log.error("not-recorded", str(error), handoff=self.handoff)

    def _record(self, phase: Phase) -> None:
        self._host.record.set_source(
            {
                "handoff": self.handoff,
                "uri": self._address,
                "phase": phase,
                "guests": ["" if each is None else each.name for each in self._numbered],
                "domains": ["" if each is None else each.image.domain for each in self._numbered],
                "post_copy": self.post_copy,
                "carried": [
                    (each.image.domain, each.name)
                    for each in self._migrating
                    if isinstance(each, MigratingCarrier)
                ],
            }
        )

    def _send_abort(self) -> None:
        if self._sender is not None and self._file is None:
            try:
                self._sender.send("abort")
            except CowshedError as error:
                _log.info("drain-abort-unsaid", str(error), to=self.uri)

    def _thaw(self) -> None:
        if self._sender is not None:
            self._sender.thaw()

    @property
    def _the_sender(self) -> Sender:
        assert self._sender is not None
        return self._sender

    def _look_and_listen(self) -> None:
        self._look()
        self._target.listen()

    # Metrics.

    def _note(self) -> None:
        """Update the drain's metrics."""
        if self.dry_run:
            return
        total = self._progress.total_bytes
        state = {Phase.MOVED: "done", Phase.ABORTED: "failed"}.get(self.phase, "draining")
        ratio = 1.0 if state == "done" else min(0.99, self._progress.done_bytes / max(1, total))
        nr = len(self._blockers)
        statistics = replace(DrainStatistics(), state=state, progress_ratio=ratio, nr_blockers=nr)
        self._host.counters.drain = statistics


_ACTIONS: Final[dict[Action, Callable[[Drain], Event | None]]] = {
    Action.CLOSE_ADMISSION: Drain._close_admission,
    Action.CONNECT: Drain._connect,
    Action.OFFER: Drain._offer,
    Action.SEND_WORKING_SET: Drain._send_working_set,
    Action.TRACK: Drain._track,
    Action.SEND_PAGES: Drain._send_pages,
    Action.FREEZE: Drain._freeze,
    Action.SEND_LAST: Drain._send_last,
    Action.RECORD_COMMITTING: Drain._record_committing,
    Action.SEND_COMMIT: Drain._send_commit,
    Action.ASK: Drain._ask,
    Action.RECORD_PUSHING: Drain._record_postcopy,
    Action.SEND_ON: Drain._send_on,
    Action.PUSH: Drain._push,
    Action.RESUME: Drain._resume,
    Action.RECORD_MOVED: Drain._record_moved,
    Action.NOTIFY_GUESTS: Drain._notify_guests,
    Action.FORGET_RECORD: Drain._forget_record,
    Action.SEND_ABORT: Drain._send_abort,
    Action.THAW: Drain._thaw,
    Action.OPEN_ADMISSION: Drain._open_admission,
}
