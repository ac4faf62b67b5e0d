"""penalty, penalty_grad, penalty_accumulate_ and scale_ against the formula, on both backends."""

from __future__ import annotations

import importlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic
from tests.ops import exact as ex
from tests.ops.exact import Loud, make_inputs

EDGES = (0, 1, 3, 63, 64, 65, 2047, 2048, 2049, 32767, 32768, 32769, 100003)

dtypes = pytest.mark.parametrize("dtype", ex.PARAMETER_DTYPES, ids=str)


def random_params(sizes: tuple[tuple[int, ...] | int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(size).to(dtype) for size in sizes]


def random_like(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.randn(p.shape).to(dtype or p.dtype) for p in params]


def test_the_backend_that_is_asked_for_runs(backend: str) -> None:
    inputs = make_inputs(random_params((5, 7)))
    buffer = torch.zeros_like(inputs.q.anchor)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        ops.penalty(inputs.params, inputs.q, backend=backend)
        ops.penalty_grad(inputs.params, buffer, inputs.q, backend=backend)
        ops.penalty_accumulate_(inputs.params, random_like(inputs.params), inputs.q, backend=backend)
        ops.scale_(buffer, torch.tensor(2.0), backend=backend)
    ran = {event.key for event in recorded.key_averages() if event.key.startswith("ewc_fast::")}
    names = {"penalty", "penalty_grad", "penalty_accumulate_", "scale_"}
    assert ran == ({f"ewc_fast::{name}" for name in names} if backend == "native" else set())


@pytest.mark.native
def test_what_only_torch_ops_can_serve_goes_there() -> None:
    """Optimizer steps call the op past torch.ops, which must not change what is seen from outside."""
    inputs = make_inputs(random_params((5, 7)))
    for wrap in (list, tuple):
        ex.check_accumulate(inputs, wrap(random_like(inputs.params)), "native")
    Loud.asked.clear()
    grads = [g.as_subclass(Loud) for g in random_like(inputs.params)]
    ops.penalty_accumulate_(inputs.params, grads, inputs.q, backend="native")
    assert any("penalty_accumulate_" in name for name in Loud.asked)

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Loud.asked.append(str(func))
            return func(*args, **(kwargs or {}))

    Loud.asked.clear()
    with Record():
        ops.penalty_accumulate_(inputs.params, random_like(inputs.params), inputs.q, backend="native")
    assert any("penalty_accumulate_" in name for name in Loud.asked)

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Loud.asked.append(str(func))
            return func(*args, **(kwargs or {}))

    Loud.asked.clear()
    with Dispatched():
        ops.penalty_accumulate_(inputs.params, random_like(inputs.params), inputs.q, backend="native")
    assert any("penalty_accumulate_" in name for name in Loud.asked)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(p) for p in inputs.params]
        q = FlatQuadratic(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs.q))
        assert ops.penalty_accumulate_(fake, [torch.empty_like(p) for p in fake], q).by_tensor.shape == (2, 2)


@pytest.mark.native
def test_the_direct_call_refuses_what_it_cannot_read() -> None:
    direct = importlib.import_module("ewc_fast._C").penalty_accumulate_
    inputs = make_inputs(random_params((5, 7)))
    grads = random_like(inputs.params)
    good = [inputs.params, grads, *inputs.q, None, None, False]
    before = [g.clone() for g in grads]
    with pytest.raises(TypeError, match="13 arguments"):
        direct(*good[:-1])
    for i, bad in [(0, None), (1, [1, 2]), (2, 3.0), (4, ["a", "b"]), (4, (0, 64)), (6, 2.0), (8, "x"), (12, 1)]:
        assert direct(*good[:i], bad, *good[i + 1 :]) is None
    with pytest.raises(OverflowError):
        direct(*good[:4], [2**70, 0], *good[5:])
    ex.assert_same_bits(grads, before)
    with pytest.raises(ValueError, match="grads has 1 tensors for 2"):
        direct(inputs.params, grads[:1], *good[2:])
    leaves = [p.requires_grad_() for p in inputs.params]
    assert not any(t.requires_grad for t in direct(leaves, *good[1:]))


