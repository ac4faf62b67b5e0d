"""The penalty as a function of plain tensors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ewc_fast.layout import own_name, wrapper_prefix
from ewc_fast.ops import autograd
from ewc_fast.ops.types import STATE_DTYPES

# Memory that is fresh at every call would cost more than the penalty does: its pages have to be found and zeroed.
_buffers: weakref.WeakKeyDictionary[nn.Module, autograd.GradientBuffers] = weakref.WeakKeyDictionary()


def check_lambda(ewc_lambda: float, name: str = "ewc_lambda") -> float:
    """A finite, non-negative lambda as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative, NaN or infinite.
    """
    try:
        value = float(ewc_lambda)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {ewc_lambda!r}") from error
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {ewc_lambda}")
    return value


def _lambda_tensor(ewc_lambda: float | Tensor, name: str, device: torch.device) -> Tensor:
    if isinstance(ewc_lambda, Tensor):
        if ewc_lambda.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(ewc_lambda.shape)}")
        if ewc_lambda.requires_grad:
            raise ValueError(f"{name} requires grad, and the penalty gives it none: detach() it")
        value = ewc_lambda.reshape(())
        if value.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would synchronise
            check_lambda(float(value), name)
        return value if value.dtype in (torch.float32, torch.float64) else value.float()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((), check_lambda(ewc_lambda, name), dtype=dtype, device=device)


def _check_state(what: str, name: str, t: Tensor, p: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{what} of {name} is a {type(t).__name__}, expected a tensor")
    if t.shape != p.shape:
        raise ValueError(f"{what} of {name} has shape {tuple(t.shape)}, the parameter {tuple(p.shape)}")
    if t.device != p.device:
        raise ValueError(f"{what} of {name} is on {t.device}, the parameter on {p.device}: move it with .to()")
    if t.dtype == torch.float16 and what == "anchor":
        return t.detach().float()  # exact
    if t.dtype not in STATE_DTYPES:
        raise TypeError(f"{what} of {name} has dtype {t.dtype}; use float32, bfloat16 or float64")
    if t.layout != torch.strided:
        raise TypeError(f"{what} of {name} is {t.layout}; use a dense tensor")
    return t.detach()


def _penalty(
    names: Sequence[str],
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    ewc_lambda: float | Tensor,
    lambda_name: str,
    buffers: autograd.GradientBuffers,
) -> Tensor:
    fisher = [_check_state("Fisher", n, f, p) for n, f, p in zip(names, fisher, params, strict=True)]
    anchor = [_check_state("anchor", n, a, p) for n, a, p in zip(names, anchor, params, strict=True)]
    for name, p in zip(names, params, strict=True):
        if not p.is_floating_point():
            raise TypeError(f"{name} has dtype {p.dtype}; only floating point parameters have a penalty")
        if p.layout != torch.strided:
            raise TypeError(f"{name} is {p.layout}; only dense parameters have a penalty")
    factor = _lambda_tensor(ewc_lambda, lambda_name, params[0].device)
    return autograd.separate_penalty(params, fisher, anchor, factor, buffers)


def ewc_penalty(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], ewc_lambda: float | Tensor
) -> Tensor:
    """EWC's penalty over sequences of tensors (Kirkpatrick et al. 2017, eq. 3).

    ``lambda/2 * sum_i F_i (theta_i - theta*_i)^2``, differentiable in ``params``; the gradient is computed in the same
    pass as the value. A second derivative raises.

    Args:
        params: Parameters; fp64, fp32, bf16 or fp16, of any strides.
        fisher: The Fisher diagonal of each, of its shape and on its device; fp64, fp32 or bf16. Its entries are not
            looked at, which would cost a pass and a synchronisation: negative or NaN ones go into the result.
        anchor: theta* of each, likewise (fp16 as well).
        ewc_lambda: At least 0; a float, or a tensor of one number, which is read on the device.

    Returns:
        0-dim, fp64 if any parameter is, else fp32; on the first parameter's device. 0 for no parameters.

    Raises:
        ValueError: Lengths, shapes or devices differ, or lambda is negative or not finite.
        TypeError: A dtype that has no penalty.
    """
    params, fisher, anchor = list(params), list(fisher), list(anchor)
    if not len(params) == len(fisher) == len(anchor):
        raise ValueError(
            f"params, fisher and anchor must be equally long, got {len(params)}, {len(fisher)} and {len(anchor)}"
        )
    if not params:
        return torch.zeros(())
    names = [f"params[{i}]" for i in range(len(params))]
    return _penalty(names, params, fisher, anchor, ewc_lambda, "ewc_lambda", {})


def ewc_loss(
    model: nn.Module,
    fisher_diagonals: Mapping[str, Tensor],
    prev_params: Mapping[str, Tensor],
    lambda_factor: float | Tensor,
) -> Tensor:
    """EWC's penalty of a model, from mappings by parameter name (Kirkpatrick et al. 2017, eq. 3).

    ``lambda/2 * sum_i F_i (theta_i - theta*_i)^2`` over the parameters that require grad. (A listing that leaves out
    the 1/2 equals this one at twice its lambda.)

    The gradient's memory, the size of the parameters, is kept while the model lives and used again as soon as nothing
    else holds it; further penalties alive at the same time get memory of their own. :class:`EWCLoss` takes less time.

    Args:
        model: The model being trained.
        fisher_diagonals: The Fisher diagonal by parameter name. Every parameter that requires grad must be there;
            others are ignored. Its entries are not looked at, as in :func:`ewc_penalty`.
        prev_params: The weights after the old task, likewise.
        lambda_factor: As ``ewc_lambda`` of :func:`ewc_penalty`.

    Returns:
        As :func:`ewc_penalty`.

    Raises:
        ValueError: A parameter is missing from a mapping, or shapes or devices differ.
        TypeError: A dtype that has no penalty.
    """
    for what, mapping in (("fisher_diagonals", fisher_diagonals), ("prev_params", prev_params)):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{what} must map parameter names to tensors, got {type(mapping).__name__}")
    names: list[str] = []
    params: list[Tensor] = []
    fisher: list[Tensor] = []
    anchor: list[Tensor] = []
    wrapped = any(wrapper_prefix(module) for module in model.modules())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        own = own_name(model, name) if wrapped else name
        for what, mapping, found in (
            ("fisher_diagonals", fisher_diagonals, fisher),
            ("prev_params", prev_params, anchor),
        ):
            key = own if own in mapping else name
            if key not in mapping:
                raise ValueError(
                    f"{what} has no entry for {own!r}, which requires grad: add it, or freeze the parameter"
                )
            found.append(mapping[key])
        names.append(own)
        params.append(p)
    if not params:
        raise ValueError("no parameter of the model requires grad, so there is nothing to penalise")
    buffers = {} if torch.compiler.is_compiling() else _buffers.setdefault(model, {})
    return _penalty(names, params, fisher, anchor, lambda_factor, "lambda_factor", buffers)
