"""The documentation: no broken link in any Markdown file, and a site that `make docs` builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "examples", "benchmarks", "training")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The site of a folder, by the settings of `make docs`."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", ROOT / "docs", source, target]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def anchors(page: Path) -> set[str]:
    """The names by which GitHub and the site link to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_is_built_without_a_warning_and_holds_every_page_and_docstring(tmp_path):
    pytest.importorskip("sphinx"), pytest.importorskip("furo"), pytest.importorskip("myst_parser")
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "site").with_suffix(".md") for path in (tmp_path / "site").rglob("*.html")}
    assert {page.relative_to(ROOT) for page in PAGES} <= built
    api = (tmp_path / "site" / "docs" / "api.html").read_text()
    import sanrt

    names = {*sanrt.__all__} - {"__version__"}
    assert all(f'id="sanrt.{name}"' in api or f'id="sanrt.errors.{name}"' in api for name in names)


@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](#gone)", "[gone](../README.md#gone)"])
def test_a_broken_link_fails_the_build(link, tmp_path):
    pytest.importorskip("sphinx"), pytest.importorskip("furo"), pytest.importorskip("myst_parser")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("---\norphan: true\n---\n\n# Read me\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Pages\n\n{link}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "gone" in done.stderr
