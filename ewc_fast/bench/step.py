"""What EWC adds to a whole training step: forward, backward and optimizer of a language model, with and without it.

Every variant trains the same model with the same optimizer state, one step each in turn, so that memory holds them
once. Their weights drift together, in steps so small that neither the losses nor the distance from the anchor change
over a run; no operation's time depends on the values anyway. What EWC adds is taken within each round, against the step
without it in that round, so that what disturbs the machine for longer than a round cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_fast import EWCAdamW, EWCLoss
from ewc_fast.bench.measure import dtype_name, interleave, median, peak_bytes, percentile, time_once
from ewc_fast.bench.peers import closed_form_, eager_loss
from ewc_fast.bench.problem import LAMBDA
from ewc_fast.bench.text import check_names, size
from ewc_fast.bench.text import markdown as markdown_table

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class GPTConfig:
    """A GPT-2 (Radford et al. 2019) in sizes.

    Attributes:
        name: As the command line knows it.
        blocks, width, heads: Of the transformer.
        vocabulary, positions: Rows of the two embeddings.
    """

    name: str
    blocks: int
    width: int
    heads: int
    vocabulary: int
    positions: int


CONFIGS: dict[str, GPTConfig] = {
    config.name: config
    for config in (
        GPTConfig("gpt2_mini", blocks=2, width=128, heads=4, vocabulary=1000, positions=128),
        GPTConfig("gpt2_small", blocks=12, width=768, heads=12, vocabulary=50257, positions=1024),
    )
}


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A causal language model of GPT-2's shapes, its head tied to the embedding; without dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.blocks)))
        self.norm = nn.LayerNorm(config.width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per token, of each token but the first given those before it.

        Args:
            tokens: (B, T + 1), int64.
        """
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(given) + self.positions.weight[: given.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


class TrainingStep:
    """A model, its optimizer and what EWC keeps, to be stepped in any of the variants.

    Args:
        config: The model's sizes.
        device: Where everything lies.
        batch: Sequences per micro-batch.
        tokens: Tokens per sequence.
        micro_batches: The most that a step will be asked to accumulate.
        dtype: Of the parameters.
        autocast: The dtype of the forward's matrix products; as the parameters if None.
        backend: EWCLoss's.
        seed: Of the random numbers.

    Attributes:
        model, optimizer: A :class:`GPT` and its fused AdamW.
        ewc: Its EWCLoss; the Fisher uniform below 0.01, the anchor about 0.001 off, so that the penalty's gradient is
            about as large as the task's.
    """

    def __init__(
        self,
        config: GPTConfig,
        device: str | torch.device = "cpu",
        batch: int = 1,
        tokens: int = 128,
        micro_batches: int = 1,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        if not 0 < tokens <= config.positions:
            raise ValueError(f"tokens must be 1 to {config.positions}, {config.name}'s positions, got {tokens}")
        self.device, self.autocast, self.backend = torch.device(device), autocast, backend
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = GPT(config).to(self.device, dtype)
        generator = torch.Generator(self.device).manual_seed(seed)
        self.params = list(self.model.parameters())
        self._fused: dict[tuple[int, str], EWCAdamW] = {}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE, fused=True)
        self.ewc = EWCLoss(self.model, LAMBDA, backend=backend)
        self.ewc.consolidate(
            fisher={n: self._noise(torch.rand, p, generator).mul_(0.01) for n, p in self.model.named_parameters()},
            anchor={
                n: self._noise(torch.randn, p, generator).mul_(1e-3).add_(p.detach())
                for n, p in self.model.named_parameters()
            },
        )
        self.micro_batches = torch.randint(
            config.vocabulary, (micro_batches, batch, tokens + 1), generator=generator, device=self.device
        )

    def _noise(self, draw: Callable[..., Tensor], p: Tensor, generator: torch.Generator) -> Tensor:
        return draw(p.shape, generator=generator, dtype=p.dtype, device=p.device)

    @cached_property
    def ewc_bf16_fisher(self) -> EWCLoss:
        """The same with the Fisher in bf16."""
        ewc = EWCLoss(self.model, LAMBDA, fisher_dtype=torch.bfloat16, backend=self.backend)
        ewc.consolidate(fisher=self.ewc.fisher, anchor=self.ewc.anchor)
        return ewc

    @cached_property
    def state(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Parameter, Fisher and anchor of each parameter."""
        return list(zip(self.params, self.ewc.fisher.values(), self.ewc.anchor.values(), strict=True))

    def fused(self, ewc: EWCLoss, coupling: str) -> EWCAdamW:
        """The optimizer with the penalty in it; it steps the same parameters from the same state."""
        key = (id(ewc), coupling)
        if key not in self._fused:
            optimizer = EWCAdamW(self.params, lr=LEARNING_RATE, ewc=ewc, coupling=coupling)
            optimizer.state = self.optimizer.state
            assert optimizer._fused.attachment is not None
            optimizer._fused.attachment.remove()  # one of many over the same parameters, of which one steps at a time
            self._fused[key] = optimizer
        return self._fused[key]

    def step(self, variant: Variant, micro_batches: int = 1) -> None:
        """One optimizer step, as its user writes it. :meth:`attached` has to be entered first."""
        self.optimizer.zero_grad()
        for tokens in self.micro_batches[:micro_batches]:
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss = self.model(tokens)
            if variant.penalty is not None:
                loss = loss + variant.penalty(self)
            (loss / micro_batches).backward()
        if variant.add_gradient is not None:
            variant.add_gradient(self)
        (self.optimizer if variant.optimizer is None else variant.optimizer(self)).step()

    @contextmanager
    def attached(self, variant: Variant) -> Iterator[None]:
        """Attaches the variant's EWCLoss, if it has one to attach, for the time inside."""
        if variant.attach is None:
            yield
            return
        handle = variant.attach(self).attach(self.optimizer)
        handle.parts()  # here, for a user's first step makes them, and no later one
        try:
            yield
        finally:
            handle.remove()

    def gradients(self, variant: Variant, micro_batches: int = 1) -> list[Tensor]:
        """The gradients that the optimizer steps with, at the present weights, which stay as they are."""
        (group,) = self.optimizer.param_groups
        group["lr"] = 0.0
        try:
            with self.attached(variant):
                self.step(variant, micro_batches)
        finally:
            group["lr"] = LEARNING_RATE
        grads = [p.grad for p in self.params if p.grad is not None]
        self.optimizer.zero_grad()
        return grads

    def check(self, variant: Variant, plain: Sequence[Tensor], micro_batches: int = 1) -> None:
        """A variant's gradients against those without EWC plus the formula in fp64.

        Sums in another order and, per micro-batch, a rounding of the sum: allowed are 20 of the parameters' unit
        roundoffs, relative to each tensor's largest. Under autocast two of the narrower type's, for a GPU's attention
        adds up its gradient in an order of its own each time.

        Args:
            variant: Which.
            plain: What :meth:`gradients` gives for ``plain`` at the same weights.
            micro_batches: How many are accumulated.

        Raises:
            AssertionError: They differ; names the variant and the parameter.
        """
        grads = self.gradients(variant, micro_batches)
        names = [name for name, _ in self.model.named_parameters()]
        fishers = (variant.attach(self) if variant.attach else self.ewc).fisher
        for name, g, task, (p, _, a) in zip(names, grads, plain, self.state, strict=True):
            penalty = LAMBDA * fishers[name].double() * (p.detach().double() - a.double())
            wanted = task.double() + penalty
            roundoffs = max(10 * torch.finfo(p.dtype).eps, torch.finfo(self.autocast or p.dtype).eps)
            off = (g.double() - wanted).abs().max().item()
            allowed = roundoffs * (task.abs().max().item() + penalty.abs().max().item())
            if not off <= allowed:
                raise AssertionError(
                    f"{variant.name}: the gradient of {name} is off by {off:.3g}, allowed {allowed:.3g}"
                )

    def kept_bytes(self, variant: Variant) -> int:
        """What the variant keeps from step to step, beyond the model, its gradients and the optimizer's state."""
        if variant.name == PLAIN:
            return 0
        ewc = variant.attach(self) if variant.attach else self.ewc
        buffer = sum(p.nbytes for p in self.params) if variant.keeps_gradient else 0
        return buffer + sum(t.nbytes for t in (*ewc.fisher.values(), *ewc.anchor.values()))


# ---- the variants ----


@dataclass(frozen=True)
class Variant:
    """A way to train with EWC.

    Attributes:
        name: As the command line knows it.
        note: For the reader of a table.
        penalty: What is added to every micro-batch's loss.
        add_gradient: What is done between the last backward and the optimizer's step.
        attach: Which EWCLoss is attached to the optimizer.
        optimizer: Which one steps, if not the model's; its gradients are the task's alone.
        keeps_gradient: Whether it keeps a gradient of its own from step to step.
    """

    name: str
    note: str
    penalty: Callable[[TrainingStep], Tensor] | None = None
    add_gradient: Callable[[TrainingStep], object] | None = None
    attach: Callable[[TrainingStep], EWCLoss] | None = None
    optimizer: Callable[[TrainingStep], torch.optim.Optimizer] | None = None
    keeps_gradient: bool = False


def _eager(step: TrainingStep) -> Tensor:
    params, fishers, anchors = zip(*step.state, strict=True)
    return eager_loss(params, fishers, anchors, LAMBDA)


def _loop(step: TrainingStep) -> Tensor:
    params, fishers, anchors = zip(*step.state, strict=True)
    return closed_form_(params, [p.grad for p in params], fishers, anchors, LAMBDA)


PLAIN = "plain"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(PLAIN, "without EWC"),
        Variant("eager", "penalty in plain PyTorch in every micro-batch's loss", penalty=_eager),
        Variant("loop", "closed-form loop with the value, between backward and step", add_gradient=_loop),
        Variant("level1", "ewc() in every micro-batch's loss", penalty=lambda step: step.ewc(), keeps_gradient=True),
        Variant("level2", "ewc.attach(optimizer)", attach=lambda step: step.ewc),
        Variant("level2_bf16_fisher", "the same, Fisher in bf16", attach=lambda step: step.ewc_bf16_fisher),
        Variant("level3", "EWCAdamW(params, ewc=ewc)", optimizer=lambda step: step.fused(step.ewc, "coupled")),
        Variant(
            "level3_proximal", 'the same, coupling="proximal"', optimizer=lambda step: step.fused(step.ewc, "proximal")
        ),
    )
}


