"""PEFT: adapters under a penalty. An ``EWCLoss`` of a ``PeftModel`` protects what trains, the active adapter; here is
what lies between its names and those of PEFT's checkpoints, and what goes wrong without an error."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ewc_fast.integrations import install_command
from ewc_fast.layout import own_name, unwrapped

try:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
except ImportError as error:
    raise ImportError(f"adapters need peft ({error}): {install_command('hf')}") from error

_BASES = ("base_layer", "original_module")  # in which a tuner layer holds what it adapts


def to_peft_names(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> dict[str, Tensor]:
    """One adapter's entries under the names of PEFT's checkpoints, from which its own name is gone:
    ``...lora_A.default.weight`` becomes ``...lora_A.weight``.

    Args:
        model: The PeftModel, wrapped or not.
        tensors: By the model's own names, as ``ewc.fisher`` and ``ewc.anchor`` are.
        adapter_name: Which adapter; entries of others are left out.

    Returns:
        The same tensors by the names in ``adapter_model.safetensors``.

    Raises:
        ValueError: The model has no such adapter, or ``tensors`` nothing of it; PEFT's checkpoints leave a part of it
            out, as they do where another adapter is named like a module; or it is of a prompt method.
    """
    names, _ = _checkpoint_names(model, adapter_name)
    found = {names[name]: t for name, t in tensors.items() if name in names}
    if not found:
        raise ValueError(f"tensors have no entry of adapter {adapter_name!r}, whose names look like {list(names)[:2]}")
    return found


def from_peft_names(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Tensors by the names of PEFT's checkpoints under the model's own, for ``consolidate(fisher=..., anchor=...)``.

    Args:
        model: The PeftModel, wrapped or not.
        tensors: As in ``adapter_model.safetensors``. What is saved with an adapter but is not its own (VeRA's shared
            projections, the base weights of embeddings) is left out.
        adapter_name: The adapter of the model that they are for.

    Returns:
        The same tensors by the names of ``model.named_parameters()``.

    Raises:
        ValueError: The model has no such adapter, or it has no such parameter; or as for :func:`to_peft_names`.
    """
    own, besides = _checkpoint_names(model, adapter_name)
    names = {theirs: name for name, theirs in own.items()}
    unknown = [name for name in tensors if name not in names and name not in besides]
    if unknown:
        raise ValueError(
            f"adapter {adapter_name!r} has no {', '.join(unknown)}; its names look like {list(names)[:2]}: make it "
            "with the checkpoint's own config"
        )
    return {names[name]: t for name, t in tensors.items() if name in names}


def check_adapters(model: nn.Module) -> None:
    """Raises where a penalty on the adapters would do harm: while they are merged or disabled.

    The model then computes without them, so that only the penalty moves them; and merged ones are subtracted from the
    base weights later, changed, which spoils these. :class:`ewc_fast.integrations.transformers.EWCCallback` calls this
    when training begins; in a loop of your own, call it there.

    Args:
        model: Any model; one without adapters passes.

    Raises:
        ValueError: Names the layer and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(
                    f"{own_name(model, name)} has merged adapters ({', '.join(module.merged_adapters)}), which are not "
                    "trained: call model.unmerge_adapter() first"
                )
            if module.disable_adapters:
                raise ValueError(
                    f"{own_name(model, name)} has its adapters disabled, so that they are not trained: leave "
                    "model.disable_adapter(), or call model.enable_adapter_layers()"
                )


def _checkpoint_names(model: nn.Module, adapter_name: str) -> tuple[dict[str, str], set[str]]:
    """The names in a checkpoint of an adapter's parameters by the model's own names; what else may be in it."""
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel, got {type(model).__name__}: wrap it with get_peft_model first")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: there is no {adapter_name!r}, only {', '.join(model.peft_config)}")
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter {adapter_name!r} is {config.peft_type.value}, and prompt methods are not supported: keep the "
            "model's own names, as ewc.save does"
        )
    state = model.state_dict(keep_vars=True)  # the parameters themselves, to know them by
    # PEFT's own function, for the rules differ between its methods.
    saved = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    own = {id(p): own_name(model, name) for name, p in model.named_parameters()}
    owners = {own[id(p)]: _adapter_of(model, name) for name, p in model.named_parameters()}
    # It may take another adapter for this one: up to 0.18 where a name begins with this one's.
    names = {own[id(t)]: theirs for theirs, t in saved.items() if id(t) in own}
    names = {name: theirs for name, theirs in names.items() if owners[name] in (adapter_name, None)}
    # Newer versions drop those in whose path another adapter's name occurs.
    others = model.peft_config.keys() - {adapter_name}
    unsaved = [name for name, owner in owners.items() if owner == adapter_name and name not in names]
    trained = {own[id(p)] for p in model.parameters() if p.requires_grad}
    lost = [name for name in unsaved if name in trained or not others.isdisjoint(name.split("."))]
    if lost:
        clash = next((part for part in lost[0].split(".") if part in others), None)
        raise ValueError(
            f"adapter {adapter_name!r}: PEFT's checkpoints leave out {len(lost)} of its parameters, such as {lost[0]}: "
            + (f"name adapter {clash!r} otherwise, not like a module" if clash else "keep the model's own names")
        )
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"adapter {adapter_name!r}: PEFT saves two of its parameters under one name; rename the adapter"
        )
    base = {name for name, t in state.items() if not t.requires_grad and _adapter_of(model, name) is None}
    return names, (saved.keys() | base) - set(names.values())


def _adapter_of(model: nn.Module, name: str) -> str | None:
    """The adapter that a parameter belongs to: the key in a tuner layer's own dictionary, wherever else it occurs."""
    module: object = model
    held = False
    for part in name.split("."):
        if held and isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            return part
        held = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and part not in _BASES
        module = getattr(module, part, None)
    return None
