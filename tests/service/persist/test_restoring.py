# SPDX-License-Identifier: Apache-2.0
"""Groups whose records are broken: each costs itself alone."""

import os

import pytest

from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds, Kinds, record_make, record_read
from cowshed.service.persist.restoring import has_kinds, restore_groups


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_group_that_is_broken_is_let_go_and_the_others_are_restored() -> None:
    groups = {
        "t/whole": [record_make({"name": "whole"})],
        "t/nameless": [record_make({})],
        "t/list": [os.memfd_create("cowshed-record")],
        "t/unwanted": [record_make({"name": "unwanted"})],
        "other/1": [record_make({"name": "other"})],
    }
    os.write(groups["t/list"][0], b"[1]")
    fd_store = FdStore(None, groups)
    inherited = InheritedFds(groups)

    def restore(group: str, fds: Kinds) -> tuple[str, str, int] | None:
        assert has_kinds(fds, {"record"}, {"overlay"})
        name = record_read(fds["record"])["name"]
        return None if name == "unwanted" else (group, name, fds["record"])

    fd = groups["t/whole"][0]
    assert restore_groups(inherited, "t/", fd_store, restore) == [("t/whole", "whole", fd)]
    assert [name for name, fds in groups.items() if is_open(fds[0])] == ["t/whole", "other/1"]
    assert set(fd_store.groups) == {"t/whole", "other/1"}
    assert list(inherited) == ["other/1"]
    os.close(fd)
    inherited.close()


@pytest.mark.parametrize(
    ("kinds", "is_right"),
    [
        ({"record", "ledger"}, True),
        ({"record", "ledger", "pagemap"}, True),
        ({"record"}, False),
        ({"record", "ledger", "socket"}, False),
    ],
)
def test_a_group_has_what_it_needs_and_nothing_unknown(kinds: set[str], is_right: bool) -> None:
    fds = dict.fromkeys(kinds, 0)
    assert has_kinds(fds, {"record", "ledger"}, {"pagemap"}) is is_right
