# SPDX-License-Identifier: Apache-2.0
"""What one guest must see of one image: the image's own bytes under the guest's own writes.

Pure. Kept by page, because a page is what the kernel gives, takes away and refuses. Several threads
may use one model at once if each keeps to pages of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PAGE_BYTES = 4096


class DiskModel:
    """Invariants: (1) own holds exactly the pages written and not discarded since; (2) doubtful are
    the pages that met an error and have not been read well again: each may fail again.
    """

    def __init__(self, image: Sequence[int], size_bytes: int) -> None:
        self._image = image
        self.size_bytes = size_bytes
        self.nr_pages = -(-size_bytes // PAGE_BYTES)
        self.own: dict[int, bytearray] = {}
        self.doubtful: set[int] = set()

    def page(self, page: int) -> bytes:
        """One page's bytes; fewer than 4096 at the image's end."""
        start = page * PAGE_BYTES
        end = min(start + PAGE_BYTES, self.size_bytes)
        own = self.own.get(page)
        return bytes(self._image[start:end]) if own is None else bytes(own[: end - start])

    def _image_bytes(self, page: int, start: int, nr: int) -> bytes:
        at = page * PAGE_BYTES + start
        return bytes(self._image[at : at + nr])

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Cut a byte range at pages: (page, first byte within the page, bytes)."""
        end = offset + length
        while offset < end:
            page, start = divmod(offset, PAGE_BYTES)
            nr = min(end - offset, PAGE_BYTES - start)
            yield page, start, nr
            offset += nr

    def write(self, offset: int, data: bytes) -> None:
        """The guest wrote data."""
        at = 0
        for page, start, nr in self.pieces(offset, len(data)):
            self.write_in_page(page, start, data[at : at + nr])
            at += nr

    def write_in_page(self, page: int, start: int, data: bytes) -> None:
        """The guest wrote data, all within one page."""
        own = self.own.get(page)
        if own is None:
            own = bytearray(self.page(page).ljust(PAGE_BYTES, b"\0"))
            self.own[page] = own
        own[start : start + len(data)] = data

    def discard(self, first: int, nr: int) -> None:
        """The guest gave pages back; an error they met is gone with them."""
        for page in range(first, first + nr):
            self.own.pop(page, None)
            self.doubtful.discard(page)

    def first_wrong(self, offset: int, found: bytes) -> str | None:
        """Say where bytes read at offset differ from what they must be, or None."""
        at = 0
        for page, start, nr in self.pieces(offset, len(found)):
            if problem := self.wrong_in_page(page, start, found[at : at + nr]):
                return problem
            at += nr
        return None

    def wrong_in_page(self, page: int, start: int, found: bytes) -> str | None:
        """The same for bytes of one page."""
        wanted = self.page(page)[start : start + len(found)]
        if found == wanted:
            return None
        nr_wrong = sum(a != b for a, b in zip(found, wanted, strict=True))
        first = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        kind = "its own" if page in self.own else "the image's"
        if not any(found):
            kind += ", and is zeros"
        elif page in self.own and found == self._image_bytes(page, start, len(found)):
            kind += ", and is the image's"
        return (
            f"page {page}, byte {start + first}: {nr_wrong} of {len(found)} bytes are wrong; "
            f"must be {kind}: wanted {wanted[first : first + 8].hex()}, "
            f"found {found[first : first + 8].hex()}"
        )
