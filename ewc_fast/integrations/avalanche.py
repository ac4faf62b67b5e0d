"""EWC as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ewc_fast.fisher import FisherDiagonal, FisherInfo, estimate_fisher
from ewc_fast.functional import check_lambda
from ewc_fast.integrations import install_command
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.attach import check_coupling

try:
    from avalanche.models.utils import is_multi_task_module
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.utils import ParamData, copy_params_dict
except ModuleNotFoundError as missing:
    if missing.name != "avalanche":
        raise
    raise ImportError(f"EWCFastPlugin needs Avalanche: {install_command('avalanche')}") from missing


class EWCFastPlugin(EWCPlugin):
    """Avalanche's ``EWCPlugin`` with the penalty in the optimizer's step, in the memory of one task.

    The same arguments mean the same penalty, ``ewc_lambda * sum F d^2``, and lead to the same weights. Avalanche has no
    1/2: ``plugin.ewc``, the EWCLoss, has twice the lambda. Its importances are the default here too: the mean over
    batches of the squared gradient of the batch's mean loss. They are no Fisher, and what lambda means with them
    depends on the batch size. ``kind`` takes the Fisher instead; near an optimum it is about the batch size times as
    large, so start from a lambda that is smaller by as much.

    What differs: separate mode keeps the sum of all experiences' penalties in one anchor and one Fisher, exactly; the
    penalty is neither in ``strategy.loss`` nor in the loss that is logged (``plugin.ewc.last_penalty`` is the penalty);
    only dimension 0 of a parameter may grow (the classes of a head); only what requires grad is protected.

    Args:
        ewc_lambda: The weight, at least 0, in Avalanche's convention.
        mode: ``"separate"``: a quadratic per experience; ``"online"``: ``F = decay_factor F + F_new`` around the newest
            weights.
        decay_factor: How much of the old importances stays, 0 to 1; in online mode, where it must be given.
        keep_importance_data: Also keep a copy of every experience's ``importances`` and ``saved_params``, as Avalanche
            does. Nothing here reads them, and separate mode does not need them.
        kind: None: Avalanche's importances. Else that of :func:`ewc_fast.estimate_fisher`, such as ``"exact"``.
        coupling: See :meth:`ewc_fast.EWCLoss.attach`; ``"coupled"`` is what Avalanche does.
        damping: As for :class:`ewc_fast.EWCLoss`, as are ``fisher_dtype`` and ``backend``.
        fisher_dtype: See there.
        backend: See there.
        **estimate: With ``kind``: the other arguments of :func:`ewc_fast.estimate_fisher`; ``loss`` is the strategy's
            criterion if it is not among them.

    Attributes:
        ewc: The penalty; None before the first experience.

    Raises:
        ValueError: An argument is out of range, ``decay_factor`` is missing in online mode or given in another, or
            ``estimate`` without ``kind``.
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: str = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        kind: str | None = None,
        coupling: str = "coupled",
        damping: float = 0.0,
        fisher_dtype: torch.dtype | None = None,
        backend: str = "auto",
        **estimate: Any,
    ) -> None:
        if mode not in ("separate", "online"):
            raise ValueError(f"mode must be 'separate' or 'online', got {mode!r}")
        if (decay_factor is None) == (mode == "online"):
            raise ValueError("decay_factor must be given in mode='online', and only there")
        if estimate and kind is None:
            raise ValueError(f"{', '.join(estimate)}: only with kind=, Avalanche's importances have no such argument")
        check_coupling(coupling)
        check_lambda(ewc_lambda)
        self._options: dict[str, Any] = {
            "ewc_lambda": 2 * ewc_lambda,
            "mode": mode,
            "gamma": 1.0 if decay_factor is None else decay_factor,
            "damping": damping,
            "fisher_dtype": fisher_dtype,
            "backend": backend,
        }
        EWCLoss(nn.LayerNorm(1), **self._options)  # what it refuses is said here, not after the first experience
        super().__init__(ewc_lambda, mode, decay_factor, keep_importance_data)
        self.keep_importance_data = keep_importance_data  # which Avalanche forces in separate mode
        self.kind, self.coupling = kind, coupling
        self.ewc: EWCLoss | None = None
        self._estimate = estimate

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Attaches the penalty to the strategy's optimizer, once the model has grown for the experience."""
        if self.ewc is None:
            self.ewc = EWCLoss(strategy.model, **self._options)
        if self.ewc.model is not strategy.model:
            raise ValueError("strategy: its model is not the one that was trained before: take a new EWCFastPlugin")
        for handle in list(self.ewc._handles):
            if handle.optimizer is not strategy.optimizer:
                handle.remove()
        if not self.ewc.is_attached(strategy.optimizer):
            self.ewc.attach(strategy.optimizer, self.coupling)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: the penalty acts in the optimizer's step."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Folds the experience's importances in, and moves the anchor."""
        assert self.ewc is not None
        workers = kwargs.get("num_workers", 0)
        if self.kind is None:
            fisher = self._importances_of(strategy, workers)
        else:
            estimate = {"loss": strategy._criterion, **self._estimate}
            fisher = estimate_fisher(strategy.model, _batches(strategy, workers), self.kind, **estimate)
        self.ewc.consolidate(fisher=fisher)
        if self.keep_importance_data:
            count = strategy.clock.train_exp_counter
            importances = {n: ParamData(n, init_tensor=f.clone(), device=f.device) for n, f in fisher.items()}
            self.update_importances(importances, count)
            self.saved_params[count] = copy_params_dict(strategy.model)

    def _importances_of(self, strategy: Any, num_workers: int) -> FisherDiagonal:
        """Avalanche's own."""
        dataset = strategy.experience.dataset
        importances = self.compute_importances(
            strategy.model,
            strategy._criterion,
            strategy.optimizer,
            dataset,
            strategy.device,
            strategy.train_mb_size,
            num_workers=num_workers,
        )
        info = FisherInfo(
            kind="avalanche",
            loss=type(strategy._criterion).__name__,
            unit="none",
            num_samples=len(dataset),
            num_terms=len(dataset),
            batch_size=min(strategy.train_mb_size, len(dataset)),
            method="batch",
            is_fisher=False,
        )
        return FisherDiagonal({name: importance.data for name, importance in importances.items()}, info)


def _batches(strategy: Any, num_workers: int) -> Iterator[tuple[Any, Any]]:
    dataset = strategy.experience.dataset
    collate = getattr(dataset, "collate_fn", None)
    with_task = is_multi_task_module(strategy.model)
    for batch in DataLoader(dataset, strategy.train_mb_size, collate_fn=collate, num_workers=num_workers):
        yield (batch[0], batch[-1]) if with_task else batch[0], batch[1]
