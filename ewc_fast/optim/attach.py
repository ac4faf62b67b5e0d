"""The penalty's gradient added at the optimizer's step: once per step, whatever the gradient accumulation."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ewc_fast.loss import EWCLoss
    from ewc_fast.parts import Part

COUPLINGS = ("coupled",)
NOT_IN_OPTIMIZER = "none of the parameters that EWC protects is in the attached optimizer: the penalty has no effect"


class AttachHandle:
    """A penalty attached to an optimizer; returned by :meth:`ewc_fast.EWCLoss.attach`."""

    def __init__(self, ewc: EWCLoss, optimizer: torch.optim.Optimizer) -> None:
        self.ewc = ewc
        self._optimizer = weakref.ref(optimizer)  # which keeps this handle, not the other way round
        self._parts: list[Part] = []
        self._key: tuple[object, ...] | None = None
        self._names: set[str] = set()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer; None once it is gone."""
        return self._optimizer()

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; none once it is gone."""
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    def remove(self) -> None:
        """Detaches the penalty; the optimizer is as it was. A second call does nothing."""
        self._hook.remove()
        self.ewc._detach(self)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args holds the optimizer itself where torch passes it on.
        closure = kwargs.get("closure", next((a for a in args if a is not optimizer), None))
        if closure is not None:
            raise RuntimeError(
                "optimizer.step was called with a closure, whose zero_grad would erase the penalty's gradient: "
                "detach, and call ewc.accumulate_grad_() at the end of the closure, after its backward"
            )
        self.ewc._accumulate(
            self,
            self.parts,
            grad_scale=getattr(optimizer, "grad_scale", None),
            found_inf=getattr(optimizer, "found_inf", None),
        )

    def parts(self) -> list[Part]:
        """The protected parameters that this optimizer steps, one part per device, dtype and direction."""
        groups = self.param_groups()
        whole = self.ewc._parts()
        key = (self.ewc._generation, *((g.get("maximize", False), *map(id, g["params"])) for g in groups))
        if key != self._key:
            parts: list[Part] = []
            for maximize in (False, True):
                members = {id(p) for g in groups if bool(g.get("maximize", False)) is maximize for p in g["params"]}
                for part in whole:
                    chosen = [i for i, p in enumerate(part.params) if id(p) in members]
                    if chosen:
                        parts.append(part.subset(chosen, maximize=maximize))
            if whole and not parts:
                self.ewc._say_once(NOT_IN_OPTIMIZER)
            names = {slot.name for part in parts for slot in part.slots}
            for name in sorted(self._names & {slot.name for part in whole for slot in part.slots} - names):
                self.ewc._say_once(
                    f"{name} was replaced in the model but not in the attached optimizer, which neither trains nor "
                    "penalises it: build the optimizer anew and attach that one"
                )
            self._parts, self._key, self._names = parts, key, names
        return self._parts
