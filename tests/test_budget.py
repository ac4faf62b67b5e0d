"""``EWCBudget``: its arithmetic, when it looks, saving, what it says, and that forgetting ends at the budget."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCAdamW, EWCBudget, EWCLoss, ForgettingProbe, sample_sequences
from ewc_fast.fisher import uniform_importance
from tests.fisher.brute_force import one_thread  # noqa: F401


def linear() -> nn.Linear:
    return nn.Linear(3, 2, dtype=torch.float64)


def penalty(ewc_lambda: float = 100.0, model: nn.Module | None = None) -> EWCLoss:
    model = model or linear()
    ewc = EWCLoss(model, ewc_lambda, backend="reference")
    ewc.consolidate(fisher={name: torch.rand_like(p) for name, p in model.named_parameters()})
    return ewc


class Scripted:
    """Says what it is told to, the first time (the value to start from) 0."""

    def __init__(self, *values: float, start: float = 0.0) -> None:
        self.values = iter((start, *values))
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return next(self.values)


def run(budget: EWCBudget, steps: int) -> list[float | None]:
    return [budget.step() for _ in range(steps)]


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("script", "factors"),
    [
        # At the budget nothing moves; 0.5 e near it, with 0.2 of the change.
        ([1.0, math.exp(0.3)], [1.0, math.exp(0.5 * 0.3 + 0.2 * 0.3)]),
        ([math.exp(0.3)] * 2, [math.exp(0.15), math.exp(0.15)]),
        # Far above, what exceeds 0.5 counts in full, up to e = 4.
        ([math.exp(2.0)], [math.exp(0.5 * 0.5 + 1.5)]),
        ([1e9], [math.exp(0.25 + 3.5)]),
        ([math.inf], [math.exp(0.25 + 3.5)]),
        # Below, slowly; nothing and less than nothing are as little as there is.
        ([0.0, -0.3], [math.exp(-0.5), math.exp(-0.5)]),
        # Ahead: the root grows by 0.6 to 1.2 at the next look; e is that of 1.44 where it is still 0.36.
        ([0.36], [math.exp(0.5 * math.log(1.44))]),
        # Falling, nothing is foreseen.
        ([1.0, 0.5], [1.0, math.exp((0.5 + 0.2) * math.log(0.5))]),
    ],
)
def test_lambda_by_hand(script: list[float], factors: list[float]) -> None:
    ewc = penalty(7.0)
    budget = EWCBudget(ewc, 1.0, Scripted(*script), every=1)
    expected = 7.0
    for value, factor in zip(script, factors, strict=True):
        expected *= factor
        assert budget.step() == pytest.approx(expected, rel=1e-12)
        assert ewc.ewc_lambda == pytest.approx(expected, rel=1e-12)
        assert budget.forgetting == value
    assert [m.step for m in budget.measurements] == list(range(1, len(script) + 1))


def test_first_looks_lower_lambda_by_the_time_that_passed() -> None:
    budget = EWCBudget(penalty(1.0), 1.0, Scripted(*[0.0] * 9), every=20)
    run(budget, 40)
    elapsed = [1, 1, 2, 4, 8, 4, 20]  # steps 1, 2, 4, 8, 16, 20, 40
    assert [m.step for m in budget.measurements] == [1, 2, 4, 8, 16, 20, 40]
    assert [m.ewc_lambda for m in budget.measurements] == pytest.approx(
        [math.exp(-0.5 * steps / 20) for steps in itertools.accumulate(elapsed)]
    )


def test_looking_ahead_knows_the_next_step() -> None:
    """From 16 it is 9 steps to 25; the root has grown by 0.4 in the 8 before."""
    values = [0.0, 0.0, 0.0, 0.0, 0.16]
    budget = EWCBudget(penalty(1.0), 1.0, Scripted(*values), every=25)
    run(budget, 16)
    before, after = budget.measurements[-2:]
    error = math.log((0.4 + 0.4 * 9 / 8) ** 2)
    move = 0.5 * error * (8 / 25 if error < 0 else 1) + 0.2 * (error + 1)
    assert after.ewc_lambda == pytest.approx(before.ewc_lambda * math.exp(move))


@pytest.mark.parametrize("elasticity", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_settles_on_a_plant(elasticity: float, scale: float) -> None:
    """Forgetting that follows c / lambda^a with a lag; the same settings for all."""
    ewc = penalty(100.0)
    state = 0.0

    def probe() -> float:
        return state

    budget = EWCBudget(ewc, 0.05, probe, every=5)
    for _ in range(400):
        goal = min((scale / ewc.ewc_lambda) ** elasticity, 3.0)
        state += 0.1 * (goal - state)
        budget.step()
    assert budget.forgetting == pytest.approx(0.05, rel=0.02)
    assert ewc.ewc_lambda == pytest.approx(scale / (0.05) ** (1 / elasticity), rel=0.05)


# ---- what is measured ----


def test_since_the_last_consolidate() -> None:
    ewc = penalty()
    budget = EWCBudget(ewc, 1.0, Scripted(2.5, start=2.0), every=1)
    budget.step()
    assert budget.forgetting == 0.5
    budget = EWCBudget(ewc, 1.0, Scripted(2.0, 2.5, start=0.0), every=1)
    ewc.consolidate(fisher=dict(ewc.fisher))
    assert budget.step() is None and budget.forgetting == 0.0 and budget.measurements == ()
    budget.step()
    assert budget.forgetting == 0.5
    budget.restart(Scripted(0.25))
    assert budget.measurements == () and budget.forgetting == 0.0
    budget.step()
    assert budget.forgetting == 0.25


def test_nothing_before_a_consolidate() -> None:
    ewc = EWCLoss(linear(), 3.0)
    probe = Scripted(0.4)
    budget = EWCBudget(ewc, 1.0, probe, every=1)
    assert run(budget, 5) == [None] * 5 and probe.calls == 0 and ewc.ewc_lambda == 3.0
    ewc.consolidate(fisher={name: torch.ones_like(p) for name, p in ewc.model.named_parameters()})
    assert budget.step() is None and probe.calls == 1
    assert budget.step() is not None and budget.forgetting == 0.4


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
def test_prediction_at_the_present_weights(mode: str) -> None:
    """sum F d^2 / 2 by hand, also where older tasks have left a constant; what the last pass said stays readable."""
    model = linear()
    ewc = EWCLoss(model, 5.0, mode=mode)
    named = dict(model.named_parameters())
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        ewc.consolidate(fisher={name: torch.rand_like(p) for name, p in named.items()})
    fisher = {name: f.clone() for name, f in ewc.fisher.items()}
    anchor = {name: a.clone() for name, a in ewc.anchor.items()}
    then = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        ewc()
    last = ewc.last_penalty
    budget = EWCBudget(ewc, 1.0, every=1)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    budget.step()
    expected = sum(
        float((fisher[n] * ((p.detach() - anchor[n]) ** 2 - (then[n] - anchor[n]) ** 2)).sum()) / 2
        for n, p in named.items()
    )
    assert budget.forgetting == pytest.approx(expected, rel=1e-9)
    assert ewc.last_penalty == last


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_prediction_ends_at_the_budget(coupling: str) -> None:
    """Without a probe: a task that pulls away, on every level the same."""
    model = linear()
    goal = {name: p.detach() + 1 for name, p in model.named_parameters()}
    ewc = penalty(1.0, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ewc.attach(optimizer, coupling)
    budget = EWCBudget(ewc, 0.1, every=5, max_lambda=20.0)
    for _ in range(600):
        optimizer.zero_grad()
        sum((p - goal[name]).square().sum() / 2 for name, p in model.named_parameters()).backward()
        optimizer.step()
        budget.step()
    assert budget.forgetting == pytest.approx(0.1, rel=0.05)


def test_other_steps_touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the probe nor a tensor: no launch, no synchronisation."""
    ewc = penalty()
    probe = Scripted(*[0.5] * 20)
    for given in (probe, None):
        budget = EWCBudget(ewc, 1.0, given, every=10)
        run(budget, 10)
        for _ in range(3):
            calls = probe.calls

            class Refuses(torch.utils._python_dispatch.TorchDispatchMode):
                def __torch_dispatch__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
                    raise AssertionError(f"{func} on a step that only counts")

            with Refuses():
                assert run(budget, 9) == [None] * 9
            assert probe.calls == calls
            assert budget.step() is not None
            assert probe.calls == calls + (given is probe)


