# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cowshed.service.migration.record import HandoffRecord
from cowshed.service.migration.state import Phase


@pytest.fixture
def synced_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors of files, not of folders, that are synced from now on."""
    files: list[int] = []
    sync = os.fsync

    def note(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            files.append(fd)
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    return files


def test_a_prepared_record_is_written_without_a_sync_of_its_bytes(
    tmp_path: Path, synced_files: list[int]
) -> None:
    record = HandoffRecord(tmp_path)
    record.prepare_owned("one")
    assert HandoffRecord(tmp_path).owned == []
    assert len(synced_files) == 1
    record.add_owned("one")
    assert len(synced_files) == 1
    assert record.owned == HandoffRecord(tmp_path).owned == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["handoff.json"]


def test_a_preparation_that_no_longer_applies_is_not_used(tmp_path: Path) -> None:
    record = HandoffRecord(tmp_path)
    record.prepare_owned("one")
    record.add_owned("two")
    record.add_owned("one")
    assert HandoffRecord(tmp_path).owned == ["two", "one"]
    record.prepare_owned("three")
    source = {
        "handoff": "h",
        "uri": "unix:///x",
        "phase": Phase.COMMIT,
        "guests": ["g"],
        "domains": ["default"],
        "post_copy": False,
        "carried": [],
    }
    record.set_source(source)
    record.add_owned("three")
    assert HandoffRecord(tmp_path).source == source
    record.prepare_owned("four")
    record.add_owned("four", [("default", "g")])
    assert HandoffRecord(tmp_path).incomplete == {"four": [("default", "g")]}
    record.prepare_owned("five")
    record.prepare_owned("six")
    record.add_owned("five")
    assert HandoffRecord(tmp_path).owned == ["two", "one", "three", "four", "five"]


def test_the_record_of_a_finished_drain_goes_with_the_one_that_guests_are_here(
    tmp_path: Path,
) -> None:
    record = HandoffRecord(tmp_path)
    record.set_source(
        {
            "handoff": "h",
            "uri": "unix:///x",
            "phase": Phase.MOVED,
            "guests": ["g"],
            "domains": ["default"],
            "post_copy": False,
            "carried": [],
        }
    )
    record.prepare_owned("back")
    assert HandoffRecord(tmp_path).source is not None
    record.add_owned("back")
    assert record.source is HandoffRecord(tmp_path).source is None
