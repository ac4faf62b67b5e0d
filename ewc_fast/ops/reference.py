"""The native ops in plain PyTorch: the fallback where no kernel is built, and the oracle of the kernels.

Each function computes what the op of the same name in ``csrc/schema.cpp`` computes, with the same precision: element
math in fp32 (fp64 for fp64 parameters), sums in fp64. Nothing here synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ewc_fast.ops.memory import is_dense, same_memory_order
from ewc_fast.ops.types import STATE_DTYPES, FlatQuadratic, PenaltyResult

_DTYPES = (*STATE_DTYPES, torch.float16)
_SCALAR_DTYPES = (torch.float32, torch.float64)


def _math_dtype(params: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if params and params[0].dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which dtype a device can sum."""
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no fp64


def check_scalar(t: Tensor | None, name: str, device: torch.device) -> None:
    """Raises unless it is one number on that device."""
    if t is None:
        return
    if t.numel() != 1:
        raise ValueError(f"{name} must hold one number, got shape {tuple(t.shape)}")
    if t.dtype not in _SCALAR_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, expected {device}")


def _check_per_tensor(t: Tensor | None, name: str, count: int, device: torch.device, fp32_allowed: bool) -> None:
    if t is None:
        return
    if t.shape != (count,) or not t.is_contiguous():
        raise ValueError(f"{name} must be 1-D with one number for each of the {count} tensors, got {tuple(t.shape)}")
    if t.dtype not in (_SCALAR_DTYPES if fp32_allowed else (torch.float64,)):
        raise TypeError(f"{name} must be float64{' or float32' if fp32_allowed else ''}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, expected {device}")


