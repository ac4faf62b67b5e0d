"""The native kernels on every device there is: the same checks on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ewc_fast import EWCLoss, ewc_penalty
from ewc_fast.ops import penalty as ops
from ewc_fast.ops import steps as step_ops
from ewc_fast.ops.fisher import fisher_accumulate_
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult, StepQuadratic

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = (0, 1, 3, 255, 2049, 32767, 32769, 100_003)
TENSORS_PER_LAUNCH, FISHERS_PER_LAUNCH, STEPS_PER_LAUNCH = 800, 600, 450  # with kernel parameters of 32 KB
EPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


pytestmark = pytest.mark.native


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make(device: torch.device, dtype: torch.dtype, state: torch.dtype) -> tuple[list[Tensor], FlatQuadratic]:
    """Parameters of all sizes, one of them misaligned, and a quadratic with everything in it."""
    params = [torch.randn(n).to(device, dtype) for n in SIZES]
    params[5] = torch.randn(SIZES[5] + 1).to(device, dtype)[1:]
    offsets, total = [], 0
    for p in params:
        offsets.append(total)
        total += -(-p.numel() // 64) * 64
    return params, FlatQuadratic(
        torch.randn(total).to(device, state),
        torch.rand(total).to(device, state),
        offsets,
        [1] * len(params),
        torch.tensor(3.0, dtype=torch.float64, device=device),
        torch.tensor(0.25, dtype=torch.float64, device=device),
        torch.rand(len(params)).to(device),
        torch.rand(len(params), dtype=torch.float64).to(device),
    )


def exact(params: list[Tensor], q: FlatQuadratic) -> tuple[float, float, list[Tensor]]:
    """Penalty, prediction and gradients by the formula, in fp64 on the CPU."""
    penalty = predicted = 0.0
    gradients = []
    assert q.scale is not None and q.constant is not None
    for i, p in enumerate(params):
        span = slice(q.offsets[i], q.offsets[i] + p.numel())
        a, f = q.anchor[span].double().cpu(), q.fisher[span].double().cpu()
        d = p.double().cpu() - a
        c, scale = float(q.constant[i]), float(q.scale[i])
        penalty += 3.0 / 2 * scale * (float((f * d * d).sum()) + c + 0.25 * float((d * d).sum()))
        predicted += (float((f * d * d).sum()) + c) / 2
        gradients.append(3.0 * scale * (f + 0.25) * d)
    return penalty, predicted, gradients


@pytest.mark.parametrize(
    ("dtype", "state", "grad"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_values_and_gradients(device: torch.device, dtype: torch.dtype, state: torch.dtype, grad: torch.dtype) -> None:
    params, q = make(device, dtype, state)
    penalty, predicted, gradients = exact(params, q)
    grads = [torch.randn(p.shape).to(device, grad) for p in params]
    wanted = [g.double().cpu() + want for g, want in zip(grads, gradients, strict=True)]
    flat = torch.full_like(q.anchor, 7.0, dtype=dtype)
    results = [
        ops.penalty(params, q, backend="native"),
        ops.penalty_grad(params, flat, q, backend="native"),
        ops.penalty_accumulate_(params, grads, q, backend="native"),
    ]
    # Sums: fp32 rounding of each term, of random sign, and one of the result.
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    # A GPU adds up in another order where a gradient of another dtype takes the kernel for any dtypes.
    one_order = device.type == "cpu" or dtype in (grad, torch.float64)
    for result in results:
        assert result.penalty.item() == pytest.approx(penalty, rel=rtol)
        assert result.predicted.item() == pytest.approx(predicted, rel=rtol)
        torch.testing.assert_close(result.by_tensor, results[0].by_tensor, rtol=0 if one_order else rtol, atol=0)
    math = max(EPS[grad], EPS[dtype] if dtype == torch.float64 else EPS[torch.float32])
    for g, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g.double().cpu(), want, rtol=8 * math, atol=64 * math)
    for i, want in enumerate(gradients):
        written = flat[q.offsets[i] : q.offsets[i] + want.numel()].double().cpu()
        rounding = max(EPS[dtype], EPS[torch.float32] if dtype != torch.float64 else 0)
        torch.testing.assert_close(written, want, rtol=8 * rounding, atol=64 * rounding)
    assert bool((flat[q.offsets[1] + 1 : q.offsets[2]] == 7.0).all())  # gaps are left alone


def test_lambda_0_and_overflow_write_nothing(device: torch.device) -> None:
    params, q = make(device, torch.float32, torch.float32)
    grads = [torch.full_like(p, float("nan")) for p in params]
    nothing = q._replace(ewc_lambda=torch.zeros_like(q.ewc_lambda))
    assert ops.penalty_accumulate_(params, grads, nothing, backend="native").penalty.item() == 0.0
    found_inf = torch.ones((), device=device)
    overflow = ops.penalty_accumulate_(params, grads, q, found_inf=found_inf, backend="native")
    assert overflow.penalty.item() == pytest.approx(exact(params, q)[0], rel=1e-6)
    assert all(bool(g.isnan().all()) for g in grads)


def test_the_whole_loss_follows_its_model(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    ewc = EWCLoss(model, 2.0, damping=0.5, backend="native")
    ewc.consolidate(fisher={n: torch.rand_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    value = ewc().item()
    model.to(device)
    loss = ewc()
    loss.backward()
    assert loss.device.type == device.type and loss.item() == pytest.approx(value, rel=1e-6)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ewc.accumulate_grad_()
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.gpu
def test_a_cuda_graph_sees_lambda_change() -> None:
    device = torch.device("cuda")
    params, q = make(device, torch.float32, torch.float32)
    grads = [torch.zeros_like(p) for p in params]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.penalty_accumulate_(params, grads, q, backend="native")  # warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.penalty_accumulate_(params, grads, q, backend="native")
    once, _, gradients = exact(params, q)
    for factor in (1.0, 2.0, 0.0):
        q.ewc_lambda.fill_(3.0 * factor)
        for g in grads:
            g.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert result.penalty.item() == pytest.approx(factor * once, rel=1e-6)
        for g, want in zip(grads, gradients, strict=True):
            torch.testing.assert_close(g.double().cpu(), factor * want, rtol=1e-5, atol=1e-5)


def squares(grads: Tensor, fisher: Tensor) -> Tensor:
    """What gradients add to a Fisher, in fp64 on the CPU."""
    found = grads.double().cpu().square()
    return found.sum(dim=0) if grads.dim() > fisher.dim() else found


@pytest.mark.parametrize(
    ("dtype", "grad"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_fisher_of_blocks(device: torch.device, dtype: torch.dtype, grad: torch.dtype) -> None:
    """Sizes of all sorts, rows that start at 16 bytes and that do not, one misaligned, one strided, one transposed."""
    fisher, grads = [], []
    for rows in (None, 0, 1, 2, 5):
        for size in (*SIZES, 1024, 40_000):
            fisher.append(torch.rand(size).to(device, dtype))
            grads.append(torch.randn(*(() if rows is None else (rows,)), size).to(device, grad))
    fisher += [torch.rand(2050).to(device, dtype)[1:], torch.rand(70, 50).to(device, dtype)[:, ::2]]
    grads += [torch.randn(3, 2049).to(device, grad), torch.randn(70, 25).to(device, grad)]
    fisher += [torch.rand(64, 128).to(device, dtype).t(), torch.rand(()).to(device, dtype)]
    grads += [torch.randn(4, 64, 128).to(device, grad).transpose(1, 2), torch.randn(7).to(device, grad)]
    wanted = [f.double().cpu() + 0.3 * squares(g, f) for f, g in zip(fisher, grads, strict=True)]
    fisher_accumulate_(fisher, grads, 0.3, backend="native")
    for f, want in zip(fisher, wanted, strict=True):
        torch.testing.assert_close(f.double().cpu(), want, rtol=8 * EPS[dtype], atol=0)


@pytest.mark.parametrize("shape", [(8, 256, 1024), (33, 64, 64), (1, 3000, 1000)], ids=str)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
def test_fisher_of_one_block(device: torch.device, shape: tuple[int, ...], grad: torch.dtype) -> None:
    fisher, grads = torch.rand(shape[1:], device=device), torch.randn(shape, device=device, dtype=grad)
    want = fisher.double().cpu() + squares(grads, fisher)
    again = fisher.clone()
    fisher_accumulate_([fisher], [grads], backend="native")
    fisher_accumulate_([again], [grads], backend="native")
    torch.testing.assert_close(fisher.double().cpu(), want, rtol=(4 + shape[0]) * EPS[torch.float32], atol=0)
    assert torch.equal(fisher, again)


# ---- many tensors, large tensors ----


def small_problem(device: torch.device, n: int) -> tuple[list[Tensor], FlatQuadratic]:
    """n fp32 parameters of 0 to 12 elements."""
    params = [torch.randn(int(size), device=device) for size in torch.randint(13, (n,))]
    total = 16 * n
    return params, FlatQuadratic(
        torch.randn(total, device=device),
        torch.rand(total, device=device),
        [16 * i for i in range(n)],
        [1] * n,
        torch.tensor(3.0, device=device),
        torch.tensor(0.25, device=device),
        torch.rand(n, device=device),
        torch.rand(n, dtype=torch.float64, device=device),
    )


@pytest.mark.parametrize("n", [TENSORS_PER_LAUNCH, TENSORS_PER_LAUNCH + 1, 2 * TENSORS_PER_LAUNCH + 1])
def test_many_tensors(device: torch.device, n: int) -> None:
    params, q = small_problem(device, n)
    grads = [torch.zeros_like(p) for p in params]
    result = ops.penalty_accumulate_(params, grads, q, backend="native")
    penalty, predicted, gradients = exact(params, q)
    assert result.penalty.item() == pytest.approx(penalty, rel=1e-6)
    assert result.predicted.item() == pytest.approx(predicted, rel=1e-6)
    torch.testing.assert_close(torch.cat(grads).double().cpu(), torch.cat(gradients), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "numel"), [("cpu", 10_007), pytest.param("cuda", 2**31 + 77, marks=pytest.mark.gpu)]
)
def test_indices_have_64_bits(device: str, numel: int) -> None:
    """A tensor of more than 2^31 elements: few of them have moved, and the gradient is there and nowhere else."""
    first = 64
    needed = 2 * (5 * numel + 4 * first)  # bytes: parameter, gradient, anchor, Fisher, and one comparison
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 1.05 * needed:  # this GPU is missing the memory
        pytest.skip(f"takes {needed / 2**30:.0f} GiB of memory, {torch.cuda.mem_get_info()[0] / 2**30:.0f} are free")
    params = [torch.zeros(n, dtype=torch.bfloat16, device=device) for n in (first, numel)]
    grads = [torch.zeros_like(p) for p in params]
    places = sorted({0, 1, numel // 3, numel // 2 - 1, numel // 2, numel - 78, numel - 2, numel - 1})
    for place in places:
        params[1][place] = 2.0
    zero = torch.zeros((), device=device)
    q = FlatQuadratic(
        torch.zeros(first + numel, dtype=torch.bfloat16, device=device),
        torch.ones(first + numel, dtype=torch.bfloat16, device=device),
        [0, first],
        [1, 1],
        torch.full_like(zero, 3.0),
        zero,
    )
    result = ops.penalty_accumulate_(params, grads, q, backend="native")
    assert result.penalty.item() == 3.0 / 2 * len(places) * 4.0
    assert [grads[1][place].item() for place in places] == [6.0] * len(places)
    assert int((grads[1] != 0).sum()) == len(places) and not grads[0].any()


@pytest.mark.parametrize("n", [FISHERS_PER_LAUNCH, FISHERS_PER_LAUNCH + 1, 2 * FISHERS_PER_LAUNCH + 1])
def test_many_fishers(device: torch.device, n: int) -> None:
    """Empty ones take no place in a launch."""
    sizes = [0, *torch.randint(1, 13, (n,)).tolist(), 0]
    fisher = [torch.rand(size, device=device) for size in sizes]
    grads = [torch.randn(1 + i % 3, size, device=device) for i, size in enumerate(sizes)]
    wanted = [f.double().cpu() + squares(g, f) for f, g in zip(fisher, grads, strict=True)]
    fisher_accumulate_(fisher, grads, backend="native")
    torch.testing.assert_close(torch.cat(fisher).double().cpu(), torch.cat(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("device", "rows", "numel"),
    [
        ("cpu", 3, 10_007),
        pytest.param("cuda", 1, 2**31 + 77, marks=pytest.mark.gpu),
        pytest.param("cuda", 5, 2**29 + 3, marks=pytest.mark.gpu),  # the last rows start beyond 2^31 elements
    ],
)
def test_indices_of_fishers_have_64_bits(device: str, rows: int, numel: int) -> None:
    needed = 4 * numel + 2 * rows * numel + numel  # bytes: Fisher, gradients, and one comparison
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 1.05 * needed:  # this GPU is missing the memory
        pytest.skip(f"takes {needed / 2**30:.0f} GiB of memory, {torch.cuda.mem_get_info()[0] / 2**30:.0f} are free")
    fisher = torch.zeros(numel, device=device)
    grads = torch.zeros(rows, numel, dtype=torch.bfloat16, device=device)
    places = sorted({0, 1, numel // 3, numel // 2, numel - 78, numel - 2, numel - 1})
    for place in places:
        grads[rows - 1, place] = 3.0
    fisher_accumulate_([fisher], [grads], 0.5, backend="native")
    assert [fisher[place].item() for place in places] == [4.5] * len(places)
    assert int((fisher != 0).sum()) == len(places)


# ---- what runs on the device, and beside what ----


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's warnings that a tool is a prototype or forgets events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where the host waits for the device."""
    with quietly():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with quietly():
            torch.cuda.set_sync_debug_mode("default")


