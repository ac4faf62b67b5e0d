"""The penalty as a node of autograd: value and gradient in one pass, at the forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc_fast.ops import memory
from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult


def _storage_references(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _graph_is_kept() -> bool:
    """Whether the backward that is running leaves the graph for another (retain_graph); yes where torch can't tell."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keep_graph is None else bool(keep_graph())


_taking = threading.Lock()


class GradientBuffer:
    """The flat buffer a gradient is written into: allocated once, used again as soon as nothing else holds its memory.

    A graph whose backward has not run holds it, and so do gradients that autograd has moved into ``p.grad``.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.handed_out = False  # whether a backward has ever asked for the gradient

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer of ``numel`` elements; its content is undefined."""
        if torch.compiler.is_compiling():  # the compiler plans memory itself
            return torch.empty(numel, dtype=dtype, device=device)
        with _taking:  # or two threads find it free
            old = self._buffer
            if (
                old is None
                or type(old) is not Tensor  # made under a mode that fakes tensors
                or old.is_inference()
                or old.numel() != numel
                or old.dtype != dtype
                or old.device != device
                or _storage_references(old) > _storage_references(torch.empty(0))
            ):
                self._buffer = old = torch.zeros(numel, dtype=dtype, device=device)
            return old.detach()  # an alias of its own, so that whoever keeps it is counted


GradientBuffers = dict[tuple[torch.device, torch.dtype], GradientBuffer]


class _FirstDerivativeOnly(torch.autograd.Function):
    """Hands gradients through; a second derivative raises rather than leave the penalty's out."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "EWC's penalty has no second derivative here: leave it out of what create_graph=True differentiates, "
            "or write it in plain PyTorch"
        )


def _first_derivative_only(gradients: list[Tensor | None]) -> list[Tensor | None]:
    if not torch.is_grad_enabled():  # enabled in a backward only under create_graph
        return gradients
    token = torch.empty(0, requires_grad=True)
    given = iter(_FirstDerivativeOnly.apply(token, *(g for g in gradients if g is not None)))
    return [None if g is None else next(given) for g in gradients]


def _times(grad: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    """A saved gradient times ``grad_output``: in place, unless the graph may be walked again."""
    factor = grad_output.detach().to(grad.device)
    if torch.compiler.is_compiling() or _graph_is_kept():
        return (grad * factor).to(grad.dtype)
    grad = grad.detach()
    ops.scale_(grad, factor, backend=backend)
    return grad


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: FlatQuadratic, buffer: GradientBuffer, rows: Sequence[int | None], backend: str, *params: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = buffer.take(q.anchor.numel(), params[0].dtype, q.anchor.device)
        protected = [p if n is None else p[:n] for p, n in zip(params, rows, strict=True)]
        result = ops.penalty_grad(protected, grad, q, backend=backend)
        ctx.save_for_backward(grad)
        ctx.q, ctx.buffer, ctx.rows, ctx.backend = q, buffer, rows, backend
        ctx.shapes = [p.shape for p in params]
        ctx.mark_non_differentiable(result.predicted, result.by_tensor)
        return result.penalty, result.predicted, result.by_tensor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            ctx.buffer.handed_out = True
        grad = _times(grad, grad_output, ctx.backend)
        gradients: list[Tensor | None] = []
        position = 0
        for i, (shape, rows) in enumerate(zip(ctx.shapes, ctx.rows, strict=True)):
            strides = ctx.q.strides[position : position + len(shape)]
            position += len(shape)
            if not ctx.needs_input_grad[4 + i]:
                gradients.append(None)
                continue
            protected = shape if rows is None else (rows, *shape[1:])
            view = grad.as_strided(protected, strides, ctx.q.offsets[i])
            if rows is not None:  # rows added since the anchor was set are free
                view = torch.cat([view, view.new_zeros(shape[0] - rows, *shape[1:])])
            gradients.append(view)
        return (None, None, None, None, *_first_derivative_only(gradients))


def penalty(
    params: Sequence[Tensor],
    q: FlatQuadratic,
    buffer: GradientBuffer,
    rows: Sequence[int | None],
    *,
    backend: str = "auto",
) -> PenaltyResult:
    """The penalty with a gradient: exact autograd semantics, but for a second derivative, which raises.

    Args:
        params: Whole parameters, of one dtype and device.
        q: The quadratic, of each parameter's protected part.
        buffer: Where the gradient is kept until the backward.
        rows: How many leading rows of a parameter are protected; None for all of it.
        backend: As in :func:`ewc_fast.ops.penalty.penalty`.
    """
    return PenaltyResult(*_Penalty.apply(q, buffer, rows, backend, *params))


def _flat_in_order_of(t: Tensor, p: Tensor) -> Tensor:
    """``t`` as a flat buffer in ``p``'s memory order; a copy only where the two orders differ."""
    if t.is_contiguous() and p.is_contiguous():
        return t.view(-1)
    strides = memory.memory_strides(p)
    if not memory.is_dense(t) or not memory.same_memory_order(t, strides):
        t = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((t.numel(),), (1,))


