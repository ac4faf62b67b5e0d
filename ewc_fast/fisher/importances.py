"""Other measures of how much a weight matters, in the form of a Fisher diagonal: L2-SP, SI, RWalk, MAS.

None of them is a Fisher: a forgetting predicted from them has no unit. Their papers write the penalty without EWC's
half, ``c * sum importance (theta - theta*)^2``: that is ``ewc_lambda = 2 c`` here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast.fisher.batches import batch_size, check_loader, take_apart
from ewc_fast.fisher.capture import UNCOVERED
from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.estimate import estimate
from ewc_fast.fisher.estimator import FisherEstimator, one_at_a_time
from ewc_fast.fisher.objectives import Objective, Target
from ewc_fast.layout import trainable_parameters

PATH_KINDS = ("si", "rwalk")


def uniform_importance(model: nn.Module) -> FisherDiagonal:
    """Importance 1 for every weight: the penalty is L2-SP, ``lambda/2 * |theta - theta*|^2``.

    Args:
        model: Its parameters that require grad are taken.

    Returns:
        A read-only mapping from the model's own parameter names to ones, shaped like the parameter, on its device, fp32
        (fp64 for fp64 parameters).

    Raises:
        ValueError: No parameter requires grad.

    References:
        Li, Grandvalet, Davoine, "Explicit inductive bias for transfer learning with convolutional networks", ICML 2018.
    """
    with torch.inference_mode(False):  # or what is made here could not be changed outside of it
        ones = {name: _zeros(p).fill_(1) for name, p in _trainable(model).items()}
    return FisherDiagonal(ones, _info("l2sp", "constant"))


class PathImportance:
    """Importance from the path that training takes: Synaptic Intelligence (SI) and Riemannian Walk (RWalk).

    Both credit each weight with its share of the fall of the loss, a sum over steps of minus gradient times movement::

        path = PathImportance(model, optimizer)  # before the task is trained
        ...                                      # train
        ewc.consolidate(fisher=path.result())    # its end
        path.reset()                             # before the next task

    With ``g`` the gradient before a step, ``d`` the step's movement of the weight and ``D`` its movement from the
    path's start to its end, SI (Zenke et al. 2017, section 3, eqs. 3 to 5) is::

        gain = sum over steps of -g d
        importance = max(0, gain / (D^2 + xi))

    RWalk cuts the path into intervals of some steps, with the gain and the movement ``D`` of each, and keeps a moving
    average ``F`` of squared gradients, the Fisher of EWC++ (Chaudhry et al. 2018, section 4)::

        score = sum over intervals of max(0, gain / (F D^2 / 2 + xi))     F as at the interval's start
        F = alpha * (mean of g^2 over the interval) + (1 - alpha) * F     g^2 of the first step before any
        importance = F / max(F) + score / max(score)                      maxima over the whole model

    As in the authors' program a gain is cut off at 0 for each interval, and ``F`` squares the mean gradient of a batch;
    its scale is normalised away. A path is one task's. The paper's score after several tasks, the mean of the last
    one's and the one before, is had with :func:`average`, and goes with ``EWCLoss(mode="latest")``.

    The gradient is the task's: this object's hook runs before every other hook of the optimizer's step, so that a
    penalty attached with ``ewc.attach(optimizer)``, earlier or later, is not in it. (A penalty in the loss is.) The
    movement is all that the step does, other hooks included. A fused optimizer's gradient under
    ``torch.amp.GradScaler`` is unscaled, and a step that overflowed counts for nothing.

    Memory: SI keeps two copies of the weights in fp32 (fp64 for fp64 weights), RWalk five, and during a step two more.

    Args:
        model: Its parameters that require grad are measured; those that ``optimizer`` does not step do not move and
            have importance 0.
        optimizer: Any torch optimizer that is stepped without a closure; of a wrapped one, the inner.
        kind: ``"si"`` or ``"rwalk"``.
        xi: What keeps the division finite, positive; None for 0.1 (SI) and 1e-3 (RWalk), the papers' values. It limits
            the importance of weights that hardly move.
        alpha: RWalk: share of the newest interval in F, in (0, 1].
        interval: RWalk: steps per interval.

    Raises:
        ValueError: Another ``kind``; ``xi``, ``alpha`` or ``interval`` out of range; no parameter that requires grad,
            or none of them in the optimizer.
        TypeError: ``optimizer`` is no torch optimizer.
        RuntimeError: From ``optimizer.step``, before anything is changed: it was called with a closure.

    References:
        Zenke, Poole, Ganguli, "Continual learning through synaptic intelligence", ICML 2017.
        Chaudhry, Dokania, Ajanthan, Torr, "Riemannian walk for incremental learning: understanding forgetting and
        intransigence", ECCV 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kind: str = "si",
        *,
        xi: float | None = None,
        alpha: float = 0.9,
        interval: int = 10,
    ) -> None:
        if kind not in PATH_KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, PATH_KINDS))}, got {kind!r}")
        if xi is None:
            xi = 0.1 if kind == "si" else 1e-3
        if not 0 < xi < math.inf:
            raise ValueError(f"xi must be positive and finite, got {xi}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}")
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"interval must be a positive number of steps, got {interval!r}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        self._model, self._optimizer, self._kind = model, optimizer, kind
        self._xi, self._alpha, self._interval = xi, alpha, interval
        self.reset()
        self._pre_hook = optimizer.register_step_pre_hook(self._before_step)
        self._post_hook = optimizer.register_step_post_hook(self._after_step)
        # Before the hook of an attached penalty, which adds to the gradient.
        _ordered(optimizer._optimizer_step_pre_hooks).move_to_end(self._pre_hook.id, last=False)

    def reset(self) -> None:
        """Starts a new path at the weights as they are now, for the next task.

        Raises:
            ValueError: As the constructor's.
        """
        params = _trainable(self._model)
        stepped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(id(p) in stepped for p in params.values()):
            raise ValueError(
                "none of the model's parameters that require grad is in the optimizer: pass the optimizer that trains "
                "the model"
            )
        self._intervals: dict[str, _IntervalTrace] = {}
        self._traces: Mapping[str, _Trace]
        if self._kind == "si":
            self._traces = {name: _Trace(p, self._xi) for name, p in params.items()}
        else:
            self._traces = self._intervals = {name: _IntervalTrace(p, self._xi) for name, p in params.items()}
        self._by_id = {id(trace.parameter): trace for trace in self._traces.values()}
        self._steps = 0
        self._step: list[tuple[_Trace, Tensor, Tensor]] | None = None  # gradient of the loss and weight before the step

    def remove(self) -> None:
        """Stops watching the optimizer; :meth:`result` stays available. A second call does nothing."""
        self._pre_hook.remove()
        self._post_hook.remove()

    def __enter__(self) -> PathImportance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def result(self) -> FisherDiagonal:
        """The importance of the path so far; the path goes on.

        Returns:
            A read-only mapping from the model's own parameter names to tensors shaped like the parameter, on its
            device, fp32 (fp64 for fp64 parameters).

        Raises:
            RuntimeError: No step was taken since the path began, or a parameter was replaced since.
            ValueError: An importance is not finite.
        """
        if not self._steps:
            raise RuntimeError("the optimizer has made no step since the path began: train, then call result()")
        for name, p in _trainable(self._model).items():
            if name not in self._traces or self._traces[name].parameter is not p:
                raise RuntimeError(
                    f"{name} was added or replaced since the path began: call reset() before training it"
                )
        if self._kind == "si":
            importance = {name: trace.importance() for name, trace in self._traces.items()}
        else:
            rest = self._steps % self._interval  # an interval that is not complete ends here
            parts = {name: trace.score_and_fisher(rest, self._alpha) for name, trace in self._intervals.items()}
            scores, fishers = ([part[i] for part in parts.values()] for i in (0, 1))
            score_scale, fisher_scale = _scale(scores), _scale(fishers)
            importance = {name: s / score_scale + f / fisher_scale for name, (s, f) in parts.items()}
        _check_finite(importance, "the importance")
        return FisherDiagonal(importance, _info(self._kind, "path"))

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args holds the optimizer itself where torch passes it on.
        if kwargs.get("closure", next((a for a in args if a is not optimizer), None)) is not None:
            raise RuntimeError(
                "optimizer.step was called with a closure, which computes the gradient inside the step where "
                "PathImportance cannot see it: call backward before step(), or remove() the PathImportance"
            )
        self._step = None  # of a step that raised
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        grad_scale = getattr(optimizer, "grad_scale", None)
        self._step = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                trace = self._by_id.get(id(p))
                if trace is None or p.grad is None:
                    continue
                gradient = (p.grad.to_dense() if p.grad.is_sparse else p.grad).to(trace.start, copy=True)
                if grad_scale is not None:
                    gradient /= grad_scale.to(gradient.device)
                if group.get("maximize", False):
                    gradient.neg_()
                self._step.append((trace, gradient, p.detach().clone()))
        # Last, so that what another hook does to the weights after the update is part of the movement.
        _ordered(optimizer._optimizer_step_post_hooks).move_to_end(self._post_hook.id)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is None:
            return
        step, self._step = self._step, None
        for trace, gradient, before in step:
            trace.add(gradient, trace.parameter.to(gradient.dtype) - before, first=not self._steps)
        self._steps += 1
        if not self._steps % self._interval:
            for interval in self._intervals.values():
                interval.close(self._interval, self._alpha)


