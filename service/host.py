# SPDX-License-Identifier: Apache-2.0
"""The parts that all of a daemon shares, opened once, before any guest is restored."""

from __future__ import annotations

from dataclasses import dataclass

from cowshed.cache import PageStore
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.guests import GuestTable
from cowshed.service.images.access import Access
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.opening import KeptImages
from cowshed.service.images.warming import Warming
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.metrics.service_counters import ServiceCounters
from cowshed.service.overlays.overlays import OverlayTable
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.listeners import Listeners
from cowshed.service.runtime.loop import Loop
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.service.settings.config import Config
from cowshed.service.supervise.history import RestartHistory
from cowshed.service.supervise.keeper_watch import KeeperWatch

__all__ = ["Host"]


@dataclass(frozen=True)
class Host:
    """The shared parts. The daemon closes each of them, after the parts that use it.

    guests and overlays are the tables of attached guests; evictor and loop do not run yet when the
    host is constructed.
    """

    config: Config
    fd_store: FdStore
    listeners: Listeners
    admission: Admission
    loop: Loop
    watch: KeeperWatch
    side: SideThreads
    counters: ServiceCounters
    history: RestartHistory
    store: PageStore
    kept_images: KeptImages
    guests: GuestTable
    overlays: OverlayTable
    evictor: Evictor
    working_sets: WorkingSets
    access: Access
    warming: Warming
