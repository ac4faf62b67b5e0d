"""``convert_lambda``: what lambda of another code base means here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast.checks import check_count
from ewc_fast.fisher import FisherDiagonal, clip, estimate_fisher
from ewc_fast.fisher.batches import take_apart
from ewc_fast.fisher.objectives import logits_of
from ewc_fast.functional import check_lambda

_PYCIL_LARGEST = 1e-4  # fishermax
_FACIL_ALPHA = 0.5  # --alpha
Losses = str | Callable[[nn.Module, Any], Tensor]


class ConvertedLambda(NamedTuple):
    """What :func:`ewc_fast.convert_lambda` returns: the arguments that make this package's penalty the other one's.

    Attributes:
        ewc_lambda: For :class:`ewc_fast.EWCLoss`, as are ``mode`` and ``gamma``.
        mode: How the other code base adds tasks up.
        gamma: How much of the old Fisher stays at a merge.
        kind: Which estimate its importances are, for :func:`ewc_fast.estimate_fisher`, as is ``loss``.
        loss: ``"cross_entropy"``, or that with the other code base's labels or weights, as a callable.
        max_fisher: What it bounds the Fisher of each task by, in this package's unit; None where it does not.
    """

    ewc_lambda: float
    mode: str
    gamma: float
    kind: str
    loss: Losses = "cross_entropy"
    max_fisher: float | None = None

    def estimate_fisher(self, model: nn.Module, loader: Iterable[Any], **options: Any) -> FisherDiagonal:
        """Estimates a finished task's Fisher as the other code base would, for ``consolidate(fisher=...)``.

        Args:
            model: The model.
            loader: The task's data, in batches of the size that was converted.
            **options: Other arguments of :func:`ewc_fast.estimate_fisher`; they go before ``kind`` and ``loss``.

        Returns:
            The diagonal, in this package's unit.
        """
        fisher = estimate_fisher(model, loader, **({"kind": self.kind, "loss": self.loss} | options))
        if self.max_fisher is not None:
            fisher = clip(fisher, max_value=self.max_fisher)
        if callable(self.loss) and fisher.info is not None:  # these two are no log-likelihoods
            fisher = FisherDiagonal(fisher, replace(fisher.info, is_fisher=False))
        return fisher


def convert_lambda(
    source: str,
    value: float,
    batch_size: int | None = None,
    *,
    gamma: float | None = None,
    num_samples: int | None = None,
    num_tasks: int | None = None,
) -> ConvertedLambda:
    """Turns the lambda of another code base into this package's, with the Fisher, mode and gamma that belong to it.

    With v the value, I its importances, B the batch size, g_b the gradient of the mean loss of batch b and g_n that of
    sample n; ``kind="batch"`` here is B times the mean of g_b^2:

    - ``"avalanche"``: ``v sum I d^2``, I the mean of g_b^2: lambda = 2 v / B. A penalty for each task (``separate``)
      or, with its ``decay_factor``, ``online`` with that as gamma.
    - ``"capymoa"``: ``v/2 sum I d^2``, I the mean of g_b^2: lambda = v / B, ``online`` with its ``gamma``.
    - ``"facil"``: ``v/2 sum I d^2``, ``I = alpha I + (1 - alpha) I_new`` from 0, I_new the mean of g_b^2 of predicted
      labels: lambda = (1 - alpha) v / B, ``online`` with gamma = alpha.
    - ``"gmvandeven"``: ``v/2 sum I d^2`` for each task, I the mean of g_n^2 over all labels: lambda = v, ``separate``.
      Online ``v/2 gamma sum I d^2`` with gamma at the merge too: lambda = gamma v, ``online`` with that gamma.
    - ``"listing"``: ``v sum I d^2`` for each task, I the mean of g_n^2: lambda = 2 v, ``separate``; with a batch size I
      is the mean of g_b^2: lambda = 2 v / B.
    - ``"mammoth"``: ``v sum I d^2``, I the mean of g_n^2 weighted by the label's probability: lambda = 2 v, ``online``
      with its ``gamma``.
    - ``"moskomule"``: ``v sum I d^2``, I the mean of g_n^2 of predicted labels: lambda = 2 v, ``latest``.
    - ``"pycil"``: ``v/2 sum I d^2``, ``I = (1 - 1/t) I + 1/t I_new`` at the t-th task, I_new the mean of g_b^2, at most
      1e-4: lambda = v / (B t), ``online`` with gamma = 1, each task's Fisher at most 1e-4 B.

    Then the penalties and their gradients are equal, up to what is said under ``batch_size``, ``num_samples`` and
    ``num_tasks`` and to what no lambda makes up for: FACIL and PyCIL take their Fisher in training mode (BatchNorm,
    dropout), FACIL protects no heads (leave them out with ``params=``), and PyCIL does not average the rows of classes
    that are new.

    The formulas are those of Avalanche 0.6 (``EWCPlugin``), CapyMOA (``ocl.strategy.EWC``), FACIL
    (``approach/ewc.py``), GMvandeVen/continual-learning (``continual_learner.py``), Mammoth (``ewc_on``),
    moskomule/ewc.pytorch and PyCIL (``models/ewc.py``), as their public sources had them in May 2026. ``listing`` is
    the one of many tutorials: the sum without the 1/2.

    Args:
        source: One of those above, in any case.
        value: Its lambda.
        batch_size: Samples in a batch of *its Fisher's* loader: Avalanche's ``train_mb_size``, CapyMOA's
            ``fim_batch_size``, GMvandeVen's ``--fisher-batch`` (1 if None; above 1 it squares batch means of
            ``--fisher-labels true``, and lambda is divided by it), PyCIL's ``batch_size``. Sources that take one sample
            at a time do not need it. A smaller last batch counts less here than there.
        gamma: Its factor of the old Fisher: Avalanche's ``decay_factor`` (None: mode ``separate``), CapyMOA's and
            Mammoth's ``gamma`` (None: 1), FACIL's ``alpha`` (None: its 0.5), GMvandeVen's ``--gamma`` (None:
            ``--offline``, which its ``--ewc`` implies).
        num_samples: Samples in the Fisher's data, for the sources that divide by something else: Mammoth by batches
            times batch size, GMvandeVen by one less where it takes the whole dataset. None: as if they did not.
        num_tasks: PyCIL only: tasks consolidated so far, of as many classes each; 1 if None. Its merge averages over
            the tasks, so set ``ewc.ewc_lambda`` anew after each ``consolidate``.

    Returns:
        lambda, mode, gamma, kind, loss and bound.

    Raises:
        ValueError: ``source`` is not known; names those that are. ``batch_size`` is missing where it is needed, or
            ``gamma``, ``num_samples`` or ``num_tasks`` given where there is no such thing; one of them is out of range.
        TypeError: ``value``, ``gamma`` or ``source`` is of the wrong type.
    """
    known = ", ".join(map(repr, _SOURCES))
    if not isinstance(source, str):
        raise TypeError(f"source must be a name, got {type(source).__name__}; known are {known}")
    convention = _SOURCES.get(source.lower())
    if convention is None:
        raise ValueError(f"source {source!r} is not known; known are {known}")
    where = f"source {source.lower()!r}"
    if convention.needs_batch_size and batch_size is None:
        raise ValueError(f"{where} squares gradients of batch means: batch_size, that of its Fisher, is needed")
    given = {"gamma": gamma, "num_samples": num_samples, "num_tasks": num_tasks}
    for name, argument in given.items():
        if argument is not None and name not in convention.takes:
            raise ValueError(f"{where} has no use for {name}: leave it out")
    for name, count in (("batch_size", batch_size), ("num_samples", num_samples), ("num_tasks", num_tasks)):
        if count is not None:
            check_count(count, name)
    if gamma is not None and check_lambda(gamma, "gamma") > 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")
    arguments = {name: given[name] for name in convention.takes}
    return convention.convert(check_lambda(value, "value"), batch_size, **arguments)


# ---- the conventions ----


def _avalanche(v: float, size: int, gamma: float | None) -> ConvertedLambda:
    """v sum I d^2, I = F/B."""
    mode = "separate" if gamma is None else "online"
    return ConvertedLambda(2 * v / size, mode, 1.0 if gamma is None else gamma, "batch")


def _capymoa(v: float, size: int, gamma: float | None) -> ConvertedLambda:
    """v/2 sum I d^2, I = gamma I + F/B."""
    return ConvertedLambda(v / size, "online", 1.0 if gamma is None else gamma, "batch")


def _facil(v: float, size: int, gamma: float | None) -> ConvertedLambda:
    """v/2 sum I d^2, I = alpha I + (1 - alpha) F/B from I = 0: (1 - alpha)/B times what gamma = alpha gives."""
    alpha = _FACIL_ALPHA if gamma is None else gamma
    return ConvertedLambda((1 - alpha) * v / size, "online", alpha, "batch", predicted_label_loss)


def _gmvandeven(v: float, size: int | None, gamma: float | None, num_samples: int | None) -> ConvertedLambda:
    """v/2 sum I d^2 with I = F, or in batches F/B, each times n/(n - 1) for n batches; online gamma v/2 sum I d^2."""
    size = size or 1
    batches = None if num_samples is None else math.ceil(num_samples / size)
    if batches == 1:
        raise ValueError("num_samples makes one batch, with which source 'gmvandeven' divides by 0: it takes two")
    v *= (1 if batches is None else batches / (batches - 1)) / size
    kind = "exact" if size == 1 else "batch"
    if gamma is None:
        return ConvertedLambda(v, "separate", 1.0, kind)
    return ConvertedLambda(gamma * v, "online", gamma, kind)


def _listing(v: float, size: int | None) -> ConvertedLambda:
    """v sum I d^2, I = F or, of batches, F/B."""
    if size is None:
        return ConvertedLambda(2 * v, "separate", 1.0, "empirical")
    return ConvertedLambda(2 * v / size, "separate", 1.0, "batch")


def _mammoth(v: float, size: int | None, gamma: float | None, num_samples: int | None) -> ConvertedLambda:
    """v sum I d^2, I = gamma I + F N / (B ceil(N/B)), with F weighted by the labels' probabilities."""
    share = 1.0
    if num_samples is not None:
        if size is None:
            raise ValueError("source 'mammoth' divides by batches times batch_size: num_samples needs batch_size too")
        share = num_samples / (size * math.ceil(num_samples / size))
    return ConvertedLambda(
        2 * v * share, "online", 1.0 if gamma is None else gamma, "empirical", likelihood_weighted_loss
    )


