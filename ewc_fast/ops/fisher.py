"""The Fisher's op: native kernels where they are built, else the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewc_fast.ops import reference
from ewc_fast.ops.native import call, direct, use_native

_accumulate = direct("fisher_accumulate_")  # which an estimate calls for every layer of every batch


def fisher_accumulate_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0, *, backend: str = "auto"
) -> None:
    """Adds squared gradients in place: ``fisher[i] += weight * sum_b grads[i][b]^2``, over samples ``b``.

    The diagonal of the Fisher information is the mean over samples of such squares (Kirkpatrick et al. 2017; Martens
    2020). The samples of a block are summed in the cache, so that the Fisher is read and written once, and nothing is
    allocated as long as each gradient is laid in memory as its Fisher.

    Args:
        fisher: Tensors of one dtype, fp32 or fp64, which is also that of the sums; changed in place. Any strides: one
            with gaps in memory (a column slice) goes through a copy.
        grads: One for each, of its shape or with one leading dimension for samples (of any length, 0 too), of one
            dtype: fp32, bf16, fp16 or fp64. Each is converted to the Fisher's dtype before it is squared, so that fp16
            does not overflow and fp64 is rounded to fp32 for an fp32 Fisher. Fast where the memory order is the
            Fisher's; others are copied.
        weight: Of the squares; finite.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: Lists of different lengths, a gradient of another shape, tensors on several devices, a Fisher in
            bf16 or fp16 or with elements that share memory, a weight that is not finite. Before anything is written.
        TypeError: Dtypes other than those, or several in one list.
        RuntimeError: ``backend`` is ``"native"`` and there is no kernel.
    """
    if not fisher or not use_native(fisher[0].device, backend):
        reference.fisher_accumulate_(fisher, grads, weight)
    elif torch.compiler.is_compiling() or _accumulate(fisher, grads, weight) is None:
        call(torch.ops.ewc_fast.fisher_accumulate_.default, fisher, grads, weight)
