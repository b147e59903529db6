# SPDX-License-Identifier: Apache-2.0
"""Messages between two programs by any transport: listen, connect, send, recv.

    with channel.listen("tcp://127.0.0.1:7000") as listener:      # one program
        with listener.accept(timeout=10) as peer:
            asked = peer.recv(timeout=10)
            asked.reply({"sum": asked.body["a"] + asked.body["b"]})

    with channel.connect("tcp://127.0.0.1:7000") as peer:         # the other
        first, second = peer.send("add", a=1, b=2), peer.send("add", a=3, b=4)
        second.result(timeout=10), first.result(timeout=10)       # in any order

There is no broker: if either side crashes, the other gets PeerError from the call it waits in.
Every wait has a deadline. A channel is for one thread at a time; aio.py has the same for asyncio.
dialogue.py has the contents of hello and the rules of a conversation.
"""

from __future__ import annotations

import contextlib
import enum
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cowshed.cache.errors import CowshedError, PeerError
from cowshed.transport.links.connection import EOF, MAX_QUEUED_BYTES, Connection, Received
from cowshed.transport.links.schemes import AnyListener, connect_raw
from cowshed.transport.links.schemes import listen as listen_raw
from cowshed.transport.messages.dialogue import (
    MAX_OUTSTANDING,
    Answer,
    Asked,
    Dialogue,
    DialoguePhase,
    Greeted,
)
from cowshed.transport.messages.fields import check_reply, error_reply, kind_of
from cowshed.transport.messages.protocol import MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Body

__all__ = [
    "Channel",
    "ChannelListener",
    "ChannelRequest",
    "Line",
    "Liveness",
    "Pending",
    "connect",
    "listen",
]

WAIT_SECONDS: Final = 60.0


class Liveness(enum.Enum):
    """Whether there is a peer: open, not yet reached, or gone."""

    OPEN = "open"
    NOT_YET = "not yet"
    GONE = "gone"


