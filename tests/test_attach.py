"""Level 2 through ``attach``: what the optimizer sees equals the penalty in the loss."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ewc_fast import EWCAdamW, EWCLoss

LAMBDA = 3.0


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, EWCLoss]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, ewc


def penalised(model: nn.Module, ewc: EWCLoss) -> Tensor:
    """The penalty by the formula, in plain PyTorch."""
    params = dict(model.named_parameters())
    terms = [(f.to(params[n].dtype) * (params[n] - ewc.anchor[n]) ** 2).sum() for n, f in ewc.fisher.items()]
    return LAMBDA / 2 * torch.stack(terms).sum()


def task_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_equals_the_penalty_in_the_loss(name: str, micro_batches: int) -> None:
    # fp64: both sides' roundings stay far below the tolerance, even through Adam's normalisation.
    model, ewc = make(torch.float64)
    plain = copy.deepcopy(model)
    handle = ewc.attach(optimizer := OPTIMIZERS[name](model.parameters()))
    reference = OPTIMIZERS[name](plain.parameters())
    for _ in range(10):
        batches = [(torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(micro_batches)]
        for batch in batches:
            (task_loss(model, batch) / micro_batches).backward()
            (task_loss(plain, batch) / micro_batches).backward()
        penalty = penalised(plain, ewc)
        penalty.backward()
        optimizer.step()
        reference.step()
        assert ewc.last_penalty.item() == pytest.approx(penalty.item(), rel=1e-9)
        optimizer.zero_grad()
        reference.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    handle.remove()
    handle.remove()
    assert not ewc.is_attached(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.native
def test_the_native_kernel_runs_once_per_step() -> None:
    model, ewc = make()
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.profiler.profile() as profile:
        for _ in range(4):
            task_loss(model, (torch.randn(2, 6), torch.tensor([0, 1]))).backward()
            optimizer.step()
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("ewc_fast::")}
    assert calls == {"ewc_fast::penalty_accumulate_": 4}


def test_a_missing_gradient_becomes_the_penaltys() -> None:
    model, ewc = make()
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, LAMBDA * ewc.fisher[name] * (p.detach() - ewc.anchor[name]))


def test_maximize_subtracts() -> None:
    model, ewc = make()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "maximize": True}]
    ewc.attach(optimizer := torch.optim.SGD(groups, lr=0.0))
    optimizer.step()
    for name, p in model.named_parameters():
        sign = -1 if name.startswith("2") else 1
        torch.testing.assert_close(p.grad, sign * LAMBDA * ewc.fisher[name] * (p.detach() - ewc.anchor[name]))
    assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-5)
    assert set(ewc.penalty_by_parameter()) == {n for n, _ in model.named_parameters()}


def test_lambda_zero_writes_nothing() -> None:
    model, ewc = make()
    ewc.ewc_lambda = 0.0
    ewc.attach(optimizer := torch.optim.AdamW(model.parameters(), lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert ewc.last_penalty.item() == 0.0
    assert ewc.predicted_forgetting.item() == pytest.approx(penalised(model, ewc).item() / LAMBDA, rel=1e-5)


def test_gradients_of_several_dtypes() -> None:
    model, ewc = make(torch.bfloat16)
    for p in model.parameters():
        p.grad = None
    if not hasattr(model[0].weight, "grad_dtype"):
        pytest.skip("this torch has no gradients in another dtype than their parameter")
    model[0].weight.grad_dtype = torch.float32
    model[0].weight.grad = torch.zeros(8, 6)
    ewc.accumulate_grad_()
    wanted = {
        n: LAMBDA * f.float() * (model.get_parameter(n).float() - ewc.anchor[n].float()) for n, f in ewc.fisher.items()
    }
    torch.testing.assert_close(model[0].weight.grad, wanted["0.weight"].detach())
    torch.testing.assert_close(model[2].bias.grad, wanted["2.bias"].detach().bfloat16())
    assert set(ewc.penalty_by_parameter()) == set(wanted)


def test_several_optimizers_on_parts_of_one_model() -> None:
    model, ewc = make()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.0) for i in (0, 2)]
    for optimizer in optimizers:
        ewc.attach(optimizer)
    for optimizer in optimizers:
        optimizer.step()
    assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, LAMBDA * ewc.fisher[name] * (p.detach() - ewc.anchor[name]))


def test_the_newest_pass_replaces_the_one_before() -> None:
    model, ewc = make()
    ewc.accumulate_grad_()
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    value = penalised(model, ewc).item()
    optimizer.step()
    assert ewc.last_penalty.item() == pytest.approx(value, rel=1e-5)
    with torch.no_grad():
        ewc()
    assert ewc.last_penalty.item() == pytest.approx(value, rel=1e-5)


def test_a_fresh_optimizer_for_every_task_leaves_nothing_behind() -> None:
    model, ewc = make()
    value = penalised(model, ewc).item()
    gone = []
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ewc.attach(optimizer)  # a warning would be an error
        optimizer.step()
        assert ewc.last_penalty.item() == pytest.approx(value, rel=1e-5)
        assert sum(v.item() for v in ewc.penalty_by_parameter().values()) == pytest.approx(value, rel=1e-5)
        gone.append(weakref.ref(optimizer))
        del optimizer
    assert all(optimizer() is None for optimizer in gone)
    ewc().backward()  # attached to nothing any more: no warning, which would be an error


def test_a_layer_replaced_after_the_optimizer_was_built_is_reported_once() -> None:
    model, ewc = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ewc.attach(optimizer)
    optimizer.step()
    model[2] = nn.Linear(8, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert sorted(str(w.message).partition(" ")[0] for w in caught) == ["2.bias", "2.weight"]
    assert "replaced in the model but not in the attached optimizer" in str(caught[0].message)


def test_readings_outlive_the_handle() -> None:
    model, ewc = make()
    handle = ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer.step()
    value = ewc.last_penalty.item()
    handle.remove()
    assert ewc.last_penalty.item() == value > 0 and ewc.predicted_forgetting.item() > 0


def test_two_live_optimizers_over_the_same_parameters_do_not_add_up() -> None:
    model, ewc = make()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2)]
    ewc.attach(optimizers[0])
    with pytest.warns(UserWarning, match="penalised by two attached penalties"):
        ewc.attach(optimizers[1])
    for optimizer in optimizers:
        optimizer.step()
        assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-5)


def test_clipping_adds_the_penalty_of_each_parameter_once() -> None:
    """As with an optimizer that an interrupted training has left behind; the older one steps a part of them."""
    model, ewc = make(torch.float64)
    old, new, rest = (torch.optim.SGD(p, lr=0.1) for p in (model.parameters(), model[0].parameters(), [model[2].bias]))
    for optimizer in (old, new, rest):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is penalised twice
            ewc.attach(optimizer)
    for optimizer in (new, old):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        wanted = torch.autograd.grad(penalised(model, ewc), list(model.parameters()))
        optimizer.zero_grad()
        (0 * task_loss(model, (torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,))))).backward()
        for _ in range(2):
            norm = ewc.clip_grad_norm_(model.parameters(), 1e9)
            torch.testing.assert_close(norm, torch.cat([g.flatten() for g in wanted]).norm())
        assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-5)
        optimizer.step()
        stepped = {id(p) for p in optimizer.param_groups[0]["params"]}
        for (n, p), g in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), before[n] - (0.1 * g if id(p) in stepped else 0.0))
        model.zero_grad()


def test_a_parameter_swapped_into_a_group_is_penalised() -> None:
    model, ewc = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ewc.attach(optimizer)
    optimizer.step()
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    with pytest.warns(UserWarning, match="0.weight was replaced in the model"):
        optimizer.step()
    assert model[0].weight.grad is None
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()
    assert model[0].weight.grad is not None
    assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-5)


def test_attached_before_the_first_consolidate_and_over_changes_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    ewc = EWCLoss(model, LAMBDA)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    ewc.attach(optimizer)
    optimizer.step()
    assert model[0].weight.grad is None and ewc.last_penalty.item() == 0.0
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    optimizer.add_param_group({"params": list(model[1].parameters())})
    with torch.no_grad():
        model[1].bias.add_(1.0)
    optimizer.step()
    torch.testing.assert_close(model[1].bias.grad, LAMBDA * ewc.fisher["1.bias"])
    model.double()
    optimizer.zero_grad()
    optimizer.step()
    assert model[1].bias.grad.dtype == torch.float64
    torch.testing.assert_close(model[1].bias.grad, LAMBDA * ewc.fisher["1.bias"].double())


@pytest.mark.parametrize("overflow", [False, True])
def test_under_a_gradient_scaler(overflow: bool) -> None:
    # A fused optimizer unscales by itself, so its hook sees scaled gradients.
    model, ewc = make()
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = task_loss(model, (torch.randn(4, 6), torch.randint(3, (4,))))
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), strict=True))
    scaler.scale(loss).backward()
    if overflow:
        model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    for n, p in model.named_parameters():
        if overflow:
            assert torch.equal(p, before[n])
        else:
            total = gradients[n] + LAMBDA * ewc.fisher[n] * (before[n] - ewc.anchor[n])
            torch.testing.assert_close(p.detach(), before[n] - 0.1 * total, rtol=1e-5, atol=1e-6)


# ---- errors and reports ----


def test_bad_arguments() -> None:
    model, ewc = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="coupling must be one of coupled, proximal, got 'copled'"):
        ewc.attach(optimizer, coupling="copled")
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every must be a positive integer"):
            ewc.attach(optimizer, every=every)
    with pytest.raises(ValueError, match=r"none of its 1 parameters \(the first has shape \(3,\)\) is the model's"):
        ewc.attach(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    differentiable = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=r"param_groups\[0\] is differentiable"):
        ewc.attach(differentiable)
    without = torch.optim.SGD(model.parameters(), lr=0.1)
    del without.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no lr"):
        ewc.attach(without, coupling="proximal")

    class Fused(torch.optim.SGD):
        def fused_backward(self, loss: Tensor) -> None: ...

    with pytest.raises(ValueError, match="Fused updates the weights inside the backward"):
        ewc.attach(Fused(model.parameters(), lr=0.1))
    assert not any(ewc.is_attached(o) for o in (optimizer, differentiable, without))
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer"):
        ewc.attach(model)
    ewc.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        ewc.attach(optimizer)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fisher = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    ewc = EWCLoss(model)
    ewc.consolidate(fisher=fisher)
    anchor = {name: t.clone() for name, t in ewc.anchor.items()}
    fully_shard(model[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"1.weight is sharded \(a DTensor\), .*: train with DDP, or leave it out with params="
    for coupling in ("coupled", "proximal"):
        with pytest.raises(ValueError, match=message):
            ewc.attach(optimizer, coupling)
    with pytest.raises(ValueError, match=message):
        EWCAdamW(model.parameters(), ewc=ewc)
    with pytest.raises(ValueError, match=message):
        ewc.consolidate(fisher=fisher, anchor={name: t + 1 for name, t in anchor.items()})
    with pytest.raises(ValueError, match=message):
        EWCLoss(model)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not ewc.is_attached(optimizer) and ewc.num_tasks == 1
    assert all(torch.equal(ewc.anchor[name], anchor[name]) for name in anchor)
    assert EWCLoss(model, params=["0.*"]).attach(optimizer).coupling == "coupled"


def test_a_closure_is_refused_before_anything_is_written() -> None:
    model, ewc = make()
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    for arguments in (((lambda: None),), ()):
        with pytest.raises(RuntimeError, match=r"ewc.accumulate_grad_\(\) at the end of the closure"):
            optimizer.step(*arguments, **({} if arguments else {"closure": lambda: None}))
    assert all(p.grad is None for p in model.parameters())
    optimizer.step(None)
    optimizer.step(closure=None)
    assert model[0].weight.grad is not None


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    model[0](torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="0.weight has a torch.sparse_coo gradient"):
        optimizer.step()
    assert model[1].weight.grad is None  # nothing is left behind


def test_a_penalty_that_acts_twice_is_reported_once() -> None:
    model, ewc = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ewc()
            ewc.accumulate_grad_()
            with torch.no_grad():
                ewc()
        other = EWCLoss(model)
        other.attach(optimizer)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    assert "ewc() is called with a graph while attached" in messages[0]
    assert "accumulate_grad_() is called while attached" in messages[1]
    assert "penalised by two attached penalties" in messages[2]


def test_a_penalty_outside_the_optimizer_is_reported_once() -> None:
    model, _ = make()
    ewc = EWCLoss(model, LAMBDA, params=["0.*"])
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters() if n.startswith("0")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ewc.attach(optimizer := torch.optim.SGD(model[2].parameters(), lr=0.1))
        optimizer.step()
    assert len(caught) == 1 and "none of the parameters that EWC protects" in str(caught[0].message)


def test_a_parameter_added_later_to_a_second_attached_optimizer_is_said() -> None:
    model = nn.Linear(3, 2)
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    first, second = torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    handles = [ewc.attach(first), ewc.attach(second)]
    second.step()
    second.add_param_group({"params": [model.weight]})
    with pytest.warns(UserWarning, match="a parameter is penalised by two attached penalties"):
        second.step()
    assert len(handles) == 2


def test_a_scripted_model() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc.attach(optimizer)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert ewc.last_penalty.item() > 0
