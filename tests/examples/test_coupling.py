"""The comparison of the couplings: its trials and stages, that it goes on where it was, that the document shows it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ewc_fast import EWCLoss
from ewc_fast.demo.data import permuted_digits
from ewc_fast.demo.experiment import FISHER_SAMPLES, accuracies, make_model, shuffled_batches

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread_and_fresh_caches(coupling: ModuleType) -> Iterator[None]:
    torch.set_num_threads(1)
    coupling.after_first_task.cache_clear()
    yield
    coupling.after_first_task.cache_clear()


def _cell(coupling: ModuleType, *arguments: Any, every: int = 1) -> Any:
    return coupling.Cell(*arguments, every=every, num_tasks=2, epochs=1)


def _by_hand(optimizer: str, ewc_lambda: float, lr: float, damping: float, seed: int) -> list[float]:
    """Two tasks of an epoch each, the penalty in the loss."""
    tasks, model, order = permuted_digits(2, seed), make_model(seed), torch.Generator().manual_seed(seed)
    ewc = EWCLoss(model, ewc_lambda, damping=damping)
    for task in tasks:
        momentum = 0.9 if optimizer == "momentum" else 0.0
        step: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr, momentum)
        if optimizer == "AdamW":
            step = torch.optim.AdamW(model.parameters(), lr)
        for x, y in shuffled_batches(task, order):
            step.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + ewc() if ewc.num_tasks else loss).backward()
            step.step()
        if task is tasks[0]:
            ewc.consolidate([(task.train_inputs, task.train_labels)], kind="exact", num_samples=FISHER_SAMPLES)
    return accuracies(model, tasks)


@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.1), ("momentum", 0.03), ("AdamW", 3e-3)])
def test_coupled_is_the_penalty_in_the_loss(coupling: ModuleType, optimizer: str, lr: float) -> None:
    expected = _by_hand(optimizer, 10.0, lr, 0.1, seed=3)
    outcome = coupling.trial(_cell(coupling, optimizer, "coupled", 0.1, 10.0, lr), 3)
    assert outcome.mean_accuracy == pytest.approx(sum(expected) / 2, abs=0.02)  # a few of 397 samples may tip over
    assert not outcome.diverged


def test_lambda_0_is_plain_training(coupling: ModuleType) -> None:
    plain = coupling.trial(_cell(coupling, "momentum", "none", 0.0, 0.0, 0.03), 3)
    for name, every in (("coupled", 1), ("proximal", 4)):
        same = coupling.trial(_cell(coupling, "momentum", name, 0.1, 0.0, 0.03, every=every), 3)
        assert same.mean_accuracy == pytest.approx(plain.mean_accuracy, abs=0.02)


def test_a_strong_proximal_pull_keeps_the_old_task_and_learns_less(coupling: ModuleType) -> None:
    weak, strong = (
        coupling.trial(_cell(coupling, "SGD", "proximal", 0.1, ewc_lambda, 0.1), 3) for ewc_lambda in (1.0, 1e8)
    )
    assert strong.when_learnt < weak.when_learnt - 0.2
    first, _, _ = coupling.after_first_task("SGD", 0.1, 1, 3)
    kept = accuracies(first, permuted_digits(2, 3))  # with so strong a pull nothing moves
    assert strong.mean_accuracy == pytest.approx(sum(kept) / 2, abs=0.01)


@pytest.mark.parametrize("every", [1, 4])
def test_divergence_is_recorded(coupling: ModuleType, every: int) -> None:
    outcome = coupling.trial(_cell(coupling, "SGD", "coupled", 0.0, 1e8, 0.3, every=every), 0)
    assert outcome.diverged and outcome.mean_accuracy == pytest.approx(coupling.CHANCE)
    in_the_first_task = coupling.trial(_cell(coupling, "SGD", "proximal", 0.0, 1.0, 1e6), 0)
    assert in_the_first_task.diverged and in_the_first_task.when_learnt == pytest.approx(coupling.CHANCE)


def test_a_trial_does_not_depend_on_what_ran_before(coupling: ModuleType) -> None:
    cell = _cell(coupling, "AdamW", "proximal", 0.1, 100.0, 0.01)
    first = coupling.trial(cell, 5)
    coupling.trial(dataclasses.replace(cell, ewc_lambda=1e4), 5)
    again = coupling.trial(cell, 5)
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(again, seconds=0.0)


def test_a_fisher_that_overflows_counts_as_divergence(coupling: ModuleType) -> None:
    model, task = make_model(0), permuted_digits(1, 0)[0]
    ewc = EWCLoss(copy.deepcopy(model))
    assert coupling.consolidate(ewc, task)
    with torch.no_grad():
        for p in ewc.model.parameters():
            p.mul_(1e20)
    assert not coupling.consolidate(ewc, task)


def test_every_arm_has_as_many_trials(coupling: ModuleType) -> None:
    arms = coupling.arms()
    assert len(arms) == len(set(arms)) == 15
    assert {len(set(coupling.grid(arm))) for arm in arms} == {36}
    assert {cell.arm for cell in coupling.grid(arms[0])} == {arms[0]}
    for arm in arms:
        assert max(cell.lr for cell in coupling.grid(arm)) == coupling.RATES[arm.optimizer][-1]


@pytest.fixture
def small(coupling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Few cells, and trials that are drawn: a cell's accuracy is its own, a seed moves it a little."""
    monkeypatch.setattr(coupling, "LAMBDAS", (1.0, 100.0, 1e4))
    monkeypatch.setattr(coupling, "RATES", {"SGD": (0.1, 0.3), "AdamW": (0.001, 0.01)})
    monkeypatch.setattr(coupling, "PROMOTED", 2)

    def trial(cell: Any, seed: int) -> Any:
        accuracy = 0.7 * random.Random(repr(cell)).random() + 0.2 * random.Random(repr((cell, seed))).random()
        return coupling.Outcome(round(accuracy, 6), round(accuracy + 0.1, 6), accuracy < 0.2, 0.5)

    monkeypatch.setattr(coupling, "trial", trial)
    return coupling


