"""Pictures show what the results say."""

from __future__ import annotations

import copy

import pytest

pictures = pytest.importorskip("ewc_fast.bench.pictures", reason="matplotlib is not installed")


def test_time_by_peer(results):
    workload = results["workloads"][0]
    figure = pictures.time_by_peer(workload, "a caption")
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    shown = sorted((p for p in workload["peers"] if p["group"] != "ewc_fast ops"), key=lambda p: p["median_ms"])
    assert names == [peer["name"] for peer in shown]
    widths = [bar.get_width() for bar in axis.containers[1]]
    assert widths == [peer["median_ms"] for peer in shown]
    assert axis.yaxis_inverted()
    assert figure.get_supxlabel() == "a caption"
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"plain PyTorch", "ewc_fast", "limit"}


def test_time_by_peer_without_ratios(results):
    workload = copy.deepcopy(results["workloads"][0])
    for peer in workload["peers"]:
        peer["ratio"] = None
    assert all("x)" not in text.get_text() for text in pictures.time_by_peer(workload).axes[0].texts)


def test_roofline(results):
    small, large = results["workloads"]
    (axis,) = pictures.roofline([large, small]).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert set(lines) == {"level 2", "level 1", "copy_, as measured"}
    speeds = [next(p["gb_per_s"] for p in w["peers"] if p["name"] == "level2") for w in (small, large)]
    assert list(lines["level 2"].get_xdata()) == [70, 600_011]
    assert list(lines["level 2"].get_ydata()) == speeds
    assert axis.get_xscale() == "log" and axis.get_ylim()[0] == 0


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.12"), (12.34, "12.3"), (123.4, "123")])
def test_three_digits(value, text):
    assert pictures._three_digits(value) == text
