"""Cross-entropy over classes: which labels a kind of Fisher takes, and the gradient of their log-likelihood."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("exact", "sampled", "empirical", "batch")
NEEDS_LABELS = frozenset({"empirical", "batch"})


class Targets(NamedTuple):
    """The labels that each sample's squared gradient is taken for: ``F = sum_k weights[k] * (d log p(classes[k]))^2``.

    Attributes:
        probs: (B, C), the model's probabilities, fp32 or fp64.
        classes: (B, K), int64.
        weights: (B, K), dtype of ``probs``.
    """

    probs: Tensor
    classes: Tensor
    weights: Tensor

    def cotangents(self, samples: slice, labels: slice) -> Tensor:
        """``sqrt(weight) * d log p(class) / d logits`` of some samples and labels, (samples, labels, C)."""
        probs, weights = self.probs[samples, None], self.weights[samples, labels, None]
        chosen = torch.nn.functional.one_hot(self.classes[samples, labels], probs.shape[-1]).bool()
        # The chosen entry, 1 - p, is summed from the other classes: where the model is certain, 1 - p cancels.
        others = probs.masked_fill(chosen, 0)
        return weights.sqrt() * torch.where(chosen, others.sum(-1, keepdim=True), -others)


def check_logits(logits: object, num_samples: int) -> Tensor:
    """Returns ``logits`` if they are (num_samples, C) with at least two classes.

    Raises:
        TypeError: The model returned something that is not a tensor.
        ValueError: Wrong shape or dtype.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model(inputs) must return the logits as a tensor, got {type(logits).__name__}; wrap the model in a "
            "module that returns only its logits"
        )
    if logits.dim() == 3:
        raise ValueError(
            f"model(inputs) returned logits of shape {tuple(logits.shape)}; token classification and causal language "
            "model objectives are not available in this version, logits must be (batch, classes)"
        )
    if logits.dim() != 2 or logits.shape[0] != num_samples:
        raise ValueError(
            f"model(inputs) must return logits of shape (batch, classes) = ({num_samples}, C), "
            f"got {tuple(logits.shape)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"model(inputs) returned logits of shape {tuple(logits.shape)}: cross-entropy needs two classes or more, "
            "over a single one it is constant"
        )
    if not logits.is_floating_point():
        raise ValueError(f"model(inputs) must return floating point logits, got {logits.dtype}")
    return logits


def check_labels(labels: Tensor, num_samples: int, num_classes: int) -> Tensor:
    """Returns ``labels`` as int64 if they are (num_samples,) integers in [0, num_classes).

    Raises:
        ValueError: Wrong shape or dtype, or a label out of range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers (class indices), got {labels.dtype}")
    if labels.shape != (num_samples,):
        raise ValueError(f"labels must have shape (batch,) = ({num_samples},), got {tuple(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(f"label {wrong[0].item()} is out of range: the model's logits have {num_classes} classes")
    return labels.long()


def choose_targets(kind: str, logits: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Targets:
    """The labels and weights that a kind of Fisher takes.

    Args:
        kind: One of :data:`KINDS`.
        logits: (B, C).
        labels: (B,) integers, for the kinds in :data:`NEEDS_LABELS`; ignored by the others.
        generator: Source of the sampled labels; None for the global one of the logits' device.

    Raises:
        ValueError: Labels of the wrong shape or dtype or out of range, or a loss that is not finite.
    """
    size, num_classes = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(-1)
    if kind in NEEDS_LABELS:
        assert labels is not None
        classes = check_labels(labels.to(logits.device), size, num_classes)[:, None]
        loss = -logits.log_softmax(-1).gather(1, classes)
    else:
        loss = probs
    if not loss.isfinite().all():
        raise ValueError("the loss is not finite: check the inputs and the model's weights for NaN and infinities")
    if kind == "exact":
        return Targets(probs, torch.arange(num_classes, device=probs.device).expand(size, -1), probs)
    if kind == "sampled":
        source = probs if generator is None else probs.to(generator.device)
        classes = torch.multinomial(source, 1, generator=generator).to(probs.device)
    return Targets(probs, classes, probs.new_ones(size, 1))
