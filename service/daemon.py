# SPDX-License-Identifier: Apache-2.0
"""The daemon: puts the rooms together, and runs the loop that everything but faults comes through.

Threads: the loop (connections, guests coming and going), workers for what operators ask, the
evictor, the digests, and the C core's loaders and fault threads. Faults meet no Python thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cowshed.accounting import Watermarks
from cowshed.cache import FileSource, Image, PageStore, PeerError, UsageError
from cowshed.service.config import Config, socket_path
from cowshed.service.control import Control
from cowshed.service.digests import DigestThread
from cowshed.service.door import Door, raise_file_limit
from cowshed.service.evictor import Evictor
from cowshed.service.guests import GuestTable
from cowshed.service.http_server import HttpServer
from cowshed.service.logs import EventLog, logging_begin, logging_end, logging_tell_suppressed
from cowshed.service.metrics import Exporter, MetricsSources
from cowshed.service.metrics_settle import Settler
from cowshed.service.sessions import Session
from cowshed.service.sizes import format_bytes
from cowshed.service.status import StatusReader, guest_state
from cowshed.service.tallies import Tallies
from cowshed.service.userfaultfd import open_device
from cowshed.service.web_pages import web_routes
from cowshed.service.web_state import StateReader
from cowshed.service.workers import Workers
from cowshed.service.working_sets import WorkingSets
from cowshed.transport import EOF, listen
from cowshed.transport.messages import error_reply

__all__ = ["Daemon", "run"]

_log = EventLog("cowshed")

_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_HOUSEKEEPING_SECONDS: Final = 1.0
_SAVE_SECONDS: Final = 60.0


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT, then give everything back; the exit status.

    Raises CowshedError, one line, if it cannot begin.
    """
    logging_begin(config.log_format, config.log_level)
    with contextlib.ExitStack() as stack:
        stack.callback(logging_end)
        daemon = Daemon(config, stack)
        daemon.serve()
    # Python's own end gives signals their default back: a second SIGTERM would make it a death.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return 0


