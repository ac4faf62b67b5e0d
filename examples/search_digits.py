"""The search behind the demo's settings: each method's best mean accuracy at the end, by the same number of trials.

    python examples/search_digits.py --trials 20

It is done twice: with a constant learning rate, which is what the demo runs, and with one that falls linearly to 0 over
each task (``demo --schedule linear``).

A trial is one setting of a method, run with three seeds. The first three trials of a method are what earlier searches
found to work, the next four are drawn at random from the whole space, and the others change one or more entries of the
method's best so far. Plain fine-tuning has fewer settings to tune and as many trials, so it is searched more finely.
What was found is then run once with seeds that the search has not seen.

The trials of the methods take turns, and each is written to examples/results/ when it is done: the search may be
interrupted, and goes on where it was. A trial depends on the earlier ones of its method and schedule alone.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ewc_fast.demo import environment, metrics
from ewc_fast.demo.experiment import BATCH_SIZE, EPOCHS, FISHER_SAMPLES, run
from ewc_fast.demo.settings import METHODS, SCHEDULES, TITLES, Settings

RESULTS = Path(__file__).parent / "results" / "search_digits.json"
SEEDS = (0, 1, 2)
FRESH_SEEDS = (10, 11, 12, 13, 14)
NUM_RANDOM = 4

LR = (1e-6, 2e-2)
LAMBDA = {"plain": (0.0, 0.0), "l2sp": (1e-3, 1e1), "ewc": (1e0, 1e4)}
DAMPING = {"plain": (0.0,), "l2sp": (0.0,), "ewc": (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)}

KNOWN = {  # lr, lambda, damping
    "plain": [(1e-5, 0.0, 0.0), (4e-5, 0.0, 0.0), (1e-4, 0.0, 0.0)],
    "l2sp": [(3e-3, 0.02, 0.0), (5e-3, 0.03, 0.0), (9e-3, 0.02, 0.0)],
    "ewc": [(5e-3, 300.0, 0.1), (7e-3, 100.0, 0.1), (7e-3, 200.0, 0.05)],
}


def _log_uniform(low: float, high: float, rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _round(value: float) -> float:
    """To one significant digit: finer differences are within the spread."""
    return float(f"{value:.0e}")


def draw(method: str, schedule: str, rng: random.Random) -> Settings:
    """Settings from anywhere in the method's space."""
    lr = _round(_log_uniform(*LR, rng))
    ewc_lambda = 0.0 if method == "plain" else _round(_log_uniform(*LAMBDA[method], rng))
    return Settings(method, lr, schedule, ewc_lambda, rng.choice(DAMPING[method]))


def change(best: Settings, rng: random.Random) -> Settings:
    """Settings near given ones."""
    lr, ewc_lambda, damping = best.lr, best.ewc_lambda, best.damping
    if rng.random() < 0.6:
        lr = _round(min(max(lr * math.exp(rng.gauss(0.0, 0.6)), LR[0]), LR[1]))
    if best.method != "plain" and rng.random() < 0.6:
        low, high = LAMBDA[best.method]
        ewc_lambda = _round(min(max(ewc_lambda * math.exp(rng.gauss(0.0, 0.7)), low), high))
    if rng.random() < 0.5:
        steps = DAMPING[best.method]
        damping = steps[min(max(steps.index(damping) + rng.choice((-2, -1, 1, 2)), 0), len(steps) - 1)]
    return dataclasses.replace(best, lr=lr, ewc_lambda=ewc_lambda, damping=damping)


def propose(method: str, schedule: str, trials: list[dict[str, Any]]) -> Settings:
    """The method's next trial, one that it has not had."""
    index, num_known = len(trials), len(KNOWN[method])
    if index < num_known:
        lr, ewc_lambda, damping = KNOWN[method][index]
        return Settings(method, lr, schedule, ewc_lambda, damping)
    rng = random.Random(f"{method} {index}")
    seen = [settings_of(t) for t in trials]
    while True:
        at_random = index < num_known + NUM_RANDOM
        settings = draw(method, schedule, rng) if at_random else change(settings_of(best_of(trials)), rng)
        if settings not in seen:
            return settings


def evaluate(settings: Settings, seeds: tuple[int, ...]) -> dict[str, Any]:
    """One trial: accuracies over the seeds, and how long it took."""
    runs = [run(settings, seed) for seed in seeds]
    accuracy = [metrics.mean_accuracy(r.accuracy) for r in runs]
    learnt = [metrics.accuracy_when_learnt(r.accuracy) for r in runs]
    return {
        **dataclasses.asdict(settings),
        "mean_accuracy": sum(accuracy) / len(accuracy),
        "spread": metrics.spread(accuracy),
        "accuracy_when_learnt": sum(learnt) / len(learnt),
        "seeds": list(seeds),
        "mean_accuracy_by_seed": accuracy,
        "accuracy_when_learnt_by_seed": learnt,
        "seconds": round(sum(r.seconds for r in runs), 1),
    }


def settings_of(trial: dict[str, Any]) -> Settings:
    """A trial's settings."""
    return Settings(**{f.name: trial[f.name] for f in dataclasses.fields(Settings)})


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the best mean accuracy at the end; the first of equals."""
    return max(trials, key=lambda t: t["mean_accuracy"])


def write(results: dict[str, Any], path: Path) -> None:
    """Writes the results, and their trials as CSV beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    names = ["schedule", "method", "lr", "ewc_lambda", "damping", "mean_accuracy", "spread", "accuracy_when_learnt"]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for trial in (t for methods in results["trials"].values() for trials in methods.values() for t in trials):
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in trial.items()})


def main() -> None:
    """Runs the search, or what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="trials for each method and schedule (default 20)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write, and to go on from")
    options = parser.parse_args()

    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **environment.describe(),
        "protocol": {
            "num_tasks": 5,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "fisher_samples": FISHER_SAMPLES,
            "seeds": list(SEEDS),
        },
        "best": {},
        "fresh_seeds": {},
        "trials": done.get("trials", {schedule: {method: [] for method in METHODS} for schedule in SCHEDULES}),
    }
    rounds = [(s, index, method) for s in SCHEDULES for index in range(options.trials) for method in METHODS]
    for schedule, index, method in tqdm(rounds, unit="trial"):
        trials = results["trials"][schedule][method]
        if index >= len(trials):
            settings = propose(method, schedule, trials)
            trials.append(evaluate(settings, SEEDS))
            write(results, options.results)
            tqdm.write(f"{TITLES[method]:18} {settings}: {trials[-1]['mean_accuracy']:.4f}")
    for schedule, methods in results["trials"].items():
        results["best"][schedule] = best = {method: best_of(trials) for method, trials in methods.items()}
        results["fresh_seeds"][schedule] = {m: evaluate(settings_of(b), FRESH_SEEDS) for m, b in best.items()}
        for method, b in best.items():
            fresh = results["fresh_seeds"][schedule][method]["mean_accuracy"]
            print(f"{TITLES[method]:18} {b['mean_accuracy']:.4f} with {settings_of(b)}; fresh seeds {fresh:.4f}")
    write(results, options.results)


if __name__ == "__main__":
    main()
