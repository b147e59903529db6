# SPDX-License-Identifier: Apache-2.0
"""The choices of the user of `cowshed top` (table, row, order): keys in, choices out.

Pure: no terminal. `press` is the whole state machine; screen.py has the names of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Focus = Literal["images", "guests"]

ORDERS: dict[Focus, tuple[str, ...]] = {
    "images": ("busy", "name", "resident", "saved"),
    "guests": ("busy", "name", "private", "copies", "hits"),
}
KEYS: tuple[tuple[str, str], ...] = (
    ("q", "quit (Ctrl-C too)"),
    ("↑ ↓  k j", "select a row; PgUp, PgDn, Home and End go further"),
    ("i  g  Tab", "images, guests, the other of them"),
    ("s  S", "sort by the next column, by the one before; guests that are stopped stay on top"),
    ("p  Space", "pause, continue"),
    ("?  h", "this help; any key leaves it"),
)
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -10, "pagedown": 10}
_FAR = 1 << 40


@dataclass
class TopState:
    """The choices. `selected` is a key, so that a row stays selected when rows change places.

    Invariants: `order` has an entry of ORDERS for each table; `selected` None is the first row.
    """

    focus: Focus = "guests"
    paused: bool = False
    helping: bool = False
    quitting: bool = False
    order: dict[Focus, str] = field(
        default_factory=lambda: {focus: orders[0] for focus, orders in ORDERS.items()}
    )
    selected: dict[Focus, str | None] = field(default_factory=lambda: dict.fromkeys(ORDERS, None))

    def press(self, key: str, names: Sequence[str]) -> bool:
        """Act on a key and return whether anything changed; `names` are the rows in focus."""
        before = (self.focus, self.paused, self.helping, str(self.order), str(self.selected))
        if key == "q":
            self.quitting = True
        elif self.helping:
            self.helping = False
        else:
            self._choose(key, names)
        after = (self.focus, self.paused, self.helping, str(self.order), str(self.selected))
        return before != after or self.quitting

    def _choose(self, key: str, names: Sequence[str]) -> None:
        if key in _STEPS:
            self._move(_STEPS[key], names)
        elif key in ("home", "end"):
            self._move(-_FAR if key == "home" else _FAR, names)
        elif key == "i":
            self.focus = "images"
        elif key == "g":
            self.focus = "guests"
        elif key == "tab":
            self.focus = "images" if self.focus == "guests" else "guests"
        elif key in ("s", "S"):
            orders = ORDERS[self.focus]
            step = 1 if key == "s" else -1
            self.order[self.focus] = orders[
                (orders.index(self.order[self.focus]) + step) % len(orders)
            ]
        elif key in ("p", " "):
            self.paused = not self.paused
        elif key in ("?", "h"):
            self.helping = True

    def row(self, focus: Focus, names: Sequence[str]) -> int:
        """Return the index of the selected row, 0 if that row is gone."""
        selected = self.selected[focus]
        return names.index(selected) if selected in names else 0

    def _move(self, step: int, names: Sequence[str]) -> None:
        if names:
            row = self.row(self.focus, names) + step
            self.selected[self.focus] = names[max(0, min(row, len(names) - 1))]
