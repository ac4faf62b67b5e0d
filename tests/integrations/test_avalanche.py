"""The plugin beside Avalanche's own, on the same experiences."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

pytest.importorskip("avalanche")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies', as they are imported
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, as_classification_dataset
    from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
    from avalanche.training import Naive
    from avalanche.training.plugins import EWCPlugin, SupervisedPlugin

    from ewc_fast.integrations.avalanche import EWCFastPlugin

from ewc_fast import EWCLoss, estimate_fisher  # noqa: E402

pytestmark = [
    # Avalanche's own growing of what it has saved, and its logging, which is off here.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning"),
]

LAMBDA = 20.0


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Avalanche makes new rows in the default dtype; in fp64 roundings stay far below the tolerances."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Growing(nn.Module):
    """A head that gets rows as classes come."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = IncrementalClassifier(8, initial_out_features=2, masking=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Heads(MultiTaskModule):
    """A head for each task, which appears with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = MultiHeadClassifier(8, initial_out_features=6, masking=False)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads(torch.tanh(self.body(x)), task_labels)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fixed": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
    "growing": Growing,
    "heads": Heads,
}


def experiences(count: int = 3) -> Any:
    """Two new classes in each, and a last batch that is smaller."""

    def dataset(task: int) -> Any:
        x, y = torch.randn(22, 6), torch.arange(22) % 2 + 2 * task
        x += y[:, None] / 3
        return as_classification_dataset(
            AvalancheDataset(
                [TensorDataset(x, y)],
                data_attributes=[
                    DataAttribute(y.tolist(), "targets"),
                    DataAttribute([task] * 22, "targets_task_labels", use_in_getitem=True),
                ],
            )
        )

    tasks = [dataset(task) for task in range(count)]
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(train=tasks, test=tasks)))


def naive(model: nn.Module, plugin: Any, make: Any = None) -> Naive:
    optimizer = (make or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)))(model.parameters())
    return Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=2,
        plugins=[plugin],
        evaluator=None,
    )


def run(model: nn.Module, plugin: Any, stream: Any, make: Any = None, seed: int = 1) -> list[Tensor]:
    """Trains on one experience after the other; returns the weights after each, in one vector."""
    torch.manual_seed(seed)
    strategy = naive(model, plugin, make)
    weights = []
    for experience in stream:
        strategy.train(experience)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return weights


MODES: dict[str, dict[str, Any]] = {
    "separate": {},
    "online": {"mode": "online", "decay_factor": 0.7},
    "online, kept": {"mode": "online", "decay_factor": 0.7, "keep_importance_data": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_arguments_lead_to_the_same_weights(name: str, mode: str) -> None:
    first = MODELS[name]()
    stream = experiences().train_stream
    theirs = EWCPlugin(LAMBDA, **MODES[mode])
    ours = EWCFastPlugin(LAMBDA, **MODES[mode])
    expected = run(copy.deepcopy(first), theirs, stream)
    found = run(copy.deepcopy(first), ours, stream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    without = run(copy.deepcopy(first), EWCFastPlugin(0.0), stream)
    assert (without[-1] - expected[-1]).abs().max() > 1e-3  # it matters


@pytest.mark.parametrize("mode", MODES)
def test_the_penalty_is_theirs(mode: str) -> None:
    model = MODELS["growing"]()
    stream = experiences().train_stream
    plugin, theirs = EWCFastPlugin(LAMBDA, **MODES[mode]), EWCPlugin(LAMBDA, **MODES[mode])
    run(copy.deepcopy(model), theirs, stream)
    run(model, plugin, stream)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)

    class Strategy:
        loss, device = torch.zeros(()), "cpu"

        class clock:
            train_exp_counter = 3

    Strategy.model = model  # type: ignore[attr-defined]
    theirs.before_backward(Strategy)
    assert plugin.ewc is not None
    with torch.no_grad():
        assert plugin.ewc().item() == pytest.approx(Strategy.loss.item(), rel=1e-5)  # theirs is fp32
    assert plugin.ewc.num_tasks == 3
    assert plugin.ewc.logs().keys() == {"ewc/penalty"}  # squares of batch means are no Fisher


def test_rows_of_new_classes_are_free() -> None:
    model = MODELS["growing"]()
    plugin = EWCFastPlugin(1e4)
    stream = experiences(2).train_stream
    run(model, plugin, [stream[0]])
    assert plugin.ewc is not None
    assert plugin.ewc.anchor["head.classifier.weight"].shape[0] == 2
    old = model.head.classifier.weight.detach().clone()
    strategy_weights = run(model, plugin, [stream[1]], lambda params: torch.optim.SGD(params, lr=1e-4))
    new = model.head.classifier.weight
    assert new.shape[0] == 4 and len(strategy_weights) == 1
    torch.testing.assert_close(plugin.ewc.anchor["head.classifier.weight"][2:], new.detach()[2:])
    assert (new.detach()[:2] - old).abs().max() < 0.01


def test_kind_takes_the_fisher() -> None:
    model = MODELS["heads"]()
    stream = experiences(2).train_stream
    plugin = EWCFastPlugin(LAMBDA, kind="exact")
    run(model, plugin, [stream[0]])
    x, y = (torch.stack([torch.as_tensor(row[i]) for row in stream[0].dataset]) for i in (0, 1))
    expected = estimate_fisher(model, [((x, torch.zeros(22, dtype=torch.int64)), y)], "exact")
    assert plugin.ewc is not None and plugin.ewc.info is not None and plugin.ewc.info["is_fisher"]
    for name in expected:
        torch.testing.assert_close(plugin.ewc.fisher[name], expected[name], rtol=1e-6, atol=1e-12)


def test_proximal_stays_where_coupled_diverges() -> None:
    first = MODELS["fixed"]()
    stream = experiences(2).train_stream
    ends = {}
    for coupling in ("coupled", "proximal"):
        ends[coupling] = run(copy.deepcopy(first), EWCFastPlugin(1e7, coupling=coupling), stream)
    assert ends["proximal"][-1].abs().max() < 10
    assert not ends["coupled"][-1].abs().max() < 1e3


def test_kept_data_is_what_theirs_keeps() -> None:
    first = MODELS["growing"]()
    stream = experiences().train_stream
    for arguments in ({"keep_importance_data": True}, MODES["online, kept"]):
        theirs, ours = EWCPlugin(LAMBDA, **arguments), EWCFastPlugin(LAMBDA, **arguments)
        run(copy.deepcopy(first), theirs, stream)
        run(copy.deepcopy(first), ours, stream)
        for attribute in ("importances", "saved_params"):
            mine, kept = getattr(ours, attribute), getattr(theirs, attribute)
            assert mine.keys() == kept.keys()
            for count in kept:
                for name in kept[count]:
                    expected = kept[count][name].data  # theirs has grown with the head where it was read
                    found = mine[count][name].expand(expected.shape)
                    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    lean = EWCFastPlugin(LAMBDA)
    run(copy.deepcopy(first), lean, stream)
    assert not lean.importances and not lean.saved_params


def test_a_new_optimizer_takes_over() -> None:
    model = MODELS["fixed"]()
    stream = experiences(2).train_stream
    plugin = EWCFastPlugin(LAMBDA)
    run(model, plugin, [stream[0]])
    plain, before = copy.deepcopy(model), plugin.ewc
    assert before is not None
    ewc = EWCLoss(plain, 2 * LAMBDA)
    ewc.load_state_dict(before.state_dict())

    def attached(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        ewc.attach(optimizer)
        return optimizer

    run(model, plugin, [stream[1]], seed=2)
    run(plain, SupervisedPlugin(), [stream[1]], attached, seed=2)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_a_pickled_strategy_goes_on_as_an_uninterrupted_one() -> None:
    """As in Avalanche's checkpoints, which pickle model, optimizer and plugins together; a step's hooks get lost."""
    first = MODELS["fixed"]()
    stream = experiences(2).train_stream
    whole = naive(copy.deepcopy(first), EWCFastPlugin(LAMBDA))
    for experience in stream:
        torch.manual_seed(3)
        whole.train(experience)

    half = naive(first, EWCFastPlugin(LAMBDA))
    torch.manual_seed(3)
    half.train(stream[0])
    model, plugin, optimizer = pickle.loads(pickle.dumps((half.model, half.plugins[0], half.optimizer)))
    resumed = naive(model, plugin, lambda _: optimizer)
    resumed.optimized_param_id = dict(model.named_parameters())  # or Avalanche resets the momentum
    torch.manual_seed(3)
    resumed.train(stream[1])
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "latest"}, "mode must be"),
        ({"mode": "online"}, "decay_factor must be given"),
        ({"decay_factor": 0.5}, "decay_factor must be given"),
        ({"mode": "online", "decay_factor": 1.5}, "gamma"),
        ({"num_samples": 3}, "num_samples: only with kind="),
        ({"coupling": "loose"}, "coupling must be one of"),
        ({"ewc_lambda": -1.0}, "ewc_lambda.*-1.0"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWCFastPlugin(**{"ewc_lambda": 1.0, **arguments})


def test_another_model_is_refused() -> None:
    plugin = EWCFastPlugin(LAMBDA)
    stream = experiences(1).train_stream
    run(MODELS["fixed"](), plugin, stream)
    with pytest.raises(ValueError, match="take a new EWCFastPlugin"):
        run(MODELS["fixed"](), plugin, stream)
