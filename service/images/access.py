# SPDX-License-Identifier: Apache-2.0
"""Which images a peer may use; every server asks this before it opens anything.

A guest sees the images of its domain, except those whose access list (uids, gids, clients of an
[[image]]) omits it. For a guest, an image that it does not see does not exist. Operators see all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from cowshed.service.settings.domains import DomainMembers, Domains, Identity, is_operator
from cowshed.service.settings.images import ImageSpec
from cowshed.service.settings.names import Named, find_for_guest
from cowshed.transport.messages.fields import MovedError

__all__ = ["Access"]

N = TypeVar("N", bound=Named)


class Access:
    """The access rules of one configuration.

    moved_to is the URI that peers are redirected to, during a drain and after it.
    """

    def __init__(self, domains: Domains, specs: Iterable[ImageSpec]) -> None:
        self.domains: Final = domains
        self.moved_to: str | None = None
        self._allowed: Final = {(spec.domain, spec.name): spec.allowed for spec in specs}

    def allow(self, image: Named, allowed: DomainMembers | None) -> None:
        """Set who of its domain may use an image added later; None: all of the domain."""
        self._allowed[image.domain, image.name] = allowed

    def allowed(self, image: Named) -> DomainMembers | None:
        """Return who of its domain may use an image; None: all of the domain."""
        return self._allowed.get((image.domain, image.name))

    def usable(self, images: Iterable[N], identity: Identity) -> list[N]:
        """Return those of the images that a peer may use."""
        domain = self.domains.domain_of(identity)
        return [
            image
            for image in images
            if is_operator(identity.uid)
            or (image.domain == domain and self._lists(image, identity))
        ]

    def find(self, images: Iterable[N], text: str, identity: Identity) -> N:
        """Return the image of NAME or DOMAIN/NAME; UsageError naming those the peer may use.

        MovedError, with the target's URI, while this backend is drained.
        """
        self.check_open()
        return find_for_guest(
            self.usable(images, identity),
            text,
            self.domains.domain_of(identity),
            is_operator=is_operator(identity.uid),
        )

    def check_open(self) -> None:
        """Raise MovedError, with the target's URI, while this backend is drained."""
        if self.moved_to is not None:
            raise MovedError(self.moved_to)

    def _lists(self, image: Named, identity: Identity) -> bool:
        allowed = self.allowed(image)
        return allowed is None or allowed.has(identity)
