"""The definition of every kind and objective, by one backward pass per sample and label in fp64.

It shares no code with the package: batches are cut into samples, the model is copied to fp64 and put into evaluation
mode, and squares of ``.grad`` are added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils._pytree import tree_leaves, tree_map

Loss = str | nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | Callable[[nn.Module, Any], Tensor]
Transform = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, threads only wait for one another: ten times longer where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Terms(NamedTuple):
    """A batch's model output beside its labels.

    Attributes:
        output: (B, P, C) logits of classes; (B, P) for binary and gaussian.
        labels: (B, P) int64, or floating; None where the batch has none.
        counted: (B, P) bool.
    """

    output: Tensor
    labels: Tensor | None
    counted: Tensor


def name_of(loss: Loss) -> str:
    if isinstance(loss, str):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss):
        return "cross_entropy"
    return "binary_cross_entropy" if isinstance(loss, nn.BCEWithLogitsLoss) else "callable"


def unpack(batch: Any, loss: Loss) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None, Tensor | None]:
    """The model's arguments, the labels and the attention mask."""
    if isinstance(batch, Mapping):
        keywords = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels", batch.get("input_ids") if loss == "causal_lm" else None)
        return (), keywords, labels, batch.get("attention_mask")
    if isinstance(batch, Tensor):
        return (batch,), {}, batch if loss == "causal_lm" else None, None
    inputs, labels = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs), labels, inputs.get("attention_mask")
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, labels, None