@pytest.mark.native
def test_the_direct_call_finds_the_gradients_itself() -> None:
    inputs = make_inputs(random_params((5, 7)))
    leaves = [p.requires_grad_() for p in inputs.params]
    with torch.no_grad():
        grads = random_like(inputs.params)
        expected = [g.clone() for g in grads]
        ops.penalty_accumulate_(leaves, expected, inputs.q, backend="native")
    leaves[0].grad = grads[0]
    accumulate = ops.accumulator_into_own(leaves, inputs.q, backend="native")
    assert accumulate() is None  # the other one has none
    leaves[1].grad = grads[1]
    assert ops.accumulator_into_own(leaves, inputs.q, backend="reference")() is None
    result = accumulate()
    assert result is not None
    ex.assert_same_bits([p.grad for p in leaves], expected)
    again = random_like(inputs.params)
    expected = [g.clone() for g in again]
    ops.penalty_accumulate_(leaves, expected, inputs.q, maximize=True, backend="native")
    for p, g in zip(leaves, again, strict=True):  # a prepared call reads the gradients of its time
        p.grad = g
    ops.accumulator_into_own(leaves, inputs.q, maximize=True)()
    ex.assert_same_bits(again, expected)

    class Subclass(torch.nn.Parameter):
        pass

    other = Subclass(inputs.params[1].detach())
    other.grad = torch.zeros_like(inputs.params[1])
    before = again[0].clone()
    assert ops.accumulator_into_own([*leaves[:1], other], inputs.q)() is None
    ex.assert_same_bits(again[:1], [before])


# ---- dtypes ----


@dtypes
def test_every_combination_of_dtypes(backend: str, dtype: torch.dtype) -> None:
    for anchor, fisher in itertools.product(ex.STATE_DTYPES, ex.STATE_DTYPES):
        inputs = make_inputs(random_params((3, 2049, (17, 5)), dtype), anchor, fisher)
        ex.check_penalty(inputs, backend, (anchor, fisher))
        for grad in ex.PARAMETER_DTYPES:
            ex.check_penalty_grad(inputs, backend, grad, (anchor, fisher, grad))
            ex.check_accumulate(inputs, random_like(inputs.params, grad), backend, (anchor, fisher, grad))


@dtypes
def test_a_parameter_at_its_anchor_costs_exactly_nothing(backend: str, dtype: torch.dtype) -> None:
    """A bf16 or fp16 weight and an fp32 anchor must be compared in a type that holds both."""
    params = random_params((1000,), dtype)
    inputs = make_inputs(params, torch.float64 if dtype == torch.float64 else torch.float32, drift=0.0)
    grads = random_like(params)
    before = [g.clone() for g in grads]
    result = ops.penalty_accumulate_(params, grads, inputs.q, backend=backend)
    assert float(result.penalty) == float(result.predicted) == 0.0
    ex.assert_same_bits(grads, before)


# ---- sizes and lists ----


@dtypes
def test_sizes_around_every_boundary(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs([*random_params(EDGES, dtype), torch.randn(()).to(dtype)])
    ex.check_penalty(inputs, backend)
    ex.check_penalty_grad(inputs, backend)
    ex.check_accumulate(inputs, random_like(inputs.params), backend)
    for size in (1, 65, 2049, 32768):  # and each alone
        inputs = make_inputs(random_params((size,), dtype))
        ex.check_penalty_grad(inputs, backend, what=size)
        ex.check_accumulate(inputs, random_like(inputs.params), backend, size)


@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (0, 0, 0),
        (0, 40000, 5),
        (5, 0, 0, 40000),
        (40000, 5, 0, 0),
        ((0, 4), (3, 0, 2), 7, (2, 0), (), 1, (0,)),
        (32768, 0, 32768, 0, 0, 1, 0),
    ],
    ids=str,
)
def test_empty_lists_and_empty_tensors(backend: str, sizes: tuple[tuple[int, ...] | int, ...]) -> None:
    inputs = make_inputs(random_params(sizes), constant=torch.rand(len(sizes), dtype=torch.float64))
    ex.check_penalty(inputs, backend)
    ex.check_penalty_grad(inputs, backend)
    ex.check_accumulate(inputs, random_like(inputs.params), backend)


