"""Which coupling: the penalty's gradient in the task's, or its own implicit step after the optimizer's.

    python examples/coupling.py

The demo's permuted digits and network; three tasks of eight epochs, where the demo has five of 15. An arm is an
optimizer (SGD, SGD with momentum 0.9, AdamW), a coupling and a damping (0, 0.1). Every arm has the same grid: lambda
from 1 to 10^8 in powers of ten, by four learning rates of its optimizer; plain training has as many trials, all spent
on the learning rate. The trials come in stages, each of which is done for every arm before the next begins:

1. every cell with one seed;
2. the best cells of each arm with three seeds;
3. at the best of these, the penalty at each 4th and 16th step alone (``every``), seeds that the search has not seen,
   and three of them in the demo's full setting;
4. all cells with three seeds. If that changes an arm's best cell, stage 3 is done for the new one.

A run whose weights are not finite has diverged: it is stopped, and counts with an accuracy of 0.1, that of guessing.

Each trial is a row of examples/results/coupling/trials.csv as soon as it is done: the search may be interrupted, and
goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fisher_kinds import difference, fill
from matplotlib.figure import Figure
from torch import nn

from ewc_fast import EWCSGD, EWCAdamW, EWCLoss
from ewc_fast.demo import environment, metrics
from ewc_fast.demo.data import Task, permuted_digits
from ewc_fast.demo.experiment import FISHER_SAMPLES, accuracies, make_model, shuffled_batches

RESULTS = Path(__file__).parent / "results" / "coupling"
DOCS = Path(__file__).parents[1] / "docs"

NUM_TASKS, EPOCHS = 3, 8
LAMBDAS = tuple(10.0**power for power in range(9))
RATES = {
    "SGD": (0.01, 0.03, 0.1, 0.3),
    "momentum": (0.01, 0.03, 0.1, 0.2),
    "AdamW": (0.001, 0.003, 0.01, 0.03),
}
COUPLINGS = ("coupled", "proximal")
DAMPINGS = (0.0, 0.1)
SEEDS = (0, 1, 2)
FRESH_SEEDS = (10, 11, 12, 13, 14, 15)
FULL_TASKS, FULL_EPOCHS, FULL_SEEDS = 5, 15, FRESH_SEEDS[:3]  # the demo's setting
PROMOTED = 6  # cells of each arm that go on to three seeds
EVERY = (1, 4, 16)
CHANCE = 0.1
WITHIN = 0.05  # of the best: what counts as good


@dataclass(frozen=True)
class Arm:
    """What is compared. Of plain training the coupling is ``"none"``."""

    optimizer: str
    coupling: str
    damping: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A point of an arm's grid, and the setting."""

    optimizer: str
    coupling: str
    damping: float
    ewc_lambda: float
    lr: float
    every: int = 1
    num_tasks: int = NUM_TASKS
    epochs: int = EPOCHS

    @property
    def arm(self) -> Arm:
        return Arm(self.optimizer, self.coupling, self.damping)


@dataclass(frozen=True)
class Outcome:
    """Of one trial.

    Attributes:
        mean_accuracy: Over all tasks at the end.
        when_learnt: Mean over the tasks of the accuracy right after each was learnt.
        diverged: Weights were not finite.
        seconds: Wall clock, without the first task, which the trials share.
    """

    mean_accuracy: float
    when_learnt: float
    diverged: bool
    seconds: float


# ---- one trial ----


def make_optimizer(model: nn.Module, cell: Cell, ewc: EWCLoss | None) -> torch.optim.Optimizer:
    """With the penalty in its step, if there is one."""
    options: dict[str, Any] = {"momentum": 0.9} if cell.optimizer == "momentum" else {}
    if cell.every == 1:
        fused = EWCAdamW if cell.optimizer == "AdamW" else EWCSGD
        coupling = "coupled" if ewc is None else cell.coupling
        return fused(model.parameters(), lr=cell.lr, ewc=ewc, coupling=coupling, **options)
    plain = torch.optim.AdamW if cell.optimizer == "AdamW" else torch.optim.SGD
    optimizer = plain(model.parameters(), lr=cell.lr, fused=True, **options)
    if ewc is not None:
        ewc.attach(optimizer, cell.coupling, every=cell.every)
    return optimizer


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


