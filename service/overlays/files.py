# SPDX-License-Identifier: Apache-2.0
"""Overlays on disk, in --overlay-dir, with their owners and images.

Each has three files: STEM.json is its record, STEM.pages has its private pages, each at its offset
in the image, and STEM.map has the bits of the valid ones. The record is replaced as a whole; the C
core writes the others. An overlay is unusable once its image's source changed, since its pages
belong between the old ones. A changed source is recognized by size and mtime, and by digest if only
the mtime differs: a backup or `touch` sets times, too. source_mtime_ns is the mtime when the
overlay was made, which identifies the map; source_seen_ns is the last mtime of the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from cowshed.accounting import Account, Overlay
from cowshed.cache import Image
from cowshed.cache.errors import SourceError, UsageError
from cowshed.service.runtime.logs import EventLog

__all__ = ["OverlayFiles", "OverlayRecord", "overlay_record"]

_log = EventLog("cowshed.overlays")

_VERSION: Final = 1
_STEM_MAX: Final = 200  # NAME_MAX is 255, and suffixes are appended
_SUFFIXES: Final = (".json", ".pages", ".map")


@dataclass(frozen=True)
class OverlayRecord:
    """The description of an overlay, needed before it is opened; image is a label, DOMAIN/NAME."""

    image: str
    guest: str
    owner: str
    counted_as: int | str
    transport: str
    uid: int
    quota_bytes: int | None
    policy: str

    @property
    def label(self) -> str:
        """IMAGE@GUEST."""
        return f"{self.image}@{self.guest}"

    @property
    def stem(self) -> str:
        """The names of its files, without suffixes."""
        return _stem(self.image, self.guest)


class OverlayFiles:
    """The folder, locked, since two daemons would write to the same files. Must be closed."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError, one line, for a folder that cannot be used."""
        self._folder = folder
        self._digests: dict[str, str] = {}  # by an image's label, of the bytes that were opened
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot use overlay-dir {str(folder)!r}: {error.strerror}; name another"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(
                f"overlay-dir {str(folder)!r} is in use by another daemon: give each its own"
            ) from error

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)

    def records(self) -> Iterator[OverlayRecord]:
        """Yield the records, by file name; an unreadable one is logged and left as it is."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield _parse(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.error("overlay-unreadable", f"{path.name}: {error}; move it away")

    def write(self, record: OverlayRecord, image: Image, staged: str = "") -> None:
        """Write a record, durably, replacing an older one. Raises SourceError.

        staged: the overlay is valid only if the handoff of that name was committed.
        """
        self._write(self._table(record, image, staged), record)

    def refresh(self, record: OverlayRecord, image: Image) -> None:
        """Write a record as write() does, if it changed."""
        table = self._table(record, image)
        if table != self._written(record):
            self._write(table, record)

    def note_digest(self, image: Image) -> None:
        """Write an image's digest in records of its overlays from now on.

        Does nothing if its source was written to since it was opened, or is lost. May wait for the
        source.
        """
        try:
            written_ns = image.source.written_ns()
        except OSError:
            return
        if image.source_change is None and written_ns == image.source.identity.mtime_ns:
            self._digests[image.label] = image.digest

    def knows_digest(self, image: Image) -> bool:
        """Whether records of an image's overlays are written with its digest by now."""
        return image.label in self._digests

    def _table(self, record: OverlayRecord, image: Image, staged: str = "") -> dict[str, Any]:
        before = self._written(record)
        table = {"version": _VERSION, **asdict(record), **self._source(record, image)}
        if table["source_mtime_ns"] != image.source.mtime_ns:
            table["source_seen_ns"] = image.source.mtime_ns
        if digest := self._digests.get(image.label) or before.get("source_digest"):
            table["source_digest"] = digest
        if staged:
            table["staged"] = staged
        return table

    def _source(self, record: OverlayRecord, image: Image) -> dict[str, int]:
        """Return the source's size and mtime that identify an overlay's map."""
        made_ns = self._written(record).get("source_mtime_ns", image.source.mtime_ns)
        return {"source_bytes": image.size_bytes, "source_mtime_ns": made_ns}

    def _written(self, record: OverlayRecord) -> dict[str, Any]:
        """Return the fields in a record's file; {} if there is none. Raises SourceError."""
        path = self._path(record.stem, ".json")
        try:
            return dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise SourceError(f"cannot read {str(path)!r}: {error.strerror}") from error

    def _write(self, table: dict[str, Any], record: OverlayRecord) -> None:
        path = self._path(record.stem, ".json")
        temporary = path.with_suffix(".new")
        try:
            with open(temporary, "w", opener=_opener) as file:
                json.dump(table, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise SourceError(f"cannot write {str(path)!r}: {error.strerror}") from error

    def check(self, record: OverlayRecord, image: Image) -> bool:
        """Return True if the overlay was made of this image; UsageError if it was not.

        False: only the image's digest, which is not known yet, can tell.
        """
        written = self._written(record)
        if written.get("source_bytes") == image.size_bytes:
            times = (written.get("source_mtime_ns"), written.get("source_seen_ns"))
            digest = written.get("source_digest")
            if image.source.mtime_ns in times or (digest and image.digest == digest):
                return True
            if digest and not image.digest:
                return False
        raise UsageError(
            f"the source of {image.label!r} changed since overlay {record.label!r} was made: "
            f"serve the old source, or remove {self._folder}/{record.stem}.*"
        )

    def identity(self, record: OverlayRecord) -> list[list[int]]:
        """Return device and inode of an overlay's pages and map; OSError if one is missing."""
        status = (os.stat(self._path(record.stem, suffix)) for suffix in _SUFFIXES[1:])
        return [[each.st_dev, each.st_ino] for each in status]

    def check_same(self, record: OverlayRecord, identity: list[list[int]]) -> None:
        """Raise UsageError unless its files are those that our predecessor had."""
        with contextlib.suppress(OSError):
            if self.identity(record) == identity:
                return
        raise UsageError(
            f"files of overlay {record.label!r} are not those that the last backend wrote to: "
            f"{self._folder}/{record.stem}.* were replaced; put the old ones back, and restart"
        )

    def staged(self, record: OverlayRecord) -> str:
        """Return the handoff by which an overlay is staged, not admitted yet; "" if none."""
        return str(json.loads(self._path(record.stem, ".json").read_text()).get("staged", ""))

    def check_free(self, record: OverlayRecord) -> None:
        """Raise UsageError if files of that name exist: usable ones would be in the table."""
        for suffix in _SUFFIXES:
            if self._path(record.stem, suffix).exists():
                raise UsageError(
                    f"files of an earlier overlay {record.label!r} exist and were unusable when "
                    "the daemon started: see its log, and move "
                    f"{self._folder}/{record.stem}.* away"
                )

    def clear(self, record: OverlayRecord) -> None:
        """Remove files without a record, left by an overlay that was staged and never admitted.

        Raises UsageError if there is a record, of an overlay that was unusable at the start.
        """
        if self._path(record.stem, ".json").exists():
            self.check_free(record)
        self.remove(record.image, record.guest)

    def open(self, record: OverlayRecord, account: Account, *, is_adopted: bool = False) -> Overlay:
        """Open an overlay's files, or create them. Raises SourceError, UsageError.

        is_adopted: the account was adopted, and its private bits are valid.
        """
        source = self._source(record, account.image)
        text = json.dumps({"image": record.image, **source}, sort_keys=True)
        identity = hashlib.sha256(text.encode()).digest()
        return Overlay.files(account, self._folder, record.stem, identity, is_adopted=is_adopted)

    def remove(self, image: str, guest: str) -> None:
        """Remove an overlay's files, the record last, so that no file is ever without one."""
        for suffix in reversed(_SUFFIXES):
            with contextlib.suppress(FileNotFoundError):
                self._path(_stem(image, guest), suffix).unlink()
        self._sync()

    def _path(self, stem: str, suffix: str) -> Path:
        return self._folder / f"{stem}{suffix}"

    def _sync(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _stem(image: str, guest: str) -> str:
    """Make a file name of the names, percent-encoded; cuts long ones and appends a digest."""
    stem = quote(f"{image}@{guest}", safe="@ ")
    if len(stem) > _STEM_MAX:
        stem = f"{stem[: _STEM_MAX - 20]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"
    return stem


def _parse(table: Any) -> OverlayRecord:
    if table["version"] != _VERSION:
        raise ValueError(f"unknown version {table['version']!r}")
    return overlay_record(table)


def overlay_record(table: Any) -> OverlayRecord:
    """Read a record from its fields; ValueError, KeyError or TypeError if they are invalid."""
    record = OverlayRecord(**{key: table[key] for key in OverlayRecord.__dataclass_fields__})
    if record.quota_bytes is not None and type(record.quota_bytes) is not int:
        raise ValueError("quota_bytes is not a number")
    if record.policy not in ("stop", "kill", "allow"):
        raise ValueError(f"unknown policy {record.policy!r}")
    if not all(isinstance(text, str) for text in (record.image, record.guest, record.owner)):
        raise ValueError("image, guest and owner must be text")
    return record
