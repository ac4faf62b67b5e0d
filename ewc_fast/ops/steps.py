"""The optimizer steps' ops, one typed function each: native kernels where they are built, else the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ewc_fast.ops import reference_steps as reference
from ewc_fast.ops.native import call as _call
from ewc_fast.ops.native import direct, never, use_native
from ewc_fast.ops.types import PenaltyResult, StepQuadratic

_adamw, _sgd, _proximal = direct("adamw_"), direct("sgd_"), direct("proximal_")


class AdamWOptions(NamedTuple):
    """Hyper-parameters of a step of AdamW, as :class:`torch.optim.AdamW` has them, in the native op's order."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class SGDOptions(NamedTuple):
    """Hyper-parameters of a step of SGD, as :class:`torch.optim.SGD` has them, in the native op's order."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class Amp(NamedTuple):
    """What lives on the device.

    Attributes:
        grad_scale: A GradScaler's scale, by which the gradients are divided in place; 0-dim, fp32 or fp64.
        found_inf: Its overflow flag: where it is not 0 nothing is written.
        lr: Replaces the learning rate among the options.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    lr: Tensor | None = None


NO_AMP = Amp()


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    q: StepQuadratic,
    options: AdamWOptions,
    amp: Amp = NO_AMP,
    *,
    proximal: bool = False,
    seed: int = -1,
    ordinals: Sequence[int] = (),
    backend: str = "auto",
) -> PenaltyResult:
    """A step of AdamW (Loshchilov & Hutter 2019) and the penalty, in one pass.

    ``coupled``: the penalty's gradient joins the task's, and the value is taken at the weights before the step.
    ``proximal``: after decay and update ``theta = (D theta + c theta*) / (D + c)`` with ``c = lr lambda (F + delta)``
    and ``D = sqrt(v_hat) + eps``, and the value is taken between the two.

    Args:
        params: Of one dtype (fp64, fp32, bf16, fp16) on one device; changed in place.
        grads: One per parameter, of one dtype.
        exp_avgs, exp_avg_sqs: The moments, of one dtype; changed in place.
        max_exp_avg_sqs: amsgrad's, or none.
        steps: 0-dim, fp32 or fp64; how many steps with this one.
        q: The quadratic.
        options: Hyper-parameters.
        amp: What lives on the device.
        proximal: The coupling.
        seed: In [0, 2^32): bf16 tensors are rounded stochastically, keyed on (seed, step, ordinal, element); -1: to
            nearest.
        ordinals: With a seed: each tensor's number.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: Shapes, devices, dtypes or places do not fit; before anything is written.
    """
    arguments = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    home = params[0] if params else q.anchor
    if home is None or not use_native(home.device, backend):
        return reference.adamw_(*arguments, q, options, amp, proximal, seed, ordinals)
    rest = (*arguments, *q, *amp, *options, proximal, seed, list(ordinals))
    result = None if torch.compiler.is_compiling() else _adamw(*rest)
    return PenaltyResult(*(_call(torch.ops.ewc_fast.adamw_.default, *rest) if result is None else result))


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    q: StepQuadratic,
    options: SGDOptions,
    amp: Amp = NO_AMP,
    *,
    first: bool = False,
    proximal: bool = False,
    backend: str = "auto",
) -> PenaltyResult:
    """A step of SGD and the penalty, in one pass; the metric is ``D = (1 - momentum) / (1 - dampening)``.

    Args:
        params: As in :func:`adamw_`.
        grads: Likewise.
        momentum_buffers: One per parameter, of one dtype, changed in place; none without momentum.
        q: The quadratic.
        options: Hyper-parameters.
        amp: What lives on the device.
        first: The momentum begins with these gradients; the buffers hold zeros.
        proximal: As in :func:`adamw_`.
        backend: Likewise.

    Raises:
        ValueError, TypeError: As in :func:`adamw_`.
    """
    home = params[0] if params else q.anchor
    if home is None or not use_native(home.device, backend):
        return reference.sgd_(params, grads, momentum_buffers, q, options, amp, first, proximal)
    rest = (params, grads, momentum_buffers, *q, *amp, *options, first, proximal)
    result = None if torch.compiler.is_compiling() else _sgd(*rest)
    return PenaltyResult(*(_call(torch.ops.ewc_fast.sgd_.default, *rest) if result is None else result))


def proximal_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    q: StepQuadratic,
    rates: Tensor,
    found_inf: Tensor | None = None,
    *,
    root: bool = True,
    backend: str = "auto",
) -> PenaltyResult:
    """The proximal pull after a step of any optimizer: ``theta = (D theta + c theta*) / (D + c)``.

    Args:
        params: As in :func:`adamw_`.
        moments: One per parameter, of one dtype, or none.
        q: The quadratic; with an anchor.
        rates: fp64, (number of parameters, 4): learning rate, factor, inner, eps.
        found_inf: As in :class:`Amp`.
        root: ``D = factor (sqrt(inner moment) + eps)``; else ``D = factor moment``. Without moments ``D = factor``.
        backend: As in :func:`adamw_`.

    Raises:
        ValueError, TypeError: As in :func:`adamw_`.
    """
    assert q.anchor is not None
    if not use_native(q.anchor.device, backend):
        return reference.proximal_(params, moments, q, rates, found_inf, root)
    rest = (params, moments, *q, found_inf, rates, root)
    result = None if torch.compiler.is_compiling() else _proximal(*rest)
    return PenaltyResult(*(_call(torch.ops.ewc_fast.proximal_.default, *rest) if result is None else result))


def puller(params: Sequence[Tensor], q: StepQuadratic, *, backend: str = "auto") -> Callable[..., Any]:
    """:func:`proximal_` of these parameters, prepared: for every optimizer step.

    Not for code that is compiled.

    Returns:
        The call, of moments, rates (four numbers, for all parameters) and ``root``. It returns what the op does, or
        None, with nothing done, unless native kernels serve, rates are numbers and all is on the CPU.
    """
    assert q.anchor is not None
    if q.anchor.device.type != "cpu" or not use_native(q.anchor.device, backend):
        return never
    rest = (*q, None)
    return lambda moments, rates, root: _proximal(params, moments, *rest, rates, root)