def learn(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, epochs: int, order: torch.Generator) -> bool:
    """One task, the optimizer as if new; False as soon as the weights are not finite."""
    optimizer.state.clear()
    for _ in range(epochs):
        for inputs, labels in shuffled_batches(task, order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        if not is_finite(model):
            return False
    return True


def consolidate(ewc: EWCLoss, task: Task) -> bool:
    """Ends a task as the demo does; False if the weights are so large that the Fisher is not finite."""
    try:
        ewc.consolidate([(task.train_inputs, task.train_labels)], kind="exact", num_samples=FISHER_SAMPLES)
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return False
    return True


@functools.lru_cache(maxsize=64)
def tasks_of(seed: int, num_tasks: int) -> list[Task]:
    """The tasks; change nothing."""
    return permuted_digits(num_tasks, seed)


@functools.lru_cache(maxsize=256)
def after_first_task(optimizer: str, lr: float, epochs: int, seed: int) -> tuple[nn.Module, torch.Generator, bool]:
    """The network after the first task, which no penalty touches, the order of samples, and whether it is finite; copy
    it, change nothing."""
    model, order = make_model(seed), torch.Generator().manual_seed(seed)
    plain = make_optimizer(model, Cell(optimizer, "none", 0.0, 0.0, lr), None)
    return model, order, learn(model, tasks_of(seed, 1)[0], plain, epochs, order)


def trial(cell: Cell, seed: int) -> Outcome:
    """Learns the tasks one after the other. It does not depend on what ran before it."""
    tasks = tasks_of(seed, cell.num_tasks)
    first, first_order, finite = after_first_task(cell.optimizer, cell.lr, cell.epochs, seed)
    start = time.perf_counter()
    model, order = copy.deepcopy(first), torch.Generator()
    order.set_state(first_order.get_state())
    ewc = EWCLoss(model, cell.ewc_lambda, damping=cell.damping) if cell.coupling != "none" else None
    optimizer = make_optimizer(model, cell, ewc)
    chance = [CHANCE] * cell.num_tasks
    accuracy = [chance, accuracies(model, tasks) if finite else chance]
    for before, task in itertools.pairwise(tasks):
        finite = finite and (ewc is None or consolidate(ewc, before))
        finite = finite and learn(model, task, optimizer, cell.epochs, order)
        accuracy.append(accuracies(model, tasks) if finite else chance)
    seconds = time.perf_counter() - start
    mean_accuracy, when_learnt = metrics.mean_accuracy(accuracy), metrics.accuracy_when_learnt(accuracy)
    return Outcome(round(mean_accuracy, 6), round(when_learnt, 6), not finite, round(seconds, 3))


def limits() -> list[dict[str, Any]]:
    """Up to which lambda a step on the penalty alone contracts, after the first task with the first seed: the largest
    entry's ``lr lambda F`` is below ``2 (1 + momentum)``."""
    rows = []
    for optimizer, momentum in (("SGD", 0.0), ("momentum", 0.9)):
        for lr in RATES[optimizer]:
            model, _, _ = after_first_task(optimizer, lr, EPOCHS, SEEDS[0])
            ewc = EWCLoss(copy.deepcopy(model))
            consolidate(ewc, tasks_of(SEEDS[0], 1)[0])
            largest = max(f.max().item() for f in ewc.fisher.values())
            limit = 2 * (1 + momentum) / (lr * largest)
            rows.append({"optimizer": optimizer, "lr": lr, "largest_fisher": largest, "limit": limit})
    return rows


# ---- the search ----

Job = tuple[Cell, int]
Trials = dict[Job, Outcome]


def grid(arm: Arm) -> list[Cell]:
    """An arm's cells. Plain training has as many: learning rates over five powers of ten, up to the same highest."""
    rates = RATES[arm.optimizer]
    if arm.coupling == "none":
        finer = np.geomspace(rates[-1] / 1e5, rates[-1], len(LAMBDAS) * len(rates))
        return [Cell(arm.optimizer, arm.coupling, arm.damping, 0.0, float(f"{lr:.3g}")) for lr in finer]
    return [Cell(arm.optimizer, arm.coupling, arm.damping, x, lr) for x, lr in itertools.product(LAMBDAS, rates)]


def arms() -> list[Arm]:
    """All that are compared."""
    penalised = [Arm(*names) for names in itertools.product(RATES, COUPLINGS, DAMPINGS)]
    return penalised + [Arm(optimizer, "none") for optimizer in RATES]


def mean(trials: Trials, cell: Cell, seeds: Iterable[int] = SEEDS) -> float:
    """Mean accuracy over the seeds that were run."""
    return float(np.mean([trials[cell, seed].mean_accuracy for seed in seeds if (cell, seed) in trials]))


def promoted(trials: Trials, arm: Arm) -> list[Cell]:
    """The best cells by the first seed; the first of equals."""
    return sorted(grid(arm), key=lambda cell: -trials[cell, SEEDS[0]].mean_accuracy)[:PROMOTED]


def stage_one() -> list[Job]:
    """Every cell with the first seed."""
    return [(cell, SEEDS[0]) for arm in arms() for cell in grid(arm)]


def stage_two(trials: Trials) -> list[Job]:
    """The promoted cells with all seeds."""
    return [(cell, seed) for arm in arms() for cell in promoted(trials, arm) for seed in SEEDS]


def stage_four() -> list[Job]:
    """All cells with all seeds."""
    return [(cell, seed) for seed in SEEDS for arm in arms() for cell in grid(arm)]


def is_done(trials: Trials, jobs: Iterable[Job]) -> bool:
    """Whether all were run."""
    return all(job in trials for job in jobs)


def best_of(trials: Trials, arm: Arm) -> Cell:
    """The cell of the best mean over the seeds; of all cells only when all of every arm were run with them."""
    cells = grid(arm) if is_done(trials, stage_four()) else promoted(trials, arm)
    return max(cells, key=lambda cell: mean(trials, cell))


def every_cells(best: Cell) -> list[Cell]:
    """The cell with the penalty at each k-th step; plain training has no penalty."""
    return [replace(best, every=k) for k in EVERY[1:]] if best.coupling != "none" else []


def full(best: Cell) -> Cell:
    """The cell in the demo's setting."""
    return replace(best, num_tasks=FULL_TASKS, epochs=FULL_EPOCHS)


def stage_three(trials: Trials) -> list[Job]:
    """What is done at each arm's best cell."""
    bests = [best_of(trials, arm) for arm in arms()]
    jobs = [(cell, seed) for best in bests for cell in every_cells(best) for seed in SEEDS]
    jobs += [(best, seed) for best in bests for seed in FRESH_SEEDS]
    return jobs + [(full(best), seed) for best in bests for seed in FULL_SEEDS]


def to_do(trials: Trials) -> list[Job]:
    """What is left of the first stage that is not done."""
    stages: list[Callable[[], list[Job]]] = [
        stage_one,
        functools.partial(stage_two, trials),
        functools.partial(stage_three, trials),
        stage_four,
    ]
    for stage in stages:
        if left := [job for job in stage() if job not in trials]:
            return left
    return []


COLUMNS = [f.name for f in fields(Cell)] + ["seed"] + [f.name for f in fields(Outcome)]


def read(path: Path) -> Trials:
    """The trials of a file, none if it is not there."""
    if not path.exists():
        return {}
    trials = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            damping, ewc_lambda, lr = (float(row[name]) for name in ("damping", "ewc_lambda", "lr"))
            every, num_tasks, epochs = (int(row[name]) for name in ("every", "num_tasks", "epochs"))
            cell = Cell(row["optimizer"], row["coupling"], damping, ewc_lambda, lr, every, num_tasks, epochs)
            accuracy, learnt, seconds = (float(row[name]) for name in ("mean_accuracy", "when_learnt", "seconds"))
            trials[cell, int(row["seed"])] = Outcome(accuracy, learnt, row["diverged"] == "True", seconds)
    return trials


def append(path: Path, job: Job, outcome: Outcome) -> None:
    """Adds a row."""
    is_new = not path.exists()
    values = [*astuple(job[0]), job[1], *astuple(outcome)]
    with path.open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if is_new:
            table.writerow(COLUMNS)
        table.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def search(path: Path, deadline: float = float("inf")) -> Trials:
    """Runs what is left to do, until the deadline (of ``time.monotonic``); returns what there is."""
    trials = read(path)
    while jobs := to_do(trials):
        for job in jobs:
            if time.monotonic() > deadline:
                return trials
            trials[job] = trial(*job)
            append(path, job, trials[job])
    return trials


# ---- what is shown ----


def title(arm: Arm) -> str:
    """An arm in a table's first columns."""
    if arm.coupling == "none":
        return f"{arm.optimizer} | plain | "
    return f"{arm.optimizer} | {arm.coupling} | {arm.damping:g}"


def values(trials: Trials, cell: Cell, seeds: Iterable[int]) -> list[float]:
    """The accuracies, by seed; none if a seed was not run."""
    jobs = [(cell, seed) for seed in seeds]
    return [trials[job].mean_accuracy for job in jobs] if is_done(trials, jobs) else []


def show(accuracies: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{np.mean(accuracies):.3f} ± {metrics.spread(accuracies):.3f}" if accuracies else "not run"


def coverage(trials: Trials) -> str:
    """What was run."""
    done = {"stage 1": stage_one()}
    if is_done(trials, done["stage 1"]):
        done["stage 2"] = stage_two(trials)
        done["stage 3"] = stage_three(trials)
    done["stage 4"] = stage_four()
    counts = [f"{name}: {sum(job in trials for job in jobs)} of {len(jobs)}" for name, jobs in done.items()]
    return f"{len(trials)} trials, each with one seed; by stage (they overlap) {', '.join(counts)}."


def best_table(trials: Trials) -> str:
    """Markdown: each arm's best cell, on the seeds that chose it, on others, and in the demo's setting."""
    lines = [
        "| optimizer | coupling | damping | best of 36 | when learnt | at lambda | lr | unseen seeds | five tasks |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in arms():
        best = best_of(trials, arm)
        learnt = np.mean([trials[best, seed].when_learnt for seed in SEEDS if (best, seed) in trials])
        ewc_lambda = "" if arm.coupling == "none" else number(best.ewc_lambda)
        lines.append(
            f"| {title(arm)} | {show(values(trials, best, SEEDS))} | {learnt:.2f} | {ewc_lambda} | {best.lr:g} | "
            f"{show(values(trials, best, FRESH_SEEDS))} | {show(values(trials, full(best), FULL_SEEDS))} |"
        )
    return "\n".join(lines)


def pairs() -> list[tuple[str, Arm, Arm]]:
    """What is compared with what."""
    found = []
    for optimizer, damping in itertools.product(RATES, DAMPINGS):
        coupled, proximal = (Arm(optimizer, coupling, damping) for coupling in COUPLINGS)
        found.append((f"{optimizer}, damping {damping:g}: proximal less coupled", proximal, coupled))
    for optimizer, coupling in itertools.product(RATES, COUPLINGS):
        without, damped = (Arm(optimizer, coupling, damping) for damping in DAMPINGS)
        found.append((f"{optimizer}, {coupling}: damping 0.1 less 0", damped, without))
    for optimizer, coupling in itertools.product(RATES, COUPLINGS):
        arm, plain = Arm(optimizer, coupling, DAMPINGS[-1]), Arm(optimizer, "none")
        found.append((f"{optimizer}: {coupling}, damping 0.1, less plain", arm, plain))
    return found


def pair_table(trials: Trials) -> str:
    """Markdown: differences between two arms' best cells on the same unseen seeds."""
    lines = ["| difference | unseen seeds | five tasks |", "|---|---|---|"]
    for name, mine, other in pairs():
        texts = []
        for change, seeds in ((lambda cell: cell, FRESH_SEEDS), (full, FULL_SEEDS)):
            mine_by_seed, other_by_seed = (values(trials, change(best_of(trials, arm)), seeds) for arm in (mine, other))
            texts.append(difference(mine_by_seed, other_by_seed) if mine_by_seed and other_by_seed else "not run")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def number(x: float) -> str:
    """Short."""
    return f"{x:g}" if x <= 1000 else f"{x:.0e}".replace("e+0", "e")


def span(numbers: Iterable[float]) -> str:
    """From the least to the largest."""
    found = sorted(set(numbers))
    return " to ".join(dict.fromkeys(number(x) for x in (found[0], found[-1]))) if found else "none"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """For a heading."""
    return "one seed" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"


def range_table(trials: Trials) -> str:
    """Markdown: how much of its grid serves an arm; by all three seeds if all cells were run with them, else by the
    first."""
    seeds = SEEDS if is_done(trials, stage_four()) else SEEDS[:1]
    lines = [
        f"| optimizer | coupling | damping | best ({seeds_in_words(seeds)}) | cells within {WITHIN:g} of it | of the "
        "optimizer's best | above plain's best | lambda at its lr | lr at its lambda | diverged | at lambda from |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in arms():
        if arm.coupling == "none":
            continue
        score = {cell: mean(trials, cell, seeds) for cell in grid(arm)}
        best = max(score, key=lambda cell: score[cell])
        good = [cell for cell in score if score[cell] >= score[best] - WITHIN]
        tops = {o: max(mean(trials, cell, seeds) for cell in grid(o)) for o in arms() if o.optimizer == arm.optimizer}
        lost = [cell for cell in score if any(trials[cell, seed].diverged for seed in seeds)]
        columns = [
            f"{title(arm)} | {score[best]:.3f}",
            f"{len(good)} of {len(score)}",
            str(sum(score[cell] >= max(tops.values()) - WITHIN for cell in score)),
            str(sum(score[cell] > tops[Arm(arm.optimizer, "none")] for cell in score)),
            span(cell.ewc_lambda for cell in good if cell.lr == best.lr),
            span(cell.lr for cell in good if cell.ewc_lambda == best.ewc_lambda),
            str(len(lost)),
            number(min(cell.ewc_lambda for cell in lost)) if lost else "",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def every_table(trials: Trials) -> str:
    """Markdown: each arm's best cell with the penalty at each k-th step."""
    head = " | ".join(f"every {k}" for k in EVERY)
    lines = [f"| optimizer | coupling | damping | {head} |", "|---|---|---:|" + "---:|" * len(EVERY)]
    for arm in arms():
        if arm.coupling != "none":
            best = best_of(trials, arm)
            cells = [best, *every_cells(best)]
            lines.append(f"| {title(arm)} | {' | '.join(show(values(trials, cell, SEEDS)) for cell in cells)} |")
    return "\n".join(lines)


def limit_table(trials: Trials, rows: list[dict[str, Any]]) -> str:
    """Markdown: where coupled without damping should diverge by the largest Fisher entry, and where it did."""
    lines = [
        "| optimizer | lr | largest Fisher entry | limit of lambda | stable up to | diverged from |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        arm = Arm(row["optimizer"], "coupled")
        cells = [cell for cell in grid(arm) if cell.lr == row["lr"]]
        lost = [cell.ewc_lambda for cell in cells if trials[cell, SEEDS[0]].diverged]
        first = min(lost, default=float("inf"))
        kept = [cell.ewc_lambda for cell in cells if cell.ewc_lambda < first]
        lines.append(
            f"| {row['optimizer']} | {row['lr']:g} | {row['largest_fisher']:.2g} | {row['limit']:.2g} | "
            f"{number(max(kept)) if kept else ''} | {number(first) if lost else ''} |"
        )
    return "\n".join(lines)


def draw(trials: Trials, path: Path) -> None:
    """A map of each arm's grid: accuracy by lambda and learning rate."""
    seeds = SEEDS if is_done(trials, stage_four()) else SEEDS[:1]
    rows = list(itertools.product(DAMPINGS, COUPLINGS))
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    axes = figure.subplots(len(rows), len(RATES), squeeze=False)
    for (i, (damping, coupling)), (j, optimizer) in itertools.product(enumerate(rows), enumerate(RATES)):
        arm, axis, rates = Arm(optimizer, coupling, damping), axes[i, j], RATES[optimizer]
        scores = np.array([mean(trials, cell, seeds) for cell in grid(arm)]).reshape(len(LAMBDAS), len(rates)).T
        image = axis.imshow(scores, origin="lower", aspect="auto", vmin=CHANCE, vmax=0.95, cmap="viridis")
        for cell in grid(arm):
            x, y = LAMBDAS.index(cell.ewc_lambda), rates.index(cell.lr)
            diverged = any(trials[cell, seed].diverged for seed in seeds)
            text = "x" if diverged else f"{100 * scores[y, x]:.0f}"
            axis.text(
                x, y, text, ha="center", va="center", fontsize=7, color="black" if scores[y, x] > 0.6 else "white"
            )
        axis.set_xticks(range(len(LAMBDAS)), [f"$10^{power}$" for power in range(len(LAMBDAS))], fontsize=7)
        axis.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates], fontsize=7)
        axis.set_title(f"{optimizer}, {coupling}, damping {damping:g}", fontsize=9)
        if i == len(rows) - 1:
            axis.set_xlabel("lambda", fontsize=8)
        if j == 0:
            axis.set_ylabel("learning rate", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="mean accuracy at the end")
    figure.supxlabel(
        f"Permuted digits, three tasks; {seeds_in_words(seeds)}; accuracy in per cent; x: diverged.", fontsize=8
    )
    figure.savefig(path, dpi=110)


def tables(trials: Trials, limit_rows: list[dict[str, Any]]) -> dict[str, str]:
    """By their marks in the document."""
    return {
        "coverage": coverage(trials),
        "best": best_table(trials),
        "differences": pair_table(trials),
        "ranges": range_table(trials),
        "limits": limit_table(trials, limit_rows),
        "every": every_table(trials),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs what is left of the search, and shows what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; call again to go on")
    parser.add_argument("--docs", type=Path, help="folder of coupling.md, to write the tables and the picture there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "setting.json"
    if not path.exists():
        setting = {"date": datetime.date.today().isoformat(), **environment.describe(), "limits": limits()}
        path.write_text(json.dumps(setting, indent=1) + "\n")
    trials = search(options.out / "trials.csv", time.monotonic() + 60 * options.minutes)
    if left := to_do(trials):
        print(f"{len(left)} trials of this stage are left: call again to go on")
    if not is_done(trials, stage_one()):
        return
    for mark, text in tables(trials, json.loads(path.read_text())["limits"]).items():
        print(f"{mark}\n\n{text}\n")
        if options.docs is not None:
            fill(options.docs / "coupling.md", mark, text)
    if options.docs is not None:
        draw(trials, options.docs / "images" / "coupling.png")


if __name__ == "__main__":
    main()