def test_between_two_of_the_probe_s_the_prediction_is_scaled_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ewc = penalty(3.0)
    anchor, fisher = ewc.anchor["weight"].clone(), ewc.fisher["weight"].double()
    away = torch.randn_like(anchor)

    def predicted(distance: float) -> float:
        """By its formula."""
        return 0.5 * (fisher * (distance * away) ** 2).sum().item()

    probe = Scripted(0.1, 0.2, 0.3, 0.6)
    budget = EWCBudget(ewc, 1.0, probe, every=2, probe_every=3)
    said = [0.1, 0.2, None, None, 0.3, None, None, 0.6]  # at steps 1, 2, 4, 6, 8, 10, 12, 14
    asked, distance = iter(said), 0.0
    last = None
    for step in range(1, 15):
        distance += 0.1
        with torch.no_grad():
            ewc.model.weight.copy_(anchor + distance * away)
        if budget.step() is None:
            assert step % 2 and step > 1
            continue
        value = next(asked)
        if value is not None:
            last = value, predicted(distance)
        newest = budget.measurements[-1]
        assert last is not None
        assert newest.measured == (value is not None) and newest.step == step
        assert newest.forgetting == pytest.approx(last[0] * predicted(distance) / last[1], rel=1e-9)
        assert budget.forgetting == budget.logs()["ewc/measured_forgetting"] == last[0]
    assert probe.calls == 1 + 4
    with torch.no_grad():
        ewc.model.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the forgetting is NaN"):
        run(budget, 2)