# ---- measuring ----


@dataclass(frozen=True)
class StepResult:
    """One variant. Times are of one optimizer step.

    Attributes:
        variant, note: The variant's.
        config, parameters: The model, and how many it has.
        device, dtype, autocast: As torch names them, without ``torch.``; autocast None if off.
        batch, tokens: Sequences per micro-batch, tokens per sequence.
        micro_batches: How many a step accumulates.
        rounds: How often the step was timed.
        median_ms, p10_ms, p90_ms: Over the rounds.
        ewc_ms, ewc_ms_p10, ewc_ms_p90: What EWC adds: over the rounds, the difference from ``plain`` in the same round.
        ewc_percent, ewc_percent_p10, ewc_percent_p90: The same in percent of ``plain``'s median. None for ``plain``.
        peak_bytes: The most memory that a step had allocated at once, gradients and activations among it, beyond the
            model, the optimizer's state and ``kept_bytes``.
        kept_bytes: What EWC keeps from step to step: anchor, Fisher, and level 1's gradient, to which autograd may add
            the task's, so that a step at level 1 may allocate less than one without EWC.
    """

    variant: str
    note: str
    config: str
    parameters: int
    device: str
    dtype: str
    autocast: str | None
    batch: int
    tokens: int
    micro_batches: int
    rounds: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ewc_ms: float | None
    ewc_ms_p10: float | None
    ewc_ms_p90: float | None
    ewc_percent: float | None
    ewc_percent_p10: float | None
    ewc_percent_p90: float | None
    peak_bytes: int
    kept_bytes: int


