# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server for the daemon's own pages, which no client can stall.

One thread waits for all clients at once, so a client that sends or reads slowly occupies a place
until its deadline, never a thread. A few worker threads make the answers. Places are few: when all
are taken, the oldest client without a complete request is dropped, so that a client that sends its
request at once is answered even in a flood of silent connections. Every connection ends with its
answer.

    READING --request--> WORKING --answer--> SENDING --sent--> LINGERING --closed by the client-->

LINGERING: closing a socket with unread bytes in it would reset the connection and could cost the
client the end of its answer.
"""

from __future__ import annotations

import contextlib
import enum
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.web.http_messages import (
    Answer,
    Handler,
    HttpRequest,
    NotHttpError,
    answer_bytes,
    head_ends,
    parse_request,
    text_answer,
)
from cowshed.transport.links.acceptor import Acceptor
from cowshed.transport.links.no_room import no_room

__all__ = ["HttpServer", "bind"]

_log = EventLog("cowshed.http")

_PLACES: Final = 64
_WORKERS: Final = 2
_HEAD_MAX_BYTES: Final = 8192
_READ_SECONDS: Final = 5.0
_SEND_SECONDS: Final = 10.0
_REFUSAL_SECONDS: Final = 2.0
_LINGER_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 2.0
_NO_DESCRIPTOR_SECONDS: Final = 0.05


class _State(enum.IntEnum):
    """A client's state, in the order in which clients are dropped to make room."""

    LINGERING = enum.auto()
    READING = enum.auto()
    SENDING = enum.auto()
    WORKING = enum.auto()


class _HttpClient:
    """One connection. request is set while WORKING, left_to_send while SENDING.

    refusal, if not "", is the only answer that it gets.
    """

    def __init__(self, sock: socket.socket, deadline: float, refusal: str = "") -> None:
        self.sock: Final = sock
        self.refusal: Final = refusal
        self.state = _State.READING
        self.deadline = deadline
        self.received = bytearray()
        self.left_to_send = memoryview(b"")
        self.request: HttpRequest | None = None


