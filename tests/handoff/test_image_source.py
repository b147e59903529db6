# SPDX-License-Identifier: Apache-2.0
"""Whether an image's bytes may be sent along: they are what its digest was computed of."""

import os
from pathlib import Path

import pytest

from cowshed.cache import FileSource, PageStore, SourceError
from cowshed.service.images.digests import digest_of
from cowshed.service.migration.image_source import check_source

MIB = 1 << 20


@pytest.mark.parametrize("has_digest", [True, False])
def test_a_source_that_was_touched_may_be_sent_and_one_with_other_bytes_may_not(
    tmp_path: Path, has_digest: bool
) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(MIB))
    with PageStore(4 * MIB) as store:
        image = store.open_image("d", FileSource.open(path))
        if has_digest:
            image.digest = digest_of(image.source)
        else:
            image.prefetch(0, image.nr_extents)
            assert image.wait_loaded(0, image.nr_extents, 20_000)
        os.utime(path, ns=(1, 1))
        check_source(image)
        with path.open("r+b") as file:
            file.write(b"other bytes")
        with pytest.raises(SourceError, match="changed while it was served"):
            check_source(image)
