# SPDX-License-Identifier: Apache-2.0
"""The import contract fails when it is broken: a contract that checks nothing would pass for ever.

Each case is a small namespace of its own, with this repository's contract and one import in it.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
# The rooms of service, of its frontends and of transport, as folders.
ROOMS = [
    f"{container.removeprefix('cowshed.').replace('.', '/')}/{name}"
    for contract in CONTRACTS
    for container in contract.get("containers", ())
    for name in re.findall(r"\w+", " ".join(contract["layers"]))
]
HOLLOW = ("service", "service/frontends", "transport")  # which have no part that is in no room
PACKAGES = ("accounting", "cache", "faults", "service", "transport", *ROOMS)
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run the contract over tree/cowshed, which hides the installed packages of the same names."""
    shutil.copy(ROOT / "pyproject.toml", tree)
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in PACKAGES:
        package = tmp_path / "cowshed" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        if name not in HOLLOW:
            (package / "part.py").touch()
    return tmp_path


def test_imports_that_point_down_are_kept(tree: Path) -> None:
    (tree / "cowshed/service/cli/part.py").write_text(
        "".join(f"import cowshed.{name}.part\n" for name in PACKAGES[:3])
        + "import cowshed.service.frontends.nbd.part\nimport cowshed.transport.links.part\n"
    )
    (tree / "cowshed/faults/part.py").write_text("from cowshed.accounting import part\n")
    (tree / "cowshed/accounting/part.py").write_text("from cowshed.cache import part\n")
    result = lint(tree)
    assert result.returncode == 0, result.stdout
    assert "4 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("cache", "accounting"),
        ("cache", "service.images"),
        ("transport.guest", "faults"),
        ("faults", "transport.messages"),
        ("accounting", "faults"),
        ("accounting", "transport.links"),
        ("accounting", "service.guests"),
        ("service.guests", "service.frontends.unix"),
        ("service.frontends.network", "service.frontends.unix"),
        ("transport.messages", "transport.links"),
        ("transport.nbd", "transport.handoff"),
    ],
)
def test_import_that_points_up_or_aside_is_broken(tree: Path, importer: str, imported: str) -> None:
    # Inside a function: a late import is an import too.
    (tree / "cowshed" / importer.replace(".", "/") / "part.py").write_text(
        f"def use() -> None:\n    from cowshed.{imported} import part\n"
    )
    result = lint(tree)
    assert result.returncode != 0
    assert f"cowshed.{importer}.part -> cowshed.{imported}.part" in result.stdout
