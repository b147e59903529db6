# SPDX-License-Identifier: Apache-2.0
"""The folder of images that came in handoffs, under several handoffs at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowshed.cache import UsageError
from cowshed.service.images.incoming_images import ImageFolder

PAGE = 4096
NR_ROUNDS = 300


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a")])
def test_an_image_comes_while_another_goes_and_takes_their_folder_along(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    folder = ImageFolder(tmp_path)
    begin = threading.Barrier(len(names))

    def come_and_go(name: str) -> int:
        nr_come = 0
        begin.wait(60)
        for _ in range(NR_ROUNDS):
            try:
                image = folder.begin("default", name, PAGE, "sha256:0", None, "h")
            except UsageError as error:
                assert "in another handoff" in str(error)  # noqa: PT017
                continue
            image.write(0, memoryview(bytes(PAGE)))
            assert (tmp_path / "default" / f".{name}.raw.part").stat().st_size == PAGE
            image.discard()
            nr_come += 1
        return nr_come

    with ThreadPoolExecutor(len(names)) as pool:
        nr_come = list(pool.map(come_and_go, names))
    assert sum(nr_come) >= NR_ROUNDS if len(set(names)) > 1 else min(nr_come) > 0
    assert list(tmp_path.iterdir()) == []
