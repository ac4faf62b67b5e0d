"""What docs/frameworks.md shows works."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ewc_fast import EWCLoss

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
SNIPPETS = {
    title: re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    if "```" in section
}
NEEDS = {"Lightning": "lightning", "Accelerate": "accelerate", "Avalanche": "avalanche"}


def run(title: str) -> dict[str, Any]:
    if title in NEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies', as they are imported
            pytest.importorskip(NEEDS[title])
            if title == "Avalanche":
                import avalanche.training  # noqa: F401
    (snippet,) = SNIPPETS[title]
    namespace: dict[str, Any] = {}
    exec(compile(snippet, title, "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers", "ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:No loggers specified")
@pytest.mark.parametrize("title", SNIPPETS)
def test_snippets_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ewc = run(title)["ewc"]
    assert isinstance(ewc, EWCLoss) and ewc.num_tasks > 0
    if title == "Accelerate":
        assert list((tmp_path / "checkpoint").glob("custom_checkpoint_0.pkl"))
    if title in ("Lightning", "Avalanche"):
        assert ewc.num_tasks == 2
    else:
        assert ewc.last_penalty > 0


def test_every_section_is_run() -> None:
    assert all(len(snippets) == 1 for snippets in SNIPPETS.values())
    assert len(SNIPPETS) == DOCUMENT.read_text().count("```python") == 4


@pytest.fixture
def double() -> Iterator[None]:
    """In fp64 roundings stay far below the tolerances."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_the_plain_loop_is_right_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = run("Your own loop")
    torch.manual_seed(seed)
    whole, ewc = recipe["fine_tune"](2, path="whole.pt")
    torch.manual_seed(seed)
    recipe["fine_tune"](1, path="half.pt")
    resumed, later = recipe["fine_tune"](2, path="half.pt")
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(ewc.anchor[name], later.anchor[name]) for name in ewc.anchor)

    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    mean = torch.cat([f.flatten() for f in ewc.fisher.values()]).mean()
    for _ in range(2):
        for start in (0, 4):
            optimizer.zero_grad()
            for x, y in recipe["new_task"][start : start + 4]:
                (nn.functional.cross_entropy(plain(x), y) / 4).backward()
            for name, p in plain.named_parameters():
                (50.0 * ((ewc.fisher[name] + 0.1 * mean) * (p - ewc.anchor[name]) ** 2).sum()).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
    for p, q in zip(whole.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_the_package_imports_no_framework_and_a_missing_one_is_named() -> None:
    code = (
        "import sys, ewc_fast, ewc_fast.integrations\n"
        "names = 'lightning', 'pytorch_lightning', 'accelerate', 'avalanche', 'transformers', 'peft'\n"
        "assert not any(name in sys.modules for name in names)\n"
        "import importlib.abc\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in names: raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "for name in 'lightning', 'accelerate', 'avalanche', 'peft':\n"
        "    try: __import__('ewc_fast.integrations.' + name)\n"
        "    except ImportError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for extra in ("lightning", "accelerate", "avalanche", "hf"):
        assert f'in a checkout, pip install --no-build-isolation ".[{extra}]"' in out
        assert f"`{extra}`" in (DOCUMENT.parent / "install.md").read_text()
