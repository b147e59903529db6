# SPDX-License-Identifier: Apache-2.0
"""Every relative link and every named source file of the pages leads to something that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples/README.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = "accounting|bench|cache|dashboards|examples|faults|service|tests|tools|transport"
SOURCE = re.compile(rf"`((?:{ROOMS})/[\w./-]+\.\w+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text())]
    relative = [target for target in targets if target and "://" not in target]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_source_file_that_is_named_is_there(page: Path) -> None:
    named = SOURCE.findall(page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / target.partition("#")[0]) for target in LINK.findall(PAGES[0].read_text())}
    assert set((ROOT / "docs").glob("*.md")) - linked == set()
