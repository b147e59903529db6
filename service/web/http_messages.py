# SPDX-License-Identifier: Apache-2.0
"""Parse HTTP/1.1 requests without bodies, and make answers as bytes. Pure.

An answer is (status, content type, body); a handler makes one from a HttpRequest.
"""

from __future__ import annotations

import http
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = [
    "Answer",
    "Handler",
    "HttpRequest",
    "NotHttpError",
    "answer_bytes",
    "head_ends",
    "parse_request",
    "text_answer",
]

_HEADERS_MAX: Final = 100
# For browsers: pages load only from this server, run no inline code, and cannot be framed.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class NotHttpError(Exception):
    """The bytes received are not a valid request; the message says why."""


@dataclass(frozen=True)
class HttpRequest:
    """A request without its body. query has the first value of each name, headers lower-case names.

    path is percent-decoded.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


Answer = tuple[int, str, bytes]
Handler = Callable[[HttpRequest], Answer]


def text_answer(status: int, text: str) -> Answer:
    """Make an answer of one line of text."""
    return status, "text/plain; charset=utf-8", f"{text}\n".encode(errors="replace")


def head_ends(received: bytes | bytearray) -> bool:
    """Whether a request's head is complete."""
    return b"\r\n\r\n" in received or b"\n\n" in received


def parse_request(received: bytes) -> HttpRequest:
    """Read a head; what follows it is ignored. Raises NotHttpError."""
    head = received.replace(b"\r\n", b"\n").partition(b"\n\n")[0].decode("latin-1")
    first, *lines = head.split("\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise NotHttpError("not an HTTP/1.x request")
    method, target, _ = words
    try:
        parts = urllib.parse.urlsplit(target)
        query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True, max_num_fields=20)
    except ValueError as error:
        raise NotHttpError("invalid request target") from error
    if not parts.path.startswith("/") or len(lines) > _HEADERS_MAX:
        raise NotHttpError("invalid request target, or too many headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise NotHttpError("a header line is not NAME: VALUE")
        headers.setdefault(name.lower(), value.strip())
    return HttpRequest(method, urllib.parse.unquote(parts.path), dict(reversed(query)), headers)


def answer_bytes(answer: Answer, method: str = "GET") -> bytes:
    """Encode an answer, after which the connection is closed."""
    status, content_type, body = answer
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"Content-Security-Policy: {_POLICY}\r\n"
        + ("Allow: GET, HEAD\r\n" if status == 405 else "")
        + "Connection: close\r\n\r\n"
    ).encode("latin-1")
    return head if method == "HEAD" else head + body
