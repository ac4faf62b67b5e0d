"""``sample_sequences``: text that a language model writes itself, to stand for the old data where there is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast.fisher.modes import module_mode
from ewc_fast.fisher.objectives import check_causal, logits_of
from ewc_fast.layout import check_materialised, own_name, unwrapped

_CACHES = ("cache", "past_key_values")  # transformers renamed the argument
_WHOLE = 2.0**52  # probabilities are summed in units of 1/_WHOLE


def sample_sequences(
    model: nn.Module,
    num_sequences: int,
    length: int,
    generator: torch.Generator | None = None,
    *,
    prompts: Tensor | None = None,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Tensor:
    """Lets a causal language model write sequences, token by token.

    Whoever fine-tunes a published language model does not have the text that it was trained on. What it writes itself,
    at temperature 1 and over its whole vocabulary, is drawn from its own distribution: the ``"empirical"`` Fisher of
    such text (``loss="causal_lm"``) is a ``"sampled"`` one, and :class:`ewc_fast.ForgettingProbe` measures on it how
    far the model has moved.

    Every draw takes one number of the generator, all of them at the start, so that the result depends on neither
    ``batch_size`` nor the use of a cache (beyond the rounding of the model's logits). Nothing stops a sequence: after
    an end-of-text token the model goes on with what it would write next.

    The model is in evaluation mode meanwhile, without a graph; every module's mode is restored, also when it raises. It
    is called as ``model(tokens)``, around ``DistributedDataParallel`` and ``torch.compile``. If its ``forward`` takes
    ``use_cache`` and ``past_key_values`` (``cache`` in newer versions of transformers) and returns the latter, as
    Hugging Face's causal models do, each step computes one new token; any other model reads the whole prefix at each
    step. Autocast acts as usual.

    Args:
        model: Maps tokens (B, T), int64, to logits (B, T, V), returned as a tensor or as ``.logits`` or ``["logits"]``;
            the logits at a position must not depend on later tokens, nor on other sequences.
        num_sequences: Number of sequences N.
        length: Tokens T of each, at least 2, prompts included, at most ``model.config.max_position_embeddings``.
        generator: Source of the draws, on any device; only it advances, the global random state is left as found. None
            for the global random state of the CPU.
        prompts: (P,) integers that every sequence begins with, or (N, P), one row for each; 1 <= P < length. A start
            token is a prompt of one token. None: the first token is drawn uniformly from the vocabulary, as far as the
            input embedding (``model.get_input_embeddings()``) reaches; where a vocabulary is padded with tokens that
            were never trained, give prompts of tokens that were. The model did not draw a prompt: label it -100 for the
            Fisher, and give the probe ``num_prompt_tokens``.
        temperature: Divides the logits. Other than 1, the text is not from the model's distribution, and neither
            statement above holds.
        batch_size: Sequences written at a time; memory (cache and logits) is proportional to it.

    Returns:
        (N, T), int64, on the device of the model's first parameter.

    Raises:
        TypeError: A model that returns no logits, prompts that are no tensor, a generator that is none.
        ValueError: A model of transformers that is no causal one, ``num_sequences`` or ``batch_size`` below 1, a
            ``length`` below 2 or beyond the model's positions, a temperature that is not positive and finite, a model
            on the meta device, prompts of the wrong shape or dtype or out of the vocabulary, logits that are not (B, T,
            V) or not finite.
    """
    _check_arguments(num_sequences, length, generator, temperature, batch_size)
    model = unwrapped(model)
    check_causal(model, "sample_sequences takes a causal language model")
    device = device_of(model)
    max_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(max_positions, int) and 0 < max_positions < length:
        raise ValueError(f"length is {length}, but the model has only {max_positions} positions: use a smaller length")
    if prompts is not None:
        prompts = _check_prompts(prompts, num_sequences, length).to(device, torch.int64)
    with undisturbed(model):
        limit = _vocabulary(model, device)
    if prompts is not None and (prompts.min() < 0 or prompts.max() >= limit):
        raise ValueError(
            f"prompts must be tokens of the model's vocabulary, 0 to {limit - 1}, got {int(prompts.min())} to "
            f"{int(prompts.max())}"
        )
    known = 0 if prompts is None else prompts.shape[-1]
    # In (0, 1], so that a token of probability 0 is never drawn.
    source = torch.device("cpu") if generator is None else generator.device
    uniform = 1 - torch.rand(num_sequences, length - known, dtype=torch.float64, generator=generator, device=source)
    with undisturbed(model):
        uniform = uniform.to(device)
        tokens = torch.empty(num_sequences, length, dtype=torch.int64, device=device)
        if prompts is None:
            tokens[:, 0] = (uniform[:, 0] * limit).ceil().long() - 1
            uniform, known = uniform[:, 1:], 1
        else:
            tokens[:, :known] = prompts
        for part, draws in zip(tokens.split(batch_size), uniform.split(batch_size), strict=True):
            _write(model, part, draws, known, limit, temperature)
    return tokens


def _write(model: nn.Module, tokens: Tensor, uniform: Tensor, known: int, limit: int, temperature: float) -> None:
    """Fills in ``tokens[:, known:]``."""
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHES if name in accepted and "use_cache" in accepted), None)
    options: dict[str, Any] = {} if name is None else {"use_cache": True}
    if "logits_to_keep" in accepted:  # of a long prompt, the last position's are enough
        options["logits_to_keep"] = 1
    cache = None
    for position, draws in zip(range(known, tokens.shape[1]), uniform.unbind(1), strict=True):
        seen = tokens[:, :position] if cache is None else tokens[:, position - 1 : position]
        output = model(seen, **options)
        logits = _check_logits(output, len(tokens))[:, -1, :limit]
        tokens[:, position] = draw(logits, draws, temperature, position)
        if name is not None:
            cache = getattr(output, name, None)
            options[name] = cache


def draw(logits: Tensor, uniform: Tensor, temperature: float, position: int) -> Tensor:
    """Draws a class per row by inverting the distribution function.

    It is summed over integers: exact, so that the result is the same on every device and deterministic where sums of
    floating point numbers on a GPU are not; tokens of probability 2^-52 are still told apart, where the exponential
    variates of ``torch.multinomial``, fp32, end at 2^-24.

    Args:
        logits: (B, V).
        uniform: (B,), fp64, in (0, 1].
        temperature: Divides the logits.
        position: For the error message.

    Returns:
        (B,), int64.

    Raises:
        ValueError: Logits that are NaN or +inf, or all -inf.
    """
    probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)
    if not probs.isfinite().all():
        raise ValueError(
            f"the model's logits for token {position} are not finite: check its weights for NaN and infinities"
        )
    cumulative = (probs * _WHOLE).long().cumsum(-1)
    threshold = (uniform * cumulative[:, -1]).ceil().long()
    return torch.searchsorted(cumulative, threshold[:, None])[:, 0]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, which must not be meta; the CPU if it has none."""
    for name, p in model.named_parameters():
        check_materialised(own_name(model, name), p)
        return p.device
    return torch.device("cpu")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs a model in evaluation mode, without a graph; its modes and the global random state are left as found."""
    device = device_of(model)
    try:
        with (
            module_mode(model, training=False),
            torch.inference_mode(False),  # what comes out may be an input of training
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            yield
    finally:
        # Before torch 2.11 autocast keeps the weights that it casts here without a graph, and a training step under the
        # same autocast would take them: no gradient would reach the parameters (pytorch/pytorch#112583).
        torch.clear_autocast_cache()


def _vocabulary(model: nn.Module, device: torch.device) -> int:
    """How many tokens the model can both write and read."""
    sizes = [_check_logits(model(torch.zeros(1, 1, dtype=torch.int64, device=device)), 1).shape[-1]]
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # what transformers' base class raises for a model without one
        embedding = None
    for size in (
        getattr(embedding, "num_embeddings", None),
        getattr(getattr(model, "config", None), "vocab_size", None),
    ):
        if isinstance(size, int) and size > 0:
            sizes.append(size)
    return min(sizes)


def _check_logits(output: object, num_sequences: int) -> Tensor:
    logits = logits_of(output)
    if logits.dim() != 3 or logits.shape[0] != num_sequences or not logits.shape[1] or not logits.shape[2]:
        raise ValueError(
            "model(tokens) must return logits of shape (batch, tokens, vocabulary), as a causal language model does, "
            f"got {tuple(logits.shape)} for {num_sequences} sequences"
        )
    return logits


def _check_prompts(prompts: object, num_sequences: int, length: int) -> Tensor:
    if not isinstance(prompts, Tensor):
        raise TypeError(f"prompts must be a tensor of tokens, (P,) or (N, P), got {type(prompts).__name__}")
    if prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
        raise ValueError(f"prompts must be integers (tokens), got {prompts.dtype}")
    if prompts.dim() not in (1, 2) or (prompts.dim() == 2 and len(prompts) != num_sequences):
        raise ValueError(
            f"prompts must have shape (P,) or (num_sequences, P) = ({num_sequences}, P), got {tuple(prompts.shape)}; "
            "for prompts of several lengths call once per length"
        )
    if not 1 <= prompts.shape[-1] < length:
        raise ValueError(
            f"prompts must have 1 to {length - 1} tokens, for they count towards length={length}, "
            f"got {prompts.shape[-1]}"
        )
    return prompts


def _check_arguments(
    num_sequences: object, length: object, generator: object, temperature: object, batch_size: object
) -> None:
    for name, value, least in (
        ("num_sequences", num_sequences, 1),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if (
        not isinstance(temperature, (int, float))
        or isinstance(temperature, bool)
        or not (temperature > 0 and math.isfinite(temperature))
    ):
        raise ValueError(f"temperature must be a positive, finite number, got {temperature!r}")
