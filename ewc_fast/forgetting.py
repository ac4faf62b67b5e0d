"""``ForgettingProbe``: how far a model has moved from what it said before, measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ewc_fast.checks import check_count
from ewc_fast.fisher.batches import Call, check_no_row, take, take_apart
from ewc_fast.fisher.batches import batch_size as rows_of
from ewc_fast.fisher.objectives import check_causal, logits_of
from ewc_fast.layout import unwrapped
from ewc_fast.sequences import device_of, undisturbed


class ForgettingProbe:
    """Measures forgetting without the old data: KL(then || now) on samples, in nats per token or per sample.

    It keeps what the model says of the samples when the probe is made. A call runs the model on them again, one forward
    pass, and returns how far its distribution has moved since. What the samples are, is seen from the model's output:

    - *Language model*: samples are tokens (N, T), logits (N, T, V). The log-probability of each sample's tokens is
      kept, (N, T), not N * T * V numbers; returned is the mean over the counted tokens of
      ``log p_then(x) - log p_now(x)``. For sequences that the model wrote itself just before
      (:func:`ewc_fast.sample_sequences`, temperature 1) that is an unbiased estimate of the KL divergence per token.
      On any other text, that of another temperature too, it is the rise of the mean loss on that text. Being an
      estimate, it may come out below 0.
    - *Classifier*: samples are unlabelled inputs, logits (N, C). The N * C log-probabilities are kept; returned is the
      mean over the samples of the KL divergence over the classes (softmax over the last dimension), never negative.
      Outputs that are no such logits (of several binary labels, of a regression) cannot be told from these, and what
      is returned for them means nothing: give :class:`ewc_fast.EWCBudget` a function of your own.

    Seen on a 135M language model (docs/language-model.md): on 64 sequences it put a run with and one without a penalty
    in the right order and grew as the latter forgot. It also counts change that costs the old task nothing, or helps
    it.

    The model is in evaluation mode meanwhile, without a graph; every module's mode, gradients and the global random
    state are left as found, also when it raises. It is held by reference and may move to another device or dtype in
    between. Where its forward is deterministic, the probe of unchanged weights is exactly 0; call it under the autocast
    that it was made under. All that is kept lies on the CPU: a copy of the samples, and 4 bytes (8 for an fp64 model)
    per token or class.

    Args:
        model: Returns logits as a tensor, ``.logits`` or ``["logits"]``, treating the samples of a batch independently.
        samples: Inputs as a tensor (N, ...) or a dict of tensors, cut into batches of ``batch_size``; or a list or a
            loader of batches as :func:`ewc_fast.estimate_fisher` takes them, which is read once. Labels are not looked
            at, but for a language model's: tokens whose label is -100 do not count, nor do those whose
            ``attention_mask`` is 0.
        batch_size: Samples per forward pass, where ``samples`` is one tensor or dict.
        num_prompt_tokens: Of a language model's sequences, the leading tokens that it did not write and that do not
            count (padding apart). At least 1: the first token has no prediction.

    Attributes:
        model: The model, as given.
        unit: ``"token"`` or ``"sample"``.
        num_samples: Sequences or inputs kept.
        num_terms: Tokens or inputs that count.

    Raises:
        TypeError: Samples, a batch or a model's output of a type that is not supported.
        ValueError: An encoder-decoder, or a model that gives each token a label of its own (but for classifiers of
            sequences); no samples, no token that counts, logits of neither shape above, tokens out of the model's
            vocabulary, log-probabilities that are not finite, ``batch_size`` or ``num_prompt_tokens`` below 1,
            ``num_prompt_tokens`` above 1 for a classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor | Mapping[str, Any] | Iterable[Any],
        *,
        batch_size: int = 8,
        num_prompt_tokens: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_prompt_tokens", num_prompt_tokens)):
            check_count(value, name)
        check_causal(unwrapped(model), "a probe takes a causal language model or a classifier")
        self.model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._calls = [_copied(call, torch.device("cpu")) for call in _calls(samples, batch_size)]
        self._then: list[Tensor] = []
        counts = []
        units = set()
        for index, logits in self._outputs():
            with _batch_named(index):
                targets = self._targets(index, logits)
                units.add("sample" if targets is None else "token")
                then = _log_probs(logits, targets)
                if targets is not None and not then.isfinite().all():
                    raise ValueError("the model gives probability 0 to a token of these samples: they are not its own")
                self._then.append(then)
                counts.append(torch.ones(len(then)) if targets is None else (targets >= 0).sum(1).cpu())
        if len(units) != 1:
            raise ValueError("samples are empty" if not units else "samples mix a language model's with a classifier's")
        self.unit = units.pop()
        if self.unit == "sample" and num_prompt_tokens != 1:
            raise ValueError("num_prompt_tokens is for language models: leave it out for a classifier")
        self._counts = torch.cat(counts).double()
        self.num_samples = len(self._counts)
        self.num_terms = int(self._counts.sum())
        if not self.num_terms:
            raise ValueError(
                "no token counts: sequences need two tokens or more, of which num_prompt_tokens "
                f"({num_prompt_tokens}), those labelled -100 and padding do not count"
            )
        self._standard_error: Tensor | None = None

    def __call__(self) -> Tensor:
        """Runs the model on the samples.

        Returns:
            0-dim fp64 tensor on the CPU: KL(then || now) in nats per token or sample.

        Raises:
            ValueError: The model's log-probabilities are NaN, or it now has another number of classes.
        """
        sums = []
        for index, logits in self._outputs():
            with _batch_named(index):
                now = _log_probs(logits, self._targets(index, logits))
                sums.append(self._divergence(self._then[index], now))
        mean, self._standard_error = _ratio(torch.cat(sums), self._counts)
        return mean

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the newest result over the draw of the samples, 0-dim fp64; NaN for a single sample.

        Sequences are drawn independently, their tokens are not, so that the sequence is what is counted: with the sum
        D_i of sequence i and its n_i tokens, the mean R = sum D_i / sum n_i is a ratio, whose variance is, to first
        order, ``N/(N-1) * sum (D_i - R n_i)^2 / (sum n_i)^2`` (Cochran, "Sampling Techniques", 3rd ed. 1977, chapter
        6); for equal n_i that is the usual standard error of a mean.

        Raises:
            RuntimeError: There is no result yet.
        """
        if self._standard_error is None:
            raise RuntimeError("there is no standard error before the first result: call the probe first")
        return self._standard_error

    def _outputs(self) -> Iterator[tuple[int, Tensor]]:
        """The logits of one batch after the other."""
        model = unwrapped(self.model)
        device = device_of(model)
        for index, kept in enumerate(self._calls):
            call = _copied(kept, device)  # a model may change its inputs in place
            with undisturbed(model), _batch_named(index):
                logits = logits_of(model(*call.args, **call.kwargs))
            yield index, logits

    def _targets(self, index: int, logits: Tensor) -> Tensor | None:
        """The token that each position predicts, (N, T-1), -1 where it does not count; None for a classifier."""
        call = self._calls[index]
        size = rows_of(call)
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        if logits.dim() == 2 and logits.shape[0] == size and logits.shape[1] > 1:
            return None
        if (
            not isinstance(ids, Tensor)
            or ids.is_floating_point()
            or ids.is_complex()
            or ids.dtype == torch.bool
            or ids.dim() != 2
            or ids.shape != logits.shape[:-1]
        ):
            raise ValueError(
                "a probe takes a language model, integer tokens (N, T) to logits (N, T, V), or a classifier, inputs to "
                f"logits (N, C) with C >= 2; got logits of shape {tuple(logits.shape)} for {size} samples. Wrap the "
                "model in a module that returns one of these"
            )
        counts = torch.ones_like(ids, dtype=torch.bool)
        mask = call.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            counts &= mask != 0
        counts &= counts.cumsum(1) > self._num_prompt_tokens
        targets = ids if call.labels is None else call.labels
        if targets.shape != ids.shape:
            raise ValueError(f"labels must have the tokens' shape {tuple(ids.shape)}, got {tuple(targets.shape)}")
        counts &= targets != -100
        wrong = targets[counts & ((targets < 0) | (targets >= logits.shape[-1]))]
        if wrong.numel():
            raise ValueError(
                f"token {wrong[0].item()} is out of range: the logits have {logits.shape[-1]} classes, which must be "
                "the vocabulary of a causal language model"
            )
        return targets.long().masked_fill(~counts, -1)[:, 1:].to(logits.device)

    def _divergence(self, then: Tensor, now: Tensor) -> Tensor:
        """Sum of the divergence over each sample's terms, (N,), fp64."""
        if then.shape != now.shape:
            raise ValueError(
                f"the model has {now.shape[-1]} classes now, and had {then.shape[-1]} when the probe was made: make a "
                "new probe"
            )
        then, now = then.double(), now.double()
        if self.unit == "token":
            return (then - now).sum(1)
        probs = then.exp()
        return (probs * (then - now)).masked_fill(probs == 0, 0).sum(1)


