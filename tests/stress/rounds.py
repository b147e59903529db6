# SPDX-License-Identifier: Apache-2.0
"""What one round of the stress test is made of: the sizes, the terms, who lives how long.

Pure: everything follows from the random numbers given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from guest import Life

KIB = 1 << 10
NOBODY = 65534


@dataclass(frozen=True)
class Round:
    """errors: sources fail now and then; sizes: bytes of each image, by name.

    The image "large" has extents of large_extent_bytes, which may be more than the others'.
    """

    no: int
    extent_bytes: int
    large_extent_bytes: int
    capacity_extents: int
    loaders: int
    nr_guests: int
    errors: bool
    sizes: dict[str, int]

    @property
    def capacity_bytes(self) -> int:
        return self.capacity_extents * self.extent_bytes

    def extent_of(self, image: str) -> int:
        return self.large_extent_bytes if image == "large" else self.extent_bytes

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return (
            f"round {self.no}: extents of {self.extent_bytes >> 10}K, of the large image "
            f"{self.large_extent_bytes >> 10}K, capacity "
            f"{self.capacity_extents}, {self.loaders} loaders, {self.nr_guests} guests, "
            f"images {sizes}" + (", sources that fail" if self.errors else "")
        )


def make_round(rng: random.Random, no: int) -> Round:
    """Large and tiny extents, with and without errors, in turns; too little capacity.

    In one of three rounds there is room enough for regions to be opened.
    """
    extent_bytes = (64 * KIB, 4 * KIB, 64 * KIB, 4 * KIB, 16 * KIB, 2048 * KIB)[no % 6]
    errors = no % 4 in (1, 2)
    sizes = {
        "large": rng.randrange(1024 * KIB, 5120 * KIB) | 1,
        "small": rng.choice((rng.randrange(1, 9000), rng.randrange(100_000, 1_500_000) | 1)),
    }
    nr_extents = sum(-(-size // extent_bytes) for size in sizes.values())
    opens = no % 3 == 0
    if opens:
        sizes["large"] = rng.randrange(4096 * KIB, 7168 * KIB) | 1
    large_extent_bytes = min(2048 * KIB, extent_bytes * (1, 1, 32, 8, 512)[no % 5])
    largest = large_extent_bytes // extent_bytes
    least = 2 if rng.random() < 0.3 else min(6, max(2, nr_extents // 8))
    least = max(least, 2 * largest)
    return Round(
        no=no,
        extent_bytes=extent_bytes,
        large_extent_bytes=large_extent_bytes,
        capacity_extents=(
            -(-sum(sizes.values()) * 5 // (6 * extent_bytes)) + 2 * largest + 2
            if opens
            else max(2, rng.randint(least, max(least, nr_extents * 2 // 3)))
        ),
        loaders=rng.choice((1, 2, 4)),
        nr_guests=rng.randint(3, 6),
        errors=errors,
        sizes=sizes,
    )


def make_life(rng: random.Random, of: Round, no: int, uri: str, run_dir: Path) -> Life:
    """A guest's terms and how long it lives."""
    name = f"g{of.no}-{no}"
    image = rng.choice(("large", "large", "large", "small"))
    quotas = (None, rng.randint(1, 16), rng.randint(16, 300), rng.randint(500, 2000))
    quota_pages = rng.choice(quotas)
    return Life(
        name=name,
        seed=f"{rng.random()}",
        uri=uri,
        image=image,
        source=str(run_dir / f"{image}.raw"),
        slots=str(run_dir / f"{name}.slots"),
        uid=rng.choice((None, NOBODY)),
        nr_threads=rng.randint(1, 3),
        nr_ops=rng.choice((20, 300, 1000, 5000)),
        nr_sessions=rng.choice((1, 1, 3)),
        quota_bytes=quota_pages and quota_pages * 4 * KIB,
        on_quota=rng.choice(("stop", "stop", "stop", "kill", "allow")),
        window_bytes=rng.choice((None, 4 * KIB, 64 * KIB, 512 * KIB, of.extent_bytes)),
        write_window_bytes=rng.choice((None, 4 * KIB, 64 * KIB)),
        writes=rng.choice((0.0, 0.1, 0.4, 0.7)),
        errors_armed=of.errors,
    )


def make_image(rng: random.Random, path: Path, size_bytes: int) -> None:
    """A file, readable by all, whose every page differs, and none of them is zeros."""
    path.write_bytes(rng.randbytes(size_bytes).replace(b"\0", b"\1"))
    path.chmod(0o644)
