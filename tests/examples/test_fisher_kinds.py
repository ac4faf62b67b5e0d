"""The comparison of the kinds: its arithmetic, that it goes on where it was, and that the document shows it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_compare(fisher_kinds: ModuleType) -> None:
    reference = {"w": torch.rand(3, 4, dtype=torch.float64), "b": torch.rand(5, dtype=torch.float64)}
    twice = fisher_kinds.compare({name: 2 * t for name, t in reference.items()}, reference)
    assert twice == pytest.approx(
        {"trace": 2.0, "rank_correlation": 1.0, "relative_error": 1.0, "scaled_error": 0.0}, abs=1e-7
    )
    other = {name: torch.rand_like(t) for name, t in reference.items()}
    f, r = (torch.cat([m["w"].flatten(), m["b"]]) for m in (other, reference))
    best = torch.linalg.lstsq(f[:, None], r[:, None]).solution.item()  # the best scaling of f
    assert fisher_kinds.compare(other, reference)["scaled_error"] == pytest.approx(
        ((best * f - r).norm() / r.norm()).item()
    )
    ranks = np.corrcoef(f.argsort().argsort(), r.argsort().argsort())[0, 1]
    assert fisher_kinds.compare(other, reference)["rank_correlation"] == pytest.approx(ranks)


def test_difference(fisher_kinds: ModuleType) -> None:
    reference = torch.rand(6).tolist()
    assert fisher_kinds.difference([x + 0.5 for x in reference], reference).endswith(", better")
    assert fisher_kinds.difference([x - 0.5 for x in reference], reference) == "-0.500 ± 0.000, worse"
    assert fisher_kinds.difference([0.1, -0.1, 0.2, -0.1], [0.0] * 4).endswith(", tie")


def test_fill(fisher_kinds: ModuleType, tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text("a\n<!-- t: begin -->\nold\n<!-- t: end -->\nb\n")
    fisher_kinds.fill(document, "t", "new\nlines\n")
    assert document.read_text() == "a\n<!-- t: begin -->\nnew\nlines\n<!-- t: end -->\nb\n"
    with pytest.raises(ValueError, match="has no marks <!-- u: begin -->"):
        fisher_kinds.fill(document, "u", "")


def _quick(fisher_kinds: ModuleType, folder: Path, *arguments: str) -> dict[str, Any]:
    fisher_kinds.main(["--quick", "--processes", "1", "--out", str(folder), *arguments])
    return json.loads((folder / "results.json").read_text())


def test_quick_run_goes_on_where_it_was(
    fisher_kinds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("exact", "empirical", "exact, all")
    monkeypatch.setattr(fisher_kinds, "ESTIMATES", {name: fisher_kinds.ESTIMATES[name] for name in names})
    first = _quick(fisher_kinds, tmp_path, "--minutes", "0")
    assert not first["trials"] and {r["estimate"] for r in first["values"]} == set(names)
    results = _quick(fisher_kinds, tmp_path)
    assert [(t["estimate"], t["ewc_lambda"]) for t in results["trials"]] == [
        (name, ewc_lambda) for name in names for ewc_lambda in (100.0, 1000.0)
    ]
    assert results["values"] == first["values"]
    assert all(0.3 < t["mean_accuracy"] < 1 for t in results["trials"])
    # A run does not depend on what ran before it: from scratch the same.
    fisher_kinds.after_first_task.cache_clear()
    job = results["trials"][-1]
    assert fisher_kinds.trial({k: v for k, v in job.items() if k not in ("mean_accuracy", "by_seed")}) == job
    rows = (tmp_path / "trials.csv").read_text().splitlines()
    assert rows[0] == "estimate,damping,ewc_lambda,lr,mean_accuracy" and len(rows) == 1 + len(results["trials"])


def test_the_document_shows_the_results(fisher_kinds: ModuleType) -> None:
    results = json.loads((fisher_kinds.RESULTS / "results.json").read_text())
    document = (ROOT / "docs" / "fisher.md").read_text()
    for epochs in (1, 15):
        assert fisher_kinds.value_table(results["values"], epochs) in document
    for damping in fisher_kinds.LEARNING_RATES:
        assert fisher_kinds.accuracy_table(results, damping) in document
