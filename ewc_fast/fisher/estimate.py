"""``estimate_fisher``: the diagonal of a model's Fisher information over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ewc_fast.fisher.batches import check_loader, expected_samples, first, warn
from ewc_fast.fisher.diagonal import FisherDiagonal
from ewc_fast.fisher.estimator import FisherEstimator, isolated_rng, one_at_a_time
from ewc_fast.fisher.modes import module_mode


@one_at_a_time
def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    kind: str = "sampled",
    loss: str | Callable[..., Tensor] = "cross_entropy",
    num_samples: int | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
    *,
    num_label_samples: int = 1,
    logits_transform: Callable[[Tensor], Tensor] | None = None,
    params: Any = None,
    out: Mapping[str, Tensor] | None = None,
) -> FisherDiagonal:
    """Estimates the diagonal of the Fisher information of a model at its current weights.

    The Fisher is the mean over samples of the squared gradient of *one sample's* log-likelihood (Kirkpatrick et al.
    2017; Martens 2020, section 5). The kinds differ in the labels:

    - ``"exact"``: the expectation over all classes, ``sum_c p_c (d log p_c)^2``; one backward per class but one (the
      factor of the classes' covariance in Tanabe and Sagae 1992 has so many columns).
    - ``"sampled"``: one label per sample drawn from the model; unbiased, and about as cheap as ``"empirical"``.
    - ``"empirical"``: the given labels. Equal to the Fisher only where the model fits the data's distribution
      (Kunstner et al. 2019 show how far apart they may be).
    - ``"predicted"``: the model's own most likely label.
    - ``"reversed"``: the given labels after the logits are negated (EWC-DR, arXiv:2603.18596, 2026); an importance, not
      a Fisher's unit.
    - ``"batch"``: ``sum_b N_b^2 g_b^2 / sum_b N_b`` with ``g_b`` the gradient of the mean loss of batch b, of N_b
      samples, on the given labels: one backward per batch. Biased: where the samples' gradients have the mean mu, it
      exceeds ``"empirical"`` by about ``(N_b - 1) mu^2``, which is small near an optimum only.

    Van de Ven 2025 compares these choices for EWC and advises against ``"batch"``.

    The losses, each with its unit (a term of the mean that users look at):

    - ``"cross_entropy"``: labels (B,) with logits (B, C): the sample; kinds that take the model's own labels do not
      look at given ones, but for an ``ignore_index`` other than -100. Labels (B, T) with logits (B, T, C) (token
      classification, sequence to sequence): the counted label; -100 does not count.
    - ``"causal_lm"``: logits at t against the label at t + 1: the token. Labels are those of the batch, else
      ``input_ids``; -100, what ``attention_mask`` leaves out and a first token after padding do not count. The square
      is that of each sequence's *summed* log-likelihood, summed over sequences and divided by all counted tokens.
    - ``"binary_cross_entropy"``: log-likelihood summed over labels; ``"gaussian"``: unit variance, summed over outputs
      (``MSELoss`` rises by 2/D of it): the sample.
    - ``nn.CrossEntropyLoss`` (with ``ignore_index`` and, for given labels, ``label_smoothing``),
      ``nn.BCEWithLogitsLoss``; or a callable ``loss(model, batch)`` that returns a loss for each sample, for
      ``"empirical"`` and ``"batch"``.

    The model is in evaluation mode meanwhile. Its training flags, buffers, gradients and ``requires_grad`` flags are
    left as they were, also when an error is raised. How gradients are taken is described at :class:`FisherEstimator`.

    Args:
        model: Treats the samples of a batch, dimension 0, independently; returns logits, or something with ``.logits``.
        loader: Yields batches: an inputs tensor; ``(inputs, labels)``, where inputs may be a tuple of arguments or a
            dict; or a dict with labels under ``"labels"``. They are moved to the model's device.
        kind: See above.
        loss: See above.
        num_samples: Stop after exactly so many samples, the last batch cut; None for the whole loader. If the loader
            has fewer, those are used, with a warning.
        progress: Show a progress bar.
        generator: Source of the sampled labels. If given, the global random state is left as it was found, also by the
            loader's shuffling. None for the global random state.
        num_label_samples: Labels drawn for each term, kind ``"sampled"``.
        logits_transform: Applied to the model's logits first, and differentiated through.
        params: Names, shell patterns or parameters to estimate for; None for all that require grad.
        out: Tensors by parameter name to make the estimate in, with any strides; of the dtypes below. After an error
            they hold whatever was in the making.

    Returns:
        A read-only mapping from the model's own parameter names to tensors shaped like the parameter, on its device,
        fp32 (fp64 for fp64 parameters); frozen parameters are left out, tied ones are there once. ``.info`` records how
        it was made.

    Raises:
        ValueError: A kind or loss that is not available, ``num_samples`` below 1, a model without trainable parameters,
            an empty loader, a batch in which nothing counts or whose rows have several documents, labels that are
            missing, malformed or out of range, logits of a shape that the loss does not take, a loss or a gradient that
            is not finite.
        TypeError: A loader that cannot be iterated, a batch that is neither a tensor nor (inputs, labels), logits that
            are no tensor, a generator that is none.

    References:
        Tanabe and Sagae, "An exact Cholesky decomposition and the generalized inverse of the variance-covariance matrix
        of the multinomial distribution, with applications", Journal of the Royal Statistical Society B, 1992.
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
        Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.
        Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient descent", NeurIPS 2019.
        van de Ven, "On the computation of the Fisher information in continual learning", arXiv:2502.11756, 2025.
    """
    check_loader(loader, num_samples)
    estimator = FisherEstimator(
        model,
        kind,
        loss,
        generator,
        num_label_samples=num_label_samples,
        logits_transform=logits_transform,
        params=params,
        out=out,
    )
    return estimate(estimator, loader, num_samples, progress, "Fisher", generator)


def estimate(
    estimator: FisherEstimator,
    loader: Iterable[Any],
    num_samples: int | None,
    progress: bool,
    what: str,
    generator: torch.Generator | None = None,
) -> FisherDiagonal:
    """An estimator's result from a loader's batches; ``what`` is the progress bar's."""
    with (
        isolated_rng(generator, estimator.device),
        module_mode(estimator.model, training=False),  # here, so that not every batch has to switch it
        tqdm(total=expected_samples(loader, num_samples), desc=what, unit="sample", disable=not progress) as bar,
    ):
        for batch in loader:
            if num_samples is not None:
                batch = first(batch, num_samples - estimator.num_samples)
            before = estimator.num_samples
            estimator.update_in_isolation(batch)
            bar.update(estimator.num_samples - before)
            if estimator.num_samples == num_samples:
                break
    fisher = estimator.result(final=True)
    found = estimator.num_samples
    if num_samples is not None and found < num_samples:
        warn(f"num_samples is {num_samples}, but the loader has only {found} samples: they were all used")
    return fisher
