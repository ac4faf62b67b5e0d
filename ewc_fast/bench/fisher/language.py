"""A language model of SmolLM2-135M's shapes: what a sequence's squared gradient costs.

Needs transformers. Weights and tokens are random, on which no operation's time depends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_fast.bench.measure import interleave, median, peak_bytes, percentile, time_once
from ewc_fast.bench.peers import Unavailable
from ewc_fast.fisher import FisherEstimator

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
STEP = "step"
LOOP = "loop"
LEARNING_RATE = 1e-6
CPU = torch.device("cpu")


Estimate = tuple[Callable[[Tensor], None], Callable[[], Mapping[str, Tensor]]]
"""Two functions: adds a batch of sequences (B, T); gives the diagonal of all of them."""


@dataclass(frozen=True)
class SequenceResult:
    """One way. Times are of a sequence: those of a run over all of them, divided.

    Attributes:
        name, note: The way's.
        batch: Sequences per batch.
        times: Seconds in each round, of an estimate that has begun long before: of its updates.
        seconds, p10, p90: Median and percentiles of those.
        start_seconds: What an estimate takes once, besides: one over a single batch, from its first allocation to its
            result, less ``seconds`` for each of its sequences. None for the training step.
        off: Euclidean distance of the diagonal from the loop's, relative to that; under bf16 both are rounded, and a
            sampled one takes other labels. None for the training step and the loop.
        trace: The sum of the diagonal over the loop's; None for the training step.
        peak_bytes: The most memory that such an estimate had allocated at once, or the training step: the diagonal, or
            the step's gradients, among it.
    """

    name: str
    note: str
    batch: int
    times: list[float]
    seconds: float
    p10: float
    p90: float
    start_seconds: float | None
    off: float | None
    trace: float | None
    peak_bytes: int


class LanguageModel:
    """The model, its optimizer and its sequences.

    Args:
        config: Keyword arguments of ``LlamaConfig``.
        sequences, tokens: How many of each.
        autocast: bf16, or everything in fp32.
        device: Where all of it lies.
        seed: Of weights and tokens.

    Raises:
        Unavailable: transformers is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        sequences: int,
        tokens: int,
        *,
        autocast: bool = True,
        device: torch.device = CPU,
        seed: int = 0,
    ) -> None:
        try:
            transformers = import_module("transformers")
        except ModuleNotFoundError as error:
            raise Unavailable(f"transformers is not installed: pip install transformers ({error})") from error
        self.autocast, self.device = autocast, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
            self.sequences = torch.randint(config["vocab_size"], (sequences, tokens)).to(device)
        self.model: nn.Module = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def _context(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def _loss(self, tokens: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of each token but the first given those before it; (B, T) to a scalar."""
        with self._context():
            logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)

    def step(self) -> Estimate:
        """Training steps: forward, backward, AdamW."""

        def update(tokens: Tensor) -> None:
            self.optimizer.zero_grad()
            self._loss(tokens, "mean").backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return update, dict

    def loop(self) -> Estimate:
        """The loop of batch size 1: squared gradients of each sequence's summed log-likelihood, per token."""
        sums = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        terms = 0

        def update(tokens: Tensor) -> None:
            nonlocal terms
            for sequence in tokens.split(1):
                self.model.zero_grad()
                self._loss(sequence, "sum").backward()
                for name, p in self.model.named_parameters():
                    assert p.grad is not None
                    sums[name].addcmul_(p.grad, p.grad)
            self.model.zero_grad()
            terms += tokens[:, 1:].numel()

        return update, lambda: {name: total.div_(terms) for name, total in sums.items()}

    def ours(self, kind: str = "empirical") -> Estimate:
        """What ``estimate_fisher`` does, batch by batch."""
        estimator = FisherEstimator(self.model, kind=kind, loss="causal_lm")

        def update(tokens: Tensor) -> None:
            with self._context():
                estimator.update(tokens)

        return update, estimator.result


@dataclass(frozen=True)
class Way:
    """A way to a diagonal: its name, for the reader, sequences per batch, and what begins an estimate."""

    name: str
    note: str
    batch: int
    start: Callable[[], Estimate]


def ways(model: LanguageModel, batches: Sequence[int]) -> list[Way]:
    """All of them.

    Args:
        model: Whose.
        batches: Numbers of sequences per batch, the largest of which the training step takes.
    """
    largest = max(batches)
    return [
        Way(STEP, "a training step (forward, backward, fused AdamW)", largest, model.step),
        Way(LOOP, "a loop of batch size 1", 1, model.loop),
        *(Way(f"empirical_{b}", f'estimate_fisher(kind="empirical"), batches of {b}', b, model.ours) for b in batches),
        Way(
            f"sampled_{largest}",
            f"the same, sampled labels, batches of {largest}",
            largest,
            partial(model.ours, kind="sampled"),
        ),
    ]


def measure(
    config: Mapping[str, Any] = SMOLLM2,
    sequences: int = 8,
    tokens: int = 128,
    batches: Sequence[int] = (1, 4, 8),
    rounds: int = 5,
    *,
    autocast: bool | None = None,
    device: torch.device = CPU,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Times every way over the same sequences, interleaved.

    Args:
        config: As :class:`LanguageModel`.
        sequences: In a run.
        tokens: In a sequence.
        batches: Sequences per batch of ours.
        rounds: How often each way is timed, at least 1.
        autocast: bf16 in forward and backward; None for where the device is not many times slower in it than in fp32.
        device: Where to run.
        names: Ways to measure besides the training step and the loop; all if None.
        progress: Told what is being done.

    Returns:
        JSON-compatible: the model, and a :class:`SequenceResult` per way as a dict.

    Raises:
        Unavailable: transformers is not installed.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if autocast is None:
        autocast = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    language = LanguageModel(config, sequences, tokens, autocast=autocast, device=device)
    chosen = [way for way in ways(language, batches) if names is None or way.name in (STEP, LOOP, *names)]
    data = language.sequences
    progress("comparing values")
    wanted = _whole(language.loop, data, 1)
    values: dict[str, tuple[float | None, float | None]] = {STEP: (None, None), LOOP: (None, 1.0)}
    for way in chosen:
        if way.name not in values:
            values[way.name] = _compare(_whole(way.start, data, way.batch), wanted)
    del wanted
    progress(f"timing {len(chosen)} ways, {rounds} rounds")
    runs = {way.name: partial(time_once, partial(_updates, way.start()[0], data, way.batch), device) for way in chosen}
    times = {name: [ms / 1e3 / sequences for ms in mine] for name, mine in interleave(runs, rounds).items()}
    del runs
    progress("measuring what an estimate takes once, and memory")
    results = []
    for way in chosen:
        seconds = median(times[way.name])
        one = partial(_whole, way.start, data[: way.batch], way.batch)
        start = None
        if way.name != STEP:
            start = median([time_once(one, device) / 1e3 for _ in range(3)]) - seconds * way.batch
        results.append(
            SequenceResult(
                way.name,
                way.note,
                way.batch,
                times=times[way.name],
                seconds=seconds,
                p10=percentile(times[way.name], 10),
                p90=percentile(times[way.name], 90),
                start_seconds=start,
                off=values[way.name][0],
                trace=values[way.name][1],
                peak_bytes=peak_bytes(one, device),
            )
        )
    return {
        "description": "Llama of SmolLM2-135M's shapes" if config is SMOLLM2 else "a Llama",
        "parameters": sum(p.numel() for p in language.model.parameters()),
        "model_bytes": sum(p.nbytes for p in language.model.parameters()),
        "sequences": sequences,
        "tokens": tokens,
        "autocast": autocast,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ways": [asdict(result) for result in results],
    }


def _updates(update: Callable[[Tensor], None], tokens: Tensor, batch: int) -> None:
    for part in tokens.split(batch):
        update(part)


def _whole(start: Callable[[], Estimate], tokens: Tensor, batch: int) -> Mapping[str, Tensor]:
    """An estimate from its first allocation to its result."""
    update, result = start()
    _updates(update, tokens, batch)
    return result()


def _compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, float]:
    """Relative Euclidean distance, and the ratio of the traces."""
    assert found.keys() == wanted.keys(), f"parameters {sorted(found.keys() ^ wanted.keys())} on one side only"
    distance = sum((found[name] - w).double().square().sum().item() for name, w in wanted.items()) ** 0.5
    norm = sum(w.double().square().sum().item() for w in wanted.values()) ** 0.5
    trace = sum(f.double().sum().item() for f in found.values()) / sum(w.double().sum().item() for w in wanted.values())
    return distance / norm, trace
