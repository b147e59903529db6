# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from cowshed.service.migration.compression import CompressionChoice

FRAMES = 200


def _nr_compressed(seconds_compressed: float, seconds_raw: float) -> int:
    choice = CompressionChoice()
    nr = 0
    for _ in range(FRAMES):
        is_on = choice.next()
        nr += is_on
        choice.note(1 << 20, seconds_compressed if is_on else seconds_raw)
    return nr


def test_the_faster_way_is_used_and_the_other_is_tried_now_and_then() -> None:
    assert FRAMES * 0.9 < _nr_compressed(1.0, 2.0) < FRAMES
    assert 0 < _nr_compressed(2.0, 1.0) < FRAMES * 0.1


def test_a_link_that_becomes_slow_is_compressed_for() -> None:
    choice = CompressionChoice()
    last = []
    for no in range(2 * FRAMES):
        is_on = choice.next()
        raw_seconds = 0.5 if no < FRAMES else 4.0
        choice.note(1 << 20, 1.0 if is_on else raw_seconds)
        last.append(is_on)
    assert sum(last[FRAMES - 20 : FRAMES]) <= 2
    assert sum(last[-20:]) >= 18
