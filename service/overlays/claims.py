# SPDX-License-Identifier: Apache-2.0
"""Who may come back to an overlay: who made it, and operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from cowshed.cache import Image
from cowshed.cache.errors import UsageError

__all__ = ["CARRIER", "Claim", "NotYoursError", "Owned", "check_may_enter", "is_of"]

# Owners that begin so are of overlays without a page, kept for a program that brings its own along.
CARRIER: Final = "carrier of "


class NotYoursError(UsageError):
    """Somebody else made that overlay."""


class Owned(Protocol):
    """An overlay, or one that is being made."""

    @property
    def name(self) -> str:
        """Its guest's name."""

    @property
    def image(self) -> Image:
        """The image it is a copy of."""

    @property
    def owner(self) -> str:
        """Who may come back to it."""


@dataclass(frozen=True)
class Claim:
    """Who wants an overlay. owners is what it is known by, the strongest first; never empty.

    proof is what it is known by if its token alone counts, "" if it has none.
    """

    owners: tuple[str, ...]
    counted_as: int | str
    is_operator: bool
    transport: str
    uid: int = -1
    proof: str = ""
    has_certificate: bool = False
    pid: int = 0


def is_of(owner: str, claim: Claim) -> bool:
    """Whether who has a claim may come back to what owner made; no client may to a carrier's."""
    if owner.startswith(CARRIER):
        return False
    return claim.is_operator or owner in claim.owners


def check_may_enter(guest: Owned, image: Image, claim: Claim) -> None:
    """Raise NotYoursError if an overlay is another's, or of another image."""
    if not is_of(guest.owner, claim) or guest.image is not image:
        # Said to who knows the token alone: nobody else can tell that from a name that is taken.
        if claim.proof and guest.owner.endswith(f" {claim.proof}") and not claim.has_certificate:
            raise NotYoursError(
                f"guest {guest.name!r} is known by a certificate and its token, and shows none by "
                f"{claim.transport}: come by tls://, with that certificate"
            )
        raise NotYoursError(f"guest name {guest.name!r} is taken; choose another")
