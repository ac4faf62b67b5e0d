"""Passes of the kernels on a GPU, for tools that look at kernels from outside (compute-sanitizer, ncu).

python benchmarks/gpu/penalty_passes.py            # 8 passes of level 2 over 1B fp32 parameters (20 GB)
python benchmarks/gpu/penalty_passes.py --small    # every op, several dtypes, awkward sizes, two streams
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout that this file belongs to

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ewc_fast.ops import penalty as ops  # noqa: E402
from ewc_fast.ops import steps  # noqa: E402
from ewc_fast.ops.fisher import fisher_accumulate_  # noqa: E402
from ewc_fast.ops.memory import aligned  # noqa: E402
from ewc_fast.ops.types import FlatQuadratic, StepQuadratic  # noqa: E402


def problem(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], FlatQuadratic]:
    """Parameters of these sizes and a quadratic around zero, made on the host where the tools do not look."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += aligned(size)
    params = [torch.randn(size).to(device, dtype) for size in sizes]
    anchor, fisher = torch.zeros(total).to(device, dtype), torch.rand(total).to(device, dtype)
    scalars = [torch.tensor(x).to(device) for x in (2.0, 0.25)]
    return params, FlatQuadratic(anchor, fisher, offsets, [1] * len(sizes), *scalars)


def small(device: torch.device) -> None:
    sizes = [0, 1, 3, 255, 4095, 4096, 4097, 70_001, *([5] * 900)]  # two launches
    streams = [torch.cuda.Stream(), torch.cuda.Stream()] if device.type == "cuda" else [None]
    for dtype in (torch.float32, torch.bfloat16):
        params, q = problem(sizes, dtype, device)
        params[7] = torch.randn(sizes[7] + 1).to(device, dtype)[1:]  # misaligned
        grads = [torch.zeros(p.shape).to(device, dtype) for p in params]
        flats = [torch.zeros(q.anchor.shape).to(device, dtype) for _ in streams]
        if device.type == "cuda":
            torch.cuda.synchronize()
        for stream, flat in zip(streams, flats, strict=True):
            with torch.cuda.stream(stream):
                ops.penalty(params, q, backend="native")
                ops.penalty_grad(params, flat, q, backend="native")
                ops.scale_(flat, q.delta, backend="native")
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(dtype, ops.penalty_accumulate_(params, grads, q, backend="native").penalty.item())
        step(params, grads, q)
    accumulate(sizes[1:200], device)


def step(params: list[Tensor], grads: list[Tensor], q: FlatQuadratic) -> None:
    """A step of each optimizer in both couplings, and the pull after another optimizer's step."""

    def moments() -> list[Tensor]:
        return [torch.zeros(p.shape).to(p) for p in params]

    device = params[0].device
    penalised = StepQuadratic(q.strides, q.anchor, q.fisher, q.offsets, q.ewc_lambda, q.delta)
    counts = [torch.tensor(1.0).to(device) for _ in params]
    rates = torch.tensor([[0.1, 1.0, 1.0, 1e-8]] * len(params), dtype=torch.float64).to(device)
    adamw = steps.AdamWOptions(1e-3, 0.9, 0.99, 1e-8, 0.1, False)
    sgd = steps.SGDOptions(1e-3, 0.9, 0, 0, True, False)
    rounding = {"seed": 1, "ordinals": range(len(params))} if params[0].dtype == torch.bfloat16 else {}
    for proximal in (False, True):
        states = (moments(), moments(), [], counts)
        steps.adamw_(params, grads, *states, penalised, adamw, proximal=proximal, backend="native", **rounding)
        result = steps.sgd_(params, grads, moments(), penalised, sgd, proximal=proximal, backend="native")
        print("steps", result.penalty.item())
    print("pull", steps.proximal_(params, moments(), penalised, rates, backend="native").penalty.item())


def accumulate(sizes: list[int], device: torch.device) -> None:
    """The squares of five samples' gradients, in rows that start at any address."""
    fisher = [torch.zeros(size).to(device) for size in sizes]
    grads = [torch.randn(5, size).to(device) for size in sizes]
    fisher_accumulate_(fisher, grads, 0.5, backend="native")
    print("squares", sum(f.sum().item() for f in fisher))


def large(device: torch.device, numel: int, passes: int) -> None:
    params = [torch.ones(numel // 16, device=device) for _ in range(16)]
    grads = [torch.zeros_like(p) for p in params]
    state = torch.full((numel,), 0.5, device=device)
    scalars = [torch.full((), x, device=device) for x in (2.0, 0.0)]
    q = FlatQuadratic(state, state.clone(), [i * (numel // 16) for i in range(16)], [1] * 16, *scalars)
    for _ in range(passes):
        result = ops.penalty_accumulate_(params, grads, q, backend="native")
    print(result.penalty.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="every op on little data")
    parser.add_argument("--device", default="cuda", help="cpu, to try the script itself")
    parser.add_argument("--numel", type=int, default=1 << 30, help="parameters, a multiple of 1,024")
    parser.add_argument("--passes", type=int, default=8)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.small:
        small(device)
    else:
        large(device, options.numel, options.passes)


if __name__ == "__main__":
    main()
