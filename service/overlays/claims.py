# SPDX-License-Identifier: Apache-2.0
"""Who may enter an overlay: its owner, who made it, and operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from cowshed.cache import Image
from cowshed.cache.errors import UsageError

__all__ = ["CARRIER", "Claim", "NotYoursError", "Owned", "check_may_enter", "is_of"]

# The prefix of owners of overlays without pages, reserved for programs that carry their own.
CARRIER: Final = "carrier of "


class NotYoursError(UsageError):
    """The overlay has another owner."""


class Owned(Protocol):
    """An overlay, also one that is being made."""

    @property
    def name(self) -> str:
        """Its guest's name."""

    @property
    def image(self) -> Image:
        """The image it is a copy of."""

    @property
    def owner(self) -> str:
        """The proof by which a client may enter it again."""


@dataclass(frozen=True)
class Claim:
    """A client's claim to an overlay. owners are its proofs, the strongest first; never empty.

    proof is that of its token alone, "" if it has none.
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
    """Whether a claim admits to the overlay of an owner; none does to a carrier's."""
    if owner.startswith(CARRIER):
        return False
    return claim.is_operator or owner in claim.owners


def check_may_enter(guest: Owned, image: Image, claim: Claim) -> None:
    """Raise NotYoursError if an overlay is another's, or of another image."""
    if not is_of(guest.owner, claim) or guest.image is not image:
        # Only a client with the right token learns this; others just see that the name is taken.
        if claim.proof and guest.owner.endswith(f" {claim.proof}") and not claim.has_certificate:
            raise NotYoursError(
                f"guest {guest.name!r} is identified by a certificate and its token, and sends no "
                f"certificate by {claim.transport}: connect by tls://, with that certificate"
            )
        raise NotYoursError(f"guest name {guest.name!r} is taken; choose another")
