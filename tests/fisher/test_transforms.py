"""average, normalize, clip and damp against numpy in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ewc_fast import FisherDiagonal, FisherInfo, estimate_fisher
from ewc_fast.fisher.transforms import average, clip, damp, normalize

SHAPES = {"scale": (3,), "first.weight": (4, 5), "first.bias": (4,), "empty.weight": (0, 2), "last.weight": (2, 2, 2)}
LAYERS = [["scale"], ["first.weight", "first.bias"], ["last.weight"]]
INFO = FisherInfo("sampled", "cross_entropy", "sample", num_samples=40, num_terms=40, batch_size=8, method="hooks")


def random_fisher(dtype: torch.dtype = torch.float32, info: FisherInfo | None = INFO) -> FisherDiagonal:
    """Entries over six orders of magnitude."""
    tensors = {name: (10 ** torch.empty(shape).uniform_(-5, 1)).to(dtype) for name, shape in SHAPES.items()}
    return FisherDiagonal(tensors, info)


def arrays(fisher: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in fisher.items()}


def expected_of(fisher: Mapping[str, Tensor], by_layer: bool, change: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """``change(values of a tensor, all values of its layer or model)``."""
    found = arrays(fisher)
    for names in LAYERS if by_layer else [list(SHAPES)]:
        pool = np.concatenate([found[name].ravel() for name in names])
        found |= {name: change(found[name], pool) for name in names}
    return found


def assert_equal(found: FisherDiagonal, expected: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    assert list(found) == list(SHAPES)
    for name, tensor in found.items():
        assert tensor.dtype == dtype and tensor.shape == SHAPES[name]
        # one rounding to the dtype
        np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def fisher(request: pytest.FixtureRequest) -> Any:
    fisher = random_fisher(request.param)
    before = {name: tensor.clone() for name, tensor in fisher.items()}
    yield fisher
    assert all(torch.equal(fisher[name], before[name]) for name in SHAPES), "the input was changed"


# ---- average ----


def test_average_is_the_weighted_mean() -> None:
    fishers = [random_fisher(torch.float32), random_fisher(torch.float64), random_fisher(torch.bfloat16)]
    for weights in ([1, 1, 1], [0.5, 0, 3.5], [1e-9, 2e-9, 3e-9]):
        found = average(fishers, weights)
        expected = {
            name: np.average([arrays(fisher)[name] for fisher in fishers], axis=0, weights=weights) for name in SHAPES
        }
        for name in SHAPES:
            assert found[name].dtype == torch.float64
            np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-14)


def test_average_of_narrow_diagonals_is_fp32_and_keeps_small_entries() -> None:
    found = average([random_fisher(torch.bfloat16), random_fisher(torch.bfloat16)])
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_average_weighs_by_terms_where_all_are_known() -> None:
    few, many = random_fisher(info=replace(INFO, num_terms=10)), random_fisher(info=replace(INFO, num_terms=30))
    found = average(iter([few, many]))
    assert_equal(found, {n: (arrays(few)[n] + 3 * arrays(many)[n]) / 4 for n in SHAPES})
    assert found.info == replace(INFO, num_samples=80, num_terms=40, method="hooks+average")
    for unknown in (random_fisher(info=None), random_fisher(info=replace(INFO, num_terms=0)), dict(random_fisher())):
        found = average([few, unknown])
        assert_equal(found, {n: (arrays(few)[n] + arrays(unknown)[n]) / 2 for n in SHAPES})


def test_average_of_parts_is_the_estimate_on_all() -> None:
    model = nn.Linear(3, 4)
    data = [(torch.randn(n, 3), torch.randint(4, (n,))) for n in (5, 3, 9)]
    parts = [estimate_fisher(model, [batch], kind="empirical") for batch in data]
    whole = estimate_fisher(model, data, kind="empirical")
    found = average(parts)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=0)
    assert found.info is not None and found.info.num_terms == 17 and found.info.batch_size == 9


def test_average_joins_infos() -> None:
    other = replace(INFO, kind="empirical", loss="gaussian", method="vmap", batch_size=99, is_fisher=False)
    info = average([random_fisher(), random_fisher(info=other), random_fisher()]).info
    assert info == FisherInfo(
        "sampled+empirical", "cross_entropy+gaussian", "sample", 120, 120, 99, "hooks+vmap+average", is_fisher=False
    )
    assert average([random_fisher(), random_fisher(info=None)]).info is None


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [1, math.inf], [math.nan, 1]])
def test_average_refuses_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        average([random_fisher(), random_fisher()], weights)


def test_average_refuses_what_does_not_fit() -> None:
    fisher = random_fisher()
    with pytest.raises(ValueError, match="fishers is empty"):
        average([])
    with pytest.raises(TypeError, match=r"fishers\[0\] must be a mapping"):
        average(fisher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fishers\[1\] and fishers\[0\] differ in extra"):
        average([fisher, {**fisher, "extra": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"fishers\[1\] and fishers\[0\] differ in scale"):
        average([fisher, {name: tensor for name, tensor in fisher.items() if name != "scale"}])
    with pytest.raises(ValueError, match=r"scale has shape \(4,\) in fishers\[1\] and \(3,\)"):
        average([fisher, {**fisher, "scale": torch.ones(4)}])
    with pytest.raises(ValueError, match="units sample, token.*normalize"):
        average([fisher, random_fisher(info=replace(INFO, unit="token"))])


# ---- normalize ----


SIZES: dict[str, Callable[[Any], Any]] = {"unit_trace": np.sum, "unit_mean": np.mean, "unit_max": np.max}


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("to", SIZES)
def test_normalize(fisher: FisherDiagonal, to: str, by_layer: bool) -> None:
    found = normalize(fisher, to, by_layer)
    expected = expected_of(fisher, by_layer, lambda tensor, pool: tensor / SIZES[to](pool))
    assert_equal(found, expected, fisher["scale"].dtype)
    method = f"hooks+normalize({to})" + by_layer * "(by layer)"
    assert found.info == replace(INFO, method=method, unit="none", is_fisher=False)
    assert normalize(dict(fisher), to).info is None


def test_normalize_is_unit_trace_by_default_and_copes_with_tiny_values() -> None:
    found = normalize(random_fisher())
    assert sum(tensor.double().sum() for tensor in found.values()) == pytest.approx(1, rel=1e-6)
    tiny = normalize({"w": torch.tensor([1e-42, 3e-42])}, "unit_max")["w"]
    torch.testing.assert_close(tiny, torch.tensor([1 / 3, 1.0]), rtol=1e-2, atol=0)


def test_normalize_layers_and_models_of_zeros() -> None:
    fisher = {**random_fisher(), "first.weight": torch.zeros(4, 5), "first.bias": torch.zeros(4)}
    found = normalize(fisher, by_layer=True)
    assert not found["first.weight"].any() and not found["first.bias"].any()
    assert found["scale"].sum() == pytest.approx(1, rel=1e-6)
    with pytest.raises(ValueError, match="zero everywhere"):
        normalize({"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="'unit_trace', 'unit_mean', 'unit_max'"):
        normalize(fisher, "trace")


# ---- clip ----


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("quantile", [0, 0.03, 0.5, 0.9, 0.999, 1])
def test_clip_at_a_quantile(fisher: FisherDiagonal, quantile: float, by_layer: bool) -> None:
    found = clip(fisher, quantile=quantile, by_layer=by_layer)
    assert_equal(
        found,
        expected_of(fisher, by_layer, lambda tensor, pool: np.minimum(tensor, np.quantile(pool, quantile))),
        fisher["scale"].dtype,
    )
    assert found.info == replace(INFO, method="hooks+clip" + by_layer * "(by layer)")


@pytest.mark.parametrize("bound", [0, 0.01, 1e9])
def test_clip_at_a_value(fisher: FisherDiagonal, bound: float) -> None:
    found = clip(fisher, max_value=bound)
    assert_equal(found, {n: np.minimum(t, bound) for n, t in arrays(fisher).items()}, fisher["scale"].dtype)


def test_quantile_of_more_entries_than_torch_quantile_takes() -> None:
    values = torch.rand(2**24 + 5)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    found = clip({"w": values}, quantile=0.37)["w"]
    assert found.max().item() == pytest.approx(np.quantile(values.numpy().astype(np.float64), 0.37), rel=1e-7)


@pytest.mark.parametrize("options", [{}, {"quantile": 0.5, "max_value": 1.0}])
def test_clip_takes_exactly_one_option(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of quantile, max_value"):
        clip(random_fisher(), **options)  # type: ignore[arg-type]


# ---- damp ----


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    ("options", "delta"),
    [
        ({"mean": 0.3}, lambda pool: 0.3 * pool.mean()),
        ({"quantile": 0.25}, lambda pool: np.quantile(pool, 0.25)),
        ({"quantile": 0}, lambda pool: pool.min()),
        ({"value": 0.125}, lambda pool: 0.125),
        ({"value": 0}, lambda pool: 0.0),
    ],
)
def test_damp(fisher: FisherDiagonal, options: dict[str, float], delta: Callable[[Any], float], by_layer: bool) -> None:
    found = damp(fisher, **options, by_layer=by_layer)  # type: ignore[arg-type]
    # Two roundings: of the constant and of the sum.
    expected = expected_of(fisher, by_layer, lambda tensor, pool: tensor + delta(pool))
    for name in SHAPES:
        assert found[name].dtype == fisher[name].dtype
        rtol = 2 * torch.finfo(found[name].dtype).eps
        np.testing.assert_allclose(found[name].double().numpy(), expected[name], rtol=rtol, atol=0)
    assert found.info == replace(INFO, method="hooks+damp" + by_layer * "(by layer)", is_fisher=False)


@pytest.mark.parametrize("options", [{}, {"mean": 1.0, "value": 1.0}, {"quantile": 0.5, "mean": 1.0}])
def test_damp_takes_exactly_one_option(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of mean, quantile, value"):
        damp(random_fisher(), **options)  # type: ignore[arg-type]


# ---- all of them ----


def copies(fisher: Any) -> list[FisherDiagonal]:
    return [
        average([fisher]),
        normalize(fisher),
        normalize(fisher, by_layer=True),
        clip(fisher, quantile=1),
        clip(fisher, max_value=1e9),
        damp(fisher, value=0),
    ]


def test_results_share_no_memory_with_the_input_and_have_no_graph() -> None:
    fisher = {name: tensor.requires_grad_() for name, tensor in random_fisher().items()}
    for found in copies(fisher):
        for name, tensor in found.items():
            assert not tensor.requires_grad
            if tensor.numel():
                assert tensor.data_ptr() != fisher[name].data_ptr()


@pytest.mark.parametrize("value", [-1e-20, math.nan, math.inf])
def test_malformed_entries_are_named(value: float) -> None:
    fisher = dict(random_fisher())
    fisher["first.bias"][1] = value
    calls: list[Callable[[], object]] = [
        lambda: average([fisher]),
        lambda: normalize(fisher),
        lambda: clip(fisher, quantile=0.5),
        lambda: damp(fisher, mean=0.5),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="first.bias has a negative, NaN or infinite entry"):
            call()


def test_what_is_no_diagonal_is_refused() -> None:
    for wrong in ({}, {"w": torch.ones(0)}):
        with pytest.raises(ValueError, match="no entries"):
            normalize(wrong)
    with pytest.raises(TypeError, match="mapping"):
        clip(torch.ones(3), quantile=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [-0.1, 1.1, math.nan, math.inf])
def test_numbers_out_of_range(number: float) -> None:
    fisher = random_fisher()
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\]"):
        clip(fisher, quantile=number)
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\]"):
        damp(fisher, quantile=number)
    if number != 1.1:
        for call in (
            lambda: clip(fisher, max_value=number),
            lambda: damp(fisher, mean=number),
            lambda: damp(fisher, value=number),
        ):
            with pytest.raises(ValueError, match="finite"):
                call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("change", [normalize, lambda f: clip(f, quantile=0.5), lambda f: damp(f, mean=0.1)])
def test_dtypes_that_no_fisher_is_kept_in_become_fp32(change: Callable[[Any], Any], dtype: torch.dtype) -> None:
    given = {name: tensor.round().clamp(min=1).to(dtype) for name, tensor in random_fisher().items()}
    found, wanted = change(given), change({name: tensor.float() for name, tensor in given.items()})
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name]), name
