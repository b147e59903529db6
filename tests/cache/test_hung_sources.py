# SPDX-License-Identifier: Apache-2.0
"""A source whose reads do not return holds up its own image and nothing else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import EXTENT_PAGES, PAGE, content, let_go, stop_at, until, wait_at

from cowshed.cache import ExtentState, FileSource, Image, PageStore
from cowshed.cache._core import lib

EXTENT = EXTENT_PAGES * PAGE
NR_EXTENTS = 64
CHUNK = 16  # extents that one read asks for
CAPACITY = 4 * NR_EXTENTS
WAIT_MS = 60_000
# What one image may have in the prefetch queue: an eighth of the capacity, and one.
BUDGET = CAPACITY // 8 + 1


@pytest.fixture
def store() -> Iterator[PageStore]:
    with PageStore(CAPACITY * EXTENT, nr_loaders=1) as store:
        try:
            yield store
        finally:
            let_go(lib.POINT_LOAD_READ)


def open_image(store: PageStore, folder: Path, name: str) -> Image:
    path = folder / name
    path.write_bytes(content(0, NR_EXTENTS * EXTENT_PAGES))
    return store.open_image(name, FileSource.open(path))


def hang(image: Image) -> None:
    """Have a read of the image hang; later ones would not."""
    stop_at(lib.POINT_LOAD_READ)
    assert image.prefetch(0, NR_EXTENTS) == BUDGET
    wait_at(lib.POINT_LOAD_READ)


def resident(image: Image) -> int:
    return image.states().count(ExtentState.RESIDENT)


def nr_loader_threads() -> int:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append(path.read_text().strip())
    return names.count("cow-loader")


def test_an_image_is_loaded_though_a_read_of_another_hangs(
    store: PageStore, tmp_path: Path
) -> None:
    hung, other = open_image(store, tmp_path, "hung"), open_image(store, tmp_path, "other")
    assert other.prefetch(NR_EXTENTS - 1, 1) == 1
    assert other.wait_loaded(0, NR_EXTENTS, WAIT_MS)  # the loader has given itself its name by then
    before = nr_loader_threads()
    hang(hung)
    assert other.prefetch(0, BUDGET) == BUDGET  # the other's queue takes nothing from its own
    assert other.wait_loaded(0, BUDGET, WAIT_MS)
    assert (resident(other), resident(hung)) == (BUDGET + 1, 0)
    assert nr_loader_threads() == before + 1
    assert hung.read_wait_seconds > 0.5
    assert other.read_wait_seconds == 0.0
    let_go(lib.POINT_LOAD_READ)
    assert hung.wait_loaded(0, BUDGET, WAIT_MS)
    assert resident(hung) == BUDGET
    assert hung.read_wait_seconds == 0.0
    until(lambda: nr_loader_threads() == before, "the thread too many ends")
    assert store.counters().reserved_extents == 2 * BUDGET + 1


def test_an_image_that_hangs_occupies_no_more_threads_than_there_are_loaders(
    store: PageStore, tmp_path: Path
) -> None:
    hung, other = open_image(store, tmp_path, "hung"), open_image(store, tmp_path, "other")
    hang(hung)
    for first in range(0, BUDGET, CHUNK):
        other.prefetch(first, CHUNK)
        assert other.wait_loaded(first, CHUNK, WAIT_MS)
    # A thread more would have loaded it: only the first read hangs.
    assert resident(hung) == 0
    assert list(hung.states()).count(ExtentState.LOADING) == BUDGET


def test_a_store_is_stopped_though_a_read_hangs(tmp_path: Path) -> None:
    store = PageStore(CAPACITY * EXTENT, nr_loaders=1)
    hung, other = open_image(store, tmp_path, "hung"), open_image(store, tmp_path, "other")
    hang(hung)
    assert not store.stop(0.1)
    store.close()
    assert store.image(other.image_no) is None  # closed, and the other left behind
    assert store.image(hung.image_no) is hung
    assert hung.prefetch(CHUNK, CHUNK) == 0
    let_go(lib.POINT_LOAD_READ)
    until(lambda: hung.read_wait_seconds == 0.0, "the read returns")
    until(lambda: store.stop(0), "its thread ends")
    store.close()


def test_a_store_that_is_stopped_loads_no_more(store: PageStore, tmp_path: Path) -> None:
    image = open_image(store, tmp_path, "image")
    store.cancel_loads()
    assert image.prefetch(0, CHUNK) == 0
    assert store.stop(WAIT_MS / 1000)
