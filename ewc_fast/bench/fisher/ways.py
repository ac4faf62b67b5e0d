"""The ways to a Fisher diagonal: what one would write in PyTorch, and ours. Other packages' are in ``packages``.

A way is made for a model once, outside of what is timed, and then takes batches and returns the diagonal by parameter
name, in the unit that ``estimate_fisher`` uses: a mean over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ewc_fast import estimate_fisher
from ewc_fast.bench.fisher.nets import Batches

PLAIN, LOOP, PUBLISHED, OURS = "plain training", "plain PyTorch", "published package", "ewc_fast"
BASELINE = "plain"
VMAP_CHUNK = 32  # samples whose gradients are held at once

Fisher = Mapping[str, Tensor]
Run = Callable[[Batches], Fisher]


@dataclass(frozen=True)
class Way:
    """One way to a diagonal.

    Attributes:
        name: As the command line knows it.
        kind: The ``kind`` of ``estimate_fisher`` that its values are; empty for what computes no Fisher.
        note: What it is, for the reader of a table.
        group: One of this module's groups.
        make: Makes it for a model, which it may not change. Raises ``Unavailable`` where a package is missing.
        package: The package that it needs, one of ``nets.PACKAGES``; empty for none.
        differs: Where its values are not those of the kind by definition: why.
    """

    name: str
    kind: str
    note: str
    group: str
    make: Callable[[nn.Module], Run]
    package: str = ""
    differs: str = ""


def _plain(model: nn.Module) -> Run:
    def run(batches: Batches) -> Fisher:
        for inputs, labels in batches:
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
        model.zero_grad()
        return {}

    return run


def _squares(model: nn.Module, size: int, scale: float) -> Run:
    """Squared gradients of micro-batches of so many samples (0: the batch as it comes), times ``scale`` over their
    number."""

    def run(batches: Batches) -> Fisher:
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        count = 0
        for batch in batches:
            for inputs, labels in zip(*(t.split(size or len(t)) for t in batch), strict=True):
                model.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                count += 1
                for name, p in model.named_parameters():
                    assert p.grad is not None
                    sums[name].addcmul_(p.grad, p.grad)
        model.zero_grad()
        return {name: total.mul_(scale / count) for name, total in sums.items()}

    return run


def _vmap(model: nn.Module) -> Run:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (inputs[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def run(batches: Batches) -> Fisher:
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule
            for batch in batches:
                for inputs, labels in zip(*(t.split(VMAP_CHUNK) for t in batch), strict=True):
                    for name, g in gradients(params, inputs, labels).items():
                        sums[name] += g.square_().sum(0)
        return {name: total / sum(len(labels) for _, labels in batches) for name, total in sums.items()}

    return run


def _ours(kind: str, model: nn.Module) -> Run:
    return lambda batches: estimate_fisher(model, batches, kind=kind)


WAYS: tuple[Way, ...] = (
    Way(BASELINE, "", "a plain forward and backward of each batch", PLAIN, _plain),
    Way("loop", "empirical", "a loop of batch size 1", LOOP, lambda model: _squares(model, 1, 1.0)),
    Way("vmap", "empirical", f"torch.func.vmap, chunks of {VMAP_CHUNK}", LOOP, _vmap),
    Way(
        "batch_squared",
        "empirical",
        "squared gradients of batch means, as most published EWC code",
        LOOP,
        lambda model: _squares(model, 0, 1.0),
        differs="the square of a mean, not the mean of squares",
    ),
    *(
        Way(kind, kind, f'estimate_fisher(kind="{kind}")', OURS, partial(_ours, kind))
        for kind in ("empirical", "sampled", "exact", "batch")
    ),
)
