# SPDX-License-Identifier: Apache-2.0
"""Images received in handoffs, kept in --image-dir and served again after a restart.

    DIR/DOMAIN/NAME.raw          the bytes; holes where they are zeros
    DIR/DOMAIN/NAME.json         its record; pending until the handoff that brought it is over
    DIR/DOMAIN/.NAME.raw.part    bytes that are arriving

The receiving daemon locks an arriving image. It writes the record before it renames the bytes to
NAME.raw. So a restart finds nothing, unlocked parts, or a record: it removes the image if the
record is pending and the handoff is not known to be committed, and serves it otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cowshed.cache import CowshedError, FileSource, SourceError, UsageError
from cowshed.service.images.digests import digest_of
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.domains import DomainMembers
from cowshed.service.settings.images import ImageSpec, image_spec

__all__ = ["ImageFolder", "IncomingImage"]

_log = EventLog("cowshed.images")

_VERSION: Final = 1
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True)
class _Places:
    """The paths of an image's bytes, of its record, and of its bytes while they arrive."""

    raw: Path
    record: Path
    part: Path


class ImageFolder:
    """The folder; shared by any number of daemons, each image used by one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError, one line, for a folder that cannot be used."""
        self.folder: Final = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13))
        except OSError as error:
            raise UsageError(
                f"cannot use image-dir {str(folder)!r}: {error.strerror}; name another"
            ) from error

    def specs(
        self,
        is_owned: Callable[[str], bool],
        is_kept: Callable[[str, str], bool] = lambda *_: False,
    ) -> list[ImageSpec]:
        """Remove interrupted arrivals and return the images to serve; called at the start.

        is_owned(handoff) says whether a handoff was committed, is_kept(domain, name) whether we
        inherited the image and its open source: then the file at its path is not checked.
        """
        for part in self.folder.glob("*/.*.part"):
            _remove_unlocked(part)
        specs = []
        for record in sorted(self.folder.glob("*/*.json")):
            try:
                spec = self._read(record, is_owned, is_kept)
            except (OSError, ValueError, KeyError, TypeError, CowshedError) as error:
                _log.error("image-unreadable", f"{record}: {error}; move it away")
                continue
            if spec is not None:
                specs.append(spec)
        return specs

    def _read(
        self, path: Path, is_owned: Callable[[str], bool], is_kept: Callable[[str, str], bool]
    ) -> ImageSpec | None:
        table = json.loads(path.read_text())
        if table["version"] != _VERSION:
            raise ValueError(f"unknown version {table['version']!r}")
        domain, name = str(table["domain"]), str(table["name"])
        places = self._places(domain, name)
        if places.record != path:
            raise ValueError(f"it is of image {domain}/{name}")
        if (pending := table["pending"]) is not None:
            if not is_owned(pending):
                if places.raw.exists() and not _remove_unlocked(places.raw):
                    return None  # another daemon's, arriving
                _remove_record(places)
                return None
            _write_record(places.record, {**table, "pending": None})
        if not is_kept(domain, name):
            size_bytes = os.stat(places.raw).st_size
            if size_bytes != table["size_bytes"]:
                raise ValueError(f"{places.raw} has {size_bytes} bytes, not {table['size_bytes']}")
        return _spec(domain, name, places.raw, table["allowed"])

    def obstacle(self, domain: str, name: str) -> str | None:
        """Return why an image of that name cannot be received, or None if it can."""
        places = self._places(domain, name)
        try:
            _spec(domain, name, places.raw, None)
        except UsageError as error:
            return str(error)
        for path in (places.raw, places.record):
            if path.exists():
                return (
                    f"{str(path)!r} is in the way at the target: serve it there with "
                    f"--image {name}={places.raw}, or move it away"
                )
        return None

    def begin(
        self,
        domain: str,
        name: str,
        size_bytes: int,
        digest: str,
        allowed: dict[str, list[int | str]] | None,
        handoff: str,
    ) -> IncomingImage:
        """Begin to receive an image; the caller must admit() or discard() it.

        UsageError if it is already arriving or here, SourceError if its file cannot be made.
        """
        if (why := self.obstacle(domain, name)) is not None:
            raise UsageError(why)
        places = self._places(domain, name)
        table = {
            "version": _VERSION,
            "name": name,
            "domain": domain,
            "size_bytes": size_bytes,
            "digest": digest,
            "allowed": allowed,
            "pending": handoff,
        }
        spec = _spec(domain, name, places.raw, allowed)
        try:
            fd = _lock_part(places.part)
        except BlockingIOError as error:
            raise UsageError(
                f"image {name!r} is being received in another handoff; wait until that has ended"
            ) from error
        except OSError as error:
            raise SourceError(f"cannot create {str(places.part)!r}: {error.strerror}") from error
        return IncomingImage(spec, table, places, fd)

    def _places(self, domain: str, name: str) -> _Places:
        folder = self.folder / domain
        return _Places(
            folder / f"{name}.raw", folder / f"{name}.json", folder / f".{name}.raw.part"
        )


