"""The definition of each kind, one sample and one class at a time, in fp64."""

import copy

import torch
from torch import Tensor, nn


def log_likelihood_gradients(model: nn.Module, sample: Tensor, classes: list[int]) -> tuple[Tensor, list[list[Tensor]]]:
    """Log-probabilities (C,) of one sample and, for each class, the gradients of its log-likelihood."""
    params = [p for p in model.parameters() if p.requires_grad]
    log_probs = model(sample[None].clone()).log_softmax(-1)[0]
    gradients = []
    for c in classes:
        found = torch.autograd.grad(log_probs[c], params, retain_graph=True, allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])
    return log_probs.detach(), gradients


def fisher(model: nn.Module, batches: list[tuple[Tensor, Tensor]], kind: str) -> dict[str, Tensor]:
    """``exact``, ``empirical`` and ``batch``; sampled labels are given ones to ``empirical``."""
    model = copy.deepcopy(model).double().eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    count = 0
    for inputs, labels in batches:
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        count += len(inputs)
        if kind == "batch":
            params = [p for p in model.parameters() if p.requires_grad]
            loss = nn.functional.cross_entropy(model(inputs.clone()), labels)
            for total, g in zip(totals, torch.autograd.grad(loss, params), strict=True):
                total += len(inputs) ** 2 * g**2
            continue
        for sample, label in zip(inputs, labels.tolist(), strict=True):
            if kind == "exact":
                with torch.no_grad():
                    num_classes = model(sample[None].clone()).shape[-1]
                log_probs, gradients = log_likelihood_gradients(model, sample, list(range(num_classes)))
                for log_p, gradient in zip(log_probs, gradients, strict=True):
                    for total, g in zip(totals, gradient, strict=True):
                        total += log_p.exp() * g**2
            else:
                _, (gradient,) = log_likelihood_gradients(model, sample, [label])
                for total, g in zip(totals, gradient, strict=True):
                    total += g**2
    return {name: total / count for name, total in zip(names, totals, strict=True)}
