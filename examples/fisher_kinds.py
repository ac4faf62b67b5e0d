"""How the kinds of Fisher differ: in value, and in the accuracy that EWC reaches with each.

    python examples/fisher_kinds.py

After van de Ven (2025, arXiv:2502.11756), who compared them on split MNIST; here it is the demo's setting, five tasks
of permuted digits. Two questions:

- *Values.* After the first task, each estimate beside the exact Fisher over all 1,400 training samples: its trace, its
  rank correlation, and how far off it is in direction, that is after the best scaling. Once after one epoch, while the
  network is still unsure, and once after 15, when it is certain of every training sample.
- *Accuracy.* EWC with each estimate over one grid, the same for all: lambda in powers of ten, two learning rates, three
  seeds; and at one of the learning rates again with a damping of 0.1. The best cell of each is then run once with seeds
  that the grid has not seen.

Each trial is written to examples/results/fisher_kinds/ when it is done: the search may be interrupted, and goes on
where it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from ewc_fast import EWCLoss, estimate_fisher, plotting, train
from ewc_fast.demo import environment, metrics
from ewc_fast.demo.data import NUM_TRAIN, Task, permuted_digits
from ewc_fast.demo.experiment import (
    BATCH_SIZE,
    EPOCHS,
    FISHER_SAMPLES,
    accuracies,
    make_model,
    make_optimizer,
    shuffled_batches,
)
from ewc_fast.demo.settings import Settings
from ewc_fast.fisher import FisherDiagonal

RESULTS = Path(__file__).parent / "results" / "fisher_kinds"
DOCS = Path(__file__).parents[1] / "docs"
SEEDS = (0, 1, 2)
FRESH_SEEDS = (10, 11, 12, 13, 14, 15)
LAMBDAS = tuple(10.0**power for power in range(-2, 7))
LEARNING_RATES = {0.0: (2e-3, 5e-3), 0.1: (5e-3,)}  # by the damping
NUM_TASKS = 5


@dataclass(frozen=True)
class Estimate:
    """One way to estimate the Fisher of a task: arguments of ``estimate_fisher``."""

    kind: str
    num_samples: int = FISHER_SAMPLES
    batch_size: int = FISHER_SAMPLES
    num_label_samples: int = 1

    def __call__(self, model: nn.Module, task: Task, seed: int) -> FisherDiagonal:
        """The estimate on the first samples of ``task``; ``seed`` is that of the drawn labels."""
        inputs, labels = task.train_inputs[: self.num_samples], task.train_labels[: self.num_samples]
        return estimate_fisher(
            model,
            list(zip(inputs.split(self.batch_size), labels.split(self.batch_size), strict=True)),
            kind=self.kind,
            num_label_samples=self.num_label_samples,
            generator=torch.Generator().manual_seed(seed),
        )


REFERENCE = Estimate("exact", NUM_TRAIN)
ESTIMATES = {
    "exact": Estimate("exact"),
    "sampled, 1 label": Estimate("sampled"),
    "sampled, 10 labels": Estimate("sampled", num_label_samples=10),
    "empirical": Estimate("empirical"),
    "predicted": Estimate("predicted"),
    "reversed": Estimate("reversed"),
    "batch of 32": Estimate("batch", batch_size=32),
    "batch of 128": Estimate("batch", batch_size=128),
    "exact, all": REFERENCE,
    "empirical, all": Estimate("empirical", NUM_TRAIN),
    "batch of 128, all": Estimate("batch", NUM_TRAIN, batch_size=128),
}
_DRAWN = [n for n in ESTIMATES if n not in ("sampled, 10 labels", "empirical, all", "batch of 128, all")]


# ---- values ----


def learn(model: nn.Module, task: Task, lr: float, epochs: int, order: torch.Generator, ewc: EWCLoss | None) -> None:
    """One task with a fresh Adam, as the demo does it."""
    optimizer = make_optimizer(model, Settings("ewc", lr))
    handle = ewc.attach(optimizer) if ewc is not None else None
    for _ in range(epochs):
        train(model, shuffled_batches(task, order), optimizer, nn.functional.cross_entropy, "cpu", ewc)
    if handle is not None:
        handle.remove()


def compare(fisher: FisherDiagonal, reference: FisherDiagonal) -> dict[str, float]:
    """How near an estimate is to the reference, over all entries.

    Returns:
        trace: The estimate's over the reference's.
        rank_correlation: Spearman's.
        relative_error: Norm of the difference over the reference's norm.
        scaled_error: The same after the estimate has been multiplied by what makes it smallest: 0 to 1.
    """
    f, r = (torch.cat([m[name].double().flatten() for name in reference]).numpy() for m in (fisher, reference))
    cosine = f @ r / (np.linalg.norm(f) * np.linalg.norm(r))
    return {
        "trace": float(f.sum() / r.sum()),
        "rank_correlation": float(spearmanr(f, r).statistic),
        "relative_error": float(np.linalg.norm(f - r) / np.linalg.norm(r)),
        "scaled_error": float(np.sqrt(max(0.0, 1 - cosine**2))),
    }


def value_rows(seed: int, epochs: int) -> list[dict[str, Any]]:
    """Every estimate of the first task's Fisher after so many epochs of it."""
    task = permuted_digits(1, seed)[0]
    model = make_model(seed)
    learn(model, task, LEARNING_RATES[0.0][-1], epochs, torch.Generator().manual_seed(seed), None)
    reference = REFERENCE(model, task, seed)
    trace = float(sum(t.double().sum() for t in reference.values()))
    return [
        {"epochs": epochs, "seed": seed, "estimate": name, "reference_trace": trace}
        | compare(estimate(model, task, seed), reference)
        for name, estimate in ESTIMATES.items()
    ]


