# SPDX-License-Identifier: Apache-2.0
"""Calls that hang cost themselves a thread each, and keep no other from being made."""

import threading

import pytest
from domains import until

from cowshed.service.runtime.side_threads import InTime, SideThreads


def test_a_call_that_hangs_keeps_no_other_key_from_being_called() -> None:
    side, hang, made = SideThreads(), threading.Event(), threading.Event()
    assert side.run("hung", hang.wait)  # type: ignore[arg-type]
    for _ in range(5):
        assert not side.run("hung", hang.wait)  # type: ignore[arg-type]
        made.clear()
        assert side.run("other", made.set)
        assert made.wait(20)
        until(lambda: side.waiting_seconds("other") == 0.0)
    assert side.waiting_seconds("hung") > 0
    assert not side.wait_all(0.01)
    hang.set()
    assert side.wait_all(20)
    until(lambda: side.waiting_seconds("hung") == 0.0)
    assert side.run("hung", made.set)


def test_a_call_that_fails_may_be_made_again() -> None:
    side, made = SideThreads(), threading.Event()

    def fail() -> None:
        raise ValueError("no")

    assert side.run("a", fail)
    until(lambda: side.run("a", made.set))
    assert made.wait(20)


def test_threads_that_one_burst_needed_end_though_calls_go_on() -> None:
    side, all_there = SideThreads(idle_seconds=1.0), threading.Barrier(4)
    before = set(threading.enumerate())  # those of other tests, which end when they like
    for number in range(4):
        assert side.run(f"burst {number}", all_there.wait)  # type: ignore[arg-type]
    assert side.wait_all(20)

    def only_one_is_left() -> bool:
        side.run("go on", lambda: None)
        assert side.wait_all(20)
        return len(set(threading.enumerate()) - before) == 1

    until(only_one_is_left)


def test_what_comes_too_late_is_given_to_somebody_else() -> None:
    go_on, late = threading.Event(), []

    def call() -> int:
        assert go_on.wait(20)
        return 7

    waited = InTime(call, late.append)
    assert not waited.wait(0.01)
    assert waited.give_up()
    go_on.set()
    until(lambda: late == [7])


def test_what_comes_in_time_is_given_or_raised() -> None:
    def fail() -> int:
        raise ValueError("no")

    for call in (lambda: 7, fail):
        waited = InTime(call)
        assert waited.wait(20)
        assert not waited.give_up()
        if call is fail:
            with pytest.raises(ValueError, match="no"):
                waited.result()
        else:
            assert waited.result() == 7
