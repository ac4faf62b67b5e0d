"""Running sums of squared gradients, per sample (vectorised or in a loop) or per batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ewc_fast.fisher.classification import Targets
from ewc_fast.layout import wrapper_prefix

# Per-sample gradients held at once. On the CPU they should stay in the cache between being written and being squared
# (MLP of 85k weights, 32 MiB of L3: 4 to 64 MiB are within the noise of the best, 120 MiB are 1.5 times slower); a GPU
# wants work enough for one launch.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20


class SquareSums:
    """Sums of squared gradients of a model's log-likelihoods, one per parameter.

    The model runs with its parameters and buffers swapped for detached ones: its ``.grad`` fields, ``requires_grad``
    flags and buffers are not touched.

    Args:
        model: Maps inputs (B, ...) to logits (B, C).
        params: The parameters to differentiate by, by any name.

    Attributes:
        sums: By the names of ``params``: shaped like the parameter, on its device, fp32 (fp64 for fp64 parameters).
        vectorised: False once the model turned out not to run under ``torch.vmap``.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        while (prefix := wrapper_prefix(model)) is not None:  # functional_call refuses some of them
            model = model.get_submodule(prefix)
        self._model = model
        inner_names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._weights = {inner_names[id(parameter)]: parameter.detach() for parameter in params.values()}
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.sums = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in params.items()
        }
        self._sums = dict(zip(self._weights, self.sums.values(), strict=True))
        self._gradient_bytes = max(1, sum(p.numel() * p.element_size() for p in params.values()))
        self.vectorised = True

    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's logits, without a graph."""
        with torch.no_grad():
            return self._forward(self._weights, inputs)

    def add_batch(self, inputs: Tensor, targets: Targets) -> None:
        """Adds the square of the gradient that is summed over the batch; ``targets`` have one label per sample."""
        leaves = self._leaves()
        logits = self._forward(leaves, inputs)
        self._add_one(leaves, logits, targets.cotangents(slice(None), slice(None))[:, 0], retain_graph=False)

    def add_per_sample(self, inputs: Tensor, targets: Targets) -> None:
        """Adds the squares of the gradients of each sample and label, in chunks of bounded memory."""
        num_samples, num_labels = targets.classes.shape
        gradients = max(1, _CHUNK_BYTES.get(inputs.device.type, _CHUNK_BYTES_ELSEWHERE) // self._gradient_bytes)
        labels_step = min(num_labels, gradients)
        samples_step = max(1, gradients // labels_step)
        for start in range(0, num_samples, samples_step):
            samples = slice(start, start + samples_step)
            for first in range(0, num_labels, labels_step):
                self._add_chunk(inputs[samples], targets.cotangents(samples, slice(first, first + labels_step)))

    def not_finite(self) -> str | None:
        """The name of the first parameter whose sum is not finite, None if all are: one synchronisation."""
        finite = [total.isfinite().all() for total in self.sums.values()]
        flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
        return next((name for name, ok in zip(self.sums, flags, strict=True) if not ok), None)

    def _forward(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        # A copy, because a model may change its inputs in place and these are needed again.
        return functional_call(self._model, (weights, self._buffers), (inputs.clone(),))

    def _leaves(self) -> dict[str, Tensor]:
        return {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}

    def _add_chunk(self, inputs: Tensor, cotangents: Tensor) -> None:
        if self.vectorised:
            try:
                gradients = self._vectorised_gradients(inputs, cotangents)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model that runs on a batch raises here, vmap's tracing is its cause
                self.vectorised = False
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"{type(self._model).__name__} cannot run under torch.vmap ({reason}); its per-sample gradients "
                    "are taken in a loop over samples, which is slower",
                    stacklevel=2,
                )
            else:
                for name, gradient in gradients.items():
                    total = self._sums[name]
                    total += gradient.flatten(0, 1).to(total.dtype).square().sum(0)
                return
        self._add_in_loop(inputs, cotangents)

    def _vectorised_gradients(self, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """Gradients (samples, labels, *shape) by parameter."""

        def gradients(sample: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
            logits, pullback, *_ = vjp(lambda weights: self._forward(weights, sample.unsqueeze(0)), self._weights)
            return vmap(lambda row: pullback(row.to(logits.dtype).reshape(logits.shape))[0])(cotangent)

        return vmap(gradients)(inputs, cotangents)

    def _add_in_loop(self, inputs: Tensor, cotangents: Tensor) -> None:
        leaves = self._leaves()
        for sample, rows in zip(inputs.split(1), cotangents.unbind(), strict=True):
            logits = self._forward(leaves, sample)
            for index, row in enumerate(rows):
                self._add_one(leaves, logits, row.reshape(logits.shape), retain_graph=index + 1 < len(rows))

    def _add_one(self, leaves: dict[str, Tensor], logits: Tensor, cotangent: Tensor, *, retain_graph: bool) -> None:
        if not logits.requires_grad:
            return  # the logits depend on no parameter for this input: all gradients are 0
        gradients = torch.autograd.grad(
            logits, list(leaves.values()), cotangent.to(logits.dtype), retain_graph=retain_graph, allow_unused=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                total = self._sums[name]
                total += gradient.to(total.dtype).square()
