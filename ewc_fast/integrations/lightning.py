"""EWC in a Lightning Trainer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.optim import Optimizer

from ewc_fast.budget import EWCBudget
from ewc_fast.checks import check_count
from ewc_fast.fisher import estimate_fisher
from ewc_fast.fisher.batches import check_loader, first
from ewc_fast.forgetting import ForgettingProbe
from ewc_fast.integrations import check_budget, install_command
from ewc_fast.integrations.ranks import check_same_on_all, share_lambda
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.attach import AttachHandle, Attachment, check_coupling, is_inner

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.seed import isolate_rng
except ModuleNotFoundError as missing:
    if missing.name != "lightning":
        raise
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities.seed import isolate_rng
    except ModuleNotFoundError as missing:
        if missing.name != "pytorch_lightning":
            raise
        raise ImportError(f"EWCCallback needs Lightning: {install_command('lightning')}") from missing

# These shard the parameters, or update them where no hook can act.
_REFUSED_STRATEGIES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")

# What consolidate= takes beside the batches.
_OPTIONS = [name for name in inspect.signature(estimate_fisher).parameters if name not in ("model", "loader")]
_OPTIONS = [name for name in _OPTIONS if name not in ("params", "out")]  # which EWCLoss gives


class EWCCallback(Callback):
    """Adds the penalty at every optimizer step of a ``lightning.Trainer`` (or a ``pytorch_lightning`` one).

    Once per step, whatever ``accumulate_grad_batches`` is; leave ``ewc()`` out of the loss. Under automatic
    optimization Lightning calls the optimizer with a closure in which ``zero_grad`` and ``backward`` run, so that what
    a step's hook adds is erased. This adds the gradient in ``on_before_optimizer_step``: after the backward and a
    GradScaler's unscaling, before Lightning's clipping, which therefore clips the sum of the task's and the penalty's
    gradient, as if the penalty were in the loss. A proximal pull comes after the step and is not clipped.

    Every optimizer that steps a protected parameter is attached as training begins, and detached as it ends. One that
    has the penalty already (``EWCAdamW(..., ewc=ewc)``) keeps it, with its own coupling, and clipping acts on the
    task's gradient alone. A step past Lightning, such as that of ``self.optimizers(use_pl_optimizer=False)``, is an
    error under ``"coupled"``: the penalty would be missing from it.

    ``ewc/penalty`` and ``ewc/predicted_forgetting`` are logged after every batch, as the newest step found them, and
    with a probe ``ewc/measured_forgetting``. Fisher and anchor are saved in Lightning's checkpoints and restored from
    them by ``fit``, so that a resumed run still returns to the original anchor; an evaluation of a checkpoint leaves
    them as they are. lambda and damping are what ``ewc`` is made with; with a budget, lambda is logged as
    ``ewc/lambda``, and saved and restored with the rest.

    A checkpoint that was written after ``consolidate`` holds its task. A fit that goes on from there says so in a
    warning, returns to the anchor that is in the checkpoint, and does not fold the task in a second time.

    Args:
        ewc: The penalty, on the LightningModule or a module in it.
        coupling: ``"coupled"`` or ``"proximal"``; see :meth:`ewc_fast.EWCLoss.attach`.
        probe: Measures the forgetting.
        probe_every: Optimizer steps between two measurements.
        budget: Sets lambda as training goes on; its ``step()`` is called after each batch that had an optimizer step.
        consolidate: Batches of the task that is being learnt, as :func:`ewc_fast.estimate_fisher` takes them: at the
            end of training its Fisher is folded in and the anchor moves. The first batch is tried before training.
            None to leave that to the caller.
        name: Tells several callbacks in one Trainer apart, each with an EWCLoss of its own: what is logged is
            ``ewc_NAME/penalty`` and so on, and checkpoints hold a state for each name.
        **estimate: With ``consolidate``: ``kind``, ``loss`` and the other arguments of
            :func:`ewc_fast.estimate_fisher`.

    Raises:
        TypeError: ``ewc`` is no EWCLoss, ``probe`` cannot be called, ``name`` is no string, there is no such argument,
            or ``consolidate`` is an iterator, whose batches can be had only once.
        ValueError: There is no such coupling, ``probe_every`` is no positive integer, the budget is another penalty's
            or has a probe of its own beside ``probe``, or ``estimate`` is given without ``consolidate``. As training
            begins: DeepSpeed, FSDP or model parallelism, no optimizer steps a protected parameter, ``ewc.attach`` was
            called for one that does, two callbacks of one EWCLoss, ``consolidate`` with several processes or with a
            first batch that cannot be used, or ``ckpt_path`` with a checkpoint that holds no state of this callback.
        RuntimeError: A step went past Lightning, without the penalty.
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
        name: str = "",
        **estimate: Any,
    ) -> None:
        if not isinstance(ewc, EWCLoss):
            raise TypeError(f"ewc must be an EWCLoss, got {type(ewc).__name__}")
        check_coupling(coupling)
        if probe is not None and not callable(probe):
            raise TypeError(f"probe must be callable without arguments, got {type(probe).__name__}")
        check_count(probe_every, "probe_every")
        check_budget(budget, ewc, probe)
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        _check_estimate(consolidate, estimate)
        self.ewc, self.coupling, self.probe, self.probe_every = ewc, coupling, probe, probe_every
        self.budget, self._consolidate, self._estimate, self.name = budget, consolidate, estimate, name
        self._stage = "fit"
        self._consolidated = False  # whether this fit's task is in the state already
        self._attachments: dict[Optimizer, Attachment | None] = {}
        self._steps = 0  # optimizer steps at the end of the newest batch
        self._measured = 0  # how many times probe_every steps had been done at the newest measurement

    @property
    def state_key(self) -> str:
        """Under which the state is in Lightning's checkpoints."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what this version cannot serve."""
        self._stage = stage
        if stage != "fit":
            return
        self._consolidated = False
        if any(isinstance(c, EWCCallback) and c is not self and c.ewc is self.ewc for c in trainer.callbacks):
            raise ValueError("callbacks: two of them are an EWCCallback of the same EWCLoss: leave one out")
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

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses to train on from a checkpoint without a state."""
        if self._stage == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"ckpt_path: the checkpoint holds no state of {self.state_key}: it was written without this callback, "
                "or with another name=. To go on with the present state, put it there first: checkpoint = "
                f'torch.load(path); checkpoint["callbacks"][{self.state_key!r}] = callback.state_dict(); '
                "torch.save(checkpoint, path)"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tries the batches to consolidate; here, because training's own pass over the same loader begins next."""
        if self._consolidate is not None and not self._consolidated:
            _check_batches(self.ewc, self._consolidate, self._estimate)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the penalty to the optimizers."""
        self._detach()
        check_same_on_all(self.ewc)
        if not self.ewc.num_tasks and self._consolidate is None:
            self.ewc._say_once("no task has been consolidated: the penalty has no effect. Call ewc.consolidate first")
        if self._consolidated:
            warnings.warn(
                "ckpt_path: the checkpoint was written after its task was consolidated: training goes on against the "
                "anchor that was set then, and does not consolidate the task a second time. To continue the task "
                "itself, take a checkpoint from before the end of its training; to learn a new one, ewc.load(...) "
                "what ewc.save(...) wrote, and fit without ckpt_path",
                stacklevel=2,
            )
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
                handle = _Coupled(self.ewc, optimizer)
                self.ewc._register(handle)
        self._attachments[optimizer] = handle

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Adds the gradient, under ``"coupled"``."""
        if optimizer not in self._attachments:  # replaced since training began
            self._attach(optimizer)
        handle = self._attachments[optimizer]
        if not isinstance(handle, _Coupled):
            return
        scale = None
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: unscales in its step
            scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        self.ewc._accumulate(handle, handle.parts, grad_scale=scale)
        handle.joined = True
        handle.remember()  # or ewc.clip_grad_norm_ in configure_gradient_clipping would add it again

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the step for the budget, and logs."""
        for handle in self._attachments.values():
            if isinstance(handle, _Coupled):
                handle.joined = False  # also where a GradScaler has skipped the step
        if self.budget is not None and trainer.global_step > self._steps and self.budget.step() is not None:
            share_lambda(self.ewc)
        self._steps = trainer.global_step
        for name, value in (self.budget or self.ewc).logs().items():
            self._log(pl_module, name, value)
        due = trainer.global_step // self.probe_every
        if self.probe is not None and due > self._measured:
            self._log(pl_module, "ewc/measured_forgetting", float(self.probe()))
            self._measured = due

    def _log(self, pl_module: Any, name: str, value: Any) -> None:
        pl_module.log(name.replace("ewc/", f"ewc_{self.name}/", 1) if self.name else name, value)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Consolidates, where that is wanted."""
        self._detach()
        if self._consolidate is not None and not self._consolidated:
            self.ewc.consolidate(self._consolidate, **self._estimate)
            self._consolidated = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detaches."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._attachments.values():
            if handle is not None:
                handle.remove()
        self._attachments.clear()

    def state_dict(self) -> dict[str, Any]:
        """Fisher and anchor, whether they are after this fit's task, and where the budget stands, for a checkpoint."""
        budget = None if self.budget is None else self.budget.state_dict()
        return {"ewc": self.ewc.state_dict(), "budget": budget, "consolidated": self._consolidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them from it, to train; an evaluation of a checkpoint must not undo what was consolidated since.

        Raises:
            ValueError: They are of another model, mode or gamma.
        """
        if self._stage != "fit":
            return
        if not {"ewc", "budget"} <= state_dict.keys():
            raise ValueError("ckpt_path: the checkpoint holds no state of this EWCCallback")
        self.ewc.load_state_dict(state_dict["ewc"])
        self._consolidated = bool(state_dict.get("consolidated", False))
        if self.budget is not None and state_dict["budget"] is not None:
            self.budget.load_state_dict(state_dict["budget"])
        elif self.budget is not None or state_dict["budget"] is not None:
            without = (
                "the checkpoint was saved without a budget" if self.budget else "the checkpoint's budget is left out"
            )
            warnings.warn(f"ckpt_path: {without}: lambda is what it is now, {self.ewc.ewc_lambda:g}", stacklevel=2)


class _Coupled(Attachment):
    """A penalty whose gradient the callback adds; a step without it is an error.

    Attributes:
        joined: Whether the gradient has been added since the newest step.
    """

    def __init__(self, ewc: EWCLoss, optimizer: Optimizer) -> None:
        super().__init__(ewc, optimizer, "coupled")
        self.joined = False
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        self._hook.remove()
        super().remove()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_inner(optimizer):
            return
        if not self.joined:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called past Lightning, and the step had no penalty: take the "
                "optimizer from self.optimizers(), without use_pl_optimizer=False, and call its step(); in "
                "LightningModule.optimizer_step call optimizer.step(closure), not optimizer.optimizer.step"
            )
        self.joined = False


def _check_estimate(batches: Any, estimate: dict[str, Any]) -> None:
    """Raises where consolidate= and what goes with it could not work at the end of training."""
    unknown = [name for name in estimate if name not in _OPTIONS]
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: EWCCallback has no such argument; with consolidate= it takes {', '.join(_OPTIONS)}"
        )
    if estimate and batches is None:
        raise ValueError(f"{', '.join(estimate)}: only with consolidate=, the batches to estimate a Fisher on")
    if isinstance(batches, Iterator) or isinstance(getattr(batches, "dataset", None), Iterator):
        raise TypeError(
            "consolidate: its batches come from an iterator, and the first would be gone once it has been tried before "
            "training: give a list or a loader that starts anew each time"
        )


def _check_batches(ewc: EWCLoss, batches: Any, estimate: dict[str, Any]) -> None:
    """Raises where the batches could not be consolidated, by doing it with the first one and one parameter."""
    options = {key: value for key, value in estimate.items() if key not in ("num_samples", "progress")}
    number = estimate.get("num_samples")
    owners = (batches, getattr(batches, "sampler", None))
    generators = [estimate.get("generator"), *(getattr(owner, "generator", None) for owner in owners)]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        with isolate_rng():
            check_loader(batches, number)
            tried = [batch if number is None else first(batch, number) for batch in islice(batches, 1)]
            estimate_fisher(ewc.model, tried, **options, params=list(ewc._select()[0].values())[-1:])
    except (TypeError, ValueError, RuntimeError) as error:
        kind = next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
        raise kind(f"consolidate: the first batch, tried before training, cannot be used: {error}") from error
    finally:
        for generator, state in states:
            generator.set_state(state)
