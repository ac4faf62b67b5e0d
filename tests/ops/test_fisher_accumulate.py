"""fisher_accumulate_ against the formula, on both backends."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast.ops.fisher import fisher_accumulate_
from tests.ops import exact as ex
from tests.ops.exact import Loud

FISHER_DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = (None, 0, 1, 2, 3, 4, 5, 9)  # None: no dimension for samples
EDGES = (0, 1, 3, 63, 64, 65, 2047, 2048, 2049, 32767, 32768, 32769)

fisher_dtypes = pytest.mark.parametrize("dtype", FISHER_DTYPES, ids=str)
grad_dtypes = pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)


def shape(size: int | tuple[int, ...], rows: int | None = None) -> tuple[int, ...]:
    return (*(() if rows is None else (rows,)), *(size if isinstance(size, tuple) else (size,)))


def check(fisher: Sequence[Tensor], grads: Sequence[Tensor], backend: str, weight: float = 0.37) -> None:
    """The op, against the formula: ``ex.assert_squares_added`` says how close."""
    before, given = [f.clone() for f in fisher], [g.clone() for g in grads]
    fisher_accumulate_(fisher, grads, weight, backend=backend)
    for f, old, g in zip(fisher, before, grads, strict=True):
        ex.assert_squares_added(f, old, g, weight)
    ex.assert_same_bits(grads, given)


@contextmanager
def threads(n: int) -> Iterator[None]:
    old = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(old)


# ---- values ----


@fisher_dtypes
@grad_dtypes
def test_dtypes_and_rows(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for size, rows in itertools.product((0, 1, 17, 2049, (33, 7)), ROWS):
        fisher = torch.rand(shape(size)).to(dtype)
        check([fisher], [torch.randn(shape(size, rows)).to(grad_dtype)], backend)
    sizes: list[Any] = [(), (5, 0), 2050, (3, 4, 5)]
    lists = [(torch.rand(shape(s)).to(dtype), torch.randn(shape(s, r)).to(grad_dtype)) for s in sizes for r in ROWS]
    check([f for f, _ in lists], [g for _, g in lists], backend, -2.0)


@fisher_dtypes
@pytest.mark.parametrize("rows", [None, 1, 3, 16, 40])
def test_sizes_around_every_boundary(backend: str, dtype: torch.dtype, rows: int | None) -> None:
    edges = EDGES if rows is None else (*(e for e in EDGES if e < 32767), 8191, 8193, 10239, 10241)
    check([torch.rand(n).to(dtype) for n in edges], [torch.randn(shape(n, rows)).to(dtype) for n in edges], backend)
    for n in edges:  # and each alone
        check([torch.rand(n).to(dtype)], [torch.randn(shape(n, rows)).to(dtype)], backend)


@pytest.mark.parametrize("n", [299, 799, 801])
def test_many_tensors(backend: str, n: int) -> None:
    """Empty ones at both ends among them."""
    sizes = [0, *(random.choice((0, 1, 7, 64, 300)) for _ in range(n - 3)), 33000, 0]
    rows = [random.choice(ROWS) for _ in sizes]
    fisher = [torch.rand(size) for size in sizes]
    check(fisher, [torch.randn(shape(s, r)) for s, r in zip(sizes, rows, strict=True)], backend)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0), (0, 7, 0)], ids=str)
def test_empty_lists_and_empty_tensors(backend: str, sizes: tuple[int, ...]) -> None:
    check([torch.rand(n) for n in sizes], [torch.randn(2, n) for n in sizes], backend)


@grad_dtypes
def test_small_integers_are_exact(backend: str, grad_dtype: torch.dtype) -> None:
    """Whatever the order of the sums: one element dropped, doubled or misplaced shows."""
    fisher = [torch.randint(9, (300, 11)).float(), torch.randint(9, (2051,)).float()]
    grads = [torch.randint(-5, 6, (7, *f.shape)).to(grad_dtype) for f in fisher]
    wanted = [f + 0.5 * g.float().square().sum(0) for f, g in zip(fisher, grads, strict=True)]
    fisher_accumulate_(fisher, grads, 0.5, backend=backend)
    ex.assert_same_bits(fisher, wanted)


def test_large_and_small_gradients_of_16_bits(backend: str) -> None:
    """They are squared in the Fisher's precision: in their own, fp16 would overflow from 256 on and lose 1e-4."""
    grads = torch.tensor([65504.0, 6e-8, 1e-4, -300.0, 0.0], dtype=torch.float16)
    fisher = torch.zeros(5)
    fisher_accumulate_([fisher], [grads], backend=backend)
    torch.testing.assert_close(fisher, grads.double().square().float(), rtol=2**-23, atol=0)
    assert bool(fisher[:4].all()) and bool(fisher.isfinite().all())


