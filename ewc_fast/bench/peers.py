"""Ways to the penalty and its gradient: what people write, what they install, and ours. One function each.

A peer adds ``lambda F (theta - theta*)`` to the gradients that are there, and returns ``lambda/2 sum F d^2`` if it
computes that. The comment beside its byte count derives it: what its ops read and write per parameter. Of a tensor that
fits into the cache a temporary may never reach memory, so that a peer of many temporaries can move more bytes per
second than ``copy_``, and still be slow.

``p``, ``g``, ``f``, ``a`` stand for the bytes of an element of parameter, gradient, Fisher and anchor; ``t`` for those
of a temporary, taken as the parameter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc_fast import ewc_loss
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.text import check_names
from ewc_fast.ops import penalty as ops

PLAIN, PUBLISHED, OURS, OPS, LIMIT = "plain PyTorch", "published", "ewc_fast", "ewc_fast ops", "limit"


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element: parameter, gradient, Fisher, anchor."""

    p: int
    g: int
    f: int
    a: int

    @classmethod
    def of(cls, problem: Problem) -> Sizes:
        """Those of a problem."""
        param = problem.params[0]
        return cls(
            param.element_size(),
            problem.grads[0].element_size(),
            problem.fishers[0].element_size(),
            problem.anchors[0].element_size(),
        )


Bytes = float | Callable[[Sizes], float] | None


class Unavailable(Exception):
    """A peer cannot run here; says why."""


@dataclass(frozen=True)
class Peer:
    """One way to the penalty and its gradient.

    Attributes:
        name: As the command line knows it.
        run: Adds the gradient to the problem's gradients; returns the value (0-dim), or None if it computes none.
            Raises :class:`Unavailable` where it cannot run.
        bytes_per_parameter: What its ops read and write per parameter: a number, a function of the element sizes, or
            None where that depends on more than them.
        writes_gradient: False for what only reads.
        note: What it is, for the reader of a table.
        group: One of this module's groups.
        capturable: Whether a CUDA graph can hold it.
        keeps: Copies of the model that it keeps from call to call, beyond parameters, gradients, anchor and Fisher.
        temporaries: Copies of a model of many tensors that it makes and frees in a call, about.
        rounds_fisher: Whether it rounds the Fisher to bf16.
    """

    name: str
    run: Callable[[Problem], Tensor | None]
    bytes_per_parameter: Bytes = None
    writes_gradient: bool = True
    note: str = ""
    group: str = PUBLISHED
    capturable: bool = False
    keeps: float = 0.0
    temporaries: float = 0.0
    rounds_fisher: bool = False

    def bytes_for(self, sizes: Sizes) -> float | None:
        """``bytes_per_parameter`` at given element sizes."""
        count = self.bytes_per_parameter
        return count(sizes) if callable(count) else count


_PEERS: dict[str, Peer] = {}


def peer(
    name: str,
    *,
    bytes: Bytes,
    group: str,
    note: str,
    writes_gradient: bool = True,
    capturable: bool = False,
    keeps: float = 0.0,
    temporaries: float = 0.0,
    rounds_fisher: bool = False,
) -> Callable[[Callable[[Problem], Tensor | None]], Callable[[Problem], Tensor | None]]:
    """Registers a function as a :class:`Peer`, under the attributes of that class."""

    def register(run: Callable[[Problem], Tensor | None]) -> Callable[[Problem], Tensor | None]:
        if name in _PEERS:
            raise ValueError(f"two peers are called {name!r}")
        _PEERS[name] = Peer(
            name, run, bytes, writes_gradient, note, group, capturable, keeps, temporaries, rounds_fisher
        )
        return run

    return register


def all_peers() -> dict[str, Peer]:
    """Every peer by name, in the order of the tables: plain PyTorch, published packages, ours, the limit."""
    from ewc_fast.bench import published  # here, for it builds on this module

    every = {**_PEERS, **{peer.name: peer for peer in published.PEERS}}
    order = (PLAIN, PUBLISHED, OURS, OPS, LIMIT)
    return {peer.name: peer for peer in sorted(every.values(), key=lambda peer: order.index(peer.group))}


