"""What EWCAdamW and EWCSGD share: which parameters one call of an op serves, with which part of the penalty."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ewc_fast.ops.memory import memory_strides
from ewc_fast.ops.steps import Amp
from ewc_fast.ops.types import PenaltyResult, StepQuadratic
from ewc_fast.optim.attach import Attachment, check_coupling, lambda_scale
from ewc_fast.parts import Part, PartResult, lambda_factors, raise_with_names

if TYPE_CHECKING:
    from ewc_fast.loss import EWCLoss


@dataclass
class Bundle:
    """Parameters of one group that one call steps; the protected ones come first.

    Attributes:
        params: The parameters.
        pieces: (parameter's position, first row, last row) of each tensor that the op gets; None: the parameters as
            they are. One that has grown is protected in its old rows only.
        q: The quadratic.
        part: The protected ones, for what is said about them; None without any.
        ordinals: A number for each piece, the same in every run.
    """

    params: list[nn.Parameter]
    pieces: list[tuple[int, int | None, int | None]] | None
    q: StepQuadratic
    part: Part | None
    ordinals: list[int]

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of tensors shaped like the parameters."""
        tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        if self.pieces is None:
            return tensors
        return [tensors[i] if (a, b) == (None, None) else tensors[i].detach()[a:b] for i, a, b in self.pieces]

    def each(self, scalars: Sequence[Tensor]) -> list[Tensor]:
        """One per piece of what there is one per parameter of."""
        return list(scalars) if self.pieces is None else [scalars[i] for i, _, _ in self.pieces]

    def unpenalised(self) -> StepQuadratic:
        """The same tensors without a penalty."""
        return StepQuadratic(self.q.strides, None, None, [-1] * len(self.q.offsets))


# Functions of the optimizer's class: bound ones would keep a dropped optimizer, and its penalty, until a collection.
Sort = Callable[[Any, nn.Parameter], Hashable]
Run = Callable[[Any, dict[str, Any], Bundle, StepQuadratic, Amp, bool], PenaltyResult]


class FusedStep:
    """An optimizer's steps, and the penalty in them.

    Args:
        optimizer: The optimizer; it keeps this object.
        ewc: The penalty, or None.
        coupling: See :meth:`ewc_fast.EWCLoss.attach`.
        run: Steps a bundle of a group: (optimizer, group, bundle, quadratic, what lives on the device, proximal).
        sort: Of (optimizer, parameter): what parameters of one bundle have in common, besides device and dtypes.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, ewc: EWCLoss | None, coupling: str, run: Run, sort: Sort
    ) -> None:
        check_coupling(coupling)
        self.run, self.sort, self.proximal = run, sort, coupling == "proximal"
        self.attachment: Attachment | None = None
        self._bundles: dict[int, tuple[object, list[Bundle]]] = {}
        if ewc is not None:
            if not hasattr(ewc, "_check_attachable"):
                raise TypeError(f"ewc must be an EWCLoss, got {type(ewc).__name__}")
            ewc._check_attachable(optimizer, coupling)
            self.attachment = Attachment(ewc, optimizer, coupling)
            ewc._register(self.attachment)

    @staticmethod
    def take_over(groups: list[dict[str, Any]]) -> None:
        """After a ``load_state_dict``, whose groups say how the optimizer that saved them stepped."""
        for group in groups:
            group["fused"], group["foreach"] = True, None

    @property
    def backend(self) -> str:
        """Which kernels."""
        return "auto" if self.attachment is None else self.attachment.ewc.backend

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
        """All groups, and the newest values of the penalty; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups(optimizer)
        return loss

    def _step_groups(self, optimizer: torch.optim.Optimizer) -> None:
        attachment = self.attachment
        self._check(optimizer)
        penalised = attachment is not None and not attachment.added
        results: list[PartResult] = []
        done: set[int] = set()
        for number, group in enumerate(optimizer.param_groups):
            try:
                self._step_group(optimizer, number, group, penalised, frozenset(), done, results)
            except (ValueError, TypeError, RuntimeError) as error:
                # A device, dtype or memory order has changed: then the state follows, and the rest runs again.
                self._bundles.clear()
                if attachment is None or not attachment.ewc._bind():
                    raise error
                self._step_group(optimizer, number, group, penalised, frozenset(done), done, results)
        if attachment is not None:
            if penalised:
                if len(done) < sum(len(group["params"]) for group in optimizer.param_groups):
                    results += self._skipped(attachment, done)
                attachment.ewc._record(attachment, results)
            attachment.stepped()

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises for what no group's step can serve, before any of them is stepped."""
        for group in optimizer.param_groups:
            lambda_scale(group)
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.numel() != 1:
                raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} does not support sparse gradients, and a parameter of shape "
                        f"{tuple(p.shape)} has one: build its layer with sparse=False"
                    )

    def _step_group(
        self,
        optimizer: torch.optim.Optimizer,
        number: int,
        group: dict[str, Any],
        penalised: bool,
        before: frozenset[int],
        done: set[int],
        results: list[PartResult],
    ) -> None:
        """Steps what was not stepped ``before``, and adds it to what is done."""
        for bundle in self._of_group(optimizer, number, group, before):
            home = bundle.params[0].device
            grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
            lr = group["lr"]
            amp = Amp(
                None if grad_scale is None else grad_scale.to(home, non_blocking=True),
                None if found_inf is None else found_inf.to(home, non_blocking=True),
                lr.reshape(()).to(home, non_blocking=True) if isinstance(lr, Tensor) else None,
            )
            try:
                q = bundle.q if penalised else bundle.unpenalised()
                result = self.run(optimizer, group, bundle, q, amp, self.proximal)
            except (ValueError, TypeError, RuntimeError) as error:
                if bundle.part is not None and bundle.pieces is None:
                    raise_with_names(error, bundle.part)
                raise
            done.update(map(id, bundle.params))
            if bundle.part is not None and penalised:
                results.append((bundle.part, result))

    def _skipped(self, attachment: Attachment, done: set[int]) -> list[PartResult]:
        """What the step skipped: its value alone."""

        def skipped() -> list[Part]:
            left = [(part, [i for i, p in enumerate(part.params) if id(p) not in done]) for part in attachment.parts()]
            return [part.subset(chosen) for part, chosen in left if chosen]

        return attachment.ewc._run(skipped, lambda part: [(part, attachment.ewc._value(part))])

    # ---- who is stepped by which call ----

    def _of_group(
        self, optimizer: torch.optim.Optimizer, number: int, group: dict[str, Any], before: frozenset[int]
    ) -> list[Bundle]:
        ewc = None if self.attachment is None else self.attachment.ewc
        whole = [] if ewc is None else ewc._parts()
        params = group["params"]
        lacking = any(p.grad is None for p in params)
        if lacking and whole and not self.proximal and ewc is not None and ewc.ewc_lambda != 0.0:
            protected = {id(p) for part in whole for p in part.params}
            for p in params:
                if p.grad is None and p.requires_grad and id(p) in protected:
                    p.grad = torch.zeros_like(p)  # becomes the penalty's
        params = [p for p in params if p.grad is not None and id(p) not in before]
        kinds = [(p.device, p.dtype, p.grad.dtype, self.sort(optimizer, p)) for p in params]
        strides = (p.stride() for p in params)
        key = (None if ewc is None else ewc._generation, lambda_scale(group), *map(id, params), *kinds, *strides)
        known = self._bundles.get(number)
        if known is None or known[0] != key or before:
            if self.attachment is not None:
                self.attachment.parts()  # which says what was replaced in the model alone
            known = (key, self._make(optimizer, group, params, kinds, whole))
            self._bundles[number] = known
        return known[1]

    def _make(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        params: list[nn.Parameter],
        kinds: list[Any],
        whole: list[Part],
    ) -> list[Bundle]:
        place = {id(p): (n, i) for n, part in enumerate(whole) for i, p in enumerate(part.params)}
        ordinal = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        by_kind: dict[Hashable, dict[int | None, list[nn.Parameter]]] = {}
        for p, kind in zip(params, kinds, strict=True):
            n = place[id(p)][0] if id(p) in place else None
            by_kind.setdefault(kind, {}).setdefault(n, []).append(p)
        bundles = []
        for by_part in by_kind.values():
            free = by_part.pop(None, [])
            for n, members in by_part.items():
                part = whole[n].subset(  # type: ignore[index]
                    [place[id(p)][1] for p in members],
                    maximize=bool(group.get("maximize", False)),
                    factors=[lambda_scale(group)] * len(members),
                )
                bundles.append(_bundle(members, free, part, ordinal))
                free = []
            if free:
                bundles.append(_bundle([], free, None, ordinal))
        return bundles


