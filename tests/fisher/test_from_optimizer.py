"""fisher_from_optimizer against the moving average itself, in fp64, from the gradients of every step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCAdamW, EWCLoss
from ewc_fast.fisher.from_optimizer import fisher_from_optimizer

TERMS = 48


class Net(nn.Module):
    """A frozen layer, a tied weight, norms under two names, a parameter at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.ln = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.input_norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(self.frozen(self.embedding(x)).tanh())
        return self.head(self.input_norm(self.hidden(x).tanh())) * self.scale


TRAINED = ["scale", "embedding.weight", "ln.weight", "ln.bias", "hidden.weight", "hidden.bias", "input_norm.weight"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 7) -> list[dict[str, Tensor]]:
    """Trains on noise; returns each step's gradients by name, in fp64."""
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(9, 6)).square().mean().backward()
        gradients.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def moving_average(gradients: list[dict[str, Tensor]], name: str, beta2: float) -> Tensor:
    """The weighted mean of squared gradients, the weights a geometric series that sums to 1."""
    weights = torch.tensor([beta2**age for age in reversed(range(len(gradients)))], dtype=torch.float64)
    squares = torch.stack([step[name] ** 2 for step in gradients])
    return torch.tensordot(weights / weights.sum(), squares, 1)


def assert_is_average(fisher: Any, gradients: list[dict[str, Tensor]], beta2: Callable[[str], float]) -> None:
    for name, tensor in fisher.items():
        expected = TERMS * moving_average(gradients, name, beta2(name))
        assert tensor.dtype == torch.float32
        # fp32 storage of the moment, two roundings per step
        torch.testing.assert_close(tensor.double(), expected, rtol=4e-6, atol=1e-30)


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "amsgrad": lambda params, **options: torch.optim.Adam(params, amsgrad=True, **options),
    "fused": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    "foreach": lambda params, **options: torch.optim.Adam(params, foreach=True, **options),
    "maximize": lambda params, **options: torch.optim.Adam(params, maximize=True, **options),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_is_the_bias_corrected_moving_average(make: Any) -> None:
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:3], "betas": (0.9, 0.8)}, {"params": trained[3:], "betas": (0.5, 0.999)}]
    optimizer = make(groups, lr=1e-2)
    gradients = train(model, optimizer)
    fisher = fisher_from_optimizer(optimizer, TERMS, model)
    assert list(fisher) == TRAINED
    assert_is_average(fisher, gradients, lambda name: 0.8 if name in TRAINED[:3] else 0.999)


def test_info_and_consolidate() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.75))
    train(model, optimizer, steps=3)
    fisher = fisher_from_optimizer(optimizer, TERMS, model)
    info = fisher.info
    assert info is not None and info.is_fisher
    assert (info.kind, info.loss, info.unit, info.method) == ("optimizer", "unknown", "term", "optimizer")
    assert info.num_terms == round(TERMS * (1 + 0.75 + 0.75**2))
    assert (info.num_samples, info.batch_size) == (0, 0)
    ewc = EWCLoss(model, 2.0)
    ewc.consolidate(fisher=fisher)
    with torch.no_grad():
        model.scale += 0.5
    torch.testing.assert_close(ewc(), 0.25 * fisher["scale"].sum())


def test_fp64_moments_and_wrapped_model() -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.9))
    gradients = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 6, dtype=torch.float64)).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    fisher = fisher_from_optimizer(optimizer, TERMS, nn.DataParallel(model))
    assert list(fisher) == TRAINED
    for name, tensor in fisher.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, TERMS * moving_average(gradients, name, 0.9), rtol=1e-12, atol=0)


