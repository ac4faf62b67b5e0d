"""adamw_, sgd_ and proximal_ against the formulas in fp64, on both backends; torch's optimizers are tests/optim's."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

from ewc_fast.ops import steps as ops
from ewc_fast.ops.types import PenaltyResult, StepQuadratic
from tests.ops import exact as ex

SIZES = ((0,), (), (5, 7), (2049,), (32769,), (3, 0), (31,))
LAMBDA, DELTA = 2.5, 0.3
ADAMW = ops.AdamWOptions(lr=0.03, beta1=0.8, beta2=0.93, eps=1e-4, weight_decay=0.2, maximize=False)
SGD = ops.SGDOptions(lr=0.03, momentum=0.7, dampening=0.2, weight_decay=0.2, nesterov=False, maximize=False)
DTYPES = [  # parameters and gradients, moments, anchor, Fisher
    (torch.float64, torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32, torch.bfloat16),
]
dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))


class Problem:
    """Tensors of a step, a quadratic around some of the parameters, and what the step should make of them.

    Args:
        dtypes: See ``DTYPES``.
        arrange: Lays a tensor out anew: misaligned, transposed, with gaps.
    """

    def __init__(
        self,
        dtypes: Sequence[torch.dtype],
        sizes: Sequence[tuple[int, ...]] = SIZES,
        arrange: Callable[[Tensor], Tensor] = lambda t: t,
        constants: bool = False,
        anchored: bool = True,
    ) -> None:
        self.dtype, self.moments, anchor, fisher = dtypes
        draw = lambda f, dtype: [arrange(f(size).to(dtype)) for size in sizes]  # noqa: E731
        self.params, self.grads = draw(torch.randn, self.dtype), draw(torch.randn, self.dtype)
        self.first, self.second = draw(torch.randn, self.moments), draw(torch.rand, self.moments)
        self.largest = draw(torch.rand, self.moments)
        self.steps = [torch.tensor(float(random.randint(1, 9))) for _ in sizes]
        self.protected = [anchored and random.random() < 0.75 for _ in sizes]
        filled = [i for i, size in enumerate(sizes) if math.prod(size)]
        if anchored and filled and not any(self.protected[i] for i in filled):
            self.protected[filled[0]] = True
        self.anchors = [(p.double() + 0.5 * torch.randn(p.shape).double()).to(anchor) for p in self.params]
        self.fishers = [(torch.rand(p.shape) * (torch.rand(p.shape) < 0.75)).to(fisher) for p in self.params]
        strides = [ex.strides_of(p) for p in self.params]
        self.scales = [random.choice((0.0, 0.5, 1.0)) for _ in sizes] if constants else [1.0] * len(sizes)
        pulled = next((i for i in filled if self.protected[i]), None)
        if constants and pulled is not None:  # one is always pulled
            self.scales[pulled] = random.choice((0.5, 1.0))
        self.constants = [random.random() if constants and on else 0.0 for on in self.protected]
        if anchored:
            state = random.getstate()
            flat, offsets = ex.lay(self.anchors, strides, anchor, float("nan"))
            random.setstate(state)
            fishers, _ = ex.lay(self.fishers, strides, fisher, float("nan"))
            offsets = [o if on else -1 for o, on in zip(offsets, self.protected, strict=True)]
            scalars: list[Any] = [torch.tensor(LAMBDA, dtype=torch.float64), torch.tensor(DELTA)]
            if constants:
                scalars += [torch.tensor(self.scales), torch.tensor(self.constants, dtype=torch.float64)]
            self.q = StepQuadratic(list(itertools.chain(*strides)), flat, fishers, offsets, *scalars)
        else:
            self.q = StepQuadratic(list(itertools.chain(*strides)), None, None, [-1] * len(sizes))

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """With the same strides and alignment."""
        out = []
        for t in tensors:
            room = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            skip = t.data_ptr() // t.element_size() % 16
            copy = torch.full((room + 16,), ex.CANARY, dtype=t.dtype).as_strided(t.shape, t.stride(), skip)
            out.append(copy.copy_(t))
        return out

    def quadratic(self, i: int, at: Tensor) -> tuple[Tensor, float, float]:
        """In fp64: lambda (F + delta) (theta - theta*) over (theta - theta*), penalty, prediction."""
        if not self.protected[i]:
            return torch.zeros(at.shape, dtype=torch.float64), 0.0, 0.0
        d, f = at - self.anchors[i].double(), self.fishers[i].double()
        delta = torch.tensor(DELTA).double().item()
        weighted, squared = (f * d * d).sum().item() + self.constants[i], (d * d).sum().item()
        factor = LAMBDA * torch.tensor(self.scales[i]).double().item()
        return factor * (f + delta), 0.5 * factor * (weighted + delta * squared), 0.5 * weighted

    def expected(self, proximal: bool, update: Callable[[int, Tensor, Tensor], Any], lr: float, sign: float) -> Any:
        """New parameters, the rest of what ``update`` returns, and by_tensor, in fp64."""
        params, others, values = [], [], []
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            p, g = p.double(), sign * g.double()
            weights, penalty, predicted = self.quadratic(i, p)
            if not proximal and self.protected[i]:
                g = g + weights * (p - self.anchors[i].double())
            new, metric, rest = update(i, p, g)
            if proximal and self.protected[i]:
                _, penalty, predicted = self.quadratic(i, new)
                total = metric + lr * weights
                pulled = (metric * new + lr * weights * self.anchors[i].double()) / total
                new = torch.where(total > 0, pulled, new)
            params.append(new)
            others.append(rest)
            values.append((penalty, predicted))
        return params, others, torch.tensor(values, dtype=torch.float64).reshape(-1, 2).T


def adamw_update(problem: Problem, o: ops.AdamWOptions, amsgrad: bool) -> Callable[[int, Tensor, Tensor], Any]:
    def update(i: int, p: Tensor, g: Tensor) -> Any:
        step = problem.steps[i].item()
        m = o.beta1 * problem.first[i].double() + (1 - o.beta1) * g
        v = o.beta2 * problem.second[i].double() + (1 - o.beta2) * g * g
        x = torch.maximum(problem.largest[i].double(), v)
        metric = ((x if amsgrad else v) / (1 - o.beta2**step)).sqrt() + o.eps
        p = p * (1 - o.lr * o.weight_decay) - o.lr * (m / (1 - o.beta1**step)) / metric
        return p, metric, (m, v, x)

    return update


def sgd_update(problem: Problem, o: ops.SGDOptions, first: bool) -> Callable[[int, Tensor, Tensor], Any]:
    def update(i: int, p: Tensor, g: Tensor) -> Any:
        g = g + o.weight_decay * p
        metric = (1 - o.momentum) / (1 - o.dampening) if o.momentum else 1.0
        if not o.momentum:
            return p - o.lr * g, torch.full_like(p, metric), (None,)
        b = g if first else o.momentum * problem.first[i].double() + (1 - o.dampening) * g
        return p - o.lr * (g + o.momentum * b if o.nesterov else b), torch.full_like(p, metric), (b,)

    return update


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """To the dtype's rounding of the result and some of the arithmetic's."""
    math_roundoff = ex.ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == dtype and f.shape == w.shape
        tolerance = (2 * ex.ROUNDOFF[dtype] + 200 * math_roundoff) * (w.abs() + 1)
        assert ((f.double() - w).abs() <= tolerance).all(), (f.double() - w).abs().max()


def check_result(result: PenaltyResult, values: Tensor, dtype: torch.dtype) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.by_tensor.dtype == torch.float64 and result.penalty.dtype == result.predicted.dtype == sums
    torch.testing.assert_close(result.by_tensor, values, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(
        torch.stack([result.penalty, result.predicted]).double(), values.sum(1), rtol=2e-5, atol=1e-7
    )


def run_adamw(
    problem: Problem, backend: str, *, amsgrad: bool = False, proximal: bool = False, o: ops.AdamWOptions = ADAMW,
    amp: ops.Amp = ops.NO_AMP, **rest: Any,
) -> tuple[list[list[Tensor]], PenaltyResult]:  # fmt: skip
    lists = [problem.params, problem.grads, problem.first, problem.second, problem.largest if amsgrad else []]
    copies = [problem.copies(tensors) for tensors in lists]
    return copies, ops.adamw_(*copies, problem.steps, problem.q, o, amp, proximal=proximal, backend=backend, **rest)


def check_adamw(problem: Problem, backend: str, *, amsgrad: bool, proximal: bool, o: ops.AdamWOptions = ADAMW) -> None:
    copies, result = run_adamw(problem, backend, amsgrad=amsgrad, proximal=proximal, o=o)
    sign = -1.0 if o.maximize else 1.0
    params, others, values = problem.expected(proximal, adamw_update(problem, o, amsgrad), o.lr, sign)
    close(copies[0], params, problem.dtype)
    for n in range(3 if amsgrad else 2):
        close(copies[2 + n], [rest[n] for rest in others], problem.moments)
    assert all(torch.equal(a, b) for a, b in zip(copies[1], problem.grads, strict=True))
    check_result(result, values, problem.dtype)


couplings = pytest.mark.parametrize("proximal", [False, True], ids=["coupled", "proximal"])


@dtypes
@couplings
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw(dtypes: Any, proximal: bool, amsgrad: bool, maximize: bool, backend: str) -> None:
    problem = Problem(dtypes, constants=maximize)
    check_adamw(problem, backend, amsgrad=amsgrad, proximal=proximal, o=ADAMW._replace(maximize=maximize))


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@couplings
def test_adamw_without_a_quadratic(dtypes: Any, proximal: bool, backend: str) -> None:
    check_adamw(Problem(dtypes, anchored=False), backend, amsgrad=False, proximal=proximal)


@dtypes
@couplings
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.7, 0.2, False), (0.7, 0.0, True)], ids=str
)
@pytest.mark.parametrize("first", [False, True])
def test_sgd(
    dtypes: Any, proximal: bool, momentum: float, dampening: float, nesterov: bool, first: bool, backend: str
) -> None:
    problem = Problem(dtypes)
    o = SGD._replace(momentum=momentum, dampening=dampening, nesterov=nesterov, maximize=first)
    if first:
        problem.first = [torch.zeros_like(t) for t in problem.first]
    copies = [problem.copies(t) for t in (problem.params, problem.grads, problem.first if momentum else [])]
    result = ops.sgd_(*copies, problem.q, o, first=first, proximal=proximal, backend=backend)
    sign = -1.0 if first else 1.0
    params, others, values = problem.expected(proximal, sgd_update(problem, o, first), o.lr, sign)
    close(copies[0], params, problem.dtype)
    if momentum:
        close(copies[2], [rest[0] for rest in others], problem.moments)
    check_result(result, values, problem.dtype)


@dtypes
@pytest.mark.parametrize("kind", ["constant", "linear", "root"])
def test_proximal(dtypes: Any, kind: str, backend: str) -> None:
    problem = Problem(dtypes, constants=True)
    rates = torch.rand(len(SIZES), 4, dtype=torch.float64) + 0.1
    moments = problem.copies([] if kind == "constant" else problem.second)
    params = problem.copies(problem.params)
    result = ops.proximal_(params, moments, problem.q, rates, root=kind == "root", backend=backend)
    wanted, values = [], []
    for i, p in enumerate(problem.params):
        lr, factor, inner, eps = rates[i].tolist()
        x = problem.second[i].double()
        metric = {
            "constant": torch.full(p.shape, factor, dtype=torch.float64), "linear": factor * x,
            "root": factor * ((inner * x).sqrt() + eps),
        }[kind]  # fmt: skip
        weights, penalty, predicted = problem.quadratic(i, p.double())
        total = metric + lr * weights
        pulled = (metric * p.double() + lr * weights * problem.anchors[i].double()) / total
        wanted.append(torch.where((total > 0) & (weights > 0), pulled, p.double()))
        values.append((penalty, predicted))
    close(params, wanted, problem.dtype)
    assert all(torch.equal(a, b) for a, b in zip(moments, problem.second, strict=False))
    check_result(result, torch.tensor(values, dtype=torch.float64).T, problem.dtype)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["constant", "linear", "root"])
def test_a_prepared_pull_is_the_same(kind: str) -> None:
    problem = Problem(DTYPES[1], constants=True)
    moments = problem.copies([] if kind == "constant" else problem.second)
    numbers = (0.5, 2, 3.0, 0.25)
    expected, params = problem.copies(problem.params), problem.copies(problem.params)
    rates = torch.tensor([numbers] * len(SIZES), dtype=torch.float64)
    wanted = ops.proximal_(expected, moments, problem.q, rates, root=kind == "root", backend="native")
    result = ops.puller(params, problem.q, backend="native")(moments, numbers, kind == "root")
    assert all(torch.equal(a, b) for a, b in zip((*params, *result), (*expected, *wanted), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(params, problem.params, strict=True))


@pytest.mark.native
def test_a_prepared_pull_leaves_the_unusual_alone() -> None:
    problem = Problem(DTYPES[1])
    params = problem.copies(problem.params)
    pull = ops.puller(params, problem.q)
    rest = (1.0, 1.0, 0.0)
    for lr in (torch.tensor(0.5), True, None):
        assert pull([], (lr, *rest), True) is None
    assert ops.puller(params, problem.q, backend="reference")([], (0.5, *rest), True) is None
    with FakeTensorMode():  # which would want the rates without memory
        assert pull([], (0.5, *rest), True) is None
    with pytest.raises(OverflowError):
        pull([], (10**400, *rest), True)
    with pytest.raises(ValueError, match="rates must be"):
        pull([], (0.5, 1.0), True)
    with pytest.raises(ValueError, match="moments has 1 tensors"):
        pull([torch.ones(2)], (0.5, *rest), True)
    assert all(torch.equal(a, b) for a, b in zip(params, problem.params, strict=True))


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0] if t.numel() else t,
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]], ids=str)
@couplings
def test_any_memory_layout(arrangement: str, dtypes: Any, proximal: bool, backend: str) -> None:
    check_adamw(
        Problem(dtypes, arrange=ARRANGEMENTS[arrangement]), backend, amsgrad=arrangement == "with gaps",
        proximal=proximal,
    )  # fmt: skip


@couplings
def test_a_gradient_in_another_order_than_its_parameter(proximal: bool, backend: str) -> None:
    problem = Problem(DTYPES[1])
    problem.grads[2], problem.first[2] = (t.mT.contiguous().mT for t in (problem.grads[2], problem.first[2]))
    check_adamw(problem, backend, amsgrad=True, proximal=proximal)


def test_neither_metric_nor_weight_leaves_the_parameter(backend: str) -> None:
    p = torch.tensor([1.0, 2.0, 3.0])
    q = StepQuadratic([1], torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]), [0], torch.tensor(1.0), torch.tensor(0.0))
    rates = torch.tensor([[0.5, 1.0, 1.0, 0.0]], dtype=torch.float64)
    ops.proximal_([p], [torch.tensor([0.0, 0.0, 4.0])], q, rates, backend=backend)
    assert p.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("ewc_lambda", [1e30, 3e38])
def test_any_lambda_lands_on_the_anchor(ewc_lambda: float, backend: str) -> None:
    p, anchor = torch.randn(9), torch.randn(9)
    q = StepQuadratic([1], anchor, torch.full((9,), 1e5), [0], torch.tensor(ewc_lambda), torch.tensor(0.0))
    rates = torch.tensor([[0.5, 1.0, 1.0, 0.0]], dtype=torch.float64)
    ops.proximal_([p], [torch.rand(9)], q, rates, backend=backend)
    torch.testing.assert_close(p, anchor)


@couplings
def test_lambda_zero_reads_and_steps_as_if_alone(proximal: bool, backend: str) -> None:
    problem = Problem(DTYPES[1])
    problem.params[4][7] = math.inf  # 0 times what is read would be NaN
    alone = Problem.__new__(Problem)
    alone.__dict__.update(problem.__dict__)
    alone.q = StepQuadratic(problem.q.strides, None, None, [-1] * len(SIZES))
    expected, _ = run_adamw(alone, backend)
    assert problem.q.ewc_lambda is not None
    problem.q.ewc_lambda.zero_()
    found, result = run_adamw(problem, backend, proximal=proximal)
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert result.penalty.item() == 0.0 and result.predicted.item() != 0.0


@couplings
@pytest.mark.parametrize("overflow", [False, True])
def test_amp(proximal: bool, overflow: bool, backend: str) -> None:
    problem = Problem(DTYPES[1])
    plain, values = run_adamw(problem, backend, proximal=proximal)
    scaled = Problem.__new__(Problem)
    scaled.__dict__.update(problem.__dict__)
    scaled.grads = [g * 1024 for g in problem.grads]
    amp = ops.Amp(torch.tensor(1024.0), torch.tensor(float(overflow)), torch.tensor(ADAMW.lr, dtype=torch.float64))
    found, result = run_adamw(scaled, backend, proximal=proximal, amp=amp, o=ADAMW._replace(lr=math.nan))
    if overflow:
        lists = (problem.params, scaled.grads, problem.first, problem.second)
        for before, after in zip(itertools.chain(*lists), itertools.chain(*found), strict=True):
            assert torch.equal(before, after)
        i = problem.protected.index(True)
        _, at_rest, _ = problem.quadratic(i, problem.params[i].double())
        assert result.by_tensor[0, i].item() == pytest.approx(at_rest, rel=1e-5)
    else:
        for a, b in zip(itertools.chain(*plain), itertools.chain(*found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result.by_tensor, values.by_tensor)


@pytest.mark.native
@couplings
def test_sums_do_not_depend_on_the_number_of_threads(proximal: bool) -> None:
    problem = Problem(DTYPES[2], sizes=((200_000,), (70_001,), (3,)))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(run_adamw(problem, "native", proximal=proximal))
    finally:
        torch.set_num_threads(before)
    for copies, result in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, runs[0][1], strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(itertools.chain(*copies), itertools.chain(*runs[0][0]), strict=True)
        )


# ---- stochastic rounding ----


def test_stochastic_rounding_is_unbiased_and_keyed(backend: str) -> None:
    n = 40_000
    p = torch.full((n,), 1.0, dtype=torch.bfloat16)
    zeros = lambda: torch.zeros(n, dtype=torch.bfloat16)  # noqa: E731
    q = StepQuadratic([1], None, None, [-1])
    o = ops.AdamWOptions(lr=1e-3, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.0, maximize=False)

    def step(seed: int, count: float = 1.0, ordinal: int = 0) -> list[Tensor]:
        lists = [[p.clone()], [torch.ones_like(p)], [zeros()], [zeros()], []]
        ops.adamw_(*lists, [torch.tensor(count)], q, o, seed=seed, ordinals=[ordinal], backend=backend)
        return [lists[i][0] for i in (0, 2, 3)]

    rounded, first, second = step(1)
    assert set(rounded.tolist()) <= {1.0, 1 - 2**-8}  # a bf16 step of 2^-8 below 1; the update is 1e-3
    exact = (1 - 1e-3, 0.1, 0.001)
    for t, wanted in zip((rounded, first, second), exact, strict=True):
        spread = (t.double().max() - t.double().min()).item()
        assert 0 < spread and abs(t.double().mean().item() - wanted) < 5 * spread / 2 / n**0.5
    down = (rounded < 1).double()
    for other in (step(2)[0], step(1, ordinal=1)[0]):  # another seed, another tensor
        share = (((other < 1).double() - 0.256) * (down - 0.256)).mean().item()
        assert abs(share) < 5 * 0.2 / n**0.5
    assert torch.equal(step(1)[0], rounded) and not torch.equal(step(1, count=2.0)[1], first)
    neighbours = ((down[1:] - 0.256) * (down[:-1] - 0.256)).mean().item()
    assert abs(neighbours) < 5 * 0.2 / n**0.5


@pytest.mark.native
def test_both_backends_round_alike() -> None:
    problem = Problem(DTYPES[5], constants=True)
    for t in problem.second:  # NaN and infinity survive
        if t.numel() > 40:
            t[20:22] = torch.tensor([math.inf, math.nan])
    for proximal, amsgrad in itertools.product((False, True), repeat=2):
        rest = {"proximal": proximal, "amsgrad": amsgrad, "seed": 2**32 - 1, "ordinals": list(range(len(SIZES)))}
        a, b = (run_adamw(problem, backend, **rest)[0] for backend in ("native", "reference"))
        different = total = 0
        for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-9, equal_nan=True)
            different += (x.nan_to_num() != y.nan_to_num()).sum().item()
            total += x.numel()
        assert different < 1e-3 * total  # where fp32 differs in its last bit


# ---- as ops ----


def test_the_backend_that_is_asked_for_runs(backend: str) -> None:
    problem = Problem(DTYPES[1])
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run_adamw(problem, backend)
        copies = [problem.copies(t) for t in (problem.params, problem.grads, problem.first)]
        ops.sgd_(*copies, problem.q, SGD, backend=backend)
        ops.proximal_(copies[0], [], problem.q, torch.ones(len(SIZES), 4, dtype=torch.float64), backend=backend)
    ran = {event.key for event in recorded.key_averages() if event.key.startswith("ewc_fast::")}
    assert ran == ({"ewc_fast::adamw_", "ewc_fast::sgd_", "ewc_fast::proximal_"} if backend == "native" else set())


@pytest.mark.native
@pytest.mark.parametrize("anchored", [False, True])
def test_opcheck(anchored: bool) -> None:
    problem = Problem(DTYPES[1], sizes=((5, 7), (), (0,)), anchored=anchored)
    tail = (*problem.q[1:], None, None, None)
    lists = [problem.params, problem.grads, problem.first, problem.second, problem.largest]
    args = (*map(problem.copies, lists), problem.steps, problem.q.strides, *tail, *ADAMW, True, 3, [0, 1, 2])
    opcheck(torch.ops.ewc_fast.adamw_.default, args)
    args = (*map(problem.copies, lists[:3]), problem.q.strides, *tail, *SGD, False, True)
    opcheck(torch.ops.ewc_fast.sgd_.default, args)
    if anchored:
        rates = torch.ones(3, 4, dtype=torch.float64)
        args = (problem.copies(problem.params), problem.second, problem.q.strides, *problem.q[1:], None, rates, True)
        opcheck(torch.ops.ewc_fast.proximal_.default, args)


@pytest.mark.native
def test_autograd_sees_what_was_changed() -> None:
    problem = Problem(DTYPES[1], sizes=((5, 7),), anchored=False)
    x = problem.params[0].clone().requires_grad_()
    y = (x * x.detach()).sum() + x.square().sum()
    with torch.no_grad():
        lists = [[x], problem.grads, problem.first, problem.second, []]
        ops.adamw_(*lists, problem.steps, problem.q, ADAMW, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_to_step(backend: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        ops.adamw_([], [], [], [], [], [], StepQuadratic([], None, None, []), ADAMW, backend=backend)


BAD: dict[str, tuple[Callable[[Problem], Any], str]] = {
    "grads of another shape": (lambda p: p.grads.__setitem__(2, torch.zeros(7, 5)), r"grads\[2\] has shape"),
    "too few grads": (lambda p: p.grads.pop(), "grads has 6 tensors for 7 parameters"),
    "moments of another dtype": (
        lambda p: p.second.__setitem__(slice(None), [t.double() for t in p.second]), "exp_avg_sqs must have the dtype"
    ),
    "one dtype": (lambda p: p.first.__setitem__(3, p.first[3].double()), r"exp_avgs\[3\] has dtype"),
    "an integer": (lambda p: p.grads.__setitem__(slice(None), [t.int() for t in p.grads]), r"grads\[0\] has dtype"),
    "shared memory": (lambda p: p.first.__setitem__(2, torch.zeros(1).expand(5, 7)), r"exp_avgs\[2\] has strides"),
    "an offset past the end": (lambda p: p.q.offsets.__setitem__(3, 10**7), r"params\[3\] has 2049 elements at offset"),
    "strides": (lambda p: p.q.strides.__setitem__(1, 3), r"params\[2\] has strides"),
    "steps": (lambda p: p.steps.__setitem__(0, torch.ones(2)), r"steps\[0\] must hold one number"),
    "a step's dtype": (lambda p: p.steps.__setitem__(0, torch.tensor(1)), r"steps\[0\] must be float32 or float64"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_change_nothing(what: str, backend: str) -> None:
    problem = Problem(DTYPES[1])
    spoil, message = BAD[what]
    spoil(problem)
    lists = [problem.params, problem.grads, problem.first, problem.second, []]
    before = [t.clone() for t in problem.params]
    with pytest.raises((ValueError, TypeError), match=message):
        ops.adamw_(*lists, problem.steps, problem.q, ADAMW, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))


def test_a_sparse_gradient_changes_nothing(backend: str) -> None:
    problem = Problem(DTYPES[1])
    problem.grads[2] = torch.zeros(5, 7).to_sparse()
    lists = [problem.params, problem.grads, problem.first, problem.second, []]
    before = [t.clone() for t in problem.params]
    with pytest.raises((TypeError, NotImplementedError), match="(?i)sparse"):  # the latter by the dispatcher
        ops.adamw_(*lists, problem.steps, problem.q, ADAMW, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))


def test_bad_numbers(backend: str) -> None:
    problem = Problem(DTYPES[1])
    for amp, message in (
        (ops.Amp(torch.ones(2)), "grad_scale must hold one number"),
        (ops.Amp(found_inf=torch.tensor(1)), "found_inf must be float32 or float64"),
        (ops.Amp(lr=torch.ones(3)), "lr must hold one number"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run_adamw(problem, backend, amp=amp)
    with pytest.raises(ValueError, match="seed must lie in"):
        run_adamw(problem, backend, seed=2**32, ordinals=list(range(7)))
    with pytest.raises(ValueError, match="ordinals has 0 entries"):
        run_adamw(problem, backend, seed=1)
    for rates, message in ((torch.ones(3, 4), "rates must be"), (torch.ones(7, 4), "rates must be float64")):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.proximal_(problem.params, [], problem.q, rates, backend=backend)
    incomplete = problem.q._replace(delta=None)
    with pytest.raises(ValueError, match="an anchor needs fisher, ewc_lambda and delta"):
        ops.sgd_(problem.params, problem.grads, problem.first, incomplete, SGD, backend=backend)
