# SPDX-License-Identifier: Apache-2.0
"""The page at / of the metrics port: its files, which are part of the package, and its state.

The page loads only from this daemon, which its content security policy enforces in the browser.
It is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cowshed.service.web.http_messages import Handler

__all__ = ["web_routes"]

_FOLDER: Final = Path(__file__).with_name("page")
_FILES: Final = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/cowshed.css": ("page.css", "text/css; charset=utf-8"),
    "/cowshed.js": ("page.js", "text/javascript; charset=utf-8"),
    "/cowshed-map.js": ("map.js", "text/javascript; charset=utf-8"),
    "/cowshed.svg": ("icon.svg", "image/svg+xml"),
}


def web_routes(read_state: Callable[[], bytes]) -> dict[str, Handler]:
    """Return the handlers by path: the page's files, read now, and /state.json by `read_state`."""

    def fixed(content_type: str, body: bytes) -> Handler:
        return lambda _request: (200, content_type, body)

    routes = {
        path: fixed(content_type, (_FOLDER / name).read_bytes())
        for path, (name, content_type) in _FILES.items()
    }
    routes["/state.json"] = lambda _request: (200, "application/json", read_state())
    return routes
