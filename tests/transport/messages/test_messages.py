# SPDX-License-Identifier: Apache-2.0
"""Fields of a peer's messages: what is given has the type and range asked for."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import (
    CapacityError,
    CowshedError,
    PeerError,
    SourceError,
    UsageError,
)
from cowshed.transport.messages.fields import (
    MAX_NUMBER,
    check_reply,
    error_reply,
    take_choice,
    take_number,
    take_optional_number,
    take_text,
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(anything)
def test_any_value_is_taken_right_or_refused_in_one_short_line(value: object) -> None:
    body = {"f": value}
    takes: list[tuple[Callable[[], object], type]] = [
        (lambda: take_number(body, "f", 1, 9), int),
        (lambda: take_text(body, "f", max_length=3), str),
        (lambda: take_choice(body, "f", ("a", "b")), str),
        (lambda: check_reply(body), dict),
        (lambda: check_reply({"ok": False, "error": value}), dict),
        (lambda: check_reply({"ok": value, "error": {"kind": value}}), dict),
    ]
    for take, kind in takes:
        try:
            got = take()
        except CowshedError as error:
            assert str(error).isprintable()  # noqa: PT017  (either outcome is right)
            assert len(str(error)) < 200  # noqa: PT017
        else:
            assert type(got) is kind


def test_numbers_keep_their_bounds() -> None:
    assert take_number({"n": 0}, "n") == 0
    assert take_number({"n": MAX_NUMBER}, "n") == MAX_NUMBER
    assert take_number({"n": None}, "n", default=5) == 5
    assert take_number({}, "n", default=5) == 5
    assert take_optional_number({}, "n") is None
    assert take_optional_number({"n": 0}, "n") == 0
    for bad in (-1, MAX_NUMBER + 1, True, 1.0, "1", [1]):
        with pytest.raises(PeerError, match="'n'"):
            take_number({"n": bad}, "n")
        with pytest.raises(PeerError, match="'n'"):
            take_optional_number({"n": bad}, "n")
    with pytest.raises(PeerError, match="'n' is None; needed: an integer from 0"):
        take_number({}, "n")


def test_text_is_short_and_printable() -> None:
    assert take_text({"t": "Grüße 1"}, "t") == "Grüße 1"
    assert take_text({}, "t", default="d") == "d"
    for bad in ("", "x" * 256, "a\nb", "\x1b[2J", "\0", "\udc80", 7, None):
        with pytest.raises(PeerError, match="'t'"):
            take_text({"t": bad}, "t")


def test_choice_is_one_of_those_offered() -> None:
    assert take_choice({"c": "stop"}, "c", ("stop", "kill")) == "stop"
    assert take_choice({}, "c", ("stop", "kill"), default="stop") == "stop"
    for bad in ("allow", None, 0, ["stop"], {}):
        with pytest.raises(PeerError, match="one of stop, kill"):
            take_choice({"c": bad}, "c", ("stop", "kill"))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("usage", UsageError),
        ("denied", UsageError),
        ("unknown", UsageError),
        ("capacity", CapacityError),
        ("busy", CapacityError),
        ("source", SourceError),
        ("peer", PeerError),
    ],
)
def test_refusal_is_raised_as_what_it_stands_for(kind: str, error: type[CowshedError]) -> None:
    with pytest.raises(error) as caught:
        check_reply(error_reply(kind, "no such\n image"))
    assert type(caught.value) is error
    assert str(caught.value) == "no such image"


def test_terminal_codes_in_a_refusal_are_not_passed_on() -> None:
    with pytest.raises(UsageError) as caught:
        check_reply({"ok": False, "error": {"kind": "usage", "message": "\x1b[2J" + "x" * 5000}})
    assert str(caught.value).startswith("?[2Jxxx")
    assert len(str(caught.value)) == 1000


def test_error_of_unknown_kind() -> None:
    with pytest.raises(UsageError, match="no error kind"):
        error_reply("nonsense", "x")
    with pytest.raises(PeerError, match="later"):
        check_reply({"ok": False, "error": {"kind": "invented-later", "message": "later"}})
