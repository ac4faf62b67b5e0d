"""The optimizer steps in plain PyTorch: the fallback where no kernel is built, and the oracle of the kernels.

Each function computes what the op of the same name in ``csrc/schema.cpp`` computes, with the same precision: element
math in fp32 (fp64 for fp64 parameters), sums in fp64. Nothing here synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ewc_fast.ops import reference
from ewc_fast.ops.memory import is_dense, same_memory_order
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult, StepQuadratic

if TYPE_CHECKING:
    from ewc_fast.ops.steps import AdamWOptions, Amp, SGDOptions

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST_WEIGHT = 1e38  # of a pull: with infinity it would be NaN


class _List(NamedTuple):
    name: str
    tensors: Sequence[Tensor]
    required: bool = True
    written: bool = True


def _check(lists: Sequence[_List], q: StepQuadratic) -> list[Sequence[int]]:
    """Raises what the native ops raise, before anything is written; returns each parameter's strides."""
    params = lists[0].tensors
    if not params and q.anchor is None:
        raise ValueError("no parameters and no anchor: nothing to step")
    for name, tensors, required, _ in lists:
        if len(tensors) != len(params) and (required or tensors):
            raise ValueError(f"{name} has {len(tensors)} tensors for {len(params)} parameters")
    if len(q.offsets) != len(params):
        raise ValueError(f"offsets has {len(q.offsets)} entries for {len(params)} parameters")
    if q.anchor is not None:
        if q.fisher is None or q.ewc_lambda is None or q.delta is None:
            raise ValueError("an anchor needs fisher, ewc_lambda and delta beside it")
        reference.check_buffers(q.anchor, q.fisher)
        flat = FlatQuadratic(q.anchor, q.fisher, [], [], q.ewc_lambda, q.delta, q.scale, q.constant)
        reference.check_scalars(flat, len(params))
        if params and q.anchor.device != params[0].device:
            raise ValueError(f"anchor is on {q.anchor.device}, params[0] on {params[0].device}")
    length = 0 if q.anchor is None else q.anchor.numel()
    laid: list[Sequence[int]] = []
    position = 0
    for i, p in enumerate(params):
        strides = q.strides[position : position + p.dim()]
        position += p.dim()
        if len(strides) != p.dim() or not same_memory_order(p, strides):
            raise ValueError(f"params[{i}] has strides {p.stride()}, the call says {tuple(strides)}")
        fits = -1 <= q.offsets[i] <= length - p.numel() if q.anchor is not None else q.offsets[i] == -1
        if not fits:
            raise ValueError(f"params[{i}] has {p.numel()} elements at offset {q.offsets[i]}, the anchor {length}")
        if p.numel() and not is_dense(torch.empty_strided(p.shape, strides, device="meta")):
            raise ValueError(f"strides {tuple(strides)} leave gaps for shape {tuple(p.shape)}")
        for name, tensors, _, written in lists:
            if not tensors:
                continue
            t = tensors[i]
            if t.layout != torch.strided:
                raise TypeError(f"{name}[{i}] is {t.layout}; expected a dense tensor")
            if t.dtype not in _DTYPES or t.dtype != tensors[0].dtype:
                raise TypeError(f"{name}[{i}] has dtype {t.dtype}, {name}[0] {tensors[0].dtype}: one call, one dtype")
            if t.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {t.device}, params[0] on {params[0].device}")
            if t.shape != p.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}, its parameter {tuple(p.shape)}")
            if written and reference.overlaps(t):
                raise ValueError(f"{name}[{i}] has strides {t.stride()}: elements share memory; clone() it first")
        laid.append(strides)
    if position != len(q.strides):
        raise ValueError(f"strides has {len(q.strides)} entries for {position} dimensions")
    return laid