class IncomingImage:
    """One arriving image. Used by one thread; discard() undoes everything, until admit()."""

    def __init__(self, spec: ImageSpec, table: dict[str, Any], places: _Places, fd: int) -> None:
        self.spec: Final = spec
        self.size_bytes: Final[int] = table["size_bytes"]
        self.digest: Final[str] = table["digest"]
        self._table = table
        self._places = places
        self._fd = fd

    def write(self, first_page: int, content: memoryview) -> None:
        """Write pages; the image's last page is padded with zeros. Raises SourceError."""
        at = first_page * _PAGE_BYTES
        with self._no_room():
            while content:
                nr = os.pwrite(self._fd, content, at)
                at, content = at + nr, content[nr:]

    def seal(self, look: Callable[[], None]) -> FileSource:
        """Check the digest, make the image durable and open it; calls look() repeatedly.

        Raises SourceError if the digest differs, and what look() raises.
        """
        with self._no_room():
            os.ftruncate(self._fd, self.size_bytes)
            os.fsync(self._fd)
        with _opened(self._places.part) as source:

            def stop() -> bool:
                look()
                return False

            try:
                digest = digest_of(source, stop)
            except OSError as error:
                raise SourceError(
                    f"image {self.spec.name!r} cannot be read back: {error}"
                ) from error
        if digest != self.digest:
            raise SourceError(
                f"the bytes received of image {self.spec.label!r} have digest {digest[:30]}, not "
                f"{self.digest[:30]} as announced: its source changed, or they were damaged"
            )
        with self._no_room():
            _write_record(self._places.record, self._table)
            os.rename(self._places.part, self._places.raw)
            _sync(self._places.raw.parent)
        return FileSource.open(self._places.raw)

    def admit(self, *, is_owned: bool) -> None:
        """Mark the image as no longer pending, so that every restart serves it.

        Raises SourceError on failure, unless is_owned: then a restart finds from the handoff's
        record that the image is ours.
        """
        try:
            with self._no_room():
                _write_record(self._places.record, {**self._table, "pending": None})
        except SourceError as error:
            if not is_owned:
                raise
            _log.warning("image-pending", str(error), image=self.spec.label)
        os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        """Remove the image unless it was admitted; idempotent."""
        if self._fd < 0:
            return
        for path in (self._places.raw, self._places.part):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(self._fd)):
                    path.unlink()
        _remove_record(self._places)
        os.close(self._fd)
        self._fd = -1

    @contextlib.contextmanager
    def _no_room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SourceError(
                f"image {self.spec.label!r} cannot be kept in {str(self._places.raw.parent)!r}: "
                f"{error.strerror}; make room there, or serve with another --image-dir"
            ) from error


def _lock_part(part: Path) -> int:
    """Open an empty file for the bytes of an image, and lock it. Raises OSError.

    Retries because a handoff that ends meanwhile may remove the file, or the emptied folder.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part.parent, 0o700)
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(part), os.fstat(fd)):
                os.ftruncate(fd, 0)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[FileSource]:
    source = FileSource.open(path)
    try:
        yield source
    finally:
        source.close()


def _spec(domain: str, name: str, raw: Path, allowed: Any) -> ImageSpec:
    members = None
    if allowed is not None:
        lists = {key: list(allowed.get(key, ())) for key in ("uids", "gids", "clients")}
        members = DomainMembers(
            frozenset(lists["uids"]), frozenset(lists["gids"]), frozenset(lists["clients"])
        )
    return image_spec(name, str(raw), Path("/"), domain, members)


def _write_record(path: Path, table: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    try:
        with open(temporary, "w", opener=_opener) as file:
            json.dump(table, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _remove_record(places: _Places) -> None:
    """Remove the record, and its folder if empty; must follow the removal of the image's bytes."""
    with contextlib.suppress(OSError):
        places.record.unlink()
    with contextlib.suppress(OSError):
        _sync(places.record.parent)
        places.record.parent.rmdir()


def _remove_unlocked(path: Path) -> bool:
    """Remove a file that no daemon has locked; return False if one has."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
