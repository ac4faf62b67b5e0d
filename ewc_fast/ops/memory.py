"""The order in which a tensor's elements lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Slices of flat buffers start at multiples of so many elements: 64 bytes in the narrowest state type there may be.
ALIGNMENT = 64


def aligned(numel: int) -> int:
    """What a slice of ``numel`` elements takes in a flat buffer, the gap behind it included."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():  # what is left takes microseconds
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def memory_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides in whose order a tensor's flat slice is laid: its own where it is dense, else row-major."""
    if tensor.numel() == 0 or not is_dense(tensor):
        return torch.empty(tensor.shape, device="meta").stride()
    return tensor.stride()


def same_memory_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether a slice laid by ``strides`` still fits the tensor; dimensions of size 1 have no say."""
    if tensor.numel() == 0 or not is_dense(tensor):
        return True  # laid row-major, and copied by the op
    return all(n == 1 or s == t for n, s, t in zip(tensor.shape, tensor.stride(), strides, strict=True))