@pytest.mark.parametrize(("said", "predicted"), [(math.inf, 1.0), (0.5, math.inf)])
def test_a_ratio_that_is_no_number_scales_nothing(
    said: float, predicted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Scripted(said, 0.5, 0.5)
    budget = EWCBudget(penalty(), 1.0, probe, every=1, probe_every=10)
    monkeypatch.setattr(budget, "_predicted", lambda: predicted)
    run(budget, 2)
    assert [m.measured for m in budget.measurements] == [True, True] and probe.calls == 3


def test_scaled_predictions_are_no_reason_to_give_up() -> None:
    ewc = penalty(100.0)
    with torch.no_grad():
        ewc.model.weight += 1
    budget = EWCBudget(ewc, 0.1, Scripted(3.0, 3.0), every=1, max_lambda=200.0, probe_every=10)
    run(budget, 10)  # a warning would be an error: one measurement is not four


def test_without_anything_to_scale_the_probe_is_asked() -> None:
    probe = Scripted(0.0, -0.1, 0.0, 0.5)
    ewc = penalty()
    budget = EWCBudget(ewc, 1.0, probe, every=1, probe_every=10)
    run(budget, 3)
    assert probe.calls == 4 and all(m.measured for m in budget.measurements)
    with torch.no_grad():
        ewc.model.weight += 1
    run(budget, 3)
    assert probe.calls == 5 and [m.measured for m in budget.measurements[-3:]] == [True, False, False]


# ---- saving ----


def noisy_run(steps: range, parts: dict[str, Any]) -> None:
    model, optimizer, budget = parts["model"], parts["optimizer"], parts["budget"]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.randint(2, (8,), generator=generator)).backward()
        optimizer.step()
        budget.step()


