"""Per-sample gradients of what the rules do not cover: vectorised with ``torch.func``, or in a loop over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_unflatten

from ewc_fast.fisher.batches import by_sample, take

# Per-sample gradients held at once. On the CPU they should stay in the cache between being written and being squared.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20

Accumulate = Callable[[Tensor, Tensor], None]  # into a sum, of the gradients of several samples
Run = Callable[[Mapping[str, Tensor], Any], Tensor]  # weights and a batch to outputs


class NotVectorised(Exception):
    """The model does not run under :func:`torch.vmap`; nothing has been added. The cause says why."""


@contextmanager
def without_torchs_warnings() -> Iterator[None]:
    """Of what is no news here: reentrant checkpoints without a graph, operations that run sample by sample in vmap."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def add_vectorised(
    run: Run,
    weights: dict[str, Tensor],
    sums: Mapping[str, Tensor],
    batch: Any,
    size: int,
    cotangent: Tensor,
    accumulate: Accumulate,
) -> None:
    """Accumulates all samples' gradients, in chunks of bounded memory.

    Raises:
        NotVectorised: The first chunk failed.
    """
    leaves, tree, mapped = by_sample(batch, size)
    if not all(isinstance(leaves[i], Tensor) for i in mapped):
        raise NotVectorised from TypeError("its batch has a string for each sample")

    def gradients(sample: list[Tensor], row: Tensor) -> dict[str, Tensor]:
        filled = list(leaves)
        for i, t in zip(mapped, sample, strict=True):
            filled[i] = t.unsqueeze(0)
        outputs, pullback, *_ = vjp(lambda w: run(w, tree_unflatten(filled, tree)), weights)
        return pullback(row.to(outputs.dtype).reshape(outputs.shape))[0]

    gradient_bytes = max(1, sum(w.numel() * w.element_size() for w in weights.values()))
    device = cotangent.device.type
    step = max(1, _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // gradient_bytes)
    with sdpa_kernel(SDPBackend.MATH), without_torchs_warnings():  # the fused attention kernels have no batching rule
        for start in range(0, size, step):
            samples = slice(start, start + step)
            try:
                found = vmap(gradients)([leaves[i][samples] for i in mapped], cotangent[samples])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model that runs on a batch raises here, vmap's tracing is its cause
                if start:
                    raise
                raise NotVectorised from error
            for name, gradient in found.items():
                accumulate(sums[name], gradient.to(sums[name].dtype))


def add_in_loop(
    swapped: Callable[[Mapping[str, Tensor]], AbstractContextManager[None]],
    output: Callable[[Any], Tensor],
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    batch: Any,
    size: int,
    cotangent: Tensor,
    accumulate: Accumulate,
) -> None:
    """The same, one sample at a time, for the weights that ``sums`` has."""
    for i in range(size):
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with swapped(leaves):
            outputs = output(take(batch, slice(i, i + 1), size))
            if not outputs.requires_grad:
                continue  # they depend on no parameter for this input: all gradients are 0
            # Not autograd.grad(), which reentrant checkpoints refuse.
            torch.autograd.backward(outputs, cotangent[i : i + 1].to(outputs.dtype))
        for name, leaf in leaves.items():
            if leaf.grad is not None and name in sums:
                gradient = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
                accumulate(sums[name], gradient[None].to(sums[name].dtype))
