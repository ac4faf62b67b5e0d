"""What is often done to a Fisher diagonal before it is used: average, normalize, clip, damp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.ops.types import STATE_DTYPES

NORMS = ("unit_trace", "unit_mean", "unit_max")


def average(fishers: Iterable[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> FisherDiagonal:
    """The weighted mean of several diagonals, summed in fp64.

    Args:
        fishers: Diagonals of the same names and shapes.
        weights: Non-negative, one for each; only their ratios matter. None for the terms that each was estimated on,
            where all say so (``info.num_terms``): the mean is then the diagonal over all their data together. Else
            equal weights.

    Returns:
        The mean, in the widest dtype that a parameter's diagonals have, at least fp32, on the first one's device.
        ``info`` adds up the samples and terms, joins what differs with ``+`` and is None if one has none.

    Raises:
        ValueError: No diagonal, a name or shape that is not in all, different units, malformed weights, a negative, NaN
            or infinite entry.
        TypeError: One of ``fishers`` is no mapping.
    """
    fishers = list(fishers)
    if not fishers:
        raise ValueError("fishers is empty: average needs at least one diagonal")
    first = fishers[0]
    for position, fisher in enumerate(fishers):
        _check(fisher, f"fishers[{position}]")
        wrong = sorted(first.keys() ^ fisher.keys())
        if wrong:
            raise ValueError(f"fishers[{position}] and fishers[0] differ in {wrong[0]}: average needs the same names")
        for name, tensor in fisher.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} in fishers[{position}] and {tuple(first[name].shape)} in "
                    "fishers[0]"
                )
    infos = [info for info in map(_info, fishers) if info is not None]
    known = len(infos) == len(fishers)
    units = list(dict.fromkeys(info.unit for info in infos))
    if len(units) > 1:
        raise ValueError(f"fishers have the units {', '.join(units)}: normalize them first")
    if weights is None:
        counted = known and all(info.num_terms for info in infos)
        weights = [info.num_terms for info in infos] if counted else [1.0] * len(fishers)
    if len(weights) != len(fishers):
        raise ValueError(f"weights must have one entry for each of the {len(fishers)} fishers, got {len(weights)}")
    total = math.fsum(weights)
    if not all(0 <= weight < math.inf for weight in weights) or not total:
        raise ValueError(f"weights must be finite, not negative and not all 0, got {list(weights)}")

    tensors = {}
    for name, tensor in first.items():
        mean = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        dtype = torch.float32
        for fisher, weight in zip(fishers, weights, strict=True):
            mean.add_(fisher[name].detach().to(mean), alpha=weight / total)
            dtype = torch.promote_types(dtype, fisher[name].dtype)
        tensors[name] = mean.to(dtype)
    return FisherDiagonal(tensors, _joined(infos) if known else None)


def normalize(fisher: Mapping[str, Tensor], to: str = "unit_trace", by_layer: bool = False) -> FisherDiagonal:
    """Scales a diagonal, so that lambda means the same whatever the diagonal's size.

    Args:
        fisher: The diagonal; it is not changed.
        to: ``"unit_trace"``: all entries sum to 1; ``"unit_mean"``: their mean is 1; ``"unit_max"``: the largest is 1.
        by_layer: Do so for each layer, a module with the parameters that it owns itself, rather than for the whole
            model. A layer that is zero everywhere stays so.

    Returns:
        The scaled diagonal. It is no Fisher any more (``info.is_fisher`` is False, the unit ``"none"``): a forgetting
        predicted from it has no unit.

    Raises:
        ValueError: Another ``to``, no entry, a diagonal that is zero everywhere, a negative, NaN or infinite entry.
        TypeError: ``fisher`` is no mapping.
    """
    if to not in NORMS:
        raise ValueError(f"to must be one of {', '.join(map(repr, NORMS))}, got {to!r}")
    _check(fisher)
    if not any(tensor.any() for tensor in fisher.values()):
        raise ValueError("the Fisher is zero everywhere: it has no scale to normalize")

    size = {"unit_trace": _total, "unit_mean": _mean, "unit_max": _largest}[to]

    def scaled(layer: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = size(list(layer.values())) or 1.0
        return {name: (tensor.double() / scale).to(tensor.dtype) for name, tensor in layer.items()}

    return _by_layer(fisher, scaled, by_layer, f"normalize({to})", is_fisher=False, unit="none")


def clip(
    fisher: Mapping[str, Tensor],
    *,
    quantile: float | None = None,
    max_value: float | None = None,
    by_layer: bool = False,
) -> FisherDiagonal:
    """Bounds the entries of a diagonal, which a few weights often dominate by orders of magnitude.

    Args:
        fisher: The diagonal; it is not changed.
        quantile: Bound the entries by this quantile of them, in [0, 1], taken exactly and interpolated linearly as
            :func:`torch.quantile` does, but over any number of entries (one copy of them is needed).
        max_value: Bound them by this value. One of the two must be given.
        by_layer: Take the quantile of each layer, a module with the parameters that it owns itself, rather than of the
            whole model.

    Returns:
        The clipped diagonal, in the same unit: a forgetting predicted from it is a lower bound of what the whole
        diagonal predicts.

    Raises:
        ValueError: Both or none of ``quantile`` and ``max_value``, one that is out of range, no entry, a negative, NaN
            or infinite entry.
        TypeError: ``fisher`` is no mapping.
    """
    _exactly_one(quantile=quantile, max_value=max_value)
    _check_range("quantile", quantile, 1)
    _check_range("max_value", max_value, math.inf)
    _check(fisher)

    def clipped(layer: dict[str, Tensor]) -> dict[str, Tensor]:
        bound = max_value if quantile is None else _quantile(list(layer.values()), quantile)
        return {name: tensor.clamp(max=bound) for name, tensor in layer.items()}

    return _by_layer(fisher, clipped, by_layer, "clip")


def damp(
    fisher: Mapping[str, Tensor],
    *,
    mean: float | None = None,
    quantile: float | None = None,
    value: float | None = None,
    by_layer: bool = False,
) -> FisherDiagonal:
    """Adds a constant to a diagonal, so that no weight is entirely free: EWC plus L2-SP.

    ``EWCLoss(damping=)`` does the same as ``mean=`` at no cost, can be changed at any time and leaves the Fisher as it
    is; this is for a constant by quantile or by layer.

    Args:
        fisher: The diagonal; it is not changed.
        mean: Add this many times the mean of the entries.
        quantile: Add this quantile of the entries, as in :func:`clip`.
        value: Add this. One of the three must be given.
        by_layer: Take the mean or quantile of each layer, a module with the parameters that it owns itself, rather than
            of the whole model.

    Returns:
        The damped diagonal. It is no Fisher any more (``info.is_fisher`` is False): the constant is a choice, and no
        loss of an old task rises by it.

    Raises:
        ValueError: Not exactly one of ``mean``, ``quantile`` and ``value``, one that is out of range, no entry, a
            negative, NaN or infinite entry.
        TypeError: ``fisher`` is no mapping.
    """
    _exactly_one(mean=mean, quantile=quantile, value=value)
    _check_range("mean", mean, math.inf)
    _check_range("quantile", quantile, 1)
    _check_range("value", value, math.inf)
    _check(fisher)

    def damped(layer: dict[str, Tensor]) -> dict[str, Tensor]:
        delta = 0.0 if value is None else value
        if mean is not None:
            delta = mean * _mean(list(layer.values()))
        if quantile is not None:
            delta = _quantile(list(layer.values()), quantile)
        return {name: tensor + delta for name, tensor in layer.items()}

    return _by_layer(fisher, damped, by_layer, "damp", is_fisher=False)


def _by_layer(
    fisher: Mapping[str, Tensor],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    by_layer: bool,
    step: str,
    **info_changes: Any,
) -> FisherDiagonal:
    """Applies ``change`` to the whole diagonal or to each layer, and notes it in the method. In fp32 where the dtype is
    none that a Fisher is kept in: integers and fp16 would lose the small entries."""
    layers: dict[str, dict[str, Tensor]] = {}
    changed = {}
    for name, tensor in fisher.items():
        tensor = tensor.detach().to(tensor.dtype if tensor.dtype in STATE_DTYPES else torch.float32)
        if tensor.numel():
            layers.setdefault(name.rpartition(".")[0] if by_layer else "", {})[name] = tensor
        else:
            changed[name] = tensor.clone()
    for layer in layers.values():
        changed |= change(layer)
    info = _info(fisher)
    if info is not None:
        info = replace(info, method=f"{info.method}+{step}{'(by layer)' if by_layer else ''}", **info_changes)
    return FisherDiagonal({name: changed[name] for name in fisher}, info)


def _info(fisher: Mapping[str, Tensor]) -> FisherInfo | None:
    return fisher.info if isinstance(fisher, FisherDiagonal) else None


def _joined(infos: Sequence[FisherInfo]) -> FisherInfo:
    def join(values: Iterable[str]) -> str:
        return "+".join(dict.fromkeys(values))

    return FisherInfo(
        kind=join(info.kind for info in infos),
        loss=join(info.loss for info in infos),
        unit=infos[0].unit,
        num_samples=sum(info.num_samples for info in infos),
        num_terms=sum(info.num_terms for info in infos),
        batch_size=max(info.batch_size for info in infos),
        method=join(info.method for info in infos) + "+average",
        is_fisher=all(info.is_fisher for info in infos),
    )


def _total(tensors: Sequence[Tensor]) -> float:
    return math.fsum(tensor.sum(dtype=torch.float64).item() for tensor in tensors)


def _largest(tensors: Sequence[Tensor]) -> float:
    return max(tensor.max().item() for tensor in tensors)


def _mean(tensors: Sequence[Tensor]) -> float:
    return _total(tensors) / sum(tensor.numel() for tensor in tensors)


def _quantile(tensors: Sequence[Tensor], quantile: float) -> float:
    """A quantile of all entries, interpolated linearly; without :func:`torch.quantile`'s limit of 16M entries."""
    values = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
    position = quantile * (len(values) - 1)
    below = math.floor(position)
    low = values.kthvalue(below + 1).values.item()
    if position == below:
        return low
    high = values.kthvalue(below + 2).values.item()
    return low + (position - below) * (high - low)


def _check(fisher: Mapping[str, Tensor], what: str = "fisher") -> None:
    if not isinstance(fisher, Mapping):
        raise TypeError(f"{what} must be a mapping from names to tensors, got {type(fisher).__name__}")
    if not any(tensor.numel() for tensor in fisher.values()):
        raise ValueError(f"{what} has no entries")
    for name, tensor in fisher.items():
        if not (tensor.isfinite() & (tensor >= 0)).all():
            raise ValueError(f"{what}: {name} has a negative, NaN or infinite entry")


def _exactly_one(**options: float | None) -> None:
    given = [name for name, option in options.items() if option is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(options)}, got {' and '.join(given) or 'none'}")


def _check_range(name: str, number: float | None, largest: float) -> None:
    if number is not None and not 0 <= number <= min(largest, torch.finfo(torch.float64).max):
        raise ValueError(f"{name} must be in [0, {largest:g}] and finite, got {number}")
