"""In which metric an optimizer steps: D is what turns a constant gradient g into the step ``lr g / D``.

A proximal pull in this metric has the stationary points of the penalised loss, and lambda keeps its meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from ewc_fast.ops.native import direct

State = Mapping[str, Any]
States = Callable[[], list[State]]  # of the parameters; asked for where they are needed
_common_value = direct("common_value")
_RADAM_TRACTABLE = 5.0  # length of the approximated moving average from which RAdam rectifies


class StepMetric(NamedTuple):
    """The metric of some parameters, as :func:`ewc_fast.ops.steps.proximal_` takes it.

    Attributes:
        moments: One tensor of the optimizer's state per parameter, or none.
        root: See there.
        rates: Learning rate, factor, inner and eps: a column each, 0-dim or one number per parameter.
    """

    moments: list[Tensor]
    root: bool
    rates: tuple[Any, Any, Any, Any]


def _steps(states: Sequence[State]) -> Any:
    """How many steps each parameter has taken; on the device where the optimizer keeps it, without a sync. A number,
    where that can be had quickly: each of a dozen operations on a small tensor takes as long as a small step."""
    steps = [state["step"] for state in states]
    common = None if torch.compiler.is_compiling() else _common_value(steps)
    if common:  # 0 after an overflow in the first step: there is no correction yet, and 1 / 0 is infinite for tensors
        return common
    if isinstance(steps[0], Tensor):
        return torch.stack([step.reshape(()) for step in steps]).double()
    return torch.tensor(steps, dtype=torch.float64)


def _beta2(group: Mapping[str, Any]) -> Any:
    return group["betas"][1]


def _sgd(group: Mapping[str, Any], states: States) -> StepMetric:
    factor = 1.0
    if group["momentum"] != 0:
        factor = float("inf") if group["dampening"] == 1 else (1 - group["momentum"]) / (1 - group["dampening"])
    return StepMetric([], True, (group["lr"], factor, 1.0, 0.0))


def _adam(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    correction = 1 - _beta2(group) ** _steps(known)
    return StepMetric([s[name] for s in known], True, (group["lr"], 1.0, 1 / correction, group["eps"]))


def _sparse_adam(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    correction = 1 - _beta2(group) ** _steps(known)
    factor = correction**-0.5  # its eps is added before the correction
    return StepMetric([s["exp_avg_sq"] for s in known], True, (group["lr"], factor, 1.0, group["eps"]))


def _radam(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    beta2, steps = _beta2(group), torch.as_tensor(_steps(known), dtype=torch.float64)
    correction = 1 - beta2**steps
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * steps * beta2**steps / correction
    tractable = length > _RADAM_TRACTABLE
    safe = torch.where(tractable, length, torch.full_like(length, longest))
    rectification = ((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)).sqrt()
    one, zero = torch.ones_like(safe), torch.zeros_like(safe)
    factor = torch.where(tractable, 1 / (rectification * correction.sqrt()), one)
    eps = torch.where(tractable, group["eps"] * one, one)
    return StepMetric(
        [s["exp_avg_sq"] for s in known], True, (group["lr"], factor, torch.where(tractable, one, zero), eps)
    )


def _adamax(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    return StepMetric([s["exp_inf"] for s in known], False, (group["lr"], 1.0, 1.0, 0.0))


def _rmsprop(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    moments = [s["square_avg"] for s in known]
    if group["centered"]:
        moments = [v.addcmul(s["grad_avg"], s["grad_avg"], value=-1) for v, s in zip(moments, known, strict=True)]
    return StepMetric(moments, True, (group["lr"], 1 - group["momentum"], 1.0, group["eps"]))


def _adagrad(group: Mapping[str, Any], states: States) -> StepMetric:
    known = states()
    factor = 1 + (_steps(known) - 1) * group["lr_decay"]
    return StepMetric([s["sum"] for s in known], True, (group["lr"], factor, 1.0, group["eps"]))


def _unknown(group: Mapping[str, Any], states: States) -> StepMetric:
    return StepMetric([], True, (group["lr"], 1.0, 1.0, 0.0))


_known: tuple[tuple[type[Optimizer], Callable[[Mapping[str, Any], States], StepMetric]], ...] = (
    (SGD, _sgd),
    (AdamW, _adam),
    (Adam, _adam),
    (NAdam, _adam),
    (SparseAdam, _sparse_adam),
    (RAdam, _radam),
    (Adamax, _adamax),
    (RMSprop, _rmsprop),
    (Adagrad, _adagrad),
)


def is_known(optimizer: Optimizer) -> bool:
    """Whether the optimizer's metric is known; where it is not, D is 1."""
    return any(isinstance(optimizer, kind) for kind, _ in _known)


def step_metric(optimizer: Optimizer, group: Mapping[str, Any], params: Sequence[nn.Parameter]) -> StepMetric:
    """The metric in which the optimizer has just stepped these parameters of one group."""
    states: States = lambda: [optimizer.state[p] for p in params]  # noqa: E731
    for kind, metric in _known:
        if isinstance(optimizer, kind):
            return metric(group, states)
    return _unknown(group, states)


@functools.lru_cache(maxsize=64)
def _constant_rates(rates: tuple[float, ...], count: int, device: torch.device) -> Tensor:
    return torch.tensor(rates, dtype=torch.float64).repeat(count, 1).to(device, non_blocking=True)


def rates_of(metric: StepMetric, count: int, device: torch.device) -> Tensor:
    """The metric's numbers as the op takes them: fp64, (count, 4), on the device; not to be written to."""
    if not any(isinstance(column, Tensor) for column in metric.rates):
        return _constant_rates(metric.rates, count, device)
    rates = torch.empty(count, 4, dtype=torch.float64, device=device)
    for i, column in enumerate(metric.rates):
        if isinstance(column, Tensor):
            rates[:, i].copy_(column.reshape(-1), non_blocking=True)
        else:
            rates[:, i].fill_(column)
    return rates
