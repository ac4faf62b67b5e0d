"""One penalty in several processes."""

from __future__ import annotations

import torch
from torch import distributed
from torch.linalg import vector_norm

from ewc_fast.loss import EWCLoss

TOLERANCE = 1e-5  # of the sum of the tensors' norms: estimates of the same data on two GPUs differ by rounding


def _is_alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def check_same_on_all(ewc: EWCLoss) -> None:
    """Raises, in every process, unless all have the same penalty: DDP averages gradients, but nothing averages what the
    penalty does after it, and the models would drift apart.

    All processes of the default group must call it; without a group, or in a group of one, it does nothing.

    Raises:
        ValueError: Fisher, anchor, lambda or damping differ.
    """
    if _is_alone():
        return
    device = next(ewc.model.parameters()).device
    mine = torch.tensor(
        [
            float(ewc.ewc_lambda),
            float(ewc.damping),
            *(
                sum(float(vector_norm(t, dtype=torch.float64)) for t in each.values())
                for each in (ewc.fisher, ewc.anchor)
            ),
        ],
        dtype=torch.float64,
        device=device,
    )
    low, high = mine.clone(), mine.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN)
    distributed.all_reduce(high, distributed.ReduceOp.MAX)
    differing = [
        what
        for what, a, b in zip(("lambda", "damping", "Fisher", "anchor"), low.tolist(), high.tolist(), strict=True)
        if b - a > TOLERANCE * max(abs(a), abs(b))
    ]
    if differing:
        raise ValueError(
            f"ewc: {', '.join(differing)} differ among the processes, whose models would drift apart: consolidate in "
            "one process, ewc.save(...), and ewc.load(...) in all of them"
        )


def share_lambda(ewc: EWCLoss) -> None:
    """Gives every process the first one's lambda, which each may have set by a probe of its own.

    As :func:`check_same_on_all`, all processes must call it.
    """
    if _is_alone():
        return
    shared = torch.tensor(float(ewc.ewc_lambda), dtype=torch.float64, device=next(ewc.model.parameters()).device)
    distributed.broadcast(shared, 0)
    ewc.ewc_lambda = float(shared)
