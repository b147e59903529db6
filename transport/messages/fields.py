# SPDX-License-Identifier: Apache-2.0
"""Read the fields of a peer's message safely; write and read refusals.

The body of a message is untrusted. Each field must be read by one of these functions: it returns a
value of the type and range asked for, or raises PeerError that names the field, its value and what
is needed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Never

from cowshed.cache.errors import CapacityError, CowshedError, PeerError, SourceError, UsageError
from cowshed.transport.messages.protocol import Body


class MovedError(UsageError):
    """The backend's guests move, or moved, to another; uri is its address, "" if unknown."""

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
    """Return a field's integer within bounds.

    An absent or null field returns default if there is one; likewise below.
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
    """Return a field's integer within bounds, or None for a field that is absent or null."""
    return None if body.get(field) is None else take_number(body, field, minimum, maximum)


def take_text(
    body: Mapping[str, Any], field: str, *, max_length: int = 255, default: str | None = None
) -> str:
    """Return a field's text: printable, not empty, at most max_length characters."""
    value = body.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or not 0 < len(value) <= max_length or not value.isprintable():
        _refuse(
            f"field {field!r} is {_show(value)}; needed: 1 to {max_length} printable characters"
        )
    return value


def take_optional_text(body: Mapping[str, Any], field: str, *, max_length: int = 255) -> str | None:
    """Like take_text, but None for a field that is absent or null."""
    return None if body.get(field) is None else take_text(body, field, max_length=max_length)


def take_flag(body: Mapping[str, Any], field: str) -> bool:
    """Return a field's boolean; an absent or null one is false."""
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        _refuse(f"field {field!r} is {_show(value)}; needed: true or false")
    return value


def take_choice(
    body: Mapping[str, Any], field: str, choices: Sequence[str], *, default: str | None = None
) -> str:
    """Return a field's text, which must be one of the choices."""
    value = body.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or value not in choices:
        _refuse(f"field {field!r} is {_show(value)}; needed: one of {', '.join(choices)}")
    return value


def kind_of(error: CowshedError) -> str:
    """Return the kind under which an error is sent; "peer" if the peer cannot act on it."""
    for kind, name in _KINDS:
        if isinstance(error, kind):
            return name
    return "peer"


def error_reply(kind: str, message: str) -> Body:
    """Return the reply that refuses a request, its message cut to one line.

    Raises UsageError for an unknown kind.
    """
    if kind not in _BY_KIND:
        raise UsageError(f"no error kind {kind!r}; one of {', '.join(_BY_KIND)}")
    return {"ok": False, "error": {"kind": kind, "message": _one_line(message)}}


def refusal(error: CowshedError) -> Body:
    """Return the reply that refuses a request because of error."""
    reply = error_reply(kind_of(error), str(error))
    if isinstance(error, MovedError):
        reply["error"]["uri"] = error.uri
    return reply


def check_reply(body: Body) -> Body:
    """Return a good reply; raise the error of a refusal, PeerError if body is neither."""
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