def output_of(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    output = model(*tree_map(clone, args), **tree_map(clone, keywords))
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output.logits


def clone(leaf: Any) -> Any:
    """A model may change its inputs in place."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def terms_of(model: nn.Module, batch: Any, loss: Loss, kind: str, transform: Transform | None) -> Terms:
    args, keywords, labels, mask = unpack(batch, loss)
    output = output_of(model, args, keywords)
    if transform is not None:
        output = transform(output)
    if kind == "reversed":
        output = -output
    size = len(output)
    if output.dim() == 2 and kind in ("exact", "sampled", "predicted"):
        labels = None  # not needed: a placeholder, if there is one
    if name_of(loss) in ("binary_cross_entropy", "gaussian"):
        output = output.reshape(size, -1)
        labels = None if labels is None else labels.reshape(size, -1).to(output.dtype)
        return Terms(output, labels, torch.ones_like(output, dtype=torch.bool))
    if loss == "causal_lm":
        assert labels is not None
        output, labels = output[:, :-1], labels[:, 1:]
        counted = labels != -100
        return Terms(output, labels, counted if mask is None else counted & (mask[:, 1:] * mask[:, :-1] != 0))
    output = output.reshape(size, -1, output.shape[-1])
    if labels is None:
        return Terms(output, None, torch.ones(output.shape[:2], dtype=torch.bool))
    labels = labels.reshape(size, -1).long()
    return Terms(output, labels, labels != getattr(loss, "ignore_index", -100))


def log_likelihood(loss: Loss, terms: Terms) -> Tensor:
    """The sum over the counted terms, 0-dim."""
    output, labels, counted = terms
    assert labels is not None
    if name_of(loss) == "gaussian":
        return -(output - labels).square().sum() / 2
    if name_of(loss) == "binary_cross_entropy":
        return (labels * logsigmoid(output) + (1 - labels) * logsigmoid(-output)).sum()
    smoothing = getattr(loss, "label_smoothing", 0.0)
    total = output.new_zeros(())
    for row, label in zip(output[counted].log_softmax(-1), labels[counted].tolist(), strict=True):
        total = total + (1 - smoothing) * row[label] + smoothing * row.mean()
    return total


def outcomes(loss: Loss, terms: Terms) -> Iterator[tuple[float, Tensor]]:
    """Each possible label's probability, and what is to be differentiated; for a gaussian E[(y - f)^2] = 1."""
    if name_of(loss) == "gaussian":
        yield from ((1.0, output) for output in terms.output.flatten())
        return
    if name_of(loss) == "binary_cross_entropy":
        for logit in terms.output.flatten():
            for side in (logsigmoid(logit), logsigmoid(-logit)):
                yield side.detach().exp().item(), side
        return
    for row in terms.output[terms.counted].log_softmax(-1):
        for log_prob in row:
            yield log_prob.detach().exp().item(), log_prob


def predicted(loss: Loss, terms: Terms) -> Tensor:
    if name_of(loss) == "binary_cross_entropy":
        return (terms.output > 0).to(terms.output.dtype)
    return terms.output.argmax(-1)


def draw(
    model: nn.Module,
    batches: list[Any],
    loss: Loss = "cross_entropy",
    num_label_samples: int = 1,
    generator: torch.Generator | None = None,
    logits_transform: Transform | None = None,
) -> list[list[Tensor]]:
    """By batch and draw, the labels (B, P) that ``sampled`` takes, in the model's own precision."""
    model = copy.deepcopy(model).eval()
    drawn = []
    for batch in batches:
        with torch.no_grad():
            output, _, counted = terms_of(model, batch, loss, "sampled", logits_transform)
        labels = []
        for _ in range(num_label_samples):
            if name_of(loss) == "gaussian":
                labels.append(output + torch.randn(output.shape, dtype=output.dtype, generator=generator))
            elif name_of(loss) == "binary_cross_entropy":
                labels.append(torch.bernoulli(output.sigmoid(), generator=generator))
            else:
                draws = torch.full(counted.shape, -100)
                draws[counted] = torch.multinomial(output[counted].softmax(-1), 1, generator=generator)[:, 0]
                labels.append(draws)
        drawn.append(labels)
    return drawn


def fisher(
    model: nn.Module,
    batches: list[Any],
    kind: str = "empirical",
    loss: Loss = "cross_entropy",
    *,
    drawn: list[list[Tensor]] | None = None,
    logits_transform: Transform | None = None,
) -> dict[str, Tensor]:
    """The diagonal by parameter name, in fp64.

    Args:
        model: Left as it is.
        batches: As for ``estimate_fisher``; every tensor's first dimension is the batch.
        kind: Any of the package's.
        loss: Any of the package's.
        drawn: For ``sampled``: by batch and draw, the labels as ``draw`` gives them.
        logits_transform: Applied to the model's output.
    """
    model = copy.deepcopy(model).double().eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    count = 0
    for index, batch in enumerate(batches):
        batch = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)
        size = max(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        rows = [slice(0, size)] if kind == "batch" else [slice(i, i + 1) for i in range(size)]
        for row in rows:
            sample = tree_map(lambda t, row=row: t[row] if isinstance(t, Tensor) else t, batch)
            if callable(loss) and name_of(loss) == "callable":
                losses = loss(model, sample)
                count += len(losses)
                add_squares(totals, params, -losses.sum())
                continue
            terms = terms_of(model, sample, loss, kind, logits_transform)
            per_sample = terms.counted.shape[1] == 1 or name_of(loss) in ("binary_cross_entropy", "gaussian")
            count += int(terms.counted[:, 0].sum() if per_sample else terms.counted.sum())
            if kind == "exact":
                for probability, log_prob in outcomes(loss, terms):
                    add_squares(totals, params, log_prob, probability)
            elif kind == "sampled":
                assert drawn is not None
                for labels in drawn[index]:
                    labels = labels[row].to(terms.output.dtype if labels.is_floating_point() else labels.dtype)
                    value = log_likelihood(loss, terms._replace(labels=labels))
                    add_squares(totals, params, value, 1 / len(drawn[index]))
            else:
                labels = predicted(loss, terms) if kind == "predicted" else terms.labels
                add_squares(totals, params, log_likelihood(loss, terms._replace(labels=labels)))
    return {name: total / count for name, total in totals.items()}


def add_squares(totals: dict[str, Tensor], params: dict[str, nn.Parameter], value: Tensor, weight: float = 1.0) -> None:
    """``backward`` and not ``autograd.grad``: re-entrant checkpoints allow no other."""
    if not value.requires_grad:
        return
    value.backward(retain_graph=True)
    for name, p in params.items():
        if p.grad is not None:
            totals[name] += weight * p.grad.to_dense().square()
            p.grad = None


def expected(
    model: nn.Module,
    batches: list[Any],
    kind: str,
    loss: Loss = "cross_entropy",
    *,
    generator: torch.Generator,
    num_label_samples: int = 1,
    logits_transform: Transform | None = None,
) -> dict[str, Tensor]:
    """What ``estimate_fisher`` is to return, with labels drawn from ``generator`` where the kind is ``sampled``."""
    drawn = None
    if kind == "sampled":
        drawn = draw(model, batches, loss, num_label_samples, generator, logits_transform)
    return fisher(model, batches, kind, loss, drawn=drawn, logits_transform=logits_transform)


def assert_fisher(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float | None = None, floor: float = 64.0
) -> None:
    """Each tensor within ``tolerance`` of its largest entry: by default 2e-4 in fp32, 1e-9 in fp64.

    Gradients that are 0 in exact arithmetic (a key's bias: attention does not see it) are rounding errors of ``floor``
    machine epsilons of the model's largest gradient at most.
    """
    assert list(actual) == list(expected)
    largest = max(value.max().item() for value in expected.values())
    assert largest > 0, "nothing is compared"
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        dtype = actual[name].dtype
        limit = {torch.float32: 2e-4, torch.float64: 1e-9}[dtype] if tolerance is None else tolerance
        atol = limit * value.max().item() + (floor * torch.finfo(dtype).eps) ** 2 * largest
        torch.testing.assert_close(actual[name].double(), value, rtol=0, atol=atol, msg=f"{name}: {{}}".format)
