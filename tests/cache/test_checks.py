# SPDX-License-Identifier: Apache-2.0
"""The store's invariants are recomputed, and what does not hold is named."""

import mmap
import struct

import pytest
from stage import MakeStage, Stage, let_go, stop_at, wait_at

from cowshed.cache import ExtentState, InvariantError
from cowshed.cache._core import lib

HEADER_BYTES = 192  # of the memfd of arrays; the extents' states follow, 4 bytes each


def test_a_store_is_sound_while_it_loads_and_evicts(stage: Stage) -> None:
    stage.store.check()
    stop_at(lib.POINT_LOAD_FILL)
    stage.image.prefetch(0, 8)
    wait_at(lib.POINT_LOAD_FILL)
    stage.store.check()
    let_go(lib.POINT_LOAD_FILL)
    stage.load()
    stage.image.pin(2, 2, 8)
    stage.store.check()
    assert len(stage.evict_all()) == 6
    stage.store.check()


@pytest.mark.parametrize("state", [ExtentState.ABSENT, ExtentState.EVICTING])
def test_a_state_that_nobody_counted_is_found(make_stage: MakeStage, state: ExtentState) -> None:
    stage = make_stage()
    stage.load()
    with mmap.mmap(stage.image.arrays_fd, 0) as mapping:
        (was,) = struct.unpack_from("=I", mapping, HEADER_BYTES + 4 * 3)
        assert was == ExtentState.RESIDENT
        struct.pack_into("=I", mapping, HEADER_BYTES + 4 * 3, state)
        with pytest.raises(InvariantError, match=r"image \(4\)"):
            stage.store.check()
        struct.pack_into("=I", mapping, HEADER_BYTES + 4 * 3, was)
    stage.store.check()
