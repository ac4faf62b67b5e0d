"""A Fisher diagonal at no cost: the second moment that Adam has kept during training."""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.layout import own_name, trainable_parameters
from ewc_fast.optim.attach import had_coupled_penalty

MOMENT = "exp_avg_sq"
CHECKPOINT_FILES = ("optimizer.pt", "optimizer.bin")

_FACTORED = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})
_BITSANDBYTES = frozenset({"state1", "state2"})
_ESTIMATE = "estimate it with estimate_fisher instead"
# What the Hugging Face Trainer's newer versions exempt from weight decay, by the parameter's name.
_NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def fisher_from_optimizer(
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | str | os.PathLike[str],
    terms_per_step: float,
    model: nn.Module | None = None,
) -> FisherDiagonal:
    """Takes Adam's second moment as the diagonal of the Fisher information.

    ``F = terms_per_step * exp_avg_sq / (1 - beta2^step)``: the moving average of the squared gradient of a step's mean
    loss, bias-corrected, times the terms of that mean, which brings it to the unit of the mean loss (one term). It
    costs nothing, and is what ``kind="batch"`` of :func:`ewc_fast.estimate_fisher` would give over about the last
    ``1 / (1 - beta2)`` steps, at the weights of those steps and with the given labels. Biased like that one: where the
    terms' gradients have the mean mu, it is about ``(terms_per_step - 1) mu^2`` too large, which is small near an
    optimum only.

    What the moment cannot tell: after gradient clipping it is the clipped gradients' (the Hugging Face Trainer clips
    at a norm of 1 unless told otherwise), hence too small, by the square of the factor; whatever was added to the
    gradient is in it, as coupled weight decay or a penalty: warned of are weight decay that the optimizer shows and,
    of a live optimizer, an EWC penalty that was attached as ``"coupled"``, now or before, but not one in the loss or by
    ``accumulate_grad_`` (``"proximal"`` leaves the gradient alone); and terms within a sequence or a duplicated batch
    are counted as if independent.

    Args:
        optimizer: An optimizer that keeps ``exp_avg_sq`` in fp32 or fp64 with a step and ``betas`` (Adam, AdamW, NAdam,
            RAdam and their like, ``amsgrad``, ``fused``, ``foreach``, ``capturable`` and ``maximize`` included); or its
            ``state_dict()``; or a file that holds one, or the folder of a Hugging Face Trainer's checkpoint, whose
            ``optimizer.pt`` is read with ``torch.load(weights_only=True)``. A state dict without names is mapped to the
            model by the order of ``model.parameters()``, or by the Trainer's two groups (with and without weight
            decay); numbers and shapes must fit one of them, and only one.
        terms_per_step: Number of terms in the mean loss of one optimizer step: batch size x gradient accumulation x
            ranks, in counted tokens for a language model (their average if it varies).
        model: The model that was trained, with the same parameters frozen as in training. It gives the names; a live
            optimizer that was made from ``model.named_parameters()`` (torch 2.6 or later) knows them itself.

    Returns:
        A read-only mapping from the model's own parameter names to tensors shaped like the parameter, on its device,
        fp32 (fp64 for fp64 moments); frozen parameters are left out, tied ones are there once. ``.info`` has the kind
        ``"optimizer"`` and the unit ``"term"``; ``num_terms`` counts the terms of the steps that the moment remembers,
        ``terms_per_step * (1 - beta2^step) / (1 - beta2)``; samples are not known: 0.

    Raises:
        ValueError: ``terms_per_step`` below 1; an optimizer without such a moment, or with one that is factored
            (Adafactor), in 8 bits, bf16 or fp16 (rounding stalls a bf16 moving average well above its true value), not
            finite or negative; a parameter that the optimizer does not hold, that has made no step or has another
            shape; a state dict that does not fit the model; a file that cannot be read.
        TypeError: ``optimizer`` is none of the above.
        FileNotFoundError: There is no such file, or none in the folder.

    References:
        Li et al., "Fishers for free? Approximating the Fisher information matrix by recycling the squared gradient
        accumulator", arXiv:2507.18807, 2025.
    """
    if isinstance(terms_per_step, bool) or not isinstance(terms_per_step, (int, float)):
        raise ValueError(f"terms_per_step must be a number, got {type(terms_per_step).__name__}")
    if not 1 <= terms_per_step < math.inf:
        raise ValueError(f"terms_per_step must be at least 1 and finite, got {terms_per_step}")
    params = _named(optimizer) if model is None else trainable_parameters(model)
    if not params:
        raise ValueError("no parameter of the model requires grad: call requires_grad_(True) on what was trained")
    entries = _entries(optimizer, params, model)

    keys = {key for state, _ in entries.values() for key in state}
    if keys & _FACTORED:
        raise ValueError(
            "the optimizer's second moment is factored into rows and columns (Adafactor), which has no value for the "
            f"single weight: {_ESTIMATE}"
        )
    if keys & _BITSANDBYTES:
        raise ValueError(f"the optimizer's state is bitsandbytes', whose second moment may be 8-bit: {_ESTIMATE}")
    if keys and MOMENT not in keys:
        raise ValueError(
            f"the optimizer keeps no {MOMENT} (it keeps {', '.join(sorted(map(str, keys)))}): only Adam's family does; "
            f"{_ESTIMATE}"
        )
    # torch before 2.7 does not write into the group of Adam and AdamW which of the two it is.
    decoupled = False if type(optimizer) is torch.optim.Adam else None
    decayed = [
        name
        for name, (_, group) in entries.items()
        if group.get("weight_decay", 0) and group.get("decoupled_weight_decay", decoupled) is False and name in params
    ]
    corrections = {name: _correction(name, entries.get(name), parameter) for name, parameter in params.items()}
    tensors = {
        name: (entries[name][0][MOMENT].detach() * (terms_per_step / corrections[name])).to(parameter.device)
        for name, parameter in params.items()
    }
    _check_values(tensors)
    if decayed:
        warnings.warn(
            f"the gradient of {decayed[0]} had weight decay added before its second moment was taken, which the "
            "estimate includes: AdamW keeps the two apart",
            stacklevel=2,
        )
    if had_coupled_penalty(optimizer):
        warnings.warn(
            "a coupled EWC penalty has added its gradient to this optimizer's, so that the second moment, and with it "
            "the estimate, holds the penalty's beside the task's: train with coupling='proximal', which adds none, or "
            f"{_ESTIMATE}",
            stacklevel=2,
        )
    remembered = max(corrections[name] / (1 - float(entries[name][1]["betas"][1])) for name in params)
    info = FisherInfo(
        kind="optimizer",
        loss="unknown",
        unit="term",
        num_samples=0,
        num_terms=round(terms_per_step * remembered),
        batch_size=0,
        method="optimizer",
    )
    return FisherDiagonal(tensors, info)


