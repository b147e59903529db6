# SPDX-License-Identifier: Apache-2.0
"""Stage the guests that a handoff brings, hidden until they are admitted.

A staged guest is an overlay under its name that nobody can enter. Admitting all of them only
changes a table; discarding them leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cowshed.accounting import MissingPages, QuotaPolicy
from cowshed.accounting.page_runs import PackedRuns, count_pages
from cowshed.cache import (
    CowshedError,
    FileSource,
    Image,
    PageStore,
    PeerError,
    SourceError,
    UsageError,
)
from cowshed.service.images.evictor import Evictor
from cowshed.service.migration.blockers import Blocker, wait_for_digests
from cowshed.service.migration.image_intake import ImageIntake
from cowshed.service.overlays.files import OverlayRecord
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.handoff.sections import (
    PAGE_BYTES,
    Dropped,
    GuestSection,
    ImageBytes,
    ImageSection,
    Missing,
    Pages,
    Section,
    StateReader,
    WorkingSetSection,
)

__all__ = ["Receiver"]

_log = EventLog("cowshed.handoff")

Load = Callable[[Image, Iterable[int]], Iterator[object]]


class Receiver:
    """Stages the sections of a StateReader; the owner must admit() or discard() once, at the end.

    Invariant: staged has the received guests, by number, until then.
    """

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        overlays: OverlayTable,
        load: Load,
        intake: ImageIntake,
    ) -> None:
        """load(image, extents) loads extents, yielding repeatedly meanwhile."""
        self._store = store
        self._load = load
        self._evictor = evictor
        self._overlays = overlays
        self._intake = intake
        self._images: list[Image | None] = []
        self._sections: list[ImageSection] = []
        self._guests: list[GuestSection] = []
        self.staged: dict[int, OverlayGuest] = {}
        self.total_bytes = 0

    def check(self, reader: StateReader, look: Callable[[], None]) -> list[Blocker]:
        """Stage the offered guests and return []; or stage nothing and return the blockers.

        Guests of images whose bytes are still to come are staged by open().
        """
        assert reader.header is not None
        blockers = wait_for_digests(list(self._store), look)
        self._sections, self._guests = list(reader.images), list(reader.guests)
        self._images = [self._find(section) for section in reader.images]
        wanted = []
        used = {guest.image for guest in reader.guests}
        for no, section in enumerate(reader.images):
            if self._images[no] is None:
                reason = self._intake.refusal(section)
                if not reason:
                    wanted.append(no)
                elif no in used:
                    blockers.append({"image": f"{section.domain}/{section.name}", "reason": reason})
        needed = sum(guest.counters.get("private_pages", 0) for guest in reader.guests)
        room = _available_bytes()
        if needed * PAGE_BYTES > room:
            blockers.append(
                {
                    "reason": f"private pages take {needed * PAGE_BYTES} bytes and the target has "
                    f"{room} bytes of memory left; free some"
                }
            )
        if not blockers:
            blockers = self._expect(wanted, reader.header.handoff)
        for no, image in enumerate(self._images):
            if not blockers and image is not None:
                blockers = self._stage(no, image)
        if blockers:
            self.discard()
        return blockers

    @property
    def wanted(self) -> list[int]:
        """The numbers of the images whose bytes are still to come."""
        return sorted(self._intake.incoming)

    @property
    def image_bytes(self) -> int:
        """The received bytes of images."""
        return self._intake.total_bytes

    def _expect(self, wanted: list[int], handoff: str) -> list[Blocker]:
        blockers: list[Blocker] = []
        for no in wanted:
            section = self._sections[no]
            try:
                self._intake.expect(no, section, handoff)
            except CowshedError as error:
                label = f"{section.domain}/{section.name}"
                blockers.append({"image": label, "reason": f"at the target: {error}"})
        for guest in self._guests:
            if guest.image in wanted:
                try:
                    self._overlays.check_name(self._sections[guest.image].domain, guest.name)
                except UsageError as error:
                    blockers.append({"guest": guest.name, "reason": f"at the target: {error}"})
        return blockers

    def _stage(self, image_no: int, image: Image) -> list[Blocker]:
        """Stage the guests of one image; return blockers for those that cannot be."""
        blockers: list[Blocker] = []
        for no, section in enumerate(self._guests):
            if section.image != image_no:
                continue
            record = OverlayRecord(
                image=image.label,
                guest=section.name,
                owner=section.owner,
                counted_as=section.uid,
                transport=section.transport,
                uid=section.uid,
                quota_bytes=section.quota_bytes,
                policy=QuotaPolicy[section.policy.upper()].name.lower(),
            )
            try:
                self.staged[no] = self._overlays.stage(image, record, section.token)
            except (CowshedError, OSError) as error:
                blockers.append({"guest": section.name, "reason": f"at the target: {error}"})
        return blockers

    def seal(self, no: int, look: Callable[[], None]) -> FileSource | None:
        """Check a complete image, as ImageIntake.seal(); slow, so the caller must have no lock."""
        return self._intake.seal(no, look)

    def open(self, no: int, source: FileSource) -> None:
        """Open a sealed image, and stage its guests. Raises CowshedError."""
        image = self._images[no] = self._intake.open(no, source)
        if blockers := self._stage(no, image):
            raise UsageError(f"guest {blockers[0]['guest']!r}: {blockers[0]['reason']}")

    def _find(self, section: ImageSection) -> Image | None:
        """Find an image served here by digest, size and domain; prefers one of the same name."""
        same = [
            image
            for image in self._store
            if (image.digest, image.domain, image.size_bytes)
            == (section.digest, section.domain, section.size_bytes)
        ]
        return min(same, key=lambda image: image.name != section.name, default=None)

    def take(self, section: Section) -> None:
        """Store a section that follows the offer. Raises SourceError if there is no room."""
        if isinstance(section, Pages):
            guest = self._staged(section.guest)
            try:
                guest.overlay.store_runs(PackedRuns.of(section.runs), section.content)
            except OSError as error:
                raise SourceError(f"no room for private pages: {error.strerror}") from error
            self.total_bytes += len(section.content)
        elif isinstance(section, Missing):
            missing = MissingPages(self._staged(section.guest).overlay)
            for run in section.runs:
                missing.expect(*run)
        elif isinstance(section, Dropped):
            for first, nr in section.runs:
                self._staged(section.guest).overlay.drop(first, nr)
        elif isinstance(section, ImageBytes):
            self._intake.take(section)

    def _staged(self, no: int) -> OverlayGuest:
        guest = self.staged.get(no)
        if guest is None:
            raise PeerError(f"peer sent pages of guest {no} before the bytes of its image")
        return guest

    def warm(self, section: WorkingSetSection) -> Iterator[object]:
        """Load extents as prefetches, no more than there is room for."""
        image = self._images[section.image]
        if image is None:
            return
        room = self._evictor.watermarks.capacity_extents - self._evictor.watermarks.high_free
        room -= self._store.counters().reserved_extents
        theirs, ours = self._sections[section.image].extent_bytes, image.extent_bytes
        # What lies in each of the source's extents, or the one that it lies in.
        wanted = dict.fromkeys(
            covering
            for extent in section.extents
            for covering in range(extent * theirs // ours, -(-(extent + 1) * theirs // ours))
        )
        inside = [extent for extent in wanted if extent < image.nr_extents]
        yield from self._load(image, inside[: max(0, room // image.room_of(0))])

    def keep(self, handoff: str) -> None:
        """Make the staged guests outlive this process: a successor admits them if the handoff is
        recorded as ours. Raises SourceError.
        """
        for guest in self.staged.values():
            self._overlays.keep_staged(guest, handoff)

    def finish(self, reader: StateReader) -> None:
        """Check that everything came; SourceError unless each guest has its total of pages."""
        self._intake.check()
        for no, guest in self.staged.items():
            private = int.from_bytes(guest.account.private_bitmap(), "little")
            if count_pages(private) != reader.totals[no].private_pages:
                raise SourceError(
                    f"guest {guest.name!r} has {count_pages(private)} private pages here, not "
                    f"{reader.totals[no].private_pages} as at the source"
                )

    def guests(self) -> list[OverlayGuest]:
        """Return the staged guests, in order of their numbers."""
        return [self.staged[no] for no in sorted(self.staged)]

    def admit(self, *, is_owned: bool) -> list[str]:
        """Let the owners enter their guests; return the names. is_owned: as ImageIntake.admit()."""
        for label in self._intake.admit(is_owned=is_owned):
            _log.notice("image-arrived", image=label)
        names = [guest.name for guest in self.guests()]
        for guest in self.staged.values():
            self._overlays.admit(guest)
        self.staged.clear()
        return names

    def discard(self) -> None:
        """Discard everything received; idempotent."""
        for guest in self.staged.values():
            self._overlays.unstage(guest)
        self.staged.clear()
        self._intake.discard()


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 60
