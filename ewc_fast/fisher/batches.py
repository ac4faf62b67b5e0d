"""Batches as loaders yield them: tensors, pairs, dicts, nested; how a model is called with them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Call(NamedTuple):
    """A batch taken apart: ``model(*args, **kwargs)`` and what its output is compared with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None


def _plain(batch: Any) -> Any:
    """Mappings of other types (``BatchEncoding``) as dicts, which trees are made of."""
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(_plain(part) for part in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors detached, on ``device`` and fit for a graph."""

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or (t.device == device and not t.requires_grad and not t.is_inference()):
            return t
        return t.detach().to(device, non_blocking=True, copy=t.is_inference())

    if isinstance(batch, (tuple, list)) and all(isinstance(part, Tensor) for part in batch):
        return tuple(map(moved, batch))  # the usual pair, in a quarter of the time
    leaves, tree = tree_flatten(_plain(batch))
    return tree_unflatten([moved(t) for t in leaves], tree)


def check_no_row(batch: Any) -> None:
    """Raises for a row of a tokenised dataset, a single sample, whose tokens would pass for so many samples."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    numbers = isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], int)
    if numbers or (isinstance(ids, Tensor) and ids.dim() == 1):
        raise ValueError(
            "input_ids is one-dimensional: these are rows of a dataset: use "
            "ewc_fast.integrations.transformers.consolidate, or stack them into batches (a DataLoader with the "
            "tokenizer's collator does)"
        )


def batch_size(batch: Any) -> int:
    """The length of the first tensor's first dimension.

    Raises:
        TypeError: There is no tensor in it.
        ValueError: The first tensor has no dimension, or the batch is a row of a dataset.
    """
    check_no_row(batch)
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    tensors = [first] if isinstance(first, Tensor) else tree_flatten(_plain(batch))[0]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(
            "a batch must be an inputs tensor, a pair (inputs, labels) or a dict with tensors in it, got "
            f"{type(batch).__name__} without any; a tokenizer makes them with return_tensors='pt'"
        )
    if tensors[0].dim() == 0:
        raise ValueError("inputs must have a batch dimension, got a 0-dim tensor")
    return tensors[0].shape[0]


def by_sample(batch: Any, size: int) -> tuple[list[Any], Any, list[int]]:
    """A batch's leaves, the tree that they make, and which leaves have something for each of ``size`` samples.

    These are tensors with so many rows and lists of so many strings, as loaders' collators make them; what else there
    is belongs to all samples.
    """

    def is_strings(part: Any) -> bool:
        return isinstance(part, (list, tuple)) and len(part) == size and all(isinstance(s, str) for s in part)

    leaves, tree = tree_flatten(batch, is_leaf=is_strings)
    rows = [i for i, t in enumerate(leaves) if is_strings(t) or (isinstance(t, Tensor) and t.dim() and len(t) == size)]
    return leaves, tree, rows


def take(batch: Any, samples: slice, size: int) -> Any:
    """Some samples of a batch of ``size``; see :func:`by_sample`."""
    leaves, tree, rows = by_sample(batch, size)
    for i in rows:
        leaves[i] = leaves[i][samples]
    return tree_unflatten(leaves, tree)


def take_apart(batch: Any) -> Call:
    """How to call a model with a batch.

    Raises:
        TypeError: It is neither a tensor, nor a tuple of one or two, nor a dict.
    """
    if isinstance(batch, Tensor):
        return Call((batch,), {}, None)
    if isinstance(batch, Mapping):
        return Call((), {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels"))
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        what = (
            f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}" if isinstance(batch, tuple) else ""
        )
        raise TypeError(
            "a batch must be an inputs tensor, a pair (inputs, labels) or a dict with labels under 'labels', got "
            f"{type(batch).__name__}{what}"
        )
    inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"a batch must be a pair of (inputs, labels) with labels a tensor, got {type(labels).__name__}")
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs), labels)
    if isinstance(inputs, Tensor):
        return Call((inputs,), {}, labels)
    if isinstance(inputs, (tuple, list)) and inputs:
        return Call(tuple(inputs), {}, labels)
    raise TypeError(f"a batch must be a pair of tensors (inputs, labels), got {type(inputs).__name__} as inputs")


def is_packed(inputs: Mapping[str, Any], counted: Tensor | None = None) -> bool:
    """Whether a language model's inputs say that a row has several documents, as packing collators make them.

    Args:
        inputs: The model's keyword arguments.
        counted: (B, T) bool, the tokens whose labels count; before the first and after the last is padding.
    """
    positions, mask, of, ends = (inputs.get(k) for k in ("position_ids", "attention_mask", "seq_idx", "cu_seq_lens_q"))
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1:
        anew = positions.diff(dim=1) <= 0
        if isinstance(mask, Tensor) and mask.shape == positions.shape:
            anew = anew & (mask[:, :-1] != 0) & (mask[:, 1:] != 0)
        if counted is not None and counted.shape == positions.shape:
            counted = counted.to(anew.device)
            anew = anew & counted.flip(1).cumsum(1).flip(1)[:, 1:].bool() & counted.cumsum(1)[:, :-1].bool()
        if anew.any():
            return True
    if isinstance(of, Tensor) and of.dim():
        of = of.reshape(-1, of.shape[-1])
        if bool(((of != of[:, :1]) & (of >= 0)).any()):
            return True
    rows = next((len(t) for t in inputs.values() if isinstance(t, Tensor) and t.dim() > 1), 1)
    return isinstance(ends, Tensor) and ends.numel() > rows + 1


# ---- so many samples of a loader ----


def check_loader(loader: object, num_samples: object) -> None:
    """Raises if there is nothing to iterate over, or no such number of samples."""
    if num_samples is not None and (
        not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1
    ):
        raise ValueError(f"num_samples must be a positive integer or None, got {num_samples!r}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {type(loader).__name__}")


def first(batch: Any, count: int) -> Any:
    """At most ``count`` samples; what is no batch is left for others to name."""
    try:
        size = batch_size(batch)
    except (TypeError, ValueError):
        return batch
    return batch if size <= count else take(to_device(batch, torch.device("cpu")), slice(0, count), size)


def expected_samples(loader: Iterable[Any], num_samples: int | None) -> int | None:
    """The progress bar's total: None where it is not known."""
    found = None
    if isinstance(loader, (list, tuple)):
        try:
            found = sum(map(batch_size, loader))
        except (TypeError, ValueError):  # which the estimate will name
            return num_samples
    else:
        size = getattr(loader, "batch_size", None)
        places = [getattr(loader, "sampler", None)] if size else []  # with a batch sampler of one's own it says nothing
        sized = [place for place in (*places, getattr(loader, "dataset", None)) if isinstance(place, Sized)]
        if sized and (size or not hasattr(loader, "batch_sampler")):
            found = len(sized[0])
            found -= found % size if size and getattr(loader, "drop_last", False) else 0
    return min((size for size in (num_samples, found) if size is not None), default=None)


def warn(message: str) -> None:
    """At the line of whoever called this package, at whatever depth."""
    level, frame = 1, sys._getframe()
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] == __package__.partition(".")[0]
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
