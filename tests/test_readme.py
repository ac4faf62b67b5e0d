"""What the README and the documents show works, and the Chinese README shows the same."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ewc_fast import EWCLoss
from ewc_fast.bench.fisher import report as fisher_report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINKED = {**DOCUMENTS, "README.zh-CN.md": CHINESE}
ELSEWHERE = {"frameworks.md", "trainer.md"}  # their snippets need optional packages: tests/integrations
SNIPPETS = {
    f"{name}, snippet {i}": snippet
    for name, text in DOCUMENTS.items()
    if name not in ELSEWHERE
    for i, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
}
WITHOUT_SNIPPETS = {
    "cost.md",
    "coupling.md",
    "demo.md",
    "design.md",
    "gpu.md",
    "install.md",
    "language-model.md",
    "performance.md",
}
OPTIONAL = {"accelerate", "avalanche", "lightning", "peft", "transformers", "trl"}  # packages that snippets may need
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
GENERATED = {"reference.md"}  # its headings come from the docstrings; tests/test_docs.py builds it


def test_there_are_snippets() -> None:
    here = {name: text for name, text in DOCUMENTS.items() if name not in ELSEWHERE}
    assert len(SNIPPETS) == sum(text.count("```python") for text in here.values()) >= 3
    with_snippets = {name.partition(",")[0] for name in SNIPPETS}
    assert with_snippets == here.keys() - WITHOUT_SNIPPETS - GENERATED


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    try:
        exec(compile(SNIPPETS[name], name, "exec"), namespace)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    ewc = namespace.get("ewc")
    if isinstance(ewc, EWCLoss):  # it acted
        assert ewc.num_tasks > 0 and ewc.ewc_lambda > 0


def anchors(text: str) -> set[str]:
    """What headings are called in a link."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_commands_exist() -> None:
    for name, text in LINKED.items():
        folder = ROOT if name.startswith("README") else ROOT / "docs"
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
            path = folder / (target or name)
            assert path.exists(), f"{target} in {name}"
            if anchor and path.name not in GENERATED:
                assert anchor in anchors(path.read_text()), f"{target}#{anchor} in {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for text in LINKED.values():
        shown = "\n".join(code for language, code in FENCED.findall(text) if language == "bash")
        assert set(re.findall(r"^make ([a-z-]+)", shown, flags=re.MULTILINE)) <= targets
        assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_measured_figures_are_those_of_the_committed_results() -> None:
    """Those of README.md, docs/cost.md, docs/performance.md, docs/gpu.md and the pages with results of their own."""
    path = re.search(r"\(\.\./(benchmarks/results/[^)]+)/time_by_peer.png\)", DOCUMENTS["cost.md"])
    assert path is not None
    script = ROOT / "benchmarks" / "readme.py"
    for folder in (path[1], "benchmarks/results/nvidia_h100_80gb_hbm3"):
        command = [sys.executable, str(script), str(ROOT / folder / "results.json"), "--check"]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_the_figures_in_bf16_are_those_of_the_committed_results() -> None:
    results = fisher_report.read_json(ROOT / "benchmarks/results/intel_xeon_2_of_16_cores/fisher/results.json")
    told = re.search(r"<!-- bf16: begin -->\n(.*)\n<!-- bf16: end -->", DOCUMENTS["fisher.md"], re.DOTALL)
    assert told is not None and told[1] == fisher_report.language_table(results["language"])


# ---- README.zh-CN.md ----


def test_the_chinese_readme_has_the_same_commands_and_snippets() -> None:
    assert FENCED.findall(CHINESE) == FENCED.findall(README) and len(FENCED.findall(README)) == 3
    inline = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
    assert Counter(inline.findall(FENCED.sub("", CHINESE))) == Counter(inline.findall(FENCED.sub("", README)))


def test_the_chinese_readme_has_the_same_figures() -> None:
    """Fails after the English one was written from new results: then the figures here have to follow."""
    figure = re.compile(r"\d+(?:[.,]\d+)*")
    for part in (r"^\|.*$", r".*"):  # tables row by row, then all of it
        rows = [re.findall(part, FENCED.sub("", text), flags=re.MULTILINE) for text in (CHINESE, README)]
        chinese, english = ([figure.findall(row) for row in text] for text in rows)
        if part == ".*":
            chinese, english = ([[f for row in text for f in row]] for text in (chinese, english))
        for ours, theirs in zip(chinese, english, strict=True):
            assert Counter(ours) == Counter(theirs)


def test_the_readmes_link_to_each_other_and_to_the_same_pages() -> None:
    link = re.compile(r"\]\(([^)]+)\)")
    assert "](README.zh-CN.md)" in README and "](README.md)" in CHINESE
    assert Counter(link.findall(CHINESE)) - Counter(["README.md"]) == Counter(link.findall(README)) - Counter(
        ["README.zh-CN.md"]
    )


def test_the_readme_is_a_screen() -> None:
    assert README.count("\n") <= 120 and CHINESE.count("\n") <= 120