def _calls(samples: object, batch_size: int) -> Iterator[Call]:
    if isinstance(samples, (Tensor, Mapping)):
        call, size = take_apart(samples), rows_of(samples)
        yield from (take(call, slice(start, start + batch_size), size) for start in range(0, size, batch_size))
    elif isinstance(samples, Iterable) and not isinstance(samples, (str, tuple)):
        for index, batch in enumerate(samples):
            with _batch_named(index):
                check_no_row(batch)
                call = take_apart(batch)
                if rows_of(call):
                    yield call
    else:
        raise TypeError(
            f"samples must be a tensor, a dict of tensors, or a list or loader of batches, got {type(samples).__name__}"
        )


def _copied(call: Call, device: torch.device) -> Call:
    return tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), call)


def _log_probs(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Log-probabilities on the CPU, fp32 or fp64: of the targets (0 where they do not count), or of all classes.

    Raises:
        ValueError: NaN.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if targets is None:
        result = logits.to(wide).log_softmax(-1)
    else:  # a sequence at a time: all logits in fp32 would be the largest tensor of the pass
        losses = [
            F.cross_entropy(row[:-1].to(wide), target, ignore_index=-1, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
        result = -torch.stack(losses)
    if result.isnan().any():
        raise ValueError("the model's log-probabilities are NaN: check its weights for NaN and infinities")
    return result.cpu()


def _ratio(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """sum of ``sums`` over sum of ``counts``, and its standard error; samples without a term say nothing."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    total, size = counts.sum(), len(counts)
    ratio = sums.sum() / total
    if size == 1:
        return ratio, torch.full_like(ratio, torch.nan)
    return ratio, ((sums - ratio * counts).square().sum() * size / (size - 1)).sqrt() / total


@contextmanager
def _batch_named(index: int) -> Iterator[None]:
    """Puts the batch's index before the message of an error in the data."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.args = (f"batch {index} of the samples: {error}",)
        raise