@pytest.mark.filterwarnings("ignore:the probe's standard error")
@pytest.mark.parametrize("probe_every", [1, 3, None])
@pytest.mark.parametrize("at", [0, 3, 40, 47])
def test_resumed_equals_uninterrupted(probe_every: int | None, at: int) -> None:
    old = torch.randn(32, 3, dtype=torch.float64)
    labels = torch.randint(2, (32,))
    start = {name: t.clone() for name, t in linear().state_dict().items()}

    def make() -> dict[str, Any]:
        model = linear()
        model.load_state_dict(start)
        ewc = EWCLoss(model, 10.0)
        ewc.consolidate([(old, labels)], kind="exact")
        probe = ForgettingProbe(model, old) if probe_every else None
        optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc, coupling="proximal")
        return {
            "model": model,
            "optimizer": optimizer,
            "budget": EWCBudget(ewc, 0.01, probe, every=10, probe_every=probe_every or 1),
        }

    whole, first, second = make(), make(), make()
    noisy_run(range(100), whole)
    noisy_run(range(at), first)
    saved = json.loads(json.dumps(first["budget"].state_dict()))  # plain values
    second["model"].load_state_dict(first["model"].state_dict())
    second["optimizer"].load_state_dict(first["optimizer"].state_dict())
    second["budget"].load_state_dict(saved)
    noisy_run(range(at, 100), second)
    assert second["budget"].measurements == whole["budget"].measurements
    assert len(whole["budget"].measurements) == 14  # 1, 2, 4, 8, then each 10th
    assert all(
        torch.equal(a, b) for a, b in zip(whole["model"].parameters(), second["model"].parameters(), strict=True)
    )


@pytest.mark.parametrize("bad", [{}, {"steps": 3}, 5, "more"])
def test_foreign_state(bad: Any) -> None:
    budget = EWCBudget(penalty(), 1.0, Scripted(0.5))
    if bad == "more":
        bad = {**budget.state_dict(), "extra": 1}
    before = budget.state_dict()
    with pytest.raises(ValueError, match="this is no state of an EWCBudget, which has the entries ewc_lambda"):
        budget.load_state_dict(bad)
    assert budget.state_dict() == before


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("steps", "abc"),
        ("measurements", 5),
        ("measurements", [(1, 2)]),
        ("ewc_lambda", -1.0),
        ("said", 3),
        ("error", {}),
        ("per_predicted", "much"),
    ],
)
def test_damaged_state(entry: str, value: Any) -> None:
    budget = EWCBudget(penalty(), 1.0, Scripted(0.5))
    before = budget.state_dict()
    with pytest.raises(ValueError, match="this is no state of an EWCBudget: "):
        budget.load_state_dict({**before, "ewc_lambda": 7.0, "num_tasks": 3, entry: value})
    assert budget.state_dict() == before