def test_stages(small: ModuleType, tmp_path: Path) -> None:
    order: list[Any] = []
    draw = small.trial
    small.trial = lambda cell, seed: order.append((cell, seed)) or draw(cell, seed)
    trials = small.search(tmp_path / "trials.csv")
    assert len(order) == len(set(order)) == len(trials)
    first = small.stage_one()
    assert order[: len(first)] == first and len(first) == 10 * 6
    # The promoted are the best by the first seed, and of every arm equally many.
    second = order[len(first) : len(first) + 10 * 2 * 2]
    assert {seed for _, seed in second} == {1, 2}
    for arm in small.arms():
        chosen = {cell for cell, _ in second if cell.arm == arm}
        ranked = sorted(small.grid(arm), key=lambda cell: trials[cell, 0].mean_accuracy)
        assert chosen == set(ranked[-2:])
    # At the end all cells have three seeds, and the best of all have been looked at more closely.
    for arm in small.arms():
        best = max(small.grid(arm), key=lambda cell: sum(trials[cell, seed].mean_accuracy for seed in (0, 1, 2)))
        assert small.best_of(trials, arm) == best
        assert small.values(trials, best, small.FRESH_SEEDS) and small.values(trials, small.full(best), (10, 11, 12))
        assert all(small.values(trials, cell, (0, 1, 2)) for cell in small.every_cells(best))
    assert not small.to_do(trials)


def test_it_goes_on_where_it_was(small: ModuleType, tmp_path: Path) -> None:
    whole = small.search(tmp_path / "whole.csv")
    path = tmp_path / "trials.csv"
    assert small.search(path, deadline=0.0) == {} and not path.exists()
    lines = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    for count in (10, 90, len(lines) - 1):
        path.write_text("".join(lines[:count]))
        assert small.search(path) == whole
    assert path.read_text() == "".join(lines)
    assert small.read(path) == whole  # in the file as in memory


def test_tables(small: ModuleType, tmp_path: Path) -> None:
    trials = small.search(tmp_path / "trials.csv")
    arm = small.Arm("SGD", "proximal", 0.1)
    best = small.best_of(trials, arm)
    mean = sum(small.values(trials, best, (0, 1, 2))) / 3
    (row,) = (r for r in small.best_table(trials).splitlines() if r.startswith("| SGD | proximal | 0.1 |"))
    assert f"| {mean:.3f} ± " in row and f" {best.lr:g} |" in row
    (row,) = (r for r in small.range_table(trials).splitlines() if r.startswith("| SGD | proximal | 0.1 |"))
    good = [cell for cell in small.grid(arm) if small.mean(trials, cell) >= mean - 0.05]
    lost = [cell for cell in small.grid(arm) if any(trials[cell, seed].diverged for seed in (0, 1, 2))]
    assert f" {len(good)} of 6 |" in row and f" | {len(lost)} | " in row
    assert small.every_table(trials).count("\n") == 1 + 8
    rows = [{"optimizer": "SGD", "lr": 0.3, "largest_fisher": 0.02, "limit": 333.3}]
    lost = [x for x in small.LAMBDAS if trials[small.Cell("SGD", "coupled", 0.0, x, 0.3), 0].diverged]
    (row,) = small.limit_table(trials, rows).splitlines()[2:]
    assert row.startswith("| SGD | 0.3 | 0.02 | 3.3e+02 |") and (
        not lost or row.endswith(f"{small.number(min(lost))} |")
    )
    assert "not run" not in "".join(small.tables(trials, rows).values())
    # What was not run is said.
    for job in [job for job in trials if job[1] in small.FRESH_SEEDS]:
        del trials[job]
    assert "not run" in small.best_table(trials) and "not run" in small.pair_table(trials)
    assert (
        small.span([100.0, 1.0]) == "1 to 100"
        and small.span([1e4, 1e8]) == "1e4 to 1e8"
        and small.span([0.1, 0.1]) == "0.1"
    )


def test_the_document_shows_the_results(coupling: ModuleType) -> None:
    trials = coupling.read(coupling.RESULTS / "trials.csv")
    document = (ROOT / "docs" / "coupling.md").read_text()
    limits = json.loads((coupling.RESULTS / "setting.json").read_text())["limits"]
    for mark, text in coupling.tables(trials, limits).items():
        assert f"<!-- {mark}: begin -->\n{text}\n<!-- {mark}: end -->" in document


def test_the_limit_of_lambda(coupling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "RATES", {"SGD": (0.1,), "momentum": (0.03,), "AdamW": (0.001,)})
    monkeypatch.setattr(coupling, "EPOCHS", 1)
    for row, momentum in zip(coupling.limits(), (0.0, 0.9), strict=True):
        # A step of heavy ball on the largest entry alone, just below the limit and just above.
        for factor, shrinks in ((0.95, True), (1.05, False)):
            theta, velocity = 1.0, 0.0
            for _ in range(400):
                velocity = momentum * velocity + factor * row["limit"] * row["largest_fisher"] * theta
                theta -= row["lr"] * velocity
            assert (abs(theta) < 1) == shrinks
