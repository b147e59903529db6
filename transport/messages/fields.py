# SPDX-License-Identifier: Apache-2.0
"""What the fields of a message may hold: read a peer's fields safely, write and read refusals.

The body of a message comes from outside. Each field is taken through one of these, which gives a
value of the type and range asked for or raises PeerError saying which field, what it held and what
is needed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Never

from cowshed.cache.errors import CapacityError, CowshedError, PeerError, SourceError, UsageError
from cowshed.transport.messages.protocol import Body


class MovedError(UsageError):
    """The guests here move, or moved, to another backend: uri is where; "" if it cannot be said."""

    def __init__(self, uri: str) -> None:
        where = uri or "another backend"
        super().__init__(f"guests of this backend move to {where}: open there")
        self.uri: Final = uri


MAX_NUMBER: Final = (1 << 63) - 1
MAX_ERROR_LENGTH: Final = 1000

_BY_KIND: Final[dict[str, type[CowshedError]]] = {
    "usage": UsageError,
    "denied": UsageError,
    "unknown": UsageError,
    "capacity": CapacityError,
    "busy": CapacityError,
    "source": SourceError,
    "peer": PeerError,
    "moved": MovedError,
}
_KINDS: Final = (
    (MovedError, "moved"),
    (UsageError, "usage"),
    (CapacityError, "capacity"),
    (SourceError, "source"),
)


def take_number(
    body: Mapping[str, Any],
    field: str,
    minimum: int = 0,
    maximum: int = MAX_NUMBER,
    *,
    default: int | None = None,
) -> int:
    """Give a field's integer within bounds.

    An absent or null field gives default if there is one; likewise below.
    """
    value = body.get(field)
    if value is None and default is not None:
        return default
    if type(value) is not int or not minimum <= value <= maximum:
        _refuse(
            f"field {field!r} is {_show(value)}; needed: an integer from {minimum} to {maximum}"
        )
    return value


def take_optional_number(
    body: Mapping[str, Any], field: str, minimum: int = 0, maximum: int = MAX_NUMBER
) -> int | None:
    """Give a field's integer within bounds, or None for a field that is absent or null."""
    return None if body.get(field) is None else take_number(body, field, minimum, maximum)


def take_text(
    body: Mapping[str, Any], field: str, *, max_length: int = 255, default: str | None = None
) -> str:
    """Give a field's text: printable, not empty, at most max_length characters."""
    value = body.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or not 0 < len(value) <= max_length or not value.isprintable():
        _refuse(
            f"field {field!r} is {_show(value)}; needed: 1 to {max_length} printable characters"
        )
    return value


def take_optional_text(body: Mapping[str, Any], field: str, *, max_length: int = 255) -> str | None:
    """Give a field's text likewise, or None for a field that is absent or null."""
    return None if body.get(field) is None else take_text(body, field, max_length=max_length)


def take_flag(body: Mapping[str, Any], field: str) -> bool:
    """Give a field's true or false; an absent or null one is false."""
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        _refuse(f"field {field!r} is {_show(value)}; needed: true or false")
    return value


def take_choice(
    body: Mapping[str, Any], field: str, choices: Sequence[str], *, default: str | None = None
) -> str:
    """Give a field's text, one of the choices."""
    value = body.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or value not in choices:
        _refuse(f"field {field!r} is {_show(value)}; needed: one of {', '.join(choices)}")
    return value


def kind_of(error: CowshedError) -> str:
    """Give the kind by which the peer is told of an error; "peer" for what it cannot act on."""
    for kind, name in _KINDS:
        if isinstance(error, kind):
            return name
    return "peer"


def error_reply(kind: str, message: str) -> Body:
    """Give the reply that refuses a request: one line, of a kind the peer can act on."""
    if kind not in _BY_KIND:
        raise UsageError(f"no error kind {kind!r}; one of {', '.join(_BY_KIND)}")
    return {"ok": False, "error": {"kind": kind, "message": _one_line(message)}}


def refusal(error: CowshedError) -> Body:
    """Give the reply that refuses a request for this reason."""
    reply = error_reply(kind_of(error), str(error))
    if isinstance(error, MovedError):
        reply["error"]["uri"] = error.uri
    return reply


def check_reply(body: Body) -> Body:
    """Give a good reply back; raise what a refusal stands for, PeerError if it is neither."""
    ok = body.get("ok")
    if ok is True:
        return body
    error = body.get("error")
    if ok is not False or not isinstance(error, dict):
        _refuse(f"reply is neither good nor an error: {_show(body)}")
    kind = take_text(error, "kind")
    message = error.get("message")
    if not isinstance(message, str):
        _refuse(f"error of kind {kind!r} has no message")
    if kind == "moved":
        uri = error.get("uri")
        raise MovedError(uri if isinstance(uri, str) and uri.isprintable() else "")
    raise _BY_KIND.get(kind, PeerError)(_one_line(message))


def _one_line(text: str) -> str:
    line = " ".join(text.split())[:MAX_ERROR_LENGTH]
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def _show(value: object) -> str:
    shown = reprlib.repr(value).encode("ascii", "backslashreplace").decode("ascii")
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _refuse(what: str) -> Never:
    raise PeerError(what)
