"""The penalty's ops, one typed function each: native kernels where they are built, else the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc_fast.ops import reference
from ewc_fast.ops.native import BACKENDS as BACKENDS
from ewc_fast.ops.native import call as _call
from ewc_fast.ops.native import direct, never
from ewc_fast.ops.native import use_native as use_native
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult

_accumulate = direct("penalty_accumulate_")  # which every optimizer step calls


def penalty(params: Sequence[Tensor], q: FlatQuadratic, *, backend: str = "auto") -> PenaltyResult:
    """The penalty, read-only: reads parameter, anchor and Fisher once and writes nothing the size of the model.

    Args:
        params: Parameters of one dtype (fp64, fp32, bf16, fp16) on one device, read in place; any strides.
        q: The quadratic.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: Shapes, devices, offsets or strides do not fit; names the tensor by its index.
        TypeError: A dtype or layout that the op does not take.
    """
    if not use_native(q.anchor.device, backend):
        return reference.penalty(params, q)
    return PenaltyResult(*_call(torch.ops.ewc_fast.penalty.default, params, *q))


def penalty_grad(
    params: Sequence[Tensor],
    grad: Tensor,
    q: FlatQuadratic,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    backend: str = "auto",
) -> PenaltyResult:
    """The penalty, and its gradient written into a flat buffer, in one pass.

    Args:
        params: As in :func:`penalty`.
        grad: 1-D, laid like the anchor, of any of the parameters' dtypes; written. Zeros where lambda is 0 or
            ``found_inf`` is not. Gaps between the slices are left alone.
        q: The quadratic.
        grad_scale: A GradScaler's scale (0-dim, on the device); multiplies the gradient, not the value.
        found_inf: A GradScaler's overflow flag (0-dim, on the device).
        backend: As in :func:`penalty`.

    Raises:
        ValueError, TypeError: As in :func:`penalty`, before anything is written.
    """
    if not use_native(q.anchor.device, backend):
        return reference.penalty_grad(params, grad, q, grad_scale, found_inf)
    return PenaltyResult(*_call(torch.ops.ewc_fast.penalty_grad.default, params, grad, *q, grad_scale, found_inf))


def penalty_accumulate_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    q: FlatQuadratic,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
    *,
    backend: str = "auto",
) -> PenaltyResult:
    """The penalty, and its gradient added to given gradients in place, in one pass.

    Args:
        params: As in :func:`penalty`.
        grads: One per parameter and of its shape, of one dtype, which may differ from the parameters'; changed in
            place, unless lambda is 0 or ``found_inf`` is not.
        q: The quadratic.
        grad_scale: As in :func:`penalty_grad`.
        found_inf: As in :func:`penalty_grad`.
        maximize: Subtract the gradient, for an optimizer that maximises.
        backend: As in :func:`penalty`.

    Raises:
        ValueError, TypeError: As in :func:`penalty`, before anything is written.
    """
    if not use_native(q.anchor.device, backend):
        return reference.penalty_accumulate_(params, grads, q, grad_scale, found_inf, maximize)
    arguments = (params, grads, *q, grad_scale, found_inf, maximize)
    result = None if torch.compiler.is_compiling() else _accumulate(*arguments)
    if result is None:
        result = _call(torch.ops.ewc_fast.penalty_accumulate_.default, *arguments)
    return PenaltyResult(*result)


def accumulator_into_own(
    params: Sequence[Tensor], q: FlatQuadratic, maximize: bool = False, *, backend: str = "auto"
) -> Callable[[], Any]:
    """:func:`penalty_accumulate_` into each parameter's ``grad``, prepared: for every optimizer step.

    Not for code that is compiled.

    Returns:
        The call. It returns what the op does, or None, with nothing done, unless native kernels serve and all
        parameters have a gradient.
    """
    if not use_native(q.anchor.device, backend):
        return never
    return partial(_accumulate, params, None, *q, None, None, maximize)


def scale_(buffer: Tensor, factor: Tensor, *, backend: str = "auto") -> None:
    """``buffer *= factor`` in place, the factor read on the device; costs nothing where it is 1.

    Args:
        buffer: Contiguous; fp64, fp32, bf16 or fp16.
        factor: 0-dim, fp32 or fp64, on the buffer's device.
        backend: As in :func:`penalty`.
    """
    if not use_native(buffer.device, backend):
        reference.scale_(buffer, factor)
        return
    _call(torch.ops.ewc_fast.scale_.default, buffer, factor)
