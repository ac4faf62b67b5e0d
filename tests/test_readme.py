"""What the README and the documents show works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ewc_fast import EWCLoss

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
ELSEWHERE = ("frameworks.md",)  # whose snippets need optional packages: tests/integrations/test_frameworks.py
SNIPPETS = {
    f"{name}, snippet {i}": snippet
    for name, text in DOCUMENTS.items()
    if name not in ELSEWHERE
    for i, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
}


def test_there_are_snippets() -> None:
    here = [text for name, text in DOCUMENTS.items() if name not in ELSEWHERE]
    assert len(SNIPPETS) == sum(text.count("```python") for text in here) >= 3


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(SNIPPETS[name], name, "exec"), namespace)
    ewc = namespace.get("ewc")
    if isinstance(ewc, EWCLoss):  # it acted
        assert ewc.num_tasks > 0 and ewc.ewc_lambda > 0


def test_links_and_commands_exist() -> None:
    for name, text in DOCUMENTS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), f"{target} in {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets


def test_measured_figures_are_those_of_the_committed_results() -> None:
    """Those of README.md and docs/performance.md."""
    path = re.search(r"\((benchmarks/results/[^)]+)/time_by_peer.png\)", README)
    assert path is not None
    script = ROOT / "benchmarks" / "readme.py"
    command = [sys.executable, str(script), str(ROOT / path[1] / "results.json"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
