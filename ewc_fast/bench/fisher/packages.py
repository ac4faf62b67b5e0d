"""Other packages' diagonals, as their users run them. Those that are not installed are listed as skipped.

BackPACK (``backpack-for-pytorch``; Dangel et al. 2020), ASDL (``asdfghjkl``; Osawa et al. 2023) and NNGeometry
(``nngeometry``; George et al. 2020). Each draws its labels with ``torch.multinomial`` from the global generator, as
``estimate_fisher`` does, so that after one seed their values can be compared entry by entry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_fast.bench.fisher.nets import Batches
from ewc_fast.bench.fisher.ways import PUBLISHED, Fisher, Run, Way
from ewc_fast.bench.peers import Unavailable

DISTRIBUTIONS = {"backpack": "backpack-for-pytorch", "asdl": "asdfghjkl", "nngeometry": "nngeometry"}


def versions() -> dict[str, str | None]:
    """The installed packages' versions; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _load(package: str, module: str = "") -> Any:
    """A module of a package.

    Raises:
        Unavailable: It is not installed.
    """
    try:
        return import_module(module or package)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: pip install {DISTRIBUTIONS[package]} ({error})") from error


def _names(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The module's own parameters: within it, and within the model."""
    of = {id(p): name for name, p in model.named_parameters()}
    for name, p in module.named_parameters(recurse=False):
        yield name, of[id(p)]


def _backpack(extension: str, model: nn.Module) -> Run:
    backpack, extensions = _load("backpack"), _load("backpack", "backpack.extensions")
    model = backpack.extend(copy.deepcopy(model))
    criterion = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    make = getattr(extensions, extension)
    field = make().savefield

    def run(batches: Batches) -> Fisher:
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for inputs, labels in batches:
            model.zero_grad()
            with backpack.backpack(make()):
                criterion(model(inputs), labels).backward()
            for name, p in model.named_parameters():
                sums[name] += getattr(p, field)
                delattr(p, field)
        model.zero_grad()
        return {name: total / sum(len(labels) for _, labels in batches) for name, total in sums.items()}

    return run


def _asdl(fisher_type: str, model: nn.Module) -> Run:
    asdl = _load("asdl")
    model = copy.deepcopy(model)

    def run(batches: Batches) -> Fisher:
        samples = sum(len(labels) for _, labels in batches)
        config = asdl.FisherConfig(
            fisher_type=fisher_type, fisher_shapes=["diag"], loss_type="cross_entropy", data_size=samples
        )
        maker = asdl.get_fisher_maker(model, config)
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for inputs, labels in batches:
            output = maker.setup_model_call(model, inputs)
            maker.setup_loss_call(F.cross_entropy, output, labels)
            maker.forward_and_backward()
            for module in model.modules():
                for own, name in _names(model, module):
                    sums[name] += getattr(module.fisher.diag, own)
        model.zero_grad()
        return sums

    return run


class _Batches(DataLoader[Any]):
    """A loader that hands out batches made before: NNGeometry takes nothing but a ``DataLoader``, whose indexing and
    stacking of single samples would count against it."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(
            TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True))), batch_size=len(batches[0][1])
        )
        self._batches = batches

    def __iter__(self) -> Any:
        return iter([(inputs.detach(), labels) for inputs, labels in self._batches])  # it sets requires_grad on inputs


def _nngeometry(function: str, model: nn.Module) -> Run:
    metrics = _load("nngeometry", "nngeometry.metrics")
    diagonal = import_module("nngeometry.object").PMatDiag
    layers = import_module("nngeometry.layercollection").LayerCollection.from_model(model)
    model = copy.deepcopy(model)
    parts = [
        (name, own)
        for key in layers.layers
        for own, name in sorted(_names(model, model.get_submodule(key)), key=lambda pair: pair[0] != "weight")
    ]
    params = dict(model.named_parameters())

    def run(batches: Batches) -> Fisher:
        # Its gradients are with respect to the inputs; the parameters' stay None
        flat: Tensor = getattr(metrics, function)(
            model, _Batches(batches), diagonal, layer_collection=layers
        ).get_diag()
        pieces = flat.split([params[name].numel() for name, _ in parts])
        return {name: piece.view_as(params[name]) for (name, _), piece in zip(parts, pieces, strict=True)}

    return run


PACKAGE_WAYS: tuple[Way, ...] = tuple(
    Way(name, kind, note, PUBLISHED, partial(make, what), package)
    for name, kind, note, make, what, package in (
        ("backpack_sgs", "empirical", "BackPACK SumGradSquared", _backpack, "SumGradSquared", "backpack"),
        ("backpack_mc", "sampled", "BackPACK DiagGGNMC", _backpack, "DiagGGNMC", "backpack"),
        ("backpack_exact", "exact", "BackPACK DiagGGNExact", _backpack, "DiagGGNExact", "backpack"),
        ("asdl_emp", "empirical", "ASDL fisher_emp, diag", _asdl, "fisher_emp", "asdl"),
        ("asdl_mc", "sampled", "ASDL fisher_mc, diag", _asdl, "fisher_mc", "asdl"),
        ("asdl_exact", "exact", "ASDL fisher_exact, diag", _asdl, "fisher_exact", "asdl"),
        (
            "nngeometry_mc",
            "sampled",
            "NNGeometry FIM_MonteCarlo, PMatDiag",
            _nngeometry,
            "FIM_MonteCarlo",
            "nngeometry",
        ),
        ("nngeometry_exact", "exact", "NNGeometry FIM, PMatDiag", _nngeometry, "FIM", "nngeometry"),
    )
)