class _Trace:
    """The path of one parameter, as SI measures it.

    Attributes:
        parameter: The parameter.
        start: Its value where the path began.
        gain: Sum over steps of minus gradient times movement.
    """

    def __init__(self, parameter: nn.Parameter, xi: float) -> None:
        self.parameter = parameter
        self.gain = _zeros(parameter)
        self.start = parameter.detach().to(self.gain, copy=True)
        self._xi = xi

    def add(self, gradient: Tensor, movement: Tensor, *, first: bool) -> None:
        """Takes a step; ``first`` if it is the path's first."""
        self.gain.addcmul_(gradient, movement, value=-1)

    def importance(self, metric: float | Tensor = 1.0) -> Tensor:
        """``max(0, gain / (metric D^2 + xi))`` with D the movement since ``start``."""
        distance = (self.parameter.detach().to(self.start) - self.start).square_().mul_(metric)
        return (self.gain / distance.add_(self._xi)).relu_()


class _IntervalTrace(_Trace):
    """The path of one parameter, as RWalk measures it: ``start`` and ``gain`` are those of the interval."""

    def __init__(self, parameter: nn.Parameter, xi: float) -> None:
        super().__init__(parameter, xi)
        self._squares, self._score, self._fisher = (torch.zeros_like(self.gain) for _ in range(3))

    def add(self, gradient: Tensor, movement: Tensor, *, first: bool) -> None:
        super().add(gradient, movement, first=first)
        self._squares.addcmul_(gradient, gradient)
        if first:
            self._fisher.copy_(self._squares)

    def score_and_fisher(self, steps: int, alpha: float) -> tuple[Tensor, Tensor]:
        """What the two are if the interval ends now, after so many steps."""
        if not steps:
            return self._score, self._fisher
        score = self._score + self.importance(self._fisher / 2)
        return score, torch.lerp(self._fisher, self._squares / steps, alpha)

    def close(self, steps: int, alpha: float) -> None:
        """Ends the interval and begins the next."""
        self._score, self._fisher = self.score_and_fisher(steps, alpha)
        self.start.copy_(self.parameter)
        self.gain.zero_()
        self._squares.zero_()


