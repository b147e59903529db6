# SPDX-License-Identifier: Apache-2.0
"""The record of handoffs for a successor: STATE_DIR/handoff.json.

It is a file, not a memfd that the keeper holds, because it must outlive the keeper and the host,
too; a handoff writes it only a few times. It is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cowshed.cache.errors import SourceError, UsageError
from cowshed.service.migration.state import Phase

__all__ = ["HandoffRecord", "SourceRecord"]

_VERSION: Final = 1
# Received handoffs that are remembered; more than a source could ever ask about again.
_MAX_OWNED: Final = 1000

SourceRecord = dict[str, Any]


class HandoffRecord:
    """Reads and writes the record; for any thread.

    source is None, or {"handoff", "uri", "phase", "guests", "domains", "post_copy", "carried"}:
    guests and domains in the handoff's order, carried the (domain, name) of each guest that carries
    its pages along. owned has the received handoffs, incomplete those with missing pages, with the
    (domain, name) of each guest in the handoff's order.
    """

    def __init__(self, state_dir: Path) -> None:
        """Raises UsageError for a file that is no record of ours."""
        self._path: Final = state_dir / "handoff.json"
        self._lock = threading.Lock()
        self._prepared = ""  # the bytes of the file that waits to become the record
        self.source: SourceRecord | None = None
        self.owned: list[str] = []
        self.incomplete: dict[str, list[tuple[str, str]]] = {}
        try:
            text = self._path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UsageError(
                f"cannot read {self._path}: {error.strerror}; make it readable"
            ) from error
        try:
            table = json.loads(text)
            if table["version"] != _VERSION:
                raise ValueError(f"version {table['version']!r}")
            self.owned = [str(each) for each in table["owned"]]
            self.incomplete = {
                str(handoff): [(str(domain), str(name)) for domain, name in keys]
                for handoff, keys in table.get("arriving", {}).items()
            }
            if table["source"] is not None:
                self.source = {
                    "handoff": str(table["source"]["handoff"]),
                    "uri": str(table["source"]["uri"]),
                    "phase": Phase(table["source"]["phase"]),
                    "guests": list(table["source"]["guests"]),
                    "domains": list(table["source"].get("domains", [])),
                    "post_copy": table["source"].get("post_copy") is True,
                    "carried": [
                        (str(domain), str(name))
                        for domain, name in table["source"].get("carried", [])
                    ],
                }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self._path} is not a record of handoffs ({error}); "
                "find out which backend has the guests, and move the file away"
            ) from error

    def set_source(self, source: SourceRecord | None) -> None:
        """Record the state of our drain, durably before this returns. Raises SourceError."""
        with self._lock:
            self._write(source, self.owned, self.incomplete)
            self.source = source

    def prepare_owned(self, handoff: str) -> None:
        """Write and sync beforehand what add_owned(handoff) will record, while guests still run.

        If the record changes meanwhile, add_owned() writes it anew. Raises SourceError.
        """
        with self._lock:
            source, owned = self._with(handoff)
            text = self._text(source, owned, self.incomplete)
            self._prepared = ""
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _write_synced(self._path.with_suffix(".owned"), text)
            except OSError as error:
                raise self._error(error) from error
            self._prepared = text

    def add_owned(self, handoff: str, incomplete: Sequence[tuple[str, str]] = ()) -> None:
        """Record that a handoff's guests are ours; incomplete has their keys if pages are missing.

        The same write deletes the record of our own drain if that has MOVED: guests are here again,
        and a successor must not redirect them to the old target. Raises SourceError.
        """
        with self._lock:
            source, owned = self._with(handoff)
            table = (
                {**self.incomplete, handoff: list(incomplete)} if incomplete else self.incomplete
            )
            self._write(source, owned, table)
            self.source, self.owned, self.incomplete = source, owned, table

    def set_filled(self, handoff: str) -> None:
        """Record that all pages of a handoff's guests are here. Raises SourceError."""
        with self._lock:
            table = {key: keys for key, keys in self.incomplete.items() if key != handoff}
            self._write(self.source, self.owned, table)
            self.incomplete = table

    def _with(self, handoff: str) -> tuple[SourceRecord | None, list[str]]:
        """Return the record of our drain, and the received handoffs, once this one is ours."""
        is_over = self.source is not None and self.source["phase"] is Phase.MOVED
        return None if is_over else self.source, [*self.owned, handoff][-_MAX_OWNED:]

    @staticmethod
    def _text(
        source: SourceRecord | None,
        owned: list[str],
        incomplete: dict[str, list[tuple[str, str]]],
    ) -> str:
        return json.dumps(
            {"version": _VERSION, "source": source, "owned": owned, "arriving": incomplete}
        )

    def _write(
        self,
        source: SourceRecord | None,
        owned: list[str],
        incomplete: dict[str, list[tuple[str, str]]],
    ) -> None:
        text = self._text(source, owned, incomplete)
        is_prepared, self._prepared = text == self._prepared, ""
        temporary = self._path.with_suffix(".owned" if is_prepared else ".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not is_prepared:
                _write_synced(temporary, text)
            os.replace(temporary, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise self._error(error) from error

    def _error(self, error: OSError) -> SourceError:
        return SourceError(
            f"cannot write {self._path}: {error.strerror}; make room, or make it writable"
        )


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", opener=_opener) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
