# SPDX-License-Identifier: Apache-2.0
"""The daemon: constructs all parts, runs the loop, and closes the parts.

Threads: the loop (connections, guests coming and going), workers for operators' requests, the
evictor, the digests, side threads for disks, one for each handoff, and the C core's loaders and
fault threads. No Python thread takes part in answering a fault.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from cowshed.accounting import QuotaPolicy
from cowshed.cache import FileSource, Image
from cowshed.service.frontends.nbd.server import NbdService
from cowshed.service.frontends.network.network_server import NetworkServer
from cowshed.service.frontends.unix.handed_over import HandedOver
from cowshed.service.frontends.unix.sessions import Session
from cowshed.service.frontends.unix.unix_server import UnixServer
from cowshed.service.frontends.vmm.image_folders import image_folders
from cowshed.service.frontends.vmm.image_sockets import ImageSockets
from cowshed.service.frontends.vmm.machine_records import Caller, MachineRecords, RestoredMachine
from cowshed.service.frontends.vmm.populator import Populator
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guest_records import GuestRecords, RestoredGuest
from cowshed.service.guests.guests import GuestTable, OpenRequest
from cowshed.service.guests.opener import Opener
from cowshed.service.guests.userfaultfd import open_device
from cowshed.service.handoffs import HandoffService
from cowshed.service.host import Host
from cowshed.service.images.access import Access
from cowshed.service.images.autowarm import Autowarm
from cowshed.service.images.digests import DigestThread
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.extents import resolve_extents
from cowshed.service.images.incoming_images import ImageFolder
from cowshed.service.images.loading import load
from cowshed.service.images.opening import KeptImages, is_kept, open_store
from cowshed.service.images.reopening import Reopener
from cowshed.service.images.sampler import Sampler
from cowshed.service.images.source_watch import SourceWatch
from cowshed.service.images.unserved import UnservedImages
from cowshed.service.images.warming import Warming
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.metrics.service_counters import DROP_COUNTS, ServiceCounters
from cowshed.service.migration.incoming import IncomingGuests
from cowshed.service.migration.record import HandoffRecord
from cowshed.service.operators.control import Control
from cowshed.service.operators.invariants import check_invariants
from cowshed.service.operators.takeover import TakeoverHandler
from cowshed.service.overlays.entrance import Entrance
from cowshed.service.overlays.files import OverlayFiles
from cowshed.service.overlays.limits import OverlayLimits
from cowshed.service.overlays.overlay_records import OverlayRecords
from cowshed.service.overlays.overlay_restorer import OverlayRestorer
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.persist.fd_store import FdStore, take_inherited, take_supervisor
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.persist.kept_counts import LOG_COUNTS, LOG_GROUP, KeptCounts, keep_counts
from cowshed.service.persist.listeners import Listeners
from cowshed.service.persist.notice import Groups
from cowshed.service.reports.status import StatusReader
from cowshed.service.runtime import test_points
from cowshed.service.runtime.file_limit import raise_file_limit
from cowshed.service.runtime.logs import (
    EventLog,
    logging_begin,
    logging_count_lost,
    logging_end,
    logging_report_lost,
    logging_report_suppressed,
)
from cowshed.service.runtime.loop import LEAVE, READ, RELOAD, Loop, ignore_stop_signals
from cowshed.service.runtime.side_threads import InTime, SideThreads
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.workers import Workers
from cowshed.service.settings.config import Config, socket_path
from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.settings.images import ImageSpec
from cowshed.service.supervise.graceful_shutdown import GracefulShutdown, Saving
from cowshed.service.supervise.history import HISTORY_COUNTS, RestartHistory
from cowshed.service.supervise.keeper_watch import KeeperWatch
from cowshed.service.supervise.run_lock import run_dir_locked
from cowshed.service.supervise.supervised_reload import SupervisedReload
from cowshed.service.supervise.unserved_listeners import UnservedListeners
from cowshed.transport import AnyListener, Connection, adopt_listener
from cowshed.transport.links.unix import listen_socket
from cowshed.transport.nbd.serving import NbdServer

__all__ = ["Daemon", "import_for", "run"]

_log = EventLog("cowshed")

_LOOK_SECONDS: Final = 1.0
_SAVE_SECONDS: Final = 60.0
# How long to wait for a busy keeper at the end.
_PATIENCE_SECONDS: Final = 5.0
_SAVE_AT_END_SECONDS: Final = 2.0
_MAX_NBD_THREADS: Final = 8


def import_for(config: Config) -> None:
    """Import the modules that only some configurations need, so that all imports are done.

    Must be called before a keeper forks, so that no successor has to import them. Nothing may be
    imported once a daemon serves, because another version may be installed by then.
    """
    if config.metrics is not None:
        import cowshed.service.metrics.port  # noqa: F401
    gc.freeze()  # as in cli.py; forks also share these pages


def run(
    config: Config, given: Groups | None = None, on_serving: Callable[[], None] | None = None
) -> int:
    """Serve until SIGTERM or SIGINT, then release everything; return the exit status.

    given has the groups of a backend that we took over from under another keeper: our own keeper
    does not hold them yet. on_serving is called once we serve. Raises CowshedError, one line, if
    the daemon cannot start.
    """
    logging_begin(config.log_format, config.log_level)
    with contextlib.ExitStack() as stack:
        stack.callback(logging_end)
        left = take_inherited(os.environ)
        supervisor = take_supervisor(os.environ)
        held = left if given is None else {}
        fd_store = stack.enter_context(contextlib.closing(FdStore(supervisor, held)))
        daemon = Daemon(config, stack, fd_store, InheritedFds(left if given is None else given))
        daemon.serve(on_serving)
    ignore_stop_signals()
    return 0


@dataclass(frozen=True)
class _Restored:
    """The restored connections: of guests, of machines, and of peers without a mapping."""

    guests: list[RestoredGuest]
    machines: list[RestoredMachine]
    callers: list[Caller]
    handed_over: list[tuple[Connection, bool]]


class Daemon:
    """Everything that serves one configuration; the given stack closes what it opens.

    fd_store holds the descriptors for a successor; inherited has those of the last backend. The
    daemon is constructed in four steps, each of which relies on those before it.
    """

    def __init__(
        self,
        config: Config,
        stack: contextlib.ExitStack,
        fd_store: FdStore | None = None,
        inherited: InheritedFds | None = None,
    ) -> None:
        self.config: Final = resolve_extents(config)
        self._stack: Final = stack
        fd_store = fd_store or stack.enter_context(contextlib.closing(FdStore(None)))
        inherited = inherited or InheritedFds({})
        stack.callback(inherited.close)
        self.host: Final = self._open_storage(fd_store, inherited)
        restored = self._restore_guests(inherited)
        self._start_background()
        self._open_frontends(restored)
        self._let_go(inherited)
        self.host.admission.set_aside(len(os.listdir("/proc/self/fd")))

    def _open_storage(self, fd_store: FdStore, inherited: InheritedFds) -> Host:
        # The run-dir is locked before anything in it is changed. Images, inherited ones too, are
        # opened before any guest of them is restored.
        config, stack = self.config, self._stack
        listeners = Listeners(fd_store, inherited)
        stack.callback(listeners.close)
        admission = Admission(raise_file_limit())
        stack.enter_context(run_dir_locked(config.run_dir))
        self._record = HandoffRecord(config.state_dir)
        self._image_folder, arrived = _find_arrived(config, self._record, inherited)
        specs = (*config.images, *arrived)
        stack.enter_context(image_folders(config.run_dir, specs, config.domains))
        counters = ServiceCounters(keep_counts("tallies", DROP_COUNTS, fd_store, inherited))
        stack.callback(counters.close)
        self._log_counts = _count_lost_lines(fd_store, inherited, stack)
        loop = stack.enter_context(Loop())
        watch = KeeperWatch(fd_store, loop, config.text)
        stack.callback(watch.close)
        # The group keeps the name by which other releases hold it.
        counts = keep_counts("lineage", HISTORY_COUNTS, fd_store, inherited)
        history = RestartHistory(counts, watch)
        stack.callback(history.close)
        self.uffd_device = _lend_device(stack)
        kept_images = stack.enter_context(contextlib.closing(KeptImages(fd_store)))
        store, self._unopened = stack.enter_context(
            open_store(config, arrived, kept_images, inherited, is_first=history.is_first)
        )
        guests = GuestTable()
        self._core = NbdServer(min(2 * (os.cpu_count() or 1) + 1, _MAX_NBD_THREADS))
        stack.callback(self._core.close)
        records = OverlayRecords(fd_store)
        return Host(
            config=config,
            fd_store=fd_store,
            listeners=listeners,
            admission=admission,
            loop=loop,
            watch=watch,
            side=SideThreads(),
            counters=counters,
            history=history,
            store=store,
            kept_images=kept_images,
            guests=guests,
            overlays=_keep_overlays(config, self._core, guests, admission, stack, records),
            evictor=Evictor(
                store, config.standby, config.largest_extent_bytes // store.extent_bytes
            ),
            working_sets=WorkingSets(config.state_dir),
            access=Access(config.domains, specs),
            warming=Warming(),
        )

    def _restore_guests(self, inherited: InheritedFds) -> _Restored:
        # Must precede any eviction: this charges the guests' pages, and pins extents that were lent
        # to zerocopy guests again.
        host = self.host
        self.guest_records = GuestRecords(host.fd_store)
        guests = self.guest_records.adopt(inherited, host.store, host.guests)
        self._overlay_restorer = OverlayRestorer(host.overlays)
        self._overlay_restorer.restore(list(host.store), inherited, self._record.owned)
        self._populator = Populator(self.config, host.evictor.max_pinned_extents, self.recorded)
        self._machine_records = MachineRecords(host.fd_store)
        machines = self._machine_records.adopt(inherited, host.store, host.guests, self._populator)
        callers = self._machine_records.adopt_callers(inherited, host.store, machines)
        self._handed_over = HandedOver(host.fd_store)
        restored = _Restored(guests, machines, callers, self._handed_over.take(inherited))
        host.history.note_adopted()
        return restored

    def _start_background(self) -> None:
        # Everything restored is charged and pinned: from here on extents may be evicted, and
        # sources read. No listener is open yet.
        host, stack = self.host, self._stack
        host.evictor.start()
        stack.callback(host.evictor.stop)
        self._opener = Opener(
            host.store,
            host.guests,
            host.evictor,
            self.config.open_regions,
            is_moving=lambda: host.access.moved_to is not None,
        )
        self._opener.start()
        stack.callback(self._opener.stop)
        self._sampler = Sampler(host.store, host.evictor)
        self._sampler.start()
        stack.callback(self._sampler.stop)
        self._unserved = UnservedImages(self._unopened, host.side, self._serve_late)
        self._sources = SourceWatch(host.store, host.side)
        stack.callback(self._sources.stop)
        self._digests = DigestThread(host.store, self._on_digest)
        self._digests.start()
        stack.callback(self._digests.stop)
        self._unserved_listeners = UnservedListeners(
            host.listeners, host.loop, host.side, is_first=host.history.is_first
        )
        self.workers = Workers(host.loop.call)
        self.reopener = Reopener(host.loop.call)
        status = StatusReader(
            host,
            drain=lambda: self._handoffs.state(),
            unserved=self._unserved.status,
            unserved_listeners=self._unserved_listeners.status,
            source_wait_seconds=self._sources.waiting_seconds,
            use=self._sampler.use,
            why_unknown=self._sampler.why_unknown,
        )
        self.control = Control(host, status, lambda: self.workers.is_stopping)
        if test_points.ENABLED:
            self.control.add("check", lambda *_: check_invariants(host), is_quick=False)
        self.incoming = IncomingGuests(host.overlays, host.guests)

    def _open_frontends(self, restored: _Restored) -> None:
        # Last, and restored guests before new ones, so that clients find everything else running.
        host, stack = self.host, self._stack
        listener = stack.enter_context(self._listen())
        self._unix_server = UnixServer(listener, host, self)
        for guest in restored.guests:
            self._unix_server.adopt(Session.of_restored(guest, self))
        for connection, is_greeted in restored.handed_over:
            self._unix_server.adopt(Session.handed_over(connection, self, is_greeted=is_greeted))
        stack.callback(self._unix_server.close)
        self._image_sockets = ImageSockets(
            host, self.control, self._populator, self._machine_records
        )
        self._image_sockets.adopt(restored.machines, restored.callers)
        stack.callback(self._image_sockets.close)
        stack.callback(self.workers.stop)
        entrance = Entrance(host.overlays, host.side, host.loop.call)
        stack.callback(lambda: None if entrance.close() else host.store.leave())
        self._nbd = NbdService(host, self._core, entrance, self._unserved_listeners)
        stack.callback(self._nbd.close)
        # Otherwise a request that waits for a load would keep the NBD server from closing.
        stack.callback(host.store.cancel_loads)
        self._handoffs = HandoffService(
            host,
            self.control,
            self._record,
            self._unix_server,
            lambda guest: self._network.disconnect(guest),
            self._image_folder,
            self._publish,
        )
        self._network = NetworkServer(
            host, entrance, self._nbd, self._handoffs.target, self._unserved_listeners
        )
        stack.callback(self._network.close)
        if self.config.autowarm:
            warm = Autowarm(host.store, host.evictor, host.working_sets, load, host.warming)
            warm.start()
            stack.callback(warm.stop)
        self._saving = Saving(self.workers)
        self._shutdown = GracefulShutdown(
            host.loop,
            host.listeners.fds,
            (self._unix_server, self._image_sockets, self._nbd, self._network, self._saving),
        )
        self._takeovers = TakeoverHandler(host, self.control)
        self._handoffs.resume()
        stack.callback(self._handoffs.stop)
        if self.config.metrics is not None:
            self._serve_metrics(self.config.metrics)

    @property
    def guests(self) -> GuestTable:
        """The table of guests that map."""
        return self.host.guests

    def _listen(self) -> AnyListener:
        path = socket_path(self.config.run_dir)
        uri = f"unix://{path}"
        sock = self.host.listeners.open("guests", lambda: listen_socket(uri), path)
        return adopt_listener(uri, sock.detach())

    def _publish(self, image: Image, spec: ImageSpec) -> None:
        """Serve an image that was received in a handoff; from the handoff's thread."""
        self.host.kept_images.keep(image)
        self._list(image, spec)

    def _list(self, image: Image, spec: ImageSpec) -> None:
        self.host.access.allow(image, spec.allowed)
        self.host.store.list_image(image)
        self.host.loop.call(lambda: self._image_sockets.add(image))

    def _serve_late(self, spec: ImageSpec, source: FileSource) -> None:
        """Serve an image whose source could not be opened before; from a side thread.

        Takes over the source. On failure nothing of the image is left, and the call may be retried.
        """
        try:
            image = self.host.store.open_image(
                spec.name, source, spec.domain, extent_bytes=spec.extent_bytes, listed=False
            )
        except BaseException:
            source.close()
            raise
        try:
            self.host.kept_images.keep(image)
        except BaseException:
            self.host.evictor.close_image(image)  # also closes the source
            raise
        self._overlay_restorer.restore_late(image)
        self._list(image, spec)
        self._digests.add(image)

    def _on_digest(self, image: Image) -> None:
        """Log a digest and restore the overlays that waited for it; for any thread."""
        _log.info("digest", image=image.label, digest=image.digest)
        self._overlay_restorer.note_digest(image)

    def _let_go(self, inherited: InheritedFds) -> None:
        """Release the inherited groups that nothing was restored from."""
        for name in inherited:
            if not name.startswith("source/"):  # logged for the image's group
                _log.warning("left-over", "nothing served now uses it", group=name)
            self.host.fd_store.release(name)
        inherited.close()

    def _serve_metrics(self, endpoint: Endpoint) -> None:
        # Imported here because only some configurations need it; import_for() imported it before.
        from cowshed.service.metrics.port import MetricsPort, MetricsSources

        host = self.host
        sources = MetricsSources(
            host.store,
            host.evictor,
            host.guests,
            host.counters,
            self.config.guest_metrics,
            host.overlays,
            self._nbd.counters,
            host.warming,
            host.history,
            self._log_counts,
            self._sources.waiting_seconds,
            self._unserved.labels,
            self._sampler,
        )
        port = MetricsPort(endpoint, sources, self.control.status)
        self._stack.callback(port.close)
        kept_as = f"metrics/{endpoint}"
        prepare = functools.partial(self.host.listeners.open, kept_as, port.bind)
        self._unserved_listeners.serve(f"http://{endpoint}/metrics", prepare, port.serve, kept_as)

    def end_parked(self, request: OpenRequest) -> bool:
        """End a guest's parked sessions that have nothing mapped; return whether any ended."""
        return self._unix_server.end_parked(request)

    def shut_down(self) -> None:
        """Stop the loop, once it has sent what is queued."""
        self.host.loop.stop()

    def recorded(self, image: Image) -> list[int]:
        """Return the extents that guests of an image touched, this run's first, in order."""
        return self.host.working_sets.recorded(image)

    def serve(self, on_serving: Callable[[], None] | None = None) -> None:
        """Serve until a signal or shut_down()."""
        loop = self.host.loop
        is_supervised = self.host.watch.kind == "systemd"
        loop.stop_on_signals(reload=is_supervised)
        reload = SupervisedReload(loop, loop.leave)
        loop.watch(self.host.store.notice_fd, READ, self._on_notice)
        loop.every(_LOOK_SECONDS, logging_report_lost)
        loop.every(_LOOK_SECONDS, self._sources.look)
        loop.every(_LOOK_SECONDS, self._unserved.look)
        loop.every(_LOOK_SECONDS, self._unserved_listeners.look)
        loop.every(_LOOK_SECONDS, self._look_at_sockets)
        loop.every(_SAVE_SECONDS, self._save)
        _log.notice(
            "serving",
            pid=os.getpid(),
            run_dir=self.config.run_dir,
            capacity=format_bytes(self.config.capacity_bytes),
            images=", ".join(
                f"{image.label} ({format_bytes(image.size_bytes)})" for image in self.host.store
            ),
        )
        stop_at("takeover-adopted")
        self.host.fd_store.notify(READY="1")
        if on_serving is not None:
            on_serving()
        loop.run()
        while loop.ended_by in (LEAVE, RELOAD) or (is_supervised and loop.ended_by):
            if loop.ended_by is RELOAD:
                loop.begin_again()
                reload.begin()
            else:
                self._leave(loop.ended_by)
            loop.run()
        reload.close()
        self.host.fd_store.notify(STOPPING="1")
        self.host.fd_store.reconcile(_PATIENCE_SECONDS)
        self._save_at_end()
        _log.notice("stopping", pid=os.getpid())

    def _leave(self, cause: signal.Signals) -> None:
        """Exit as if killed, for a successor: release nothing, send nothing.

        Returns if no successor can take over. systemd gets this at every stop, too, because a
        restart must look to guests like a reload; at a final stop it closes the descriptors itself.
        """
        self._saving.begin(lambda: self.host.working_sets.save(self.host.store))
        if self._shutdown.prepare():
            self._unix_server.give(self._handed_over)
            if self._is_kept(cause) and self._takeovers.hand_over():
                self._end_now("takeover" if self._takeovers.is_leaving else "reload")
            self._handed_over.take_back()
            self.host.loop.begin_again()
        self._shutdown.take_back()

    def _is_kept(self, cause: signal.Signals) -> bool:
        """Whether a successor would inherit everything; always True at a stop by systemd."""
        if self.host.fd_store.reconcile(_PATIENCE_SECONDS) or self._takeovers.is_leaving:
            return True
        if cause in (LEAVE, RELOAD):
            _log.error(
                "reload-refused",
                f"{self.host.watch.nr_not_held} groups of descriptors are not held for a "
                "successor: try again once 'cowshed status' shows none",
            )
            return False
        return True

    def _end_now(self, how: str) -> NoReturn:
        self.host.history.note_leaving(how)
        _log.notice("leaving", pid=os.getpid())
        os._exit(0)

    def _look_at_sockets(self) -> None:
        self.host.side.run("sockets", self.host.listeners.look)

    def _save(self) -> None:
        self.host.side.run("working sets", lambda: self.host.working_sets.save(self.host.store))
        logging_report_suppressed()

    def _save_at_end(self) -> None:
        """Save the working sets, unless the state directory does not answer in time."""
        InTime(lambda: self.host.working_sets.save(self.host.store)).wait(_SAVE_AT_END_SECONDS)

    def _on_notice(self, fd: int, _: int) -> None:
        os.read(fd, 8)
        self._unix_server.log_states()
        self._image_sockets.log_states()


