"""ewc_loss and ewc_penalty against the article's formula, written out in fp64."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ewc_fast import ewc_loss, ewc_penalty, functional

ByName = dict[str, Tensor]
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.randn(()))


def state_of(model: nn.Module) -> tuple[ByName, ByName]:
    """A random Fisher and anchor for every parameter."""
    named = dict(model.named_parameters())
    fisher = {name: torch.rand_like(p).detach() for name, p in named.items()}
    anchor = {name: (p + torch.randn_like(p)).detach() for name, p in named.items()}
    return fisher, anchor


def formula(params: Mapping[str, Tensor], fisher: ByName, anchor: ByName, ewc_lambda: float) -> tuple[float, ByName]:
    """``L(theta) = sum_i lambda/2 F_i (theta_i - theta*_i)^2`` and its gradient, element by element in fp64."""
    value, gradient = 0.0, {}
    for name, p in params.items():
        d = p.detach().double() - anchor[name].double()
        value += ewc_lambda / 2 * float((fisher[name].double() * d**2).sum())
        gradient[name] = ewc_lambda * fisher[name].double() * d
    return value, gradient


def assert_formula(penalty: Tensor, params: Mapping[str, Tensor], exact: tuple[float, ByName]) -> None:
    """Tolerance: a handful of fp32 roundings, and one of the gradient to the parameter's dtype (u of bf16 is 2^-8)."""
    value, gradient = exact
    fp64 = any(p.dtype == torch.float64 for p in params.values())
    assert penalty.dtype == (torch.float64 if fp64 else torch.float32) and penalty.shape == ()
    only = all(p.dtype == torch.float64 for p in params.values())
    assert float(penalty.detach()) == pytest.approx(value, rel=1e-13 if only else 1e-6)
    penalty.backward()
    tolerance = {
        torch.float64: 1e-14,
        torch.float32: 6e-7,
        torch.bfloat16: 2.0**-8 + 1e-6,
        torch.float16: 2.0**-11 + 1e-6,
    }
    for name, p in params.items():
        assert p.grad is not None and p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad.double(), gradient[name], rtol=tolerance[p.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_formula(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    fisher, anchor = state_of(model)
    if dtype == torch.float16:
        fisher = {name: f.float() for name, f in fisher.items()}
    params = dict(model.named_parameters())
    exact = formula(params, fisher, anchor, 12.5)
    assert_formula(ewc_loss(model, fisher, anchor, 12.5), params, exact)
    model.zero_grad()
    assert_formula(
        ewc_penalty(list(params.values()), list(fisher.values()), list(anchor.values()), 12.5), params, exact
    )


def test_parameters_of_several_dtypes() -> None:
    model = Net()
    model.conv.to(torch.bfloat16)
    model.head.to(torch.float64)
    fisher, anchor = state_of(model)
    fisher["conv.weight"], anchor["head.bias"] = fisher["conv.weight"].double(), anchor["head.bias"].bfloat16()
    params = dict(model.named_parameters())
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))


def test_state_in_other_memory_orders() -> None:
    model = Net().to(memory_format=torch.channels_last)
    fisher, anchor = state_of(model)
    fisher["conv.weight"] = fisher["conv.weight"].contiguous()
    anchor["head.weight"] = torch.randn(4, 5).t()
    whole = torch.rand(100)  # views inside something larger, as in a flat checkpoint
    fisher["head.weight"], anchor["head.bias"], fisher["scale"] = whole[7:27].view(5, 4), whole[30:40:2], whole[50]
    fisher["head.bias"] = torch.rand(1).expand(5)
    params = dict(model.named_parameters())
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))


@pytest.mark.parametrize(
    "ewc_lambda",
    [
        2,
        2.0,
        torch.tensor(2.0),
        torch.tensor([2.0]),
        torch.tensor(2),
        torch.tensor(2.0).bfloat16(),
        torch.tensor(2.0).double(),
    ],
    ids=["int", "float", "0-dim", "1-dim", "integer tensor", "bf16 tensor", "fp64 tensor"],
)
def test_lambda(ewc_lambda: float | Tensor) -> None:
    model = nn.Linear(3, 2)
    fisher, anchor = state_of(model)
    params = dict(model.named_parameters())
    assert_formula(ewc_loss(model, fisher, anchor, ewc_lambda), params, formula(params, fisher, anchor, 2.0))


def test_a_lambda_that_would_get_no_gradient_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    state = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lambda_factor requires grad"):
        ewc_loss(model, state, state, torch.tensor(1.0, requires_grad=True))