@one_at_a_time
def mas_importance(
    model: nn.Module, loader: Iterable[Any], num_samples: int | None = None, progress: bool = False
) -> FisherDiagonal:
    """Memory Aware Synapses: how much the squared norm of the model's output depends on each weight.

    ``mean over samples of |d ||f(x)||^2 / d theta|`` (Aljundi et al. 2018, section 4.1, eq. 3 with the squared l2 norm
    of the outputs), sample by sample, with f the model's outputs before any softmax. It needs no labels. For outputs
    (B, T, C) the norm is taken over the positions too, those that the batch's ``attention_mask`` (B, T) counts.

    The model is in evaluation mode meanwhile; its training flags, buffers and gradients are left as they were.
    Gradients are vectorised over samples with :func:`torch.func.vmap`; a model that does not allow it runs sample by
    sample after a warning, and ``info.method`` says so. Batches of one sample are an ordinary backward. Absolute values
    of sums over positions have no product form, so this costs as much as vmap, several times a Fisher of the same
    batches.

    Args:
        model: Treats the samples of a batch independently; returns a tensor (B, ...), or an object or mapping with
            ``logits``.
        loader: Yields batches: a tensor; ``(inputs, labels)``, with inputs a tensor, a tuple or list (positional
            arguments) or a dict (keyword arguments); or a dict of keyword arguments. Labels are ignored. Batches are
            moved to the device of the model's first parameter.
        num_samples: Stop after exactly so many samples; None for the whole loader. If the loader has fewer, those are
            used, with a warning.
        progress: Show a progress bar.

    Returns:
        A read-only mapping from the model's own parameter names to tensors shaped like the parameter, on its device,
        fp32 (fp64 for fp64 parameters).

    Raises:
        ValueError: No parameter requires grad, or one is used through a list or closure of the model's own; an empty
            loader, ``num_samples`` below 1, an output or a gradient that is not finite.
        TypeError: A loader that cannot be iterated, a batch or an output of none of the forms above.

    References:
        Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, "Memory aware synapses: learning what (not) to forget",
        ECCV 2018.
    """
    check_loader(loader, num_samples)
    _trainable(model)  # or what raises would speak of an estimate
    return estimate(_Magnitudes(model), loader, num_samples, progress, "MAS")


