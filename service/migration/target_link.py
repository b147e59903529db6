# SPDX-License-Identifier: Apache-2.0
"""Receive the target's control messages in a drain, over one link at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cowshed.cache import PeerError, UsageError
from cowshed.service.migration.link import Link, SocketLink
from cowshed.service.migration.sender import Sender
from cowshed.transport.handoff.sections import ControlMessage, StateReader

__all__ = ["LostError", "TargetLink"]


class LostError(PeerError):
    """The target is gone, has failed, or sent an unexpected message."""


class TargetLink:
    """The link to the target, and the messages received. For the drain's thread alone.

    Invariant: _messages were received on the link in use, and not returned yet.
    """

    def __init__(self, uri: str, wait_name: Callable[[str], None]) -> None:
        """wait_name(what) is called with what the drain waits for, to be shown."""
        self._uri: Final = uri
        self._wait_name = wait_name
        self._link: Link | None = None
        self._reader = StateReader(messages=True)
        self._messages: list[ControlMessage] = []

    @property
    def link(self) -> Link:
        """The link in use."""
        assert self._link is not None
        return self._link

    def use(self, link: Link) -> None:
        """Use another link; the last one must be closed."""
        self._link = link
        self._reader, self._messages = StateReader(messages=True), []

    def close(self) -> None:
        """Close the link, if there is one; idempotent."""
        if self._link is not None:
            self._link.close()

    def hear(self, waits_for: str) -> ControlMessage:
        """Wait for the next message. LostError if the target hangs up or reports that it failed."""
        self._wait_name(waits_for)
        while not self._messages:
            raw = self.link.receive()
            if not raw:
                raise LostError(f"{self._uri} hung up while the drain waited for {waits_for}")
            self._take(raw)
        return self._messages.pop(0)

    def hear_of_pages(self, wait: bool) -> ControlMessage | None:
        """Return the next message of a post-copy; without wait, None if none is there."""
        if not wait and not self._messages and not self.link.has_come():
            return None
        return self.hear("the target to have all pages")

    def listen(self) -> None:
        """Read what is there, without waiting. Raises PeerError if the target failed."""
        if isinstance(self._link, SocketLink):
            while raw := self._link.receive_now():
                self._take(raw)

    def expect(self, waits_for: str, what: str) -> ControlMessage:
        """Wait for the next message; LostError unless it is of that kind."""
        message = self.hear(waits_for)
        self.check(message, what)
        return message

    def check(self, message: ControlMessage, what: str) -> None:
        """Raise LostError unless a message is of that kind."""
        if message.kind != what:
            raise LostError(f"{self._uri} sent {message.kind!r} instead of {what!r}")

    def knows(self, sender: Sender, feature: str) -> bool:
        """Ask whether the target has a feature; PeerError if it does not know the question."""
        sender.send("features")
        has = self.hear("the target's list of features").body.get("has")
        return isinstance(has, list) and feature in has

    def require_post_copy(self, sender: Sender) -> None:
        """Raise UsageError if the target does not know post-copy."""
        try:
            knows, why = self.knows(sender, "post-copy"), ""
        except PeerError as error:
            knows, why = False, f" ({error})"
        if not knows:
            raise UsageError(
                f"{self._uri} does not know post-copy{why}; upgrade it, or drain without "
                "--post-copy"
            )

    def _take(self, raw: bytes) -> None:
        for section in self._reader.feed(raw):
            if isinstance(section, ControlMessage):
                if section.kind == "failed":
                    raise LostError(f"{self._uri}: {str(section.body.get('why'))[:500]}")
                self._messages.append(section)