def check_scalars(
    q: FlatQuadratic, count: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """Raises unless the scalars fit, each with its name."""
    device = q.anchor.device
    check_scalar(q.ewc_lambda, "ewc_lambda", device)
    check_scalar(q.delta, "delta", device)
    _check_per_tensor(q.scale, "scale", count, device, fp32_allowed=True)
    _check_per_tensor(q.constant, "constant", count, device, fp32_allowed=device.type == "mps")
    check_scalar(grad_scale, "grad_scale", device)
    check_scalar(found_inf, "found_inf", device)


def overlaps(t: Tensor) -> bool:
    """Whether elements share memory."""
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def view(flat: Tensor, p: Tensor, strides: Sequence[int], offset: int) -> Tensor:
    """A parameter's slice of a flat buffer, which may itself be a view of something larger."""
    return flat.narrow(0, offset, p.numel()).as_strided(p.shape, strides)


def check_buffers(anchor: Tensor, fisher: Tensor) -> None:
    """Raises unless they are flat buffers of dtypes that a state may have."""
    for name, flat in (("anchor", anchor), ("fisher", fisher)):
        if flat.dtype == torch.float16:
            raise ValueError(f"{name} is float16, which zeroes small Fisher entries: use bfloat16, float32 or float64")
        if flat.dtype not in STATE_DTYPES:
            raise TypeError(f"{name} has dtype {flat.dtype}; expected float64, float32 or bfloat16")
        if flat.dim() != 1 or not flat.is_contiguous() or flat.numel() != anchor.numel():
            raise ValueError(f"{name} must be a flat (1-D, contiguous) buffer as long as the anchor")
        if flat.device != anchor.device:
            raise ValueError(f"{name} is on {flat.device}, anchor on {anchor.device}")


def _check(params: Sequence[Tensor], q: FlatQuadratic, grads: Sequence[Tensor] | None = None) -> list[Sequence[int]]:
    """Raises what the native ops raise, before anything is written; returns each parameter's strides in the buffers."""
    check_buffers(q.anchor, q.fisher)
    for name, count in (("offsets", len(q.offsets)), ("grads", len(params) if grads is None else len(grads))):
        if count != len(params):
            raise ValueError(f"{name} has {count} entries for {len(params)} parameters")
    split: list[Sequence[int]] = []
    position = 0
    for i, p in enumerate(params):
        strides = q.strides[position : position + p.dim()]
        position += p.dim()
        for which, members in (("params", params), ("grads", grads or ())):
            if i >= len(members):
                continue
            t = members[i]
            if t.layout != torch.strided:
                raise TypeError(f"{which}[{i}] is {t.layout}; expected a dense tensor")
            if t.dtype not in _DTYPES or t.dtype != members[0].dtype:
                raise TypeError(f"{which}[{i}] has dtype {t.dtype}, {which}[0] {members[0].dtype}: one call, one dtype")
            if t.device != q.anchor.device:
                raise ValueError(f"{which}[{i}] is on {t.device}, anchor on {q.anchor.device}")
            if t.shape != p.shape:
                raise ValueError(f"grads[{i}] has shape {tuple(t.shape)}, its parameter {tuple(p.shape)}")
            if which == "grads" and overlaps(t):
                raise ValueError(f"grads[{i}] has strides {t.stride()}: elements share memory; clone() it first")
        if len(strides) != p.dim() or not same_memory_order(p, strides):
            raise ValueError(f"params[{i}] has strides {p.stride()}, the state is laid by {tuple(strides)}")
        if not is_dense(torch.empty_strided(p.shape, strides, device="meta")) and p.numel() > 0:
            raise ValueError(f"strides {tuple(strides)} leave gaps for shape {tuple(p.shape)}")
        if not 0 <= q.offsets[i] <= q.anchor.numel() - p.numel():
            raise ValueError(f"params[{i}] has {p.numel()} elements at offset {q.offsets[i]}, past the anchor's end")
        split.append(strides)
    if position != len(q.strides):
        raise ValueError(f"strides has {len(q.strides)} entries for {position} dimensions")
    return split


def _pass(
    params: Sequence[Tensor], q: FlatQuadratic, strides: Sequence[Sequence[int]], *, gradients: bool
) -> tuple[PenaltyResult, list[Tensor]]:
    math, sums = _math_dtype(params), sum_dtype(q.anchor.device)
    ewc_lambda, delta = q.ewc_lambda.reshape(()).to(sums), q.delta.reshape(())
    penalties, predictions, unscaled = [], [], []
    for i, p in enumerate(params):
        anchor = view(q.anchor, p, strides[i], q.offsets[i]).to(math)
        fisher = view(q.fisher, p, strides[i], q.offsets[i]).to(math)
        d = p.to(math) - anchor
        weighted, squared = (fisher * d * d).sum(dtype=sums), (d * d).sum(dtype=sums)
        if q.constant is not None:
            weighted = weighted + q.constant[i]
        isotropic = torch.where(delta == 0, torch.zeros_like(squared), delta.to(sums) * squared)
        value = 0.5 * ewc_lambda * (weighted + isotropic)
        if q.scale is not None:
            value = value * q.scale[i]
        penalties.append(torch.where(ewc_lambda == 0, torch.zeros_like(value), value))
        predictions.append(0.5 * weighted)
        if gradients:
            unscaled.append((fisher + delta.to(math)) * d)
    if params:
        by_tensor = torch.stack([torch.stack(penalties), torch.stack(predictions)])
    else:
        by_tensor = torch.zeros(2, 0, dtype=sums, device=q.anchor.device)
    penalty, predicted = by_tensor.sum(dim=1).to(math).unbind()
    return PenaltyResult(penalty.clone(), predicted.clone(), by_tensor), unscaled


def _factor_and_acts(
    q: FlatQuadratic, i: int, grad_scale: Tensor | None, found_inf: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    factor = q.ewc_lambda.reshape(())
    acts = factor != 0
    if q.scale is not None:
        factor = factor * q.scale[i]
    if grad_scale is not None:
        factor = factor * grad_scale.reshape(())
    if found_inf is not None:
        acts = acts & (found_inf.reshape(()) == 0)
    return factor.to(dtype), acts


@torch.no_grad()
def penalty(params: Sequence[Tensor], q: FlatQuadratic) -> PenaltyResult:
    """The value alone."""
    check_scalars(q, len(params))
    return _pass(params, q, _check(params, q), gradients=False)[0]


@torch.no_grad()
def penalty_grad(
    params: Sequence[Tensor],
    grad: Tensor,
    q: FlatQuadratic,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> PenaltyResult:
    """The value, and the gradient written into ``grad``."""
    check_scalars(q, len(params), grad_scale, found_inf)
    strides = _check(params, q)
    if grad.dtype not in _DTYPES:
        raise TypeError(f"grad has dtype {grad.dtype}; expected float64, float32, bfloat16 or float16")
    if grad.dim() != 1 or not grad.is_contiguous() or grad.shape != q.anchor.shape or grad.device != q.anchor.device:
        raise ValueError(f"grad must be a flat buffer like the anchor ({q.anchor.numel()} elements)")
    result, gradients = _pass(params, q, strides, gradients=True)
    for i, g in enumerate(gradients):
        factor, acts = _factor_and_acts(q, i, grad_scale, found_inf, g.dtype)
        value = torch.where(acts, factor * g, torch.zeros_like(g))
        # Through a copy in memory order: torch.compile refuses to write to a strided view of a slice.
        laid = torch.empty_strided(g.shape, strides[i], dtype=grad.dtype, device=grad.device).copy_(value)
        grad.narrow(0, q.offsets[i], g.numel()).copy_(laid.as_strided((g.numel(),), (1,)))
    return result


@torch.no_grad()
def penalty_accumulate_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    q: FlatQuadratic,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> PenaltyResult:
    """The value, and the gradient added to ``grads`` in place (subtracted with ``maximize``)."""
    check_scalars(q, len(params), grad_scale, found_inf)
    result, gradients = _pass(params, q, _check(params, q, grads), gradients=True)
    for i, (g, out) in enumerate(zip(gradients, grads, strict=True)):
        factor, acts = _factor_and_acts(q, i, grad_scale, found_inf, g.dtype)
        total = out.to(g.dtype) - factor * g if maximize else out.to(g.dtype) + factor * g
        out.copy_(torch.where(acts, total.to(out.dtype), out))
    return result


@torch.no_grad()
def scale_(buffer: Tensor, factor: Tensor) -> None:
    """``buffer *= factor``."""
    if buffer.dtype not in _DTYPES:
        raise TypeError(f"buffer has dtype {buffer.dtype}; expected float64, float32, bfloat16 or float16")
    if not buffer.is_contiguous():
        raise ValueError("buffer must be contiguous")
    check_scalar(factor, "factor", buffer.device)
    buffer.mul_(factor.reshape(()))


def may_overlap(t: Tensor) -> bool:
    """Whether elements may lie in one place: exact for all views that slicing, permuting and expanding make."""
    last = 0  # the furthest element of the dimensions so far
    for stride, n in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
        if stride <= last:
            return t.numel() > 0
        last += (n - 1) * stride
    return False


def sharing(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two that begin in one place, or dense ones that reach into each other. Others may be columns of a matrix."""
    places = sorted((t.data_ptr(), i) for i, t in enumerate(tensors) if t.numel() > 0)
    last, furthest = (-1, -1), (-1, -1)  # where the one before begins; where a dense one ends
    for place, i in places:
        dense = is_dense(tensors[i])
        if place == last[0] or (dense and place < furthest[0]):
            return (last if place == last[0] else furthest)[1], i
        last = place, i
        if dense:
            furthest = max(furthest, (place + tensors[i].numel() * tensors[i].element_size(), i))
    return None


def _check_fisher(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """Raises what the native op raises, before anything is written."""
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight}")
    if len(grads) != len(fisher):
        raise ValueError(f"grads has {len(grads)} tensors for {len(fisher)} of fisher")
    for i, (f, g) in enumerate(zip(fisher, grads, strict=True)):
        if f.dtype in (torch.bfloat16, torch.float16):
            name = str(f.dtype).removeprefix("torch.")
            raise ValueError(
                f"fisher[{i}] is {name}, in which sums of squares stop growing: accumulate in float32 or float64"
            )
        for which, t, first in (("fisher", f, fisher[0]), ("grads", g, grads[0])):
            if t.layout != torch.strided:
                raise TypeError(f"{which}[{i}] is {t.layout}; expected a dense tensor")
            if t.dtype not in _DTYPES:
                raise TypeError(f"{which}[{i}] has dtype {t.dtype}; expected float64, float32, bfloat16 or float16")
            if t.dtype != first.dtype:
                raise TypeError(f"{which}[{i}] has dtype {t.dtype}, {which}[0] {first.dtype}: one call takes one dtype")
            if t.device != fisher[0].device:
                raise ValueError(f"{which}[{i}] is on {t.device}, fisher[0] on {fisher[0].device}")
        if (g.shape[1:] if g.dim() == f.dim() + 1 else g.shape) != f.shape:
            raise ValueError(
                f"grads[{i}] has shape {list(g.shape)}, fisher[{i}] {list(f.shape)}: expected that, or one leading "
                "dimension more for samples"
            )
        if may_overlap(f):
            raise ValueError(f"fisher[{i}] has strides {list(f.stride())}: elements share memory; clone() it first")
    shared = sharing(fisher)
    if shared is not None:
        raise ValueError(
            f"fisher[{shared[0]}] and fisher[{shared[1]}] share their memory: accumulate into each once per call"
        )


@torch.no_grad()
def fisher_accumulate_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0) -> None:
    """``fisher[i] += weight * sum_b grads[i][b]^2``."""
    _check_fisher(fisher, grads, weight)
    for f, g in zip(fisher, grads, strict=True):
        squares = g.to(f.dtype).square()
        f.add_(squares.sum(dim=0) if g.dim() > f.dim() else squares, alpha=weight)
