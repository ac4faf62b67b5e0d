"""EWCAdamW: AdamW and the penalty in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ewc_fast.ops import steps as ops
from ewc_fast.ops.types import PenaltyResult, StepQuadratic
from ewc_fast.optim.fused import Bundle, FusedStep

if TYPE_CHECKING:
    from ewc_fast.loss import EWCLoss

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _names(group: Mapping[str, Any]) -> tuple[str, ...]:
    return _MOMENTS if group["amsgrad"] else _MOMENTS[:2]


class EWCAdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with Elastic Weight Consolidation in the same pass, level 3.

    Parameter, gradient, moments, anchor and Fisher are read once each. Without ``ewc`` it is torch's AdamW, to
    rounding; its state and its ``state_dict`` are torch's, so that checkpoints load both ways. With g the gradient of
    the task's loss and c = lr lambda (F + delta), a step is

    - ``"coupled"``: g += lambda (F + delta) (theta - theta*), then AdamW's decay, moments and update: AdamW on the
      penalised loss.
    - ``"proximal"``: AdamW's decay theta *= 1 - lr weight_decay, moments and update theta -= lr m_hat / D with D =
      sqrt(v_hat) + eps; then theta = (D theta + c theta*) / (D + c). Stable for every lambda, with the same stationary
      points: where g + lambda (F + delta) (theta - theta*) + weight_decay D theta = 0.

    Leave ``ewc()`` out of the loss, and do not attach. A protected parameter without a gradient is stepped with the
    penalty's alone under ``"coupled"``, and skipped under ``"proximal"``.

    Args:
        params: As for torch's AdamW, as are the arguments down to ``fused``.
        lr: A number, or a tensor that is read on the device.
        betas: Of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        amsgrad: Whether the largest second moment is used.
        maximize: Maximise the task's objective; the penalty still pulls to the anchor.
        foreach: Without effect: every step is one pass.
        capturable: Allow steps inside a CUDA graph.
        differentiable: Not supported.
        fused: Without effect, likewise.
        ewc: The penalty; None for plain AdamW.
        coupling: How it joins the step.
        moments_dtype: fp32 or bf16; None for the parameters' own, as torch.
        stochastic_rounding: Round bf16 parameters and moments up with the probability of the part that is dropped, so
            that updates below a parameter's resolution are not lost. The numbers are keyed on (seed, step, tensor,
            element): a run can be repeated and resumed.
        seed: Of the rounding, in [0, 2^32).

    Raises:
        ValueError: An argument is out of range, ``differentiable``, there is no such coupling, or ``ewc`` is of another
            model; names it.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        ewc: EWCLoss | None = None,
        coupling: str = "coupled",
        moments_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if differentiable:
            raise ValueError("EWCAdamW is not differentiable: use torch.optim.AdamW and ewc() in the loss")
        if any(isinstance(beta, Tensor) for beta in betas):
            raise ValueError("betas must be numbers: EWCAdamW takes only lr as a tensor")
        if moments_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"moments_dtype must be torch.float32, torch.bfloat16 or None, got {moments_dtype}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2^32), got {seed!r}")
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            capturable=capturable,
            fused=True,
        )
        self._moments_dtype = moments_dtype
        self._seed = seed if stochastic_rounding else -1
        self._fused = FusedStep(self, ewc, coupling, EWCAdamW._run, EWCAdamW._sort)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which torch makes of state and groups alone: it has no penalty."""
        super().__setstate__(state)
        if not hasattr(self, "_fused"):
            self._moments_dtype, self._seed = None, -1
            self._fused = FusedStep(self, None, "coupled", EWCAdamW._run, EWCAdamW._sort)

    def _dtype_for(self, p: nn.Parameter) -> torch.dtype:
        return p.dtype if self._moments_dtype is None or p.is_complex() else self._moments_dtype

    def _moments(self, p: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            dtype = self._dtype_for(p)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in _names(group):
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _sort(self, p: nn.Parameter) -> torch.dtype:
        state = self.state.get(p)
        return state["exp_avg"].dtype if state else self._dtype_for(p)

    def _run(
        self, group: dict[str, Any], bundle: Bundle, q: StepQuadratic, amp: ops.Amp, proximal: bool
    ) -> PenaltyResult:
        states = [self._moments(p, group) for p in bundle.params]
        steps = [state["step"] for state in states]
        moments = [bundle.cut([state[name] for state in states]) for name in _names(group)]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        torch._foreach_add_(steps, 1)
        try:
            result = ops.adamw_(
                bundle.cut(bundle.params),
                bundle.cut([p.grad for p in bundle.params]),  # type: ignore[misc]
                moments[0],
                moments[1],
                moments[2] if group["amsgrad"] else [],
                bundle.each(steps),
                q,
                ops.AdamWOptions(
                    0.0 if isinstance(lr, Tensor) else lr,
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                    group["maximize"],
                ),
                amp,
                proximal=proximal,
                seed=self._seed,
                ordinals=bundle.ordinals if self._seed >= 0 else (),
                backend=self._fused.backend,
            )
        except BaseException:
            torch._foreach_sub_(steps, 1)
            raise
        if amp.found_inf is not None:
            torch._foreach_sub_(steps, [amp.found_inf.reshape(())] * len(steps))
        return result

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Computes the loss and the gradients anew, and returns the loss.
        """
        if hasattr(self, "_accelerator_graph_capture_health_check"):
            self._accelerator_graph_capture_health_check()
        else:  # its name in older ones
            self._cuda_graph_capture_health_check()
        return self._fused.step(self, closure)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over torch's or its own ``state_dict``; the moments in this optimizer's dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        FusedStep.take_over(self.param_groups)
        for n, p in zip(numbers, params, strict=True):
            if n not in saved:
                continue
            state = self.state[p]
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
            for name in _MOMENTS:
                if name in saved[n]:  # torch has made it the parameter's dtype
                    state[name] = saved[n][name].to(p.device, self._dtype_for(p), copy=True)
