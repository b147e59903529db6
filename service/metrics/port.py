# SPDX-License-Identifier: Apache-2.0
"""The metrics port: the metrics and the page for browsers, behind one HTTP server.

Imported only by a daemon with the setting `metrics`: importing prometheus_client takes a tenth of a
daemon's start.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from cowshed.service.metrics.exporter import Exporter, MetricsSources
from cowshed.service.metrics.settle import Settler
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.web.http_server import HttpServer, bind
from cowshed.service.web.pages import web_routes
from cowshed.service.web.state import PageStateReader

__all__ = ["MetricsPort", "MetricsSources"]

_log = EventLog("cowshed")


class MetricsPort:
    """Serves an endpoint, from serve() to close(). status() returns what `cowshed status` shows."""

    def __init__(
        self, endpoint: Endpoint, sources: MetricsSources, status: Callable[[], dict[str, Any]]
    ) -> None:
        self._endpoint: Final = endpoint
        self._settler = Settler(sources.guests)
        state = PageStateReader(lambda: list(sources.store), status)
        self._routes = {
            "/metrics": Exporter(sources, self._settler.ask).serve,
            **web_routes(state.read),
        }
        self._server: HttpServer | None = None
        self._settler.start()

    def bind(self) -> socket.socket:
        """Return a socket that listens at the endpoint, for serve(). Raises UsageError."""
        return bind(self._endpoint)

    def serve(self, listener: socket.socket) -> None:
        """Serve a listener, taken over; must be called at most once."""
        assert self._server is None
        self._server = HttpServer(self._endpoint, self._routes, listener=listener)
        self._server.start()
        _log.notice("metrics", url=f"http://{self._server.endpoint}/metrics")

    def close(self) -> None:
        """Stop the server, if there is one, and the settler."""
        if self._server is not None:
            self._server.stop()
        self._settler.stop()