def test_every_value_of_16_bits(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        grads = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        fisher = torch.zeros(2**16)
        fisher_accumulate_([fisher], [grads], backend=backend)
        torch.testing.assert_close(fisher, grads.float().square(), rtol=0, atol=0, equal_nan=True)


def test_many_small_additions_do_not_stop(backend: str) -> None:
    """4,096 squares of 1, one call each: a bf16 sum would stop at 256."""
    fisher, ones = torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)
    for _ in range(4096):
        fisher_accumulate_([fisher], [ones], backend=backend)
    assert fisher.tolist() == [4096.0] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_goes_through(backend: str, value: float) -> None:
    for size, rows in ((100, None), (2049, 5)):
        for place in (0, size // 2, size - 1):
            fisher, grads = torch.rand(size), torch.randn(shape(size, rows))
            grads[..., place].fill_(value) if rows is None else grads[rows - 1, place].fill_(value)
            fisher_accumulate_([fisher], [grads], backend=backend)
            assert fisher.isfinite().logical_not().nonzero().flatten().tolist() == [place]
            assert bool(fisher[place].isnan()) == (value != value)


def test_weight(backend: str) -> None:
    for weight in (0.0, 1.0, -0.25, 1e-30, 3):
        check([torch.rand(70)], [torch.randn(3, 70)], backend, weight)
    fisher, grads = torch.rand(9), torch.randn(9)
    wanted = fisher + grads.square()
    fisher_accumulate_([fisher], [grads], backend=backend)  # 1 unless given
    torch.testing.assert_close(fisher, wanted)


@pytest.mark.native
def test_native_and_reference_agree() -> None:
    for grad_dtype in GRAD_DTYPES:
        fisher = [torch.rand(200, 30), torch.rand(4097), torch.rand(())]
        grads = [torch.randn(6, *f.shape).to(grad_dtype) for f in fisher]
        other = [f.clone() for f in fisher]
        fisher_accumulate_(fisher, grads, 0.1, backend="native")
        fisher_accumulate_(other, grads, 0.1, backend="reference")
        torch.testing.assert_close(fisher, other, rtol=1e-6, atol=0)


@grad_dtypes
def test_the_number_of_threads_does_not_matter(backend: str, grad_dtype: torch.dtype) -> None:
    fisher = [torch.rand(n) for n in (5, 70_000, 40_001)]
    grads = [torch.randn(3, 5), torch.randn(70_000), torch.randn(21, 40_001)]
    results = []
    for n in (1, 2, 3):
        mine = [f.clone() for f in fisher]
        with threads(n):
            fisher_accumulate_(mine, [g.to(grad_dtype) for g in grads], 0.3, backend=backend)
        results.append(mine)
    ex.assert_same_bits(results[0], results[1])
    ex.assert_same_bits(results[0], results[2])


# ---- layouts ----

FISHERS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.rand(6, 4, 5),
    "transposed": lambda: torch.rand(40, 70).t(),
    "permuted": lambda: torch.rand(4, 5, 6).permute(2, 0, 1),
    "channels_last": lambda: torch.rand(8, 3, 5, 4).contiguous(memory_format=torch.channels_last),
    "rows": lambda: torch.rand(50, 6)[7:31],
    "every other row": lambda: torch.rand(50, 60)[::2],
    "columns": lambda: torch.rand(50, 60)[:, 5:40],
    "column": lambda: torch.rand(50, 3)[:, 1],
    "strided slice": lambda: torch.rand(30, 40)[::2, 1::3],
    "misaligned": lambda: torch.rand(5001)[1:],
    "misaligned transposed": lambda: torch.rand(1 + 33 * 65)[1:].view(33, 65).t(),
    "dimensions of 1": lambda: torch.rand(7, 1, 1).as_strided((7, 1, 1), (1, 100, 1000)),
    "expanded dimension of 1": lambda: torch.rand(7, 1).expand(7, 1),
    "empty slice": lambda: torch.rand(4, 6)[2:2, ::2],
    "scalar of more": lambda: torch.rand(9)[4],
}


