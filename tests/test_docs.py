"""The documentation's site builds without a warning, and has what the repository's pages show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ewc_fast
import ewc_fast.fisher

ROOT = Path(__file__).resolve().parent.parent
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings", "griffe") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (site / name).exists(), name
    assert not (site / "hooks").exists()


def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "reference" / "index.html").read_text()
    names = [f"ewc_fast.{name}" for name in ewc_fast.__all__]
    names += [f"ewc_fast.fisher.{n}" for n in ewc_fast.fisher.__all__ if n not in ewc_fast.__all__]
    for name in names:
        assert f'id="{name}"' in reference, f"docs/reference.md has no {name}"
    assert "``" not in reference and not re.search(r":(class|func|meth|mod|attr):", reference)
    assert 'href="#ewc_fast.estimate_fisher"' in reference  # a role that became a link


def test_links_into_the_repository_work(site: Path) -> None:
    cost = (site / "cost" / "index.html").read_text()
    for target in re.findall(r'(?:href|src)="(\.\./repository/[^"]+)"', cost):
        assert (site / "cost" / target).resolve().exists(), target
    assert re.search(r'src="\.\./repository/benchmarks/results/[^"]+/time_by_peer\.png"', cost)
    pages = [path.read_text() for path in site.glob("*/index.html")]
    assert pages and not any(re.search(r'(?:href|src)="(\.\./)+(examples|benchmarks|csrc)/', page) for page in pages)
