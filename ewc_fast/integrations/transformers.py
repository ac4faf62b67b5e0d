"""``EWCCallback``: Elastic Weight Consolidation in Hugging Face's ``Trainer``, and in what is built on it."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ewc_fast.budget import EWCBudget
from ewc_fast.checks import check_count
from ewc_fast.fisher import estimate_fisher
from ewc_fast.fisher.batches import is_packed
from ewc_fast.fisher.objectives import following_labels
from ewc_fast.integrations import check_budget, install_command
from ewc_fast.integrations.ranks import check_same_on_all, share_lambda
from ewc_fast.layout import unwrapped
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.attach import AttachHandle, Attachment, check_coupling

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback, default_data_collator
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(f"EWCCallback needs transformers and accelerate ({error}): {install_command('hf')}") from error

STATE_FILE = "ewc.safetensors"
BUDGET_FILE = "ewc_budget.json"
CLIPS = ("sum", "task")

_attached: weakref.WeakSet[AttachHandle] = weakref.WeakSet()  # by callbacks, of trainings that may have broken off

_PROBLEMS = {"multi_label_classification": "binary_cross_entropy", "regression": "gaussian"}
_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))


class EWCCallback(TrainerCallback):
    """EWC in a ``Trainer``: ``Trainer(..., callbacks=[EWCCallback(ewc)])``, and nothing else changes.

    The penalty acts once per optimizer step, at the step (:meth:`ewc_fast.EWCLoss.attach`), so that it depends neither
    on the gradient accumulation nor on mixed precision. It is attached when training begins and detached at its end. An
    optimizer that has this penalty already, :class:`ewc_fast.EWCAdamW` or one that it was attached to, keeps it as it
    is: it never acts twice.

    With every loss it logs ``ewc/penalty`` and ``ewc/predicted_forgetting``, and with a probe
    ``ewc/measured_forgetting``, in ``trainer.state.log_history`` and to the reporters. With every checkpoint it saves
    the state of EWC (``ewc.safetensors``, and ``ewc_budget.json``), and takes it up again on
    ``resume_from_checkpoint``, so that the anchor remains what it was. ``ewc_lambda`` and ``damping`` are not part of
    it; a budget's lambda is.

    Args:
        ewc: The penalty, of the Trainer's model; or a function that is given the Trainer's model, when the Trainer is
            built, and returns the penalty: for trainers that make or wrap the model themselves. It is called again
            where the Trainer trains another model (``model_init``, ``hyperparameter_search``).
        coupling: ``"coupled"`` or ``"proximal"``; None for that of the optimizer if it has the penalty already, else
            ``"coupled"``.
        clip: What ``max_grad_norm`` clips under ``"coupled"``: ``"sum"``, the task's and the penalty's gradient
            together, as if the penalty were in the loss; or ``"task"``, the task's alone, to which the penalty's is
            then added whole. ``grad_norm`` in the logs is that of the same. A proximal pull is no gradient and is never
            clipped.
        probe: Returns the measured forgetting: a :class:`ewc_fast.ForgettingProbe`, or any callable. Make it before
            training, also before one that is resumed.
        probe_every: Ask the probe when a loss is logged, the first time and then if so many steps have gone since.
        budget: Sets lambda as training goes on; its ``step()`` is called after each optimizer step.
        consolidate: Ends the task when training has ended: arguments of :func:`consolidate`, by name, without ``ewc``.
            Of these, ``dataset``, ``collator`` and ``columns`` are the Trainer's own if left out (``consolidate={}``;
            with a collator of your own the model's arguments; without ``args.remove_unused_columns`` all), and
            ``generator`` one that is seeded with ``args.seed``.

    Attributes:
        ewc: The penalty.
        probe: The probe; may be set at any time.
        budget: The budget.

    Raises:
        TypeError: ``ewc`` or ``probe`` is of another type, or ``consolidate`` has an argument that there is not, or
            an iterator as its ``dataset``.
        ValueError: There is no such coupling or clip, the budget is another penalty's, or has a probe of its own.
            When training begins, before anything is changed: DeepSpeed, FSDP or another strategy whose step shows no
            whole gradients; a second EWCCallback; an EWCLoss of another model; parameters on the meta device or
            sharded; merged or disabled adapters; clipping that another library has replaced, under ``clip="sum"``; an
            optimizer with none of the protected parameters, or with this penalty in another coupling; a checkpoint
            without a state, or of another model; a dataset to consolidate that lacks labels, or of whose samples the
            collator makes no row each; under DDP, another Fisher or anchor in another process.
    """

    def __init__(
        self,
        ewc: EWCLoss | Callable[[nn.Module], EWCLoss],
        *,
        coupling: str | None = None,
        clip: str = "sum",
        probe: Callable[[], Tensor | float] | None = None,
        probe_every: int = 1,
        budget: EWCBudget | None = None,
        consolidate: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(ewc, EWCLoss) and (not callable(ewc) or isinstance(ewc, nn.Module)):
            raise TypeError(f"ewc must be an EWCLoss, or a function from the model to one, got {type(ewc).__name__}")
        if coupling is not None:
            check_coupling(coupling)
        if clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
        if probe is not None and not callable(probe):
            raise TypeError(f"probe must be callable without arguments, got {type(probe).__name__}")
        check_count(probe_every, "probe_every")
        check_budget(budget, ewc, probe)
        if consolidate is not None:
            _check_arguments(consolidate)
        self._made: EWCLoss | None = ewc if isinstance(ewc, EWCLoss) else None
        self._make: Callable[..., Any] | None = None if isinstance(ewc, EWCLoss) else ewc
        self._made_of: nn.Module | None = None
        self.coupling, self.clip, self.probe, self.probe_every = coupling, clip, probe, probe_every
        self.budget, self._consolidate = budget, consolidate
        self._handle: AttachHandle | None = None
        self._trainer: Trainer | None = None  # while it trains
        self._clip: _Clip | None = None
        self._measured: float | None = None
        self._measured_at = 0

    @property
    def ewc(self) -> EWCLoss:
        """The penalty.

        Raises:
            RuntimeError: It is to be made from the Trainer's model, and there is no Trainer yet.
        """
        if self._made is None:
            raise RuntimeError("the EWCLoss is made when the Trainer is built: pass callbacks=[EWCCallback(...)]")
        return self._made

    # ---- events ----

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer is built."""
        trainer, _ = self._find_trainer()
        _check_strategy(trainer)
        _check_callbacks(trainer)
        self._make_ewc(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the penalty, after what would be an error later."""
        self._detach()  # what a training that was broken off has left behind
        trainer, resumed_from = self._find_trainer()
        with _detached_on_error(trainer):
            self._begin(trainer, resumed_from)

    def _begin(self, trainer: Trainer, resumed_from: str | None) -> None:
        _check_strategy(trainer)
        if self._make is not None and resumed_from is not None and not self._is_made(trainer):
            raise ValueError(
                "resume_from_checkpoint: ewc is a function of the model, whose weights are the checkpoint's by now: "
                "give the Trainer the callback with callbacks=[...], and a model, not model_init, so that it is called "
                "before"
            )
        _check_callbacks(trainer)
        ewc = self._make_ewc(trainer)
        _check_parameters(ewc)
        _check_adapters(trainer.model)
        _check_model(trainer, ewc)
        if self._consolidate is not None:
            _check_dataset(trainer, ewc, self._with_defaults(trainer))
        accelerator, optimizer = trainer.accelerator, _inner(trainer.optimizer)
        clip = vars(accelerator).get("clip_grad_norm_")
        if isinstance(clip, _Clip) and clip.ewc is ewc:  # what another callback's has left behind
            del accelerator.clip_grad_norm_
        elif self.clip == "sum" and clip is not None:
            raise ValueError("clip='sum': something else has replaced accelerator.clip_grad_norm_; take clip='task'")
        attachment = self._attach(optimizer)
        if resumed_from is not None:
            self._load(Path(resumed_from))
        check_same_on_all(ewc)
        if ewc.num_tasks and not attachment.parts():
            _say_what_is_trained(ewc, optimizer)
        if not ewc.num_tasks and self._consolidate is None:
            warnings.warn(
                "no task is consolidated yet, so that the penalty is 0: call ewc.consolidate(...) before training, or "
                "give EWCCallback consolidate=, if this is the first task",
                stacklevel=2,
            )
        if getattr(trainer.args, "enable_jit_checkpoint", False):
            warnings.warn(
                "args.enable_jit_checkpoint writes a checkpoint without telling callbacks: it has no "
                f"{STATE_FILE}. Call ewc.save(...) before training, and copy the file into it before you resume",
                stacklevel=2,
            )
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)  # before the reporters, which are to see what it logs
        self._trainer, self._measured = trainer, None
        if self.clip == "sum":
            self._clip = accelerator.clip_grad_norm_ = _Clip(accelerator, ewc)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step for the budget."""
        if self.budget is not None and self._trainer is not None:
            with _detached_on_error(self._trainer), _own_precision(self._trainer.model):
                if self.budget.step() is not None:
                    share_lambda(self.ewc)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds to what is logged with the loss."""
        if logs is None or "loss" not in logs or self._trainer is None:
            return
        due = self._measured is None or state.global_step - self._measured_at >= self.probe_every
        if self.probe is not None and due:
            with _detached_on_error(self._trainer), _own_precision(self._trainer.model):
                self._measured = float(self.probe())
            self._measured_at = state.global_step
        own = {name: float(value) for name, value in (self.budget or self.ewc).logs().items()}
        if self._measured is not None:
            own["ewc/measured_forgetting"] = self._measured
        logs.update(own)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(own)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the state in the checkpoint that was just written."""
        if not args.should_save:
            return
        with _detached_on_error(self._trainer):
            folder = self._output_folder(args) / f"checkpoint-{state.global_step}"
            self.ewc.save(folder / STATE_FILE)
            if self.budget is not None:
                (folder / BUDGET_FILE).write_text(json.dumps(self.budget.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches the penalty, and ends the task if that was asked for."""
        trainer = self._trainer
        self._detach()
        if self._consolidate is not None and trainer is not None:
            consolidate(self.ewc, **self._with_defaults(trainer))

    # ---- the parts of that ----

    def _find_trainer(self) -> tuple[Trainer, str | None]:
        """The Trainer that calls, and the checkpoint that it resumes from.

        Trainers hand their callbacks neither of the two, and only the frames of the call hold them both.
        """
        trainer: Trainer | None = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            handler = getattr(owner, "callback_handler", None) if isinstance(owner, Trainer) else None
            if handler is not None and any(callback is self for callback in handler.callbacks):
                trainer = owner
                if "resume_from_checkpoint" in frame.f_locals:
                    return trainer, frame.f_locals["resume_from_checkpoint"]
            frame = frame.f_back
        if trainer is None:
            raise RuntimeError(
                "EWCCallback was called by no Trainer: pass it to one with callbacks=[...]; in a loop of your own call "
                "ewc.attach(optimizer)"
            )
        return trainer, None

    def _is_made(self, trainer: Trainer) -> bool:
        return self._made is not None and self._made_of is unwrapped(trainer.model)

    def _make_ewc(self, trainer: Trainer) -> EWCLoss:
        if self._make is not None and not self._is_made(trainer):
            made = self._make(trainer.model)
            if not isinstance(made, EWCLoss):
                raise TypeError(f"ewc: the function must return an EWCLoss, got {type(made).__name__}")
            self._made, self._made_of = made, unwrapped(trainer.model)
        ewc = self.ewc
        if getattr(trainer, "model_init", None) is not None and _is_of_another_model(trainer, ewc):
            raise ValueError(
                "ewc is of another model than the one that model_init has made: pass a function of the model, "
                "EWCCallback(make_ewc), which is called for each, instead of an EWCLoss"
            )
        return ewc

    def _output_folder(self, args: Any) -> Path:
        """Where the Trainer's checkpoints go: under ``hyperparameter_search`` a folder for each trial."""
        folder_of = getattr(self._trainer, "_get_output_dir", None)
        return Path(args.output_dir if folder_of is None else folder_of(trial=getattr(self._trainer, "_trial", None)))

    def _with_defaults(self, trainer: Trainer) -> dict[str, Any]:
        given = self._consolidate or {}
        columns = _columns_of(trainer)
        if columns != "all" and "collator" in given:
            columns = None  # the Trainer's are made for its own collator: TRL's lack the attention_mask
        defaults = {
            "dataset": trainer.train_dataset,
            "collator": trainer.data_collator,
            "columns": columns,
            "generator": torch.Generator().manual_seed(trainer.args.seed),  # the same labels in every process
        }
        return {**defaults, **given}

    def _attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        for handle in [handle for handle in _attached if handle.ewc is self.ewc]:
            handle.remove()  # of another callback, whose training was broken off
        present = self.ewc._attachment_of(optimizer)
        if present is not None:
            if self.coupling not in (None, present.coupling):
                raise ValueError(
                    f"coupling={self.coupling!r}, but the optimizer has this penalty with {present.coupling!r} "
                    "already: leave one out"
                )
            return present
        self._handle = self.ewc.attach(optimizer, self.coupling or "coupled")
        _attached.add(self._handle)
        return self._handle

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._trainer is not None:
            own = vars(self._trainer.accelerator)
            if self._clip is not None and own.get("clip_grad_norm_") is self._clip:
                del own["clip_grad_norm_"]  # back to the class's own; another's stays
            self._trainer = self._clip = None

    def _load(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: there is no {STATE_FILE} in {folder}, which was saved without EWCCallback "
                "or by args.enable_jit_checkpoint. To go on with the present state, if it is the one that the training "
                f"had, write it there first: ewc.save({str(path)!r})"
            )
        try:
            self.ewc.load(path)
            if self.budget is not None and (folder / BUDGET_FILE).exists():
                self.budget.load_state_dict(json.loads((folder / BUDGET_FILE).read_text()))
            elif self.budget is not None:
                warnings.warn(
                    f"resume_from_checkpoint: there is no {BUDGET_FILE} in {folder}, which was saved without a budget: "
                    f"it starts anew, with the present lambda, {self.ewc.ewc_lambda}",
                    stacklevel=2,
                )
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {folder} does not fit this EWCLoss: {error}") from error


def consolidate(
    ewc: EWCLoss,
    dataset: Any,
    collator: Callable[[list[Any]], Any] | None = None,
    *,
    batch_size: int = 8,
    num_samples: int | None = None,
    loss: Any = None,
    columns: Collection[str] | None = None,
    **estimate: Any,
) -> None:
    """Ends a task, as :meth:`ewc_fast.EWCLoss.consolidate` does, from a dataset as a Trainer takes it.

    Batches in which no label counts are left out, and a warning says how many.

    Args:
        ewc: The penalty.
        dataset: Yields samples as dicts. If it has a length and ``num_samples`` is below it, evenly spaced samples are
            taken.
        collator: Makes a batch of a list of samples, a row each; transformers' default if None.
        batch_size: Samples per batch.
        num_samples: How many samples; None for all.
        loss: See :func:`ewc_fast.estimate_fisher`; None for ``"causal_lm"`` where the model is a causal language model,
            ``"binary_cross_entropy"`` or ``"gaussian"`` where its config's ``problem_type`` asks for it, or a
            classifier without one would infer it from labels and ``num_labels``, else ``"cross_entropy"``.
        columns: What the collator gets of each sample; None for the model's own arguments and the labels, ``"all"`` for
            everything.
        **estimate: ``kind``, ``generator``, ``progress`` and other arguments of :func:`ewc_fast.estimate_fisher`.

    Raises:
        TypeError: The dataset is a loader, or a mapping of several.
        ValueError: The dataset is empty, labels are needed and missing or none counts, the collator packs several
            samples into one row or makes several of one, or the default one cannot make a batch; see also
            :meth:`EWCLoss.consolidate`.
    """
    _check_adapters(ewc.model)
    batches = _batches(ewc.model, dataset, collator, batch_size, num_samples, columns)
    batches, loss = _with_loss(ewc.model, batches, loss)
    counting = _Counting(batches, loss)
    with _own_precision(unwrapped(ewc.model)):
        ewc.consolidate(counting, loss=loss, num_samples=num_samples, **estimate)
    counting.say_what_was_left_out()


def _with_loss(model: nn.Module, batches: Iterator[Any], loss: Any) -> tuple[Iterator[Any], Any]:
    """The batches as the loss takes them, and the loss, by the first one where it is None."""
    if loss is None:
        first = list(islice(batches, 1))
        batches, loss = chain(first, batches), _loss_of(model, first[0] if first else None)
    if loss == "gaussian" and getattr(getattr(_plain(model), "config", None), "num_labels", None) == 1:
        batches = map(_with_a_column, batches)
    return batches, loss


class _Counting:
    """The batches in which a label counts: of long prompts the answers are cut off, and short texts have no mask."""

    def __init__(self, batches: Iterable[Any], loss: Any) -> None:
        self._batches, self._loss = batches, loss
        self._left_out = self._found = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._found += 1
            if self._counts(batch):
                yield batch
            else:
                self._left_out += 1
        if 0 < self._found == self._left_out:
            raise ValueError("no label counts in any batch of the dataset: all are the ignored index, or padding")

    def _counts(self, batch: Any) -> bool:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return True
        ignored = getattr(self._loss, "ignore_index", -100)
        if self._loss == "causal_lm":
            labels = following_labels(labels, batch.get("attention_mask"), ignored)
        return bool((labels != ignored).any())

    def say_what_was_left_out(self) -> None:
        """Warns, the caller of :func:`consolidate`."""
        if self._left_out:
            warnings.warn(
                f"dataset: {self._left_out} of {self._found} batches were left out, because no label counts in them",
                stacklevel=3,
            )


def _with_a_column(batch: Any) -> Any:
    """Labels like the outputs, (N, 1), where transformers squeezes both."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return {**batch, "labels": labels[:, None]} if isinstance(labels, Tensor) and labels.dim() == 1 else batch


def _batches(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Any] | None,
    batch_size: int,
    num_samples: int | None,
    columns: Collection[str] | None,
) -> Iterator[Any]:
    wanted = None if columns == "all" else _arguments_of(model) if columns is None else set(columns)
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset is a DataLoader: give its dataset and collator, or call ewc.consolidate(loader)")
    if isinstance(dataset, Mapping):
        raise TypeError(f"dataset is a {type(dataset).__name__}: give one of {', '.join(map(str, dataset))}")
    size = None if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") else len(dataset)
    if size is None:
        samples = islice(dataset, num_samples)
    else:
        count = size if num_samples is None else min(num_samples, size)
        samples = (dataset[i * size // count] for i in range(count))  # type: ignore[assignment]
    while batch := list(islice(samples, batch_size)):
        if wanted is not None and isinstance(batch[0], Mapping):
            batch = [{k: v for k, v in sample.items() if k in wanted} for sample in batch]
        try:
            collated = (collator or default_data_collator)(batch)
        except (TypeError, ValueError, RuntimeError) as error:
            if collator is not None:
                raise
            raise ValueError(
                f"dataset: transformers' default collator makes no batch of its samples ({error}): give collator= one "
                "that pads, of samples that are dicts"
            ) from error
        if isinstance(collated, Mapping):
            collated = {k: v for k, v in collated.items() if v is not None}
            _check_rows(collated, len(batch))
        yield collated


def _columns_of(trainer: Trainer) -> Any:
    """What a Trainer's collator gets of each sample."""
    if not trainer.args.remove_unused_columns:
        return "all"
    if hasattr(trainer, "_set_signature_columns_if_needed"):
        trainer._set_signature_columns_if_needed()
    return getattr(trainer, "_signature_columns", None)


def _arguments_of(model: nn.Module) -> set[str]:
    """What a sample may hold for the model, as a Trainer keeps it."""
    return {*inspect.signature(_plain(model).forward).parameters, "label", "label_ids", "labels"}


def _plain(model: nn.Module) -> nn.Module:
    """The transformers model itself, without wrappers and adapters."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _loss_of(model: nn.Module, batch: Any) -> str:
    model = _plain(model)
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")) or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal_lm"
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and name.endswith(_CLASSIFIERS):  # as transformers infers it when it is given labels first
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if getattr(config, "num_labels", None) == 1:
            problem = "regression"
        elif isinstance(labels, Tensor) and labels.dtype not in (torch.long, torch.int):
            problem = "multi_label_classification"
    return _PROBLEMS.get(problem or "", "cross_entropy")


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class _Clip:
    """What stands in for an accelerator's ``clip_grad_norm_`` under ``clip="sum"``."""

    def __init__(self, accelerator: Any, ewc: EWCLoss) -> None:
        self.accelerator, self.ewc = accelerator, ewc

    def __call__(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        self.accelerator.unscale_gradients()
        return self.ewc.clip_grad_norm_(parameters, max_norm, norm_type)


@contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    """Takes off the autocast that accelerate puts around a model's forward: what a probe is compared with was said
    without."""
    patched = model.__dict__.get("forward")
    original = model.__dict__.get("_original_forward")
    if patched is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


@contextmanager
def _detached_on_error(trainer: Trainer | None) -> Iterator[None]:
    """Detaches every penalty of a Trainer where this one's callback fails: its training ends then, without an event."""
    try:
        yield
    except BaseException:
        for callback in [] if trainer is None else trainer.callback_handler.callbacks:
            if isinstance(callback, EWCCallback):
                callback._detach()
        raise


# ---- what would be an error later ----


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if not isinstance(arguments, Mapping):
        raise TypeError(f"consolidate must be a dict of arguments, got {type(arguments).__name__}: dict(dataset=...)")
    if "ewc" in arguments:
        raise TypeError("consolidate: leave out ewc, which is the callback's")
    if isinstance(arguments.get("dataset"), Iterator):
        raise TypeError(
            f"consolidate: dataset is an iterator ({type(arguments['dataset']).__name__}), whose first samples are "
            "gone once they have been tried before training: give a list or another dataset that starts anew each time"
        )


def _check_strategy(trainer: Trainer) -> None:
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    if kind == "NO" or kind.startswith("MULTI_"):
        return
    remedies = {
        "DEEPSPEED": "DeepSpeed updates the weights inside its own engine, where no step's hook acts: train without "
        "args.deepspeed, with DDP",
        "FSDP": "FSDP cuts the parameters into shards, which this version does not penalise: train without args.fsdp, "
        "with DDP",
    }
    raise ValueError(remedies.get(kind, f"{kind}: this version penalises single processes and DDP, take one of these"))


def _check_callbacks(trainer: Trainer) -> None:
    if sum(isinstance(callback, EWCCallback) for callback in trainer.callback_handler.callbacks) > 1:
        raise ValueError(
            f"callbacks: two of them are an EWCCallback, whose {STATE_FILE} and logs would replace each other: give "
            "one, of an EWCLoss of the whole model, which takes a factor of lambda by name (lambda_by=) and several "
            "tasks (mode='separate')"
        )


def _is_of_another_model(trainer: Trainer, ewc: EWCLoss) -> bool:
    trained = set(map(id, trainer.model.parameters()))
    return trained.isdisjoint(map(id, ewc.model.parameters()))


def _check_model(trainer: Trainer, ewc: EWCLoss) -> None:
    if _is_of_another_model(trainer, ewc):
        raise ValueError(
            "ewc is of another model than the Trainer's (a copy?): make it from the model that the Trainer gets, or "
            "pass a function of the model, EWCCallback(make_ewc)"
        )


def _say_what_is_trained(ewc: EWCLoss, optimizer: torch.optim.Optimizer) -> None:
    """Warns where only parameters are trained that no task has had, a new adapter's; else raises."""
    known, free = next(iter(ewc.fisher)), ewc._select()[0]
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) in stepped for p in free.values()):
        warnings.warn(
            f"nothing of what is consolidated (such as {known}) is trained: the penalty is 0. New parameters are free "
            "until they are consolidated",
            stacklevel=4,
        )
        return
    raise ValueError(
        f"the optimizer steps none of the protected parameters (such as {known}): make the EWCLoss from the model that "
        "the Trainer trains, trainer.model, after it was wrapped (PEFT), and let parameters that are to be trained "
        "require grad (PeftModel.from_pretrained: is_trainable=True)"
    )


def _check_parameters(ewc: EWCLoss) -> None:
    selected, _, _ = ewc._select()
    for name, p in selected.items():
        if p.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device and holds no numbers: load the whole model onto a device, without "
                "offloading, or leave the parameter out with EWCLoss(params=...)"
            )


def _check_adapters(model: nn.Module) -> None:
    if "peft" in sys.modules:  # else there are none
        from ewc_fast.integrations.peft import check_adapters

        check_adapters(model)


def _check_rows(batch: Mapping[str, Any], samples: int) -> None:
    """Raises where rows are no samples: several of one, or one of several documents, whose gradients could not be told
    apart."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) > samples:
        raise ValueError(
            f"the collator makes {len(ids)} rows of {samples} samples (chosen and rejected answers, as DPO's does?): "
            "consolidate with a dataset and a collator that give a row for each, EWCCallback(consolidate=dict("
            "dataset=..., collator=...)), or call ewc.consolidate(...) yourself"
        )
    if (samples > 1 and isinstance(ids, Tensor) and ids.dim() > 1 and len(ids) == 1) or is_packed(batch):
        raise ValueError(
            "the collator puts several documents into one row (packing or padding_free), where the Fisher needs a row "
            "for each: consolidate with a dataset that is not packed and a collator that pads, EWCCallback("
            "consolidate=dict(dataset=..., collator=...)), or call ewc.consolidate(...) yourself"
        )


def _check_dataset(trainer: Trainer, ewc: EWCLoss, arguments: Mapping[str, Any]) -> None:
    """Raises where the dataset could not be consolidated, by doing it with two samples and one parameter."""
    rest = {k: v for k, v in arguments.items() if k not in ("generator", "progress")}
    size, number = rest.pop("batch_size", 2), rest.pop("num_samples", None)
    dataset, collator, columns = rest.pop("dataset"), rest.pop("collator"), rest.pop("columns")
    loss = rest.pop("loss", None)
    device = next(trainer.model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _own_precision(trainer.model):
        params = list(ewc._select()[0].values())[-1:]
        try:
            batches = _batches(ewc.model, dataset, collator, min(2, size), number, columns)
            batches, loss = _with_loss(ewc.model, batches, loss)
            first = islice(_Counting(batches, loss), 1)
            estimate_fisher(ewc.model, first, loss=loss, **{**rest, "params": params})
        except (TypeError, ValueError) as error:
            raise type(error)(f"consolidate: the dataset's first samples cannot be used: {error}") from error
