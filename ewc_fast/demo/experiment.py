"""One run: a network learns the tasks one after the other by one method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss, train
from ewc_fast.demo.data import NUM_CLASSES, NUM_PIXELS, Task, permuted_digits
from ewc_fast.demo.settings import SCHEDULES, Settings

EPOCHS = 15
BATCH_SIZE = 32
HIDDEN = 256
FISHER_SAMPLES = 200

_MODES = {"plain": "separate", "l2sp": "latest", "ewc": "separate"}


@dataclass
class Run:
    """What one run gave.

    Attributes:
        settings: The method and its settings.
        seed: Of the network, the permutations and the order of the samples.
        accuracy: (T + 1, T): on task j's test samples after i tasks.
        accuracy_by_epoch: (1 + T * epochs, T): the same after each epoch. This and the next two only if asked for.
        predicted_rise: ((T - 1) * epochs,): after each epoch of tasks 2 to T, how far the old tasks' losses have risen,
            summed over them, as ``predicted_forgetting`` has it; nats per sample. Empty for L2-SP, which has no Fisher.
        true_rise: The same, measured on the old tasks' training samples.
        seconds: Wall clock.
    """

    settings: Settings
    seed: int
    accuracy: list[list[float]] = field(default_factory=list)
    accuracy_by_epoch: list[list[float]] = field(default_factory=list)
    predicted_rise: list[float] = field(default_factory=list)
    true_rise: list[float] = field(default_factory=list)
    seconds: float = 0.0


def make_model(seed: int) -> nn.Sequential:
    """The network, 64-256-256-10 with ReLU; its weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(NUM_PIXELS, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, NUM_CLASSES),
        )


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Adam:
    """A fresh Adam."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)


def make_penalty(model: nn.Module, settings: Settings) -> EWCLoss:
    """The method's penalty. Plain fine-tuning has one of weight 0: it penalises nothing, and predicts."""
    return EWCLoss(model, settings.ewc_lambda, mode=_MODES[settings.method], damping=settings.damping)


def consolidate(ewc: EWCLoss, method: str, task: Task) -> None:
    """Ends a task: L2-SP counts every weight as 1, the others by the exact Fisher of the task."""
    if method == "l2sp":
        ewc.consolidate(fisher={name: torch.ones_like(p) for name, p in ewc.model.named_parameters()})
    else:
        ewc.consolidate([(task.train_inputs, task.train_labels)], kind="exact", num_samples=FISHER_SAMPLES)


def run(
    settings: Settings,
    seed: int,
    num_tasks: int = 5,
    epochs: int = EPOCHS,
    *,
    follow_forgetting: bool = False,
) -> Run:
    """Learns ``num_tasks`` tasks, one after the other.

    Args:
        settings: The method.
        seed: Of the network, the permutations and the order of the samples. Equal seeds give equal numbers.
        num_tasks: How many tasks, at least 2.
        epochs: Per task.
        follow_forgetting: Record ``accuracy_by_epoch``, ``predicted_rise`` and ``true_rise`` as well.
    """
    start = time.perf_counter()
    tasks = permuted_digits(num_tasks, seed)
    model = make_model(seed)
    ewc = make_penalty(model, settings)
    order = torch.Generator().manual_seed(seed)
    penalised = settings.method != "plain"
    predicts = follow_forgetting and settings.method != "l2sp"  # only a Fisher predicts
    result = Run(settings, seed, [accuracies(model, tasks)])
    result.accuracy_by_epoch.append(result.accuracy[0])
    old_losses: list[float] = []  # each as it was when its task had been learnt
    for index, task in enumerate(tasks):
        optimizer = make_optimizer(model, settings)
        factor = _factor(settings.schedule, epochs * -(-len(task.train_inputs) // BATCH_SIZE))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        optimizer.register_step_post_hook(lambda *_, schedule=schedule: schedule.step())
        handle = ewc.attach(optimizer) if penalised else None
        for _ in range(epochs):
            batches = shuffled_batches(task, order)
            train(model, batches, optimizer, nn.functional.cross_entropy, "cpu", ewc if penalised else None)
            if follow_forgetting:
                result.accuracy_by_epoch.append(accuracies(model, tasks))
            if predicts and index:
                with torch.no_grad():
                    ewc()
                result.predicted_rise.append(ewc.predicted_forgetting.item())
                losses = train_losses(model, tasks[:index])
                result.true_rise.append(sum(now - then for now, then in zip(losses, old_losses, strict=True)))
        if handle is not None:
            handle.remove()
        result.accuracy.append(accuracies(model, tasks))
        if index < num_tasks - 1:
            if penalised or predicts:
                consolidate(ewc, settings.method, task)
            old_losses += train_losses(model, [task])
    result.seconds = time.perf_counter() - start
    return result


def shuffled_batches(task: Task, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of a task: pairs of (32, 64) and (32,), the last ones smaller."""
    samples = torch.randperm(len(task.train_inputs), generator=generator)
    inputs, labels = task.train_inputs[samples], task.train_labels[samples]
    return zip(inputs.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)


@torch.no_grad()
def accuracies(model: nn.Module, tasks: Sequence[Task]) -> list[float]:
    """Accuracy on each task's test samples."""
    return [(model(t.test_inputs).argmax(1) == t.test_labels).double().mean().item() for t in tasks]


@torch.no_grad()
def train_losses(model: nn.Module, tasks: Sequence[Task]) -> list[float]:
    """Mean loss on each task's training samples, in nats: what ``predicted_forgetting`` speaks of."""
    return [nn.functional.cross_entropy(model(t.train_inputs), t.train_labels).item() for t in tasks]


def _factor(schedule: str, num_steps: int) -> Callable[[int], float]:
    # Taken in the middle of each step, so that no step has the factor 0.
    return lambda step: SCHEDULES[schedule]((step + 0.5) / num_steps)
