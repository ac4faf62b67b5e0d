"""What the penalty and its gradient cost per optimizer step, beside what one would otherwise write.

    python benchmarks/penalty.py [--out benchmarks/results/NAME.json] [--rounds 15] [--threads 2]

All contenders run in one process, interleaved, each over the same tensors; gradients exist already, as they do after
the task's backward. Medians over the rounds; the result describes the machine. Before it is timed, each contender's
gradient is compared with the formula in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss, ewc_loss
from ewc_fast.machine import describe_machine
from ewc_fast.ops import extension

LAMBDA = 100.0


def gpt2_like() -> nn.Module:
    """48M parameters in 145 tensors: the block shapes of GPT-2 at width 576, 12 blocks, and one norm's weight."""
    width = 576
    shapes: list[tuple[int, ...]] = []
    for _ in range(12):
        shapes += [(width,), (width,)]  # norm
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]  # attention
        shapes += [(width,), (width,)]  # norm
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]  # MLP
    shapes += [(width,)]
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape) * 0.02))
    return model


class Problem:
    """A model, its state as dicts of tensors, and gradients that are already there."""

    def __init__(self) -> None:
        self.model = gpt2_like()
        self.names = [n for n, _ in self.model.named_parameters()]
        self.params = list(self.model.parameters())
        self.fisher = {n: torch.rand_like(p) for n, p in self.model.named_parameters()}
        self.anchor = {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in self.model.named_parameters()}
        self.fishers = list(self.fisher.values())
        self.anchors = list(self.anchor.values())
        self.ewc = EWCLoss(self.model, LAMBDA)
        self.ewc.consolidate(fisher=self.fisher, anchor=self.anchor)
        self.ewc_bf16 = EWCLoss(self.model, LAMBDA, fisher_dtype=torch.bfloat16)
        self.ewc_bf16.consolidate(fisher=self.fisher, anchor=self.anchor)
        for p in self.params:
            p.grad = torch.zeros_like(p)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.params)

    # Each contender adds lambda F (theta - theta*) to the gradients. In brackets: bytes read and written per parameter.

    def eager(self) -> Tensor:
        """As articles have it, and its backward [76 to 90]."""
        total = torch.zeros(())
        for name, p in self.model.named_parameters():
            total = total + (self.fisher[name] * (p - self.anchor[name]) ** 2).sum()
        loss = LAMBDA / 2 * total
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def loop(self) -> Tensor:
        """The closed form, tensor by tensor, with the value: the best that is written by hand."""
        total = torch.zeros(())
        for p, f, a in zip(self.params, self.fishers, self.anchors, strict=True):
            assert p.grad is not None
            d = p - a
            fd = f * d
            p.grad.add_(fd, alpha=LAMBDA)
            total += torch.dot(fd.view(-1), d.view(-1))
        return LAMBDA / 2 * total

    @torch.no_grad()
    def loop_without_value(self) -> Tensor | None:
        """The same without the value."""
        for p, f, a in zip(self.params, self.fishers, self.anchors, strict=True):
            assert p.grad is not None
            p.grad.addcmul_(f, p - a, value=LAMBDA)
        return None

    @torch.no_grad()
    def foreach(self) -> Tensor:
        """torch._foreach_ ops, value and gradient [about 60]."""
        d = torch._foreach_sub(self.params, self.anchors)
        fd = torch._foreach_mul(self.fishers, d)
        torch._foreach_add_([p.grad for p in self.params], fd, alpha=LAMBDA)
        torch._foreach_mul_(fd, d)
        return LAMBDA / 2 * torch.stack([t.sum() for t in fd]).sum()

    def functional(self) -> Tensor:
        """ewc_loss and its backward [24, and autograd's accumulate, 12]."""
        loss = ewc_loss(self.model, self.fisher, self.anchor, LAMBDA)
        loss.backward()
        return loss.detach()

    def level1(self) -> Tensor:
        """ewc() and its backward [16, and autograd's accumulate, 12]."""
        loss = self.ewc()
        loss.backward()
        return loss.detach()

    def level2(self) -> Tensor:
        """What attach does before a step [20]."""
        return self.ewc.accumulate_grad_()

    def level2_bf16_fisher(self) -> Tensor:
        """The same with a bf16 Fisher [18]."""
        return self.ewc_bf16.accumulate_grad_()

    def value(self) -> Tensor:
        """The value alone, as at lambda 0 [12]."""
        with torch.no_grad():
            return self.ewc()