def _separate(
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    ewc_lambda: Tensor,
    run: Callable[[Tensor, FlatQuadratic], PenaltyResult],
) -> Tensor:
    """One call of an op per parameter; the sum of the values, in fp64 where the device has it."""
    scalars: dict[torch.device, tuple[Tensor, Tensor]] = {}
    parts = []
    for p, f, a in zip(params, fisher, anchor, strict=True):
        if p.device not in scalars:
            here = ewc_lambda.to(p.device)
            scalars[p.device] = (here, torch.zeros_like(here))
        q = FlatQuadratic(
            _flat_in_order_of(a, p), _flat_in_order_of(f, p), [0], list(memory.memory_strides(p)), *scalars[p.device]
        )
        by_tensor = run(p, q).by_tensor
        parts.append(by_tensor if p.device == params[0].device else by_tensor.to(params[0].device))
    return torch.cat(parts, dim=1)[0].sum()


class _SeparatePenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ewc_lambda: Tensor,
        fisher: Sequence[Tensor],
        anchor: Sequence[Tensor],
        buffers: GradientBuffers,
        backend: str,
        *params: Tensor,
    ) -> Tensor:
        ctx.places = []
        lengths: dict[tuple[torch.device, torch.dtype], int] = {}
        for p in params:
            key = (p.device, p.dtype)
            ctx.places.append((key, p.shape, memory.memory_strides(p), lengths.setdefault(key, 0)))
            lengths[key] += memory.aligned(p.numel())
        grads = {}
        for (device, dtype), length in lengths.items():
            if torch.compiler.is_compiling():  # which lets nothing from outside be changed here
                buffer = GradientBuffer()
            else:
                buffer = buffers.setdefault((device, dtype), GradientBuffer())
            grads[device, dtype] = buffer.take(length, dtype, device)
        places = iter(ctx.places)

        def run(p: Tensor, q: FlatQuadratic) -> PenaltyResult:
            key, _, _, offset = next(places)
            return ops.penalty_grad([p], grads[key].narrow(0, offset, p.numel()), q, backend=backend)

        total = _separate(params, fisher, anchor, ewc_lambda, run)
        ctx.keys, ctx.backend = list(grads), backend
        ctx.save_for_backward(*grads.values())
        return total.to(result_dtype(params))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.keys, ctx.saved_tensors, strict=True)
        scaled = {key: _times(grad, grad_output, ctx.backend) for key, grad in saved}
        gradients: list[Tensor | None] = [
            scaled[key].as_strided(shape, strides, offset) if ctx.needs_input_grad[5 + i] else None
            for i, (key, shape, strides, offset) in enumerate(ctx.places)
        ]
        return (None, None, None, None, None, *_first_derivative_only(gradients))


def _is_transformed(params: Sequence[Tensor]) -> bool:
    """Whether torch.func or forward-mode AD is at work; the Function then raises, where values alone would pass as
    constants."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(p) for p in params) or torch.autograd.forward_ad._current_level >= 0


def separate_penalty(
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    ewc_lambda: Tensor,
    buffers: GradientBuffers,
    *,
    backend: str = "auto",
) -> Tensor:
    """``lambda/2 * sum F d^2`` over state that comes in separate tensors, differentiable in the parameters.

    Args:
        params: At least one; any dtypes and devices.
        fisher: Of the parameters' shapes, on their devices; fp64, fp32 or bf16.
        anchor: Likewise.
        ewc_lambda: 0-dim, fp32 or fp64.
        buffers: Where the gradients are kept until the backward; filled as needed.
        backend: As in :func:`ewc_fast.ops.penalty.penalty`.

    Returns:
        0-dim, fp64 if any parameter is, else fp32; on the first parameter's device.
    """
    if torch.is_grad_enabled() and (any(p.requires_grad for p in params) or _is_transformed(params)):
        total: Tensor = _SeparatePenalty.apply(ewc_lambda, fisher, anchor, buffers, backend, *params)
        return total
    with torch.no_grad():
        total = _separate(params, fisher, anchor, ewc_lambda, lambda p, q: ops.penalty([p], q, backend=backend))
        return total.to(result_dtype(params))


def result_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a penalty over these parameters."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
