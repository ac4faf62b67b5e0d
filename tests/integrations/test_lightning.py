"""The callback in a real Trainer equals a plain PyTorch loop with the penalty in its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast import EWCAdamW, EWCBudget, EWCLoss, ForgettingProbe

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch import strategies  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from ewc_fast.integrations.lightning import EWCCallback  # noqa: E402

pytestmark = [
    # Lightning's advice on data loading, and what it uses of torch that is deprecated.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
]

LAMBDA = 3.0
VERSION = tuple(map(int, L.__version__.split(".")[:2]))
SAFE = {"weights_only": True} if VERSION >= (2, 6) else {}  # loads nothing but tensors and plain values
Batch = tuple[Tensor, Tensor]
Fisher = dict[str, Tensor]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}


class Module(L.LightningModule):
    """Two layers, as automatic optimization has it."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def prepared(make: Make, dtype: torch.dtype = torch.float64, kind: type[Module] = Module) -> tuple[Module, EWCLoss]:
    """A module away from its anchor."""
    module = kind(make, dtype)
    ewc = EWCLoss(module, LAMBDA)
    ewc.consolidate(fisher={name: torch.rand(p.shape) for name, p in module.named_parameters()})
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return module, ewc


def batches(count: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [(torch.randn(size, 5, dtype=dtype), torch.randint(3, (size,))) for _ in range(count)]


def loader(data: list[Batch]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None)


def trainer(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def penalty(module: nn.Module, fisher: Fisher, anchor: Fisher) -> Tensor:
    """The formula, in plain PyTorch."""
    terms = [(fisher[name] * (p - anchor[name]) ** 2).sum() for name, p in module.named_parameters()]
    return LAMBDA / 2 * torch.stack(terms).sum()


def state_of(ewc: EWCLoss) -> tuple[Fisher, Fisher]:
    return {n: t.clone() for n, t in ewc.fisher.items()}, {n: t.clone() for n, t in ewc.anchor.items()}


def plain_loop(module: Module, ewc: EWCLoss, data: list[Batch], accumulate: int = 1, clip: float | None = None) -> None:
    """What the Trainer should do, with the penalty in the loss."""
    fisher, anchor = state_of(ewc)
    optimizer = module.make(module.parameters())
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for batch in data[start : start + accumulate]:
            (module.training_step(batch, 0) / accumulate).backward()
        penalty(module, fisher, anchor).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (4, 0.3), (1, 0.3)])
def test_equals_the_penalty_in_the_loss(name: str, accumulate: int, clip: float | None) -> None:
    module, ewc = prepared(OPTIMIZERS[name])
    plain = copy.deepcopy(module)
    data = batches(8)
    trainer(EWCCallback(ewc), accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(module, loader(data))
    plain_loop(plain, ewc, data, accumulate, clip)
    assert_same(module, plain)
    assert not ewc._is_attached()


def test_accumulation_does_not_change_the_weights() -> None:
    first, _ = prepared(OPTIMIZERS["sgd"])
    data = batches(6, size=8)
    results = []
    for accumulate in (1, 2, 4):
        module = copy.deepcopy(first)
        ewc = EWCLoss(module, LAMBDA)
        ewc.consolidate(
            fisher={name: torch.ones_like(p) for name, p in module.named_parameters()},
            anchor={name: torch.zeros_like(p) for name, p in module.named_parameters()},
        )
        cut = [part for x, y in data for part in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)]
        trainer(EWCCallback(ewc), accumulate_grad_batches=accumulate).fit(module, loader(cut))
        results.append(module)
    assert_same(results[0], results[1], rtol=1e-10)
    assert_same(results[0], results[2], rtol=1e-10)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_proximal_pulls_after_the_step(accumulate: int) -> None:
    lr, momentum = 0.1, 0.5
    module, ewc = prepared(lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum))
    plain = copy.deepcopy(module)
    data = batches(6)
    trainer(EWCCallback(ewc, coupling="proximal"), accumulate_grad_batches=accumulate).fit(module, loader(data))
    fisher, anchor = state_of(ewc)
    optimizer = plain.make(plain.parameters())
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for batch in data[start : start + accumulate]:
            (plain.training_step(batch, 0) / accumulate).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                pull = lr * LAMBDA * fisher[name]
                p.copy_(((1 - momentum) * p + pull * anchor[name]) / (1 - momentum + pull))
    assert_same(module, plain)


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_ewc_adamw_is_not_doubled(coupling: str) -> None:
    module, ewc = prepared(OPTIMIZERS["adamw"])
    plain, data = copy.deepcopy(module), batches(6)
    module.make = lambda params: EWCAdamW(params, lr=0.02, ewc=ewc, coupling=coupling)
    trainer(EWCCallback(ewc), accumulate_grad_batches=2).fit(module, loader(data))
    if coupling == "coupled":
        plain_loop(plain, ewc, data, 2)
    else:
        optimizer = EWCAdamW(plain.parameters(), lr=0.02, ewc=(own := EWCLoss(plain, LAMBDA)), coupling=coupling)
        own.load_state_dict(ewc.state_dict())
        for start in range(0, len(data), 2):
            optimizer.zero_grad()
            for batch in data[start : start + 2]:
                (plain.training_step(batch, 0) / 2).backward()
            optimizer.step()
    assert_same(module, plain)
    assert ewc.last_penalty > 0