def find(names: Sequence[str]) -> list[Variant]:
    """Variants by name, ``plain`` always among them and first.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    check_names("variant", names, VARIANTS)
    return [variant for name, variant in VARIANTS.items() if name in names or name == PLAIN]


def measure_steps(
    config: GPTConfig | str = "gpt2_small",
    device: str | torch.device = "cpu",
    batch: int = 1,
    tokens: int = 128,
    rounds: int = 5,
    variants: Sequence[str] = tuple(VARIANTS),
    *,
    accumulation: Sequence[int] = (1, 4),
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Checks the gradients of every variant, then times a training step of each, interleaved.

    Args:
        config: The model's sizes, or the name of one of :data:`CONFIGS`. ``gpt2_small`` takes about 9 GB in fp32.
        device: Where it is trained.
        batch: Sequences per micro-batch.
        tokens: Tokens per sequence.
        rounds: How often each variant is timed, at least 1.
        variants: Names of :data:`VARIANTS`; ``plain`` is always measured.
        accumulation: Numbers of micro-batches per optimizer step; each is measured for every variant. A penalty in the
            loss is paid in every micro-batch, level 2 once.
        dtype: Of the parameters.
        autocast: The dtype of the forward's matrix products; as the parameters if None.
        backend: EWCLoss's.
        seed: Of the random numbers.
        progress: Told what is being done.

    Returns:
        A :class:`StepResult` per number of micro-batches and variant, as dicts that JSON takes.

    Raises:
        ValueError: An argument is out of range or unknown.
        AssertionError: A variant's gradient is wrong; names it.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"no model {config}; there are {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    for name, value in (("batch", batch), ("rounds", rounds), ("accumulation", min(accumulation, default=0))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    chosen = find(variants)
    step = TrainingStep(config, device, batch, tokens, max(accumulation), dtype, autocast, backend, seed)

    results = []
    for micro_batches in accumulation:
        plain = step.gradients(VARIANTS[PLAIN], micro_batches)
        for variant in (v for v in chosen[1:] if v.optimizer is None):  # a step of level 3 is compared in tests/optim
            progress(f"checking {variant.name}, micro-batches: {micro_batches}")
            step.check(variant, plain, micro_batches)
        del plain
        progress(f"timing {len(chosen)} variants, micro-batches: {micro_batches}, rounds: {rounds}")
        runs = {variant.name: partial(_time, step, variant, micro_batches) for variant in chosen}
        times = interleave(runs, rounds, seed=seed)
        progress("measuring memory")
        for variant in chosen:
            results.append(
                StepResult(
                    variant=variant.name,
                    note=variant.note,
                    config=config.name,
                    parameters=sum(p.numel() for p in step.params),
                    device=step.device.type,
                    dtype=dtype_name(dtype),
                    autocast=None if autocast is None else dtype_name(autocast),
                    batch=batch,
                    tokens=tokens,
                    micro_batches=micro_batches,
                    rounds=rounds,
                    **summarise(variant.name, times),
                    peak_bytes=_peak(step, variant, micro_batches),
                    kept_bytes=step.kept_bytes(variant),
                )
            )
    return [asdict(result) for result in results]


def _time(step: TrainingStep, variant: Variant, micro_batches: int) -> float:
    with step.attached(variant):
        return time_once(lambda: step.step(variant, micro_batches), step.device)


def _peak(step: TrainingStep, variant: Variant, micro_batches: int) -> int:
    step.optimizer.zero_grad()  # so that the step allocates its gradients within what is measured
    with step.attached(variant):
        return peak_bytes(lambda: step.step(variant, micro_batches), step.device)


def summarise(name: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The fields of :class:`StepResult` that come from times.

    Args:
        name: The variant's.
        times: Milliseconds by variant and round, with ``plain`` among them.
    """
    mine, plain = times[name], times[PLAIN]
    fields: dict[str, Any] = {
        "median_ms": median(mine),
        "p10_ms": percentile(mine, 10),
        "p90_ms": percentile(mine, 90),
    }
    differences = [t - p for t, p in zip(mine, plain, strict=True)]
    for key, percent in (("", 50), ("_p10", 10), ("_p90", 90)):
        added = None if name == PLAIN else percentile(differences, percent)
        fields[f"ewc_ms{key}"] = added
        fields[f"ewc_percent{key}"] = None if added is None else 100 * added / median(plain)
    return fields


