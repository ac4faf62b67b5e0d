"""The native kernels on every device there is: the same checks on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss
from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = (0, 1, 3, 255, 2049, 32767, 32769, 100_003)
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
    for result in results:
        assert result.penalty.item() == pytest.approx(penalty, rel=rtol)
        assert result.predicted.item() == pytest.approx(predicted, rel=rtol)
        assert torch.equal(result.by_tensor, results[0].by_tensor)
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
