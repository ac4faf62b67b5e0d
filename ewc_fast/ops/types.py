"""What the penalty's ops take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # that a Fisher and an anchor are kept in


class FlatQuadratic(NamedTuple):
    """The quadratic around the anchor, of parameters that share a device and a dtype; in the native ops' order.

    Attributes:
        anchor: theta*, flat: 1-D, fp64, fp32 or bf16.
        fisher: The Fisher diagonal, flat, as long as the anchor; fp64, fp32 or bf16.
        offsets: Each parameter's first element in the flat buffers.
        strides: The strides, parameter after parameter, in whose memory order the slices are laid.
        ewc_lambda: 0-dim, fp32 or fp64, on the parameters' device: read there.
        delta: Damping times the mean Fisher; like ``ewc_lambda``.
        scale: One factor of lambda per parameter, or None for 1.
        constant: One constant C per parameter, fp64, or None for 0: what merging several tasks into one added.
    """

    anchor: Tensor
    fisher: Tensor
    offsets: list[int]
    strides: list[int]
    ewc_lambda: Tensor
    delta: Tensor
    scale: Tensor | None = None
    constant: Tensor | None = None


class StepQuadratic(NamedTuple):
    """The quadratic as optimizer steps take it: some parameters, or all, may have none.

    Attributes:
        strides: The strides, parameter after parameter, in whose memory order a parameter's tensors are read; where it
            is protected, those of its slice.
        anchor, fisher: As in :class:`FlatQuadratic`; None where no parameter is protected.
        offsets: Each parameter's first element in them, -1 for one that is not protected.
        ewc_lambda, delta, scale, constant: As in :class:`FlatQuadratic`; one entry per parameter in the last two.
    """

    strides: list[int]
    anchor: Tensor | None
    fisher: Tensor | None
    offsets: list[int]
    ewc_lambda: Tensor | None = None
    delta: Tensor | None = None
    scale: Tensor | None = None
    constant: Tensor | None = None


class PenaltyResult(NamedTuple):
    """What one pass returns.

    Attributes:
        penalty: ``lambda/2 * sum_t scale_t * (sum F d^2 + C + delta * sum d^2)``; 0-dim, fp64 for fp64 parameters, else
            fp32.
        predicted: ``sum_t (sum F d^2 + C) / 2``, the forgetting that the quadratic predicts; like ``penalty``.
        by_tensor: fp64, shape ``(2, number of parameters)``: the terms of the two sums.
    """

    penalty: Tensor
    predicted: Tensor
    by_tensor: Tensor

    def weighted(self, factor: float) -> PenaltyResult:
        """The same with the penalty times a factor."""
        penalties, predictions = self.by_tensor.unbind()
        return PenaltyResult(self.penalty * factor, self.predicted, torch.stack([penalties * factor, predictions]))
