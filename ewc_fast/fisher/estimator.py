"""``FisherEstimator``: a Fisher diagonal that grows batch by batch, and that can be put aside and taken up again."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ewc_fast.fisher.batches import batch_size, by_sample, take, to_device, warn
from ewc_fast.fisher.capture import SILENT, UNCOVERED, Capture, StatusChanged, Uses
from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.fallback import NotVectorised, add_in_loop, add_vectorised, without_torchs_warnings
from ewc_fast.fisher.modes import module_mode
from ewc_fast.fisher.objectives import Objective, Target, make_objective
from ewc_fast.fisher.rules import add_squares_, held_bytes, samples_at_once
from ewc_fast.layout import check_materialised, select_parameters, unwrapped
from ewc_fast.ops.reference import may_overlap, sharing

P = ParamSpec("P")
T = TypeVar("T")
_LOOK_SAMPLES = 4  # of the batch, to find out where in each operation the samples lie
_FACTORS = 8  # different ones, by which samples are told from each other
_APART = 0.05  # of the largest output, by which a sample's alone is another than in its batch; rounding in bf16 is less
_MAX_LOOKS = 3
_LOCK = threading.RLock()  # a model's parameters are replaced meanwhile, and one of torch's flags is changed


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Lets no other thread estimate meanwhile."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOCK:
            return function(*args, **kwargs)

    return alone


class FisherEstimator:
    """Estimates a Fisher diagonal batch by batch; :func:`ewc_fast.estimate_fisher` is a loop over it.

    Per sample, over a whole batch: one forward, and one backward without weight gradients, in which each layer's input
    and output gradient give the sum of the squared per-sample gradients. For a linear layer with one vector per sample
    that is one matrix product of squares; elsewhere per-sample gradients are formed and squared in blocks that stay in
    the cache. Parameters in operations without such a rule go through :mod:`torch.func`, and where that fails through a
    loop over samples, which is said. A parameter that is used several times has its gradients summed before they are
    squared. One that gets no gradient, for it has no part in the output, or a zero one, is watched at no such cost.

    Batches of one sample, and kind ``"batch"``, are an ordinary backward in which each gradient is squared and freed as
    soon as it is ready.

    Args:
        model: See :func:`ewc_fast.estimate_fisher`, as for the other arguments.
        kind: Where the labels come from.
        loss: Whose Fisher it is.
        generator: Source of drawn labels, None for the global random state.
        num_label_samples: Labels drawn per term.
        logits_transform: From the model's logits to those of the likelihood.
        params: Names, shell patterns or parameters to estimate for; None for all that require grad.
        out: Tensors by parameter name to accumulate in, zeroed here: fp32, or fp64 for fp64 parameters.

    Attributes:
        model: As given.
        kind: Likewise.
        device: Of the model's first parameter that is estimated for; batches are moved to it.
        num_samples: Counted so far.
        num_terms: Terms (samples, labels, tokens) counted so far.

    Raises:
        ValueError: A kind or loss that is not available, ``params`` that select nothing or a model in which no
            parameter requires grad, a parameter on the meta device or not initialised, ``out`` that does not fit.
        TypeError: A generator that is none, a complex parameter.
    """

    _WHAT = "squared gradient"

    @one_at_a_time
    def __init__(
        self,
        model: nn.Module,
        kind: str = "sampled",
        loss: str | Callable[..., Tensor] = "cross_entropy",
        generator: torch.Generator | None = None,
        *,
        num_label_samples: int = 1,
        logits_transform: Callable[[Tensor], Tensor] | None = None,
        params: Any = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self._objective: Objective = make_objective(kind, loss, logits_transform, num_label_samples)
        selected, _, _ = select_parameters(model, params)
        if not selected and params is not None:
            raise ValueError("params selects no parameter that requires grad: name one that does, or None for all")
        if not selected:
            raise ValueError(
                "no parameter of the model requires grad: call requires_grad_(True) on those to estimate for"
            )
        for name, p in selected.items():
            check_materialised(name, p)
            if p.is_complex():
                raise TypeError(
                    f"{name} has dtype {p.dtype}, which has no Fisher: freeze it, or leave it out of params="
                )
        self.kind, self._generator = kind, generator
        self.model = model
        self._model = model = unwrapped(model)
        self.device = next(iter(selected.values())).device
        inner = {id(p): name for name, p in model.named_parameters()}
        self._inner = {name: inner[id(p)] for name, p in selected.items()}
        self._outer = {inner: name for name, inner in self._inner.items()}
        self._params = dict(selected)
        names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._modules = list(model.modules())
        self._compiled = any(
            m._compiled_call_impl is not None or hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")
            for m in self._modules
        )
        self._places: list[tuple[dict[str, Any], str, str]] = [  # of each parameter and buffer, under all its names
            (held, attribute, names[id(t)])
            for module in self._modules
            for held in (module._parameters, module._buffers)
            for attribute, t in held.items()
            if t is not None
        ]
        with torch.inference_mode(False):  # or what is made here could not be changed outside of it
            self._sums = self._allocate(out)
        self._largest_bytes = max(total.numel() * total.element_size() for total in self._sums.values())
        self._status: dict[str, str] = {}
        self._looks: dict[str, int] = {}
        self._embedded: dict[str, str] = {}
        self._output_bytes = 0  # of the layers for a sample, where a batch may be taken in parts
        self._hold = 0  # bytes, likewise
        self._often: set[str] = set()
        self._native: dict[tuple[str | None, str | None], tuple[Tensor, Tensor | None]] = {}
        self._vectorised = self._changes_inputs = True  # until a call has shown that they need not be copied
        self._why_uncovered: str | None = None
        self._said_why_uncovered = False
        self._whole = False  # some samples of a batch do not run, as with a tensor of all that is as long as the batch
        self._compared = False  # a sample's output alone with that in its batch
        self._reentrant = False  # until a parameter is used with grad disabled, as in reentrant checkpoints
        self._methods: set[str] = set()
        self.num_samples = self.num_terms = self._largest = self._batches = 0
        self._checked = 0  # batches after which all sums were finite

    def _allocate(self, out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        sums = {}
        for name, p in self._params.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            if out is None:
                sums[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
                continue
            if (
                name not in out
                or out[name].shape != p.shape
                or out[name].dtype != dtype
                or out[name].device != p.device
                or out[name].requires_grad
                or out[name].is_inference()
                or may_overlap(out[name])
            ):
                raise ValueError(
                    f"out[{name!r}] must be a {dtype} tensor of shape {tuple(p.shape)} on {p.device} without "
                    "requires_grad, not made under inference_mode, each element with a place of its own"
                )
            sums[name] = out[name]
        if out is not None:
            # Parameters may share theirs.
            places = {p.data_ptr(): (f"parameter {name!r}", p) for name, p in self._model.named_parameters()}
            held = [*places.values(), *((f"out[{name!r}]", total) for name, total in sums.items())]
            shared = sharing([t for _, t in held])
            if shared is not None:
                one, other = (held[i][0] for i in sorted(shared))
                raise ValueError(f"{other} is in the memory of {one}: give a tensor of its own")
            for total in sums.values():
                total.zero_()
        return sums

    # ---- running the model ----

    def _read_model(self) -> None:
        """What is in the model now."""
        self._attributes = [(vars(module), dict(vars(module))) for module in self._modules]
        self._frozen: dict[str, Tensor] = {}
        self._own_buffers: dict[str, Tensor] = {}
        for held, attribute, inner in self._places:
            if inner in self._outer:
                self._params[self._outer[inner]] = held[attribute]
            elif isinstance(held[attribute], nn.Parameter):
                self._frozen[inner] = held[attribute]
            else:
                self._own_buffers[inner] = held[attribute]
        self._copy_buffers()

    def _forget(self) -> None:
        """Tensors that modules keep: made of one forward's weights they would serve the next one."""
        for now, then in self._attributes:
            for name in [name for name, t in now.items() if isinstance(t, Tensor) and t is not then.get(name)]:
                if name in then:
                    now[name] = then[name]
                else:
                    del now[name]

    def _copy_buffers(self) -> None:
        """For one forward, which may change them."""
        self._buffers = {inner: b.detach().clone() for inner, b in self._own_buffers.items()}

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor], *, vectorised: bool = False) -> Iterator[None]:
        """``weights`` in place of the parameters of these names, the others detached.

        Also around a backward: checkpoints run the model again there. A reentrant one drops all gradients if its inputs
        need none: then the others, too, have a graph, as they have in training.
        """
        other = _with_graph if self._reentrant and not vectorised else Tensor.detach
        if any(b._version for b in self._buffers.values()):
            self._copy_buffers()
        tensors = dict(self._buffers)
        for inner, p in self._frozen.items():
            tensors[inner] = other(p)
        for name, p in self._params.items():
            tensors[self._inner[name]] = weights[name] if name in weights else other(p)
        before = [(held, attribute, held[attribute]) for held, attribute, _ in self._places]
        self._forget()
        try:
            for held, attribute, name in self._places:
                held[attribute] = tensors[name]
            yield
        finally:
            for held, attribute, tensor in before:
                held[attribute] = tensor
            self._forget()

    def _output(self, batch: Any) -> Tensor:
        if not self._changes_inputs:
            return self._objective.output(self._model, batch)
        copies = tree_map_only(Tensor, torch.clone, batch)
        z = self._objective.output(self._model, copies)
        self._changes_inputs = any(isinstance(t, Tensor) and t._version > 0 for t in tree_leaves(copies))
        return z

    def _run(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The objective's output with ``weights`` in place of the parameters of these names."""
        with self._swapped(weights, vectorised=True):
            return self._output(batch)

    @one_at_a_time
    def update(self, batch: Any) -> None:
        """Adds a batch.

        Args:
            batch: See :func:`ewc_fast.estimate_fisher`.

        Raises:
            ValueError, TypeError: As there, with the batch's index. After an error the estimate is not to be used.
        """
        with isolated_rng(self._generator, self.device, self._batches):
            self.update_in_isolation(batch)

    def update_in_isolation(self, batch: Any) -> None:
        """:meth:`update` where other threads and the global random state are seen to."""
        # Else what module.compile() or a compiled forward left would compile this package's watching.
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            self._update(batch)

    def _update(self, batch: Any) -> None:
        self._check_open()
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            evaluation = module_mode(self._model, training=False, modules=self._modules)
            with evaluation, torch.inference_mode(False), torch.enable_grad(), self._no_gradient_passes_by():
                self._read_model()
                torch.backends.mha.set_fastpath_enabled(False)  # it uses parameters out of sight
                self._add(to_device(batch, self.device))
        except (TypeError, ValueError) as error:
            error.args = (f"batch {self._batches}: {error}",)
            raise
        except Exception as error:  # the model's own, whose message others may look for
            note = f"in batch {self._batches} of the loader"
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(note)
            elif error.args and isinstance(error.args[0], str):
                error.args = (f"{error.args[0]} ({note})", *error.args[1:])
            raise
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
        self._batches += 1

    @contextmanager
    def _no_gradient_passes_by(self) -> Iterator[None]:
        """Puts the parameters' own gradients aside; raises where one comes to them instead of to what replaces them."""
        held = {inner: held[attribute] for held, attribute, inner in self._places}
        own = {inner: t for inner, t in held.items() if t.requires_grad and t.is_leaf}
        before = {inner: p.grad for inner, p in own.items() if p.grad is not None}
        try:
            for inner in before:
                own[inner].grad = None
            yield
            for inner, p in own.items():
                if p.grad is not None:
                    raise _out_of_sight(self._outer.get(inner, inner))
        finally:
            for inner, p in own.items():
                if p.grad is not before.get(inner):
                    p.grad = before.get(inner)

    def _add(self, batch: Any) -> None:
        size = batch_size(batch)
        if not size:
            return
        if self.kind == "batch" or size == 1:
            try:
                terms = self._add_whole(batch)
            except StatusChanged:
                terms = self._add_whole(batch)
            self._methods.add("batch" if self.kind == "batch" else "hooks")
        else:
            if not self._status:
                self._look(batch, size)
            terms = sum(self._add_per_sample(part, count) for part, count in self._parts(batch, size))
        if not (self._batches + 1) & self._batches:  # 1, 2, 4, 8, ...: each reads as much as the Fisher is large
            self._check_squares(self._batches + 1)
        self.num_samples += size
        self.num_terms += terms
        self._largest = max(self._largest, size)

    def _target(self, z: Tensor, batch: Any) -> Target:
        """The labels; raises if the outputs that count are not finite."""
        target = self._objective.target(self._model, z, batch)
        if not self._objective.finite(z.detach(), target):
            where = self._where_not_finite(batch)
            raise ValueError(
                f"the {self._objective.measure} is not finite{where}: check the inputs and the model's weights for NaN "
                "and infinities"
            )
        if not target.terms:
            raise ValueError("no label counts: all are the ignored index, or padding; leave such batches out")
        return target

    def _where_not_finite(self, batch: Any) -> str:
        found: list[str] = []

        def look(name: str, module: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
                if not found and not all(t.isfinite().all() for t in tensors):
                    found.append(f" (it begins in {name or 'the model itself'}, {type(module).__name__})")

            return hook

        handles = [m.register_forward_hook(look(name, m)) for name, m in self._model.named_modules()]
        try:
            with torch.no_grad():
                self._run({}, batch)
        except Exception:  # the error that led here is the one to tell
            return found[0] if found else ""
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else ""

    def _cotangents(self, z: Tensor, target: Target) -> Iterator[tuple[Tensor, bool]]:
        """Each cotangent, and whether another follows."""
        if not target.terms:
            return
        cotangents = self._objective.cotangents(z, target, self._generator)
        current = next(cotangents, None)
        while current is not None:
            following = next(cotangents, None)
            yield current, following is not None
            current = following

    def _was_without_graph(self, watched: Capture | Uses) -> bool:
        """Whether a forward has shown for the first time that a parameter is used with grad disabled."""
        new = watched.without_graph and not self._reentrant
        self._reentrant |= new
        return new

    def _add_whole(self, batch: Any) -> int:
        """One gradient for the whole batch, each parameter's squared and freed as it becomes ready."""
        leaves = {name: p.detach().requires_grad_() for name, p in self._params.items()}
        uses = Uses(leaves)
        ready: set[str] = set()

        def add(name: str) -> None:
            leaf = leaves[name]
            assert leaf.grad is not None
            grad = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
            leaf.grad = None
            self._accumulate(self._sums[name], grad[None])

        def hook_for(name: str) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                if uses.count[name] != 1:
                    return  # reentrant checkpoints have backwards of their own: more of the gradient may come
                if name in ready:
                    raise RuntimeError(
                        f"{name} gets its gradient from several reentrant checkpoints: use_reentrant=False"
                    )
                ready.add(name)
                add(name)

            return hook

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(hook_for(name))
        with self._swapped(leaves):
            with uses:
                z = self._output(batch)
            if self._was_without_graph(uses) and self._frozen:
                raise StatusChanged
            target = self._target(z, batch)
            if z.requires_grad:
                for cotangent, more in self._cotangents(z, target):
                    ready.clear()
                    torch.autograd.backward(z, cotangent.to(z.dtype), retain_graph=more)
                    for name, leaf in leaves.items():
                        if leaf.grad is not None:
                            add(name)
        return target.terms

    def _parts(self, batch: Any, size: int) -> Iterator[tuple[Any, int]]:
        """What to take at a time of a batch of so many samples, and how many these are."""
        count = 1
        if self._output_bytes and self._why_uncovered is None and not self._whole:
            count = size // samples_at_once(size, self._output_bytes, self._largest_bytes, self.device)
        parts = [slice(size * i // count, size * (i + 1) // count) for i in range(count)]
        # What belongs to all samples must not pass for a part's own.
        if count > 1 and any(by_sample(batch, part.stop - part.start)[2] for part in parts):
            parts = [slice(0, size)]
        most = max(part.stop - part.start for part in parts)
        self._hold = held_bytes(most * self._output_bytes, self._largest_bytes, self.device)
        for part in parts:
            yield batch if len(parts) == 1 else take(batch, part, size), part.stop - part.start

    def _add_per_sample(self, batch: Any, size: int) -> int:
        for _ in range(_MAX_LOOKS + len(self._params)):
            try:
                terms = self._add_captured(batch, size)
            except StatusChanged:
                self._look(batch, size)
            else:
                self._say_why_uncovered()
                return terms
        raise RuntimeError("the model uses its parameters differently at every call: give it batches of one sample")

    def _say_why_uncovered(self) -> None:
        if self._why_uncovered is not None and not self._said_why_uncovered:
            self._said_why_uncovered = True
            warn(
                f"{type(self._model).__name__} cannot run in sight of the layers' rules ({self._why_uncovered}); the "
                "per-sample gradients are taken without them, which is slower"
            )

    def _capture(self, leaves: dict[str, Tensor], size: int, *, once: bool, looking: bool) -> Capture:
        known = self._status, self._embedded, self._often, self._native
        return Capture(leaves, self._sums, *known, size, once=once, hold=self._hold, looking=looking)

    def _covered(self) -> list[str]:
        return [name for name in self._params if self._status.get(name) != UNCOVERED]

    def _look(self, batch: Any, size: int) -> None:
        """Finds out which parameters the rules cover, and where in their operations the samples lie.

        On a few samples, and on others where those leave it open; on all where the model does not run on a few.
        """
        self._native.clear()
        few = size if self._whole else min(size, _LOOK_SAMPLES)
        unclear: dict[str, str] = {}
        for start in range(0, size, few)[:_MAX_LOOKS]:
            first = min(start, size - few)
            before = dict(self._status)
            now = self._look_at(batch if few == size else take(batch, slice(first, first + few), size), few)
            if self._why_uncovered is not None and few < size:
                self._why_uncovered, self._whole, self._status = None, True, before
                return self._look(batch, size)
            unclear = now | {name: status for name, status in unclear.items() if name not in self._status}
            if not unclear:
                return
        self._status.update(unclear)

    def _look_at(self, part: Any, few: int) -> dict[str, str]:
        """Two backwards: in the second each sample's cotangent is multiplied by a power of two of its own.

        So must be the gradients at each operation, which tells where the sample lies there.

        Returns:
            Parameters that other samples may tell more of, and the status that they get if none does.
        """
        before = dict(self._status)
        leaves = {name: p.detach().requires_grad_() for name, p in self._params.items()}
        capture = self._capture(leaves, few, once=False, looking=True)
        looked = False
        try:
            with self._swapped(leaves):
                with capture:
                    z = self._output(part)
                looked = True
                generator = torch.Generator("cpu").manual_seed(0)
                noise = torch.randn(z.shape, generator=generator, device="cpu").to(z.device, z.dtype)
                capture.backward(z, noise, again=True)
                factors = 2.0 ** (torch.arange(few, device=z.device) % _FACTORS)
                capture.factors = factors
                capture.backward(z, noise * factors.to(z.dtype).view(-1, *[1] * (z.dim() - 1)), again=False)
        except torch.OutOfMemoryError:
            raise
        except (StatusChanged, RuntimeError, ValueError, TypeError, IndexError) as error:  # not to be run in this way
            if not isinstance(error, StatusChanged) and not looked:
                self._why_uncovered = str(error).strip().split("\n")[0]
            self._was_without_graph(capture)
            self._status.update(dict.fromkeys(self._params, UNCOVERED))
            return {}
        if self._was_without_graph(capture) and self._frozen:
            self._status = before
            return self._look_at(part, few)
        if self.kind == "exact" and z.dim() == 2:
            self._output_bytes = capture.output_bytes // few
        direct = capture.out_of_sight()
        for name in direct:
            self._status[name] = UNCOVERED
        unclear = {}
        for name, layouts in capture.candidates.items():
            known = self._status.get(name)
            if known == UNCOVERED or known in layouts:
                continue
            if name in capture.verified:
                if len(layouts) == 1 and name not in capture.ambiguous:
                    self._status[name] = next(iter(layouts))
                elif layouts:
                    unclear[name] = UNCOVERED
                else:
                    self._status[name] = UNCOVERED
            elif name in capture.reached:
                unclear[name] = SILENT  # its gradient was zero
            else:
                self._status[name] = SILENT
        for name, status in self._status.items():
            if status == UNCOVERED != before.get(name) and name not in direct and name not in capture.verified:
                self._status[name] = SILENT  # without a rule, and out of the output's reach
        return unclear

    def _add_captured(self, batch: Any, size: int) -> int:
        covered = self._covered()
        leaves = {name: self._params[name].detach().requires_grad_() for name in covered}
        rest = {name: p.detach() for name, p in self._params.items() if name not in leaves}
        silent = SILENT in self._status.values()
        awake: dict[str, Tensor] = {}
        capture = self._capture(leaves, size, once=self._objective.once, looking=False)
        with self._swapped(leaves):
            with capture:
                z = self._output(batch)
            if self._was_without_graph(capture):
                raise StatusChanged
            target = self._target(z, batch)
            self._methods.add("hooks" if covered else "vmap")
            if silent:  # heard in a backward of the model's own, as of an energy to forces: that comes but once
                rest |= {name: self._params[name].detach() for name in capture.awake()}
            for cotangent, more in self._cotangents(z, target):
                if covered:
                    capture.backward(z, cotangent, again=more)
                late = {name: self._params[name].detach() for name in capture.awake()} if silent else {}
                if rest or late:
                    self._compare_alone(z, batch, size)
                    self._add_rest({**rest, **late}, batch, size, cotangent)
                awake.update(late)
        for name in capture.out_of_sight():
            raise RuntimeError(
                f"{name} is used in a way that the first batches did not show: give the model batches of one sample"
            )
        if any(self._looks.get(name, 0) < _MAX_LOOKS for name in awake):
            for name in awake:
                self._looks[name] = self._looks.get(name, 0) + 1
            self._look(batch, size)
        return target.terms

    def _compare_alone(self, z: Tensor, batch: Any, size: int) -> None:
        """Warns, once, where the samples of a batch are not what samples alone are."""
        if self._compared:
            return
        self._compared = True
        with without_torchs_warnings():
            alone = self._run({}, take(batch, slice(0, 1), size))
        own = {id(p): name for name, p in self._params.items()}
        for leaf in _leaves(alone):  # none, but for what came past what replaces the parameters
            if id(leaf) in own:
                raise _out_of_sight(own[id(leaf)])
        alone = alone.detach().double()
        together = z[:1].detach().double()
        if alone.shape != together.shape:
            return  # which what follows will name
        # Row by row: a copy of a vocabulary's logits would be the largest tensor of all.
        most = max(row.where(row.isfinite(), 0).abs().max().item() for row in z.detach())
        off = (alone - together).abs()
        if (off > _APART * most).any():
            warn(
                f"{type(self._model).__name__} gives another output for a sample alone than for the same sample in its "
                "batch: a tensor that belongs to all samples is as long as the batch and passes for one with a row for "
                "each, the samples depend on each other (BatchNorm without running statistics), or the model draws "
                "random numbers. The gradients are those of samples alone; give the model batches of one sample if "
                "that is not what they should be"
            )

    def _add_rest(self, weights: dict[str, Tensor], batch: Any, size: int, cotangent: Tensor) -> None:
        if self._vectorised:
            try:
                add_vectorised(self._run, weights, self._sums, batch, size, cotangent, self._accumulate)
            except NotVectorised as error:
                self._vectorised = False
                reason = str(error.__cause__).strip().split("\n")[0]
                warn(
                    f"{type(self._model).__name__} cannot run under torch.vmap ({reason}); the per-sample gradients of "
                    f"{len(weights)} of its parameters are taken in a loop over samples, which is slower"
                )
            else:
                self._methods.add("vmap")
                return
        self._methods.add("loop")
        # With a graph for every parameter: a reentrant checkpoint drops gradients where its inputs need none.
        sums = {name: self._sums[name] for name in weights}
        add_in_loop(self._swapped, self._output, self._params, sums, batch, size, cotangent, self._accumulate)

    @staticmethod
    def _accumulate(total: Tensor, gradients: Tensor) -> None:
        """Adds what the estimate is a sum of, over per-sample ``gradients`` (N, *shape); never negative."""
        add_squares_(total, gradients)

    def _check_squares(self, batches: int) -> None:
        if self._checked == batches:
            return
        # Sums of squares: the largest is infinite or NaN where any is. A third of isfinite's time.
        largest = {name: total.amax() for name, total in self._sums.items() if total.numel()}
        values = torch.stack([value.to(self.device, torch.float64) for value in largest.values()]).tolist()
        since = f", since one of batches {self._checked} to {batches - 1}" if batches - self._checked > 1 else ""
        # From the output backwards: what is not finite makes all before it so.
        for name, value in reversed(list(zip(largest, values, strict=True))):
            if not math.isfinite(value):
                raise ValueError(f"the {self._WHAT} of parameter {name!r} is not finite{since}")
        self._checked = batches

    # ---- results ----

    @property
    def info(self) -> FisherInfo:
        """How the estimate has been made so far."""
        method = next((m for m in ("loop", "vmap", "batch") if m in self._methods), "hooks")
        return FisherInfo(
            self.kind,
            self._objective.name,
            self._objective.unit,
            self.num_samples,
            self.num_terms,
            self._largest,
            method,
            is_fisher=self.kind != "reversed",
        )

    def result(self, *, final: bool = False) -> FisherDiagonal:
        """The estimate from the batches so far.

        Args:
            final: Make it in the memory of the sums (``out``, if that was given) instead of a copy. Nothing can be
                added then, and there is no second result.

        Raises:
            ValueError: There were no samples, or no term of them counted, or a square that is not finite.
            RuntimeError: After the final one.
        """
        self._check_open()
        if not self.num_samples:
            raise ValueError("the loader is empty: a Fisher estimate needs at least one sample")
        if not self.num_terms:
            raise ValueError("no label counts: all are the ignored index, or padding")
        self._check_squares(self._batches)
        with torch.inference_mode(False):
            if not final:
                return FisherDiagonal({name: t / self.num_terms for name, t in self._sums.items()}, self.info)
            sums, self._sums = self._sums, {}
            return FisherDiagonal({name: t.div_(self.num_terms) for name, t in sums.items()}, self.info)

    def _check_open(self) -> None:
        if self._params and not self._sums:
            raise RuntimeError("result(final=True) was the end of this estimate: make a new FisherEstimator")

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted estimate needs to go on: sums, counts, the generator's state.

        With ``generator=None`` and drawn labels, the global random state is the caller's to save and restore.
        """
        self._check_open()
        return {
            "kind": self.kind,
            "loss": self._objective.name,
            "unit": self._objective.unit,
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "counts": [self.num_samples, self.num_terms, self._largest, self._batches],
            "methods": sorted(self._methods),
            "settings": self._objective.settings(),
            "status": [dict(self._status), dict(self._looks), dict(self._embedded)],
            "often": sorted(self._often),
            "output_bytes": self._output_bytes,
            "reentrant": self._reentrant,
            "whole": self._whole,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: It is of another kind, loss, setting or model; nothing has changed then.
        """
        self._check_open()
        if not {"kind", "loss", "unit", "sums", "counts", "methods", "settings", "status", "generator"} <= set(state):
            raise ValueError("this is no state of a FisherEstimator")
        for what, mine in (("kind", self.kind), ("loss", self._objective.name)):
            if state[what] != mine:
                raise ValueError(f"the state is of {what}={state[what]!r}, this estimator of {mine!r}")
        if state["settings"] != self._objective.settings():
            raise ValueError(
                f"the state was made with {state['settings']}, this estimator with {self._objective.settings()}"
            )
        shapes = {name: (total.shape, total.dtype) for name, total in state["sums"].items()}
        if shapes != {name: (total.shape, total.dtype) for name, total in self._sums.items()}:
            raise ValueError("the state is of another model: its parameters' names, shapes or dtypes differ")
        if (state["generator"] is None) != (self._generator is None):
            raise ValueError("the state was made with a generator and this estimator has none, or the other way round")
        try:
            num_samples, num_terms, largest, batches = map(int, state["counts"])
            status, looks, embedded = map(dict, state["status"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the state is damaged: its counts and status are not what state_dict() gives: {error}"
            ) from None
        for name, total in state["sums"].items():
            if not total.isfinite().all():
                raise ValueError(f"the state is damaged: the sum of {name} is not finite")
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())
        for name, total in self._sums.items():
            total.copy_(state["sums"][name])
        self._objective.unit = state["unit"]
        self._objective.unit_is_known = num_samples > 0
        self.num_samples, self.num_terms, self._largest, self._batches = num_samples, num_terms, largest, batches
        self._checked = 0
        self._methods = set(state["methods"])
        self._status, self._looks, self._embedded = status, looks, embedded
        self._often = set(state.get("often", ()))
        self._output_bytes = int(state.get("output_bytes", 0))
        self._reentrant = bool(state.get("reentrant", False))
        self._whole = bool(state.get("whole", False))
        self._native.clear()


def _out_of_sight(name: str) -> ValueError:
    return ValueError(
        f"{name} is used through a reference of the model's own (a list, a closure), where its gradient is not seen: "
        "let forward() read it from the module that has it"
    )


def _leaves(t: Tensor) -> Iterator[Tensor]:
    """Of a tensor's graph."""
    if t.requires_grad and t.grad_fn is None:
        yield t
    nodes, seen = [t.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _with_graph(p: Tensor) -> Tensor:
    """A copy for a forward, whose gradient is dropped where ``p`` has one."""
    if not p.requires_grad:
        return p.detach()
    leaf = p.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(_drop_gradient)
    return leaf


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None


@contextmanager
def isolated_rng(generator: torch.Generator | None, device: torch.device, number: int = 0) -> Iterator[None]:
    """Leaves the global random state as found if there is a generator; a shuffling loader then follows that one.

    ``number`` tells apart what begins with the same state of the generator.
    """
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        ahead = torch.Generator(generator.device)  # a seed that follows from the generator and does not advance it
        ahead.set_state(generator.get_state())
        seed = int(torch.randint(2**62, (), generator=ahead, device=generator.device))
        torch.default_generator.manual_seed(seed + number)
        yield