def like(fisher: Tensor, rows: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of a Fisher in all sorts of layouts; rows is at least 2."""
    row_major = torch.randn(shape(tuple(fisher.shape), rows)).to(dtype)
    found = {"row-major": row_major, "negative": torch._neg_view(row_major)}
    if fisher.dim() > 0:
        found["reversed"] = (
            row_major.permute(*reversed(range(row_major.dim()))).contiguous().permute(*reversed(range(row_major.dim())))
        )
        found["strided"] = torch.randn(*row_major.shape[:-1], 2 * row_major.shape[-1]).to(dtype)[..., ::2]
        found["expanded"] = torch.randn(row_major.shape[-1:]).to(dtype).expand(row_major.shape)
    if rows is not None:
        in_order = torch.stack([torch.empty_like(fisher, dtype=dtype).copy_(g) for g in row_major])
        found["in the Fisher's order"] = torch.empty_strided(
            row_major.shape, (fisher.numel() + 3, *torch.empty_like(fisher).stride()), dtype=dtype
        ).copy_(in_order)
        found["one row for all"] = row_major[1].expand(row_major.shape)
        found["every other sample"] = torch.randn(2 * rows, *fisher.shape).to(dtype)[::2]
        found["samples last"] = row_major.movedim(0, -1).contiguous().movedim(-1, 0)
        found["misaligned"] = torch.randn(row_major.numel() + 1).to(dtype)[1:].view(row_major.shape)
    return found


@pytest.mark.parametrize("layout", FISHERS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, layout: str, grad_dtype: torch.dtype) -> None:
    for rows in (None, 2, 5):
        for grads in like(FISHERS[layout](), rows, grad_dtype).values():
            fisher = FISHERS[layout]()
            check(
                [torch.rand(3, 3), fisher, torch.rand(5)],
                [torch.randn(2, 3, 3).to(grad_dtype), grads, torch.randn(5).to(grad_dtype)],
                backend,
            )


@fisher_dtypes
def test_nothing_beside_the_fisher_is_written(backend: str, dtype: torch.dtype) -> None:
    """Views into one allocation: dense, misaligned, transposed and with gaps."""
    whole = torch.rand(80_000).to(dtype)
    fisher = [
        whole[1:1025],
        whole[1030 : 1030 + 15 * 7].view(15, 7).t(),
        whole[2000:4000].view(40, 50)[::3, 1::2],
        whole[4001 : 4001 + 40_001],
        whole[50_001],
        whole[50_003:50_003],
        whole[60_000:64_000].view(40, 100)[:, ::2],
        whole[60_000:64_000].view(40, 100)[:, 1::2],
    ]
    outside = torch.ones(whole.shape, dtype=torch.bool)
    for f in fisher:
        outside[f.storage_offset() + ex.indices(f.shape, f.stride()).flatten()] = False
    before = whole[outside].clone()
    check(fisher, [torch.randn(3, *f.shape) for f in fisher], backend)
    ex.assert_same_bits([whole[outside]], [before])
    assert bool(outside.any())


@pytest.mark.native
def test_in_the_fishers_order_nothing_is_allocated() -> None:
    fisher = [torch.rand(300, 200), torch.rand(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)]
    blocks = [torch.randn(4, 300, 200), torch.randn(4, 8, 5, 5, 3).permute(0, 1, 4, 2, 3)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fisher_accumulate_(fisher, blocks, backend="native")
    assert [event.key for event in recorded.key_averages()] == ["ewc_fast::fisher_accumulate_"]
    assert all(event.cpu_memory_usage == 0 for event in recorded.key_averages())


# ---- what is refused ----


def pair() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.rand(5, 4), torch.rand(7)], [torch.randn(3, 5, 4), torch.randn(7)]


def spoil(which: str, change: Callable[[Tensor], Tensor], i: int = 1) -> Callable[[list[Tensor], list[Tensor]], None]:
    def apply(fisher: list[Tensor], grads: list[Tensor]) -> None:
        tensors = fisher if which == "fisher" else grads
        tensors[i] = change(tensors[i])

    return apply


def add_parts(fisher: list[Tensor], grads: list[Tensor], *parts: slice) -> None:
    whole = torch.rand(9)
    fisher += [whole[part] for part in parts]
    grads += [torch.randn(9)[part] for part in parts]


BAD: dict[str, tuple[Callable[[list[Tensor], list[Tensor]], Any], type[Exception], str]] = {
    "bf16 Fisher": (spoil("fisher", Tensor.bfloat16), ValueError, r"fisher\[1\] is bfloat16.*stop growing.*float32"),
    "fp16 Fisher": (spoil("fisher", Tensor.half, 0), ValueError, r"fisher\[0\] is float16.*stop growing.*float32"),
    "integer Fisher": (spoil("fisher", Tensor.int, 0), TypeError, r"fisher\[0\] has dtype.*expected float64"),
    "complex gradients": (
        spoil("grads", lambda g: g.to(torch.complex64), 0),
        TypeError,
        r"grads\[0\] has dtype.*expected float64",
    ),
    "mixed Fishers": (spoil("fisher", Tensor.double), TypeError, r"fisher\[1\] has dtype.*fisher\[0\].*one dtype"),
    "mixed gradients": (spoil("grads", Tensor.half), TypeError, r"grads\[1\] has dtype.*grads\[0\].*one dtype"),
    "few gradients": (lambda f, g: g.pop(), ValueError, "grads has 1 tensors for 2 of fisher"),
    "few Fishers": (lambda f, g: f.pop(), ValueError, "grads has 2 tensors for 1 of fisher"),
    "no Fisher": (lambda f, g: f.clear(), ValueError, "grads has 2 tensors for 0 of fisher"),
    "another shape": (spoil("grads", lambda g: g[1:]), ValueError, r"grads\[1\] has shape \[6\], fisher\[1\] \[7\]"),
    "transposed samples": (
        spoil("grads", lambda g: g.transpose(1, 2), 0),
        ValueError,
        r"grads\[0\] has shape \[3, 4, 5\], .*one leading dim",
    ),
    "samples last": (spoil("grads", lambda g: g.movedim(0, -1), 0), ValueError, r"grads\[0\] has shape \[5, 4, 3\]"),
    "two dimensions more": (spoil("grads", lambda g: g[None, None]), ValueError, r"grads\[1\] has shape \[1, 1, 7\]"),
    "a dimension less": (spoil("grads", lambda g: g[0, 0], 0), ValueError, r"grads\[0\] has shape \[4\]"),
    "a Fisher that would be broadcast": (spoil("fisher", lambda f: f[:1]), ValueError, r"grads\[1\] has shape \[7\]"),
    "expanded Fisher": (
        spoil("fisher", lambda f: torch.rand(1).expand(7)),
        ValueError,
        r"fisher\[1\] has strides \[0\].*clone",
    ),
    "windows of a Fisher": (
        spoil("fisher", lambda f: torch.rand(8).unfold(0, 4, 1), 0),
        ValueError,
        r"fisher\[0\] has strides \[1, 1\].*clone",
    ),
    "one Fisher twice": (
        lambda f, g: (f.append(f[1]), g.append(g[1])),
        ValueError,
        r"fisher\[1\] and fisher\[2\] share their memory.*once",
    ),
    "two that reach into each other": (
        lambda f, g: add_parts(f, g, slice(0, 6), slice(3, 9)),
        ValueError,
        r"fisher\[2\] and fisher\[3\] share their memory.*once",
    ),
    "one in another": (
        lambda f, g: add_parts(f, g, slice(0, 9), slice(2, 4)),
        ValueError,
        r"fisher\[2\] and fisher\[3\] share their memory.*once",
    ),
    "gradients elsewhere": (spoil("grads", lambda g: g.to("meta")), (ValueError, RuntimeError), "meta"),
    "a Fisher elsewhere": (spoil("fisher", lambda f: f.to("meta")), (ValueError, RuntimeError), "meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(backend: str, bad: str) -> None:
    change, error, message = BAD[bad]
    fisher, grads = pair()
    fisher_accumulate_(fisher, grads, backend=backend)  # right before it is spoilt
    if bad == "windows of a Fisher":
        fisher[0], grads[0] = torch.rand(5, 4), torch.randn(5, 4)
    written = list(fisher)
    change(fisher, grads)
    written += [f for f in fisher if f.is_floating_point() and not f.is_meta]
    before, versions = [f.clone() for f in written], [f._version for f in written]
    with pytest.raises(error, match=f"(?s){message}"):
        fisher_accumulate_(fisher, grads, backend=backend)
    ex.assert_same_bits(written, before)
    assert [f._version for f in written] == versions


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(backend: str, weight: float) -> None:
    fisher, grads = pair()
    before = [f.clone() for f in fisher]
    with pytest.raises(ValueError, match="weight must be finite, got -?(nan|inf)"):
        fisher_accumulate_(fisher, grads, weight, backend=backend)
    ex.assert_same_bits(fisher, before)


@pytest.mark.parametrize("which", ["fisher", "grads"])
def test_sparse_tensors_are_refused(backend: str, which: str) -> None:
    fisher, grads = pair()
    spoil(which, Tensor.to_sparse)(fisher, grads)
    before = fisher[0].clone()
    with pytest.raises((TypeError, NotImplementedError), match="(?i)sparse"):  # the latter by the dispatcher
        fisher_accumulate_(fisher, grads, backend=backend)
    ex.assert_same_bits([fisher[0]], [before])


# ---- autograd and the ways to the op ----


@pytest.mark.parametrize("layout", ["contiguous", "columns"])
def test_autograd_sees_that_a_saved_fisher_is_stale(backend: str, layout: str) -> None:
    fisher = FISHERS[layout]()
    x = torch.rand(fisher.shape, requires_grad=True)
    y = (x * fisher).sum()
    fisher_accumulate_([fisher], [torch.randn(2, *fisher.shape)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_no_graph_is_built(backend: str) -> None:
    fisher, grads = torch.rand(9, requires_grad=True), torch.randn(2, 9, requires_grad=True) * 1
    for layout in (fisher, torch.rand(9, 2, requires_grad=True)[:, 0].detach()):
        before = layout.detach().clone()
        fisher_accumulate_([layout], [grads], backend=backend)
        ex.assert_squares_added(layout.detach(), before, grads.detach(), 1.0)
    assert fisher.grad_fn is None and fisher.is_leaf


def test_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        check([torch.rand(5), torch.rand(6, 4)[:, 1]], [torch.randn(2, 5), torch.randn(6)], backend)


def test_the_backend_that_is_asked_for_runs(backend: str) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        fisher_accumulate_(*pair(), backend=backend)
    ran = {event.key for event in recorded.key_averages() if event.key.startswith("ewc_fast::")}
    assert ran == ({"ewc_fast::fisher_accumulate_"} if backend == "native" else set())


@pytest.mark.native
def test_what_only_torch_ops_can_serve_goes_there() -> None:
    fisher, grads = pair()
    check(tuple(fisher), tuple(grads), "native")
    Loud.asked.clear()
    fisher_accumulate_(fisher, [g.as_subclass(Loud) for g in grads], backend="native")
    assert any("fisher_accumulate_" in name for name in Loud.asked)

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Loud.asked.append(str(func))
            return func(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Loud.asked.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Record, Dispatched):
        Loud.asked.clear()
        with mode():
            fisher_accumulate_(fisher, grads, backend="native")
        assert any("fisher_accumulate_" in name for name in Loud.asked)
    with FakeTensorMode() as fake:
        fisher_accumulate_([fake.from_tensor(f) for f in fisher], [fake.from_tensor(g) for g in grads])


@pytest.mark.native
def test_the_direct_call_refuses_what_it_cannot_read() -> None:
    direct = importlib.import_module("ewc_fast._C").fisher_accumulate_
    fisher, grads = pair()
    before = [f.clone() for f in fisher]
    with pytest.raises(TypeError, match="3 arguments"):
        direct(fisher, grads)
    for bad in (
        (tuple(fisher), grads, 1.0),
        (fisher, [1, 2], 1.0),
        (fisher, None, 1.0),
        (fisher, grads, "1"),
        (fisher, grads, True),
        (fisher, grads, torch.tensor(1.0)),
    ):
        assert direct(*bad) is None
    with pytest.raises(OverflowError):
        direct(fisher, grads, 10**400)
    with pytest.raises(ValueError, match="grads has 1 tensors for 2"):
        direct(fisher, grads[:1], 1.0)
    ex.assert_same_bits(fisher, before)
    leaves = [f.clone().requires_grad_() for f in fisher]
    assert direct(leaves, grads, 2) is True
    for leaf, old, g in zip(leaves, before, grads, strict=True):
        ex.assert_squares_added(leaf.detach(), old, g, 2.0)


@pytest.mark.native
@fisher_dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.ewc_fast.fisher_accumulate_.default
    fisher = [torch.rand(33, 5).to(dtype), torch.rand(0).to(dtype), torch.rand(4, 6).t().to(dtype)]
    fisher.append(torch.rand(()).to(dtype))
    opcheck(op, (fisher, [torch.randn_like(f) for f in fisher]))
    opcheck(op, (fisher, [torch.randn(3, *f.shape).bfloat16() for f in fisher], 0.5))


@pytest.mark.native
def test_compiled() -> None:
    torch._dynamo.reset()
    fisher, grads = pair()

    def step(fisher: list[Tensor], grads: list[Tensor]) -> Tensor:
        fisher_accumulate_(fisher, [2 * g for g in grads], 0.5)
        return fisher[1].sum()

    mine = [f.clone() for f in fisher]
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(mine, grads), step(fisher, grads))
    ex.assert_same_bits(mine, fisher)
    torch._dynamo.reset()