def test_lambda_0_penalises_nothing() -> None:
    model = nn.Linear(3, 2)
    fisher, anchor = state_of(model)
    penalty = ewc_loss(model, fisher, anchor, 0.0)
    penalty.backward()
    assert float(penalty.detach()) == 0.0 and not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.tensor(math.nan)], ids=str)
def test_bad_lambdas(bad: float | Tensor) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="lambda_factor must be a finite number of at least 0"):
        ewc_loss(model, *state_of(model), bad)
    with pytest.raises(ValueError, match="ewc_lambda must be a finite number of at least 0"):
        ewc_penalty([torch.ones(2)], [torch.ones(2)], [torch.ones(2)], bad)


def test_a_lambda_of_several_numbers() -> None:
    with pytest.raises(ValueError, match="ewc_lambda must be one number"):
        ewc_penalty([torch.ones(2)], [torch.ones(2)], [torch.ones(2)], torch.ones(2))


def test_without_a_graph() -> None:
    model = nn.Linear(3, 2)
    fisher, anchor = state_of(model)
    with_graph = ewc_loss(model, fisher, anchor, 3.0)
    with torch.no_grad():
        without = ewc_loss(model, fisher, anchor, 3.0)
    assert with_graph.requires_grad and not without.requires_grad and torch.equal(with_graph.detach(), without)
    assert not ewc_penalty([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], 1.0).requires_grad


def test_no_parameters() -> None:
    penalty = ewc_penalty([], [], [], 1.0)
    assert penalty.shape == () and float(penalty) == 0.0
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        ewc_loss(model, {}, {}, 1.0)


# ---- names ----


@pytest.mark.parametrize("which", ["fisher_diagonals", "prev_params"])
def test_a_missing_name(which: str) -> None:
    model = Net()
    fisher, anchor = state_of(model)
    del (fisher if which == "fisher_diagonals" else anchor)["head.bias"]
    with pytest.raises(ValueError, match=f"{which} has no entry for 'head.bias'.*freeze"):
        ewc_loss(model, fisher, anchor, 1.0)
    model.head.bias.requires_grad_(False)  # the remedy
    ewc_loss(model, fisher, anchor, 1.0).backward()
    assert model.head.bias.grad is None


def test_extras_and_frozen_parameters_are_ignored() -> None:
    model = Net()
    fisher, anchor = state_of(model)
    fisher["no.such"] = torch.full((2,), math.nan)
    anchor.update(model.state_dict())  # buffers too
    model.conv.weight.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))
    assert model.conv.weight.grad is None


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    fisher, anchor = state_of(model)
    assert list(fisher) == ["0.weight"]
    fisher["1.weight"], anchor["1.weight"] = fisher["0.weight"], anchor["0.weight"]
    params = dict(model.named_parameters())
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
@pytest.mark.parametrize("named_by", ["model", "wrapper"])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], named_by: str) -> None:
    model = Net()
    wrapped = wrap(model)
    fisher, anchor = state_of(model if named_by == "model" else wrapped)
    params = dict((model if named_by == "model" else wrapped).named_parameters())
    assert_formula(ewc_loss(wrapped, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))