def _named(optimizer: object) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer knows the names of."""
    groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
    if not groups or any("param_names" not in group for group in groups):
        raise ValueError(
            "model is needed for the parameters' names: give it, or a live optimizer made from model.named_parameters()"
        )
    return {
        name: p
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p.requires_grad
    }


def _entries(
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | str | os.PathLike[str],
    params: Mapping[str, nn.Parameter],
    model: nn.Module | None,
) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The state and the parameter group of each trainable parameter that the optimizer holds, by name."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(
            "SparseAdam updates the moment of a row only when the row has a gradient, so its step number says nothing "
            f"about the row: {_ESTIMATE}"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        names = {id(p): name for name, p in params.items()}
        return {
            names[id(p)]: (optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in names
        }
    assert model is not None
    if isinstance(optimizer, (str, os.PathLike)):
        optimizer = _read(Path(optimizer))
    if not isinstance(optimizer, Mapping):
        raise TypeError(
            f"optimizer must be a torch optimizer, its state dict or a path, got {type(optimizer).__name__}"
        )
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if (
        not isinstance(state, Mapping)
        or not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and "params" in group for group in groups)
    ):
        raise ValueError(
            "optimizer must be the dict that optimizer.state_dict() returns, with 'state' and 'param_groups'; this one "
            f"has {', '.join(map(repr, list(optimizer)[:5])) or 'nothing'}"
        )
    entries = {}
    for group, group_names in zip(groups, _group_names(groups, state, model), strict=True):
        for key, name in zip(group["params"], group_names, strict=True):
            entries[name] = (state.get(key, {}), group)
    return entries


def _read(path: Path) -> Any:
    if path.is_dir():
        found = [path / name for name in CHECKPOINT_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{path} holds no {' or '.join(CHECKPOINT_FILES)}: a checkpoint has it unless save_only_model was set "
                "or the optimizer is sharded; gather a sharded one into one state dict and pass that"
            )
        path = found[0]
    # Mapped, so that Adam's first moment, half of the file, is never read.
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the pickled stream's own, whatever a byte of it leads to
        raise ValueError(f"{path} is damaged or no optimizer state saved by torch.save: {error}") from error


def _group_names(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]], model: nn.Module
) -> list[list[str]]:
    """The model's own names of a state dict's parameters, group by group.

    Raises:
        ValueError: They have no names and no order of the model's parameters fits their numbers and shapes, or two do.
    """
    keys = [list(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        return [[own_name(model, name) for name in group["param_names"]] for group in groups]
    if all(isinstance(key, str) for group in keys for key in group):  # distributed checkpoints: keyed by name
        return [[own_name(model, key) for key in group] for group in keys]

    named = {own_name(model, name): p for name, p in model.named_parameters()}

    def fits(order: list[list[str]]) -> bool:
        if [len(group) for group in order] != [len(group) for group in keys]:
            return False
        pairs = zip((name for group in order for name in group), (key for group in keys for key in group), strict=True)
        return all(_shape(state.get(key, {})) in (None, named[name].shape) for name, key in pairs)

    fitting: list[list[list[str]]] = []
    for order in _orders(model, named):
        if order not in fitting and fits(order):
            fitting.append(order)
    if len(fitting) == 1:
        return fitting[0]
    found = "more than one order fits" if fitting else "no order fits"
    raise ValueError(
        f"the state dict has no parameter names and {found} its groups of {[len(group) for group in keys]} parameters: "
        "tried the model's own order and the Trainer's groups. Freeze what was frozen in training; else load the state "
        "dict into an optimizer built as it was, and pass that optimizer"
    )


def _shape(state: Mapping[str, Any]) -> torch.Size | None:
    moment = state.get(MOMENT)
    return moment.shape if isinstance(moment, Tensor) else None


def _orders(model: nn.Module, named: Mapping[str, nn.Parameter]) -> Iterator[list[list[str]]]:
    """The ways in which a model's parameters commonly get into an optimizer."""
    trainable = [name for name, p in named.items() if p.requires_grad]
    yield [list(named)]
    yield [trainable]
    # The Trainer's groups, decayed and not; what its versions exempt: by name, by norm class, and by LayerNorm alone.
    owners = {own_name(model, name): module for name, module in _owners(model)}
    for plain in (
        {n for n in trainable if _NO_DECAY_NAMES.search(n.lower()) or isinstance(owners[n], nn.LayerNorm)},
        {n for n in trainable if "bias" in n or type(owners[n]).__name__.endswith(("LayerNorm", "RMSNorm"))},
        {n for n in trainable if "bias" in n or isinstance(owners[n], nn.LayerNorm)},
    ):
        yield [[n for n in trainable if n not in plain], [n for n in trainable if n in plain]]