def test_estimates_the_fisher_at_an_optimum() -> None:
    """At a learning rate of 0, with labels from the model itself: the mean gradient is 0, as at an optimum."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    inputs = torch.randn(64, 4, dtype=torch.float64)
    probs = model(inputs).softmax(-1).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch, steps = 32, 2000
    for _ in range(steps):
        rows = torch.randint(64, (batch,))
        labels = torch.multinomial(probs[rows], 1)[:, 0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels).backward()
        optimizer.step()
    fisher = fisher_from_optimizer(optimizer, batch, model)
    # d log p_c / d W_k = (1{k = c} - p_k) x: its square's expectation over c is p_k (1 - p_k) x^2.
    curvature = probs * (1 - probs)
    exact = {"weight": curvature.T @ inputs**2 / 64, "bias": curvature.mean(0)}
    # A squared gradient's variance is 2 F^2 and a little more; the average is worth 1,500 independent steps: 4% each.
    for name, expected in exact.items():
        torch.testing.assert_close(fisher[name], expected, rtol=0.25, atol=0)
        torch.testing.assert_close(fisher[name].mean(), expected.mean(), rtol=0.15, atol=0)


# ---- state dicts and checkpoints ----


def trainer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's two groups, by its own function."""
    trainer = pytest.importorskip("transformers").Trainer
    decayed = trainer.get_decay_parameter_names(None, model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": 0.01},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]


def bert_like() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def llama_like() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def fake_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps with random gradients."""
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()


@pytest.mark.parametrize("make", [bert_like, llama_like, Net])
@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin"])
def test_checkpoint_of_the_trainer(tmp_path: Path, make: Callable[[], nn.Module], name: str) -> None:
    model = make()
    if make is llama_like:
        model.model.layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=(0.9, 0.99))
    assert all(group["params"] for group in optimizer.param_groups)
    fake_steps(model, optimizer)
    live = fisher_from_optimizer(optimizer, TERMS, model)
    torch.save(optimizer.state_dict(), tmp_path / name)
    for source in (tmp_path, tmp_path / name, str(tmp_path / name), optimizer.state_dict()):
        found = fisher_from_optimizer(source, TERMS, model)
        assert list(found) == list(live) and found.info == live.info
        for key, tensor in live.items():
            assert torch.equal(found[key], tensor)
    (tmp_path / name).write_bytes(b"")  # nothing stays mapped
    assert torch.equal(found[key], live[key])


@pytest.mark.parametrize(
    "exempt",
    [
        lambda n: "bias" in n or n.startswith(("ln.", "input_norm.")),
        lambda n: "bias" in n or n.startswith("ln."),
    ],
    ids=["norm classes", "LayerNorm"],
)
def test_groups_of_older_trainers(exempt: Callable[[str], bool]) -> None:
    model = Net()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if exempt(n) is plain]} for plain in (False, True)]
    optimizer = torch.optim.AdamW(groups)
    fake_steps(model, optimizer)
    live = fisher_from_optimizer(optimizer, TERMS, model)
    found = fisher_from_optimizer(optimizer.state_dict(), TERMS, model)
    assert all(torch.equal(found[name], live[name]) for name in TRAINED)


@pytest.mark.parametrize("what", ["all", "trainable", "names", "keyed by name", "old format"])
def test_state_dict_in_other_orders(tmp_path: Path, what: str) -> None:
    model = Net()
    source: Any
    if what == "names":
        named = list(reversed([(n, p) for n, p in model.named_parameters() if p.requires_grad]))
        if "param_names" not in torch.optim.AdamW([("x", nn.Parameter(torch.ones(1)))]).param_groups[0]:
            pytest.skip("this torch's optimizers keep no names")
        optimizer = torch.optim.AdamW(named)
    else:
        params = [p for p in model.parameters() if p.requires_grad or what == "all"]
        optimizer = torch.optim.AdamW(params)
    fake_steps(model, optimizer)
    source = optimizer.state_dict()
    if what == "keyed by name":
        # as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives it
        source["state"] = dict(zip(TRAINED, source["state"].values(), strict=True))
        source["param_groups"][0]["params"] = TRAINED
    if what == "old format":
        torch.save(source, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        source = tmp_path / "old.pt"
    live = fisher_from_optimizer(optimizer, TERMS, model)
    found = fisher_from_optimizer(source, TERMS, model)
    assert list(found) == TRAINED
    assert all(torch.equal(found[name], live[name]) for name in TRAINED)


def test_ambiguous_and_unfit_orders_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1:].parameters())
    fake_steps(model, optimizer)
    fisher_from_optimizer(optimizer.state_dict(), TERMS, model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"no order fits its groups of \[2\] parameters.*[Ff]reeze"):
        fisher_from_optimizer(optimizer.state_dict(), TERMS, model)

    layer = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW([layer.bias, layer.weight])
    fake_steps(layer, optimizer)
    with pytest.raises(ValueError, match="no order fits"):  # the number does, the shapes do not
        fisher_from_optimizer(optimizer.state_dict(), TERMS, layer)

    class Twins(nn.Module):
        """One is exempt from weight decay by its name (newer Trainers), the other by its class (older ones)."""

        def __init__(self) -> None:
            super().__init__()
            self.x_norm = nn.Bilinear(1, 1, 4, bias=False)
            self.inner = CustomLayerNorm()

    class CustomLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 1, 1))

    twins = Twins()
    optimizer = torch.optim.AdamW([{"params": [twins.inner.weight]}, {"params": [twins.x_norm.weight]}])
    fake_steps(twins, optimizer)
    with pytest.raises(ValueError, match="more than one order fits"):
        fisher_from_optimizer(optimizer.state_dict(), TERMS, twins)


# ---- refusals ----


def stepped(make: Any = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(6, 6)
    optimizer = make(model.parameters(), **options)
    fake_steps(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("terms", [0, 0.5, -3, float("inf"), float("nan"), True, "32"])
def test_terms_per_step_is_checked(terms: Any) -> None:
    model, optimizer = stepped()
    with pytest.raises(ValueError, match="terms_per_step"):
        fisher_from_optimizer(optimizer, terms, model)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (torch.optim.Adafactor, {}, "factored into rows and columns"),
        (torch.optim.Adamax, {}, "keeps no exp_avg_sq .*exp_inf"),
        (torch.optim.SGD, {"momentum": 0.9}, "keeps no exp_avg_sq .*momentum_buffer"),
        (torch.optim.SGD, {}, "no second moment of weight, as plain SGD"),
        (torch.optim.RMSprop, {}, "keeps no exp_avg_sq .*square_avg"),
    ],
)
def test_optimizers_without_the_moment(make: Any, options: dict[str, Any], message: str) -> None:
    model, optimizer = stepped(make, **options)
    for source in (optimizer, optimizer.state_dict()):
        with pytest.raises(ValueError, match=message):
            fisher_from_optimizer(source, TERMS, model)


def test_sparse_adam_is_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="SparseAdam"):
        fisher_from_optimizer(optimizer, TERMS, model)


class Quantised(Tensor):
    """A tensor subclass that claims to be fp32, as quantised optimizer states do."""


def spoil(kind: str, state: dict[str, Any], group: dict[str, Any]) -> None:
    moment = state["exp_avg_sq"]
    if kind in ("bfloat16", "float16", "uint8"):
        state["exp_avg_sq"] = moment.to(getattr(torch, kind))
    elif kind == "subclass":
        state["exp_avg_sq"] = moment.as_subclass(Quantised)
    elif kind == "bitsandbytes":
        state.clear()
        state.update(step=3, state1=moment.byte(), state2=moment.byte())
    elif kind == "shape":
        state["exp_avg_sq"] = moment[:3]
    elif kind == "step 0":
        state["step"] = torch.tensor(0.0)
    elif kind == "no step":
        del state["step"]
    elif kind == "no betas":
        del group["betas"]
    else:
        moment[2] = {"nan": float("nan"), "inf": float("inf"), "negative": -1e-9}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bfloat16", "bias is torch.bfloat16"),
        ("float16", "bias is torch.float16"),
        ("uint8", "bias is torch.uint8"),
        ("subclass", "bias is a Quantised"),
        ("bitsandbytes", "bitsandbytes"),
        ("shape", r"bias has shape \(3,\), the parameter \(6,\)"),
        ("step 0", "bias has no second moment"),
        ("no step", "bias has no second moment"),
        ("no betas", "has no betas"),
        ("nan", "bias has a negative, NaN"),
        ("inf", "bias has a negative, NaN"),
        ("negative", "bias has a negative, NaN"),
    ],
)
def test_moments_that_cannot_be_used(kind: str, message: str) -> None:
    model, optimizer = stepped()
    spoil(kind, optimizer.state[model.bias], optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        fisher_from_optimizer(optimizer, TERMS, model)
    source = optimizer.state_dict()
    source["param_groups"][0]["param_names"] = ["weight", "bias"]
    with pytest.raises(ValueError, match=message):
        fisher_from_optimizer(source, TERMS, model)


def test_step_as_a_number_or_in_the_group() -> None:
    model, optimizer = stepped()
    expected = fisher_from_optimizer(optimizer, TERMS, model)
    optimizer.state[model.weight]["step"] = 2
    del optimizer.state[model.bias]["step"]
    optimizer.param_groups[0]["step"] = 2
    found = fisher_from_optimizer(optimizer, TERMS, model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parameters_without_state() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="scale has no second moment.*never stepped"):
        fisher_from_optimizer(optimizer, TERMS, model)
    train(model, optimizer, steps=1)
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen.weight has no second moment.*requires_grad_"):
        fisher_from_optimizer(optimizer, TERMS, model)
    model.added = nn.Linear(2, 2)
    model.frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="added.weight is not in the optimizer"):
        fisher_from_optimizer(optimizer, TERMS, model)
    with pytest.raises(ValueError, match="requires grad"):
        fisher_from_optimizer(optimizer, TERMS, nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("source", ["optimizer", "state dict"])
def test_weight_decay_in_the_gradient_is_warned_of(source: str) -> None:
    model, optimizer = stepped(torch.optim.Adam, weight_decay=0.1)
    if source == "state dict" and "decoupled_weight_decay" not in optimizer.param_groups[0]:
        pytest.skip("this torch's Adam does not tell its kind of weight decay")
    with pytest.warns(UserWarning, match="weight decay"):
        fisher_from_optimizer(optimizer if source == "optimizer" else optimizer.state_dict(), TERMS, model)
    model, optimizer = stepped(torch.optim.AdamW, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_from_optimizer(optimizer, TERMS, model)


COUPLED = {
    "attached": lambda model, ewc, coupling: attached(model, ewc, coupling),
    "EWCAdamW": lambda model, ewc, coupling: EWCAdamW(model.parameters(), ewc=ewc, coupling=coupling),
    "wrapped": lambda model, ewc, coupling: Wrapper(attached(model, ewc, coupling)),
}


def attached(model: nn.Module, ewc: EWCLoss, coupling: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    ewc.attach(optimizer, coupling)
    return optimizer


class Wrapper(torch.optim.Optimizer):
    """What Accelerate's prepared optimizers are: one around another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def penalised(model: nn.Module, ewc_lambda: float = 10.0) -> EWCLoss:
    ewc = EWCLoss(model, ewc_lambda, damping=0.1)
    ewc.consolidate(fisher={n: torch.rand_like(p) for n, p in model.named_parameters() if p.requires_grad})
    return ewc


def estimate_silently(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_from_optimizer(optimizer, TERMS, model)


@pytest.mark.parametrize("make", COUPLED.values(), ids=COUPLED.keys())
def test_a_coupled_penalty_in_the_gradient_is_warned_of(make: Any) -> None:
    model = Net()
    ewc = penalised(model)
    optimizer = make(model, ewc, "coupled")
    train(model, optimizer, steps=2)
    with pytest.warns(UserWarning, match="coupled EWC penalty.*coupling='proximal'.*estimate_fisher"):
        fisher_from_optimizer(optimizer, TERMS, model)
    model = Net()
    optimizer = make(model, penalised(model), "proximal")
    train(model, optimizer, steps=2)
    estimate_silently(optimizer, model)


def test_a_coupled_penalty_is_warned_of_after_its_handle_is_removed() -> None:
    model = Net()
    ewc = penalised(model)
    optimizer = torch.optim.AdamW(model.parameters())
    handle = ewc.attach(optimizer)
    train(model, optimizer, steps=1)
    handle.remove()
    train(model, optimizer, steps=1)
    with pytest.warns(UserWarning, match="coupled EWC penalty"):
        fisher_from_optimizer(optimizer, TERMS, model)


def test_a_coupled_penalty_that_never_acted_is_not_warned_of() -> None:
    for ewc_lambda, consolidated in ((0.0, True), (10.0, False)):
        for make in (COUPLED["attached"], COUPLED["EWCAdamW"]):
            model = Net()
            ewc = penalised(model, ewc_lambda) if consolidated else EWCLoss(model, ewc_lambda)
            optimizer = make(model, ewc, "coupled")
            train(model, optimizer, steps=1)
            estimate_silently(optimizer, model)


@pytest.mark.parametrize("source", ["optimizer", "state dict"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_keeps_no_second_moment(source: str, momentum: float) -> None:
    model, optimizer = stepped(torch.optim.SGD, momentum=momentum)
    with pytest.raises(ValueError, match="the optimizer keeps no .*only Adam's family does; estimate it") as error:
        fisher_from_optimizer(optimizer if source == "optimizer" else optimizer.state_dict(), TERMS, model)
    assert "never stepped" not in str(error.value)
    assert momentum or "second moment of weight, as plain SGD" in str(error.value)


def test_malformed_sources(tmp_path: Path) -> None:
    model, optimizer = stepped()
    with pytest.raises(TypeError, match="state dict or a path, got int"):
        fisher_from_optimizer(3, TERMS, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'state' and 'param_groups'.*'weight'"):
        fisher_from_optimizer(model.state_dict(), TERMS, model)
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        fisher_from_optimizer({"state": {}, "param_groups": [{}]}, TERMS, model)
    with pytest.raises(FileNotFoundError, match="optimizer.pt"):
        fisher_from_optimizer(tmp_path, TERMS, model)
    with pytest.raises(FileNotFoundError):
        fisher_from_optimizer(tmp_path / "missing.pt", TERMS, model)
    for name, content in (
        ("empty.pt", b""),
        ("text.pt", b"no optimizer"),
        ("letters.pt", b"abc"),
        ("line.pt", b"hello world\n"),
        ("zip.pt", b"PK\x03\x04"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            fisher_from_optimizer(tmp_path / name, TERMS, model)
    torch.save(optimizer.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut.pt"):
        fisher_from_optimizer(tmp_path / "cut.pt", TERMS, model)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    model, optimizer = stepped()

    class Payload:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({**optimizer.state_dict(), "payload": Payload()}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt"):
        fisher_from_optimizer(tmp_path, TERMS, model)
    assert not (tmp_path / "ran").exists()


def test_an_optimizer_that_knows_the_names_needs_no_model() -> None:
    model = Net()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": named[:3]}, {"params": named[3:]}], lr=1e-2)
    gradients = train(model, optimizer)
    fisher = fisher_from_optimizer(optimizer, TERMS)
    assert sorted(fisher) == sorted(TRAINED)
    assert_is_average(fisher, gradients, lambda _: 0.999)


def test_names_must_come_from_somewhere() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    for source in (optimizer, optimizer.state_dict()):
        with pytest.raises(ValueError, match="model is needed for the parameters' names"):
            fisher_from_optimizer(source, TERMS)