class Daemon:
    """Everything that serves one configuration; the stack it is given closes what it opens."""

    def __init__(self, config: Config, stack: contextlib.ExitStack) -> None:
        self.config: Final = config
        self._stopping = False
        self._sessions: dict[int, Session] = {}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._door = Door(raise_file_limit())

        stack.enter_context(_locked(config.run_dir))
        self._tallies = Tallies()
        self.uffd_device: Final = open_device()
        if self.uffd_device is None:
            _log.warning(
                "no-userfaultfd-device",
                "no /dev/userfaultfd to lend: guests need their own right to userfaultfd",
            )
        else:
            stack.callback(os.close, self.uffd_device)
        watermarks = Watermarks(config.capacity_bytes // config.extent_bytes)
        store = self._store = stack.enter_context(
            PageStore(
                config.capacity_bytes,
                extent_bytes=config.extent_bytes,
                nr_loaders=config.loaders,
                low_free_extents=watermarks.low_free,
            )
        )
        for spec in config.images:
            _open_image(store, spec.name, Path(spec.source))
        self.guests: Final = GuestTable()
        evictor = Evictor(store)
        self._working_sets = WorkingSets(config.state_dir)
        self.control: Final = Control(
            store,
            evictor,
            self.guests,
            StatusReader(store, evictor, self.guests, config.run_dir),
            self._working_sets,
            self._tallies,
        )
        evictor.start()
        stack.callback(evictor.stop)
        digests = DigestThread(store, self._on_digest)
        digests.start()
        stack.callback(digests.stop)
        stack.callback(self._end_sessions)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, self._wake_reader)
        stack.callback(os.close, self._wake_writer)
        self.workers: Final = Workers(self._call)
        stack.callback(self.workers.stop)
        self._listener = stack.enter_context(listen(f"unix://{socket_path(config.run_dir)}"))
        self._selector = stack.enter_context(selectors.DefaultSelector())
        if config.metrics is not None:
            settler = Settler(self.guests)
            sources = MetricsSources(
                store, evictor, self.guests, self._tallies, config.guest_metrics
            )
            state = StateReader(lambda: list(store), self.control.status)
            routes = {"/metrics": Exporter(sources, settler.ask).serve, **web_routes(state.read)}
            server = HttpServer(config.metrics, routes)
            settler.start()
            stack.callback(settler.stop)
            server.start()
            stack.callback(server.stop)
            _log.notice("metrics", url=f"http://{server.endpoint}/metrics")

    # What sessions need.

    def shut_down(self) -> None:
        """End the loop, once it has sent what is queued."""
        self._call(self._stop)

    def _stop(self) -> None:
        self._stopping = True

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.put(call)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"x")

    # The loop.

    def serve(self) -> None:
        """Answer until a signal or shut_down ends it."""
        previous = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: self._stop())
        try:
            select = self._selector
            select.register(self._listener, selectors.EVENT_READ, self._on_connect)
            select.register(self._wake_reader, selectors.EVENT_READ, self._on_wake)
            select.register(self._store.notice_fd, selectors.EVENT_READ, self._on_notice)
            _log.notice(
                "serving",
                pid=os.getpid(),
                run_dir=self.config.run_dir,
                capacity=format_bytes(self.config.capacity_bytes),
                images=", ".join(
                    f"{image.name} ({format_bytes(image.size_bytes)})" for image in self._store
                ),
            )
            next_look = time.monotonic() + _HOUSEKEEPING_SECONDS
            next_save = time.monotonic() + _SAVE_SECONDS
            while not self._stopping:
                for key, events in select.select(max(0.0, next_look - time.monotonic())):
                    key.data(key, events)
                now = time.monotonic()
                if now >= next_look:
                    next_look = now + _HOUSEKEEPING_SECONDS
                    self._look_after(now)
                if now >= next_save:
                    next_save = now + _SAVE_SECONDS
                    self.workers.run(lambda: self._working_sets.save(self._store))
                    logging_tell_suppressed()
        finally:
            signal.set_wakeup_fd(previous)
        self._working_sets.save(self._store)
        _log.notice("stopping", pid=os.getpid())

    def _on_connect(self, *_: object) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        if refusal := self._door.enter(connection.peer.uid):
            peer = connection.peer
            self._tallies.dropped["limit"] += 1
            _log.warning("turned-away", refusal, pid=peer.pid, uid=peer.uid)
            connection.close()
            return
        session = Session(connection, self)
        fd = connection.fileno()
        self._sessions[fd] = session
        self._selector.register(fd, selectors.EVENT_READ, self._on_session)

    def _on_session(self, key: selectors.SelectorKey, events: int) -> None:
        session = self._sessions.get(key.fd)
        if session is None:
            return
        tag = 0
        try:
            if events & selectors.EVENT_READ and not session.closing:
                messages = session.connection.recv_ready()
                if messages is EOF:
                    self._end(key.fd)
                    return
                for no, message in enumerate(messages):
                    tag = message.tag
                    try:
                        session.handle(message)
                    except BaseException:
                        for rest in messages[no + 1 :]:
                            rest.close_fds()
                        raise
            self._watch_death(session)
            self._send(key.fd, session)
        except (PeerError, OSError) as error:
            # OSError: no descriptors left, say. Whoever asked for them pays, not the daemon.
            of_ours = isinstance(error, OSError) and error.errno in _NO_RESOURCES
            self._say_dropped(session, "limit" if of_ours else "protocol", str(error))
            self._say_goodbye(session, error, tag)
            self._end(key.fd)

    def _say_dropped(self, session: Session, reason: str, why: str) -> None:
        self._tallies.dropped[reason] += 1
        guest, peer = session.guest, session.connection.peer
        _log.warning(
            "dropped",
            why,
            guest=guest and guest.name,
            image=guest and guest.image.name,
            pid=peer.pid,
            uid=peer.uid,
        )

    def _watch_death(self, session: Session) -> None:
        """Notice a guest's death even if another process holds its end of the connection open."""
        pidfd = session.connection.peer.pidfd if session.guest else None
        if pidfd is None or session.watched_fd >= 0:
            return
        session.watched_fd = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda *_: self._on_death(session))

    def _on_death(self, session: Session) -> None:
        fd = session.connection.fileno()
        if self._sessions.get(fd) is session:
            self._end(fd)

    def _send(self, fd: int, session: Session) -> None:
        done = session.connection.flush()
        if done and session.closing:
            self._end(fd)
            return
        events = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(fd, events, self._on_session)

    def _say_goodbye(self, session: Session, error: Exception, tag: int) -> None:
        with contextlib.suppress(PeerError):
            session.connection.queue(error_reply("peer", str(error)), tag=tag)
            session.connection.flush()

    def _end(self, fd: int) -> None:
        session = self._sessions.pop(fd)
        self._selector.unregister(fd)
        if session.watched_fd >= 0:
            self._selector.unregister(session.watched_fd)
        self._door.leave(session.connection.peer.uid)
        session.end()

    def _end_sessions(self) -> None:
        for session in self._sessions.values():
            session.end()
        self._sessions.clear()

    def _on_wake(self, key: selectors.SelectorKey, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(key.fd, 4096)
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            call()
        for fd, session in list(self._sessions.items()):
            if session.connection.wants_write:
                try:
                    self._send(fd, session)
                except PeerError:
                    self._end(fd)

    def _on_notice(self, key: selectors.SelectorKey, _: int) -> None:
        os.read(key.fd, 8)
        self._say_states()

    def _say_states(self) -> None:
        """Log, once each, guests that stopped, went on or broke; drop those that broke."""
        for fd, session in list(self._sessions.items()):
            guest = session.guest
            if guest is None:
                continue
            status = guest.account.status()
            state = guest_state(status)
            if state == guest.said_state:
                continue
            guest.said_state = state
            who = {"guest": guest.name, "image": guest.image.name}
            who_else = {"pid": guest.pid, "uid": guest.uid}
            if state == "stopped-quota":
                quota = format_bytes(guest.quota_bytes or 0)
                _log.warning(
                    "quota-stop",
                    "its writes wait until 'cowshed quota GUEST SIZE' raises its quota",
                    **who,
                    quota=quota,
                    **who_else,
                )
            elif state == "running":
                _log.notice("quota-resume", **who, **who_else)
            else:
                why = f"its memory cannot be served: {os.strerror(-status.broken)}"
                self._say_dropped(session, "broken", why)
                self._end(fd)

    def _look_after(self, now: float) -> None:
        self._say_states()
        for image in self._store:
            if changed := image.look_at_source():
                _log.error(
                    "source-changed",
                    f"{changed}; an image must not change while it is served: "
                    "restart with a copy that stays as it is",
                    image=image.name,
                    source=image.source.path,
                )
        for fd, session in list(self._sessions.items()):
            if session.deadline is not None and now > session.deadline:
                self._say_dropped(session, "handshake", "it did not finish its handshake in time")
                self._end(fd)

    def _on_digest(self, image: Image) -> None:
        _log.info("digest", image=image.name, digest=image.digest)


def _open_image(store: PageStore, name: str, path: Path) -> None:
    source = FileSource.open(path)
    try:
        store.open_image(name, source)
    except BaseException:
        source.close()
        raise


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Own a run-dir for as long as the block lasts; UsageError if another daemon does."""
    try:
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"cannot use run-dir {str(run_dir)!r}: {error.strerror}; name another with --run-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "?"
            raise UsageError(
                f"run-dir {str(run_dir)!r} is in use by the daemon with pid {owner}; "
                "stop that, or name another with --run-dir"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)
