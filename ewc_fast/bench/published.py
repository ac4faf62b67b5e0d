"""The penalties of published packages, as their users run them.

Neither package has the 1/2 of lambda/2, so that both are given half of the problem's lambda: the same penalty, the same
gradient, checked against the same formula. Where Avalanche is installed (``pip install avalanche-lib``) its own plugin
runs, elsewhere the same tensor operations, under a name that says so; Mammoth is no package that could be installed.
GMvandeVen's continual-learning is not among them: what it does per tensor is ``eager``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module, metadata
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from ewc_fast.bench.peers import Peer, Sizes, Unavailable, backward
from ewc_fast.bench.problem import Problem

Task = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # anchor and Fisher, by name


def avalanche_version() -> str | None:
    """The installed Avalanche's version; None if it is not installed."""
    try:
        return metadata.version("avalanche-lib")
    except metadata.PackageNotFoundError:
        return None


def tasks(problem: Problem, count: int) -> list[Task]:
    """The problem's state as that of several tasks, each in memory of its own, as separate mode keeps them.

    They share the anchor, and each has a part of the Fisher: a power of 2, so that they sum to it exactly.
    """
    key = f"{count} tasks"
    if key not in problem.cache:
        shares = [2.0**-i for i in range(1, count)] + [2.0 ** -(count - 1)]
        problem.cache[key] = [
            (
                problem.anchor if i == 0 else {name: a.clone() for name, a in problem.anchor.items()},
                problem.fisher if count == 1 else {name: f * share for name, f in problem.fisher.items()},
            )
            for i, share in enumerate(shares)
        ]
    result: list[Task] = problem.cache[key]
    return result


# ---- Avalanche: EWCPlugin.before_backward, in avalanche/training/plugins/ewc.py ----


def _refuse_fp64(problem: Problem) -> None:
    if problem.dtype == torch.float64:
        raise Unavailable("Avalanche sums the penalty in fp32, whatever the parameters' dtype")


def run_avalanche(problem: Problem, mode: str, count: int) -> Tensor:
    """The penalty that Avalanche's own plugin adds to a strategy's loss, and its backward.

    Args:
        problem: What to run on.
        mode: ``"separate"`` or ``"online"``.
        count: Number of tasks; online mode keeps one.

    Raises:
        Unavailable: Avalanche cannot be imported.
    """
    _refuse_fp64(problem)
    key = f"Avalanche {mode} {count}"
    if key not in problem.cache:
        try:
            plugin_of = import_module("avalanche.training.plugins.ewc").EWCPlugin
            data_of = import_module("avalanche.training.utils").ParamData
        except Exception as error:  # torchvision, which it imports, raises a RuntimeError beside another torch
            raise Unavailable(f"importing Avalanche raised {type(error).__name__}: {error}") from error
        plugin = plugin_of(problem.ewc_lambda / 2, mode, decay_factor=1.0 if mode == "online" else None)
        for i, (anchor, fisher) in enumerate(tasks(problem, count)):
            for kept, given in ((plugin.saved_params, anchor), (plugin.importances, fisher)):
                kept[i] = {n: data_of(n, t.shape, init_tensor=t, device=t.device) for n, t in given.items()}
        # What the plugin reads of a strategy.
        clock = SimpleNamespace(train_exp_counter=count)
        problem.cache[key] = plugin, SimpleNamespace(clock=clock, device=problem.device, model=problem.model)
    plugin, strategy = problem.cache[key]
    strategy.loss = torch.zeros((), device=problem.device)
    plugin.before_backward(strategy)
    strategy.loss.backward()
    loss: Tensor = strategy.loss.detach()
    return loss