def _moskomule(v: float, size: int | None) -> ConvertedLambda:
    """v sum I d^2, I = F."""
    return ConvertedLambda(2 * v, "latest", 1.0, "predicted")


def _pycil(v: float, size: int, num_tasks: int | None) -> ConvertedLambda:
    """v/2 sum I d^2, I = (1 - 1/t) I + 1/t min(F/B, 1e-4): 1/(B t) times the sum of min(F, 1e-4 B) over the tasks."""
    return ConvertedLambda(v / (size * (num_tasks or 1)), "online", 1.0, "batch", max_fisher=_PYCIL_LARGEST * size)


@dataclass(frozen=True)
class _Convention:
    convert: Callable[..., ConvertedLambda]
    takes: tuple[str, ...] = ()
    needs_batch_size: bool = True


_SOURCES = {
    "avalanche": _Convention(_avalanche, ("gamma",)),
    "capymoa": _Convention(_capymoa, ("gamma",)),
    "facil": _Convention(_facil, ("gamma",)),
    "gmvandeven": _Convention(_gmvandeven, ("gamma", "num_samples"), needs_batch_size=False),
    "listing": _Convention(_listing, needs_batch_size=False),
    "mammoth": _Convention(_mammoth, ("gamma", "num_samples"), needs_batch_size=False),
    "moskomule": _Convention(_moskomule, needs_batch_size=False),
    "pycil": _Convention(_pycil, ("num_tasks",)),
}


# ---- losses that are no likelihood of a label that is given or drawn ----


def likelihood_weighted_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mammoth's: a classifier's losses of the given labels, (B,), times the constant sqrt(p) with p the label's
    probability, so that their squared gradients are weighted by p.

    Raises:
        ValueError: The batch has no labels.
    """
    logits, labels = _logits_and_labels(model, batch)
    if labels is None:
        raise ValueError("the batch has no labels: the loader must yield (inputs, labels), or dicts with 'labels'")
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses * (-losses.detach() / 2).exp()


def predicted_label_loss(model: nn.Module, batch: Any) -> Tensor:
    """FACIL's: a classifier's losses of its own most likely labels, (B,)."""
    logits, _ = _logits_and_labels(model, batch)
    return F.cross_entropy(logits, logits.argmax(1), reduction="none")


def _logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    call = take_apart(batch)
    return logits_of(model(*call.args, **call.kwargs)), call.labels