# ---- accuracy ----


@functools.lru_cache
def after_first_task(lr: float, epochs: int, seed: int) -> tuple[nn.Module, torch.Generator]:
    """The network and the order of samples after the first task, which no penalty touches; copy it, change nothing."""
    model, order = make_model(seed), torch.Generator().manual_seed(seed)
    learn(model, permuted_digits(1, seed)[0], lr, epochs, order, None)
    return model, order


def accuracy_of(job: dict[str, Any], seed: int) -> float:
    """Mean accuracy over all tasks at the end of one run."""
    lr, num_tasks, epochs = job["lr"], job["num_tasks"], job["epochs"]
    tasks = permuted_digits(num_tasks, seed)
    first, first_order = after_first_task(lr, epochs, seed)
    model, order = copy.deepcopy(first), torch.Generator()
    order.set_state(first_order.get_state())
    ewc = EWCLoss(model, job["ewc_lambda"], damping=job["damping"])
    for index in range(1, num_tasks):
        ewc.consolidate(fisher=ESTIMATES[job["estimate"]](model, tasks[index - 1], 1000 * seed + index))
        learn(model, tasks[index], lr, epochs, order, ewc)
    return metrics.mean_accuracy([accuracies(model, tasks)])


def trial(job: dict[str, Any]) -> dict[str, Any]:
    """One cell of the grid, over its seeds."""
    values = [accuracy_of(job, seed) for seed in job["seeds"]]
    return {**job, "mean_accuracy": float(np.mean(values)), "by_seed": values}