def test_many_tensors(backend: str) -> None:
    inputs = make_inputs(random_params(tuple(random.choice((0, 1, 7, 64, 300)) for _ in range(299)) + (33000,)))
    ex.check_penalty_grad(inputs, backend)
    ex.check_accumulate(inputs, random_like(inputs.params), backend)


# ---- layouts ----


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 4, 5),
    "transposed": lambda: torch.randn(40, 70).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(8, 3, 5, 4).contiguous(memory_format=torch.channels_last),
    "strided_slice": lambda: torch.randn(30, 40)[::2, 1::3],
    "column": lambda: torch.randn(50, 3)[:, 1],
    "rows": lambda: torch.randn(50, 6)[7:31],
    "misaligned": lambda: torch.randn(5001)[1:],
    "misaligned_transposed": lambda: torch.randn(1 + 33 * 65)[1:].view(33, 65).t(),
    "size_1_dimensions": lambda: torch.randn(7, 1, 1).as_strided((7, 1, 1), (1, 100, 1000)),
    "size_1_row_of_more": lambda: torch.randn(9, 7)[4:5].t(),
    "overlapping": lambda: torch.randn(7, 1).expand(7, 5),
    "windows": lambda: torch.randn(20).unfold(0, 5, 2),
    "empty_slice": lambda: torch.randn(4, 6)[2:2, ::2],
    "scalar_of_more": lambda: torch.randn(9)[4],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    def make() -> Tensor:
        t = LAYOUTS[layout]()
        moved = torch.empty(t.untyped_storage().size() // 4, dtype=dtype)
        moved.copy_(torch.randn(moved.shape))
        return moved.as_strided(t.shape, t.stride(), t.storage_offset())

    inputs = make_inputs([torch.randn(3, 3).to(dtype), make(), torch.randn(5).to(dtype)])
    ex.check_penalty(inputs, backend)
    ex.check_penalty_grad(inputs, backend)
    ex.check_accumulate(inputs, random_like(inputs.params), backend)  # row-major gradients
    if layout not in ("overlapping", "windows"):
        ex.check_accumulate(inputs, [torch.randn(3, 3).to(dtype), make(), torch.randn(5).to(dtype)], backend)


@pytest.mark.native
@pytest.mark.parametrize(
    ("numel", "dtype", "grad_dtype"),
    [
        (8_400_001, torch.float32, torch.float32),
        (8_400_001, torch.bfloat16, torch.float32),  # no loop of its own
        (4_200_003, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_a_gradient_too_large_for_the_caches(numel: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """From 32 MB on it is written past them, in words of 16 bytes: the slices start anywhere."""
    assert numel * grad_dtype.itemsize >= 32 << 20
    inputs = make_inputs(random_params((3, numel, 2050, 1), dtype), *([dtype] * 2 if dtype.itemsize == 8 else []))
    ex.check_penalty_grad(inputs, "native", grad_dtype)


@contextmanager
def canaries(around: Tensor, *members: Tensor) -> Iterator[None]:
    """Checks that nothing of ``around`` changes but the elements of ``members``, which are views of it."""
    outside = torch.ones(around.shape, dtype=torch.bool)
    for t in members:
        outside[t.storage_offset() + ex.indices(t.shape, t.stride()).flatten()] = False
    before = around[outside].clone()
    yield
    ex.assert_same_bits([around[outside]], [before])
    assert bool(outside.any()) and not bool(outside.all())


@dtypes
def test_nothing_beside_the_gradients_is_written(backend: str, dtype: torch.dtype) -> None:
    """Gradients are views into one allocation: dense, misaligned, transposed and with gaps."""
    whole = torch.randn(80_000).to(dtype)
    grads = [
        whole[1:1025],
        whole[1030 : 1030 + 15 * 7].view(15, 7).t(),
        whole[2000:4000].view(40, 50)[::3, 1::2],
        whole[4001 : 4001 + 40_001],
        whole[50_001],
        whole[50_003:50_003],
    ]
    params = [torch.randn(g.shape).to(dtype) for g in grads]
    params[1] = torch.randn(15, 7).t().to(dtype)
    inputs = make_inputs(params)
    with canaries(whole, *grads):
        ex.check_accumulate(inputs, grads, backend)


@dtypes
def test_what_is_only_read_stays_as_it_is(backend: str, dtype: torch.dtype) -> None:
    params = [torch.randn(3000).to(dtype), torch.randn(20, 30).to(dtype)[::2], torch.randn(8, 9).to(dtype).t()]
    inputs = make_inputs(params, scale=torch.rand(3), constant=torch.rand(3, dtype=torch.float64))
    read = [*params, *(t for t in inputs.q if isinstance(t, Tensor))]
    before, versions = [t.clone() for t in read], [t._version for t in read]
    ops.penalty(params, inputs.q, backend=backend)
    ops.penalty_grad(params, torch.empty_like(inputs.q.anchor), inputs.q, backend=backend)
    ops.penalty_accumulate_(params, random_like(params), inputs.q, backend=backend)
    ex.assert_same_bits(read, before)
    assert [t._version for t in read] == versions


# ---- scalars ----


@dtypes
@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.float64], ids=str)
def test_all_scalars_together(backend: str, dtype: torch.dtype, scalar_dtype: torch.dtype) -> None:
    params = random_params((2049, 5, 0, 7), dtype)
    inputs = make_inputs(
        params,
        scale=torch.tensor([0.5, 2.0, 3.0, 0.0], dtype=scalar_dtype),
        constant=torch.tensor([1.5, 0.0, 2.5, 4.0], dtype=torch.float64),
    )
    shaped = inputs.q._replace(  # one number each, in whatever shape
        ewc_lambda=torch.tensor([2.25], dtype=scalar_dtype), delta=torch.tensor([[0.375]], dtype=scalar_dtype)
    )
    inputs = ex.Inputs(params, inputs.anchors, inputs.fishers, shaped, inputs.strides)
    grad_scale, no_inf = torch.tensor(8.0), torch.tensor(0.0)
    expected = ex.exact(inputs, grad_scale=8.0)  # which multiplies the gradient, not the value

    grad = torch.zeros(inputs.q.anchor.shape, dtype=dtype)
    result = ops.penalty_grad(params, grad, inputs.q, grad_scale, no_inf, backend=backend)
    ex.assert_values(result, inputs, expected)
    for i, g in enumerate(inputs.gradients_in(grad)):
        ex.assert_gradient(g, expected.gradients[i], inputs, i)

    for maximize, sign in ((False, 1), (True, -1)):
        grads = random_like(params)
        before = [g.clone() for g in grads]
        result = ops.penalty_accumulate_(params, grads, inputs.q, grad_scale, no_inf, maximize, backend=backend)
        ex.assert_values(result, inputs, expected)
        for i, g in enumerate(grads):
            ex.assert_gradient(g, sign * expected.gradients[i], inputs, i, before[i])


def off(inputs: ex.Inputs, how: str) -> tuple[ex.Inputs, Tensor | None]:
    if how == "lambda":
        inputs.q = inputs.q._replace(ewc_lambda=torch.tensor(0.0))
        return inputs, None
    return inputs, torch.tensor(math.nan if how == "found_nan" else 2.0)


@dtypes
@pytest.mark.parametrize("how", ["lambda", "found_inf", "found_nan"])
def test_a_penalty_that_is_off_touches_no_gradient(backend: str, dtype: torch.dtype, how: str) -> None:
    """Not even to add zero: NaN payloads and -0 stay, and infinite parameters bring no NaN."""
    params = [*random_params((2100, 3), dtype), torch.tensor([math.inf, math.nan, -math.inf, 1.0]).to(dtype)]
    inputs, found_inf = off(make_inputs(params), how)
    grads = random_like(params)
    grads[0][7], grads[1][0] = math.nan, -0.0
    strided = torch.randn(8).to(dtype)[::2]
    strided[1] = math.nan
    grads[2] = strided
    before = [g.clone() for g in grads]
    result = ops.penalty_accumulate_(params, grads, inputs.q, found_inf=found_inf, backend=backend)
    ex.assert_same_bits(grads, before)
    assert math.isnan(float(result.predicted))
    assert how != "lambda" or float(result.penalty) == 0.0

    flat = torch.full(inputs.q.anchor.shape, ex.CANARY, dtype=dtype)
    ops.penalty_grad(params, flat, inputs.q, found_inf=found_inf, backend=backend)
    for g in inputs.gradients_in(flat):
        ex.assert_same_bits([g], [torch.zeros_like(g)])


def test_at_lambda_0_the_forgetting_is_still_predicted(backend: str) -> None:
    inputs = make_inputs(random_params((3000, 5)), ewc_lambda=0.0, constant=torch.tensor([1.0, 2.0]).double())
    grad = torch.empty_like(inputs.q.anchor)
    for result in (
        ops.penalty(inputs.params, inputs.q, backend=backend),
        ops.penalty_grad(inputs.params, grad, inputs.q, backend=backend),
        ops.penalty_accumulate_(inputs.params, random_like(inputs.params), inputs.q, backend=backend),
    ):
        ex.assert_values(result, inputs, ex.exact(inputs))
        assert float(result.penalty) == 0.0 and float(result.predicted) > 1.5


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 40_000, 70_002])
def test_nan_and_infinity_are_not_hidden(backend: str, dtype: torch.dtype, bad: float, where: int) -> None:
    params = random_params((70_003, 5), dtype)
    params[0][where] = bad
    inputs = make_inputs(params)
    inputs.anchors[0][where] = 0.0
    inputs.fishers[0][where] = 1.0
    place = inputs.q.offsets[0] + where
    inputs.q.anchor[place], inputs.q.fisher[place] = 0.0, 1.0
    grads = [torch.zeros_like(p) for p in params]
    result = ops.penalty_accumulate_(params, grads, inputs.q, backend=backend)
    wanted = abs(bad)
    for value in (result.penalty, result.predicted, result.by_tensor[0, 0], result.by_tensor[1, 0]):
        assert float(value) == wanted or (math.isnan(bad) and math.isnan(float(value)))
    assert bool(result.by_tensor[:, 1].isfinite().all()) and bool(grads[1].isfinite().all())
    assert (~grads[0].isfinite()).nonzero().flatten().tolist() == [where]
    assert math.isnan(float(grads[0][where])) if math.isnan(bad) else float(grads[0][where]) == bad


# ---- precision and order of sums ----


@pytest.mark.parametrize("mode", ["penalty", "penalty_grad", "penalty_accumulate_"])
def test_a_long_fp32_sum_is_rounded_in_blocks_only(backend: str, mode: str) -> None:
    """4.3 million elements; a serial fp32 sum is off by 1e-2, one in fp32 lanes by 1e-5.

    Tolerance of the kernels: of the 2048 additions of a block each is off by 2^-24 / 3 of about half the block's sum,
    so a block that is summed in one lane (as without optimisation) by 6e-7. The 2,100 blocks err independently: 1.4e-8,
    six times over. In eight lanes it is 2e-9. The reference sums in fp64: what is left are its terms' roundings.
    """
    tolerance = 1e-7 if backend == "native" else 1e-9
    params = random_params((4_194_304, 100_003))
    anchor = [p + 0.1 * torch.randn(p.shape) for p in params]
    fisher = [torch.rand(p.shape) for p in params]
    exactly = [
        float((f.double() * (p.double() - a.double()) ** 2).sum()) / 2
        for p, a, f in zip(params, anchor, fisher, strict=True)
    ]
    q = make_inputs([params[0][:1], params[1][:1]], ewc_lambda=1.0, delta=0.0).q
    q = q._replace(anchor=torch.cat(anchor), fisher=torch.cat(fisher), offsets=[0, params[0].numel()], strides=[1, 1])
    if mode == "penalty":
        result = ops.penalty(params, q, backend=backend)
    elif mode == "penalty_grad":
        result = ops.penalty_grad(params, torch.empty_like(q.anchor), q, backend=backend)
    else:
        result = ops.penalty_accumulate_(params, [torch.zeros_like(p) for p in params], q, backend=backend)
    assert float(result.by_tensor[0].sum()) == pytest.approx(sum(exactly), rel=tolerance)
    assert float(result.predicted) == pytest.approx(sum(exactly), rel=tolerance + ex.ROUNDOFF[torch.float32])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dtypes
def test_bits_depend_on_neither_threads_nor_the_run(backend: str, dtype: torch.dtype) -> None:
    params = random_params((100_003, 5, 0, 32_769, 1, 200_001), dtype)
    inputs = make_inputs(params)
    grads = random_like(params)

    def outputs() -> list[Tensor]:
        flat = torch.zeros(inputs.q.anchor.shape, dtype=dtype)
        mine = [g.clone() for g in grads]
        results = [
            ops.penalty(params, inputs.q, backend=backend),
            ops.penalty_grad(params, flat, inputs.q, backend=backend),
            ops.penalty_accumulate_(params, mine, inputs.q, backend=backend),
        ]
        ops.scale_(flat, torch.tensor(0.3), backend=backend)
        return [flat, *mine, *(t for r in results for t in r)]

    with threads(1):
        first = outputs()
        ex.assert_same_bits(outputs(), first)
    if backend == "native":  # torch's own sums, which the reference uses, promise nothing across threads
        for count in (2, 3):
            with threads(count):
                ex.assert_same_bits(outputs(), first)
    # The three ops run the same sums.
    values = first[1 + len(params) :]
    assert all(torch.equal(values[k], values[k + 3]) and torch.equal(values[k], values[k + 6]) for k in range(3))


# ---- what autograd is told ----


def test_autograd_sees_that_a_saved_tensor_is_stale(backend: str) -> None:
    inputs = make_inputs(random_params((10, (4, 5))))
    strided = torch.randn(4, 10)[:, ::2]
    for changed, change in (
        (torch.randn(10), lambda g: ops.penalty_accumulate_(inputs.params, [g, strided], inputs.q, backend=backend)),
        (strided, lambda g: ops.penalty_accumulate_(inputs.params, [torch.randn(10), g], inputs.q, backend=backend)),
        (
            torch.zeros_like(inputs.q.anchor),
            lambda g: ops.penalty_grad(inputs.params, g, inputs.q, backend=backend),
        ),
        (torch.randn(10), lambda g: ops.scale_(g, torch.tensor(2.0), backend=backend)),
    ):
        x = torch.randn(changed.shape, requires_grad=True)
        product = (x * changed).sum()  # saves `changed`
        version = changed._version
        change(changed)
        assert changed._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_ops_record_no_graph(backend: str) -> None:
    inputs = make_inputs([p.requires_grad_() for p in random_params((10, 3))])
    results = [
        ops.penalty(inputs.params, inputs.q, backend=backend),
        ops.penalty_grad(inputs.params, torch.zeros_like(inputs.q.anchor), inputs.q, backend=backend),
        ops.penalty_accumulate_(inputs.params, random_like(inputs.params), inputs.q, backend=backend),
    ]
    assert not any(t.requires_grad for r in results for t in r)
    ex.assert_values(results[0], inputs, ex.exact(inputs))


def test_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        inputs = make_inputs(random_params((10, (4, 5))))
        ex.check_penalty(inputs, backend)
        ex.check_penalty_grad(inputs, backend)
        ex.check_accumulate(inputs, random_like(inputs.params), backend)


# ---- scale_ ----


@dtypes
def test_scale(backend: str, dtype: torch.dtype) -> None:
    for size, factor, shape in itertools.product((0, 1, 65, 32_769), (0.0, -0.3, 1.0, 7.0, math.inf), ((), (1,))):
        whole = torch.randn(size + 2).to(dtype)
        buffer = whole[1:-1]
        before = buffer.clone()
        with canaries(whole, buffer) if size else threads(1):
            ops.scale_(buffer, torch.full(shape, factor), backend=backend)
        expected = (before.double() * torch.tensor(factor).double()).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        torch.testing.assert_close(buffer, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
def test_scale_by_1_writes_nothing() -> None:
    buffer = torch.zeros(4, dtype=torch.float32)
    ex.bits(buffer)[1] = 0x7FA00000  # a signalling NaN, which any arithmetic would quieten
    before = buffer.clone()
    ops.scale_(buffer, torch.tensor(1.0), backend="native")
    ex.assert_same_bits([buffer], [before])