def find(names: Sequence[str]) -> list[Peer]:
    """Peers by name, in the order of the tables.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    every = all_peers()
    check_names("peer", names, every)
    return [peer for name, peer in every.items() if name in names]


# ---- what people write ----


def eager_loss(
    params: Sequence[Tensor], fishers: Sequence[Tensor], anchors: Sequence[Tensor], ewc_lambda: float
) -> Tensor:
    """The penalty in plain PyTorch, differentiable."""
    total = torch.zeros((), device=params[0].device)
    for p, f, a in zip(params, fishers, anchors, strict=True):
        total = total + (f * (p - a) ** 2).sum()
    return ewc_lambda / 2 * total


def backward(loss: Tensor) -> Tensor:
    """Adds a penalty's gradient to the parameters'; returns its value."""
    loss.backward()
    return loss.detach()


# p - a: p+a+t; **2: 2t; f *: f+2t; sum: t. Backward, of f *: f+t; of **2, which is g * (2 * d**1): 2t+2t+3t;
# autograd's accumulate: t+2g. fp32: 84.
@peer(
    "eager",
    bytes=lambda s: s.p + s.a + 2 * s.f + 15 * s.p + 2 * s.g,
    group=PLAIN,
    note="penalty in the loss, as articles have it, and its backward",
    temporaries=2,
)
def eager(problem: Problem) -> Tensor:
    """As articles have it, and its backward."""
    total = torch.zeros((), device=problem.device)
    for name, p in problem.model.named_parameters():
        total = total + (problem.fisher[name] * (p - problem.anchor[name]) ** 2).sum()
    loss = problem.ewc_lambda / 2 * total
    return backward(loss)


# As eager, and cat: p+t. Its backward hands out views. fp32: 92.
@peer(
    "eager_flat",
    bytes=lambda s: 2 * s.p + s.a + 2 * s.f + 16 * s.p + 2 * s.g,
    group=PLAIN,
    note="the same on one vector: parameters concatenated, Fisher and anchor flat",
    keeps=2,
    temporaries=5,
)
def eager_flat(problem: Problem) -> Tensor:
    """The same on one vector: parameters concatenated, Fisher and anchor flat already."""
    fisher, anchor = problem.flat_state
    theta = torch.cat([p.view(-1) for p in problem.params])
    loss = problem.ewc_lambda / 2 * (fisher * (theta - anchor) ** 2).sum()
    return backward(loss)


@torch.no_grad()
def closed_form_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
) -> Tensor:
    """Adds the penalty's gradient to ``grads``, tensor by tensor; returns the value."""
    total = torch.zeros((), device=params[0].device)
    for p, g, f, a in zip(params, grads, fishers, anchors, strict=True):
        d = p - a
        fd = f * d
        g.add_(fd, alpha=ewc_lambda)
        total = total + torch.dot(fd.view(-1), d.view(-1).to(fd.dtype))
    return ewc_lambda / 2 * total


# sub: p+a+t; mul: f+2t; add_: t+2g; dot: 2t. fp32: 44.
@peer(
    "loop",
    bytes=lambda s: s.p + s.a + s.f + 6 * s.p + 2 * s.g,
    group=PLAIN,
    note="closed form, tensor by tensor, with the value: the best that is written by hand",
    capturable=True,
    temporaries=1,
)
def loop(problem: Problem) -> Tensor:
    """The closed form, tensor by tensor, with the value: the best that is written by hand."""
    return closed_form_(problem.params, problem.grads, problem.fishers, problem.anchors, problem.ewc_lambda)