# A step of one tensor's values in the math dtype: (index, parameter, gradient) to the updated parameter and the metric.
Update = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def _penalise(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    q: StepQuadratic,
    laid: Sequence[Sequence[int]],
    lrs: Sequence[Tensor],
    acts: Tensor,
    maximize: bool,
    proximal: bool,
    update: Update,
) -> tuple[PenaltyResult, list[Tensor]]:
    """Steps with the penalty around them; returns the new parameters in the math dtype, nothing is written."""
    home = params[0] if params else q.anchor
    assert home is not None
    math_dtype = torch.float64 if params and params[0].dtype == torch.float64 else torch.float32
    sums = reference.sum_dtype(home.device)
    zero = torch.zeros((), dtype=sums, device=home.device)
    penalties, predictions, updated = [], [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        parameter, gradient = p.to(math_dtype), g.to(math_dtype)
        gradient = -gradient if maximize else gradient
        if q.anchor is None or q.offsets[i] < 0:
            penalties.append(zero)
            predictions.append(zero)
            updated.append(update(i, parameter, gradient)[0])
            continue
        assert q.fisher is not None and q.ewc_lambda is not None and q.delta is not None
        ewc_lambda, delta = q.ewc_lambda.reshape(()).to(sums), q.delta.reshape(())
        anchor = reference.view(q.anchor, p, laid[i], q.offsets[i]).to(math_dtype)
        fisher = reference.view(q.fisher, p, laid[i], q.offsets[i]).to(math_dtype)
        scale = torch.ones((), dtype=sums, device=home.device) if q.scale is None else q.scale[i].to(sums)
        weights = fisher + delta.to(math_dtype)
        factor = (ewc_lambda * scale).to(math_dtype)
        on = (ewc_lambda != 0) & acts
        seen = parameter
        if proximal:
            seen, metric = update(i, parameter, gradient)
            weight = (lrs[i].to(math_dtype) * factor * weights).clamp(max=_LARGEST_WEIGHT)
            total = metric + weight
            pull = torch.where(total > 0, weight / total, torch.zeros_like(weight)) * (anchor - seen)
            updated.append(torch.where(on, seen + pull, seen))
            seen = torch.where(acts, seen, parameter)
        else:
            joined = torch.where(on, gradient + factor * weights * (parameter - anchor), gradient)
            updated.append(update(i, parameter, joined)[0])
        d = seen - anchor
        weighted, squared = (fisher * d * d).sum(dtype=sums), (d * d).sum(dtype=sums)
        if q.constant is not None:
            weighted = weighted + q.constant[i]
        isotropic = torch.where(delta == 0, torch.zeros_like(squared), delta.to(sums) * squared)
        value = 0.5 * ewc_lambda * scale * (weighted + isotropic)
        penalties.append(torch.where(ewc_lambda == 0, torch.zeros_like(value), value))
        predictions.append(0.5 * weighted)
    if params:
        by_tensor = torch.stack([torch.stack(penalties), torch.stack(predictions)])
    else:
        by_tensor = torch.zeros(2, 0, dtype=sums, device=home.device)
    penalty, predicted = by_tensor.sum(dim=1).to(math_dtype).unbind()
    return PenaltyResult(penalty.clone(), predicted.clone(), by_tensor), updated


def _acts(found_inf: Tensor | None, device: torch.device) -> Tensor:
    if found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return found_inf.reshape(()) == 0


def _unscaled(grads: Sequence[Tensor], amp: Amp, acts: Tensor) -> Sequence[Tensor]:
    """Divides in place, unless there was an overflow."""
    if amp.grad_scale is None:
        return grads
    for g in grads:
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        g.copy_(torch.where(acts, (wide / amp.grad_scale.reshape(())).to(g.dtype), g))
    return grads


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """32-bit integers in int64, whose products wrap at 2^64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _rounding_key(seed: int, step: Tensor, ordinal: int, which: int) -> Tensor:
    key = _mix(torch.tensor(seed, dtype=torch.int64, device=step.device))
    for part in (step.to(torch.int64), ordinal, which):
        key = _mix((key + part) & _MASK)
    return key


def _round(x: Tensor, to: Tensor, strides: Sequence[int], key: Tensor | None) -> Tensor:
    """``x`` in the dtype of ``to``: to nearest, or stochastically to bf16, by each element's place in memory."""
    if key is None or to.dtype != torch.bfloat16:
        return x.to(to.dtype)
    flat = torch.empty_strided(x.shape, strides, dtype=torch.float32, device=x.device).copy_(x)
    memory = flat.as_strided((x.numel(),), (1,))
    element = torch.arange(x.numel(), dtype=torch.int64, device=x.device)
    high = ((element >> 32) * 0x9E3779B9) & _MASK
    random = _mix((_mix((element & _MASK) ^ high) + key) & _MASK)
    bits = memory.view(torch.int32).to(torch.int64) & _MASK
    magnitude = bits & 0x7FFFFFFF
    special = torch.where(magnitude > 0x7F800000, torch.full_like(bits, 0x7FC00000), bits)
    rounded = torch.where(magnitude >= 0x7F800000, special, (bits + (random >> 16)) & _MASK) >> 16
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16)
    laid = torch.empty_strided(x.shape, strides, dtype=torch.bfloat16, device=x.device)
    laid.as_strided((x.numel(),), (1,)).copy_(rounded.view(torch.bfloat16))
    return laid


