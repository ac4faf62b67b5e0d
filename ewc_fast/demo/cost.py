"""What the penalty costs: steps of training with and without it, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast.demo.data import Task
from ewc_fast.demo.experiment import BATCH_SIZE, consolidate, make_model, make_optimizer, make_penalty
from ewc_fast.demo.settings import Settings

NATIVE_OP = "ewc_fast::penalty_accumulate_"


class _SeenOps(TorchDispatchMode):
    """Notes the names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def measure(settings: Settings, task: Task, num_steps: int = 200) -> dict[str, Any]:
    """Times training steps of the demo's network without a penalty, with ours, and with one in plain PyTorch.

    Args:
        settings: EWC's.
        task: Data to train on.
        num_steps: Steps of each kind; they take turns, so that all see the machine in the same state.

    Returns:
        Median milliseconds of a step, "plain_ms", "ewc_ms" and "eager_ms"; the penalty's share of a step, "share" and
        "eager_share"; and "backend": "native" if the native op was called in a step, else "reference".
    """
    plain = _step(settings, task, "none")
    steps = {"plain": plain, "ewc": _step(settings, task, "attached"), "eager": _step(settings, task, "eager")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_steps):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    # The first steps allocate.
    median = {name: statistics.median(values[num_steps // 10 :]) for name, values in seconds.items()}
    with _SeenOps() as seen:
        steps["ewc"]()
    return {
        **{f"{name}_ms": 1e3 * value for name, value in median.items()},
        "share": 1 - median["plain"] / median["ewc"],
        "eager_share": 1 - median["plain"] / median["eager"],
        "backend": "native" if NATIVE_OP in seen.names else "reference",
    }


def _step(settings: Settings, task: Task, penalty: str) -> Callable[[], None]:
    model = make_model(seed=0)
    optimizer = make_optimizer(model, settings)
    ewc = make_penalty(model, settings)
    consolidate(ewc, settings.method, task)
    if penalty == "attached":
        ewc.attach(optimizer)
    inputs, labels = task.train_inputs[:BATCH_SIZE], task.train_labels[:BATCH_SIZE]
    terms = [(p, ewc.fisher[name], ewc.anchor[name]) for name, p in model.named_parameters()]

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        if penalty == "eager":  # as it is mostly written, without damping
            loss = loss + settings.ewc_lambda / 2 * sum((f * (p - a) ** 2).sum() for p, f, a in terms)
        loss.backward()
        optimizer.step()

    return step
