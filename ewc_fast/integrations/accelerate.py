"""EWC in a loop with Accelerate."""

from __future__ import annotations

import torch

from ewc_fast.integrations import install_command
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.attach import AttachHandle

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as missing:
    if missing.name != "accelerate":
        raise
    raise ImportError(f"this needs Accelerate: {install_command('accelerate')}") from missing

# These shard the parameters, or update them where no hook can act.
_REFUSED = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "FSDP": "FSDP"}


def attach(
    ewc: EWCLoss,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    coupling: str = "coupled",
    *,
    every: int = 1,
) -> AttachHandle:
    """:meth:`ewc_fast.EWCLoss.attach` for an optimizer that ``accelerator.prepare`` has wrapped, or will wrap.

    The penalty acts at the torch optimizer's own steps: once where gradients are synchronised, not in every micro-batch
    of ``accelerator.accumulate``, after a GradScaler's unscaling, and not in a step that the scaler skips. ``ewc`` is
    registered for checkpointing, so that ``accelerator.save_state`` and ``load_state`` keep Fisher and anchor.

    ``accelerator.clip_grad_norm_`` clips the task's gradient alone. To clip its sum with the penalty's, where
    ``accelerator.sync_gradients``: ``accelerator.unscale_gradients()``, then ``ewc.clip_grad_norm_(...)``.

    Args:
        ewc: The penalty, made with the model before or after ``prepare``.
        optimizer: Prepared or not.
        accelerator: Which prepares it.
        coupling: As for :meth:`ewc_fast.EWCLoss.attach`, as is ``every``.
        every: See there.

    Returns:
        A handle; ``handle.remove()`` detaches.

    Raises:
        TypeError: ``accelerator`` is no Accelerator, or ``optimizer`` no torch optimizer.
        ValueError: The accelerator runs DeepSpeed, Megatron-LM or FSDP; or as for :meth:`ewc_fast.EWCLoss.attach`.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an Accelerator, got {type(accelerator).__name__}")
    refused = _REFUSED.get(accelerator.distributed_type.name)
    if refused is not None:
        raise ValueError(f"accelerator runs {refused}, which this version cannot serve: train without it, as with DDP")
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    handle = ewc.attach(optimizer, coupling, every=every)
    if not any(registered is ewc for registered in accelerator._custom_objects):
        accelerator.register_for_checkpointing(ewc)
    return handle
