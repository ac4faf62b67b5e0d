"""What the README shows works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ewc_fast import EWCLoss

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == README.count("```python") >= 3


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippets_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(SNIPPETS[index], f"README.md, snippet {index}", "exec"), namespace)
    ewc = namespace.get("ewc")
    if isinstance(ewc, EWCLoss):  # it acted
        assert ewc.num_tasks > 0 and ewc.ewc_lambda > 0


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets


def test_measured_figures_are_those_of_the_committed_file() -> None:
    path = re.search(r"\((benchmarks/results/[^)]+\.json)\)", README)
    assert path is not None
    times = json.loads((ROOT / path[1]).read_text())["times"]
    rows = re.findall(r"^\| ([^|]+?) \| ([0-9.]+) \|", README, flags=re.MULTILINE)
    shown = {name: figure for name, figure in rows if name in times}
    assert len(shown) >= 5
    for name, figure in shown.items():
        assert figure == f"{times[name]['median_ms']:.1f}", name
