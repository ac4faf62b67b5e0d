"""Which parameters a penalty is about: their names, places and shapes. Pure bookkeeping, no arithmetic."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ewc_fast.ops.memory import aligned, memory_strides


def wrapper_prefix(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the model it wraps, None for any other module."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    kind = type(module)
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"):
        return "_orig_mod"
    if any(base.__name__ == "ActivationWrapper" for base in kind.__mro__):
        return "_checkpoint_wrapped_module"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without data parallel, compiling or checkpointing wrappers around it."""
    while (name := wrapper_prefix(model)) is not None:
        model = getattr(model, name)
    return model


def own_name(model: nn.Module, name: str) -> str:
    """A parameter's name as the model itself has it: wrappers' prefixes are taken off.

    Args:
        model: The model that ``name`` comes from, wrapped or not.
        name: A key of ``model.named_parameters()``.

    Returns:
        The name without ``module.`` (data parallel), ``_orig_mod.`` (``torch.compile``) and activation checkpointing's
        prefix. A prefix is taken off only where its owner is such a wrapper, never because of its spelling.
    """
    module: nn.Module | None = model
    parts = []
    for part in name.split("."):
        if module is None or part != wrapper_prefix(module):
            parts.append(part)
        child = getattr(module, part, None)  # not _modules, which scripted modules have none of
        module = child if isinstance(child, nn.Module) else None
    return ".".join(parts)


def _named(model: nn.Module, *, aliases: bool) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters(remove_duplicate=not aliases):
        yield own_name(model, name), parameter


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require grad, by the model's own names, once each when tied.

    Raises:
        ValueError: Two parameters have the same name once the wrappers' prefixes are taken off.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in _named(model, aliases=False):
        if not parameter.requires_grad:
            continue
        if name in found:
            raise ValueError(
                f"two parameters are both named {name!r} once wrapper prefixes are taken off; pass the inner model, "
                "or name the parameters to protect with params="
            )
        found[name] = parameter
    return found


def select_parameters(
    model: nn.Module, params: Iterable[str | Tensor] | None
) -> tuple[dict[str, nn.Parameter], frozenset[str], frozenset[str]]:
    """The parameters to protect, and the names of what else the model has.

    Args:
        model: The model, wrapped or not.
        params: None for every parameter that requires grad; or names, shell patterns (``"encoder.*"``) or the
            parameters themselves, of which those that require grad are taken.

    Returns:
        Parameters by name in the model's order; the names of its other parameters (aliases of tied ones, frozen or
        unselected ones); the names of its buffers.

    Raises:
        ValueError: A name, pattern or tensor matches no parameter of the model, or a parameter to protect is sharded.
    """
    chosen = trainable_parameters(model)
    every = dict(_named(model, aliases=True))
    if params is not None:
        wanted: set[str] = set()
        canonical = {id(p): name for name, p in chosen.items()}
        for pattern in name_parameters(model, params):
            hits = {canonical.get(id(p), name) for name, p in every.items() if fnmatch.fnmatchcase(name, pattern)}
            if not hits:
                raise ValueError(f"params: {pattern!r} is no parameter of the model; names look like {list(every)[:3]}")
            wanted |= hits
        chosen = {name: p for name, p in chosen.items() if name in wanted}
    for name, p in chosen.items():
        check_whole(name, p)
    buffers = frozenset(own_name(model, name) for name, _ in model.named_buffers(remove_duplicate=False))
    return chosen, frozenset(every.keys() - chosen.keys()), buffers


def check_whole(name: str, p: Tensor) -> None:
    """Raises where each process keeps a part of a parameter."""
    if hasattr(p, "device_mesh"):  # as FSDP2 and tensor parallelism leave it
        what = "a DTensor"
    elif hasattr(p, "_fsdp_flattened"):
        what = "by FullyShardedDataParallel"
    elif hasattr(p, "ds_tensor"):
        what = "by DeepSpeed ZeRO-3"
    else:
        return
    raise ValueError(
        f"{name} is sharded ({what}), which this version does not penalise: train with DDP, or leave it out with "
        "params="
    )


def check_materialised(name: str, t: Tensor) -> None:
    """Raises for a tensor on the meta device, and for a parameter of a lazy layer before its first batch."""
    if isinstance(t, UninitializedParameter):
        raise ValueError(f"{name} of a lazy layer has no shape yet: run the model on a batch first")
    if t.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no numbers: materialise the model first")


def name_parameters(model: nn.Module, params: Iterable[str | Tensor]) -> list[str]:
    """A choice of parameters by names and patterns alone, which outlives the parameters themselves.

    Raises:
        TypeError: An entry is neither a name nor a tensor.
        ValueError: A tensor is no parameter of the model, or ``params`` is a single one.
    """
    if isinstance(params, (str, Tensor)):
        raise ValueError("params must be an iterable of names or parameters, not a single one: wrap it in a list")
    names = []
    for item in params:
        if isinstance(item, str):
            names.append(item)
            continue
        if not isinstance(item, Tensor):
            raise TypeError(f"params must hold names or parameters, got {type(item).__name__}")
        name = next((name for name, p in _named(model, aliases=True) if p is item), None)
        if name is None:
            raise ValueError(f"params: a tensor of shape {tuple(item.shape)} is no parameter of the model")
        names.append(name)
    return names


def module_edges(model: nn.Module, params: Iterable[Tensor]) -> list[tuple[dict[str, Any], str, Any]]:
    """What to compare by identity to know that a model still holds the same parameters.

    Args:
        model: The model.
        params: The parameters that matter.

    Returns:
        (a module's dict of children or parameters, key, what lies there now).
    """
    wanted = {id(p) for p in params}
    edges: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # nothing in it can be replaced
        edges += [(module._modules, name, child) for name, child in module._modules.items() if child is not None]
        edges += [(module._parameters, name, p) for name, p in module._parameters.items() if id(p) in wanted]
    return edges


@dataclass(frozen=True)
class Slot:
    """Where one parameter's elements lie in its group's flat buffers.

    Attributes:
        name: The model's own name of the parameter.
        shape: The shape that is protected; a parameter that has grown since has more rows.
        strides: In elements; the memory order of the slice.
        offset: The first element.
    """

    name: str
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's elements of a flat buffer, shaped like the parameter, without a copy."""
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Group:
    """The parameters of one device and dtype, which share flat buffers.

    Attributes:
        device: The parameters' device.
        dtype: The parameters' dtype.
        slots: In the model's order.
    """

    device: torch.device
    dtype: torch.dtype
    slots: tuple[Slot, ...]

    @property
    def numel(self) -> int:
        """Length of the flat buffers, alignment gaps included."""
        return sum(aligned(slot.numel) for slot in self.slots)


def make_groups(params: Mapping[str, Tensor]) -> list[Group]:
    """Cuts parameters into groups of one device and dtype, and lays each group's slots one after the other.

    Args:
        params: Tensors by name, in the model's order.

    Returns:
        Groups in the order in which their first parameter comes.
    """
    members: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, p in params.items():
        members.setdefault((p.device, p.dtype), []).append(name)
    groups = []
    for (device, dtype), names in members.items():
        slots, offset = [], 0
        for name in names:
            p = params[name]
            slots.append(Slot(name, p.shape, memory_strides(p), offset))
            offset += aligned(p.numel())
        groups.append(Group(device, dtype, tuple(slots)))
    return groups
