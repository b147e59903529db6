# SPDX-License-Identifier: Apache-2.0
"""What the target of a drain says: control messages, over one link at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cowshed.cache import PeerError, UsageError
from cowshed.service.migration.link import Link, SocketLink
from cowshed.service.migration.sender import Sender
from cowshed.transport.handoff.sections import ControlMessage, StateReader

__all__ = ["LostError", "TargetLink"]


class LostError(PeerError):
    """The target is gone, or says what makes no sense."""


class TargetLink:
    """The link to the target, and what came by it. For the drain's thread alone.

    Invariant: _messages came by the link in use, and were not given yet.
    """

    def __init__(self, uri: str, wait_name: Callable[[str], None]) -> None:
        """wait_name(what) is told what is waited for, to be shown."""
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
        """Go on over another link; the last one was closed."""
        self._link = link
        self._reader, self._messages = StateReader(messages=True), []

    def close(self) -> None:
        """Close the link, if there is one; nothing twice."""
        if self._link is not None:
            self._link.close()

    def hear(self, waits_for: str) -> ControlMessage:
        """Wait for the next message. LostError if the target hangs up or says that it failed."""
        self._wait_name(waits_for)
        while not self._messages:
            raw = self.link.receive()
            if not raw:
                raise LostError(f"{self._uri} hung up while it was waited for {waits_for}")
            self._take(raw)
        return self._messages.pop(0)

    def hear_of_pages(self, wait: bool) -> ControlMessage | None:
        """Give the next message of a post-copy; None if none has come, unless it is to wait."""
        if not wait and not self._messages and not self.link.has_come():
            return None
        return self.hear("the target to have all pages")

    def listen(self) -> None:
        """Hear, without waiting, whether the target failed. PeerError."""
        if isinstance(self._link, SocketLink):
            while raw := self._link.receive_now():
                self._take(raw)

    def expect(self, waits_for: str, what: str) -> ControlMessage:
        """Wait for the next message; LostError if it is another than that."""
        message = self.hear(waits_for)
        self.check(message, what)
        return message

    def check(self, message: ControlMessage, what: str) -> None:
        """Raise LostError for another message than that."""
        if message.kind != what:
            raise LostError(f"{self._uri} says {message.kind!r} instead of {what!r}")

    def knows(self, sender: Sender, feature: str) -> bool:
        """Ask whether the target knows something; PeerError if it does not know the question."""
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