def _find_arrived(
    config: Config, record: HandoffRecord, inherited: InheritedFds
) -> tuple[ImageFolder | None, list[ImageSpec]]:
    """Return the images received in handoffs, without those that the configuration replaces."""
    if config.image_dir is None:
        return None, []
    folder = ImageFolder(config.image_dir)
    named = {spec.label for spec in config.images}
    arrived = []
    for spec in folder.specs(record.owned.__contains__, lambda *name: is_kept(name, inherited)):
        if spec.label in named:
            _log.notice("image-left", "another image has its name", source=spec.source)
        else:
            arrived.append(spec)
    return folder, arrived


def _keep_overlays(
    config: Config,
    core: NbdServer,
    guests: GuestTable,
    admission: Admission,
    stack: contextlib.ExitStack,
    overlay_records: OverlayRecords,
) -> OverlayTable:
    files = None
    if config.overlay_dir is not None:
        files = OverlayFiles(config.overlay_dir)
        stack.callback(files.close)
    limits = OverlayLimits(
        config.default_quota_bytes,
        QuotaPolicy[config.default_on_quota.upper()],
        config.network_quota_bytes,
    )
    overlays = OverlayTable(core, guests, admission, limits, files, overlay_records)
    stack.callback(overlays.close)
    return overlays


def _count_lost_lines(
    fd_store: FdStore, inherited: InheritedFds, stack: contextlib.ExitStack
) -> KeptCounts:
    """Count lost log lines, over this backend and its successors."""
    counts = keep_counts(LOG_GROUP, LOG_COUNTS, fd_store, inherited)
    stack.callback(counts.close)
    logging_count_lost(lambda nr: counts.add("backend", nr))
    stack.callback(lambda: logging_count_lost(None))
    return counts


def _lend_device(stack: contextlib.ExitStack) -> int | None:
    device = open_device()
    if device is None:
        _log.warning(
            "no-userfaultfd-device",
            "no /dev/userfaultfd to lend: guests need their own permission for userfaultfd",
        )
    else:
        stack.callback(os.close, device)
    return device