class HttpServer:
    """Binds when constructed (UsageError, one line, on failure), answers from start() to stop().

    routes has the handlers by path. Handlers run in the server's threads, several at once. A client
    has read_seconds to send its request. listener, if given, must listen at endpoint.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        routes: Mapping[str, Handler],
        *,
        read_seconds: float = _READ_SECONDS,
        listener: socket.socket | None = None,
    ) -> None:
        self._read_seconds: Final = read_seconds
        self._routes: Final = dict(routes)
        self._listener = listener or bind(endpoint)
        self.endpoint: Final = Endpoint(endpoint.host, self._listener.getsockname()[1])
        self._clients: dict[int, _HttpClient] = {}
        self._acceptor: Final = Acceptor()
        self._to_do: queue.SimpleQueue[_HttpClient | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_HttpClient, bytes]] = queue.SimpleQueue()
        self._stopping = False
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to answer, also clients that connected since the server was constructed."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._threads = [threading.Thread(target=self._run, name="http", daemon=True)]
        self._threads += [
            threading.Thread(target=self._work, name=f"http-{no}", daemon=True)
            for no in range(_WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Refuse new clients, finish the answers in progress, and end; idempotent.

        No handler runs afterwards.
        """
        if self._stopping:
            return
        self._stopping = True
        self._wake()
        for thread in self._threads[:1]:
            thread.join()
        for _ in self._threads[1:]:
            self._to_do.put(None)
        for thread in self._threads[1:]:
            thread.join()
        self._selector.close()
        self._acceptor.close()
        self._listener.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"x")

    # Workers.

    def _work(self) -> None:
        while client := self._to_do.get():
            request = client.request
            assert request is not None
            self._done.put((client, answer_bytes(self._answer(request), request.method)))
            self._wake()

    def _answer(self, request: HttpRequest) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return text_answer(405, "only GET and HEAD are answered here")
        handler = self._routes.get(request.path)
        if handler is None:
            return text_answer(404, f"not found; there is {', '.join(sorted(self._routes))}")
        try:
            return handler(request)
        except Exception:
            _log.crash("http-failed", "a defect of cowshed: please report it", path=request.path)
            return text_answer(500, "the request failed; the daemon's log says why")

    # The loop.

    def _run(self) -> None:
        stop_at = None
        while True:
            now = time.monotonic()
            if self._stopping and stop_at is None:
                stop_at = now + _STOP_SECONDS
                self._begin_stop()
            self._sweep(now)
            if stop_at is not None and (now >= stop_at or not self._clients):
                break
            deadlines = [client.deadline for client in self._clients.values()]
            wait = min([*deadlines, now + 60 if stop_at is None else stop_at]) - now
            for key, _ in self._selector.select(max(0.0, wait)):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._wake_reader:
                    self._take_answers()
                elif (client := self._clients.get(key.fd)) is not None:
                    self._serve(client)
        for client in list(self._clients.values()):
            self._drop(client)

    def _begin_stop(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for client in list(self._clients.values()):
            if client.state in (_State.READING, _State.LINGERING):
                self._drop(client)

    def _sweep(self, now: float) -> None:
        for client in list(self._clients.values()):
            if now >= client.deadline:
                self._drop(client)

    def _accept(self) -> None:
        taken = self._acceptor.accept_any(self._listener)
        if taken is None:  # the client is gone, or the acceptor's reserve is in use
            if not self._acceptor.has_spare and not self._make_room():
                time.sleep(_NO_DESCRIPTOR_SECONDS)
            return
        sock, _, number = taken
        why = no_room(number, "request") if number else ""
        if not why and len(self._clients) >= _PLACES and not self._make_room():
            why = no_room(f"{len(self._clients)} are being answered; ask again later", "request")
        sock.setblocking(False)
        deadline = time.monotonic() + (_REFUSAL_SECONDS if why else self._read_seconds)
        self._clients[sock.fileno()] = _HttpClient(sock, deadline, why)
        self._selector.register(sock, selectors.EVENT_READ)

    def _make_room(self) -> bool:
        """Drop the oldest client of the lowest state; False if all are in WORKING."""
        client = min(self._clients.values(), key=lambda client: client.state, default=None)
        if client is None or client.state is _State.WORKING:
            return False
        self._drop(client)
        return True

    def _drop(self, client: _HttpClient) -> None:
        if self._clients.pop(client.sock.fileno(), None) is None:
            return
        if client.state is not _State.WORKING:
            self._selector.unregister(client.sock)
        client.sock.close()
        self._acceptor.refill()

    def _serve(self, client: _HttpClient) -> None:
        try:
            if client.state is _State.SENDING:
                self._send(client)
            else:
                self._receive(client)
        except BlockingIOError:
            pass
        except OSError:  # the client has gone
            self._drop(client)

    def _receive(self, client: _HttpClient) -> None:
        piece = client.sock.recv(_HEAD_MAX_BYTES)
        if not piece:
            self._drop(client)
            return
        if client.state is _State.LINGERING:
            return
        client.received += piece
        if not head_ends(client.received):
            if len(client.received) >= _HEAD_MAX_BYTES:
                self._begin_sending(client, answer_bytes(text_answer(431, "request too long")))
            return
        if client.refusal:
            self._begin_sending(client, answer_bytes(text_answer(503, client.refusal)))
            return
        try:
            client.request = parse_request(bytes(client.received))
        except NotHttpError as error:
            self._begin_sending(client, answer_bytes(text_answer(400, str(error))))
            return
        client.state = _State.WORKING
        client.deadline = float("inf")
        self._selector.unregister(client.sock)
        self._to_do.put(client)

    def _take_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)
        while True:
            try:
                client, answer = self._done.get_nowait()
            except queue.Empty:
                return
            self._selector.register(client.sock, selectors.EVENT_READ)
            self._begin_sending(client, answer)

    def _begin_sending(self, client: _HttpClient, answer: bytes) -> None:
        client.state = _State.SENDING
        client.deadline = time.monotonic() + _SEND_SECONDS
        client.left_to_send = memoryview(answer)
        self._selector.modify(client.sock, selectors.EVENT_WRITE)
        self._serve(client)

    def _send(self, client: _HttpClient) -> None:
        nr_sent = client.sock.send(client.left_to_send)
        client.left_to_send = client.left_to_send[nr_sent:]
        if client.left_to_send:
            return
        client.sock.shutdown(socket.SHUT_WR)
        client.state = _State.LINGERING
        client.deadline = time.monotonic() + _LINGER_SECONDS
        self._selector.modify(client.sock, selectors.EVENT_READ)


def bind(endpoint: Endpoint) -> socket.socket:
    """Return a socket that listens at endpoint; UsageError, one line, on failure."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_PLACES)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise UsageError(
            f"cannot serve metrics at {endpoint}: {reason}; give another address with --metrics"
        ) from error
    return listener
