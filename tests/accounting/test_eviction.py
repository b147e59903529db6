# SPDX-License-Identifier: Apache-2.0
"""The eviction policy, fact by fact."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from cowshed.accounting.policy.eviction import PATIENCE, EvictionPolicy, ExtentKey
from cowshed.cache.errors import CapacityError, InvariantError, UsageError


@dataclass
class Ledger:
    """Heat as a test sets it."""

    touches: dict[ExtentKey, int] = field(default_factory=dict)
    holders: dict[ExtentKey, int] = field(default_factory=dict)
    pinned: set[ExtentKey] = field(default_factory=set)

    def take_touches(self, key: ExtentKey) -> int:
        return min(3, self.touches.pop(key, 0))

    def refs(self, key: ExtentKey) -> int:
        return self.holders.get(key, 0)

    def evictable(self, key: ExtentKey) -> bool:
        return key not in self.pinned


def extents(numbers: Iterable[int], image_no: int = 0) -> list[ExtentKey]:
    return [(image_no, extent_no) for extent_no in numbers]


def evict(policy: EvictionPolicy, nr_extents: int, ledger: Ledger) -> list[ExtentKey]:
    victims = policy.choose_victims(nr_extents, ledger)
    policy.forget(victims, evicted=True)
    policy.check()
    return victims


def with_main(policy: EvictionPolicy, keys: list[ExtentKey]) -> None:
    """Make keys resident in main, by way of the ghosts, in order."""
    policy.admit(keys)
    policy.forget(keys, evicted=True)
    policy.admit(keys)


def test_untouched_extents_go_in_the_order_they_came() -> None:
    policy = EvictionPolicy(20)
    policy.admit(extents(range(20)))
    assert evict(policy, 5, Ledger()) == extents(range(5))
    assert evict(policy, 15, Ledger()) == extents(range(5, 20))
    assert len(policy) == 0


@pytest.mark.parametrize(
    ("touches", "refs", "stays"),
    [(0, 1, False), (1, 1, False), (2, 1, True), (1, 2, True), (0, 7, False), (0, 8, True)],
)
def test_small_keeps_what_was_touched_again_or_is_shared(
    touches: int, refs: int, stays: bool
) -> None:
    policy, ledger = EvictionPolicy(20), Ledger({(0, 0): touches}, {(0, 0): refs})
    policy.admit(extents(range(20)))
    assert evict(policy, 1, ledger) == extents([1] if stays else [0])


@pytest.mark.parametrize(
    ("touches", "refs", "rounds"),
    [(0, 1, 0), (0, 2, 1), (0, 8, 2), (2, 1, 2), (3, 8, 3), (9, 1, 3)],
)
def test_main_grants_a_round_for_each_credit(touches: int, refs: int, rounds: int) -> None:
    policy, ledger = EvictionPolicy(20), Ledger({(0, 0): touches}, {(0, 0): refs})
    with_main(policy, extents([0]))
    for extent_no in range(1, rounds + 1):  # each round passes it once and takes the one behind it
        with_main(policy, extents([extent_no]))
        assert evict(policy, 1, ledger) == extents([extent_no])
    with_main(policy, extents([99]))
    assert evict(policy, 1, ledger) == extents([0])


def test_sharing_alone_cools_down_and_a_touch_warms_it_again() -> None:
    policy, ledger = EvictionPolicy(20), Ledger(holders={(0, 0): 8})
    with_main(policy, extents([0, 1, 2]))
    assert evict(policy, 2, ledger) == extents([1, 2])  # credit 2, one left after the round
    with_main(policy, extents([3, 4, 5, 6]))
    ledger.touches[0, 0] = 1  # 1 left + 1 touch + 2 for sharing, of which 3 count
    assert evict(policy, 4, ledger) == extents([3, 4, 5, 6])
    with_main(policy, extents([7]))
    assert evict(policy, 1, ledger) == extents([7])
    with_main(policy, extents([8]))
    assert evict(policy, 1, ledger) == extents([8])
    with_main(policy, extents([9]))
    assert evict(policy, 1, ledger) == extents([0])


def test_main_gives_nothing_up_before_the_rest_of_small_when_small_is_due() -> None:
    policy, ledger = EvictionPolicy(20), Ledger({(0, 0): 2})
    policy.admit(extents([0, 1]))
    assert evict(policy, 1, ledger) == extents([1])


def test_main_gives_nothing_up_before_the_rest_of_small_when_main_had_nothing() -> None:
    policy, ledger = EvictionPolicy(30), Ledger({(0, 0): 2})
    policy.admit(extents([0, 1]))  # fewer than small's three: main is asked first, and is empty
    assert evict(policy, 1, ledger) == extents([1])


def test_a_touch_adds_to_the_credit_left() -> None:
    policy, ledger = EvictionPolicy(20), Ledger({(0, 0): 2})
    with_main(policy, extents([0, 1]))
    assert evict(policy, 1, ledger) == extents([1])  # 1 left
    ledger.touches[0, 0] = 1
    for extent_no in (2, 3):  # so 2 rounds more
        with_main(policy, extents([extent_no]))
        assert evict(policy, 1, ledger) == extents([extent_no])
    with_main(policy, extents([4]))
    assert evict(policy, 1, ledger) == extents([0])


def test_an_extent_that_comes_back_soon_goes_to_main() -> None:
    policy, ledger = EvictionPolicy(20), Ledger()
    policy.admit(extents(range(20)))
    evict(policy, 1, ledger)
    policy.admit(extents([0]))
    assert evict(policy, 19, ledger) == extents([*range(1, 19), 0])  # small keeps its last one


def test_ghosts_forget_the_oldest() -> None:
    policy = EvictionPolicy(20)  # 18 ghosts
    policy.admit(extents(range(20)))
    evict(policy, 19, Ledger())
    policy.admit(extents([1, 0, 30, 31]))  # 0 is a ghost no more; small is 19, 0, 30, 31
    assert evict(policy, 5, Ledger()) == extents([19, 0, 30, 1, 31])


def test_an_extent_that_was_not_evicted_leaves_no_ghost() -> None:
    policy = EvictionPolicy(20)
    policy.admit(extents(range(5)))
    policy.forget(extents([0]), evicted=False)
    policy.admit(extents([0]))
    assert evict(policy, 5, Ledger()) == extents([1, 2, 3, 4, 0])


def test_pinned_extent_is_never_a_victim() -> None:
    policy, ledger = EvictionPolicy(20), Ledger(pinned={(0, 0), (0, 5)})
    with_main(policy, extents(range(5)))
    policy.admit(extents(range(5, 10)))
    assert set(evict(policy, 10, ledger)) == set(extents([1, 2, 3, 4, 6, 7, 8, 9]))
    assert len(policy) == 2


def test_pinned_extents_keep_their_order() -> None:
    policy, ledger = EvictionPolicy(20), Ledger(pinned=set(extents([0, 1, 2])))
    policy.admit(extents(range(6)))
    assert evict(policy, 1, ledger) == extents([3])
    ledger.pinned.clear()
    assert evict(policy, 5, ledger) == extents([4, 5, 0, 1, 2])


@pytest.mark.parametrize("nr_resident", [0, 1, 50])
def test_nothing_evictable_is_a_capacity_error(nr_resident: int) -> None:
    policy, ledger = EvictionPolicy(20), Ledger(pinned=set(extents(range(50))))
    with_main(policy, extents(range(nr_resident // 2)))
    policy.admit(extents(range(nr_resident // 2, nr_resident)))
    with pytest.raises(CapacityError, match=f"none of {nr_resident} resident"):
        policy.choose_victims(1, ledger)
    policy.check()
    assert len(policy) == nr_resident


def test_the_only_evictable_extent_is_found_however_hot() -> None:
    policy = EvictionPolicy(20)
    ledger = Ledger({(0, 9): 3}, {(0, 9): 99}, set(extents(range(9))))
    with_main(policy, extents(range(9)))
    policy.admit(extents([9]))
    assert evict(policy, 3, ledger) == extents([9])


def test_a_victim_not_forgotten_returns_to_its_place() -> None:
    policy, ledger = EvictionPolicy(20), Ledger()
    policy.admit(extents(range(10)))
    assert policy.choose_victims(3, ledger) == extents(range(3))
    assert len(policy) == 10
    assert (0, 0) in policy
    policy.forget(extents([1]), evicted=True)
    assert policy.choose_victims(3, ledger) == extents([0, 2, 3])
    ledger.touches[0, 0] = 2  # busy when it was to be evicted, and wanted since
    assert policy.choose_victims(3, ledger) == extents([2, 3, 4])


def test_guests_that_fault_all_the_time_do_not_keep_the_hand_going_round() -> None:
    class Storm(Ledger):
        nr_asked = 0

        def take_touches(self, key: ExtentKey) -> int:
            self.nr_asked += 1
            return 3

    policy, storm = EvictionPolicy(10_000), Storm()
    with_main(policy, extents(range(9000)))
    assert len(evict(policy, 2, storm)) == 2
    assert storm.nr_asked <= 2 * PATIENCE + 2
    few = EvictionPolicy(10)
    with_main(few, extents(range(3)))
    storm.nr_asked = 0
    assert evict(few, 1, storm) == extents([0])  # all alike: the oldest
    assert storm.nr_asked == 3


def test_a_dropped_image_leaves_nothing_behind() -> None:
    policy, ledger = EvictionPolicy(40), Ledger()
    for image_no in (0, 1):
        with_main(policy, extents(range(5), image_no))
        policy.admit(extents(range(5, 10), image_no))
    evict(policy, 6, ledger)
    policy.choose_victims(3, ledger)
    policy.drop_image(1)
    policy.check()
    assert not any((1, extent_no) in policy for extent_no in range(10))
    policy.admit(extents(range(10), 1))  # all to small: no ghost remembers them
    assert evict(policy, 7, ledger) == extents(range(7), 1)


def test_impossible_calls_are_refused() -> None:
    policy, ledger = EvictionPolicy(1), Ledger()
    policy.admit(extents([0]))
    with pytest.raises(InvariantError, match="resident twice"):
        policy.admit(extents([1, 0, 2]))
    with pytest.raises(InvariantError, match="not tracked"):
        policy.forget(extents([1, 2]), evicted=True)
    assert ((0, 0) in policy, (0, 1) in policy, (0, 2) in policy) == (True, False, False)
    with pytest.raises(UsageError, match="0 victims"):
        policy.choose_victims(0, ledger)
    with pytest.raises(UsageError, match="capacity of 0"):
        EvictionPolicy(0)
    policy.check()


class Unseen:
    """A heat that must not be asked: with a standby list only soft hits count."""

    def take_touches(self, key: ExtentKey, /) -> int:
        raise AssertionError(key)

    def refs(self, key: ExtentKey, /) -> int:
        raise AssertionError(key)

    def evictable(self, key: ExtentKey, /) -> bool:
        return True


def standby_policy(nr_extents: int = 100) -> EvictionPolicy:
    policy = EvictionPolicy(nr_extents, nr_extents // 5)
    policy.admit((0, extent) for extent in range(nr_extents))
    return policy


def test_with_a_standby_list_victims_leave_in_the_order_of_their_loads_whatever_the_faults() -> (
    None
):
    policy = standby_policy()
    victims = policy.choose_victims(3, Unseen())
    assert victims == [(0, 0), (0, 1), (0, 2)]
    policy.unmap(victims)
    assert (0, 0) not in policy
    policy.check()


def test_a_soft_hit_buys_rounds_of_main_by_its_age() -> None:
    policy = standby_policy(10)
    victims = policy.choose_victims(10, Unseen())
    policy.unmap(victims)
    policy.touch(victims[0], 1.0)
    policy.touch(victims[1], 0.3)
    policy.touch(victims[2], 0.0)
    policy.check()
    left = [policy.choose_victims(1, Unseen()) for _ in range(3) if len(policy)]
    for each in left:
        assert each == [victims[0]]  # no credit; it was not evicted, so it is chosen again
    policy.unmap(left[0])
    assert policy.choose_victims(1, Unseen()) == [victims[1]]
    policy.unmap([victims[1]])
    assert policy.choose_victims(1, Unseen()) == [victims[2]]


def test_what_is_dropped_from_standby_is_a_ghost_and_goes_to_main_when_it_returns() -> None:
    policy = standby_policy(10)
    (victim,) = policy.choose_victims(1, Unseen())
    policy.unmap([victim])
    assert not policy.remembers(victim)
    policy.drop(victim)
    assert policy.remembers(victim)
    policy.drop(victim)  # an event about an extent that is not in standby changes nothing
    policy.admit([victim])
    policy.check()
    assert policy.choose_victims(9, Unseen())[-1] != victim


def test_a_sample_stays_tracked_until_it_is_dropped() -> None:
    policy = standby_policy(10)
    policy.touch((0, 3), 0.0)
    assert len(policy) == 10
    policy.check()
    assert (0, 3) not in policy.choose_victims(9, Unseen()), "its use keeps it"
    policy.drop((0, 4))
    assert (0, 4) not in policy
    assert policy.remembers((0, 4))
    policy.check()


def test_an_image_that_goes_takes_its_standby_extents_along() -> None:
    policy = standby_policy(10)
    policy.unmap(policy.choose_victims(4, Unseen()))
    policy.drop_image(0)
    policy.drop((0, 0))
    assert not policy.remembers((0, 0))
    policy.check()


def large(key: ExtentKey) -> int:
    """Extents of image 1 take the room of 32."""
    return 32 if key[0] == 1 else 1


@pytest.mark.parametrize("standby", [0, 40])
def test_victims_are_as_many_as_their_room_needs(standby: int) -> None:
    policy = EvictionPolicy(200, standby, large)
    policy.admit([*extents(range(3)), *extents(range(3), image_no=1), *extents(range(3, 9))])
    assert policy.choose_victims(4, Ledger()) == [*extents(range(3)), *extents([0], image_no=1)]
    assert policy.choose_victims(36, Ledger()) == [*extents(range(3)), *extents([0, 1], image_no=1)]


def test_beside_a_standby_list_large_extents_are_judged_by_touches_and_refs() -> None:
    policy = EvictionPolicy(200, 40, large)
    keys = [*extents([0]), *extents([0], image_no=1), *extents([1]), *extents([1], image_no=1)]
    policy.admit(keys)
    heat = Ledger(touches=dict.fromkeys(keys[:2], 3))
    # The first is touched, too, but the list would show its use.
    assert policy.choose_victims(34, heat) == [keys[0], keys[2], keys[3]]
    policy.check()


def test_a_large_extent_that_was_unmapped_is_a_ghost_once_it_was_dropped() -> None:
    policy = EvictionPolicy(200, 40, large)
    key = (1, 0)
    policy.admit([key])
    policy.unmap(policy.choose_victims(1, Ledger()))
    assert not policy.remembers(key)
    policy.drop(key)
    assert policy.remembers(key)
    policy.check()
