"""The demo's command line, and the order of things."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ewc_fast.demo import cost, environment, metrics, report
from ewc_fast.demo.data import permuted_digits
from ewc_fast.demo.experiment import BATCH_SIZE, EPOCHS, FISHER_SAMPLES, Run, run
from ewc_fast.demo.settings import BEST, METHODS, TITLES, Settings

LAMBDA_FACTORS = (0.03, 0.2, 5.0, 30.0)  # around the best, which runs anyway


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to do."""

    settings: Settings
    seed: int
    num_tasks: int
    epochs: int
    follow_forgetting: bool

    def __call__(self) -> Run:
        return run(
            self.settings,
            self.seed,
            self.num_tasks,
            self.epochs,
            follow_forgetting=self.follow_forgetting,
        )


def main(argv: Sequence[str]) -> int:
    """Parses the arguments, runs everything, prints and writes what came out. Returns the exit code."""
    options = _parse(argv)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    best = BEST[options.schedule]
    print(_introduction(options, best))

    with _one_thread():
        penalty_cost = cost.measure(best["ewc"], permuted_digits(1, seed=0)[0])
        runs = _run_all(_jobs(best, options), options.processes)
    by_method = {m: [r for r in runs if r.settings == best[m]] for m in METHODS}
    lambda_runs = [r for r in runs if r.settings.method != "plain" and r.seed == 0]
    methods = {method: report.summarise(several) for method, several in by_method.items()}
    results: dict[str, Any] = {
        "methods": methods,
        "penalty_cost": penalty_cost,
        "lambda_curve": [
            {**dataclasses.asdict(r.settings), "seed": r.seed, "mean_accuracy": metrics.mean_accuracy(r.accuracy)}
            for r in lambda_runs
        ],
        "rise_of_old_losses": {
            m: {"predicted": [r.predicted_rise for r in several], "true": [r.true_rise for r in several]}
            for m, several in by_method.items()
            if m != "l2sp"
        },
        "num_tasks": options.tasks,
        "epochs": options.epochs,
        "batch_size": BATCH_SIZE,
        "fisher_samples": FISHER_SAMPLES,
        "seeds": list(range(options.seeds)),
        "processes": options.processes,
        "threads_per_process": 1,
        **environment.describe(),
        "backend": penalty_cost["backend"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    pictures = report.draw(by_method, lambda_runs, options.epochs, options.out)
    files = report.write_files(results, by_method, options.out)

    for method, summary in methods.items():
        print("\n" + report.format_matrix(TITLES[method], summary["accuracy_matrix"]))
    print("\n" + report.format_summary(methods, options.seeds))
    print("\n" + report.format_cost(penalty_cost))
    print(f"\n{time.perf_counter() - start:.0f} s. Written: " + ", ".join(str(path) for path in [*files, *pictures]))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ewc-fast demo",
        description="Learns permuted digits, one task after the other, by plain fine-tuning, L2-SP and EWC.",
    )
    cores = min(4, os.cpu_count() or 1)
    parser.add_argument("--tasks", type=_at_least(2), default=5, help="how many tasks (default 5)")
    parser.add_argument("--seeds", type=_at_least(1), default=3, help="runs of each method (default 3)")
    parser.add_argument("--epochs", type=_at_least(1), default=EPOCHS, help=f"epochs per task (default {EPOCHS})")
    parser.add_argument(
        "--schedule", choices=list(BEST), default="constant", help="of the learning rate over a task (default constant)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default demo)")
    parser.add_argument("--processes", type=_at_least(1), default=cores, help=f"runs at a time (default {cores})")
    return parser.parse_args(argv)


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return integer


def _introduction(options: argparse.Namespace, best: Mapping[str, Settings]) -> str:
    lines = [
        f"{options.tasks} tasks of permuted digits. Network 64-256-256-10, Adam, {options.epochs} epochs of batch "
        f"{BATCH_SIZE}, exact Fisher of {FISHER_SAMPLES} samples.",
        "Each method runs at its own best settings, found for 5 tasks by the same search (examples/search_digits.py):",
        *(f"  {TITLES[method]:18} {settings}" for method, settings in best.items()),
        "Settings for a learning rate that falls over each task: --schedule linear."
        if options.schedule == "constant"
        else "Settings for a constant learning rate: --schedule constant.",
        "",
    ]
    return "\n".join(lines)


def _jobs(best: Mapping[str, Settings], options: argparse.Namespace) -> list[Job]:
    """The runs to do, the longest first."""
    with_seeds = [(best[method], seed, True) for method in reversed(METHODS) for seed in range(options.seeds)]
    over_lambda = [
        (dataclasses.replace(best[method], ewc_lambda=factor * best[method].ewc_lambda), 0, False)
        for method in ("ewc", "l2sp")
        for factor in LAMBDA_FACTORS
    ]
    return [
        Job(settings, seed, options.tasks, options.epochs, follow_forgetting)
        for settings, seed, follow_forgetting in with_seeds + over_lambda
    ]


def _run_all(jobs: Sequence[Job], processes: int) -> list[Run]:
    """Does the jobs, with a progress bar. The results are in the jobs' order, the same for any number of processes."""
    runs: dict[int, Run] = {}
    with tqdm(total=len(jobs), unit="run") as bar:
        for index, result in _as_completed(jobs, processes):
            runs[index] = result
            bar.update()
            bar.write(
                f"{TITLES[result.settings.method]:18} {result.settings}, seed {result.seed}: "
                f"mean accuracy {metrics.mean_accuracy(result.accuracy):.3f} ({result.seconds:.1f} s)"
            )
    return [runs[index] for index in range(len(jobs))]


def _as_completed(jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Run]]:
    if processes == 1:
        for index, job in enumerate(jobs):
            yield index, job()
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The network is too small for two threads to be of use; and so no result depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