def test_lbfgs_gets_it_at_every_call_of_its_closure() -> None:
    module, ewc = prepared(lambda params: torch.optim.LBFGS(params, lr=0.3, max_iter=4))
    plain, data = copy.deepcopy(module), batches(3)
    trainer(EWCCallback(ewc)).fit(module, loader(data))
    fisher, anchor = state_of(ewc)
    optimizer = plain.make(plain.parameters())
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = plain.training_step(batch, 0)
            loss.backward()
            penalty(plain, fisher, anchor).backward()
            return loss

        optimizer.step(closure)
    assert_same(module, plain, rtol=1e-6, atol=1e-8)


class Manual(Module):
    """Two optimizers, one layer each, and a third of a layer that is not protected; the first accumulates."""

    def __init__(self, make: Make, dtype: torch.dtype) -> None:
        super().__init__(make, dtype)
        self.automatic_optimization = False
        self.other: list[nn.Module] = [nn.Linear(3, 2).to(dtype)]  # in a list: not in the module

    def configure_optimizers(self) -> Any:
        return [self.make(self.net[0].parameters()), self.make(self.net[2].parameters()), self.make(self.others())]

    def others(self) -> list[nn.Parameter]:
        return list(self.other[0].parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        first, second, third = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if batch_idx % 2:
            first.step()
            first.zero_grad()
        second.step()
        second.zero_grad()
        self.manual_backward(self.other[0](self(batch[0]).detach()).square().mean())
        third.step()
        third.zero_grad()


def test_manual_optimization_with_several_optimizers() -> None:
    module, ewc = prepared(OPTIMIZERS["adamw"], kind=Manual)
    plain, data = copy.deepcopy(module), batches(6)
    trainer(EWCCallback(ewc)).fit(module, loader(data))
    fisher, anchor = state_of(ewc)
    layers = (plain.net[0], plain.net[2])
    first, second = (plain.make(layer.parameters()) for layer in layers)
    for i, batch in enumerate(data):
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        for optimizer, layer in ((first, plain.net[0]), (second, plain.net[2])):
            if optimizer is second or i % 2:
                for p, grad in zip(
                    layer.parameters(),
                    torch.autograd.grad(penalty(plain, fisher, anchor), list(layer.parameters())),
                    strict=True,
                ):
                    p.grad += grad
                optimizer.step()
                optimizer.zero_grad()
    assert_same(module, plain)


def test_bf16_mixed() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"], torch.float32)
    plain, data = copy.deepcopy(module), batches(6, dtype=torch.float32)
    trainer(EWCCallback(ewc), precision="bf16-mixed").fit(module, loader(data))
    step = plain.training_step

    def autocast_step(batch: Batch, i: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step(batch, i)

    plain.training_step = autocast_step  # type: ignore[method-assign]
    plain_loop(plain, ewc, data)
    assert_same(module, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_is_seen(fused: bool, overflow: bool) -> None:
    """A fused optimizer unscales in its step, the others are unscaled before the callback."""
    module, ewc = prepared(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5, fused=fused), torch.float32)
    plain, data = copy.deepcopy(module), batches(4, dtype=torch.float32)
    if overflow:
        data.insert(1, (data[0][0] * float("inf"), data[0][1]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # fp32, to compare exactly
    trainer(EWCCallback(ewc), plugins=[precision]).fit(module, loader(data))
    plain_loop(plain, ewc, [batch for batch in data if batch[0].isfinite().all()])
    assert_same(module, plain, rtol=1e-5, atol=1e-6)


def test_clipping_in_the_modules_own_hook_adds_it_once() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    plain, data = copy.deepcopy(module), batches(5)
    module.configure_gradient_clipping = lambda *_, **__: ewc.clip_grad_norm_(module.parameters(), 0.3)
    trainer(EWCCallback(ewc)).fit(module, loader(data))
    plain_loop(plain, ewc, data, clip=0.3)
    assert_same(module, plain)


def test_a_callback_serves_one_fit_after_the_other() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    plain, data = copy.deepcopy(module), batches(4)
    callback = EWCCallback(ewc)
    for part in (data[:2], data[2:]):
        trainer(callback).fit(module, loader(part))
        plain_loop(plain, ewc, part)
    assert_same(module, plain)


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_an_error_in_training_detaches(coupling: str) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer(EWCCallback(ewc, coupling=coupling)).fit(module, loader([(torch.randn(2, 4).double(), torch.zeros(2))]))
    assert not ewc._is_attached()


def test_pytorch_lightning_too() -> None:
    pl = pytest.importorskip("pytorch_lightning", "2.6", reason="refuses a callback that is lightning's before 2.6")

    class Plain(pl.LightningModule):
        def __init__(self, inner: Module) -> None:
            super().__init__()
            self.inner = inner

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.inner.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return self.inner.make(self.inner.parameters())

    module, ewc = prepared(OPTIMIZERS["adamw"])
    plain, data = copy.deepcopy(module), batches(4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(
        accelerator="cpu", max_epochs=1, enable_model_summary=False, callbacks=[EWCCallback(ewc)], **options
    ).fit(Plain(module), loader(data))
    plain_loop(plain, ewc, data)
    assert_same(module, plain)


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    name, version = "recorder", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(metrics)

    def log_hyperparams(self, *_: Any) -> None:
        pass


def test_logs_reach_callback_metrics_and_loggers() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    probe = ForgettingProbe(module, torch.randn(16, 5, dtype=torch.float64))
    logger = Recorder()
    run = trainer(EWCCallback(ewc, probe=probe, probe_every=2), logger=logger, log_every_n_steps=1)
    run.fit(module, loader(batches(5)))
    assert run.callback_metrics["ewc/penalty"].item() == pytest.approx(ewc.last_penalty.item(), rel=1e-5)
    predicted = run.callback_metrics["ewc/predicted_forgetting"].item()
    assert predicted == pytest.approx(ewc.last_penalty.item() / LAMBDA, rel=1e-5)
    assert run.callback_metrics["ewc/measured_forgetting"] > 0
    steps = [metrics for metrics in logger.seen if "ewc/penalty" in metrics]
    assert len({metrics["ewc/penalty"] for metrics in steps}) == 5
    measured = [metrics.get("ewc/measured_forgetting") for metrics in steps]  # Lightning repeats the newest
    assert measured[0] is None and measured[1] == measured[2] != measured[3] == measured[4]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    module, ewc = prepared(OPTIMIZERS["adamw"])
    first, data = copy.deepcopy(module), batches(4)
    trainer(EWCCallback(ewc), max_epochs=2).fit(module, loader(data))

    own = EWCLoss(first, LAMBDA)
    own.load_state_dict(ewc.state_dict())
    run = trainer(EWCCallback(own))
    run.fit(first, loader(data))
    run.save_checkpoint(tmp_path / "half.ckpt")

    resumed = Module(OPTIMIZERS["adamw"])  # a new process: other weights, nothing consolidated
    fresh = EWCLoss(resumed, LAMBDA)
    trainer(EWCCallback(fresh), max_epochs=2).fit(resumed, loader(data), ckpt_path=tmp_path / "half.ckpt", **SAFE)
    assert_same(resumed, module, rtol=0, atol=0)
    for name in ewc.anchor:
        assert torch.equal(fresh.anchor[name], ewc.anchor[name])
        assert torch.equal(fresh.fisher[name], ewc.fisher[name])


@pytest.mark.filterwarnings("ignore:the probe's standard error")
def test_a_budget_sets_lambda_and_is_resumed(tmp_path: Path) -> None:
    start, _ = prepared(OPTIMIZERS["adamw"])
    data, old = batches(6), torch.randn(16, 5, dtype=torch.float64)
    fisher = {name: torch.rand(p.shape) for name, p in start.named_parameters()}

    def make(with_budget: bool = True) -> tuple[Module, EWCLoss, EWCCallback]:
        module = copy.deepcopy(start)
        ewc = EWCLoss(module, LAMBDA)
        ewc.consolidate(fisher=fisher)
        budget = EWCBudget(ewc, 1e-3, ForgettingProbe(module, old), every=1) if with_budget else None
        return module, ewc, EWCCallback(ewc, coupling="proximal", budget=budget)

    module, ewc, callback = make()
    whole = trainer(callback, max_epochs=2, accumulate_grad_batches=2)
    whole.fit(module, loader(data))
    assert callback.budget is not None
    assert [m.step for m in callback.budget.measurements] == [1, 2, 3, 4, 5, 6]  # of 12 batches
    assert whole.callback_metrics["ewc/lambda"].item() == pytest.approx(ewc.ewc_lambda, rel=1e-6)
    assert ewc.ewc_lambda != LAMBDA
    assert whole.callback_metrics["ewc/measured_forgetting"].item() == pytest.approx(callback.budget.forgetting)

    module_1, _, callback_1 = make()
    first = trainer(callback_1, accumulate_grad_batches=2)
    first.fit(module_1, loader(data))
    first.save_checkpoint(tmp_path / "half.ckpt")
    module_2, ewc_2, callback_2 = make()
    resumed = trainer(callback_2, max_epochs=2, accumulate_grad_batches=2)
    resumed.fit(module_2, loader(data), ckpt_path=tmp_path / "half.ckpt", **SAFE)
    assert_same(module_2, module, rtol=0, atol=0)
    assert callback_2.budget is not None and callback_2.budget.measurements == callback.budget.measurements
    assert ewc_2.ewc_lambda == ewc.ewc_lambda

    module_3, _, callback_3 = make(with_budget=False)
    without = trainer(callback_3)
    without.fit(module_3, loader(data))
    without.save_checkpoint(tmp_path / "without.ckpt")
    module_4, _, callback_4 = make()
    with pytest.warns(UserWarning, match="the checkpoint was saved without a budget: lambda is what it is now, 3"):
        trainer(callback_4).fit(module_4, loader(data), ckpt_path=tmp_path / "without.ckpt", **SAFE)


@pytest.mark.parametrize("evaluation", ["test", "validate", "predict"])
def test_evaluating_a_checkpoint_leaves_what_is_consolidated(evaluation: str, tmp_path: Path) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    data = batches(2)
    run = trainer(EWCCallback(ewc, consolidate=loader(data), kind="empirical"))
    module.test_step = module.validation_step = module.predict_step = lambda batch, batch_idx: torch.zeros(())
    module.on_train_epoch_end = lambda: run.save_checkpoint(tmp_path / "before.ckpt")
    run.fit(module, loader(data))
    fisher, anchor = state_of(ewc)
    getattr(run, evaluation)(module, loader(data), ckpt_path=tmp_path / "before.ckpt", **SAFE)
    assert ewc.num_tasks == 2
    for name in anchor:
        assert torch.equal(ewc.fisher[name], fisher[name]) and torch.equal(ewc.anchor[name], anchor[name])


def test_a_resumed_task_is_not_consolidated_twice(tmp_path: Path) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    data = batches(3)
    run = trainer(EWCCallback(ewc, consolidate=loader(data), kind="empirical"))
    run.fit(module, loader(data))
    run.save_checkpoint(tmp_path / "after.ckpt")
    fisher, anchor = state_of(ewc)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    callback = EWCCallback(ewc, consolidate=loader(data), kind="empirical")
    with pytest.warns(UserWarning, match="does not consolidate the task a second time"):
        trainer(callback, max_epochs=2).fit(module, loader(data), ckpt_path=tmp_path / "after.ckpt", **SAFE)
    assert any(not torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert ewc.num_tasks == 2
    for name in anchor:
        assert torch.equal(ewc.fisher[name], fisher[name]) and torch.equal(ewc.anchor[name], anchor[name])
    trainer(callback).fit(module, loader(data))  # another task
    assert ewc.num_tasks == 3


def test_a_checkpoint_of_an_unfinished_task_is_consolidated_once(tmp_path: Path) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    data = batches(3)
    run = trainer(EWCCallback(ewc, consolidate=loader(data), kind="empirical"))
    module.on_train_epoch_end = lambda: run.save_checkpoint(tmp_path / "before.ckpt")
    run.fit(module, loader(data))
    del module.on_train_epoch_end
    state = torch.load(tmp_path / "before.ckpt", weights_only=True)
    del state["callbacks"]["EWCCallback"]["consolidated"]  # as it was before there was this entry
    torch.save(state, tmp_path / "before.ckpt")
    trainer(EWCCallback(ewc, consolidate=loader(data), kind="empirical"), max_epochs=2).fit(
        module, loader(data), ckpt_path=tmp_path / "before.ckpt", **SAFE
    )
    assert ewc.num_tasks == 2


def test_trying_the_first_batch_changes_no_weights() -> None:
    first, _ = prepared(OPTIMIZERS["sgd"])
    samples = [(torch.randn(5, dtype=torch.float64), i % 3) for i in range(16)]
    results = []
    for options in ({}, {"consolidate": "the same", "num_samples": 10, "progress": False}):
        module = copy.deepcopy(first)
        ewc = EWCLoss(module, LAMBDA)
        ewc.consolidate(fisher={name: torch.ones_like(p) for name, p in module.named_parameters()})
        own = torch.Generator().manual_seed(1)
        shuffled = torch.utils.data.DataLoader(samples, 4, shuffle=True, generator=own)
        if options:
            options["consolidate"] = shuffled
        torch.manual_seed(0)
        trainer(EWCCallback(ewc, **options)).fit(module, shuffled)
        results.append(module)
    assert_same(*results, rtol=0, atol=0)


class TwoParts(Module):
    """A penalty for each layer."""

    def penalties(self) -> list[EWCLoss]:
        found = []
        for layer in (self.net[0], self.net[2]):
            ewc = EWCLoss(layer, LAMBDA)
            ewc.consolidate(
                fisher={name: torch.rand(p.shape) for name, p in layer.named_parameters()},
                anchor={name: torch.zeros_like(p) for name, p in layer.named_parameters()},
            )
            found.append(ewc)
        return found


def test_two_callbacks_have_a_name_each(tmp_path: Path) -> None:
    module = TwoParts(OPTIMIZERS["sgd"])
    data, plain = batches(3), copy.deepcopy(module)
    a, b = module.penalties()
    run = trainer(EWCCallback(a), EWCCallback(b, name="head"), gradient_clip_val=0.3)
    run.fit(module, loader(data))
    assert run.callback_metrics["ewc/penalty"].item() == pytest.approx(a.last_penalty.item(), rel=1e-5)
    assert run.callback_metrics["ewc_head/penalty"].item() == pytest.approx(b.last_penalty.item(), rel=1e-5)
    whole = EWCLoss(plain, LAMBDA)
    parts = {"net.0": a, "net.2": b}
    whole.consolidate(
        fisher={f"{at}.{name}": t for at, ewc in parts.items() for name, t in ewc.fisher.items()},
        anchor={f"{at}.{name}": t for at, ewc in parts.items() for name, t in ewc.anchor.items()},
    )
    plain_loop(plain, whole, data, clip=0.3)
    assert_same(module, plain)

    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed = TwoParts(OPTIMIZERS["sgd"])
    c, d = (EWCLoss(layer, LAMBDA) for layer in (resumed.net[0], resumed.net[2]))
    trainer(EWCCallback(c), EWCCallback(d, name="head"), max_epochs=2, gradient_clip_val=0.3).fit(
        resumed, loader(data), ckpt_path=tmp_path / "two.ckpt", **SAFE
    )
    for old, new in ((a, c), (b, d)):
        assert all(torch.equal(new.anchor[name], old.anchor[name]) for name in old.anchor)


def test_consolidates_at_the_end() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    data = batches(4)
    trainer(EWCCallback(ewc, consolidate=loader(data), kind="empirical")).fit(module, loader(data))
    expected = EWCLoss(module, LAMBDA)
    expected.consolidate(data, kind="empirical")
    assert ewc.num_tasks == 2 and ewc.info is not None and ewc.info["kind"] == "empirical"
    later = EWCLoss(module, LAMBDA, mode="latest")
    later.consolidate(data, kind="empirical")
    for name in later.fisher:
        assert (ewc.fisher[name] >= later.fisher[name]).all()


# ---- what cannot be served ----


class RawManual(Module):
    """Steps the optimizer past Lightning."""

    def __init__(self, make: Make, dtype: torch.dtype) -> None:
        super().__init__(make, dtype)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class RawAutomatic(Module):
    """The same under automatic optimization, in every other step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        raw = batch_idx % 2 == 1
        (optimizer.optimizer if raw else optimizer).step(closure=optimizer_closure)


@pytest.mark.parametrize("kind", [RawManual, RawAutomatic])
@pytest.mark.parametrize("nested", [False, True])
def test_a_step_past_lightning_is_refused(kind: type[Module], nested: bool) -> None:
    """And the hook that sees it is gone then."""
    module, ewc = prepared(nested_sgd if nested else OPTIMIZERS["sgd"], kind=kind)
    run = trainer(EWCCallback(ewc))
    with pytest.raises(RuntimeError, match=r"past Lightning, and the step had no penalty: .*self\.optimizers\(\)"):
        run.fit(module, loader(batches(4)))
    assert not ewc._is_attached() and not run.optimizers[0]._optimizer_step_post_hooks


def test_a_step_past_lightning_is_taken_under_proximal() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"], kind=RawManual)
    before = copy.deepcopy(module)
    trainer(EWCCallback(ewc, coupling="proximal")).fit(module, loader(batches(2)))
    assert ewc.last_penalty > 0 and not torch.equal(module.net[0].weight, before.net[0].weight)


class Outer(torch.optim.SGD):
    """torch wraps a step in every class that has one, and each calls the hooks."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def nested_sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # wraps SGD's own step
    return Outer(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def test_a_step_that_calls_another_is_one() -> None:
    module, ewc = prepared(nested_sgd)
    plain, data = copy.deepcopy(module), batches(4)
    run = trainer(EWCCallback(ewc))
    run.fit(module, loader(data))
    plain_loop(plain, ewc, data)
    assert_same(module, plain)
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_a_step_past_lightning_is_seen_after_a_skipped_one() -> None:
    """A GradScaler skips the first, whose gradient is not that of the second."""

    class Mixed(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            (optimizer.optimizer if batch_idx else optimizer).step()

    module, ewc = prepared(OPTIMIZERS["sgd"], torch.float32, kind=Mixed)
    (x, y), second = batches(2, dtype=torch.float32)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    with pytest.raises(RuntimeError, match="past Lightning"):
        trainer(EWCCallback(ewc), plugins=[precision]).fit(module, loader([(x * float("inf"), y), second]))


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "labels": ([(torch.randn(4, 5).double(), torch.full((4,), 9))], {"kind": "empirical"}, ValueError, "9"),
    "shape": ([torch.randn(4, 6).double()], {}, RuntimeError, "mat1 and mat2"),
    "no batch": (["text"], {}, TypeError, "a batch must be"),
    "empty": ([], {}, ValueError, "no sample|empty|yielded"),
    "no loader": (3, {}, TypeError, "iterable of batches"),
    "kind": (batches(1), {"kind": "exat"}, ValueError, "exat"),
    "loss": (batches(1), {"loss": "cross"}, ValueError, "cross"),
    "number": (batches(1), {"num_samples": 0}, ValueError, "num_samples"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_consolidated_is_refused_before_training(case: str) -> None:
    data, options, error, match = BAD[case]
    module, ewc = prepared(OPTIMIZERS["sgd"])
    before = copy.deepcopy(module)
    with pytest.raises(error, match=f"consolidate: the first batch, tried before training, .*({match})"):
        trainer(EWCCallback(ewc, consolidate=data, **options)).fit(module, loader(batches(1)))
    assert_same(module, before, 0, 0)
    assert ewc.num_tasks == 1


def test_batches_that_can_be_had_once_are_refused() -> None:
    class Once(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            raise StopIteration

    _, ewc = prepared(OPTIMIZERS["sgd"])
    for once in (iter(batches(1)), torch.utils.data.DataLoader(Once())):
        with pytest.raises(TypeError, match="consolidate: its batches come from an iterator.*give a list or a loader"):
            EWCCallback(ewc, consolidate=once)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    data, path = batches(2), tmp_path / "without.ckpt"
    run = trainer()
    run.fit(module, loader(data))
    run.save_checkpoint(path)
    for name in ("", "head"):
        callback = EWCCallback(ewc, name=name)
        with pytest.raises(ValueError, match="ckpt_path: the checkpoint holds no state of EWCCallback"):
            trainer(callback, max_epochs=2).fit(module, loader(data), ckpt_path=path, **SAFE)
    module.test_step = lambda batch, batch_idx: None
    trainer(callback).test(module, loader(data), ckpt_path=path, **SAFE)  # which needs none
    checkpoint = torch.load(path)
    checkpoint["callbacks"]["EWCCallback{'name': 'head'}"] = callback.state_dict()  # as the error says
    torch.save(checkpoint, path)
    trainer(callback, max_epochs=2).fit(module, loader(data), ckpt_path=path, **SAFE)
    assert ewc.last_penalty > 0


def test_two_callbacks_of_one_penalty_are_refused() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="two of them are an EWCCallback of the same EWCLoss"):
        trainer(EWCCallback(ewc), EWCCallback(ewc, name="again")).fit(module, loader(batches(1)))


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused_by_name(strategy: str) -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    before = copy.deepcopy(module)
    named = type(strategy, (SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=strategy):
        trainer(EWCCallback(ewc), strategy=named).fit(module, loader(batches(1)))
    assert_same(module, before, 0, 0)
    if strategy != "ModelParallelStrategy" or VERSION >= (2, 4):  # which has brought it
        assert hasattr(strategies, strategy)  # the names are Lightning's


def test_an_optimizer_that_is_attached_already_is_refused() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])

    def attached(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["sgd"](params)
        ewc.attach(optimizer)
        return optimizer

    module.make = attached
    with pytest.raises(ValueError, match="leave it out"):
        trainer(EWCCallback(ewc)).fit(module, loader(batches(1)))


def test_a_penalty_on_another_model_is_refused() -> None:
    module, _ = prepared(OPTIMIZERS["sgd"])
    _, ewc = prepared(OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="no optimizer of configure_optimizers"):
        trainer(EWCCallback(ewc)).fit(module, loader(batches(1)))


def test_a_penalty_without_a_task_is_reported() -> None:
    module = Module(OPTIMIZERS["sgd"])
    with pytest.warns(UserWarning, match="no task has been consolidated"):
        trainer(EWCCallback(EWCLoss(module))).fit(module, loader(batches(1)))


def test_bad_arguments_are_named() -> None:
    _, ewc = prepared(OPTIMIZERS["sgd"])
    with pytest.raises(TypeError, match="ewc must be an EWCLoss"):
        EWCCallback(lambda: 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coupling must be one of"):
        EWCCallback(ewc, coupling="loose")
    with pytest.raises(ValueError, match="probe_every"):
        EWCCallback(ewc, probe_every=0)
    with pytest.raises(TypeError, match="probe must be callable"):
        EWCCallback(ewc, probe=3)  # type: ignore[arg-type]
    budget = EWCBudget(ewc, 1.0, lambda: 0.0)
    with pytest.raises(ValueError, match="budget: its EWCLoss is another one"):
        EWCCallback(prepared(OPTIMIZERS["sgd"])[1], budget=budget)
    with pytest.raises(ValueError, match="probe: the budget has a probe of its own"):
        EWCCallback(ewc, budget=budget, probe=lambda: 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: only with consolidate="):
        EWCCallback(ewc, kind="exact")
    with pytest.raises(TypeError, match="nums_samples: EWCCallback has no such argument.*num_samples"):
        EWCCallback(ewc, consolidate=batches(1), nums_samples=3)
    with pytest.raises(TypeError, match="name must be a string"):
        EWCCallback(ewc, name=1)  # type: ignore[arg-type]


def test_consolidate_with_several_processes_is_refused() -> None:
    module, ewc = prepared(OPTIMIZERS["sgd"])
    strategy = SingleDeviceStrategy(device=torch.device("cpu"))
    strategy.world_size = 2
    with pytest.raises(ValueError, match="consolidate: each process"):
        trainer(EWCCallback(ewc, consolidate=batches(1)), strategy=strategy).fit(module, loader(batches(1)))
