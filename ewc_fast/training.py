"""``train``: one epoch of plain training, with a penalty in the loss or in the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc_fast.fisher.modes import module_mode


class EpochResult(NamedTuple):
    """What one epoch gave.

    Attributes:
        loss: Mean of the task's loss per sample, without the penalty.
        penalty: Mean of the penalty over the steps; 0.0 without one.
        num_samples: Number of samples seen.
    """

    loss: float
    penalty: float
    num_samples: int


def train(
    model: nn.Module,
    dataloader: Iterable[Any],
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str,
    ewc_loss: Callable[[], Tensor | float] | None = None,
    *,
    freeze_batchnorm: bool = False,
) -> EpochResult:
    """Trains ``model`` for one epoch on ``criterion(model(inputs), targets) + ewc_loss()``.

    The model is in training mode meanwhile, and every submodule has its own mode back at the end. The device is
    synchronised once, at the end of the epoch; a loss that is not finite is not looked for.

    Args:
        model: Maps inputs to what ``criterion`` takes; already on ``device``.
        dataloader: Yields pairs of tensors (inputs, targets) with the batch in the first dimension.
        optimizer: Any optimizer that steps without a closure.
        criterion: Gives the batch's mean loss as a scalar, e.g. ``nn.CrossEntropyLoss()``.
        device: Where the batches are moved to.
        ewc_loss: Called without arguments once per step, returns the penalty: an ``EWCLoss``, or e.g.
            ``lambda: ewc_loss(model, fisher, prev_params, lambda_factor)``. One that is attached to ``optimizer`` acts
            in the optimizer's step and is not added to the loss again; its ``last_penalty`` is what is reported.
        freeze_batchnorm: Keep BatchNorm layers in evaluation mode, for a task after the first: no penalty protects
            their running statistics, which are buffers.

    Returns:
        Mean loss, mean penalty and number of samples.

    Raises:
        ValueError: The loader is empty, or ``criterion`` returns no scalar.
        TypeError: ``ewc_loss`` is not callable, or a batch is not a pair of tensors.
    """
    if ewc_loss is not None and not callable(ewc_loss):
        raise TypeError(
            f"ewc_loss must be callable without arguments, got {type(ewc_loss).__name__}; wrap a function that needs "
            "arguments as lambda: ewc_loss(model, fisher, prev_params, lambda_factor)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    device = torch.device(device)
    is_attached = getattr(ewc_loss, "is_attached", None)
    in_optimizer = is_attached is not None and is_attached(optimizer)
    # Sums over many steps; Apple's GPUs have no fp64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    loss_sum, penalty_sum = torch.zeros(2, dtype=dtype, device=device).unbind()
    num_samples = num_steps = 0
    with module_mode(model, training=True):
        if freeze_batchnorm:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for index, batch in enumerate(dataloader):
            inputs, targets = _unpack(batch, index)
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            task_loss = criterion(model(inputs), targets)
            if task_loss.numel() != 1:
                raise ValueError(
                    f"criterion must return the batch's mean loss as a scalar, got shape {tuple(task_loss.shape)}"
                )
            if ewc_loss is None or in_optimizer:
                task_loss.backward()
                optimizer.step()
                penalty = ewc_loss.last_penalty if in_optimizer else 0.0  # type: ignore[union-attr]
            else:
                penalty = ewc_loss()
                (task_loss + penalty).backward()
                optimizer.step()
            loss_sum += task_loss.detach().squeeze() * len(inputs)
            penalty_sum += penalty.detach().to(device) if isinstance(penalty, Tensor) else penalty
            num_samples += len(inputs)
            num_steps += 1
    if not num_samples:
        raise ValueError("dataloader is empty: an epoch needs at least one batch")
    loss, penalty = torch.stack([loss_sum / num_samples, penalty_sum / num_steps]).tolist()
    return EpochResult(loss, penalty, num_samples)


def _unpack(batch: object, index: int) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise TypeError(f"batch {index} must be a pair of tensors (inputs, targets), got {type(batch).__name__}")