class _SquaredNorm(Objective):
    """What MAS differentiates, in an estimate's terms: its gradient at an output is twice the output."""

    name = "squared_norm"
    unit = "none"
    measure = "output"

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        size = batch_size(batch)
        if not z.dim() or len(z) != size:
            raise ValueError(f"model(inputs) must return outputs (batch, ...), batch = {size}, got {tuple(z.shape)}")
        mask = take_apart(batch).kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or z.shape[:-1] != mask.shape:
            return Target(None, None, size)
        return Target(None, mask != 0, size)

    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        twice = 2 * z.detach().to(torch.promote_types(z.dtype, torch.float32))
        yield twice if target.counted is None else twice.masked_fill(~target.counted[..., None], 0)


class _Magnitudes(FisherEstimator):
    """Sums of the absolute values of per-sample gradients, which no layer's rule gives."""

    _WHAT = "absolute gradient"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.kind = "mas"
        self._objective = _SquaredNorm("empirical", None, 1)
        self._status = dict.fromkeys(self._params, UNCOVERED)

    @staticmethod
    def _accumulate(total: Tensor, gradients: Tensor) -> None:
        total += gradients.to(total.dtype).abs().sum(0)

    @property
    def info(self) -> FisherInfo:
        return replace(super().info, is_fisher=False)


def _ordered(hooks: Any) -> OrderedDict[int, Any]:
    """An optimizer's hooks as what they are; torch declares a dict."""
    return hooks


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    params = trainable_parameters(model)
    if not params:
        raise ValueError("no parameter of the model requires grad: call requires_grad_(True) on those to protect")
    return params


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)


def _scale(tensors: Iterable[Tensor]) -> float:
    """The largest entry, or 1 if that is 0."""
    return max((tensor.max().item() for tensor in tensors if tensor.numel()), default=0.0) or 1.0


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{what} of {name} is not finite: an input, gradient or weight is NaN or infinite")


def _info(kind: str, method: str, loss: str = "none", count: int = 0, batch_size: int = 0) -> FisherInfo:
    return FisherInfo(
        kind=kind,
        loss=loss,
        unit="none",
        num_samples=count,
        num_terms=count,
        batch_size=batch_size,
        method=method,
        is_fisher=False,
    )
