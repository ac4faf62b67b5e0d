"""From a model's output to log-likelihoods: which labels a kind of Fisher takes, and the gradient at the output."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ewc_fast.checks import check_count
from ewc_fast.fisher.batches import batch_size, is_packed, take_apart

KINDS = ("exact", "sampled", "empirical", "predicted", "reversed", "batch")
LOSSES = ("cross_entropy", "binary_cross_entropy", "gaussian", "causal_lm")
_GIVEN = frozenset({"empirical", "reversed", "batch"})
EXACT_BACKWARDS = 4096  # of one batch
_EXACT_NUMBERS = 1 << 14  # of cotangents held at once
IGNORE = -100  # torch's own index of a label that does not count
_TELLING, _ALIKE = 8, 0.9  # so many labels, of which such a share equals the input, are no chance
_MANY_CLASSES, _BLOCK = 1024, 256  # see draw_classes
_PER = {"sample": "sample", "label": "position"}  # what has a label of its own, by the unit
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_CLASSIFIES = "ForSequenceClassification"
_NOT_CAUSAL = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification")

Transform = Callable[[Tensor], Tensor]


class Target(NamedTuple):
    """What an output is compared with.

    Attributes:
        labels: Shaped like the output without its classes (or like the output); None where the kind draws them.
        counted: (N, ...) bool, the terms that count; None for all.
        terms: Their number.
    """

    labels: Tensor | None
    counted: Tensor | None
    terms: int


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Raises:
        TypeError: There are none.
        ValueError: They are no floating point numbers.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model(inputs) must return the logits as a tensor or as .logits, got {type(output).__name__}; wrap the "
            "model in a module that returns only its logits"
        )
    if not output.is_floating_point():
        raise ValueError(f"model(inputs) must return floating point logits, got {output.dtype}")
    return output


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float32 else t.to(torch.promote_types(t.dtype, torch.float32))


def _draw_on(t: Tensor, generator: torch.Generator | None, draw: Callable[[Tensor], Tensor]) -> Tensor:
    return draw(t) if generator is None else draw(t.to(generator.device)).to(t.device)


def draw_classes(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A class for each row of probabilities (..., C).

    Few classes are drawn with the very numbers of ``torch.multinomial``, without its checks: the first of exponential
    clocks to ring. Of a vocabulary, where a random number for each class takes longer than the softmax, one number per
    row is looked up in the distribution function: among blocks of classes, then in the block.
    """
    if probs.shape[-1] < _MANY_CLASSES:
        return _draw_on(probs, generator, lambda p: _first_to_ring(p, generator))
    p = probs.reshape(-1, probs.shape[-1])
    device = p.device if generator is None else generator.device
    numbers = torch.rand(len(p), 1, dtype=torch.float64, device=device, generator=generator).to(p.device)
    whole = p[:, : p.shape[1] // _BLOCK * _BLOCK].unflatten(1, (-1, _BLOCK)).sum(2)
    up_to = torch.cat([whole, p[:, whole.shape[1] * _BLOCK :].sum(1, keepdim=True)], 1).double().cumsum(1)
    numbers = numbers * up_to[:, -1:]
    block = _first_above(up_to, numbers)
    numbers = numbers - torch.nn.functional.pad(up_to, (1, 0)).gather(1, block)
    classes = block * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = classes < p.shape[1]
    mine = p.gather(1, classes.where(inside, 0)).where(inside, 0)
    return (block * _BLOCK + _first_above(mine.double().cumsum(1), numbers)).reshape(probs.shape[:-1])


def _first_to_ring(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    clocks = torch.empty_like(probs, memory_format=torch.contiguous_format).exponential_(generator=generator)
    return torch.div(probs, clocks, out=clocks).argmax(-1)


def _first_above(up_to: Tensor, numbers: Tensor) -> Tensor:
    """In each row of cumulative sums (R, K) the first above the row's number (R, 1), never one that adds nothing."""
    below_last = torch.nextafter(up_to[:, -1:], up_to.new_zeros(()))  # rounding must not lead past the last that adds
    return torch.searchsorted(up_to, torch.minimum(numbers, below_last), right=True)


class Objective(ABC):
    """A log-likelihood; the base of all.

    Args:
        kind: One of :data:`KINDS`.
        transform: From the model's logits to those of the likelihood, None for the same.
        draws: Labels drawn per term, kind ``"sampled"``.
    """

    name = ""
    unit = "sample"
    measure = "loss"  # in messages

    def __init__(self, kind: str, transform: Transform | None, draws: int) -> None:
        self.kind, self.transform, self.draws = kind, transform, draws
        self.unit_is_known = False  # from the first batch on

    @property
    def once(self) -> bool:
        """Whether each batch has one cotangent."""
        return self.kind != "exact" and self.draws == 1

    def settings(self) -> dict[str, Any]:
        """What the kind and the name do not say, as plain values."""
        return {"num_label_samples": self.draws, "logits_transform": self.transform is not None}

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """The logits of a batch, (N, ...), with a graph."""
        args, kwargs, labels = take_apart(batch)
        if isinstance(batch, Mapping) and labels is not None and self._makes_decoder_inputs(model, kwargs):
            kwargs = {**kwargs, "labels": labels}
        z = logits_of(model(*args, **kwargs))
        z = z if self.transform is None else self.transform(z)
        return -z if self.kind == "reversed" else z

    @staticmethod
    def _makes_decoder_inputs(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        config = getattr(model, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" not in kwargs

    @abstractmethod
    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        """The labels and what counts."""

    def finite(self, z: Tensor, target: Target) -> bool:
        """Whether the loss is finite wherever it counts."""
        return bool(z.isfinite().all())

    @abstractmethod
    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Gradients of log-likelihoods at ``z``, each shaped like it; the Fisher is the sum of the squares of each."""

    def _labels(self, batch: Any) -> Tensor | None:
        labels = take_apart(batch).labels
        if labels is None and self.kind in _GIVEN:
            raise ValueError(
                f"kind={self.kind!r} needs labels: let the loader yield (inputs, labels), or use kind='sampled'"
            )
        return labels


def check_causal(model: nn.Module, what: str) -> None:
    """Raises for a model of transformers that writes no text by itself; a classifier passes."""
    if keeps_labels(model) and not any(base.__name__.endswith(_CLASSIFIES) for base in type(model).__mro__):
        raise ValueError(
            f"{what}, and {type(model).__name__} is an encoder-decoder, or gives each token a label of its own"
        )


def keeps_labels(model: nn.Module) -> bool:
    """Whether a model of transformers compares its logits with the labels as they are, not shifted by one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        return True  # it shifts what its decoder reads
    names = [base.__name__ for base in type(model).__mro__]
    return any(n.endswith(_NOT_CAUSAL) for n in names) and not any(n.endswith(_CAUSAL) for n in names)


class CrossEntropy(Objective):
    """A categorical distribution over the last dimension, one label per sample or per position."""

    name = "cross_entropy"

    def __init__(
        self, kind: str, transform: Transform | None, draws: int, ignore_index: int = IGNORE, smoothing: float = 0.0
    ) -> None:
        super().__init__(kind, transform, draws)
        self.ignore_index, self.smoothing = ignore_index, smoothing

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "ignore_index": self.ignore_index, "label_smoothing": self.smoothing}

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        size = batch_size(batch)
        self._check_logits(model, z, size, batch)
        labels = self._labels(batch)
        unit = "sample" if z.dim() == 2 else "label"
        if self.unit_is_known and unit != self.unit:
            raise ValueError(
                f"this batch's labels are one per {_PER[unit]}, those before one per {_PER[self.unit]}: estimate them "
                "apart, for their units differ"
            )
        self.unit, self.unit_is_known = unit, True
        if z.dim() == 2:
            # Unlabelled data will do, whatever stands for a missing label; an index that the user ignores is none.
            if labels is None or (self.kind not in _GIVEN and self.ignore_index == IGNORE):
                return Target(None, None, size)
            return self._given(z, labels, (size,))
        if labels is None:
            raise ValueError(
                f"the logits have shape {tuple(z.shape)}, so labels (batch, positions) are needed to say which "
                "positions count (-100 does not); for a causal language model use loss='causal_lm'"
            )
        return self._given(z, labels, tuple(z.shape[:-1]))

    def _check_logits(self, model: nn.Module, z: Tensor, size: int, batch: Any) -> None:
        if z.dim() < 2 or z.shape[0] != size:
            raise ValueError(
                f"model(inputs) must return logits of shape (batch, classes) = ({size}, C), got {tuple(z.shape)}"
            )
        if z.shape[-1] < 2:
            raise ValueError(
                f"model(inputs) returned logits of shape {tuple(z.shape)}: cross-entropy needs two classes or more, "
                "over a single one it is constant"
            )
        if z.dim() != 3 or keeps_labels(model):
            return
        args, kwargs, labels = take_apart(batch)
        causal = any(base.__name__.endswith(_CAUSAL) for base in type(model).__mro__)
        if labels is not None and not causal:
            inputs = [kwargs["input_ids"]] if "input_ids" in kwargs else (*args, *kwargs.values())
            like = [t for t in inputs if isinstance(t, Tensor) and t.shape == labels.shape and t.numel()]
            # Of 0 and 1 is a mask.
            tokens = next((t for t in like if not t.is_floating_point() and t.max() > 1), None)
            if tokens is not None:
                same = torch.eq(labels, tokens)[labels != self.ignore_index]
                causal = len(same) >= _TELLING and float(same.float().mean()) >= _ALIKE
        if causal:
            raise ValueError(
                f"loss='cross_entropy' on a causal language model ({type(model).__name__}) would not shift the labels: "
                "use loss='causal_lm', whose unit is the token"
            )

    def _given(self, z: Tensor, labels: Tensor, shape: tuple[int, ...]) -> Target:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            hint = "; of one-hot labels they are labels.argmax(-1)" if labels.shape == z.shape else ""
            raise ValueError(f"labels must be integers (class indices), got {labels.dtype}{hint}")
        if tuple(labels.shape) != shape:
            hint = ""
            if labels.numel() == math.prod(shape):
                hint = "; labels.reshape(-1) makes them so" if len(shape) == 1 else "; reshape them"
            elif labels.dim() == 2 == len(shape) and len(labels) == len(z) and 0 < (n := shape[1] - labels.shape[1]):
                hint = _prompt_hint(n)
            if z.dim() > 2 and tuple(labels.shape) == (z.shape[0], *z.shape[2:]):
                hint = "; classes come last: logits_transform=lambda z: z.movedim(1, -1)"
            kind = "(batch,)" if len(shape) == 1 else "(batch, positions)"
            raise ValueError(f"labels must have shape {kind} = {shape}, got {tuple(labels.shape)}{hint}")
        labels = labels.to(z.device).long()
        counted, classes = None, labels
        extremes = tuple(map(int, labels.aminmax())) if labels.numel() else ()
        if extremes and extremes[0] <= self.ignore_index <= extremes[1]:
            counted = labels != self.ignore_index
            classes = labels[counted]
            extremes = tuple(map(int, classes.aminmax())) if classes.numel() else ()
        for extreme in extremes:
            if not 0 <= extreme < z.shape[-1]:
                raise ValueError(f"label {extreme} is out of range: the model's logits have {z.shape[-1]} classes")
        return Target(labels, counted, classes.numel())

    def finite(self, z: Tensor, target: Target) -> bool:
        # A logit of -inf is a class that cannot be: allowed, unless it is the label's.
        deciding = _wide(z.amax(-1))  # NaN where any is
        if self.kind in _GIVEN and target.labels is not None:
            labels = target.labels if target.counted is None else target.labels.where(target.counted, 0)
            deciding = deciding + z.gather(-1, labels[..., None])[..., 0]
        if self.smoothing:
            deciding = deciding + z.amin(-1)
        if target.counted is not None:
            deciding = deciding[target.counted]
        return math.isfinite(deciding.sum(dtype=torch.float64))

    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        z = _wide(z.detach())
        every = target.counted
        probs = (z if every is None else z[every]).softmax(-1)  # (..., C), or (terms, C)
        if self.kind == "exact":
            yield from self._exact(z, every, probs)
            return
        draws = self.draws if self.kind == "sampled" else 1
        for draw in range(draws):
            if self.kind == "sampled":
                classes = draw_classes(probs, generator)
            elif self.kind == "predicted":
                classes = probs.argmax(-1)
            else:
                assert target.labels is not None
                classes = target.labels if every is None else target.labels[every]
            smoothed = self.smoothing * (1 / z.shape[-1] - probs) if self.smoothing else None
            # With a large vocabulary these are the largest tensors of all: the last takes the probabilities' place.
            row = residual_(probs if draw == draws - 1 else probs.clone(), classes)
            if smoothed is not None:
                row = row.mul_(1 - self.smoothing).add_(smoothed)
            if draws > 1:
                row /= draws**0.5
            if every is None:
                yield row
            else:
                yield torch.zeros_like(z).masked_scatter_(every[..., None], row)

    def _exact(self, z: Tensor, every: Tensor | None, probs: Tensor) -> Iterator[Tensor]:
        num_classes = z.shape[-1]
        if every is None:
            rows = probs.reshape(len(z), -1, num_classes)  # (N, positions, C)
            used = list(range(rows.shape[1]))
        else:
            flat = every.reshape(len(z), -1)
            rows = torch.zeros_like(z).reshape(*flat.shape, num_classes)  # nothing follows from what does not count
            rows[flat] = probs
            used = flat.any(0).nonzero()[:, 0].tolist()
        check_backwards(len(used) * (num_classes - 1), f"{len(used)} positions of {num_classes} classes")
        for position in used:
            for cotangent in factor_of_covariance(rows[:, position]):
                if z.dim() > 2:
                    at_position = torch.zeros_like(rows)
                    at_position[:, position] = cotangent
                    cotangent = at_position.reshape(z.shape)
                yield cotangent


def factor_of_covariance(probs: Tensor) -> Iterator[Tensor]:
    """Of probabilities (N, C), ``C - 1`` tensors l of this shape: the sum of ``l l^T`` is ``diag(p) - p p^T``.

    So it is for the ``C`` residuals ``sqrt(p_c) (1_c - p)``, whose sum of squares is the expectation over the classes;
    but these are one fewer. The Cholesky factor has a closed form in which nothing is subtracted, each class against
    all that come after it: Tanabe and Sagae, "An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution, with applications", JRSS B, 1992.
    """
    tiny = torch.finfo(probs.dtype).tiny
    count, num_classes = probs.shape
    from_here = probs.flip(-1).cumsum(-1).flip(-1)
    later = from_here[:, 1:]
    share = (probs / from_here.clamp_min(tiny))[:, :-1]
    here, of_later = (share * later).sqrt(), (share / later.clamp_min(tiny)).sqrt().neg_()
    # Several at once: on small models these few numbers would take as long as the backward passes.
    at_once = max(1, _EXACT_NUMBERS // max(1, probs.numel()))
    for first in range(0, num_classes - 1, at_once):
        classes = slice(first, min(first + at_once, num_classes - 1))
        factors = probs.new_empty(classes.stop - first, count, num_classes)
        by_sample = factors.transpose(0, 1)
        torch.mul(probs[:, None], of_later[:, classes, None], out=by_sample)
        by_sample.triu_(first + 1).diagonal(first, 1, 2).copy_(here[:, classes])
        yield from factors


def residual_(probs: Tensor, classes: Tensor) -> Tensor:
    """``d log p(class) / d logits`` in the probabilities' place.

    The chosen entry, 1 - p, is summed from the others, or it cancels.
    """
    index = classes[..., None]
    others = probs.scatter_(-1, index, 0)
    rest = others.sum(-1, keepdim=True)
    return others.neg_().scatter_(-1, index, rest)


def check_backwards(count: int, what: str) -> None:
    """Raises where ``exact`` would take more backward passes over each batch than anyone waits for."""
    if count > EXACT_BACKWARDS:
        raise ValueError(
            f"kind='exact' would take {count} backward passes over each batch ({what}; at most {EXACT_BACKWARDS} are "
            "done): use kind='sampled', with num_label_samples for less noise"
        )


def following_labels(labels: Tensor, mask: Any, ignored: int) -> Tensor:
    """The label after each token but the last, (B, T - 1), and ``ignored`` where a mask (B, T) says padding."""
    labels = labels[:, 1:]
    if labels.dtype in (torch.uint8, torch.int8):
        labels = labels.long()  # which hold no such number
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return labels
    seen = (mask != 0).to(labels.device)
    # Nor does a first token after padding on the left count, which would be predicted from padding.
    return torch.where(seen[:, 1:] & seen[:, :-1], labels, labels.new_full((), ignored))


def _prompt_hint(more: int) -> str:
    return f"; of a model that puts {more} positions first (prompt tuning): logits_transform=lambda z: z[:, {more}:]"


class CausalLM(CrossEntropy):
    """The next token: logits at t against the label at t + 1. The unit is the token."""

    name = "causal_lm"
    unit = "token"

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        z = super().output(model, batch)
        if z.dim() != 3 or z.shape[1] < 2:
            raise ValueError(
                f"loss='causal_lm' needs logits (batch, tokens, vocabulary) over two tokens or more, got "
                f"{tuple(z.shape)}"
            )
        return z[:, :-1]

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        if keeps_labels(model):
            raise ValueError(
                f"loss='causal_lm' shifts the labels by one, which {type(model).__name__} does not do: use "
                "loss='cross_entropy'"
            )
        call = take_apart(batch)
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        labels = ids if call.labels is None else call.labels
        if not isinstance(labels, Tensor):
            raise ValueError("loss='causal_lm' needs labels, or input_ids to take them from")
        if labels.dim() != 2 or labels.shape[1] != z.shape[1] + 1:
            hint = ""
            if labels.dim() == 2 and 0 < (more := z.shape[1] + 1 - labels.shape[1]):
                hint = _prompt_hint(more)
            raise ValueError(
                f"labels must have shape (batch, tokens) = ({z.shape[0]}, {z.shape[1] + 1}), got {tuple(labels.shape)}"
                f"{hint}"
            )
        if is_packed(call.kwargs, labels != self.ignore_index):
            raise ValueError(
                "position_ids, seq_idx or cu_seq_lens_q say that a row has several documents (packing), whose "
                "gradients could not be told apart: give each document a row of its own"
            )
        labels = following_labels(labels.to(z.device), call.kwargs.get("attention_mask"), self.ignore_index)
        return self._given(z, labels, tuple(z.shape[:-1]))


class BinaryCrossEntropy(Objective):
    """Independent binary labels, log-likelihood summed over them; the unit is the sample."""

    name = "binary_cross_entropy"

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        labels = self._labels(batch)
        if z.dim() < 1 or len(z) != batch_size(batch):
            raise ValueError(f"model(inputs) must return logits (batch, ...), got {tuple(z.shape)}")
        if self.kind not in _GIVEN:
            return Target(None, None, len(z))
        assert labels is not None
        labels = labels.to(z.device)
        if labels.shape != z.shape:
            raise ValueError(f"labels must have the logits' shape {tuple(z.shape)}, got {tuple(labels.shape)}")
        labels = labels.to(torch.promote_types(z.dtype, torch.float32))
        if not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError("binary labels must lie in [0, 1]")
        return Target(labels, None, len(z))

    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        z = _wide(z.detach())
        p = z.sigmoid()
        if self.kind == "exact":
            yield from _one_output_at_a_time((p * (-z).sigmoid()).sqrt())
        elif self.kind == "sampled":
            for _ in range(self.draws):
                y = _draw_on(p, generator, lambda q: torch.bernoulli(q, generator=generator))
                yield torch.where(y > 0, (-z).sigmoid(), -p) / self.draws**0.5
        elif self.kind == "predicted":
            yield torch.where(p > 0.5, (-z).sigmoid(), -p)
        else:
            assert target.labels is not None
            yield target.labels * (-z).sigmoid() - (1 - target.labels) * p


class Gaussian(Objective):
    """A normal distribution of unit variance around each output, log-likelihood summed over outputs."""

    name = "gaussian"

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        labels = self._labels(batch)
        if z.dim() < 1 or len(z) != batch_size(batch):
            raise ValueError(f"model(inputs) must return outputs (batch, ...), got {tuple(z.shape)}")
        if self.kind not in _GIVEN:
            return Target(None, None, len(z))
        assert labels is not None
        if labels.shape != z.shape:
            hint = ": logits_transform=lambda z: z[..., 0]" if z.shape == (*labels.shape, 1) else ""
            raise ValueError(f"labels must have the outputs' shape {tuple(z.shape)}, got {tuple(labels.shape)}{hint}")
        return Target(labels.to(z.device, torch.promote_types(z.dtype, torch.float32)), None, len(z))

    def finite(self, z: Tensor, target: Target) -> bool:
        return bool((z if target.labels is None else z - target.labels).isfinite().all())

    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        z = _wide(z.detach())
        if self.kind == "exact":
            yield from _one_output_at_a_time(torch.ones_like(z))
        elif self.kind == "sampled":
            device = z.device if generator is None else generator.device
            for _ in range(self.draws):
                noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=device)
                yield noise.to(z.device) / self.draws**0.5
        else:
            assert target.labels is not None
            yield target.labels - z


def _one_output_at_a_time(scale: Tensor) -> Iterator[Tensor]:
    flat = scale.reshape(len(scale), -1)
    check_backwards(flat.shape[1], f"{flat.shape[1]} outputs")
    for i in range(flat.shape[1]):
        cotangent = torch.zeros_like(flat)
        cotangent[:, i] = flat[:, i]
        yield cotangent.reshape(scale.shape)


class PerSampleLoss(Objective):
    """Any ``loss(model, batch)`` that returns a loss for each sample."""

    def __init__(self, kind: str, loss: Callable[..., Tensor]) -> None:
        super().__init__(kind, None, 1)
        self.loss = loss
        self.name = getattr(loss, "__name__", type(loss).__name__)

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        losses = self.loss(model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (batch_size(batch),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss(model, batch) must return a loss for each sample, shape ({batch_size(batch)},), got {got}: use "
                "reduction='none'"
            )
        return losses

    def target(self, model: nn.Module, z: Tensor, batch: Any) -> Target:
        return Target(None, None, len(z))

    def cotangents(self, z: Tensor, target: Target, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield torch.ones_like(z)


def make_objective(kind: str, loss: Any, transform: Transform | None, draws: int) -> Objective:
    """The objective that ``loss`` names.

    Raises:
        ValueError: A kind or loss that does not exist, or that do not go together.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} does not exist: use one of {', '.join(map(repr, KINDS))}")
    check_count(draws, "num_label_samples")
    if draws != 1 and kind != "sampled":
        raise ValueError(f"num_label_samples={draws} has a meaning for kind='sampled' only; kind is {kind!r}")
    for base in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
        if isinstance(loss, base) and type(loss).forward is not base.forward:
            raise ValueError(
                f"loss={type(loss).__name__} computes something else than {base.__name__}: give loss= a "
                "callable(model, batch) that returns a loss for each sample"
            )
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None:
            raise ValueError(
                "class weights make no log-likelihood: drop weight=, or give loss= a callable(model, batch)"
            )
        if loss.label_smoothing and kind in ("exact", "sampled"):
            raise ValueError(
                f"kind={kind!r} takes the model's own labels, which no smoothing applies to: use loss='cross_entropy'"
            )
        return CrossEntropy(kind, transform, draws, loss.ignore_index, loss.label_smoothing)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        if loss.weight is not None or loss.pos_weight is not None:
            raise ValueError(
                "weight and pos_weight make no log-likelihood: drop them, or give loss= a callable(model, batch)"
            )
        loss = "binary_cross_entropy"
    of_torch = (
        type(loss).__module__.startswith("torch.nn")
        if isinstance(loss, nn.Module)
        else (getattr(loss, "__module__", None) == "torch.nn.functional")
    )
    if of_torch:
        raise ValueError(
            f"loss={getattr(loss, '__name__', type(loss).__name__)} is a criterion of (output, target): use one of "
            f"{', '.join(map(repr, LOSSES))}, or a callable(model, batch) that returns a loss for each sample"
        )
    if callable(loss):
        if kind not in ("empirical", "batch"):
            raise ValueError(
                f"kind={kind!r} is unknown to a callable loss(model, batch), which has given labels: use "
                "kind='empirical', or a loss by name, such as loss='cross_entropy'"
            )
        if transform is not None:
            raise ValueError("logits_transform has no meaning for a callable loss, which sees the logits itself")
        return PerSampleLoss(kind, loss)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} does not exist: use one of {', '.join(map(repr, LOSSES))}, or a callable")
    if loss == "gaussian" and kind in ("predicted", "reversed"):
        raise ValueError(
            f"kind={kind!r} has no meaning for loss='gaussian': its prediction has no residual, and no logits"
        )
    made = {c.name: c for c in (CrossEntropy, CausalLM, BinaryCrossEntropy, Gaussian)}[loss]
    return made(kind, transform, draws)
