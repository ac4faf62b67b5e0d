"""The settings, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ewc_fast.demo.settings import BEST, METHODS, SCHEDULES, Settings

RESULTS = Path(__file__).parents[2] / "examples" / "results" / "search_digits.json"


@pytest.mark.parametrize("schedule", BEST)
@pytest.mark.parametrize("method", METHODS)
def test_the_demo_runs_the_best_that_the_search_found(schedule: str, method: str) -> None:
    results = json.loads(RESULTS.read_text())
    trials = results["trials"][schedule][method]
    best = max(trials, key=lambda trial: trial["mean_accuracy"])
    assert best == results["best"][schedule][method]
    fields = ("method", "lr", "schedule", "ewc_lambda", "damping")
    assert BEST[schedule][method] == Settings(**{name: best[name] for name in fields})


@pytest.mark.parametrize("schedule", BEST)
def test_every_method_had_as_many_trials_over_the_same_seeds(schedule: str) -> None:
    trials = json.loads(RESULTS.read_text())["trials"][schedule]
    assert len({len(trials[method]) for method in METHODS}) == 1
    for method in METHODS:
        settings = {tuple(t[k] for k in ("lr", "schedule", "ewc_lambda", "damping")) for t in trials[method]}
        assert len(settings) == len(trials[method])
        for trial in trials[method]:
            assert trial["seeds"] == [0, 1, 2] and len(trial["mean_accuracy_by_seed"]) == 3
            assert trial["mean_accuracy"] == pytest.approx(sum(trial["mean_accuracy_by_seed"]) / 3)


def test_schedules() -> None:
    assert [SCHEDULES["constant"](x) for x in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert [SCHEDULES["linear"](x) for x in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of plain, l2sp, ewc, got 'lwf'"):
        Settings("lwf", 1e-3)
    with pytest.raises(ValueError, match="schedule must be one of constant, linear, got 'cosine'"):
        Settings("ewc", 1e-3, "cosine")


def test_settings_are_shown_as_far_as_the_method_has_them() -> None:
    assert str(Settings("plain", 1e-5)) == "lr 1e-05, constant"
    assert str(Settings("l2sp", 1e-3, "linear", 0.1)) == "lr 0.001, linear, lambda 0.1"
    assert str(Settings("ewc", 1e-3, "linear", 100.0, 0.1)) == "lr 0.001, linear, lambda 100, damping 0.1"
