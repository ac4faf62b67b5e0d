"""EWC in a Lightning Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from ewc_fast.budget import EWCBudget
from ewc_fast.checks import check_count
from ewc_fast.forgetting import ForgettingProbe
from ewc_fast.integrations import check_budget, install_command
from ewc_fast.integrations.ranks import check_same_on_all, share_lambda
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.attach import AttachHandle, Attachment, check_coupling

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as missing:
    if missing.name != "lightning":
        raise
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as missing:
        if missing.name != "pytorch_lightning":
            raise
        raise ImportError(f"EWCCallback needs Lightning: {install_command('lightning')}") from missing

# These shard the parameters, or update them where no hook can act.
_REFUSED_STRATEGIES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class EWCCallback(Callback):
    """Adds the penalty at every optimizer step of a ``lightning.Trainer`` (or a ``pytorch_lightning`` one).

    Once per step, whatever ``accumulate_grad_batches`` is; leave ``ewc()`` out of the loss. Under automatic
    optimization Lightning calls the optimizer with a closure in which ``zero_grad`` and ``backward`` run, so that what
    a step's hook adds is erased. This adds the gradient in ``on_before_optimizer_step``: after the backward and a
    GradScaler's unscaling, before Lightning's clipping, which therefore clips the sum of the task's and the penalty's
    gradient, as if the penalty were in the loss. A proximal pull comes after the step and is not clipped.

    Every optimizer that steps a protected parameter is attached as training begins, and detached as it ends. One that
    has the penalty already (``EWCAdamW(..., ewc=ewc)``) keeps it, with its own coupling, and clipping acts on the
    task's gradient alone.

    ``ewc/penalty`` and ``ewc/predicted_forgetting`` are logged after every batch, as the newest step found them, and
    with a probe ``ewc/measured_forgetting``. Fisher and anchor are saved in Lightning's checkpoints and restored from
    them by ``fit``, so that a resumed run still returns to the original anchor; an evaluation of a checkpoint leaves
    them as they are. lambda and damping are what ``ewc`` is made with; with a budget, lambda is logged as
    ``ewc/lambda``, and saved and restored with the rest.

    Args:
        ewc: The penalty, on the LightningModule or a module in it.
        coupling: ``"coupled"`` or ``"proximal"``; see :meth:`ewc_fast.EWCLoss.attach`.
        probe: Measures the forgetting.
        probe_every: Optimizer steps between two measurements.
        budget: Sets lambda as training goes on; its ``step()`` is called after each batch that had an optimizer step.
        consolidate: Batches of the task that is being learnt, as :func:`ewc_fast.estimate_fisher` takes them: at the
            end of training its Fisher is folded in and the anchor moves. None to leave that to the caller.
        **estimate: With ``consolidate``: ``kind``, ``loss`` and the other arguments of
            :func:`ewc_fast.estimate_fisher`.

    Raises:
        TypeError: ``ewc`` is no EWCLoss, or ``probe`` cannot be called.
        ValueError: There is no such coupling, ``probe_every`` is no positive integer, the budget is another penalty's
            or has a probe of its own beside ``probe``, or ``estimate`` is given without ``consolidate``. As training
            begins: DeepSpeed, FSDP or model parallelism, no optimizer steps a protected parameter, ``ewc.attach`` was
            called for one that does, or ``consolidate`` with several processes.
    """

    def __init__(
        self,
        ewc: EWCLoss,
        *,
        coupling: str = "coupled",
        probe: ForgettingProbe | None = None,
        probe_every: int = 100,
        budget: EWCBudget | None = None,
        consolidate: Iterable[Any] | None = None,
        **estimate: Any,
    ) -> None:
        if not isinstance(ewc, EWCLoss):
            raise TypeError(f"ewc must be an EWCLoss, got {type(ewc).__name__}")
        check_coupling(coupling)
        if probe is not None and not callable(probe):
            raise TypeError(f"probe must be callable without arguments, got {type(probe).__name__}")
        check_count(probe_every, "probe_every")
        check_budget(budget, ewc, probe)
        if estimate and consolidate is None:
            raise ValueError(f"{', '.join(estimate)}: only with consolidate=, the batches to estimate a Fisher on")
        self.ewc, self.coupling, self.probe, self.probe_every = ewc, coupling, probe, probe_every
        self.budget, self._consolidate, self._estimate = budget, consolidate, estimate
        self._stage = "fit"
        self._attachments: dict[Optimizer, Attachment | None] = {}
        self._steps = 0  # optimizer steps at the end of the newest batch
        self._measured = 0  # how many times probe_every steps had been done at the newest measurement

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what this version cannot serve."""
        self._stage = stage
        if stage != "fit":
            return
        for kind in type(trainer.strategy).__mro__:
            if kind.__name__ in _REFUSED_STRATEGIES:
                raise ValueError(
                    f"strategy: EWCCallback cannot act under {kind.__name__}: take strategy='ddp' or a single device"
                )
        if self._consolidate is not None and trainer.world_size > 1:
            raise ValueError(
                "consolidate: each process would estimate a Fisher of its own: leave it out, and after training call "
                "ewc.consolidate(...) in a process of its own and ewc.save(...)"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the penalty to the optimizers."""
        self._detach()
        check_same_on_all(self.ewc)
        if not self.ewc.num_tasks and self._consolidate is None:
            self.ewc._say_once("no task has been consolidated: the penalty has no effect. Call ewc.consolidate first")
        self._steps = trainer.global_step
        self._measured = self._steps // self.probe_every
        for optimizer in trainer.optimizers:
            self._attach(optimizer)
        if trainer.optimizers and not any(map(self.ewc.is_attached, trainer.optimizers)):
            raise ValueError(
                "ewc: no optimizer of configure_optimizers steps a parameter that it protects: make EWCLoss on the "
                "LightningModule, or on a module in it, that is trained"
            )

    def _attach(self, optimizer: Optimizer) -> None:
        protected = {id(p) for p in self.ewc.model.parameters() if p.requires_grad}
        handle: Attachment | None = None
        if any(id(p) in protected for group in optimizer.param_groups for p in group["params"]):
            existing = self.ewc._attachment_of(optimizer)
            if isinstance(existing, AttachHandle):
                raise ValueError("ewc.attach was called for this optimizer: leave it out, EWCCallback attaches")
            if existing is None and self.coupling == "proximal":
                handle = self.ewc.attach(optimizer, "proximal")
            elif existing is None:
                self.ewc._check_attachable(optimizer, "coupled")
                handle = Attachment(self.ewc, optimizer, "coupled")
                self.ewc._register(handle)
        self._attachments[optimizer] = handle

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Adds the gradient, under ``"coupled"``."""
        if optimizer not in self._attachments:  # replaced since training began
            self._attach(optimizer)
        handle = self._attachments[optimizer]
        if handle is None or handle.coupling == "proximal":
            return
        scale = None
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: unscales in its step
            scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        self.ewc._accumulate(handle, handle.parts, grad_scale=scale)
        handle.remember()  # or ewc.clip_grad_norm_ in configure_gradient_clipping would add it again

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the step for the budget, and logs."""
        if self.budget is not None and trainer.global_step > self._steps and self.budget.step() is not None:
            share_lambda(self.ewc)
        self._steps = trainer.global_step
        for name, value in (self.budget or self.ewc).logs().items():
            pl_module.log(name, value)
        due = trainer.global_step // self.probe_every
        if self.probe is not None and due > self._measured:
            pl_module.log("ewc/measured_forgetting", float(self.probe()))
            self._measured = due

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Consolidates, where that is wanted."""
        self._detach()
        if self._consolidate is not None:
            self.ewc.consolidate(self._consolidate, **self._estimate)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detaches."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._attachments.values():
            if handle is not None:
                handle.remove()
        self._attachments.clear()

    def state_dict(self) -> dict[str, Any]:
        """Fisher and anchor, and where the budget stands, for Lightning's checkpoint."""
        return {"ewc": self.ewc.state_dict(), "budget": None if self.budget is None else self.budget.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them from it, to train; an evaluation of a checkpoint must not undo what was consolidated since.

        Raises:
            ValueError: They are of another model, mode or gamma.
        """
        if self._stage != "fit":
            return
        if state_dict.keys() != {"ewc", "budget"}:
            raise ValueError("ckpt_path: the checkpoint holds no state of this EWCCallback")
        self.ewc.load_state_dict(state_dict["ewc"])
        if self.budget is not None and state_dict["budget"] is not None:
            self.budget.load_state_dict(state_dict["budget"])
        elif self.budget is not None or state_dict["budget"] is not None:
            without = (
                "the checkpoint was saved without a budget" if self.budget else "the checkpoint's budget is left out"
            )
            warnings.warn(f"ckpt_path: {without}: lambda is what it is now, {self.ewc.ewc_lambda:g}", stacklevel=2)
