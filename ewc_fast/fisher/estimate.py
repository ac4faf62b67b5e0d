"""``estimate_fisher``: the diagonal of a classifier's Fisher information over a data loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ewc_fast.fisher.classification import KINDS, NEEDS_LABELS, check_logits, choose_targets
from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.modes import module_mode
from ewc_fast.fisher.squares import SquareSums
from ewc_fast.layout import trainable_parameters

LOSSES = ("cross_entropy",)


def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    kind: str = "sampled",
    loss: str | Callable[..., Tensor] = "cross_entropy",
    num_samples: int | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> FisherDiagonal:
    """Estimates the diagonal of the Fisher information of a classifier at its current weights.

    The Fisher is the mean over samples of the squared gradient of *one sample's* log-likelihood (Kirkpatrick et al.
    2017; Martens 2020, section 5). The kinds differ in the labels:

    - ``"exact"``: the expectation over all classes, ``sum_c p_c (d log p_c)^2``; one backward per class.
    - ``"sampled"``: one label per sample drawn from the model; unbiased, and about as cheap as ``"empirical"``.
    - ``"empirical"``: the given labels. Equal to the Fisher only where the model fits the data's distribution
      (Kunstner et al. 2019 show how far apart they may be).
    - ``"batch"``: ``sum_b N_b^2 g_b^2 / sum_b N_b`` with ``g_b`` the gradient of the mean loss of batch b, of N_b
      samples, on the given labels: one backward per batch. Biased: where the samples' gradients have the mean mu, it
      exceeds ``"empirical"`` by about ``(N_b - 1) mu^2``, which is small near an optimum only.

    Van de Ven 2025 compares these choices for EWC and advises against ``"batch"``.

    The model is in evaluation mode meanwhile. Its training flags, buffers, gradients and ``requires_grad`` flags are
    left as they were, also when an error is raised. Per-sample gradients are vectorised with :func:`torch.func.vmap`; a
    model that does not allow it (data-dependent control flow, an operator that has no batching rule) is run sample by
    sample after a warning, and ``info.method`` says so.

    Args:
        model: Maps inputs (B, ...) to logits (B, C), C >= 2, treating the samples of a batch independently.
        loader: Yields batches: ``(inputs, labels)``, labels (B,) integers, or, for ``"exact"`` and ``"sampled"``,
            inputs alone. They are moved to the device of the model's first parameter.
        kind: ``"exact"``, ``"sampled"``, ``"empirical"`` or ``"batch"``.
        loss: ``"cross_entropy"``.
        num_samples: Stop after exactly so many samples, the last batch cut; None for the whole loader. If the loader
            has fewer, those are used, with a warning.
        progress: Show a progress bar.
        generator: Source of the sampled labels. If given, the global random state is left as it was found, also by the
            loader's shuffling. None for the global random state.

    Returns:
        A read-only mapping from the model's own parameter names to tensors shaped like the parameter, on its device,
        fp32 (fp64 for fp64 parameters); frozen parameters are left out, tied ones are there once. ``.info`` records how
        it was made.

    Raises:
        ValueError: A kind or loss that is not available, ``num_samples`` below 1, a model without trainable parameters,
            an empty loader, labels that are missing, malformed or out of range, logits that are not (B, C), a loss or a
            gradient that is not finite.
        TypeError: A loader that cannot be iterated, a batch that is neither a tensor nor (inputs, labels), logits that
            are no tensor, a generator that is none.

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
        Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.
        Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient descent", NeurIPS 2019.
        van de Ven, "On the computation of the Fisher information in continual learning", arXiv:2502.11756, 2025.
    """
    _check_arguments(kind, loss, num_samples, loader, generator)
    params = trainable_parameters(model)
    if not params:
        raise ValueError("no parameter of the model requires grad: call requires_grad_(True) on those to estimate for")
    device = next(model.parameters()).device
    count = largest = 0
    with (
        module_mode(model, training=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        _isolated_rng(generator, device),
        # The fused attention kernels have no batching rule: vmap would run them sample by sample, and warn.
        nullcontext() if kind == "batch" else sdpa_kernel(SDPBackend.MATH),
        tqdm(total=_expected_samples(loader, num_samples), desc="Fisher", unit="sample", disable=not progress) as bar,
    ):
        squares = SquareSums(model, params)
        for index, batch in enumerate(loader):
            with _batch_named(index):
                inputs, labels = _unpack(batch, kind)
                if num_samples is not None:
                    inputs = inputs[: num_samples - count]
                    labels = None if labels is None else labels[: num_samples - count]
                _add(squares, inputs.detach().to(device, non_blocking=True), labels, kind, generator)
            size = len(inputs)
            count += size
            largest = max(largest, size)
            bar.update(size)
            if count == num_samples:
                break
    if not count:
        raise ValueError("the loader is empty: a Fisher estimate needs at least one sample")
    if num_samples is not None and count < num_samples:
        warnings.warn(
            f"num_samples is {num_samples}, but the loader has only {count} samples: they were all used", stacklevel=2
        )
    method = "batch" if kind == "batch" else "vmap" if squares.vectorised else "loop"
    info = FisherInfo(kind, "cross_entropy", "sample", num_samples=count, batch_size=largest, method=method)
    return FisherDiagonal({name: total.div_(count) for name, total in squares.sums.items()}, info)


def _add(
    squares: SquareSums, inputs: Tensor, labels: Tensor | None, kind: str, generator: torch.Generator | None
) -> None:
    if not len(inputs):
        return
    logits = check_logits(squares(inputs), len(inputs))
    targets = choose_targets(kind, logits, labels, generator)
    if kind == "batch":
        squares.add_batch(inputs, targets)
    else:
        squares.add_per_sample(inputs, targets)
    name = squares.not_finite()
    if name is not None:
        raise ValueError(f"the squared gradient of parameter {name!r} is not finite")


def _unpack(batch: object, kind: str) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        batch = (batch,)
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) not in (1, 2)
        or not all(isinstance(part, Tensor) for part in batch)
    ):
        what = f"{type(batch).__name__}"
        if isinstance(batch, (tuple, list)):
            what += f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
        raise TypeError(f"a batch must be an inputs tensor or a pair of tensors (inputs, labels), got {what}")
    inputs = batch[0]
    if inputs.dim() == 0:
        raise ValueError("inputs must have a batch dimension, got a 0-dim tensor")
    if kind not in NEEDS_LABELS:
        return inputs, None
    if len(batch) == 1:
        raise ValueError(f"kind={kind!r} needs labels: let the loader yield (inputs, labels), or use kind='sampled'")
    labels = batch[1]
    if labels.dim() == 0 or len(labels) != len(inputs):
        raise ValueError(f"labels must have shape (batch,) = ({len(inputs)},), got {tuple(labels.shape)}")
    return inputs, labels


def _check_arguments(kind: object, loss: object, num_samples: object, loader: object, generator: object) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not available in this version: use one of {', '.join(map(repr, KINDS))}")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not available in this version: use {', '.join(map(repr, LOSSES))}")
    if num_samples is not None and (
        not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1
    ):
        raise ValueError(f"num_samples must be a positive integer or None, got {num_samples!r}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {type(loader).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def _expected_samples(loader: Iterable[Any], num_samples: int | None) -> int | None:
    """The progress bar's total: None where it is not known."""
    dataset = getattr(loader, "dataset", None)
    sizes = [num_samples, len(dataset) if isinstance(dataset, Sized) else None]
    return min((size for size in sizes if size is not None), default=None)


@contextmanager
def _batch_named(index: int) -> Iterator[None]:
    """Puts the batch's index before the message of an error in the data."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.args = (f"batch {index}: {error}",)
        raise


@contextmanager
def _isolated_rng(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Leaves the global random state as found if there is a generator for the labels."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
