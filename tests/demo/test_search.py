"""The search script: what it proposes, and that it goes on where it was."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("sklearn")

from ewc_fast.demo.experiment import Run  # noqa: E402
from ewc_fast.demo.settings import METHODS, SCHEDULES, Settings  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "search_digits.py"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with runs whose accuracy is best at lr 1e-3 and that cost nothing."""
    spec = importlib.util.spec_from_file_location("search_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_digits", module)
    spec.loader.exec_module(module)
    done: list[tuple[Settings, int]] = []

    def run(settings: Settings, seed: int) -> Run:
        done.append((settings, seed))
        accuracy = 1 - abs(settings.lr - 1e-3) + 1e-9 * seed
        return Run(settings, seed, [[0.0, 0.0], [0.5, 0.0], [accuracy, accuracy]])

    monkeypatch.setattr(module, "run", run)
    module.done = done  # type: ignore[attr-defined]
    return module


def _start(search: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, trials: int) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["search_digits.py", "--trials", str(trials), "--results", str(path)])
    search.main()
    return json.loads(path.read_text())


def test_an_interrupted_search_ends_as_one_that_was_not(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = _start(search, monkeypatch, tmp_path / "whole.json", 15)
    _start(search, monkeypatch, tmp_path / "parts.json", 4)
    before = len(search.done)
    parts = _start(search, monkeypatch, tmp_path / "parts.json", 15)
    assert parts["trials"] == whole["trials"] and parts["best"] == whole["best"]
    arms = len(METHODS) * len(SCHEDULES)
    assert len(search.done) - before == arms * (11 * len(search.SEEDS) + len(search.FRESH_SEEDS))
    assert len((tmp_path / "parts.csv").read_text().splitlines()) == 1 + 2 * 3 * 15


def test_the_best_trial_is_reported(search: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = _start(search, monkeypatch, tmp_path / "results.json", 20)
    for schedule, method in itertools.product(SCHEDULES, METHODS):
        trials = results["trials"][schedule][method]
        assert {trial["schedule"] for trial in trials} == {schedule}
        best = min(trials, key=lambda trial: abs(trial["lr"] - 1e-3))
        assert results["best"][schedule][method]["lr"] == best["lr"]
        assert results["fresh_seeds"][schedule][method]["lr"] == best["lr"]
        assert results["fresh_seeds"][schedule][method]["seeds"] == list(search.FRESH_SEEDS)


@pytest.mark.parametrize("method", METHODS)
def test_proposals_stay_in_the_space(search: ModuleType, method: str) -> None:
    rng = random.Random()
    settings = search.draw(method, "linear", rng)
    for _ in range(300):
        settings = search.change(settings, rng) if rng.random() < 0.9 else search.draw(method, "linear", rng)
        assert 1e-6 <= settings.lr <= 2e-2
        assert search.LAMBDA[method][0] <= settings.ewc_lambda <= search.LAMBDA[method][1]
        assert settings.damping in search.DAMPING[method]
        assert settings.method == method and settings.schedule == "linear"
