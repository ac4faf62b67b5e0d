"""The pictures hold the data that they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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


def _line_of(axis: object, label: str) -> int:
    return [line.get_label() for line in axis.lines].index(label)  # type: ignore[attr-defined]
