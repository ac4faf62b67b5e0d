"""Passes of the penalty's kernels on a GPU, for tools that look at kernels from outside (compute-sanitizer, ncu).

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
from ewc_fast.ops.memory import aligned  # noqa: E402
from ewc_fast.ops.types import FlatQuadratic  # noqa: E402


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
