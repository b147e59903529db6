# SPDX-License-Identifier: Apache-2.0
"""The eviction policy beside a plain model of its rules, under random operations."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cowshed.accounting.policy.eviction import EvictionPolicy, ExtentKey
from cowshed.cache.errors import CapacityError


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


class PlainModel:
    """The rules, written for the eye: one dict in order, filtered anew at every look."""

    def __init__(self, capacity_extents: int) -> None:
        self.nr_small_wanted = max(1, capacity_extents // 10)
        self.nr_ghosts = max(1, capacity_extents - self.nr_small_wanted)
        self.in_main: dict[ExtentKey, bool] = {}  # in the order placed
        self.credit: dict[ExtentKey, int] = {}
        self.ghosts: list[ExtentKey] = []

    def append(self, key: ExtentKey, in_main: bool) -> None:
        self.in_main.pop(key, None)
        self.in_main[key] = in_main

    def admit(self, key: ExtentKey) -> None:
        self.append(key, in_main=key in self.ghosts)
        self.ghosts = [ghost for ghost in self.ghosts if ghost != key]

    def forget(self, key: ExtentKey, evicted: bool) -> None:
        del self.in_main[key]
        self.credit.pop(key, None)
        if evicted:
            self.ghosts = [*self.ghosts, key][-self.nr_ghosts :]

    def choose(self, nr_extents: int, ledger: Ledger) -> list[ExtentKey]:
        victims: list[ExtentKey] = []
        patience = 32 * nr_extents
        looked_at: set[ExtentKey] = set()

        def queue(in_main: bool) -> list[ExtentKey]:
            return [k for k, where in self.in_main.items() if where == in_main and k not in victims]

        def from_small() -> ExtentKey | None:
            nonlocal patience
            for key in queue(in_main=False):
                if key in looked_at:
                    continue
                looked_at.add(key)
                if not ledger.evictable(key):
                    self.append(key, in_main=False)
                elif patience and ledger.take_touches(key) + shared(key) >= 2:
                    self.append(key, in_main=True)
                    patience -= 1
                else:
                    return key
            return None

        def from_main() -> ExtentKey | None:
            nonlocal patience
            while any(ledger.evictable(key) for key in queue(in_main=True)):
                key = queue(in_main=True)[0]
                if ledger.evictable(key):
                    touches = 0 if key in looked_at else ledger.take_touches(key)
                    looked_at.add(key)
                    credit = self.credit.get(key, 0)
                    if touches or key not in self.credit:
                        credit = min(3, credit + touches + shared(key))
                    if not credit or not patience:
                        return key
                    self.credit[key] = credit - 1
                    patience -= 1
                self.append(key, in_main=True)
            return None

        def shared(key: ExtentKey) -> int:
            return sum(ledger.refs(key) >= bound for bound in (2, 8))

        while len(victims) < nr_extents:
            due = len(queue(in_main=False)) >= self.nr_small_wanted
            victim = (from_small() if due else None) or from_main() or from_small() or from_main()
            if victim is None:
                break
            victims.append(victim)
        return victims


ALL = [(image_no, extent_no) for image_no in range(3) for extent_no in range(12)]


class PolicyBesideModel(RuleBasedStateMachine):
    """Random operations on the policy and the model; they must name the same victims."""

    @initialize(capacity=st.integers(1, 40), nr_warm=st.integers(0, 36))
    def start(self, capacity: int, nr_warm: int) -> None:
        self.policy, self.model, self.ledger = (
            EvictionPolicy(capacity),
            PlainModel(capacity),
            Ledger(),
        )
        self.tracked: set[ExtentKey] = set()
        self.victims: list[ExtentKey] = []
        self.admit(ALL[:nr_warm])

    @rule(keys=st.lists(st.sampled_from(ALL), unique=True))
    def admit(self, keys: list[ExtentKey]) -> None:
        fresh = [key for key in keys if key not in self.tracked]
        self.policy.admit(fresh)
        for key in fresh:
            self.model.admit(key)
        self.tracked.update(fresh)

    @precondition(lambda self: self.tracked)
    @rule(data=st.data(), touches=st.integers(0, 5), refs=st.integers(0, 9))
    def touch(self, data: st.DataObject, touches: int, refs: int) -> None:
        for key in data.draw(st.lists(st.sampled_from(sorted(self.tracked)), max_size=8)):
            self.ledger.touches[key] = touches
            self.ledger.holders[key] = refs

    @precondition(lambda self: self.tracked)
    @rule(data=st.data())
    def pin_and_unpin(self, data: st.DataObject) -> None:
        self.ledger.pinned ^= data.draw(st.sets(st.sampled_from(sorted(self.tracked))))

    @rule(nr_extents=st.integers(1, 8))
    def choose(self, nr_extents: int) -> None:
        copy = Ledger(dict(self.ledger.touches), self.ledger.holders, self.ledger.pinned)
        expected = self.model.choose(nr_extents, copy)
        nr_evictable = len(self.tracked - self.ledger.pinned)
        assert len(expected) == min(nr_extents, nr_evictable)
        try:
            self.victims = self.policy.choose_victims(nr_extents, self.ledger)
        except CapacityError:
            self.victims = []
        assert self.victims == expected
        assert self.ledger.touches == copy.touches

    @rule(nr_evicted=st.integers(0, 8))
    def evict_some_of_the_chosen(self, nr_evicted: int) -> None:
        self.forget(self.victims[:nr_evicted], evicted=True)

    @precondition(lambda self: self.tracked)
    @rule(data=st.data(), evicted=st.booleans())
    def forget_any(self, data: st.DataObject, evicted: bool) -> None:
        self.forget(
            data.draw(st.lists(st.sampled_from(sorted(self.tracked)), unique=True)), evicted
        )

    def forget(self, keys: list[ExtentKey], evicted: bool) -> None:
        self.policy.forget(keys, evicted=evicted)
        for key in keys:
            self.forget_in_model(key, evicted)

    @rule(image_no=st.integers(0, 2))
    def drop_image(self, image_no: int) -> None:
        self.policy.drop_image(image_no)
        for key in [key for key in self.tracked if key[0] == image_no]:
            self.forget_in_model(key, evicted=False)
        self.model.ghosts = [key for key in self.model.ghosts if key[0] != image_no]

    def forget_in_model(self, key: ExtentKey, evicted: bool) -> None:
        self.model.forget(key, evicted)
        self.tracked.discard(key)
        self.ledger.pinned.discard(key)
        self.victims = [victim for victim in self.victims if victim != key]

    @invariant()
    def holds_together(self) -> None:
        self.policy.check()
        assert len(self.policy) == len(self.tracked)
        assert all(key in self.policy for key in self.tracked)


TestPolicyBesideModel = PolicyBesideModel.TestCase
TestPolicyBesideModel.settings = settings(max_examples=200, stateful_step_count=30)