def run_avalanche_statements(problem: Problem, count: int) -> Tensor:
    """The same tensor operations without the package; the plugin's two modes differ only in how many tasks they keep.

    Args:
        problem: What to run on.
        count: Number of tasks.
    """
    _refuse_fp64(problem)
    loss = torch.zeros((), device=problem.device)
    total = torch.tensor(0).float().to(problem.device)
    for anchor, fisher in tasks(problem, count):
        for name, p in problem.model.named_parameters():
            if name in anchor:
                drift = p - anchor[name].expand(p.shape)
                total += (fisher[name].expand(p.shape) * drift.pow(2)).sum()
    loss += problem.ewc_lambda / 2 * total
    return backward(loss)


def _avalanche_bytes(count: int) -> Callable[[Sizes], float]:
    """Of each task. Forward: sub p+a+t, pow 2t, mul f+2t, sum t; backward: of mul f+t, of pow, which is
    ``g * (2 * d**1)``, 2t+2t+3t. Between tasks autograd adds gradients up, 3t. At the end its accumulate, t+2g.
    fp32: 84 for one task, 252 for three."""

    def count_bytes(s: Sizes) -> float:
        per_task = s.p + s.a + 2 * s.f + 14 * s.p
        return count * per_task + (count - 1) * 3 * s.p + s.p + 2 * s.g

    return count_bytes


def avalanche_peers(version: str | None) -> list[Peer]:
    """Avalanche's penalty: separate mode after one task and after three, and online mode.

    Args:
        version: Of the installed package; None for the statements written anew.
    """
    peers = []
    for name, mode, count in (
        ("separate", "separate", 1),
        ("separate_3_tasks", "separate", 3),
        ("online", "online", 1),
    ):
        after = f"{mode} mode, {count} {'task' if count == 1 else 'tasks'}"
        if version is None:
            peer_name, note = f"avalanche_statements_{name}", f"Avalanche's statements, written anew: {after}"
            run: Callable[[Problem], Tensor] = partial(run_avalanche_statements, count=count)
        else:
            peer_name, note = f"avalanche_{name}", f"Avalanche {version}'s EWCPlugin: {after}"
            run = partial(run_avalanche, mode=mode, count=count)
        peers.append(
            Peer(
                peer_name,
                run,
                _avalanche_bytes(count),
                note=note,
                keeps=0 if count == 1 else 2 * count - 1,
                temporaries=count + 1,
            )
        )
    return peers


# ---- Mammoth: EwcOn.observe, in models/ewc_on.py ----


def run_mammoth_statements(problem: Problem) -> None:
    """The gradient from concatenated vectors, set before the task's backward, which is then added to it.

    That addition is part of what it costs: without the penalty there would be no gradient to add to. Here it goes into
    the gradients that are there, so that they stay where they are for the other peers.

    Raises:
        Unavailable: Dtypes are mixed so that the gradient has another than the parameters.
    """
    fisher, anchor = problem.flat_state
    if torch.promote_types(fisher.dtype, torch.promote_types(anchor.dtype, problem.dtype)) != problem.dtype:
        raise Unavailable("Mammoth's gradient has the Fisher's dtype, and the parameters refuse it")
    half = problem.ewc_lambda / 2
    gradient = half * 2 * fisher * (parameters_to_vector(problem.model.parameters()).data - anchor)
    task_grads = problem.grads
    start = torch.tensor(0)
    for p in problem.model.parameters():
        end = start + torch.tensor(p.size()).prod()
        p.grad = gradient[start:end].view(p.size())
        start = end
    for p, task_grad in zip(problem.model.parameters(), task_grads, strict=True):
        assert p.grad is not None
        p.grad = task_grad.add_(p.grad)


def _mammoth_bytes(s: Sizes) -> float:
    """cat: p+t; sub: a+2t; a number * Fisher: f+t; mul: 3t; the backward's accumulate: t+2g. fp32: 52."""
    return s.p + s.a + s.f + 8 * s.p + 2 * s.g


PEERS: list[Peer] = [
    *avalanche_peers(avalanche_version()),
    Peer(
        "mammoth_statements",
        run_mammoth_statements,
        _mammoth_bytes,
        note="Mammoth's ewc_on, statements written anew: gradient from concatenated vectors",
        keeps=2,
        temporaries=3,
    ),
]