# ---- text ----

_COLUMNS = ("ms per step", "p10 to p90", "EWC adds, ms", "of a step", "p10 to p90", "peak memory", "EWC keeps")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """What :func:`measure_steps` returned, as text; results of several calls may be joined."""
    lines = []
    for title, rows in _grouped(results):
        lines += ["", title, f"{'':20}" + "".join(f"{column:>17}" for column in _COLUMNS)]
        lines += [f"{row['variant']:20}" + "".join(f"{cell:>17}" for cell in _cells(row)) for row in rows]
    return "\n".join(lines[1:])


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same for the README."""
    parts = []
    for title, rows in _grouped(results):
        cells = [[f"{row['note']} (`{row['variant']}`)", *_cells(row)] for row in rows]
        parts += [f"{title}:", markdown_table(["", *_COLUMNS], cells)]
    return "\n\n".join(parts)


def _grouped(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """What was timed together, and what it is in words."""

    def title(r: Mapping[str, Any]) -> str:
        precision = r["dtype"] + (f" under {r['autocast']} autocast" if r["autocast"] else "")
        data = f"{r['batch']} x {r['tokens']} tokens"
        if r["micro_batches"] > 1:
            data = f"{r['micro_batches']} micro-batches of {data}"
        return f"{r['config']}, {r['parameters']:,} {precision} parameters, {r['device']}, {data}, {r['rounds']} rounds"

    for words, rows in itertools.groupby(results, title):
        yield words, list(rows)


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [f"{row['median_ms']:.1f}", f"{row['p10_ms']:.1f} to {row['p90_ms']:.1f}"]
    if row["ewc_ms"] is None:
        cells += ["", "", ""]
    else:
        spread = f"{row['ewc_percent_p10']:.1f} to {row['ewc_percent_p90']:.1f}%"
        cells += [f"{row['ewc_ms']:.1f}", f"{row['ewc_percent']:.1f}%", spread]
    return [*cells, size(row["peak_bytes"]), size(row["kept_bytes"])]