# sub: p+a+t; addcmul_: f+t+2g. fp32: 28.
@peer(
    "loop_no_value",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.p + 2 * s.g,
    group=PLAIN,
    note="the same loop without the value",
    capturable=True,
    temporaries=1,
)
@torch.no_grad()
def loop_no_value(problem: Problem) -> None:
    """The same without the value."""
    for p, g, f, a in zip(problem.params, problem.grads, problem.fishers, problem.anchors, strict=True):
        if f.dtype == g.dtype:
            g.addcmul_(f, p - a, value=problem.ewc_lambda)
        else:  # which addcmul_ refuses
            g.add_(f * (p - a), alpha=problem.ewc_lambda)


# sub: p+a+t; mul: f+2t; add_: t+2g; mul_: 3t; sums: t. fp32: 52.
@peer(
    "foreach",
    bytes=lambda s: s.p + s.a + s.f + 8 * s.p + 2 * s.g,
    group=PLAIN,
    note="torch._foreach_ ops, value and gradient",
    capturable=True,
    temporaries=2,
)
@torch.no_grad()
def foreach(problem: Problem) -> Tensor:
    """torch._foreach_ ops, value and gradient."""
    d = torch._foreach_sub(problem.params, problem.anchors)
    fd = torch._foreach_mul(problem.fishers, d)
    torch._foreach_add_(problem.grads, fd, alpha=problem.ewc_lambda)
    torch._foreach_mul_(fd, d)
    return problem.ewc_lambda / 2 * torch.stack([t.sum() for t in fd]).sum()


# Fused by inductor into one pass each way. Forward: p+a+f; backward: p+a+f+t; autograd's accumulate: t+2g. fp32: 40.
@peer(
    "compile_eager",
    bytes=lambda s: 2 * (s.p + s.a + s.f) + 2 * s.p + 2 * s.g,
    group=PLAIN,
    note="torch.compile of the penalty in the loss, and its backward",
    temporaries=1,
)
def compile_eager(problem: Problem) -> Tensor:
    """torch.compile of the penalty in the loss, and its backward."""
    loss = _compiled(problem, "compile_eager", eager_loss)(
        problem.params, problem.fishers, problem.anchors, problem.ewc_lambda
    )
    return backward(loss)


def _loop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
) -> Tensor:
    total = torch.zeros((), device=params[0].device)
    for p, g, f, a in zip(params, grads, fishers, anchors, strict=True):
        d = p - a
        fd = f * d
        g.add_(fd, alpha=ewc_lambda)
        total = total + (fd * d).sum()
    return ewc_lambda / 2 * total


# Fused by inductor into one pass: p+a+f+2g. fp32: 20. (Where it reads them again for the sum: 32.)
@peer(
    "compile_loop",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.g,
    group=PLAIN,
    note="torch.compile of the closed-form loop with the value",
)
@torch.no_grad()
def compile_loop(problem: Problem) -> Tensor:
    """torch.compile of the closed-form loop with the value."""
    result: Tensor = _compiled(problem, "compile_loop", _loop_)(
        [p.detach() for p in problem.params], problem.grads, problem.fishers, problem.anchors, problem.ewc_lambda
    )
    return result


MAX_COMPILED_TENSORS = 400


