"""The calibration: what it measures, on small models against plain arithmetic, and that the document shows it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


def _setting(calibration: ModuleType, model: nn.Module, causal: bool, data: Any, **changes: Any) -> Any:
    loss = "causal_lm" if causal else "cross_entropy"
    values = {
        "estimates": {"empirical": ([data[0] if causal else data], {"kind": "empirical", "loss": loss})},
        "fisher_data": data,
        "held_out": data,
        "new_batches": lambda seed: iter([data] * 3),
        "probe_samples": {"all": (data[0], {})},
        "plans": [],
        "steps": (1, 3),
    }
    return calibration.Setting("x", model, causal, **(values | changes))


def test_orders_of_the_loss(calibration: ModuleType) -> None:
    """For a model that is linear in its weights: g.d from autograd, the quadratic from the whole Fisher matrix."""
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    watch = calibration.Watch(_setting(calibration, model, False, (x, y)), 0)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), tuple(model.parameters()))
    steps = [torch.randn_like(p) for p in model.parameters()]
    fisher = torch.zeros(15, 15, dtype=torch.float64)
    for row in x:
        log_probs = model(row).log_softmax(-1)
        for log_prob in log_probs:
            g = torch.cat([t.flatten() for t in torch.autograd.grad(log_prob, model.parameters(), retain_graph=True)])
            fisher += log_prob.exp().detach() * torch.outer(g, g) / len(x)
    d = torch.cat([s.flatten() for s in steps])
    with torch.no_grad():
        for p, step in zip(model.parameters(), steps, strict=True):
            p += step
    row = watch.look()
    assert row["first"] == pytest.approx(sum((g * s).sum() for g, s in zip(gradients, steps, strict=True)).item())
    assert row["full"] == pytest.approx((d @ fisher @ d / 2).item())
    assert row["measured"] == pytest.approx(row["measured_on_fisher_data"])
    assert row["probe"]["all"][0] == pytest.approx(row["kl"], rel=1e-6)


def test_a_language_model_is_measured_by_token(calibration: ModuleType) -> None:
    model = calibration.make_language_model(0, quick=True)
    tokens = torch.randint(256, (5, 9))
    watch = calibration.Watch(_setting(calibration, model, True, (tokens, tokens)), 0)
    old = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
        losses = [m(tokens, labels=tokens).loss.item() for m in (old, model)]
    row = watch.look()
    assert row["measured"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    # On given text the probe is the rise of the loss.
    assert row["probe"]["all"][0] == pytest.approx(row["measured"], abs=1e-5)
    assert row["predicted"]["empirical"] > 0


@pytest.mark.parametrize("penalised", [False, True])
def test_fine_tuning_starts_from_the_anchor_and_pulls_back(calibration: ModuleType, penalised: bool) -> None:
    data = (torch.randn(8, 4), torch.randint(3, (8,)))
    setting = _setting(calibration, nn.Linear(4, 3), False, data)
    watch = calibration.Watch(setting, 0)
    plan = calibration.Plan(0.1, 1e4 if penalised else 0.0, "empirical")
    rows = [calibration.fine_tune(watch, plan, 0) for _ in range(2)]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == [1, 3]
    free = calibration.fine_tune(watch, calibration.Plan(0.1), 0)
    assert (rows[0][1]["predicted"]["empirical"] < free[1]["predicted"]["empirical"]) is penalised
    assert str(plan) == ("EWC empirical 10000, lr 0.1" if penalised else "plain, lr 0.1")


def test_tables(calibration: ModuleType) -> None:
    def row(run: str, measured: float, predicted: float) -> dict[str, Any]:
        return {
            **{"setting": "s", "seed": 0, "run": run, "measured": measured, "standard_error": 0.001},
            **{"predicted": {"exact": predicted, "other": 1.0}, "probe": {"p": [2 * measured, 0.1]}},
            **{"full": measured, "kl": measured, "first": 0.0, "measured_on_fisher_data": measured},
        }

    rows = [row("noise", 0.02, 0.02), row("noise", 0.04, 0.01), row("noise", 0.002, 9.0), row("plain, lr 1", 2.0, 0.2)]
    table = calibration.prediction_table(rows, "s").splitlines()
    assert table[0] == "| Fisher | noise, 0.01 to 0.1 |"  # one point, and one below what is counted, are left out
    assert table[2] == f"| exact | {(1 + 0.25) / 2:.2g} (50%) |"
    assert table[-1] == "| *points* | 2 |"
    assert calibration.probe_table(rows).splitlines()[2] == "| s | p | 2 (100%) |  |  |"
    assert calibration.anatomy_table(rows).splitlines()[2].startswith("| s | noise | 0.62 | 1 | 1 | 0 | 1 |")
    assert calibration.group_of("EWC exact 10, lr 1") == "penalty"


def test_quick_run_goes_on_where_it_was(calibration: ModuleType, tmp_path: Path) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    calibration.main([*arguments, "--minutes", "0"])
    calibration.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["done"] == ["digits 1 0", "language model 0"]
    runs = {(r["setting"], r["run"]) for r in results["rows"]}
    assert len(runs) == 2 + 8 + 7
    for r in results["rows"]:
        values = [r["measured"], r["first"], r["full"], r["kl"], *r["predicted"].values()]
        assert all(math.isfinite(v) for v in values) and r["full"] >= 0
    before = (tmp_path / "results.json").read_bytes()
    calibration.main(arguments)
    assert json.loads(before) == json.loads((tmp_path / "results.json").read_text())
    calibration.draw(results["rows"]).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_shows_the_results(calibration: ModuleType) -> None:
    rows = json.loads((calibration.RESULTS / "results.json").read_text())["rows"]
    document = (ROOT / "docs" / "fisher.md").read_text()
    for setting in {r["setting"] for r in rows}:
        assert calibration.prediction_table(rows, setting) in document
    assert calibration.anatomy_table(rows) in document
    assert calibration.probe_table(rows) in document
    for setting, steps in calibration.STEPS_SHOWN.items():
        assert calibration.run_table(rows, setting, steps) in document
