# SPDX-License-Identifier: Apache-2.0
"""Counters of the C core, copied into dataclasses field by field."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

__all__ = ["Counters"]


class Counters:
    """Base of the frozen dataclasses whose fields are those of a C struct, all of them integers."""

    @classmethod
    def of(cls, struct: Any) -> Self:
        """Take a copy of a C struct that has a field for each of ours."""
        return cls(*(getattr(struct, name) for name in _names(cls)))

    @classmethod
    def none(cls) -> Self:
        """Return zeros: the sum of no counters."""
        return cls(*(0 for _ in _names(cls)))

    def __add__(self, other: Self) -> Self:
        names = _names(type(self))
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]
