"""EWCLoss: what users hold."""

from __future__ import annotations

import fnmatch
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast import storage
from ewc_fast.checks import check_count
from ewc_fast.fisher import estimate_fisher
from ewc_fast.functional import check_lambda
from ewc_fast.layout import (
    Slot,
    check_materialised,
    check_whole,
    module_edges,
    name_parameters,
    own_name,
    select_parameters,
)
from ewc_fast.ops import autograd, steps
from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult
from ewc_fast.optim.attach import NOT_IN_OPTIMIZER, AttachHandle, Attachment, check_coupling
from ewc_fast.optim.metrics import StepMetric, rates_of, step_metric
from ewc_fast.parts import Part, PartResult, Watch, check_strided, lambda_factors, raise_with_names, split_by_grad_dtype
from ewc_fast.state import EWCState, SlotMapping, protected_part

# A penalty that was computed with a graph so often, and never differentiated, is most likely detached by mistake.
_GRAPHS_WITHOUT_BACKWARD = 100

_PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()


class EWCLoss:
    """Elastic Weight Consolidation: a penalty that keeps a model from forgetting the tasks it has finished.

    ``lambda/2 * (sum F d^2 + C + delta * sum d^2)`` with ``d = theta - theta*`` (Kirkpatrick et al. 2017, eq. 3), F the
    Fisher diagonal and theta* the weights after the old tasks, both of which :meth:`consolidate` sets; ``delta`` is
    ``damping`` times the mean of F. Before the first consolidate the penalty is exactly 0.

    A plain callable, as an optimizer is: not a module, so no wrapper broadcasts, moves or saves its state with the
    model's. It follows the model: parameters that are replaced, moved, cast or laid out anew are noticed at the next
    call.

    Args:
        model: The model; the parameters that require grad are protected, once each when tied.
        ewc_lambda: The weight, at least 0; 1 is the Bayesian one, 30 to 300 served best in experiments. The Fisher
            shrinks with the old task's loss: where that is nearly 0, lambda has to grow by powers of ten. May be set at
            any time; at 0 nothing is penalised, but the forgetting is still predicted.
        mode: How tasks add up: ``"separate"``, the sum of a quadratic per task (kept in one, exactly); ``"online"``,
            ``F = gamma F + F_new`` around the newest weights (Schwarz et al. 2018); ``"latest"``, the newest task only.
        gamma: How much of the old Fisher stays, 0 to 1; online mode only.
        damping: Adds an isotropic part to the penalty, in units of the mean Fisher; at least 0. May be set at any time.
        fisher_dtype: fp64, fp32 or bf16; None for the parameters' own (fp32 for fp16).
        anchor_dtype: Likewise. Rounding it costs accuracy where the weights move little.
        params: What to protect, if not all: names, shell patterns or parameters.
        backend: ``"auto"``: kernels where they are built, else plain PyTorch, which is said once; ``"native"``: kernels
            or an error; ``"reference"``: plain PyTorch.
        lambda_by: Factors of lambda by name or shell pattern (``{"classifier.*": 0.1}``); the first that fits a
            parameter counts.

    Raises:
        ValueError: An argument is out of range; names it.
    """

    def __init__(
        self,
        model: nn.Module,
        ewc_lambda: float = 100.0,
        mode: str = "separate",
        gamma: float = 1.0,
        damping: float = 0.0,
        fisher_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        params: Iterable[str | Tensor] | None = None,
        backend: str = "auto",
        *,
        lambda_by: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
        self.model = model
        self.backend = backend
        self._lambda = check_lambda(ewc_lambda)
        self._damping = check_lambda(damping, "damping")
        self._state = EWCState(mode, gamma, fisher_dtype, anchor_dtype)
        self._selection = None if params is None else name_parameters(model, params)
        self._said: set[str] = set()
        self._selected, _, _ = self._select()
        self._lambda_by = self._checked_factors(lambda_by or {})
        if backend == "native" and self._selected:
            ops.use_native(next(iter(self._selected.values())).device, backend)
        self._mean_fisher = 0.0
        self._scalars: dict[torch.device, tuple[Tensor, Tensor]] = {}  # lambda and delta, where they are read
        self._buffers: dict[tuple[torch.device, torch.dtype], autograd.GradientBuffer] = {}
        self._generation = 0  # counts every change of what _parts() returns
        self._cached_parts: list[Part] = []
        self._watch = Watch()  # what those were made of
        self._newest: dict[Hashable, list[PartResult]] = {}
        self._handles: weakref.WeakSet[Attachment] = weakref.WeakSet()  # an optimizer's hook keeps its handle
        self._graphs = 0

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they are attached to nothing, for torch leaves an optimizer's hooks behind."""
        state = self.__dict__.copy()
        for name in ("_handles", "_newest", "_cached_parts", "_watch", "_buffers"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Binds a copy to its model."""
        self.__dict__.update(state)
        self._handles, self._newest, self._buffers = weakref.WeakSet(), {}, {}
        self._bind()

    # ---- hyper-parameters ----

    @property
    def ewc_lambda(self) -> float:
        """The penalty's weight. Setting it neither recompiles nor synchronises."""
        return self._lambda

    @ewc_lambda.setter
    def ewc_lambda(self, value: float) -> None:
        self._lambda = check_lambda(value)
        self._fill_scalars()

    @property
    def damping(self) -> float:
        """The isotropic part of the penalty, in units of the mean Fisher."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping = check_lambda(value, "damping")
        self._fill_scalars()

    @property
    def mode(self) -> str:
        """How tasks add up."""
        return self._state.mode

    @property
    def gamma(self) -> float:
        """How much of the old Fisher stays at a merge (online mode)."""
        return self._state.gamma

    @property
    def num_tasks(self) -> int:
        """How many tasks were consolidated."""
        return self._state.num_tasks

    @property
    def info(self) -> dict[str, Any] | None:
        """How the newest Fisher was estimated; None if the caller gave it without saying."""
        return self._state.info

    def _checked_factors(self, lambda_by: Mapping[str, float]) -> dict[str, float]:
        if not isinstance(lambda_by, Mapping):
            raise TypeError(f"lambda_by must map names or patterns to factors, got {type(lambda_by).__name__}")
        for pattern, factor in lambda_by.items():
            check_lambda(factor, f"lambda_by[{pattern!r}]")
            if not any(fnmatch.fnmatchcase(name, pattern) for name in self._selected):
                raise ValueError(
                    f"lambda_by: {pattern!r} is no protected parameter; names look like {list(self._selected)[:3]}"
                )
        return {pattern: float(factor) for pattern, factor in lambda_by.items()}

    def _lambda_factor(self, name: str) -> float:
        return next((f for pattern, f in self._lambda_by.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)

    def _fill_scalars(self) -> None:
        for ewc_lambda, delta in self._scalars.values():
            ewc_lambda.fill_(self._lambda)
            delta.fill_(self._damping * self._mean_fisher)

    def _scalars_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._scalars:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._scalars[device] = (
                torch.full((), self._lambda, dtype=dtype, device=device),
                torch.full((), self._damping * self._mean_fisher, dtype=dtype, device=device),
            )
        return self._scalars[device]

    # ---- the state ----

    @property
    def fisher(self) -> SlotMapping:
        """The Fisher diagonal by parameter name: read-only mapping of views, shaped like the parameters."""
        return self._state.fisher

    @property
    def anchor(self) -> SlotMapping:
        """theta* by parameter name, likewise."""
        return self._state.anchor

    def _select(self) -> tuple[dict[str, nn.Parameter], frozenset[str], frozenset[str]]:
        """The parameters to protect, the names of the others, and those of the buffers, as they are now."""
        selected, others, buffers = select_parameters(self.model, self._selection)
        for name, p in selected.items():
            if p.dtype not in _PARAMETER_DTYPES:
                raise TypeError(
                    f"{name} has dtype {p.dtype}, which has no penalty: freeze it, or leave it out with params="
                )
        if not selected:
            self._say_once("no parameter to protect requires grad: the penalty has no effect")
        return selected, others, buffers

    def _frozen(self) -> dict[str, nn.Parameter]:
        """Parameters that do not require grad now, by the model's own names; what is known of them is kept."""
        named = ((own_name(self.model, name), p) for name, p in self.model.named_parameters())
        return {name: p for name, p in named if not p.requires_grad}

    def consolidate(
        self,
        loader: Iterable[Any] | None = None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        **estimate: Any,
    ) -> None:
        """Ends a task: folds its Fisher into the state and moves the anchor.

        Args:
            loader: The finished task's data; its Fisher is estimated with :func:`ewc_fast.estimate_fisher`.
            fisher: Instead of ``loader``: a Fisher diagonal by parameter name, one entry for every protected parameter;
                tied aliases and frozen parameters are ignored, any other name is an error.
            anchor: The weights to return to, by name, if not the model's present ones; buffers are ignored as well, so
                that ``model.state_dict()`` fits.
            **estimate: With ``loader``: ``kind``, ``loss``, ``num_samples``, ``progress``, ``generator`` and the other
                arguments of :func:`ewc_fast.estimate_fisher`, but ``params`` and ``out``.

        Raises:
            ValueError: Both or neither of ``loader`` and ``fisher``, ``params`` or ``out``, a missing or unknown name,
                a shape that does not fit, a negative, NaN or infinite Fisher, a NaN or infinite anchor. The state is as
                it was then.
        """
        if isinstance(loader, Mapping):
            raise TypeError("loader is a mapping; a Fisher diagonal goes in by name: consolidate(fisher=...)")
        if (loader is None) == (fisher is None):
            raise ValueError("consolidate takes either a loader or fisher=, one of the two")
        if fisher is not None and estimate:
            raise ValueError(f"{', '.join(estimate)}: only with a loader; a given Fisher is taken as it is")
        for name in estimate.keys() & {"params", "out"}:
            raise ValueError(
                f"{name}: consolidate estimates for what EWCLoss(params=) protects, into its own state; for another "
                f"choice call estimate_fisher({name}=...) and give what it returns as fisher="
            )
        params, others, buffers = self._select()
        self._selected = params
        if not params:
            raise ValueError("no parameter to protect requires grad: nothing to consolidate")
        for name, p in params.items():
            check_materialised(name, p)
        if anchor is not None:
            anchor = self._by_own_name("anchor", anchor, params, others | buffers)
        frozen = self._frozen()
        dropped = self._state.fisher.keys() - params.keys() - frozen.keys()
        before = self._state.groups
        try:
            if fisher is None:
                assert loader is not None
                fisher = self._estimate(params, loader, estimate)
            info = getattr(fisher, "info", None)
            with torch.inference_mode(False):  # or what is made here could not be changed outside of it
                self._state.consolidate(
                    params,
                    self._by_own_name("fisher", fisher, params, others),
                    {name: p.detach() for name, p in params.items()} if anchor is None else anchor,
                    frozen,
                )
                self._state.info = None if info is None else info.to_dict()
                self._state_changed()
        except BaseException:
            if not self._state.num_tasks:  # laid out for the estimate
                self._state.groups = before
            raise
        for name in dropped:
            self._say_dropped(name)

    def _estimate(self, params: Mapping[str, nn.Parameter], loader: Iterable[Any], estimate: dict[str, Any]) -> Any:
        """The loader's Fisher, where it can be in its final place."""
        with torch.inference_mode(False):
            place = self._state.lay_first(params)
        return estimate_fisher(self.model, loader, params=list(params.values()), out=place, **estimate)

    def _by_own_name(
        self, what: str, given: Mapping[str, Tensor], params: Mapping[str, Tensor], ignored: frozenset[str]
    ) -> dict[str, Tensor]:
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must map parameter names to tensors, got {type(given).__name__}")
        named: dict[str, Tensor] = {}
        for name, t in given.items():
            own = own_name(self.model, name)
            if own in named:
                raise ValueError(f"{what} has two entries for {own!r}, one with a wrapper's prefix: leave one out")
            named[own] = t
        missing = [name for name in params if name not in named]
        if missing:
            raise ValueError(f"{what} has no entry for {', '.join(missing)}: every protected parameter needs one")
        unknown = [name for name in named if name not in params and name not in ignored]
        if unknown:
            raise ValueError(f"{what} has entries for {', '.join(unknown)}, which the model does not have")
        return {name: named[name] for name in params}

    def _state_changed(self) -> None:
        self._mean_fisher = self._state.mean_fisher()
        if self._state.num_tasks and self._mean_fisher == 0.0:
            self._say_once("the Fisher is zero everywhere: the penalty has no effect")
        self._fill_scalars()
        self._newest.clear()
        self._bind()

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values: Fisher, anchor, C, mode, gamma and how the Fisher was made.

        ``ewc_lambda`` and ``damping`` are no part of it: they are how strongly the state is used, not what tasks left.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the state by a saved one.

        A parameter that the state does not know, such as a head that is new since, is free until the next consolidate;
        that is said once.

        Raises:
            ValueError: It is no EWC state, of another mode or gamma, or of another model. The state is as it was then.
        """
        self._selected, _, _ = self._select()
        with torch.inference_mode(False):
            self._state.load_state_dict(state, {**self._selected, **self._frozen()})
            self._state_changed()
        self._say_uncovered()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a safetensors file, whole or not at all."""
        storage.save_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or foreign, or the state does not fit; see :meth:`load_state_dict`.
        """
        self.load_state_dict(storage.load_state(path))

    # ---- following the model ----

    def _bind(self) -> bool:
        """Looks up the protected parameters in the model, and lays the state for them anew where that is needed.

        Returns:
            Whether it was needed: a device, dtype or memory order had changed.
        """
        every: dict[str, nn.Parameter] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            every.setdefault(own_name(self.model, name), p)
        bound: dict[str, nn.Parameter] = {}
        protected: dict[str, Tensor] = {}
        for g in self._state.groups:
            for slot in g.group.slots:
                if slot.name not in every:
                    for other, p in every.items():
                        if other.endswith("_flat_param"):  # FSDP's, in which the others are now
                            check_whole(other, p)
                    self._say_dropped(slot.name)
                    continue
                bound[slot.name] = every[slot.name]
                protected[slot.name] = protected_part(slot.name, every[slot.name], slot.shape)
        moved = not self._state.matches(protected)
        if moved:
            self._state.follow(protected)
        self._cached_parts = []
        for g in self._state.groups:
            slots = list(g.group.slots)
            params = [bound[s.name] for s in slots]
            whole = Part(
                params=params,
                rows=[None if p.shape == s.shape else s.shape[0] for p, s in zip(params, slots, strict=True)],
                slots=slots,
                quadratic=FlatQuadratic(
                    g.anchor,
                    g.fisher,
                    [s.offset for s in slots],
                    [stride for s in slots for stride in s.strides],
                    *self._scalars_on(g.group.device),
                    scale=self._scale(slots, g.group.device),
                    constant=g.constant,
                ),
                buffer=self._buffers.setdefault((g.group.device, g.group.dtype), autograd.GradientBuffer()),
                backend=self.backend,
            )
            left = [i for i, p in enumerate(params) if p.requires_grad]
            while left:  # once, but for parameters tied since: no op takes one gradient twice
                first = {id(params[i]): i for i in reversed(left)}
                chosen = [i for i in left if first[id(params[i])] == i]
                left = [i for i in left if first[id(params[i])] != i]
                self._cached_parts.append(whole.subset(chosen) if len(chosen) < len(params) else whole)
        if bound and not self._cached_parts:
            self._say_once("no protected parameter requires grad any more: the penalty has no effect")
        self._watch = Watch(module_edges(self.model, bound.values()), (), bound.values())
        self._generation += 1
        return moved

    def _scale(self, slots: list[Slot], device: torch.device) -> Tensor | None:
        factors = [self._lambda_factor(slot.name) for slot in slots]
        return lambda_factors(factors, device) if any(factor != 1.0 for factor in factors) else None

    def _parts(self) -> list[Part]:
        """What to penalise, after a check that costs microseconds: is the model still made of the same objects?

        What this does not show (another device or memory order) the ops see as they read the parameters.
        """
        if not self._watch.holds():
            self._bind()
        return self._cached_parts

    def _run(self, parts_of: Callable[[], list[Part]], op: Callable[[Part], list[PartResult]]) -> list[PartResult]:
        """Runs an op over parts. One that no longer fits its parameters raises before it writes: then the state follows
        the model, and what has not run yet runs again."""
        results: list[PartResult] = []
        for part in parts_of():
            if torch.compiler.is_compiling():
                results += op(part)
                continue
            try:
                results += op(part)
            except (ValueError, TypeError, RuntimeError) as error:
                if not self._bind():
                    raise_with_names(error, part)
                done = {slot.name for p, _ in results for slot in p.slots}
                for moved in parts_of():
                    rest = moved.without(done)
                    results += op(rest) if rest.params else []
                break
        return results

    # ---- the penalty ----

    def __call__(self) -> Tensor:
        """The penalty, level 1: add it to the loss.

        Value and gradient are computed in one pass, here; the backward hands the gradient out. Autograd's semantics are
        exact, but a second derivative raises.

        Returns:
            0-dim, fp64 if any protected parameter is, else fp32; on the first protected parameter's device.
        """
        with_graph = torch.is_grad_enabled()
        if not torch.compiler.is_compiling() and with_graph and self._is_attached():
            self._say_once(
                "ewc() is called with a graph while attached to an optimizer: the penalty counts twice. Leave one out"
            )

        def op(part: Part) -> list[PartResult]:
            if with_graph:
                result = autograd.penalty(part.params, part.quadratic, part.buffer, part.rows, backend=self.backend)
            else:
                result = ops.penalty(part.protected(part.params), part.quadratic, backend=self.backend)
            return [(part, result)]

        results = self._run(self._parts, op)
        self._record(None, [(part, PenaltyResult(r.penalty.detach(), r.predicted, r.by_tensor)) for part, r in results])
        if not results:
            return self._zero(requires_grad=with_graph)
        if with_graph and not torch.compiler.is_compiling():
            self._watch_graphs(results)
        return self._total([r.penalty for _, r in results])

    def accumulate_grad_(self) -> Tensor:
        """Level 2 by hand: adds the penalty's gradient to ``p.grad`` in place. Call it once per optimizer step.

        A gradient that is None becomes the penalty's. With a GradScaler, call it after ``scaler.unscale_``.

        Returns:
            The penalty at the present weights, 0-dim, without a graph.
        """
        if not torch.compiler.is_compiling() and self._is_attached():
            self._say_once(
                "accumulate_grad_() is called while attached to an optimizer: the penalty counts twice. Leave one out"
            )
        results = self._accumulate(None, self._parts)
        return self._total([r.penalty for _, r in results]) if results else self._zero()

    def _accumulate(
        self,
        key: Hashable,
        parts_of: Callable[[], list[Part]],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> list[PartResult]:
        results = None
        if grad_scale is None and found_inf is None and self._lambda != 0.0 and not torch.compiler.is_compiling():
            parts = parts_of()
            if len(parts) == 1 and (result := parts[0].accumulate_quickly()) is not None:
                results = [(parts[0], result)]
        if results is None:
            results = self._accumulate_in_turn(parts_of, grad_scale, found_inf)
        self._record(key, results)
        return results

    def _accumulate_in_turn(
        self, parts_of: Callable[[], list[Part]], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> list[PartResult]:
        # The device reads lambda itself; this only keeps parameters without a gradient without one.
        reads_only = not torch.compiler.is_compiling() and self._lambda == 0.0

        def op(part: Part) -> list[PartResult]:
            if reads_only:
                return [(part, self._value(part))]
            params = part.protected(part.params)
            grads: list[Tensor] = []
            fresh = []
            for p in part.params:
                grad = p.grad
                if grad is None:
                    p.grad = grad = torch.zeros_like(p)
                    fresh.append(p)
                grads.append(grad)
            try:
                result = ops.penalty_accumulate_(
                    params,
                    part.protected(grads),
                    part.quadratic,
                    None if grad_scale is None else grad_scale.to(part.quadratic.anchor.device, non_blocking=True),
                    None if found_inf is None else found_inf.to(part.quadratic.anchor.device, non_blocking=True),
                    part.maximize,
                    backend=self.backend,
                )
            except Exception as error:
                try:
                    return [result for same in split_by_grad_dtype(part, error) for result in op(same)]
                except Exception:
                    for p in fresh:  # as it was
                        p.grad = None
                    raise
            return [(part, result)]

        if not torch.compiler.is_compiling():
            for part in parts_of():
                check_strided(part)  # before the penalty is in the gradients of another part
        return self._run(parts_of, op)

    def _value(self, part: Part) -> PenaltyResult:
        return ops.penalty(part.protected(part.params), part.quadratic, backend=self.backend)

    def _pull(self, handle: Attachment, optimizer: torch.optim.Optimizer, found_inf: Tensor | None) -> None:
        """The proximal pull on what an optimizer has just stepped; of what it skipped, the value alone."""

        def metric_of(part: Part) -> StepMetric:
            return step_metric(optimizer, optimizer.param_groups[part.group], part.params)

        reads_only = self._lambda == 0.0
        tried: tuple[Part, StepMetric] | None = None
        if found_inf is None and not reads_only and len(parts := handle.parts()) == 1 and parts[0].have_grads():
            tried = parts[0], metric_of(parts[0])
            if (quick := parts[0].pull_quickly(tried[1])) is not None:
                self._record(handle, [(parts[0], quick)])
                return

        def op(part: Part) -> list[PartResult]:
            if reads_only:
                return [(part, self._value(part))]
            if not part.have_grads():
                skipped = [i for i, p in enumerate(part.params) if p.grad is None]
                if len(skipped) == len(part.params):
                    return [(part, self._value(part))]
                stepped = [i for i in range(len(part.params)) if i not in set(skipped)]
                rest = part.subset(skipped)
                return [(rest, self._value(rest)), *op(part.subset(stepped))]
            if tried is not None and part is tried[0]:
                metric = tried[1]
            else:
                metric = metric_of(part)
                if found_inf is None and (quick := part.pull_quickly(metric)) is not None:
                    return [(part, quick)]
            device = part.quadratic.anchor.device
            result = steps.proximal_(
                part.protected(part.params),
                part.protected(metric.moments) if metric.moments else [],
                part.step_quadratic,
                rates_of(metric, len(part.params), device),
                None if found_inf is None else found_inf.to(device, non_blocking=True),
                root=metric.root,
                backend=self.backend,
            )
            return [(part, result)]

        self._record(handle, self._run(handle.parts, op))

    def _watch_graphs(self, results: list[PartResult]) -> None:
        self._graphs += 1
        if self._graphs == _GRAPHS_WITHOUT_BACKWARD and not any(b.handed_out for b in self._buffers.values()):
            self._say_once(
                f"ewc() was called {self._graphs} times and its gradient never reached a parameter: add what it "
                "returns to the loss that backward() is called on, or call it under torch.no_grad()"
            )

    # ---- what the newest pass said ----

    def _record(self, key: Hashable, results: list[PartResult]) -> None:
        if isinstance(key, Attachment):
            if results and self._lambda != 0.0:
                key.mark()
            if key.every > 1:
                results = [(part, r.weighted(1 / key.every)) for part, r in results]
        if key is None:
            self._newest = {None: results}
            return
        self._newest.pop(key, None)
        if self._newest:  # other optimizers' passes still count, for the parameters that this one has not
            names = {slot.name for part, _ in results for slot in part.slots}
            for other, earlier in list(self._newest.items()):
                if other is None or any(slot.name in names for part, _ in earlier for slot in part.slots):
                    del self._newest[other]
        self._newest[key] = results

    def _results(self) -> list[PartResult]:
        return [result for results in self._newest.values() for result in results]

    def _zero(self, *, requires_grad: bool = False) -> Tensor:
        params = list(self._selected.values())
        if not params:
            return torch.zeros((), requires_grad=requires_grad)
        zero = torch.zeros((), dtype=autograd.result_dtype(params), device=params[0].device)
        # A graph of its own, so that backward() works; the compiler knows no such tensors, and needs none.
        return zero.requires_grad_() if requires_grad and not torch.compiler.is_compiling() else zero

    @staticmethod
    def _total(values: list[Tensor]) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value.to(total.device, non_blocking=True)
        return total

    @property
    def last_penalty(self) -> Tensor:
        """The penalty as the newest pass found it: 0-dim, detached. Reading it never synchronises.

        0 before a pass, and again from a ``consolidate`` or a ``load`` to the next one.
        """
        results = self._results()
        return self._total([r.penalty for _, r in results]) if results else self._zero()

    @property
    def predicted_forgetting(self) -> Tensor:
        """How far the mean loss of the old tasks is predicted to have risen, from the same pass; 0-dim, detached.

        ``(sum F d^2 + C) / 2``, in nats per sample or token, whatever lambda is. A prediction, not a measurement:
        second order, diagonal, and it reads low, on small overfitted nets by orders of magnitude.
        """
        results = self._results()
        return self._total([r.predicted for _, r in results]) if results else self._zero()

    def logs(self) -> dict[str, Tensor]:
        """What to log of the newest pass, under the names ``ewc/penalty`` and ``ewc/predicted_forgetting``; without the
        latter where the importances are no Fisher, and it has no unit.

        Returns:
            0-dim tensors, detached. Logging them synchronises, this does not.
        """
        logs = {"ewc/penalty": self.last_penalty}
        if self.info is None or self.info.get("is_fisher", True):
            logs["ewc/predicted_forgetting"] = self.predicted_forgetting
        return logs

    def penalty_by_parameter(self) -> dict[str, Tensor]:
        """The terms of :attr:`last_penalty` by parameter name, from the same pass; 0-dim, fp64."""
        return {slot.name: r.by_tensor[0, i] for part, r in self._results() for i, slot in enumerate(part.slots)}

    # ---- level 2 ----

    def attach(self, optimizer: torch.optim.Optimizer, coupling: str = "coupled", *, every: int = 1) -> AttachHandle:
        """Level 2: the penalty acts at every step of the optimizer; leave ``ewc()`` out of the loss.

        Once per step, whatever the gradient accumulation. Under a GradScaler that leaves unscaling to the optimizer the
        gradient is scaled with the others, and left alone on overflow. A parameter group may have a factor of lambda of
        its own, under the key ``"ewc_lambda_scale"``; it multiplies that of ``lambda_by``.

        Args:
            optimizer: Any torch optimizer. From one that maximises the penalty is subtracted.
            coupling: ``"coupled"``: the penalty's gradient joins the task's before the step, as if it were in the loss;
                a step with a closure is refused. ``"proximal"``: after the step the penalty's own is taken implicitly,
                ``theta = (D theta + lr lambda (F + delta) theta*) / (D + lr lambda (F + delta))``, with D what turns a
                constant gradient g into the optimizer's step ``lr g / D`` (``sqrt(v_hat) + eps`` for Adam, ``1 -
                momentum`` for SGD; 1 where it is not known, which is said): stable for every lambda, with the same
                stationary points. It needs no gradients; what the step skipped (no gradient) is skipped.
            every: Act at each k-th step, with k times the weight: cheaper by as much, and an approximation, as lazy
                regularisation is (Karras et al. 2020). Under ``"coupled"`` keep k times lambda below where it diverges.

        Returns:
            A handle; ``handle.remove()`` detaches. The optimizer keeps it, and a copy of the optimizer does not: attach
            that one too.

        Raises:
            TypeError: Not a torch optimizer.
            ValueError: It is attached to this optimizer already, there is no such coupling, ``every`` is no positive
                integer, the optimizer has none of the model's parameters, or steps inside the backward, or is
                differentiable; under ``"proximal"``: a parameter group has no learning rate.
        """
        check_coupling(coupling)
        check_count(every, "every")
        self._check_attachable(optimizer, coupling)
        handle = AttachHandle(self, optimizer, coupling, every)
        self._register(handle)
        return handle

    def _check_attachable(self, optimizer: torch.optim.Optimizer, coupling: str) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self.is_attached(optimizer):
            raise ValueError("this EWCLoss is attached to this optimizer already: remove() the first handle")
        kind = type(optimizer).__name__
        if kind == "LayerWiseDummyOptimizer" or hasattr(optimizer, "fused_backward"):
            raise ValueError(
                f"{kind} updates the weights inside the backward, where no step's hook can act: use an optimizer that "
                "updates them in step()"
            )
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # such as Accelerate's
            raise ValueError(
                f"{kind} wraps an optimizer and has no step hooks of its own: attach to the one inside (.optimizer), "
                "with Accelerate by ewc_fast.integrations.accelerate.attach"
            )
        every = {id(p) for p in self.model.parameters()}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if stepped and not any(id(p) in every for p in stepped):
            raise ValueError(
                f"optimizer: none of its {len(stepped)} parameters (the first has shape {tuple(stepped[0].shape)}) is "
                "the model's: build it from the parameters of the model as it is now, after wrapping"
            )
        for i, group in enumerate(optimizer.param_groups):
            if group.get("differentiable"):
                raise ValueError(f"param_groups[{i}] is differentiable, which the penalty's step is not")
            if coupling == "proximal" and "lr" not in group:
                raise ValueError(f"param_groups[{i}] has no lr, without which there is no proximal step: set it")

    def _register(self, handle: Attachment) -> None:
        """Says where a penalty cannot act, or acts twice, and keeps the handle in mind."""
        self._selected, _, _ = self._select()
        mine = {id(p) for group in handle.param_groups() for p in group["params"]}
        if self._selected and mine.isdisjoint(map(id, self._selected.values())):
            self._say_once(NOT_IN_OPTIMIZER)
        self._handles.add(handle)
        _attached.add(handle)
        self._say_what_is_penalised_twice(handle)

    def _say_what_is_penalised_twice(self, handle: Attachment) -> None:
        mine = {id(p) for group in handle.param_groups() for p in group["params"]}
        mine &= {id(p) for p in self._selected.values()}
        for other in list(_attached - {handle}):
            theirs = {id(p) for group in other.param_groups() for p in group["params"]}
            if mine & theirs & {id(p) for p in other.ewc._selected.values()}:
                self._say_once(
                    "a parameter is penalised by two attached penalties: remove() the handle that is not wanted"
                )

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """Clips the *sum* of the task's and the penalty's gradient, as if the penalty were in the loss.

        :func:`torch.nn.utils.clip_grad_norm_` before an attached optimizer's step clips the task's gradient alone, to
        which the step then adds the penalty's. This adds it first, where an optimizer of these parameters is attached
        with ``"coupled"``, and its coming step adds none; once for each parameter, also where several are attached.
        Call it before every step, for a part of the parameters after the other if need be, and with a GradScaler after
        ``scaler.unscale_``; under gradient accumulation not in every micro-batch, each of which would add the penalty
        again. A proximal pull is no gradient and is not clipped.

        Args:
            parameters: As for torch's function, as are the others.
            max_norm: Of the sum.
            norm_type: Which norm.
            error_if_nonfinite: Raise where the norm is NaN or infinite.
            foreach: torch's implementation.

        Returns:
            The sum's norm before clipping, 0-dim.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        clipped = set(map(id, parameters))
        handles = [
            handle
            for handle in self._handles
            if handle.coupling == "coupled"
            and any(id(p) in clipped for group in handle.param_groups() for p in group["params"])
        ]
        done: frozenset[int] = frozenset()
        for handle in sorted(handles, key=lambda handle: -handle.number):  # the newest is the one in use
            handle.add_now(done)
            if len(handles) > 1:
                done |= {id(p) for part in handle.parts() for p in part.params}
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        for handle in handles:
            handle.remember()
        return norm

    def is_attached(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether :meth:`attach` has been called for this optimizer, and the handle not removed."""
        return self._attachment_of(optimizer) is not None

    def _attachment_of(self, optimizer: torch.optim.Optimizer) -> Attachment | None:
        return next((handle for handle in self._handles if handle.optimizer is optimizer), None)

    def _is_attached(self) -> bool:
        return len(self._handles) > 0 and any(handle.optimizer is not None for handle in self._handles)

    def _detach(self, handle: Attachment) -> None:
        if handle in self._handles:
            self._handles.discard(handle)
            _attached.discard(handle)
            if handle in self._newest:  # what it said last can still be read
                self._newest.setdefault(None, []).extend(self._newest.pop(handle))

    # ---- saying so ----

    def _say_dropped(self, name: str) -> None:
        self._say_once(f"{name} is no longer in the model, or tied to another: its anchor and Fisher are dropped")

    def _say_uncovered(self) -> None:
        """Says which parameters to protect a loaded state knows nothing of."""
        known = self._state.fisher  # made anew at every access
        free = [name for name in self._selected if name not in known] if self.num_tasks else []
        if free:
            self._say_once(
                f"the state does not cover {len(free)} of {len(self._selected)} parameters to protect, such as "
                f"{free[0]}: they are free. If they are not new, load it into a model like the one it was saved from, "
                "or consolidate again"
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)

    def __repr__(self) -> str:
        return (
            f"EWCLoss(ewc_lambda={self.ewc_lambda}, mode={self.mode!r}, gamma={self.gamma}, damping={self.damping}, "
            f"num_tasks={self.num_tasks})"
        )
