"""What users call, end to end, on every device there is: each against the same in fp64 on the CPU."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCSGD, EWCAdamW, EWCLoss, ForgettingProbe, estimate_fisher, ewc_loss
from ewc_fast.fisher import FisherDiagonal

pytestmark = pytest.mark.native

ROUNDING = {"rtol": 2e-4, "atol": 2e-6}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


class Sequences(nn.Module):
    """Tokens through an embedding, attention and norms to one class per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 9, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 7)),
    "convolutions": (convolutions, lambda n: torch.randn(n, 3, 10, 10)),
    "sequences": (Sequences, lambda n: torch.randint(19, (n, 6))),
}


def in_fp64(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.double() if x.is_floating_point() else x, y) for x, y in batches]


def close(found: FisherDiagonal, expected: FisherDiagonal, device: torch.device) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].device.type == device.type
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[name].cpu().double(), wanted.double(), rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "predicted", "batch"])
@pytest.mark.parametrize("name", list(MODELS))
def test_fisher(device: torch.device, name: str, kind: str) -> None:
    make, draw = MODELS[name]
    model = make().eval()
    batches = [(draw(n), torch.randint(5, (n,))) for n in (8, 8, 3)]
    same = copy.deepcopy(model)
    references = batches
    if kind != "sampled":  # whose draws are others in fp64
        same, references = same.double(), in_fp64(batches)
    reference, found = (
        estimate_fisher(m, data, kind=kind, loss="cross_entropy", generator=torch.Generator().manual_seed(1))
        for m, data in ((same, references), (model.to(device), batches))
    )
    close(found, reference, device)


def consolidated(model: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> EWCLoss:
    ewc = EWCLoss(model, ewc_lambda=3.0, damping=0.1)
    ewc.consolidate(fisher=fisher, anchor=anchor)
    return ewc


def attached(model: nn.Module, ewc: EWCLoss, coupling: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=next(model.parameters()).dtype == torch.float32)
    ewc.attach(optimizer, coupling)
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module, EWCLoss, str], torch.optim.Optimizer]] = {
    "adamw": lambda model, ewc, coupling: EWCAdamW(model.parameters(), lr=1e-2, ewc=ewc, coupling=coupling),
    "sgd": lambda model, ewc, coupling: EWCSGD(model.parameters(), lr=1e-2, momentum=0.9, ewc=ewc, coupling=coupling),
    "attached": attached,
}


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training(device: torch.device, name: str, coupling: str) -> None:
    start = mlp()
    fisher = {n: torch.rand_like(p) for n, p in start.named_parameters()}
    anchor = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in start.named_parameters()}
    inputs = [torch.randn(6, 7, dtype=torch.float64) for _ in range(5)]
    ends, penalties = [], []
    for dtype, where in ((torch.float64, torch.device("cpu")), (torch.float32, device)):
        model = copy.deepcopy(start).to(where, dtype)
        ewc = consolidated(model, *({n: t.to(where, dtype) for n, t in d.items()} for d in (fisher, anchor)))
        optimizer = OPTIMIZERS[name](model, ewc, coupling)
        for x in inputs:
            optimizer.zero_grad()
            model(x.to(where, dtype)).square().mean().backward()
            optimizer.step()
        ends.append({n: p.detach().cpu().double() for n, p in model.named_parameters()})
        penalties.append((float(ewc.last_penalty), float(ewc.predicted_forgetting)))
    for n, wanted in ends[0].items():
        torch.testing.assert_close(ends[1][n], wanted, **ROUNDING, msg=n)
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-4)


def test_loss_and_state(device: torch.device) -> None:
    """The penalty in the loss, through a second consolidation, a saved state and the function on dicts."""
    model = mlp().to(device)
    names = [n for n, _ in model.named_parameters()]
    fishers = [{n: torch.rand_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    ewc = EWCLoss(model, ewc_lambda=3.0, mode="online", gamma=0.5)
    ewc.consolidate(fisher=fishers[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    ewc.consolidate(fisher=fishers[1])
    file = io.BytesIO()
    torch.save(ewc.state_dict(), file)
    file.seek(0)
    again = EWCLoss(model, ewc_lambda=3.0, mode="online", gamma=0.5)
    again.load_state_dict(torch.load(file, map_location="cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    value = again()
    value.backward()
    fisher = {n: 0.5 * fishers[0][n].double() + fishers[1][n].double() for n in names}
    wanted = 0.0
    for n, p in model.named_parameters():
        d = p.detach().double() - ewc.anchor[n].double()
        wanted += 1.5 * float((fisher[n] * d * d).sum())
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), 3.0 * fisher[n] * d, **ROUNDING)
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    function = ewc_loss(model, dict(ewc.fisher), dict(ewc.anchor), 3.0)
    assert function.item() == pytest.approx(wanted, rel=1e-5)


def test_probe(device: torch.device) -> None:
    model = mlp().to(device)
    x = torch.randn(9, 7)
    probe = ForgettingProbe(model, x)
    before = model(x.to(device)).double().log_softmax(-1).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        after = model(x.to(device)).double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert float(probe()) == pytest.approx(float(expected), rel=1e-3)