def device_work(function: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and memsets that a call runs on the GPU, once it has been called before."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    with quietly():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            function()
            torch.cuda.synchronize()
        events = recorded.events()
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def gpu_model() -> tuple[nn.Module, EWCLoss]:
    """A model that has moved from its anchor, and its penalty."""
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 700), nn.LayerNorm(700)).cuda()
    ewc = EWCLoss(model, 2.0, damping=0.5, backend="native")
    ewc.consolidate(fisher={n: torch.rand_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    return model, ewc


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "launches"), [(1, 1), (TENSORS_PER_LAUNCH, 1), (TENSORS_PER_LAUNCH + 1, 2), (2 * TENSORS_PER_LAUNCH + 1, 3)]
)
@pytest.mark.parametrize("op", ["penalty", "penalty_grad", "penalty_accumulate_"])
def test_launches_are_all_that_runs(op: str, n: int, launches: int) -> None:
    params, q = small_problem(torch.device("cuda"), n)
    grads, flat = [torch.zeros_like(p) for p in params], torch.zeros_like(q.anchor)
    work = device_work(
        {
            "penalty": lambda: ops.penalty(params, q, backend="native"),
            "penalty_grad": lambda: ops.penalty_grad(params, flat, q, backend="native"),
            "penalty_accumulate_": lambda: ops.penalty_accumulate_(params, grads, q, backend="native"),
        }[op]
    )
    assert len(work) == launches and all("penalty_kernel" in name for name in work), work


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (FISHERS_PER_LAUNCH, 1), (FISHERS_PER_LAUNCH + 1, 2)])
def test_launches_are_all_that_runs_for_a_fisher(n: int, launches: int) -> None:
    fisher = [torch.rand(40, 8, device="cuda") for _ in range(n)]
    grads = [torch.randn(3, 40, 8, device="cuda") for _ in range(n)]
    work = device_work(lambda: fisher_accumulate_(fisher, grads, 0.5, backend="native"))
    assert len(work) == launches and all("fisher_kernel" in name for name in work), work
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with no_synchronisation():
        fisher_accumulate_(fisher, grads, 0.5, backend="native")
    assert torch.cuda.max_memory_allocated() == allocated


