# SPDX-License-Identifier: Apache-2.0
"""The C's includes obey the same contract as the Python's imports: they point down.

The layers are those of the import contract in pyproject.toml, so that there is one list.
"""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
LAYERS = [
    re.findall(r"cowshed\.(\w+)", layer)
    for contract in CONTRACTS
    if contract["id"] == "layers"
    for layer in contract["layers"]
]
DEPTHS = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]*)"', re.MULTILINE)


def wrong_includes(root: Path) -> list[str]:
    """Includes of the rooms' C files that point up or aside, or at no file, each as a line."""
    wrong = []
    for room in DEPTHS:
        for path in sorted((root / room).rglob("*.[ch]")):
            for included in INCLUDE.findall(path.read_text()):
                other = included.partition("/")[0]
                if not (root / included).is_file() or other not in DEPTHS:
                    fault = "is no file below the root"
                elif other != room and DEPTHS[other] <= DEPTHS[room]:
                    fault = "does not lie below it"
                else:
                    continue
                wrong.append(f"{path.relative_to(root)}: {included} {fault}")
    return wrong


def test_includes_point_down() -> None:
    assert wrong_includes(ROOT) == []
    assert list(ROOT.glob("*/core/*.c"))


def test_the_request_engine_knows_no_frontend() -> None:
    engine = ROOT / "transport/core/blocks"
    includes = [
        each for path in engine.glob("*.[ch]") for each in INCLUDE.findall(path.read_text())
    ]
    ours = [each for each in includes if each.startswith("transport/")]
    assert ours
    assert [each for each in ours if not each.startswith("transport/core/blocks/")] == []


@pytest.mark.parametrize(
    ("room", "included", "fault"),
    [
        ("cache", "accounting/core/a.h", "does not lie below it"),
        ("accounting", "faults/core/a.h", "does not lie below it"),
        ("faults", "transport/core/a.h", "does not lie below it"),
        ("transport", "faults/core/a.h", "does not lie below it"),
        ("cache", "core/a.h", "is no file below the root"),
        ("cache", "a.h", "is no file below the root"),
        ("cache", "cache/core/none.h", "is no file below the root"),
        ("transport", "accounting/core/a.h", None),
        ("faults", "accounting/core/a.h", None),
        ("accounting", "cache/core/a.h", None),
    ],
)
def test_each_wrong_include_is_found(
    tmp_path: Path, room: str, included: str, fault: str | None
) -> None:
    for each in DEPTHS:
        core = tmp_path / each / "core"
        core.mkdir(parents=True)
        (core / "a.h").write_text(f'#include <errno.h>\n#include "{each}/core/a.h"\n')
    (tmp_path / room / "core/b.c").write_text(f'#include "{included}"\n')
    expected = [f"{room}/core/b.c: {included} {fault}"] if fault else []
    assert wrong_includes(tmp_path) == expected
