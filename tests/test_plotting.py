"""The pictures hold the data that they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from ewc_fast import plotting  # noqa: E402


def _rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def _save(figure: object, folder: Path) -> bytes:
    path = folder / "figure.png"
    figure.savefig(path)  # type: ignore[attr-defined]
    return path.read_bytes()


def test_accuracy_over_time(tmp_path: Path) -> None:
    values = _rng().random((2, 1 + 3 * 4, 3))
    figure = plotting.accuracy_over_time({"one": values, "other": values / 2}, 4, "a caption")
    first, second = figure.axes
    for task in range(3):
        epochs, drawn = first.lines[_line_of(first, f"task {task + 1}")].get_data()
        np.testing.assert_array_equal(epochs, np.arange(4 * task, 13))
        np.testing.assert_allclose(drawn, values.mean(0)[4 * task :, task])
    assert first.get_title() == f"one: {values.mean(0)[-1].mean():.2f} at the end"
    assert second.get_title().startswith("other")
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


def test_accuracy_over_time_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"accuracy\['one'\] must have shape \(seeds, 1 \+ tasks \* 4, tasks\)"):
        plotting.accuracy_over_time({"one": np.zeros((2, 12, 3))}, 4)


def test_accuracy_over_lambda(tmp_path: Path) -> None:
    figure = plotting.accuracy_over_lambda({"ewc": ([100.0, 1.0, 10.0], [0.3, 0.1, 0.2])}, {"plain": 0.05})
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    lambdas, accuracies = axis.lines[_line_of(axis, "ewc")].get_data()
    assert list(lambdas) == [1.0, 10.0, 100.0] and list(accuracies) == [0.1, 0.2, 0.3]
    assert set(axis.lines[_line_of(axis, "plain")].get_ydata()) == {0.05}
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


def test_predicted_against_true_leaves_out_what_log_axes_cannot_show(tmp_path: Path) -> None:
    predicted, true = [[0.1, 0.2], [0.0, 0.4]], [[1.0, -2.0], [3.0, 4.0]]
    figure = plotting.predicted_against_true({"ewc": (predicted, true)}, "a long caption " * 20)
    axis = figure.axes[0]
    assert axis.get_xscale() == axis.get_yscale() == "log"
    np.testing.assert_allclose(axis.collections[0].get_offsets(), [[0.1, 1.0], [0.4, 4.0]])
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


def test_predicted_against_true_with_nothing_to_show(tmp_path: Path) -> None:
    figure = plotting.predicted_against_true({"ewc": ([0.0], [1.0])})
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


def test_plot_fisher(tmp_path: Path) -> None:
    rng = _rng()
    fisher = {
        "body.0.weight": torch.from_numpy(rng.random((5, 7)) ** 4).to(torch.bfloat16),
        "body.0.bias": torch.from_numpy(rng.random(5)),
        "scale": torch.from_numpy(rng.random(3)).float().requires_grad_(),
    }
    fisher["body.0.weight"][0] = 0
    figure = plotting.plot_fisher(fisher, "a caption")
    masses, histogram = figure.axes
    body = fisher["body.0.weight"].double().sum() + fisher["body.0.bias"].sum()
    scale = fisher["scale"].detach().double().sum()
    assert [label.get_text() for label in masses.get_yticklabels()] == ["body.0", "scale"]
    trace = body + scale
    np.testing.assert_allclose([bar.get_width() for bar in masses.patches], [body / trace, scale / trace])
    assert masses.get_title() == f"trace {trace:.3g} over 43 entries"
    assert histogram.get_title() == "7 entries are 0 (16.3%)"
    counts, edges, _ = histogram.patches[0].get_data()
    entries = torch.cat([t.detach().double().flatten() for t in fisher.values()]).numpy()
    assert counts.sum() == 36
    middle = edges[30]
    assert counts[:30].sum() == (np.log10(entries[entries > 0]) < middle).sum()
    np.testing.assert_allclose([edges[0], edges[-1]], np.log10([entries[entries > 0].min(), entries.max()]), atol=1e-6)
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


def test_plot_fisher_sums_up_the_small_layers() -> None:
    shares = _rng().permutation(np.arange(1.0, 11.0))
    figure = plotting.plot_fisher({f"layer{i}.weight": torch.tensor([v]) for i, v in enumerate(shares)}, max_layers=3)
    axis = figure.axes[0]
    kept = [f"layer{i}" for i, v in enumerate(shares) if v > 7]
    assert [label.get_text() for label in axis.get_yticklabels()] == [*kept, "7 others"]
    np.testing.assert_allclose(axis.patches[-1].get_width(), 28 / 55)


def test_plot_fisher_of_zeros(tmp_path: Path) -> None:
    figure = plotting.plot_fisher({"w": torch.zeros(4)})
    assert figure.axes[1].get_title() == "4 entries are 0 (100.0%)"
    assert _save(figure, tmp_path).startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_plot_fisher_refuses_what_is_no_fisher(value: float) -> None:
    with pytest.raises(ValueError, match=r"fisher\['w'\] has entries that are negative or not finite"):
        plotting.plot_fisher({"v": torch.ones(2), "w": torch.tensor([1.0, value])})


def test_plot_fisher_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="fisher has no entries"):
        plotting.plot_fisher({})
    with pytest.raises(ValueError, match="max_layers must be at least 1, got 0"):
        plotting.plot_fisher({"w": torch.ones(1)}, max_layers=0)


def _line_of(axis: object, label: str) -> int:
    return [line.get_label() for line in axis.lines].index(label)  # type: ignore[attr-defined]