@pytest.mark.gpu
def test_a_fisher_in_a_cuda_graph() -> None:
    fisher, grads = torch.zeros(300, 70, device="cuda"), torch.randn(4, 300, 70, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fisher_accumulate_([fisher], [grads], backend="native")  # warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fisher_accumulate_([fisher], [grads], 2.0, backend="native")
    fisher.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(fisher.double().cpu(), 6 * squares(grads, fisher), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_a_step_has_one_launch_and_never_waits() -> None:
    model, ewc = gpu_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def by_loss() -> None:
        ewc().backward()

    work = device_work(by_loss)
    assert sum("penalty_kernel" in name for name in work) == sum("scale_kernel" in name for name in work) == 1, work
    assert not any("Mem" in name for name in work), work  # neither memset nor memcpy
    with no_synchronisation():
        by_loss()

    handle = ewc.attach(optimizer)
    work = device_work(optimizer.step)
    assert sum("penalty_kernel" in name for name in work) == 1 and not any("Mem" in name for name in work), work
    with no_synchronisation():
        optimizer.step()
        ewc.ewc_lambda = 3.0
        optimizer.step()
    handle.remove()
    with no_synchronisation():
        ewc.accumulate_grad_()


@pytest.mark.gpu
def test_steady_state_takes_no_memory() -> None:
    params = [torch.randn(1 << 20, device="cuda") for _ in range(8)]
    grads = [torch.zeros_like(p) for p in params]
    zero = torch.zeros((), device="cuda")
    state = torch.rand(8 << 20, device="cuda")
    q = FlatQuadratic(state, state, [i << 20 for i in range(8)], [1] * 8, zero + 1, zero)
    for _ in range(2):
        ops.penalty_accumulate_(params, grads, q, backend="native")
    reserved, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        ops.penalty_accumulate_(params, grads, q, backend="native")
    assert torch.cuda.memory_reserved() == reserved
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.gpu
def test_streams_beside_each_other() -> None:
    """Launches that overlap do not share what their blocks count in."""
    device = torch.device("cuda")
    problems = [make(device, torch.float32, torch.float32) for _ in range(4)]
    expected = [ops.penalty(*problem, backend="native").by_tensor for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[tuple[int, Tensor]] = []
    for _ in range(100):
        for i, (stream, (params, q)) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                results.append((i, ops.penalty(params, q, backend="native").by_tensor))
    torch.cuda.synchronize()
    for i, by_tensor in results:
        assert torch.equal(by_tensor, expected[i])


@pytest.mark.gpu
def test_graphs_beside_each_other() -> None:
    """Two graphs captured on one stream, replayed on two: each has counters of its own, and no memset for them."""
    device = torch.device("cuda")
    graphs, results, expected = [], [], []
    for _ in range(2):
        params, q = make(device, torch.float32, torch.float32)
        expected.append(ops.penalty(params, q, backend="native").by_tensor)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([ops.penalty(params, q, backend="native").by_tensor for _ in range(10)])
        graphs.append((graph, params, q))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for stream, (graph, _, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for of_graph, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(by_tensor, wanted) for by_tensor in of_graph)
    work = device_work(graphs[0][0].replay)
    assert len(work) == 10 and all("penalty_kernel" in name for name in work), work


@pytest.mark.gpu
def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device, this takes two")
    device = torch.device("cuda", 1)
    params, q = make(device, torch.float32, torch.float32)
    grads = [torch.zeros_like(p) for p in params]
    with torch.cuda.device(0):
        result = ops.penalty_accumulate_(params, grads, q, backend="native")
        ops.scale_(grads[-1], torch.full((), 2.0, device=device), backend="native")
        fisher = torch.zeros_like(params[-1])
        fisher_accumulate_([fisher], [params[-1]], backend="native")
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(fisher, params[-1].square(), rtol=1e-6, atol=0)
    penalty, _, gradients = exact(params, q)
    assert result.penalty.device == device and result.penalty.item() == pytest.approx(penalty, rel=1e-6)
    torch.testing.assert_close(grads[-1].double().cpu(), 2 * gradients[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_compiled_with_reduced_overhead() -> None:
    """Compiled into CUDA graphs: the first rounds warm up and record, the later ones replay."""
    torch._dynamo.reset()
    layer = nn.Linear(70, 50).cuda()
    params = list(layer.parameters())
    fisher, anchor = [torch.rand_like(p) for p in params], [torch.randn_like(p) for p in params]

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().mean() + 2 * ewc_penalty(params, fisher, anchor, 3.0)

    with quietly():
        run = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
        for _ in range(6):
            x = torch.randn(30, 70, device="cuda")
            expected = loss(x)
            wanted = torch.autograd.grad(expected, params)
            torch.compiler.cudagraph_mark_step_begin()
            actual = run(x)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.autograd.grad(actual, params), wanted, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                params[0].mul_(0.5)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_the_gradient_hook_compiled_with_reduced_overhead() -> None:
    torch._dynamo.reset()
    params, q = small_problem(torch.device("cuda"), 5)
    grads = [torch.zeros_like(p) for p in params]

    def step() -> Tensor:
        return ops.penalty_accumulate_(params, grads, q, backend="native").penalty

    penalty, _, gradients = exact(params, q)
    with quietly():
        run = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        for calls in range(1, 6):
            torch.compiler.cudagraph_mark_step_begin()
            assert run().item() == pytest.approx(penalty, rel=1e-6)
            wanted = calls * torch.cat(gradients)
            torch.testing.assert_close(torch.cat(grads).double().cpu(), wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# ---- optimizer steps ----

F64, F32, B16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
STEP_OPS = ("adamw", "amsgrad", "sgd", "momentum", "nesterov", "proximal")


class Step:
    """A step's tensors on the CPU, every third parameter unprotected; ``run`` works on copies of them.

    Args:
        op: One of ``STEP_OPS``.
        dtypes: Of parameters and gradients, the optimizer's own tensors, anchor and Fisher.
    """

    def __init__(
        self,
        op: str,
        dtypes: tuple[torch.dtype, ...] = (F32, F32, F32, F32),
        sizes: tuple[int, ...] = (0, 1, 3, 255, 2049, 32767, 32769),
        ewc_lambda: float = 3.0,
    ) -> None:
        self.op, (dtype, moments, anchor, fisher) = op, dtypes
        self.params = [torch.randn(n).to(dtype) for n in sizes]
        self.grads = [torch.randn(n).to(dtype) for n in sizes]
        self.states = [[torch.rand(n).to(moments) for n in sizes] for _ in range(3)]
        self.steps = [torch.tensor(float(1 + i % 3)) for i in range(len(sizes))]
        self.rates = 0.1 + torch.rand(len(sizes), 4, dtype=F64)
        offsets, total = [], 0
        for i, n in enumerate(sizes):
            offsets.append(-1 if i % 3 == 2 else total)
            total += -(-n // 64) * 64
        self.q = StepQuadratic(
            [1] * len(sizes), torch.randn(total).to(anchor), torch.rand(total).to(fisher), offsets,
            torch.tensor(ewc_lambda, dtype=F64), torch.tensor(0.25, dtype=F64), torch.rand(len(sizes)),
            torch.rand(len(sizes), dtype=F64) * (torch.tensor(offsets) >= 0),
        )  # fmt: skip

    def lists(self) -> list[list[Tensor]]:
        """What the op writes, and its gradients."""
        count = {"adamw": 2, "amsgrad": 3, "sgd": 0}.get(self.op, 1)
        return [self.params, self.grads, *self.states[:count]]

    def place(self, device: torch.device) -> tuple[list[list[Tensor]], Callable[..., PenaltyResult]]:
        """Copies of the tensors on a device, one of them misaligned, and the call that steps them."""

        def copy(t: Tensor) -> Tensor:
            misaligned = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:]
            return misaligned.copy_(t) if t.numel() == 32767 else t.to(device, copy=True)

        lists = [[copy(t) for t in tensors] for tensors in self.lists()]
        move = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
        q = StepQuadratic(*map(move, self.q))
        params, grads, *states = lists
        steps, rates = [t.to(device) for t in self.steps], self.rates.to(device)

        def run(backend: str = "native", proximal: bool = False, seed: int = -1, **amp: Tensor) -> PenaltyResult:
            moved = step_ops.Amp(**{name: t.to(device) for name, t in amp.items()})
            if self.op == "proximal":
                return step_ops.proximal_(params, states[0], q, rates, moved.found_inf, backend=backend)
            if self.op in ("adamw", "amsgrad"):
                largest = states[2] if self.op == "amsgrad" else []
                options = step_ops.AdamWOptions(0.03, 0.8, 0.93, 1e-3, 0.2, self.op == "amsgrad")
                return step_ops.adamw_(
                    params, grads, states[0], states[1], largest, steps, q, options, moved, proximal=proximal,
                    seed=seed, ordinals=range(len(params)), backend=backend,
                )  # fmt: skip
            momentum, nesterov = 0.0 if self.op == "sgd" else 0.7, self.op == "nesterov"
            sgd = step_ops.SGDOptions(0.03, momentum, 0.0 if nesterov else 0.1, 0.2, nesterov, nesterov)
            return step_ops.sgd_(
                params, grads, states[0] if states else [], q, sgd, moved, proximal=proximal, backend=backend
            )

        run.q, run.steps = q, steps  # type: ignore[attr-defined]
        return lists, run


CPU = torch.device("cpu")


def assert_step(found: list[list[Tensor]], wanted: list[list[Tensor]], ulps: int = 2) -> None:
    """To neighbours in the type that is stored, or ``ulps`` / 2 numbers away, and some rounding of the arithmetic."""
    for some, others in zip(found, wanted, strict=True):
        f, w = torch.cat(some), torch.cat(others).double()
        tolerance = ulps * EPS[f.dtype] + 100 * EPS[F64 if f.dtype == F64 else F32]
        assert bool(((f.double().cpu() - w).abs() <= tolerance * (1 + w.abs())).all())


def assert_equal(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    assert all(torch.equal(torch.cat(f).cpu(), torch.cat(w).cpu()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("op", STEP_OPS)
@pytest.mark.parametrize("proximal", [False, True], ids=["coupled", "proximal"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32, F32, F32),
        (F32, F32, F32, B16),
        (B16, F32, B16, B16),
        (B16, F32, B16, F32),
        (B16, B16, B16, B16),
        (F64, F64, F64, F64),
        (F16, F32, F32, B16),
        (F32, B16, B16, F64),
    ],
    ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes),
)
def test_steps(device: torch.device, op: str, proximal: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    step = Step(op, dtypes)
    amp = {"grad_scale": torch.tensor(4.0), "found_inf": torch.zeros(()), "lr": torch.tensor(0.02)}
    for scalars in ({}, amp):
        (found, run), (wanted, reference) = step.place(device), step.place(CPU)
        result = run(proximal=proximal, **scalars)
        expected = reference("reference", proximal=proximal, **scalars)
        assert_step(found, wanted)
        torch.testing.assert_close(result.by_tensor.cpu(), expected.by_tensor, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.penalty.cpu(), expected.penalty, rtol=1e-5, atol=0)
        torch.testing.assert_close(result.predicted.cpu(), expected.predicted, rtol=1e-5, atol=0)
        again, run = step.place(device)
        assert torch.equal(run(proximal=proximal, **scalars).by_tensor, result.by_tensor)
        assert_equal(again, found)


@pytest.mark.parametrize("op", STEP_OPS)
@pytest.mark.parametrize("proximal", [False, True], ids=["coupled", "proximal"])
def test_steps_at_lambda_0_and_on_overflow(device: torch.device, op: str, proximal: bool) -> None:
    step = Step(op, ewc_lambda=0.0)
    assert step.q.anchor is not None
    step.q.anchor[1] = float("inf")  # 0 times that would be NaN
    (found, run), (wanted, reference) = step.place(device), step.place(CPU)
    result = run(proximal=proximal)
    reference("reference", proximal=proximal)
    assert result.penalty.item() == 0.0
    assert_step(found, wanted)
    step = Step(op)
    found, run = step.place(device)
    result = run(proximal=proximal, found_inf=torch.ones(()), grad_scale=torch.tensor(8.0))
    assert result.penalty.item() > 0.0
    assert_equal(found, step.lists())


@pytest.mark.parametrize("moments", [F32, B16], ids=str)
def test_stochastic_rounding_repeats(device: torch.device, moments: torch.dtype) -> None:
    """Arithmetic may be rounded otherwise than on the CPU, the numbers drawn are the same: most results are equal."""
    step = Step("adamw", (B16, moments, B16, B16))
    (found, run), (again, rerun), (wanted, reference) = step.place(device), step.place(device), step.place(CPU)
    run(seed=5)
    rerun(seed=5)
    reference("reference", seed=5)
    assert_step(found, wanted)
    assert_equal(again, found)
    assert (torch.cat(found[0]).cpu() == torch.cat(wanted[0])).double().mean().item() > 0.99


@pytest.mark.parametrize("op", ["adamw", "sgd", "proximal"])
@pytest.mark.parametrize("n", [STEPS_PER_LAUNCH, 2 * STEPS_PER_LAUNCH + 1])
def test_many_steps(device: torch.device, op: str, n: int) -> None:
    step = Step(op, sizes=tuple(torch.randint(13, (n,)).tolist()))
    (found, run), (wanted, reference) = step.place(device), step.place(CPU)
    result, expected = run(), reference("reference")
    assert_step(found, wanted)
    torch.testing.assert_close(result.by_tensor.cpu(), expected.by_tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (STEPS_PER_LAUNCH, 1), (STEPS_PER_LAUNCH + 1, 2)])
@pytest.mark.parametrize("op", ["adamw", "sgd", "proximal"])
def test_launches_are_all_that_runs_for_a_step(op: str, n: int, launches: int) -> None:
    _, run = Step(op, sizes=(40,) * n).place(torch.device("cuda"))
    work = device_work(run)
    assert len(work) == launches and all("step_kernel" in name for name in work), work
    with no_synchronisation():
        run()


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["adamw", "momentum", "proximal"])
def test_a_step_in_a_cuda_graph(op: str) -> None:
    """Lambda and the step counts are read at each replay."""
    step = Step(op)
    (found, run), (wanted, reference) = step.place(torch.device("cuda")), step.place(CPU)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        Step(op).place(torch.device("cuda"))[1]()  # warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for factor in (1.0, 0.0, 2.0):
        for one in (run, reference):
            one.q.ewc_lambda.fill_(3.0 * factor)  # type: ignore[attr-defined]
            torch._foreach_add_(one.steps, 1.0)  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize()
        expected = reference("reference")
        assert_step(found, wanted, ulps=4)
        torch.testing.assert_close(result.penalty.cpu(), expected.penalty, rtol=1e-4, atol=0)
