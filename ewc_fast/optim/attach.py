"""The penalty at the optimizer's step: once per step, whatever the gradient accumulation."""

from __future__ import annotations

import sys
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ewc_fast.optim.metrics import is_known
from ewc_fast.parts import Watch

if TYPE_CHECKING:
    from ewc_fast.loss import EWCLoss
    from ewc_fast.parts import Part

COUPLINGS = ("coupled", "proximal")
NOT_IN_OPTIMIZER = "none of the parameters that EWC protects is in the attached optimizer: the penalty has no effect"
SCALE_KEY = "ewc_lambda_scale"  # of a parameter group: a factor of lambda
_MARK = "_ewc_penalty_in_gradients"  # an attribute of the optimizer

_numbers = count()


def check_coupling(coupling: str) -> None:
    """Raises unless there is such a coupling."""
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")


def had_coupled_penalty(optimizer: object) -> bool:
    """Whether an attached penalty's gradient has ever joined those of an optimizer, or of the one that it wraps."""
    while isinstance(optimizer, torch.optim.Optimizer):
        if getattr(optimizer, _MARK, False):
            return True
        optimizer = getattr(optimizer, "optimizer", None)
    return False


class Attachment:
    """A penalty and the optimizer that it meets at every step.

    Args:
        ewc: The penalty.
        optimizer: Which keeps this object, not the other way round.
        coupling: One of :data:`COUPLINGS`.
        every: Act at each so many steps, with so many times the weight.
    """

    def __init__(self, ewc: EWCLoss, optimizer: torch.optim.Optimizer, coupling: str, every: int = 1) -> None:
        self.ewc, self.coupling, self.every = ewc, coupling, every
        self.number = next(_numbers)  # the newest has the highest
        self._optimizer = weakref.ref(optimizer)
        self._parts: list[Part] = []
        self._groups: list[dict[str, Any]] | None = None  # what the parts were made of, as are the next two
        self._generation = 0
        self._watch = Watch()
        self._names: set[str] = set()
        self._added: list[tuple[Tensor, weakref.ref[Tensor], int]] | None = None  # parameter, gradient, its version
        self._steps = 0
        self._marked = coupling != "coupled"

    def mark(self) -> None:
        """Notes on the optimizer, for good, that the penalty's gradient has joined its own; see
        :func:`had_coupled_penalty`."""
        optimizer = self._optimizer()
        if not self._marked and optimizer is not None:
            setattr(optimizer, _MARK, True)
            self._marked = True

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
        self.ewc._detach(self)

    def acts(self) -> bool:
        """Whether this step is one of each so many; called once per step, unless each step is."""
        self._steps += 1
        return (self._steps - 1) % self.every == 0

    @property
    def added(self) -> bool:
        """Whether this step's gradient is in the gradients already. Not so if others have taken the place of all since:
        the step for which it was added has been skipped then."""
        return self._added is not None and any(p.grad is not None and grad() is p.grad for p, grad, _ in self._added)

    def add_now(self, done: frozenset[int] = frozenset()) -> None:
        """Adds this step's gradient before the step, which then adds none.

        Gradients that have been changed in place since it was added last are new ones.

        Args:
            done: The ids of parameters to which another handle has added it.
        """
        if self.added and all(p.grad is not None and p.grad._version == v for p, _, v in self._added or ()):
            return
        if self._steps % self.every == 0:
            self.ewc._accumulate(self, lambda: [part for p in self.parts() if (part := _without(p, done)) is not None])
        self.remember()

    def remember(self) -> None:
        """Which gradients it has been added to, as they are now."""
        params = [p for part in self.parts() for p in part.params]
        self._added = [(p, weakref.ref(p.grad), p.grad._version) for p in params if p.grad is not None]

    def stepped(self) -> None:
        """The step is done: the next one's gradient is not in the gradients."""
        self._added = None

    def parts(self) -> list[Part]:
        """The protected parameters that this optimizer steps, a part per device, dtype and what the coupling needs:
        direction, or parameter group."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        if self._groups is groups and self._generation == self.ewc._generation and self._watch.holds():
            return self._parts
        whole = self.ewc._parts()
        members = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
        kinds: dict[tuple[int, Any], list[int]] = {}
        for n, part in enumerate(whole):
            for i, p in enumerate(part.params):
                if (group := members.get(id(p))) is not None:
                    down = not groups[group].get("maximize", False)
                    kinds.setdefault((n, group if self.coupling == "proximal" else down), []).append(i)
        parts: list[Part] = []
        for (n, _), chosen in kinds.items():
            of = [members[id(whole[n].params[i])] for i in chosen]
            factors = [lambda_scale(groups[group]) * self.every for group in of]
            maximize = bool(groups[of[0]].get("maximize", False))
            part = whole[n].subset(chosen, maximize=maximize, factors=factors)
            part.group = of[0]
            parts.append(part)
        if whole and not parts:
            self.ewc._say_once(NOT_IN_OPTIMIZER)
        self.ewc._say_what_is_penalised_twice(self)
        names = {slot.name for part in parts for slot in part.slots}
        for name in sorted(self._names & {slot.name for part in whole for slot in part.slots} - names):
            self.ewc._say_once(
                f"{name} was replaced in the model but not in the attached optimizer, which neither trains nor "
                "penalises it: build the optimizer anew and attach that one"
            )
        keys = [(g, key, g.get(key)) for g in groups for key in ("params", "maximize", SCALE_KEY)]
        self._watch = self.ewc._watch.extended(keys, [groups, *(g["params"] for g in groups)])
        self._groups, self._generation = groups, self.ewc._generation
        self._parts, self._names = parts, names
        return parts


def _without(part: Part, done: frozenset[int]) -> Part | None:
    left = [i for i, p in enumerate(part.params) if id(p) not in done]
    if len(left) == len(part.params):
        return part
    return part.subset(left, maximize=part.maximize) if left else None


def is_inner(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step whose hook this is was called by another step of the same optimizer: torch wraps ``step`` once
    in every class that has one, and runs the hooks in each wrapper."""
    wrapper = sys._getframe(2)
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def lambda_scale(group: dict[str, Any]) -> float:
    scale = group.get(SCALE_KEY, 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.0 <= scale < float("inf"):
        raise ValueError(f"{SCALE_KEY} of a parameter group must be a finite number of at least 0, got {scale!r}")
    return float(scale)


class AttachHandle(Attachment):
    """A penalty attached to an optimizer; returned by :meth:`ewc_fast.EWCLoss.attach`."""

    def __init__(self, ewc: EWCLoss, optimizer: torch.optim.Optimizer, coupling: str, every: int = 1) -> None:
        super().__init__(ewc, optimizer, coupling, every)
        ewc._select()  # what cannot be penalised is an error before there is a hook
        with_steps = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind)]
        self._may_nest = len(with_steps) > 2  # one is torch's base class
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        if coupling == "proximal":
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            if not is_known(optimizer):
                ewc._say_once(
                    f"the metric of {type(optimizer).__name__} is not known: the proximal pull takes D = 1, as for "
                    "plain SGD, so lambda means something else than in the loss"
                )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.coupling == "proximal":  # only what would be an error after the step
            for group in optimizer.param_groups:
                if SCALE_KEY in group:
                    lambda_scale(group)
            return
        if self._may_nest and is_inner(optimizer):
            return
        # args holds the optimizer itself where torch passes it on.
        closure = None
        if kwargs or len(args) > 1:
            closure = kwargs.get("closure", next((a for a in args if a is not optimizer), None))
        if closure is not None:
            raise RuntimeError(
                "optimizer.step was called with a closure, whose zero_grad would erase the penalty's gradient: "
                "attach with coupling='proximal', or detach and call ewc.accumulate_grad_() at the end of the closure, "
                "after its backward"
            )
        if (self.every == 1 or self.acts()) and (self._added is None or not self.added):
            self.ewc._accumulate(
                self,
                self.parts,
                grad_scale=getattr(optimizer, "grad_scale", None),
                found_inf=getattr(optimizer, "found_inf", None),
            )
        self._added = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._may_nest and is_inner(optimizer):
            return
        if self.every == 1 or self.acts():
            self.ewc._pull(self, optimizer, found_inf=getattr(optimizer, "found_inf", None))
