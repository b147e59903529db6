# SPDX-License-Identifier: Apache-2.0
"""channel.py for asyncio: the same protocol over the same connections, with awaitable calls.

    async with await aio.connect("tcp://127.0.0.1:7000") as peer:
        await asyncio.gather(*(peer.request("add", a=n, b=n) for n in range(8)))

    async with aio.listen("unix:///run/x.sock") as listener:
        peer = await listener.accept()
        asked = await peer.recv()
        asked.reply({"sum": 3})

Messages sent within one iteration of the loop go out as one batch. Sending never waits for the
peer: a peer that reads nothing until connection.MAX_QUEUED_BYTES pile up is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

from cowshed.cache.errors import PeerError
from cowshed.transport.channels.channel import WAIT_SECONDS, Channel, ChannelRequest, Pending
from cowshed.transport.links.connection import EOF
from cowshed.transport.links.schemes import AnyListener, connect_raw
from cowshed.transport.links.schemes import listen as listen_raw
from cowshed.transport.messages.dialogue import MAX_OUTSTANDING, DialoguePhase
from cowshed.transport.messages.fields import check_reply
from cowshed.transport.messages.protocol import Body

__all__ = ["AsyncChannel", "AsyncListener", "connect", "listen"]


class _LoopChannel(Channel):
    """A channel that flushes at the end of the loop's iteration instead of after each message."""

    owner: AsyncChannel

    def _flush(self) -> None:
        self.owner.flush_soon()

    def _make_room(self) -> None:
        pass  # a loop must not wait; queue() bounds the backlog


class AsyncChannel:
    """A conversation for any number of tasks of one loop.

    Invariant: until it is closed, the loop watches the connection, for writing while wants_write.
    """

    def __init__(self, channel: _LoopChannel) -> None:
        self._channel = channel
        channel.owner = self
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._flush_handle: asyncio.Handle | None = None
        self._writing = False
        self._error: PeerError | None = None
        self._fd = channel.connection.fileno()
        self._loop.add_reader(self._fd, self._on_readable)

    async def __aenter__(self) -> AsyncChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def channel(self) -> Channel:
        """The channel underneath: features, version, state, connection. Never call what waits."""
        return self._channel

    async def request(self, op: str, timeout: float = WAIT_SECONDS, **fields: Any) -> Body:
        """Send a request and wait for its answer; raises the error that a refusal stands for."""
        return await self.result(self.send(op, **fields), timeout)

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> Pending:
        """Send a request; result() waits for its answer. Raises as Channel.send does."""
        self._check()
        return self._channel.send(op, fds, **fields)

    async def result(self, pending: Pending, timeout: float = WAIT_SECONDS) -> Body:
        """Wait for the answer to a request that send() returned."""
        await self._until(lambda: pending.done, timeout, f"answer to request {pending.tag}")
        assert pending._answer is not None
        return check_reply(pending._answer)

    async def recv(self, timeout: float = WAIT_SECONDS) -> ChannelRequest:
        """Wait for a request of the peer."""
        await self._until(lambda: bool(self._channel._asked), timeout, "request")
        return self._channel._asked.popleft()

    def close(self) -> None:
        """End the conversation; waiting tasks get PeerError. Idempotent."""
        self._end(PeerError("the channel was closed"))

    def flush_soon(self) -> None:
        """Send what is queued at the end of this iteration of the loop."""
        if self._flush_handle is None and self._error is None:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        try:
            self._channel.connection.flush()
        except PeerError as error:
            self._end(error)
            return
        self._watch_writing()

    def _watch_writing(self) -> None:
        wants = self._channel.connection.wants_write
        if wants and not self._writing:
            self._loop.add_writer(self._fd, self._flush)
        elif self._writing and not wants:
            self._loop.remove_writer(self._fd)
        self._writing = wants

    def _on_readable(self) -> None:
        try:
            messages = self._channel.connection.recv_ready()
            if messages is EOF:
                raise PeerError("the peer closed the connection")
            self._channel.take(messages)
            self._watch_writing()
        except PeerError as error:
            self._end(error)
            return
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, error: PeerError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            with contextlib.suppress(PeerError):
                self._channel.connection.flush()
        self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._channel.close()
        self._wake()

    def _check(self) -> None:
        if self._error is not None:
            raise PeerError(f"the conversation is over: {self._error}")

    async def _until(self, done: Any, timeout: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    self._check()
                    await self._changed.wait()
        except TimeoutError as error:
            # Other requests may still be answered: give up only this one.
            raise PeerError(f"no {what} from the peer in {timeout:g} s") from error

    async def _hello(self, timeout: float) -> None:
        dialogue = self._channel._dialogue
        await self._until(lambda: dialogue.phase is DialoguePhase.OPEN, timeout, "hello")


class AsyncListener:
    """Listens for programs that connect()."""

    def __init__(
        self, listener: AnyListener, features: Sequence[str], max_outstanding: int
    ) -> None:
        self._listener: Final = listener
        self._features = features
        self._max_outstanding = max_outstanding

    async def __aenter__(self) -> AsyncListener:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """Where it listens, with the port the kernel chose for port 0."""
        return self._listener.uri

    def close(self) -> None:
        """Stop listening; channels that were accepted stay."""
        self._listener.close()

    async def accept(self, timeout: float = WAIT_SECONDS) -> AsyncChannel:
        """Wait for a peer and its hello; PeerError if none comes in time or the hello is bad."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (connection := self._listener.accept()) is None:
            ready = asyncio.Event()
            fd = self._listener.fileno()
            loop.add_reader(fd, ready.set)
            try:
                await asyncio.wait_for(ready.wait(), max(0.0, deadline - loop.time()))
            except TimeoutError as error:
                raise PeerError(f"nobody connected to {self.uri} in {timeout:g} s") from error
            finally:
                loop.remove_reader(fd)
        channel = AsyncChannel(_LoopChannel(connection, self._features, self._max_outstanding))
        return await _greeted(channel, deadline - loop.time())


def listen(
    uri: str, features: Sequence[str] = (), max_outstanding: int = MAX_OUTSTANDING
) -> AsyncListener:
    """Listen by any scheme, as channel.listen does."""
    return AsyncListener(listen_raw(uri), features, max_outstanding)


async def connect(
    uri: str,
    features: Sequence[str] = (),
    timeout: float = WAIT_SECONDS,
    max_outstanding: int = MAX_OUTSTANDING,
) -> AsyncChannel:
    """Connect and exchange hellos. UsageError for a bad URI, PeerError for no answer in time."""
    connection = await asyncio.to_thread(connect_raw, uri, timeout)
    channel = AsyncChannel(_LoopChannel(connection, features, max_outstanding))
    inner = channel.channel
    tag, body = inner._dialogue.hello()
    inner._queue(tag, body, ())
    return await _greeted(channel, timeout)


async def _greeted(channel: AsyncChannel, timeout: float) -> AsyncChannel:
    try:
        await channel._hello(timeout)
    except BaseException:
        channel.close()
        raise
    return channel