@dataclass(eq=False)
class ChannelRequest:
    """A request of the peer. fds belong to us: take out those to keep, close_fds() the rest."""

    channel: Channel
    tag: int
    op: str
    body: Body
    fds: list[int] = field(default_factory=list)

    def reply(self, fields: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        """Answer; with "progress" among the fields, more replies follow. fds stay the caller's."""
        self.channel._answer(self, {"ok": True, **(fields or {})}, fds)

    def refuse(self, error: CowshedError) -> None:
        """Refuse the request: the peer's call raises an error of the same kind."""
        self.channel._answer(self, error_reply(kind_of(error), str(error)), ())

    def close_fds(self) -> None:
        """Close the descriptors that are still in fds."""
        Received(self.tag, self.body, 0, self.fds).close_fds()


@dataclass(eq=False)
class Pending:
    """A request of ours in flight; result() waits for its answer, whose fds belong to us."""

    channel: Channel
    tag: int
    fds: list[int] = field(default_factory=list)
    progress: deque[Body] = field(default_factory=deque)
    _answer: Body | None = None

    @property
    def done(self) -> bool:
        """Whether the answer has arrived; receives nothing."""
        return self._answer is not None

    def result(self, timeout: float = WAIT_SECONDS) -> Body:
        """Return the answer. Raises the error of a refusal, and PeerError if no answer comes."""
        self.channel._pump_until(lambda: self.done, timeout, f"answer to request {self.tag}")
        assert self._answer is not None
        return check_reply(self._answer)


class Channel:
    """A conversation over one connection, which it owns.

    _pending maps the tag of each unanswered request of ours. _asked holds the peer's requests that
    recv() has not returned yet; close() closes their descriptors.
    """

    def __init__(
        self,
        connection: Connection,
        features: Sequence[str] = (),
        max_outstanding: int = MAX_OUTSTANDING,
        max_message_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self.connection: Final = connection
        self._dialogue = Dialogue(
            frozenset(features),
            our_limit=max_outstanding,
            our_message_bytes=max_message_bytes,
        )
        # Our limit bounds what we receive; the peer's hello states its own.
        connection.limit(max_message_bytes, MAX_REQUEST_BYTES)
        self._pending: dict[int, Pending] = {}
        self._asked: deque[ChannelRequest] = deque()
        self._batching = 0

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def features(self) -> frozenset[str]:
        """The features that both sides announced."""
        return self._dialogue.features

    @property
    def version(self) -> int:
        """The protocol version that both sides speak."""
        return self._dialogue.version

    @property
    def state(self) -> Liveness:
        """OPEN while the peer holds its end; NOT_YET before its hello; then GONE for good."""
        if self._dialogue.phase is DialoguePhase.GONE or not self.connection.alive:
            return Liveness.GONE
        return Liveness.OPEN if self._dialogue.phase is DialoguePhase.OPEN else Liveness.NOT_YET

    def close(self) -> None:
        """End the conversation: the peer's waiting calls fail with PeerError. Idempotent."""
        self._dialogue.end()
        for request in self._asked:
            request.close_fds()
        self._asked.clear()
        self.connection.close()

    def greet(self, timeout: float = WAIT_SECONDS) -> None:
        """Exchange hellos, as the side that connected."""
        tag, body = self._dialogue.hello()
        self._queue(tag, body, ())
        self.await_hello(timeout)

    def await_hello(self, timeout: float = WAIT_SECONDS) -> None:
        """Wait until hellos are exchanged; PeerError if the peer sends none."""
        self._pump_until(lambda: self._dialogue.phase is DialoguePhase.OPEN, timeout, "hello")

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> Pending:
        """Send a request, at once or with its batch, and do not wait. fds stay the caller's.

        Raises CapacityError if too many requests are unanswered.
        """
        tag = self._dialogue.ask()
        try:
            self._queue(tag, {"op": op, **fields}, fds)
        except CowshedError:
            self._dialogue.forget(tag)
            raise
        pending = self._pending[tag] = Pending(self, tag)
        return pending

    def request(self, op: str, timeout: float = WAIT_SECONDS, **fields: Any) -> Body:
        """Send a request and wait for its answer."""
        return self.send(op, **fields).result(timeout)

    def recv(self, timeout: float = WAIT_SECONDS) -> ChannelRequest:
        """Wait for a request of the peer."""
        self._pump_until(lambda: bool(self._asked), timeout, "request")
        return self._asked.popleft()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Queue requests and replies made inside `with`, and send them together at the end."""
        self._batching += 1
        try:
            yield
        finally:
            self._batching -= 1
            if not self._batching:
                self._flush()

    def _answer(self, request: ChannelRequest, body: Body, fds: Sequence[int]) -> None:
        self._dialogue.answer(request.tag, body)
        self._queue(request.tag, body, fds)

    def _queue(self, tag: int, body: Body, fds: Sequence[int]) -> None:
        self._make_room()
        self.connection.queue(body, fds, tag)
        if not self._batching:
            self._flush()

    def _make_room(self) -> None:
        """Wait until the peer has read most of the queue; receives messages meanwhile."""
        connection = self.connection
        if connection.queued_bytes > MAX_QUEUED_BYTES // 2:
            self._pump_until(
                lambda: connection.queued_bytes <= MAX_QUEUED_BYTES // 2, WAIT_SECONDS, "room"
            )

    def _flush(self) -> None:
        try:
            self.connection.flush()  # the rest goes out while we wait for an answer
        except PeerError:
            self.close()
            raise

    def _pump_until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if self._dialogue.phase is DialoguePhase.GONE:
                raise PeerError(f"the peer is gone, and no {what} will come; connect again")
            try:
                self.connection.flush()
                if not done():  # flushing alone may suffice (_make_room)
                    self._pump(deadline, what, timeout)
            except PeerError:
                self.close()
                raise

    def _pump(self, deadline: float, what: str, timeout: float) -> None:
        messages = self.connection.recv_ready()
        if messages is EOF:
            raise PeerError(f"the peer closed the connection; no {what} will come")
        self.take(messages)
        if messages:
            return
        poll = select.poll()
        poll.register(
            self.connection, select.POLLIN | (select.POLLOUT if self.connection.wants_write else 0)
        )
        left = max(0.0, deadline - time.monotonic())
        if not poll.poll(left * 1000):
            raise PeerError(f"no {what} from the peer in {timeout:g} s")

    def take(self, messages: Sequence[Received]) -> None:
        """File messages that arrived: answers with their Pending, requests for recv()."""
        for no, message in enumerate(messages):
            try:
                self._take(message)
            except BaseException:
                for rest in messages[no:]:
                    rest.close_fds()
                raise

    def _take(self, message: Received) -> None:
        match self._dialogue.take(message.tag, message.body):
            case Greeted(tag, reply):
                message.close_fds()
                self.connection.limit_sending(self._dialogue.their_message_bytes)
                if reply is not None:
                    self._queue(tag, reply, ())
            case Asked(tag, body):
                self._asked.append(ChannelRequest(self, tag, body["op"], body, message.fds))
            case Answer(tag, body, last):
                # _pending keeps the Pending even if the caller dropped it.
                pending = self._pending[tag]
                if last:
                    del self._pending[tag]
                    pending._answer = body
                    pending.fds = message.fds
                else:
                    message.close_fds()
                    pending.progress.append(body)


class ChannelListener:
    """Listens for programs that connect()."""

    def __init__(
        self,
        listener: AnyListener,
        features: Sequence[str],
        max_outstanding: int,
        max_message_bytes: int,
    ) -> None:
        self._listener = listener
        self._terms = features, max_outstanding, max_message_bytes

    def __enter__(self) -> ChannelListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """Where it listens, with the port the kernel chose for port 0."""
        return self._listener.uri

    def fileno(self) -> int:
        """Return the descriptor to watch for reading, -1 once closed."""
        return self._listener.fileno()

    def close(self) -> None:
        """Stop listening; channels that were accepted stay."""
        self._listener.close()

    def accept(self, timeout: float = WAIT_SECONDS) -> Channel:
        """Wait at most timeout seconds for a peer and its hello.

        Raises PeerError if no peer comes or its hello is bad; listening goes on.
        """
        deadline = time.monotonic() + timeout
        while (connection := self._listener.accept()) is None:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self], [], [], left)[0]:
                raise PeerError(f"nobody connected to {self.uri} in {timeout:g} s")
        channel = Channel(connection, *self._terms)
        try:
            channel.await_hello(max(0.0, deadline - time.monotonic()))
        except BaseException:
            channel.close()
            raise
        return channel


def listen(
    uri: str,
    features: Sequence[str] = (),
    max_outstanding: int = MAX_OUTSTANDING,
    max_message_bytes: int = MAX_REPLY_BYTES,
) -> ChannelListener:
    """Listen by any scheme.

    features are what we support; max_outstanding and max_message_bytes limit what a peer may send.
    """
    return ChannelListener(listen_raw(uri), features, max_outstanding, max_message_bytes)


def connect(
    uri: str,
    features: Sequence[str] = (),
    timeout: float = WAIT_SECONDS,
    max_outstanding: int = MAX_OUTSTANDING,
    max_message_bytes: int = MAX_REPLY_BYTES,
) -> Channel:
    """Connect and exchange hellos. UsageError for a bad URI, PeerError for no answer in time."""
    channel = Channel(connect_raw(uri, timeout), features, max_outstanding, max_message_bytes)
    try:
        channel.greet(timeout)
    except BaseException:
        channel.close()
        raise
    return channel


class Line:
    """A reconnecting client of a peer that may start later, die, and come back.

    state is NOT_YET until the peer was first reached, then OPEN or GONE. channel() returns the open
    conversation, or begins a new one. Requests in flight when the peer went fail with PeerError
    and are not repeated: only the caller knows which may be done twice.
    """

    def __init__(self, uri: str, features: Sequence[str] = ()) -> None:
        self.uri: Final = uri
        self._features = features
        self._channel: Channel | None = None

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> Liveness:
        """Whether the peer is there, judged by the last connection."""
        return Liveness.NOT_YET if self._channel is None else self._channel.state

    def channel(self, timeout: float = WAIT_SECONDS) -> Channel:
        """Return the open channel, or connect; PeerError if that fails for timeout seconds."""
        deadline = time.monotonic() + timeout
        pause = 0.01
        while self._channel is None or self._channel.state is not Liveness.OPEN:
            if self._channel is not None:
                self._channel.close()
            left = deadline - time.monotonic()
            try:
                self._channel = connect(self.uri, self._features, max(0.001, left))
            except PeerError as error:
                if left <= 0:
                    raise PeerError(f"no peer at {self.uri} in {timeout:g} s: {error}") from error
                time.sleep(min(pause, max(0.0, left)))
                pause = min(1.0, 2 * pause)
        return self._channel

    def close(self) -> None:
        """End the conversation, if there is one."""
        if self._channel is not None:
            self._channel.close()