def _compiled(problem: Problem, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled function of a problem's own, so that no shape makes it dynamic. Compiled by its first call.

    Raises:
        Unavailable: There is no compiler, or the graph is one that takes it many minutes.
    """
    if name not in problem.cache:
        if problem.workload.tensors > MAX_COMPILED_TENSORS:
            raise Unavailable(f"a graph of {problem.workload.tensors} tensors takes the compiler many minutes")
        if not any(key.startswith("compile") for key in problem.cache):
            torch._dynamo.reset()  # or the limit on recompilations, which earlier problems count towards, would stop it
        problem.cache[name] = torch.compile(function, fullgraph=True, dynamic=False)
    return _reporting_a_missing_compiler(problem.cache[name])


def _reporting_a_missing_compiler(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: object) -> Tensor:
        try:
            return compiled(*arguments)
        except Exception as error:
            # What inductor raises where there is no compiler differs from version to version, and is wrapped.
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = str(error).strip().partition("\n")[0]
                raise Unavailable(f"torch.compile failed: {type(error).__name__}: {reason}") from error
            raise

    return call


# ---- ours ----


# One pass over each tensor: p+a+f+t; autograd's accumulate: t+2g. fp32: 28.
@peer(
    "ewc_loss",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.p + 2 * s.g,
    group=OURS,
    note="ewc_loss() on dicts by name, and its backward",
    keeps=1,
)
def functional(problem: Problem) -> Tensor:
    """ewc_loss and its backward."""
    loss = ewc_loss(problem.model, problem.fisher, problem.anchor, problem.ewc_lambda)
    return backward(loss)


# One pass: p+a+f+t; autograd's accumulate: t+2g. fp32: 28.
@peer(
    "level1",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.p + 2 * s.g,
    group=OURS,
    note="level 1: ewc() in the loss, and its backward",
    keeps=1,
)
def level1(problem: Problem) -> Tensor:
    """ewc() and its backward."""
    loss = problem.ewc()
    return backward(loss)


# One pass: p+a+f+2g. fp32: 20.
@peer(
    "level2",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.g,
    group=OURS,
    note="level 2: accumulate_grad_() before the step",
    capturable=True,
)
def level2(problem: Problem) -> Tensor:
    """Level 2 by hand."""
    return problem.ewc.accumulate_grad_()


# The same pass. fp32: 20.
@peer(
    "level2_attach",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.g,
    group=OURS,
    note="level 2 by attach(): the step of an optimizer that does nothing else",
    keeps=2,
)
def level2_attach(problem: Problem) -> Tensor:
    """Level 2 by attach, the optimizer's hooks included."""
    ewc, optimizer = problem.attached
    optimizer.step()
    return ewc.last_penalty


# The same with a Fisher of 2 bytes. fp32: 18.
@peer(
    "level2_bf16_fisher",
    bytes=lambda s: s.p + s.a + 2 + 2 * s.g,
    group=OURS,
    note="level 2 with fisher_dtype=torch.bfloat16",
    capturable=True,
    keeps=1.5,
    rounds_fisher=True,
)
def level2_bf16_fisher(problem: Problem) -> Tensor:
    """The same with a bf16 Fisher."""
    return problem.ewc_bf16_fisher.accumulate_grad_()


# p+a+f. fp32: 12.
@peer(
    "value",
    bytes=lambda s: s.p + s.a + s.f,
    group=OURS,
    note="the value alone, as at lambda 0",
    writes_gradient=False,
    capturable=True,
)
@torch.no_grad()
def value(problem: Problem) -> Tensor:
    """The value alone, as at lambda 0."""
    return problem.ewc()


# ---- our ops, without what is in Python above them ----


# p+a+f. fp32: 12.
@peer(
    "op_penalty",
    bytes=lambda s: s.p + s.a + s.f,
    group=OPS,
    note="op penalty: the value",
    writes_gradient=False,
    capturable=True,
)
def op_penalty(problem: Problem) -> Tensor:
    """The value."""
    return ops.penalty(problem.params, problem.quadratic, backend=problem.backend).penalty


# p+a+f, and the gradient written into a buffer: g. fp32: 16.
@peer(
    "op_penalty_grad",
    bytes=lambda s: s.p + s.a + s.f + s.p,
    group=OPS,
    note="op penalty_grad: value, and gradient into a flat buffer",
    writes_gradient=False,
    capturable=True,
)
def op_penalty_grad(problem: Problem) -> Tensor:
    """The value, and the gradient into a flat buffer."""
    return ops.penalty_grad(problem.params, problem.flat_buffer, problem.quadratic, backend=problem.backend).penalty


# p+a+f+2g. fp32: 20.
@peer(
    "op_penalty_accumulate_",
    bytes=lambda s: s.p + s.a + s.f + 2 * s.g,
    group=OPS,
    note="op penalty_accumulate_: value, and gradient added in place",
    capturable=True,
)
def op_penalty_accumulate_(problem: Problem) -> Tensor:
    """The value, and the gradient added in place."""
    return ops.penalty_accumulate_(problem.params, problem.grads, problem.quadratic, backend=problem.backend).penalty


# One buffer read and written: 2g. fp32: 8.
@peer(
    "op_scale_",
    bytes=lambda s: 2 * s.p,
    group=OPS,
    note="op scale_: a flat buffer times a factor, as where grad_output is not 1",
    writes_gradient=False,
    capturable=True,
)
def op_scale_(problem: Problem) -> None:
    """A flat buffer times a factor that is not 1, which would cost nothing."""
    if "minus one" not in problem.cache:
        problem.cache["minus one"] = torch.full((), -1.0, device=problem.device)
    ops.scale_(problem.flat_buffer, problem.cache["minus one"], backend=problem.backend)


# ---- the limit ----


# p read, p written. fp32: 8.
@peer(
    "copy_",
    bytes=lambda s: s.a + s.p,
    group=LIMIT,
    note="copy_ of a buffer the size of the model: the measured memory bandwidth",
    writes_gradient=False,
    capturable=True,
)
def copy_(problem: Problem) -> None:
    """copy_ of a buffer the size of the model."""
    problem.flat_buffer[: problem.numel].copy_(problem.quadratic.anchor[: problem.numel])


# ---- are they right ----


def _roundoff(problem: Problem, peer: Peer) -> float:
    dtypes = {problem.dtype, problem.fisher_dtype, *([torch.bfloat16] if peer.rounds_fisher else [])}
    return max(torch.finfo(dtype).eps / 2 for dtype in dtypes)


def gradient_tolerance(problem: Problem, peer: Peer) -> float:
    """How far an element of a peer's gradient may be from the formula, relative to it: the four roundings that it takes
    to make d, F d and lambda F d, and to add that to the gradient."""
    return 4 * _roundoff(problem, peer)


def value_tolerance(problem: Problem, peer: Peer) -> float:
    """How far a peer's value may be from the formula, relative to it.

    A sum over n elements of like sign loses some sqrt(n) roundings; n is taken as all parameters, for some peers
    concatenate. Ours are summed in fp64 whatever the dtype.
    """
    sum_dtype = torch.promote_types(problem.dtype, torch.float64 if peer.group in (OURS, OPS) else torch.float32)
    result_dtype = torch.promote_types(problem.dtype, torch.float32)
    lost = math.sqrt(problem.numel) * torch.finfo(sum_dtype).eps
    return max(4 * _roundoff(problem, peer), 4 * torch.finfo(result_dtype).eps + lost)


def check(problem: Problem, peer: Peer) -> None:
    """A peer's gradient and value against the formula in fp64, tensor by tensor; the problem's gradients are kept.

    Raises:
        AssertionError: They differ; names the peer.
        Unavailable: The peer cannot run here.
    """
    allowed = gradient_tolerance(problem, peer)
    with problem.fresh_grads():
        found = peer.run(problem)
        wanted_value = 0.0
        for name, p, g, f, a in zip(
            problem.names, problem.params, problem.grads, problem.fishers, problem.anchors, strict=True
        ):
            d = p.detach().double() - a.double()
            wanted = f.double() * d
            wanted_value += problem.ewc_lambda / 2 * float(wanted.flatten() @ d.flatten())
            wanted *= problem.ewc_lambda if peer.writes_gradient else 0.0
            off, size = (g.double() - wanted).abs_(), wanted.abs_()
            right = off <= (size + 1e-3) * allowed  # False for NaN
            if not bool(right.all()):
                worst = int(right.flatten().int().argmin())
                raise AssertionError(
                    f"{peer.name}: wrong gradient of {name}: element {worst}, {float(size.flatten()[worst]):.6g}, is "
                    f"off by {float(off.flatten()[worst]):.3g}; allowed is {allowed:.3g} of it"
                )
    if found is not None and not math.isclose(float(found), wanted_value, rel_tol=value_tolerance(problem, peer)):
        raise AssertionError(f"{peer.name}: the value is {float(found)}, and should be {wanted_value}")