def _bundle(
    protected: list[nn.Parameter], free: list[nn.Parameter], part: Part | None, ordinal: dict[int, int]
) -> Bundle:
    params = [*protected, *free]
    rows = [] if part is None else part.rows
    pieces: list[tuple[int, int | None, int | None]] = [(i, None if n is None else 0, n) for i, n in enumerate(rows)]
    tails = [(i, n, None) for i, n in enumerate(rows) if n is not None]
    others = [*tails, *((i, None, None) for i in range(len(protected), len(params)))]
    strides: list[int] = [] if part is None else list(part.quadratic.strides)
    for i, a, _ in others:
        p = torch.view_as_real(params[i]) if params[i].is_complex() else params[i]
        strides += memory_strides(p.detach() if a is None else p.detach()[a:])
    numbers = [2 * ordinal[id(params[i])] + (a is not None and b is None) for i, a, b in [*pieces, *others]]
    if part is None:
        q = StepQuadratic(strides, None, None, [-1] * len(others))
    else:
        q = part.step_quadratic
        device = part.quadratic.anchor.device
        extra = len(others)
        q = StepQuadratic(
            strides,
            q.anchor,
            q.fisher,
            [*q.offsets, *[-1] * extra],
            q.ewc_lambda,
            q.delta,
            None if q.scale is None else torch.cat([q.scale, lambda_factors([1.0] * extra, device)]),
            None if q.constant is None else torch.cat([q.constant, lambda_factors([0.0] * extra, device)]),
        )
    return Bundle(params, [*pieces, *others] if tails else None, q, part, numbers)