def _owners(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, _ in model.named_parameters():
        yield name, model.get_submodule(name.rpartition(".")[0])


def _correction(name: str, entry: tuple[Mapping[str, Any], Mapping[str, Any]] | None, parameter: nn.Parameter) -> float:
    """``1 - beta2^step`` of a parameter whose moment can be used.

    Raises:
        ValueError: It cannot be used.
    """
    if entry is None:
        raise ValueError(
            f"{name} is not in the optimizer: call requires_grad_(False) on it if it was not trained, else {_ESTIMATE}"
        )
    state, group = entry
    moment, step = state.get(MOMENT), state.get("step", group.get("step"))
    if "betas" not in group and moment is not None:
        raise ValueError(f"the optimizer's group of {name} has no betas: it is not of Adam's family; {_ESTIMATE}")
    if "betas" not in group:
        raise ValueError(
            f"the optimizer keeps no second moment of {name}, as plain SGD never does: only Adam's family does; "
            f"{_ESTIMATE}"
        )
    if moment is None or step is None or not float(step) >= 1:
        raise ValueError(
            f"{name} has no second moment: the optimizer has never stepped it with a gradient. Call "
            f"requires_grad_(False) on it if it is not used, else train first or {_ESTIMATE}"
        )
    if type(moment) is not Tensor:
        raise ValueError(
            f"the second moment of {name} is a {type(moment).__name__}, quantised or sharded: gather a sharded one "
            f"into one state dict and pass that; else {_ESTIMATE}"
        )
    if moment.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the second moment of {name} is {moment.dtype}, in which a moving average loses its small updates: keep "
            f"the optimizer's state in fp32, or {_ESTIMATE}"
        )
    if moment.shape != parameter.shape:
        raise ValueError(
            f"the second moment of {name} has shape {tuple(moment.shape)}, the parameter {tuple(parameter.shape)}: "
            "pass the model that was trained"
        )
    return 1 - float(group["betas"][1]) ** float(step)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not (tensor.isfinite() & (tensor >= 0)).all():
            raise ValueError(f"the second moment of {name} has a negative, NaN or infinite entry: training diverged")
