"""Every 16-bit pattern through loads, and fp32 numbers that are hard to round through stores, bit by bit.

With F = 1, lambda = 1, delta = 0 and the anchor at 0 the gradient is the parameter: what ``penalty_grad`` writes is
what a conversion made of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic
from tests.ops.exact import bits

HALVES = (torch.bfloat16, torch.float16)

halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """fp32: each 16-bit number, the middle to the next one, what lies beside them; and any bits at all."""
    around = bits(all_patterns(dtype).float()).to(torch.int64)
    step = 2**16 if dtype == torch.bfloat16 else 2**13
    shifts = [0, 1, -1, step // 2, step // 2 + 1, step // 2 - 1, step - 1, step // 4]
    crafted = torch.cat([around + shift for shift in shifts]).clamp(-(2**31), 2**31 - 1)
    # fp16's subnormals lie further apart: halves, quarters and eighths of the smallest one between all of them.
    subnormal = torch.arange(0, 2**14).double() * 2.0**-27
    subnormal = torch.cat([subnormal, subnormal.nextafter(torch.tensor(1.0).double())]).float()
    limits = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.3895314e38, 3.3961776e38, 3.4028235e38])
    specials = torch.cat([limits, torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-40]), subnormal])
    anything = torch.randint(-(2**31), 2**31, (500_000,), dtype=torch.int64)
    patterns = torch.cat([crafted, anything, bits(specials).long(), bits(-specials).long()])
    return patterns.to(torch.int32).view(torch.float32)


def gradient(backend: str, param: Tensor, anchor: Tensor, fisher: Tensor, dtype: torch.dtype) -> Tensor:
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    grad = torch.empty(param.shape, dtype=dtype)
    ops.penalty_grad([param], grad, FlatQuadratic(anchor, fisher, [0], [1], one, zero), backend=backend)
    return grad


def assert_converted(actual: Tensor, expected: Tensor) -> None:
    """The same bits, or any NaN where a NaN is due."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    wrong = (bits(actual) != bits(expected)) & ~nan
    assert not bool(wrong.any()), f"{int(wrong.sum())} differ: {actual[wrong][:5]}, expected {expected[wrong][:5]}"


@halves
def test_every_pattern_is_loaded_from_parameters(backend: str, dtype: torch.dtype) -> None:
    param = all_patterns(dtype)
    zeros, ones = torch.zeros(param.shape), torch.ones(param.shape)
    for wide in (torch.float32, torch.float64):
        assert_converted(gradient(backend, param, zeros, ones, wide), param.to(wide))
    assert_converted(gradient(backend, param, zeros, ones, dtype), param)  # loaded and stored


def test_every_bf16_pattern_is_loaded_from_the_state(backend: str) -> None:
    pattern = all_patterns(torch.bfloat16)
    zeros, ones = torch.zeros(pattern.shape), torch.ones(pattern.shape)
    for wide in (torch.float32, torch.float64):
        assert_converted(gradient(backend, zeros.to(wide), pattern, ones, wide), 0.0 - pattern.to(wide))
        assert_converted(gradient(backend, ones.to(wide), zeros, pattern, wide), pattern.to(wide) + 0.0)


@halves
def test_every_pattern_is_loaded_from_gradients(backend: str, dtype: torch.dtype) -> None:
    pattern = all_patterns(dtype)
    one, zero = torch.ones(()), torch.zeros(())
    for param in (torch.full(pattern.shape, 2.0**-3), torch.full(pattern.shape, 2.0**-3).to(dtype)):
        grad = pattern.clone()
        q = FlatQuadratic(torch.zeros(pattern.shape), torch.ones(pattern.shape), [0], [1], one, zero)
        ops.penalty_accumulate_([param], [grad], q, backend=backend)
        assert_converted(grad, (pattern.float() + 2.0**-3).to(dtype))


@halves
def test_rounding_is_torchs(backend: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even, through subnormals, into infinity, and NaN stays NaN."""
    value = hard_to_round(dtype)
    zeros, ones = torch.zeros(value.shape), torch.ones(value.shape)
    assert_converted(gradient(backend, value, zeros, ones, dtype), value.to(dtype))
    # the loops for 16-bit parameters
    assert_converted(gradient(backend, zeros.to(dtype), value, ones, dtype), (0.0 - value).to(dtype))
    # fp64 numbers go by way of fp32
    assert_converted(gradient(backend, value.double(), zeros, ones, dtype), value.to(dtype))


def test_rounding_of_fp64_to_fp32(backend: str) -> None:
    value = torch.randn(10_000, dtype=torch.float64) * 10.0 ** torch.randint(-50, 50, (10_000,)).double()
    zeros, ones = torch.zeros(value.shape), torch.ones(value.shape)
    assert_converted(gradient(backend, value, zeros, ones, torch.float32), value.float())


@halves
@pytest.mark.parametrize("factor", [0.5, 2.0, 1 / 3, 1e-30, 1e30, float("nan")])
def test_every_pattern_scaled(backend: str, dtype: torch.dtype, factor: float) -> None:
    buffer = all_patterns(dtype).clone()
    expected = (buffer.float() * torch.tensor(factor)).to(dtype)
    ops.scale_(buffer, torch.tensor(factor), backend=backend)
    assert_converted(buffer, expected)
