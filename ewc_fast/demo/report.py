"""From runs to numbers, tables, files and pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ewc_fast import plotting
from ewc_fast.demo import metrics
from ewc_fast.demo.experiment import Run
from ewc_fast.demo.settings import TITLES

METRICS: dict[str, Callable[[metrics.Matrix], float]] = {
    "mean_accuracy": metrics.mean_accuracy,
    "accuracy_when_learnt": metrics.accuracy_when_learnt,
    "backward_transfer": metrics.backward_transfer,
    "forgetting": metrics.forgetting,
}
_HEADINGS = ("mean accuracy", "when learnt", "backward transfer", "forgetting")


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The metrics of one method's runs, each as a mean, a spread (standard deviation over the seeds) and by seed."""
    summary: dict[str, Any] = {"settings": dataclasses.asdict(runs[0].settings)}
    for name, metric in METRICS.items():
        values = [metric(run.accuracy) for run in runs]
        summary |= {name: float(np.mean(values)), f"{name}_spread": metrics.spread(values), f"{name}_by_seed": values}
    summary["accuracy_matrix"] = np.mean([run.accuracy for run in runs], axis=0).tolist()
    return summary


def format_summary(methods: Mapping[str, Mapping[str, Any]], num_seeds: int) -> str:
    """The table of all methods, and the settings that each ran with."""
    spread = ", mean ± standard deviation" if num_seeds > 1 else ""
    lines = [f"Over {_seeds(num_seeds)}{spread}:", ""]
    lines.append(f"{'':18}" + "".join(f"{heading:>20}" for heading in _HEADINGS))
    for method, summary in methods.items():
        cells = [f"{summary[name]:.3f}" + (f" ± {summary[name + '_spread']:.3f}" if spread else "") for name in METRICS]
        lines.append(f"{TITLES[method]:18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def format_matrix(title: str, matrix: metrics.Matrix) -> str:
    """An accuracy matrix: a row per number of tasks learnt, a column per task."""
    header = f"{title:18}" + "".join(f"{f'on task {j + 1}':>11}" for j in range(len(matrix[0])))
    rows = [
        f"{f'after task {i}' if i else 'before training':18}" + "".join(f"{value:>11.3f}" for value in row)
        for i, row in enumerate(matrix)
    ]
    return "\n".join([header, *rows])


def format_cost(cost: Mapping[str, Any]) -> str:
    """What the penalty costs, and which implementation ran."""
    backend = "the native kernels" if cost["backend"] == "native" else "the PyTorch reference (see: ewc-fast info)"
    return (
        f"The penalty ran on {backend}. It is {cost['share']:.0%} of a training step of this small network "
        f"({cost['ewc_ms']:.3f} ms with it, {cost['plain_ms']:.3f} ms without); written in plain PyTorch it is "
        f"{cost['eager_share']:.0%} ({cost['eager_ms']:.3f} ms)."
    )


def write_files(results: Mapping[str, Any], runs: Mapping[str, Sequence[Run]], folder: Path) -> list[Path]:
    """Writes results.json, summary.csv (a row per method) and accuracy.csv (every entry of every accuracy matrix)."""
    paths = [folder / name for name in ("results.json", "summary.csv", "accuracy.csv")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        columns = [column for name in METRICS for column in (name, f"{name}_spread")]
        writer = csv.DictWriter(file, ["method", *columns], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"method": method, **summary} for method, summary in results["methods"].items())
    with paths[2].open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "seed", "after_task", "on_task", "accuracy"])
        table.writerows(
            [method, run.seed, after, on + 1, accuracy]
            for method, several in runs.items()
            for run in several
            for after, row in enumerate(run.accuracy)
            for on, accuracy in enumerate(row)
        )
    return paths


def draw(runs: Mapping[str, Sequence[Run]], lambda_runs: Sequence[Run], epochs: int, folder: Path) -> list[Path]:
    """Draws the three pictures.

    Args:
        runs: By method, with what ``follow_forgetting`` records.
        lambda_runs: Runs that differ from a method's best settings in lambda alone.
        epochs: Per task.
        folder: Where the PNG files go.
    """
    num_seeds = len(runs["ewc"])
    figures: dict[str, Figure] = {
        "accuracy_over_time.png": plotting.accuracy_over_time(
            {TITLES[method]: [run.accuracy_by_epoch for run in several] for method, several in runs.items()},
            epochs,
            f"Permuted digits, mean over {_seeds(num_seeds)}; each method at the settings that were best for it.",
        ),
        "accuracy_over_lambda.png": plotting.accuracy_over_lambda(
            {TITLES[method]: _curve(method, lambda_runs) for method in ("l2sp", "ewc")},
            {TITLES["plain"]: float(np.mean([metrics.mean_accuracy(run.accuracy) for run in runs["plain"]]))},
            "One seed; all but lambda as in the method's best settings.",
        ),
        "predicted_forgetting.png": plotting.predicted_against_true(
            {
                TITLES[method]: ([run.predicted_rise for run in runs[method]], [run.true_rise for run in runs[method]])
                for method in ("plain", "ewc")
            },
            "After each epoch from the second task on; the old tasks' training samples. The prediction reads far too "
            "low on this overfitted net: it was trained until it was certain, and there its Fisher is nearly 0.",
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _curve(method: str, runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    mine = [run for run in runs if run.settings.method == method]
    return [run.settings.ewc_lambda for run in mine], [metrics.mean_accuracy(run.accuracy) for run in mine]


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
