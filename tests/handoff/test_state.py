# SPDX-License-Identifier: Apache-2.0
"""A handoff as a model: two ends, a network that loses and reorders, deaths between any steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowshed.service.migration.state import (
    Action,
    Event,
    Handoff,
    IllegalTransitionError,
    Phase,
    Role,
)

# What an action of one end becomes at the other.
_TO_TARGET = {
    Action.OFFER: Event.OFFERED,
    Action.SEND_WORKING_SET: Event.PIECE,
    Action.SEND_PAGES: Event.PIECE,
    Action.SEND_LAST: Event.COMPLETE,
    Action.SEND_COMMIT: Event.COMMIT,
    Action.SEND_ABORT: Event.ABORT,
    Action.ASK: Event.ASKED,
    Action.PUSH: Event.PIECE,
    Action.RESUME: Event.RESUMED,
}
_TO_SOURCE = {
    Action.SEND_ACCEPTED: Event.ACCEPTED,
    Action.SEND_REFUSED: Event.REFUSED,
    Action.SEND_READY: Event.ARRIVED_READY,
    Action.SEND_COMMITTED: Event.COMMITTED,
    Action.SEND_DENIED: Event.DENIED,
    Action.SEND_FILLED: Event.FILLED,
}
_RECORDS = {
    Action.RECORD_COMMITTING: Phase.COMMIT,
    Action.RECORD_PUSHING: Phase.PUSH,
    Action.RECORD_MOVED: Phase.MOVED,
    Action.RECORD_OWNER: Phase.OWNER,
    Action.FORGET_RECORD: None,
}


class End:
    """One backend: its machine, what it has yet to do, and what it recorded, which outlives it.

    lacks: a target's pages are to follow, and do not outlive it before it has recorded them all.
    """

    def __init__(self, role: Role, *, post_copy: bool = False) -> None:
        self.post_copy = post_copy
        self.lacks = False
        self.has_kept = False
        self.machine = Handoff(role)
        self.recorded: Phase | None = None
        self.todo: list[Action] = []
        self.sent: list[Event] = []  # on their way to the other end
        self.is_frozen = False
        self.is_admitted = False

    def hear(self, event: Event) -> None:
        assert not self.todo
        if event is Event.COMMITTED and self.post_copy:
            event = Event.COMMITTED_MISSING
        if self.machine.allows(event):
            self.todo = list(self.machine.on(event))

    def step(self) -> None:
        """Do one action."""
        action = self.todo.pop(0)
        if action in _RECORDS:
            self.recorded = _RECORDS[action]
        elif action is Action.FREEZE:
            self.is_frozen = True
        elif action is Action.THAW:
            self.is_frozen = False
        elif action is Action.ADMIT:
            self.is_admitted = True
        elif action is Action.TAKE_MISSING:
            self.lacks = False
            self.todo += self.machine.on(Event.FILLED)
        elif action is Action.RECORD_FILLED:
            self.has_kept = True
        elif action is Action.SEND_MISSING:
            if self.lacks:
                self.sent.append(Event.MISSING)
            else:
                self.todo += self.machine.on(Event.FILLED)
        elif action is Action.CONNECT:
            self.todo = list(self.machine.on(Event.CONNECTED))
        elif action is Action.CHECK:
            self.todo = list(self.machine.on(Event.ACCEPTED))
        elif action in _TO_TARGET or action in _TO_SOURCE:
            self.sent.append({**_TO_TARGET, **_TO_SOURCE}[action])

    def die(self) -> None:
        self.todo.clear()
        self.machine = Handoff.restarted(self.machine.role, self.recorded)
        # A successor freezes again before it answers anybody, and admits what it recorded as its.
        self.is_frozen = self.machine.withholds_writes
        self.is_admitted = self.machine.phase is Phase.OWNER
        if self.machine.role is Role.TARGET and self.post_copy:
            self.lacks = not self.has_kept

    @property
    def serves(self) -> bool:
        """Whether guests can write here at this very moment, or new pages could come to be."""
        if self.machine.role is Role.TARGET:
            return self.is_admitted
        return not self.is_frozen


class World:
    def __init__(self, *, post_copy: bool = False) -> None:
        self.source = End(Role.SOURCE, post_copy=post_copy)
        self.target = End(Role.TARGET, post_copy=post_copy)
        self.target.lacks = post_copy
        self.source.hear(Event.BEGIN)

    def moves(self) -> list[str]:
        """What may happen next."""
        moves = ["source dies", "target dies"]
        moves += [f"source does {action}" for action in self.source.todo[:1]]
        moves += [f"target does {action}" for action in self.target.todo[:1]]
        if not self.target.todo:
            moves += [f"target hears {no}" for no in range(len(self.source.sent))]
            moves += ["target loses"]
        if not self.source.todo:
            moves += [f"source hears {no}" for no in range(len(self.target.sent))]
            moves += ["source loses"]
            moves += [
                f"source: {event}"
                for event in (*self._goes_on(), Event.ABORT)
                if self.source.machine.allows(event)
            ]
        moves += [f"message {no} to target is lost" for no in range(len(self.source.sent))]
        moves += [f"message {no} to source is lost" for no in range(len(self.target.sent))]
        return moves

    def _goes_on(self) -> tuple[Event, ...]:
        if self.source.post_copy:
            return (Event.POSTPONED,)
        return (Event.SENT, Event.CONVERGED)

    def do(self, move: str) -> None:
        who, _, what = move.partition(" ")
        end, peer = (
            (self.source, self.target) if who.startswith("source") else (self.target, self.source)
        )
        if who == "message":
            no, _, to = what.partition(" to ")
            (self.source if to.startswith("target") else self.target).sent.pop(int(no))
        elif what == "dies":
            end.die()
        elif what == "loses":
            end.hear(Event.LOST)
        elif what.startswith("does"):
            end.step()
        elif what.startswith("hears"):
            end.hear(peer.sent.pop(int(what.split()[1])))
        else:
            end.hear(Event(what))
        self.check()

    def check(self) -> None:
        assert not (self.source.machine.owns and self.target.machine.owns), "two owners"
        assert not (self.source.serves and self.target.serves), "two serve"
        # The source's pages are given up with this record, and the target's are nowhere else.
        if self.source.post_copy and self.source.recorded is Phase.MOVED:
            assert self.target.has_kept, "pages that nobody has"

    def come_to_an_end(self) -> None:
        """From now on nothing is lost and nobody dies; the source asks while it is unsure."""
        for _ in range(100):
            for end, peer in ((self.source, self.target), (self.target, self.source)):
                while end.todo:
                    end.step()
                    self.check()
                if peer.sent:
                    end.hear(peer.sent.pop(0))
                    self.check()
            if self.source.todo or self.target.todo or self.source.sent or self.target.sent:
                continue
            if self.source.machine.phase in (Phase.COMMIT, Phase.PUSH) or (
                not self.source.machine.is_over and self.source.machine.phase is not Phase.IDLE
            ):
                self.source.hear(Event.LOST)
            else:
                break
        assert self.source.machine.owns != self.target.machine.owns, "not one owner"
        assert self.source.serves != self.target.serves, "not one serves"
        if self.target.machine.owns:
            assert self.source.recorded is Phase.MOVED, "the source never hears of it"
            assert not self.target.lacks, "pages that never come"


@settings(max_examples=600)
@given(st.booleans(), st.lists(st.integers(0, 9999), max_size=80))
def test_exactly_one_end_owns_whatever_is_lost_and_whoever_dies(
    post_copy: bool, choices: list[int]
) -> None:
    world = World(post_copy=post_copy)
    for choice in choices:
        moves = world.moves()
        # Deaths and losses are many among the moves; let most runs get far.
        good = [move for move in moves if any(word in move for word in ("does", "hears", ": "))]
        if good and choice % 10 < 9:
            moves = good
        world.do(moves[choice // 10 % len(moves)])
    world.come_to_an_end()


def _good_moves(world: World) -> str:
    """The next move of a handoff where all goes well."""
    for end, name in ((world.source, "source"), (world.target, "target")):
        if end.todo:
            return f"{name} does {end.todo[0]}"
    if world.source.sent:
        return "target hears 0"
    if world.target.sent:
        return "source hears 0"
    return {
        Phase.WARM: "source: postponed" if world.source.post_copy else "source: sent",
        Phase.PRECOPY: "source: converged",
    }.get(world.source.machine.phase, "")


def _good_run(nr_moves: int | None = None, *, post_copy: bool = False) -> tuple[World, int]:
    world, done = World(post_copy=post_copy), 0
    while (move := _good_moves(world)) and (nr_moves is None or done < nr_moves):
        world.do(move)
        done += 1
    return world, done


@pytest.mark.parametrize("post_copy", [False, True])
def test_a_handoff_where_all_goes_well_moves_the_guests(post_copy: bool) -> None:
    world, _ = _good_run(post_copy=post_copy)
    assert world.source.machine.phase is Phase.MOVED
    assert world.target.machine.phase is Phase.OWNER
    assert world.source.recorded is Phase.MOVED
    assert not world.target.lacks


@pytest.mark.parametrize("accident", ["source dies", "target dies", "both", "lost", "asked"])
@pytest.mark.parametrize("post_copy", [False, True])
def test_after_an_accident_at_any_step_there_is_one_owner(accident: str, post_copy: bool) -> None:
    _, length = _good_run(post_copy=post_copy)
    for step in range(length + 1):
        world, _ = _good_run(step, post_copy=post_copy)
        if accident in ("source dies", "both"):
            world.do("source dies")
        if accident in ("target dies", "both"):
            world.do("target dies")
        if accident == "lost":
            world.source.sent.clear()
            world.target.sent.clear()
            while world.source.todo:
                world.do(f"source does {world.source.todo[0]}")
            world.do("source loses")
        world.come_to_an_end()


@pytest.mark.parametrize("post_copy", [False, True])
def test_a_frozen_guest_waits_for_no_record_but_that_of_the_new_owner(post_copy: bool) -> None:
    world, done = World(post_copy=post_copy), []
    while move := _good_moves(world):
        world.do(move)
        done.append(move)
    frozen = done[
        done.index(f"source does {Action.FREEZE}") : done.index(f"source does {Action.SEND_COMMIT}")
    ]
    assert not [move for move in frozen if any(move.endswith(f" {each}") for each in _RECORDS)]
    assert f"source does {Action.RECORD_COMMITTING}" in done


def test_a_drain_that_is_given_up_while_guests_are_frozen_leaves_no_record() -> None:
    for event in (Event.ABORT, Event.LOST, Event.DENIED):
        actions = Handoff(Role.SOURCE, Phase.FREEZE).on(event)
        assert actions.index(Action.THAW) < actions.index(Action.FORGET_RECORD)


def test_a_commit_that_comes_after_the_question_is_denied() -> None:
    late = Handoff(Role.TARGET, Phase.READY)
    assert Action.SEND_DENIED in late.on(Event.ASKED)
    assert late.on(Event.COMMIT) == (Action.SEND_DENIED,)
    assert not late.owns


def test_a_source_that_is_unsure_stays_frozen_and_cannot_be_aborted() -> None:
    source = Handoff(Role.SOURCE, Phase.COMMIT)
    with pytest.raises(IllegalTransitionError, match="abort"):
        source.on(Event.ABORT)
    assert source.on(Event.LOST) == (Action.ASK,)
    assert source.withholds_writes


def test_a_source_keeps_its_pages_until_the_target_lacks_none() -> None:
    source = Handoff(Role.SOURCE, Phase.PUSH)
    assert not source.owns
    assert source.withholds_writes
    assert source.on(Event.LOST) == (Action.RESUME,)
    with pytest.raises(IllegalTransitionError, match="abort"):
        source.on(Event.ABORT)
    assert source.on(Event.FILLED)[0] is Action.RECORD_MOVED


@pytest.mark.parametrize("role", list(Role))
def test_an_illegal_event_raises_and_changes_nothing(role: Role) -> None:
    for phase in Phase:
        for event in Event:
            machine = Handoff(role, phase)
            if not machine.allows(event):
                with pytest.raises(IllegalTransitionError):
                    machine.on(event)
                assert machine.phase is phase


def test_only_what_an_end_records_can_be_gone_on_with() -> None:
    for role in Role:
        for phase in Phase:
            recorded = (Phase.COMMIT, Phase.PUSH, Phase.MOVED)
            good = phase in (recorded if role is Role.SOURCE else (Phase.OWNER,))
            if good:
                assert Handoff.restarted(role, phase).phase is phase
            else:
                with pytest.raises(IllegalTransitionError):
                    Handoff.restarted(role, phase)