def _write(to: Tensor, x: Tensor, acts: Tensor, strides: Sequence[int], key: Tensor | None = None) -> None:
    to.copy_(torch.where(acts, _round(x, to, strides, key), to))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    q: StepQuadratic,
    options: AdamWOptions,
    amp: Amp,
    proximal: bool,
    seed: int,
    ordinals: Sequence[int],
) -> PenaltyResult:
    """A step of AdamW with the penalty."""
    lists = [
        _List("params", params),
        _List("grads", grads, written=amp.grad_scale is not None),
        _List("exp_avgs", exp_avgs),
        _List("exp_avg_sqs", exp_avg_sqs),
        _List("max_exp_avg_sqs", max_exp_avg_sqs, required=False),
    ]
    laid = _check(lists, q)
    if len(steps) != len(params):
        raise ValueError(f"steps has {len(steps)} tensors for {len(params)} parameters")
    for moments in lists[3:]:
        if moments.tensors and moments.tensors[0].dtype != exp_avgs[0].dtype:
            raise TypeError(f"{moments.name} must have the dtype of exp_avgs")
    if not -1 <= seed <= _MASK:
        raise ValueError(f"seed must lie in [0, 2^32), or be -1, got {seed}")
    if seed >= 0 and len(ordinals) != len(params):
        raise ValueError(f"ordinals has {len(ordinals)} entries for {len(params)} parameters")
    home = params[0] if params else q.anchor
    assert home is not None
    for i, step in enumerate(steps):
        reference.check_scalar(step, f"steps[{i}]", home.device)
    for name, number in zip(amp._fields, amp, strict=True):
        reference.check_scalar(number, name, home.device)
    acts = _acts(amp.found_inf, home.device)
    grads = _unscaled(grads, amp, acts)
    lr = torch.tensor(options.lr, dtype=torch.float64, device=home.device) if amp.lr is None else amp.lr.reshape(())
    lr = lr.to(reference.sum_dtype(home.device))
    moments_of: list[tuple[Tensor, ...]] = []

    def update(i: int, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        dtype, step = parameter.dtype, steps[i].reshape(()).to(lr.dtype)
        first, second = exp_avgs[i].to(dtype), exp_avg_sqs[i].to(dtype)
        parameter = parameter * (1 - lr * options.weight_decay).to(dtype)
        first = first + (1 - options.beta1) * (gradient - first)
        second = options.beta2 * second + (1 - options.beta2) * gradient * gradient
        largest = torch.maximum(max_exp_avg_sqs[i].to(dtype), second) if max_exp_avg_sqs else second
        root = (1 / (1 - options.beta2**step).sqrt()).to(dtype)
        metric = largest.sqrt() * root + options.eps
        moments_of.append((first, second, largest))
        return parameter - (lr / (1 - options.beta1**step)).to(dtype) * (first / metric), metric

    result, updated = _penalise(params, grads, q, laid, [lr] * len(params), acts, options.maximize, proximal, update)
    for i, p in enumerate(params):
        targets = (p, None, exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sqs[i] if max_exp_avg_sqs else None)
        for which, (to, x) in enumerate(zip(targets, (updated[i], None, *moments_of[i]), strict=True)):
            if to is not None and x is not None:
                key = None if seed < 0 else _rounding_key(seed, steps[i].reshape(()), ordinals[i], which)
                _write(to, x, acts, laid[i], key)
    return result


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    q: StepQuadratic,
    options: SGDOptions,
    amp: Amp,
    first: bool,
    proximal: bool,
) -> PenaltyResult:
    """A step of SGD with the penalty."""
    laid = _check(
        [
            _List("params", params),
            _List("grads", grads, written=amp.grad_scale is not None),
            _List("momentum_buffers", momentum_buffers, required=options.momentum != 0),
        ],
        q,
    )
    home = params[0] if params else q.anchor
    assert home is not None
    for name, number in zip(amp._fields, amp, strict=True):
        reference.check_scalar(number, name, home.device)
    acts = _acts(amp.found_inf, home.device)
    grads = _unscaled(grads, amp, acts)
    lr = torch.tensor(options.lr, dtype=torch.float64, device=home.device) if amp.lr is None else amp.lr.reshape(())
    momentum, rest = (0.0, 1.0) if first else (options.momentum, 1 - options.dampening)
    kept = math.inf if options.dampening == 1 else (1 - options.momentum) / (1 - options.dampening)
    buffers: list[Tensor] = []

    def update(i: int, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if options.weight_decay != 0:
            gradient = gradient + options.weight_decay * parameter
        if options.momentum:
            buffer = momentum * momentum_buffers[i].to(parameter.dtype) + rest * gradient
            buffers.append(buffer)
            gradient = gradient + options.momentum * buffer if options.nesterov else buffer
        metric = torch.full_like(parameter, kept if options.momentum else 1.0)
        return parameter - lr.to(parameter.dtype) * gradient, metric

    result, updated = _penalise(params, grads, q, laid, [lr] * len(params), acts, options.maximize, proximal, update)
    for i, p in enumerate(params):
        _write(p, updated[i], acts, laid[i])
        if options.momentum:
            _write(momentum_buffers[i], buffers[i], acts, laid[i])
    return result


@torch.no_grad()
def proximal_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    q: StepQuadratic,
    rates: Tensor,
    found_inf: Tensor | None,
    root: bool,
) -> PenaltyResult:
    """The proximal pull."""
    laid = _check([_List("params", params), _List("moments", moments, required=False, written=False)], q)
    assert q.anchor is not None
    if rates.shape != (len(params), 4):
        raise ValueError(f"rates must be ({len(params)}, 4), got {tuple(rates.shape)}")
    if rates.dtype != torch.float64 and rates.device.type != "mps":
        raise TypeError(f"rates must be float64, got {rates.dtype}")
    if rates.device != q.anchor.device:
        raise ValueError(f"rates is on {rates.device}, anchor on {q.anchor.device}")
    reference.check_scalar(found_inf, "found_inf", q.anchor.device)
    acts = _acts(found_inf, q.anchor.device)

    def update(i: int, parameter: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        factor, inner, eps = rates[i, 1:].to(parameter.dtype).unbind()
        if not moments:
            return parameter, factor.expand_as(parameter)
        x = moments[i].to(parameter.dtype)
        return parameter, factor * ((inner * x).sqrt() + eps) if root else factor * x

    result, updated = _penalise(params, params, q, laid, list(rates[:, 0]), acts, False, True, update)
    for p, x, strides in zip(params, updated, laid, strict=True):
        _write(p, x, acts, strides)
    return result
