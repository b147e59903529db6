# SPDX-License-Identifier: Apache-2.0
"""The target's side of images' bytes: written to --image-dir, then opened in the store.

A received image is open in the store, so that its guests can be staged and its working set loaded,
but not listed there: no guest can find it until the handoff is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cowshed.cache import FileSource, Image, PageStore, PeerError
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.incoming_images import ImageFolder, IncomingImage
from cowshed.service.settings.images import ImageSpec
from cowshed.transport.handoff.sections import PAGE_BYTES, ImageBytes, ImageSection

__all__ = ["ImageIntake", "Publish"]

Publish = Callable[[Image, ImageSpec], None]


class ImageIntake:
    """Receives the images of one handoff; the owner must admit() or discard() once, at the end.

    Invariant: each of incoming is admitted or discarded by then, and each of _opened closed or
    listed; the keys are images' numbers in the handoff.
    """

    def __init__(
        self,
        store: PageStore,
        evictor: Evictor,
        folder: ImageFolder | None,
        publish: Publish,
    ) -> None:
        """publish(image, spec) has an image served to the guests allowed to use it."""
        self._store = store
        self._evictor = evictor
        self._folder = folder
        self._publish = publish
        self.incoming: Final[dict[int, IncomingImage]] = {}
        self._opened: dict[int, Image] = {}
        self.total_bytes = 0

    def refusal(self, section: ImageSection) -> str:
        """Return why an image's bytes cannot be received here; "" if they can."""
        option = f"--image {section.name}={section.source}"
        if section.domain != "default":
            option += f",domain={section.domain}"
        missing = (
            f"the target serves no image with digest {section.digest[:30]} in that domain; "
            f"start it with {option}"
        )
        if any((each.domain, each.name) == (section.domain, section.name) for each in self._store):
            return f"{missing}, in place of another that it serves under that name"
        if self._folder is None:
            also = "" if section.has_bytes else ", and give --with-images here"
            return f"{missing}, or with --image-dir DIR to keep the bytes that are sent{also}"
        if not section.has_bytes:
            return f"{missing}, or give --with-images: the bytes go to {self._folder.folder}"
        return self._folder.obstacle(section.domain, section.name) or ""

    def expect(self, no: int, section: ImageSection, handoff: str) -> None:
        """Begin to receive an image. Raises CowshedError."""
        assert self._folder is not None
        allowed = None
        if section.allowed is not None:
            allowed = {key: list(names) for key, names in section.allowed.items()}
        self.incoming[no] = self._folder.begin(
            section.domain, section.name, section.size_bytes, section.digest, allowed, handoff
        )

    def take(self, section: ImageBytes) -> None:
        """Write bytes of an expected image; ignores others. Raises SourceError."""
        image = self.incoming.get(section.image)
        if image is None:
            return
        content, at = memoryview(section.content), 0
        for first, nr in section.runs:
            image.write(first, content[at : at + nr * PAGE_BYTES])
            at += nr * PAGE_BYTES
        self.total_bytes += at

    def seal(self, no: int, look: Callable[[], None]) -> FileSource | None:
        """Check a complete image and return its source, now the caller's; None if not expected.

        Reads the whole image. Raises SourceError, and what look() raises.
        """
        image = self.incoming.get(no)
        return None if image is None else image.seal(look)

    def open(self, no: int, source: FileSource) -> Image:
        """Open a sealed image; takes source over, or closes it. Raises CowshedError."""
        spec = self.incoming[no].spec
        try:
            image = self._store.open_image(spec.name, source, spec.domain, listed=False)
        except BaseException:
            source.close()
            raise
        image.digest = self.incoming[no].digest
        self._opened[no] = image
        return image

    def check(self) -> None:
        """Raise PeerError unless every expected image was received."""
        for no, postcopy in self.incoming.items():
            if no not in self._opened:
                raise PeerError(f"peer did not send all bytes of image {postcopy.spec.label!r}")

    def admit(self, *, is_owned: bool) -> list[str]:
        """Have every image served from now on; return their labels.

        is_owned: the handoff is recorded as ours, by which a restart knows; else raises SourceError
        if that cannot be recorded with the image.
        """
        for no, image in list(self._opened.items()):
            postcopy = self.incoming[no]
            postcopy.admit(is_owned=is_owned)
            self._publish(image, postcopy.spec)
        labels = [image.label for image in self._opened.values()]
        self._opened.clear()
        self.incoming.clear()
        return labels

    def discard(self) -> None:
        """Remove all received images, whose guests must be gone; idempotent."""
        for image in self._opened.values():
            self._evictor.close_image(image)
        self._opened.clear()
        for postcopy in self.incoming.values():
            postcopy.discard()
        self.incoming.clear()