def best_of(trials: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The cell of the best mean accuracy; the first of equals."""
    return max(trials, key=lambda t: t["mean_accuracy"])


def select(trials: Iterable[dict[str, Any]], estimate: str, damping: float) -> list[dict[str, Any]]:
    """The trials of one estimate."""
    return [t for t in trials if t["estimate"] == estimate and t["damping"] == damping]


CELL = ("estimate", "damping", "ewc_lambda", "lr")


def missing(jobs: Iterable[dict[str, Any]], trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The jobs whose cell is not among the trials."""
    done = {tuple(t[key] for key in CELL) for t in trials}
    return [job for job in jobs if tuple(job[key] for key in CELL) not in done]


# ---- what is shown ----


def value_table(rows: list[dict[str, Any]], epochs: int) -> str:
    """Markdown: each estimate after so many epochs, mean over the seeds; the trace as its range."""
    lines = [
        "| estimate | trace / exact | rank correlation | relative error | error after the best scaling |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ESTIMATES:
        mine = [r for r in rows if r["estimate"] == name and r["epochs"] == epochs]
        traces = sorted(r["trace"] for r in mine)
        mean = {key: np.mean([r[key] for r in mine]) for key in ("rank_correlation", "relative_error", "scaled_error")}
        spread = " to ".join(dict.fromkeys(f"{trace:.2g}" for trace in (traces[0], traces[-1])))
        lines.append(
            f"| {name} | {spread} | {mean['rank_correlation']:.2f} | {mean['relative_error']:.2g} | "
            f"{mean['scaled_error']:.2f} |"
        )
    return "\n".join(lines)


def difference(mine: list[float], reference: list[float]) -> str:
    """Mean difference on the same seeds and its standard error, and in words: a tie if it is less than two of them."""
    differences = np.subtract(mine, reference)
    mean, error = differences.mean(), metrics.spread(differences.tolist()) / len(differences) ** 0.5
    word = "tie" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse"
    return f"{mean:+.3f} ± {error:.3f}, {word}"


def accuracy_table(results: dict[str, Any], damping: float) -> str:
    """Markdown: the best cell of each estimate, and how it did on seeds that the grid has not seen."""
    lines = [
        "| estimate | best of the grid | at lambda | lr | fresh seeds | less `exact, all` there |",
        "|---|---:|---:|---:|---:|---|",
    ]
    (reference,) = select(results["fresh"], "exact, all", damping)
    for name in ESTIMATES:
        best = best_of(select(results["trials"], name, damping))
        (fresh,) = select(results["fresh"], name, damping)
        against = "" if fresh is reference else difference(fresh["by_seed"], reference["by_seed"])
        lines.append(
            f"| {name} | {best['mean_accuracy']:.3f} ± {metrics.spread(best['by_seed']):.3f} | "
            f"{best['ewc_lambda']:g} | {best['lr']:g} | "
            f"{fresh['mean_accuracy']:.3f} ± {metrics.spread(fresh['by_seed']):.3f} | {against} |"
        )
    return "\n".join(lines)


def draw(trials: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over lambda, each at its better learning rate."""
    curves = {}
    for name in _DRAWN:
        mine = select(trials, name, 0.0)
        lambdas = sorted({t["ewc_lambda"] for t in mine})
        curves[name] = (lambdas, [best_of(t for t in mine if t["ewc_lambda"] == x)["mean_accuracy"] for x in lambdas])
    figure = plotting.accuracy_over_lambda(
        curves, caption="Permuted digits, mean of three seeds, the better of two learning rates; no damping."
    )
    figure.savefig(path, dpi=120)


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json, values.csv and trials.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "results.json.tmp"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(folder / "results.json")
    columns = {"values": list(results["values"][0]) if results["values"] else [], "trials": _TRIAL_COLUMNS}
    for name, fields in columns.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in results[name])


_TRIAL_COLUMNS = [*CELL, "mean_accuracy"]


def fill(document: Path, mark: str, text: str) -> None:
    """Replaces what stands between ``<!-- mark: begin -->`` and ``<!-- mark: end -->``.

    Raises:
        ValueError: The marks are not there.
    """
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    old = document.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{document} has no marks {begin.strip()} and {end}")
    head, rest = old.split(begin, 1)
    document.write_text(head + begin + text.rstrip("\n") + "\n" + end + rest.split(end, 1)[1])


def fill_document(results: dict[str, Any], document: Path) -> None:
    """Writes the tables into the document."""
    for epochs in sorted({r["epochs"] for r in results["values"]}):
        fill(document, f"values {epochs}", value_table(results["values"], epochs))
    for damping in sorted({t["damping"] for t in results["trials"]}):
        fill(document, f"accuracy {damping:g}", accuracy_table(results, damping))


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_jobs(
    jobs: list[dict[str, Any]], processes: int, done: Callable[[dict[str, Any]], None], deadline: float
) -> bool:
    """Runs trials, ``done`` after each; returns whether all were run before the deadline."""
    if processes == 1:
        for job in jobs:
            if time.monotonic() > deadline:
                return False
            done(trial(job))
        return True
    with multiprocessing.get_context("spawn").Pool(processes, _one_thread) as pool:
        for start in range(0, len(jobs), 2 * processes):
            if time.monotonic() > deadline:
                return False
            for result in pool.imap_unordered(trial, jobs[start : start + 2 * processes]):
                done(result)
    return True


def main(arguments: list[str] | None = None) -> None:
    """Computes what is missing of the results, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    parser.add_argument("--processes", type=int, default=2, help="each with one thread (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; call again to go on")
    parser.add_argument("--docs", type=Path, help="folder of fisher.md, to write the tables and the picture there")
    parser.add_argument("--quick", action="store_true", help="two tasks, one epoch, one seed: seconds, to see it work")
    options = parser.parse_args(arguments)

    _one_thread()
    deadline = time.monotonic() + 60 * options.minutes
    seeds, fresh_seeds = (SEEDS[:1], FRESH_SEEDS[:1]) if options.quick else (SEEDS, FRESH_SEEDS)
    lambdas, rates = (LAMBDAS[4:6], {0.0: (5e-3,)}) if options.quick else (LAMBDAS, LEARNING_RATES)
    value_epochs = (1,) if options.quick else (1, EPOCHS)
    protocol = {"num_tasks": 2 if options.quick else NUM_TASKS, "epochs": 1 if options.quick else EPOCHS}

    path = options.out / "results.json"
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **environment.describe(),
        "protocol": {**protocol, "batch_size": BATCH_SIZE, "reference": "exact, 1400 samples"},
        "values": [],
        "trials": [],
        "fresh": [],
    }
    if path.exists():
        done = json.loads(path.read_text())
        results |= {key: done[key] for key in ("values", "trials", "fresh")}

    if not results["values"]:
        results["values"] = [row for seed in seeds for epochs in value_epochs for row in value_rows(seed, epochs)]
        write(results, options.out)

    def keep(kind: str, result: dict[str, Any]) -> None:
        results[kind].append(result)
        write(results, options.out)

    grid = [
        {"estimate": name, "damping": damping, "ewc_lambda": x, "lr": lr, "seeds": list(seeds), **protocol}
        for damping, name in itertools.product(rates, ESTIMATES)
        for x, lr in itertools.product(lambdas, rates[damping])
    ]
    jobs = missing(grid, results["trials"])
    if not run_jobs(jobs, options.processes, functools.partial(keep, "trials"), deadline):
        print(f"{len(results['trials'])} of {len(grid)} cells are done: call again to go on")
        return
    fresh = []
    for damping, name in itertools.product(rates, ESTIMATES):
        best = best_of(select(results["trials"], name, damping))
        fresh.append({**{key: best[key] for key in CELL}, "seeds": list(fresh_seeds), **protocol})
    jobs = missing(fresh, results["fresh"])
    if not run_jobs(jobs, options.processes, functools.partial(keep, "fresh"), deadline):
        print("the fresh seeds are left to do: call again to go on")
        return
    for epochs in value_epochs:
        print(f"Values after {epochs} epochs of the first task\n\n{value_table(results['values'], epochs)}\n")
    for damping in rates:
        print(f"Accuracy, damping {damping:g}\n\n{accuracy_table(results, damping)}\n")
    if options.docs is not None:
        fill_document(results, options.docs / "fisher.md")
        draw(results["trials"], options.docs / "images" / "fisher_kinds.png")


if __name__ == "__main__":
    main()
