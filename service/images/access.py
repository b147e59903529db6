# SPDX-License-Identifier: Apache-2.0
"""Who may use which image: the one question that every way in asks before it opens anything.

A guest sees the images of its domain, less those whose access list (uids, gids, clients of an
[[image]]) leaves it out. What it does not see is answered as what does not exist. Operators see
all.
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
    """The rules of one configuration.

    moved_to is where who comes is sent instead, during a drain and after it.
    """

    def __init__(self, domains: Domains, specs: Iterable[ImageSpec]) -> None:
        self.domains: Final = domains
        self.moved_to: str | None = None
        self._allowed: Final = {(spec.domain, spec.name): spec.allowed for spec in specs}

    def allow(self, image: Named, allowed: DomainMembers | None) -> None:
        """Say who of its domain may use an image that came later; None is everybody there."""
        self._allowed[image.domain, image.name] = allowed

    def allowed(self, image: Named) -> DomainMembers | None:
        """Who of its domain may use an image; None is everybody there."""
        return self._allowed.get((image.domain, image.name))

    def usable(self, images: Iterable[N], identity: Identity) -> list[N]:
        """Those of the images that somebody may use."""
        domain = self.domains.domain_of(identity)
        return [
            image
            for image in images
            if is_operator(identity.uid)
            or (image.domain == domain and self._lists(image, identity))
        ]

    def find(self, images: Iterable[N], text: str, identity: Identity) -> N:
        """The image that NAME or DOMAIN/NAME means; UsageError naming those one may use.

        MovedError, which says where to go, while this backend is drained.
        """
        self.check_open()
        return find_for_guest(
            self.usable(images, identity),
            text,
            self.domains.domain_of(identity),
            is_operator=is_operator(identity.uid),
        )

    def check_open(self) -> None:
        """Raise MovedError, which says where to go, while this backend is drained."""
        if self.moved_to is not None:
            raise MovedError(self.moved_to)

    def _lists(self, image: Named, identity: Identity) -> bool:
        allowed = self.allowed(image)
        return allowed is None or allowed.has(identity)
