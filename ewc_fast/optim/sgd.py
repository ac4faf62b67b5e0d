"""EWCSGD: SGD and the penalty in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ewc_fast.ops import steps as ops
from ewc_fast.ops.types import PenaltyResult, StepQuadratic
from ewc_fast.optim.fused import Bundle, FusedStep

if TYPE_CHECKING:
    from ewc_fast.loss import EWCLoss

_BUFFER = "momentum_buffer"


class EWCSGD(torch.optim.SGD):
    """:class:`torch.optim.SGD` with Elastic Weight Consolidation in the same pass, level 3.

    Without ``ewc`` it is torch's SGD, to rounding; its state and ``state_dict`` are torch's. With g the gradient of the
    task's loss and c = lr lambda (F + delta), a step is

    - ``"coupled"``: g += lambda (F + delta) (theta - theta*), then weight decay, momentum and update: SGD on the
      penalised loss.
    - ``"proximal"``: weight decay (g += weight_decay theta), momentum and update; then theta = (D theta + c theta*) /
      (D + c) with D = (1 - momentum) / (1 - dampening), 1 without momentum. Stable for every lambda, with the same
      stationary points.

    Leave ``ewc()`` out of the loss, and do not attach. A protected parameter without a gradient is stepped with the
    penalty's alone under ``"coupled"``, and skipped under ``"proximal"``.

    Args:
        params: As for torch's SGD, as are the arguments down to ``fused``.
        lr: A number, or a tensor that is read on the device.
        momentum: Of the gradients.
        dampening: Of the gradient that joins the momentum.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Nesterov's momentum.
        maximize: Maximise the task's objective; the penalty still pulls to the anchor.
        foreach: Without effect: every step is one pass.
        differentiable: Not supported.
        fused: Without effect, likewise.
        ewc: The penalty; None for plain SGD.
        coupling: How it joins the step; with SGD coupled diverges from moderate lambdas up (docs/coupling.md).

    Raises:
        ValueError: An argument is out of range, ``differentiable``, there is no such coupling, or ``ewc`` is of another
            model; names it.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        ewc: EWCLoss | None = None,
        coupling: str = "proximal",
    ) -> None:
        if differentiable:
            raise ValueError("EWCSGD is not differentiable: use torch.optim.SGD and ewc() in the loss")
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            fused=True,
        )
        self._fused = FusedStep(self, ewc, coupling, EWCSGD._run, EWCSGD._sort)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which torch makes of state and groups alone: it has no penalty."""
        super().__setstate__(state)
        if not hasattr(self, "_fused"):
            self._fused = FusedStep(self, None, "coupled", EWCSGD._run, EWCSGD._sort)

    def _sort(self, p: nn.Parameter) -> torch.dtype | None:
        """The buffer's dtype; None where the momentum begins with the next gradient."""
        buffer = self.state[p].get(_BUFFER) if p in self.state else None
        return None if buffer is None else buffer.dtype

    def _run(
        self, group: dict[str, Any], bundle: Bundle, q: StepQuadratic, amp: ops.Amp, proximal: bool
    ) -> PenaltyResult:
        lr, buffers, first = group["lr"], [], False
        if group["momentum"] != 0:
            found = [self.state[p].get(_BUFFER) for p in bundle.params]
            first = found[0] is None
            buffers = [
                torch.zeros_like(p, memory_format=torch.preserve_format) if b is None else b
                for b, p in zip(found, bundle.params, strict=True)
            ]
        result = ops.sgd_(
            bundle.cut(bundle.params),
            bundle.cut([p.grad for p in bundle.params]),  # type: ignore[misc]
            bundle.cut(buffers) if buffers else [],
            q,
            ops.SGDOptions(
                0.0 if isinstance(lr, Tensor) else lr,
                group["momentum"],
                group["dampening"],
                group["weight_decay"],
                group["nesterov"],
                group["maximize"],
            ),
            amp,
            first=first,
            proximal=proximal,
            backend=self._fused.backend,
        )
        if first and amp.found_inf is not None and not amp.found_inf.is_cuda and amp.found_inf.item():
            return result  # no momentum began; where that cannot be read without a sync, one of 0 did
        for p, buffer in zip(bundle.params, buffers, strict=False):
            self.state[p][_BUFFER] = buffer
        return result

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Computes the loss and the gradients anew, and returns the loss.
        """
        return self._fused.step(self, closure)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over torch's or its own ``state_dict``."""
        super().load_state_dict(state_dict)
        FusedStep.take_over(self.param_groups)