class Confusing(nn.Module):
    """Without its wrapper's prefix, one parameter's name is the other's with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.module = nn.Linear(3, 3, bias=False)
        self.module.weight = nn.Parameter(torch.randn(3))


def test_a_child_called_like_a_wrapper() -> None:
    model = Confusing()
    fisher, anchor = state_of(model)
    params = dict(model.named_parameters())
    assert_formula(ewc_loss(nn.DataParallel(model), fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))


# ---- tensors that do not fit ----


@pytest.mark.parametrize(
    ("which", "change", "error", "message"),
    [
        ("Fisher", Tensor.half, TypeError, "float16; use float32, bfloat16 or float64"),
        ("Fisher", Tensor.int, TypeError, "int32; use"),
        ("anchor", Tensor.int, TypeError, "int32; use"),
        ("Fisher", lambda t: t[:1], ValueError, r"shape \(1, 3\), the parameter \(2, 3\)"),
        ("anchor", Tensor.t, ValueError, r"shape \(3, 2\), the parameter \(2, 3\)"),
        ("anchor", lambda t: t.to("meta"), ValueError, "on meta, the parameter on cpu"),
        ("Fisher", Tensor.tolist, TypeError, "is a list, expected a tensor"),
    ],
)
def test_state_that_does_not_fit(
    which: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    model = nn.Linear(3, 2)
    fisher, anchor = state_of(model)
    spoilt = fisher if which == "Fisher" else anchor
    spoilt["weight"] = change(spoilt["weight"])
    with pytest.raises(error, match=f"{which} of weight .*{message}"):
        ewc_loss(model, fisher, anchor, 1.0)


def test_sequences_that_do_not_fit() -> None:
    two, one = [torch.ones(2), torch.ones(2)], [torch.ones(2)]
    with pytest.raises(ValueError, match="equally long, got 2, 1 and 2"):
        ewc_penalty(two, one, two, 1.0)
    with pytest.raises(ValueError, match=r"anchor of params\[1\] has shape"):
        ewc_penalty(two, two, [torch.ones(2), torch.ones(3)], 1.0)
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch.int64; only floating point"):
        ewc_penalty([torch.ones(2).long()], one, one, 1.0)


def test_other_kinds_of_differentiation_raise() -> None:
    """Without a derivative of their own they would take the penalty for a constant."""

    def penalty(p: Tensor) -> Tensor:
        return ewc_penalty([p], [torch.ones(3)], [torch.zeros(3)], 2.0)

    for transformed in (
        lambda: torch.func.jvp(penalty, (torch.ones(3),), (torch.ones(3),)),
        lambda: torch.func.grad(penalty)(torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="setup_context"):
            transformed()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="jvp"):
            penalty(dual)


def test_what_is_no_mapping_and_what_is_sparse_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    state = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(TypeError, match="prev_params must map"):
        ewc_loss(model, state, None, 1.0)  # type: ignore[arg-type]
    sparse = torch.eye(2).to_sparse()
    for triple in ((sparse, torch.ones(2, 2), torch.ones(2, 2)), (torch.ones(2, 2), sparse, torch.ones(2, 2))):
        with pytest.raises(TypeError, match="dense"):
            ewc_penalty([triple[0]], [triple[1]], [triple[2]], 1.0)


def test_the_gradient_memory_is_used_again() -> None:
    """Not while a graph, or a gradient that autograd has moved into p.grad, still holds it."""
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5).bfloat16())
    fisher, anchor = state_of(model)
    params = dict(model.named_parameters())

    def exact() -> tuple[float, ByName]:
        return formula(params, fisher, anchor, 3.0)

    first, expected = ewc_loss(model, fisher, anchor, 3.0), exact()
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn_like(p))
    second = ewc_loss(model, fisher, anchor, 3.0)
    assert_formula(first, params, expected)
    model.zero_grad()
    assert_formula(second, params, exact())
    del first, second
    places = set()
    for _ in range(3):
        model.zero_grad()
        assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, exact())
        grad = params["0.weight"].grad
        assert grad is not None
        places.add(grad.untyped_storage().data_ptr())
        del grad
    assert len(places) == 1
    held = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    with torch.no_grad():
        params["0.weight"].add_(1.0)
    ewc_loss(model, fisher, anchor, 3.0)
    assert all(torch.equal(p.grad, held[name]) for name, p in params.items() if p.grad is not None)


def test_the_gradient_memory_goes_with_the_model() -> None:
    model = nn.Linear(3, 4)
    fisher, anchor = state_of(model)
    ewc_loss(model, fisher, anchor, 3.0).backward()
    before = len(functional._buffers)
    del model
    gc.collect()
    assert len(functional._buffers) == before - 1


def test_two_backwards_of_a_kept_graph() -> None:
    model = nn.Linear(20, 30)
    fisher, anchor = state_of(model)
    params = dict(model.named_parameters())
    loss = ewc_loss(model, fisher, anchor, 3.0)
    _, gradient = formula(params, fisher, anchor, 3.0)
    (2 * loss).backward(retain_graph=True)
    (3 * loss).backward()
    for name, p in params.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), 5 * gradient[name], rtol=1e-5, atol=1e-6)


def test_a_call_in_another_mode_leaves_nothing_behind() -> None:
    """Inference mode's tensors, and fake ones, are no gradients for a later call."""
    model = nn.Linear(20, 30)
    fisher, anchor = state_of(model)
    params = dict(model.named_parameters())
    with torch.inference_mode(), torch.enable_grad(), pytest.raises(RuntimeError, match="Inference"):
        ewc_loss(model, fisher, anchor, 3.0)
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))
    model.zero_grad()
    with FakeTensorMode(allow_non_fake_inputs=True):
        functional._buffers[model][CPU, torch.float32].take(704, torch.float32, CPU)  # as long as before
    assert_formula(ewc_loss(model, fisher, anchor, 3.0), params, formula(params, fisher, anchor, 3.0))
    assert all(type(p.grad) is Tensor for p in params.values())
