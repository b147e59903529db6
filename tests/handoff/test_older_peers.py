# SPDX-License-Identifier: Apache-2.0
"""Handoffs from and to a backend of the previous release, which is another program."""

from __future__ import annotations

from pathlib import Path

import pytest
from releases import Installation, previous_release
from two_hosts import Host, Model

pytestmark = pytest.mark.slow


@pytest.fixture
def older(hosts: tuple[Host, Host], tmp_path: Path) -> tuple[Host, Host]:
    """A backend of this release, and one of the one before it."""
    ours, theirs = hosts
    installed = Installation(tmp_path / "installed", previous_release())
    return ours.start(), theirs.start(before=installed.before)


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_pages_are_byte_exact_after_a_drain_to_an_older_backend_and_back(
    older: tuple[Host, Host], image: Path, by: str
) -> None:
    ours, theirs = older
    model = Model(image, 3)
    with ours.open("g") as disk:
        model.write(disk, 400)
    ours.drain("--to", getattr(theirs, by))
    with theirs.open("g") as disk:
        model.check(disk)
        model.write(disk)
    theirs.wait_movable("--to", getattr(ours, by))
    theirs.drain("--to", getattr(ours, by))
    with ours.open("g") as disk:
        model.check(disk)