CONTENDERS: dict[str, tuple[Callable[[Problem], Tensor | None], int | None]] = {
    "eager penalty + backward": (Problem.eager, None),
    "foreach, value and gradient": (Problem.foreach, None),
    "closed-form loop with value": (Problem.loop, None),
    "closed-form loop without value": (Problem.loop_without_value, None),
    "ewc_loss + backward": (Problem.functional, None),
    "level 1: ewc() + backward": (Problem.level1, 28),
    "level 2: attach / accumulate_grad_": (Problem.level2, 20),
    "level 2, bf16 Fisher": (Problem.level2_bf16_fisher, 18),
    "value only (lambda 0)": (Problem.value, 12),
}
READ_ONLY = {"value only (lambda 0)"}


def check(problem: Problem) -> None:
    """Every contender's gradient and value against the formula in fp64."""
    value = 0.0
    wanted = []
    for p, f, a in zip(problem.params, problem.fishers, problem.anchors, strict=True):
        d = p.detach().double() - a.double()
        wanted.append(LAMBDA * f.double() * d)
        value += LAMBDA / 2 * float((f.double() * d * d).sum())
    for name, (run, _) in CONTENDERS.items():
        for p in problem.params:
            assert p.grad is not None
            p.grad.zero_()
        found = run(problem)
        tolerance = 2**-8 if "bf16" in name else 1e-5
        if found is not None:
            assert abs(float(found) / value - 1) < tolerance, (name, float(found), value)
        for p, want in zip(problem.params, wanted, strict=True):
            assert p.grad is not None
            want = torch.zeros_like(want) if name in READ_ONLY else want
            torch.testing.assert_close(p.grad.double(), want, rtol=tolerance, atol=1e-5)


def measure(problem: Problem, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every contender and of ``copy_``, interleaved."""
    source, target = torch.randn(problem.numel), torch.empty(problem.numel)
    runs: dict[str, Callable[[], object]] = {
        name: (lambda run=run: run(problem)) for name, (run, _) in CONTENDERS.items()
    }
    runs["copy_"] = lambda: target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    moved = {name: size for name, (_, size) in CONTENDERS.items()} | {"copy_": 8}
    result = {}
    for name, ms in times.items():
        result[name] = {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
        if moved[name] is not None:
            result[name]["gb_per_s"] = moved[name] * problem.numel / statistics.median(ms) / 1e6
    return result


def small_models(rounds: int) -> dict[str, float]:
    """Microseconds per call for 20 tensors of 100 elements, where overhead is all there is."""
    model = nn.ParameterList([nn.Parameter(torch.randn(100)) for _ in range(20)])
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    anchor = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher=fisher, anchor=anchor)
    for p in model:
        p.grad = torch.zeros_like(p)

    def eager() -> None:
        total = torch.zeros(())
        for name, p in model.named_parameters():
            total = total + (fisher[name] * (p - anchor[name]) ** 2).sum()
        (LAMBDA / 2 * total).backward()

    def level1() -> None:
        ewc().backward()

    runs = {"eager penalty + backward": eager, "level 1": level1, "level 2": ewc.accumulate_grad_}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(100):
                run()
            times[name].append((time.perf_counter() - start) * 1e4)
    return {name: statistics.median(us) for name, us in times.items()}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = Problem()
    check(problem)
    times = measure(problem, args.rounds)
    level2 = times["level 2: attach / accumulate_grad_"]["median_ms"]
    print(f"{problem.numel / 1e6:.1f}M fp32 parameters in {len(problem.params)} tensors, {args.threads} threads")
    print(f"{'':38}{'median ms':>10}{'GB/s':>8}{'over level 2':>14}")
    for name, t in times.items():
        speed = f"{t['gb_per_s']:.1f}" if "gb_per_s" in t else ""
        print(f"{name:38}{t['median_ms']:10.1f}{speed:>8}{t['median_ms'] / level2:13.2f}x")
    small = small_models(args.rounds)
    print("20 tensors of 100 elements, microseconds: " + ", ".join(f"{n} {us:.1f}" for n, us in small.items()))
    if args.out:
        status = extension.status()
        result = {
            "date": date.today().isoformat(),
            "machine": {**describe_machine(), "threads": args.threads},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "kernels": status.build if status.loaded else f"reference: {status.reason}",
            "parameters": problem.numel,
            "tensors": len(problem.params),
            "rounds": args.rounds,
            "times": times,
            "small_models_us": small,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
