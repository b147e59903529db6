# SPDX-License-Identifier: Apache-2.0
"""What a guest writes to its private pages is followed, and no byte of it is missed."""

import pytest
from stage import MappedGuest, Stage, content, private_pages, until, write_faults

from cowshed.cache import UsageError


def pages_of(bitmap: bytes) -> list[int]:
    return [i for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1]


def dirty(guest: MappedGuest) -> list[int]:
    return pages_of(guest.account.take_dirty())


def test_at_first_all_private_pages_are_dirty_and_then_what_is_written(stage: Stage) -> None:
    guest = stage.guest()
    for page in (1, 2, 9):
        guest.call("fill", page=page, nr_pages=1, byte=page)
    guest.handler.track(True)
    assert dirty(guest) == [1, 2, 9]
    assert dirty(guest) == []
    guest.call("poke", page=2, byte=77)
    guest.call("poke", page=2, byte=78)
    guest.call("poke", page=40, byte=5)
    charged = private_pages(guest)
    assert charged == 4
    assert dirty(guest) == [2, 40]
    guest.call("discard", page=9, nr_pages=1)
    until(lambda: guest.account.status().private_pages == 3, "the discard is seen to")
    assert dirty(guest) == [9]
    assert guest.read(9) == content(9)
    assert dirty(guest) == []
    assert private_pages(guest) == 3
    assert stage.audit().mismatches == []
    faults = write_faults(guest)
    guest.handler.track(False)
    guest.call("poke", page=1, byte=3)
    assert write_faults(guest) == faults
    assert stage.audit().mismatches == []


def test_pages_that_are_not_followed_are_not_taken(stage: Stage) -> None:
    guest = stage.guest()
    with pytest.raises(UsageError, match="not followed"):
        guest.account.take_dirty()