# ---- what is said ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_forgetting": 0.0}, ValueError, "max_forgetting must be finite and above 0, got 0.0: set what"),
        ({"max_forgetting": math.nan}, ValueError, "max_forgetting must be finite"),
        ({"max_forgetting": math.inf}, ValueError, "max_forgetting must be finite"),
        ({"max_forgetting": "much"}, TypeError, "max_forgetting must be a number, got 'much'"),
        ({"max_forgetting": "0.1"}, TypeError, "max_forgetting must be a number, got '0.1'"),
        ({"max_forgetting": True}, TypeError, "max_forgetting must be a number, got True"),
        ({"every": 0}, ValueError, "every must be a positive integer, got 0"),
        ({"every": 2.0}, ValueError, "every must be a positive integer, got 2.0"),
        ({"every": True}, ValueError, "every must be a positive integer, got True"),
        ({"probe_every": 0}, ValueError, "probe_every must be a positive integer, got 0"),
        ({"probe_every": 2, "probe": None}, ValueError, "probe_every is 2, but there is no probe: give one"),
        ({"probe": 3}, TypeError, "probe must be callable .*got int"),
        ({"max_lambda": -1.0}, ValueError, "max_lambda must be finite and above 0"),
        ({"max_lambda": 1.0}, ValueError, "ewc_lambda is 100, above max_lambda=1: lower it"),
        ({"ewc": nn.Linear(2, 2)}, TypeError, "ewc must be the EWCLoss .*got Linear"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EWCBudget(**{"ewc": penalty(), "max_forgetting": 1.0, "probe": lambda: 0.0, **options})


def test_lambda_of_zero() -> None:
    with pytest.raises(ValueError, match="ewc_lambda is 0"):
        EWCBudget(penalty(0.0), 1.0)


def test_importances_that_are_no_fisher_need_a_probe() -> None:
    ewc = EWCLoss(linear())
    later = EWCBudget(ewc, 1.0)
    ewc.consolidate(fisher=uniform_importance(ewc.model))
    with pytest.raises(ValueError, match="are no Fisher, what they predict is not in nats: give a probe"):
        EWCBudget(ewc, 1.0)
    with pytest.raises(ValueError, match="are no Fisher"):
        later.step()
    assert EWCBudget(ewc, 1.0, Scripted(0.5), every=1).step() is not None


def test_logs() -> None:
    ewc = penalty(3.0)
    with torch.no_grad():
        ewc.model.weight += 1
        ewc()
    said = ewc.logs()
    assert said == {"ewc/penalty": ewc.last_penalty, "ewc/predicted_forgetting": ewc.predicted_forgetting}
    assert said["ewc/penalty"] == 3 * said["ewc/predicted_forgetting"] > 0
    budget = EWCBudget(ewc, 1.0, Scripted(0.5), every=1)
    budget.step()
    assert budget.logs() == {**said, "ewc/lambda": ewc.ewc_lambda, "ewc/measured_forgetting": 0.5}
    assert budget.logs().keys() - EWCBudget(ewc, 1.0).logs().keys() == {"ewc/measured_forgetting"}
    ewc.consolidate(fisher=uniform_importance(ewc.model))
    assert ewc.logs().keys() == {"ewc/penalty"}  # what is no Fisher predicts nothing


def test_what_a_probe_may_say() -> None:
    with pytest.raises(ValueError, match="the forgetting is infinite to start with"):
        EWCBudget(penalty(), 1.0, Scripted(5.0, start=math.inf))
    for said in (None, torch.ones(2)):
        with pytest.raises(TypeError, match="probe must return a number or 0-dim tensor, got"):
            EWCBudget(penalty(), 1.0, lambda said=said: said)


def test_nan() -> None:
    ewc = penalty()
    budget = EWCBudget(ewc, 1.0, Scripted(math.nan), every=1)
    with pytest.raises(ValueError, match="the forgetting is NaN: the training has diverged"):
        budget.step()
    assert ewc.ewc_lambda == 100.0


def test_budget_that_cannot_be_met_is_said_once() -> None:
    ewc = penalty(100.0)
    budget = EWCBudget(ewc, 0.1, Scripted(*[3.0] * 4, 2.9, *[3.0] * 95), every=1, max_lambda=1e4)
    with pytest.warns(UserWarning) as said:
        run(budget, 100)
    assert len(said) == 1 and ewc.ewc_lambda == 1e4
    assert str(said[0].message).startswith(
        "max_forgetting=0.1 nats is not met by any lambda up to max_lambda=10000, at which the forgetting is 2.9"
    )
    assert said[0].filename == __file__
    again = EWCBudget(ewc, 0.1, Scripted(*[3.0] * 50), every=1, max_lambda=1e4)
    again.load_state_dict(budget.state_dict())
    run(again, 20)  # said before: a warning would be an error here


def test_still_falling_at_the_limit_is_no_failure() -> None:
    script = [3.0 * 0.9**i for i in range(60)]
    budget = EWCBudget(penalty(100.0), 0.1, Scripted(*script), every=1, max_lambda=200.0)
    run(budget, 60)


def test_standard_error_is_said_once() -> None:
    class Noisy(Scripted):
        standard_error = torch.tensor(0.03)

    budget = EWCBudget(penalty(), 0.1, Noisy(5.0, *[0.1] * 9), every=1)
    budget.step()  # far off: more samples would not help
    with pytest.warns(UserWarning, match="standard error is 30% of max_forgetting=0.1, .* 9 times the samples") as said:
        run(budget, 9)
    assert len(said) == 1


def test_repr() -> None:
    assert repr(EWCBudget(penalty(), 0.5)).startswith("EWCBudget(max_forgetting=0.5, by the prediction, every=25")


# ---- end to end: measured forgetting ends within 20% of a budget that binds, at rates a factor of ten apart ----


def fine_tune(
    make: Callable[[], tuple[nn.Module, EWCLoss, ForgettingProbe, Callable[[nn.Module], Tensor]]],
    lr: float,
    max_forgetting: float | None,
    steps: int,
) -> tuple[float, EWCBudget | None]:
    """The rate falls to 0 as a cosine. Returns what the probe says at the end."""
    model, ewc, probe, loss = make()
    optimizer = EWCAdamW(model.parameters(), lr=lr, weight_decay=0.0, ewc=ewc, coupling="proximal")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    budget = None if max_forgetting is None else EWCBudget(ewc, max_forgetting, probe)
    if budget is None:
        ewc.ewc_lambda = 1e-12
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        schedule.step()
        if budget is not None:
            budget.step()
    return float(probe()), budget


def digits_tasks(seed: int) -> Callable[[], tuple[nn.Module, EWCLoss, ForgettingProbe, Callable[[nn.Module], Tensor]]]:
    """Two permutations of the digits, of which a network has learnt the first."""
    from ewc_fast.demo.data import permuted_digits
    from ewc_fast.demo.experiment import make_model, shuffled_batches

    old, new = permuted_digits(2, seed)
    learnt = make_model(seed)
    optimizer = torch.optim.Adam(learnt.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(4):
        for x, y in shuffled_batches(old, order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(learnt(x), y).backward()
            optimizer.step()

    def make() -> Any:
        model = make_model(seed)
        model.load_state_dict(learnt.state_dict())
        ewc = EWCLoss(model, damping=0.1)
        ewc.consolidate([(old.train_inputs, old.train_labels)], kind="exact")
        shuffled = torch.Generator().manual_seed(seed)
        batches = itertools.chain.from_iterable(shuffled_batches(new, shuffled) for _ in itertools.count())

        def loss(model: nn.Module) -> Tensor:
            x, y = next(batches)
            return nn.functional.cross_entropy(model(x), y)

        return model, ewc, ForgettingProbe(model, old.train_inputs, batch_size=1400), loss

    return make


def test_digits_end_at_the_budget(seed: int) -> None:
    """The median of three pairs of tasks: batches of 32 at a high rate are noisy up to the last looks."""
    pytest.importorskip("sklearn")
    assert_end_at_the_budget([digits_tasks(seed + k) for k in range(3)], 0.1, (5e-4, 5e-3), 1000)


def test_language_model_ends_at_the_budget(seed: int) -> None:
    """A Llama that has learnt one Markov chain learns another."""
    transformers = pytest.importorskip("transformers")
    vocabulary, length = 16, 16

    def draw(chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(vocabulary, (count, 1), generator=generator)
        while tokens.shape[1] < length:
            following = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, following], 1)
        return tokens

    generator = torch.Generator().manual_seed(seed)
    old, new = (2 * torch.randn(2, vocabulary, vocabulary, generator=generator)).softmax(-1)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    learnt = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(learnt.parameters(), lr=1e-2)
    for _ in range(150):
        tokens = draw(old, 32, generator)
        optimizer.zero_grad()
        value = learnt(tokens, labels=tokens).loss
        value.backward()
        optimizer.step()
    assert value < 0.85 * math.log(vocabulary)  # has learnt something
    own = sample_sequences(learnt, 256, length, generator=generator)

    def make() -> Any:
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(learnt.state_dict())
        ewc = EWCLoss(model, damping=0.1)
        ewc.consolidate(list(own.split(64)), kind="empirical", loss="causal_lm")
        order = torch.Generator().manual_seed(seed)

        def loss(model: nn.Module) -> Tensor:
            tokens = draw(new, 16, order)
            return model(tokens, labels=tokens).loss

        return model, ewc, ForgettingProbe(model, own, batch_size=256), loss

    assert_end_at_the_budget([make], 0.1, (1e-3, 1e-2), 500)


def assert_end_at_the_budget(makes: list[Any], max_forgetting: float, rates: tuple[float, float], steps: int) -> None:
    for make in makes:
        unbound, _ = fine_tune(make, rates[0], None, steps)
        assert unbound > 3 * max_forgetting  # it binds
    for lr in rates:
        ends, looks = [], []
        for make in makes:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                measured, budget = fine_tune(make, lr, max_forgetting, steps)
            assert budget is not None
            ends.append(measured / max_forgetting)
            looks.append(
                " ".join(f"{m.forgetting / max_forgetting:.2f}@{m.ewc_lambda:.1e}" for m in budget.measurements)
            )
        print(f"lr {lr:g}: {ends} of the budget; {looks}")
        assert statistics.median(ends) == pytest.approx(1.0, rel=0.2), looks
        assert all(end == pytest.approx(1.0, rel=0.5) for end in ends), looks
