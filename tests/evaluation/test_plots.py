# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy.special import expit, logit

from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation import plot_over_epochs
from hf_robust.evaluation.metrics import expected_calibration_error
from hf_robust.evaluation.plots import plot_id_ood, plot_reliability

ZERO_SHOT = {"alpha": 0, "id": 0.6, "ood": 0.4}
POINTS = {
    "full": [{"alpha": 1, "id": 0.8, "ood": 0.3}, ZERO_SHOT, {"alpha": 0.5, "id": 0.75, "ood": 0.45}],
    "SAFT $x$": [ZERO_SHOT, {"alpha": 1.0, "id": 0.7, "ood": 0.5}],
    "CoOp": [{"alpha": 1, "id": 0.65, "ood": 0.42}],
}
CONFIDENCES, CORRECT = [0.1, 0.55, 0.65, 0.8, 0.9, 1.0], [False, True, False, True, True, True]
RUNS = {"CoOp": [[0.6, 0.5, 0.4], [0.6, 0.7, 0.6]], "SAFT": [[0.6, 0.55, 0.65]]}


@pytest.fixture
def axes():
    return Figure().subplots()


def test_lines_are_means_over_seeds_in_percent(axes):
    assert plot_over_epochs(RUNS, axes) is axes
    coop, saft = axes.get_lines()
    np.testing.assert_allclose(coop.get_xydata(), [[0, 60], [1, 60], [2, 50]])
    np.testing.assert_allclose(saft.get_xydata(), [[0, 60], [1, 55], [2, 65]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CoOp", "SAFT"]
    assert axes.get_ylabel() == "accuracy on new classes (%)" and axes.get_title() == ""


def test_bands_are_one_standard_deviation_over_seeds(axes):
    plot_over_epochs(RUNS, axes)
    (band,) = axes.collections  # none for the single seed of SAFT
    outline = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    deviation = round(10 * 2**0.5, 6)  # of 50 and 70, of 40 and 60
    expected = {(0, 60), (1, 60 - deviation), (1, 60 + deviation), (2, 50 - deviation), (2, 50 + deviation)}
    assert outline == expected
    line = axes.get_lines()[0]
    assert matplotlib.colors.same_color(band.get_facecolor()[0][:3], line.get_color())


@pytest.mark.parametrize("epochs", [1, 2, 5, 50])
def test_epochs_on_the_axis_are_integers(axes, epochs):
    plot_over_epochs({"CoOp": [[0.5] * (epochs + 1)]}, axes, ylabel="accuracy (%)")
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert len(shown) >= 2 and all(tick == int(tick) for tick in shown)
    assert axes.get_ylabel() == "accuracy (%)"


DRAWN = [
    (plot_over_epochs, (RUNS,)),
    (plot_id_ood, (POINTS,)),
    (plot_reliability, (CONFIDENCES, CORRECT)),
]


@pytest.mark.parametrize(("plot", "arguments"), DRAWN)
def test_without_axes_there_is_a_new_figure_and_nothing_is_shown(plot, arguments, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *args, **kwargs: pytest.fail("shown"))
    pyplot.switch_backend("agg")
    style = dict(matplotlib.rcParams)
    before = pyplot.get_fignums()
    axes = plot(*arguments)
    try:
        assert len(pyplot.get_fignums()) == len(before) + 1 and axes.figure.number not in before
        assert dict(matplotlib.rcParams) == style
    finally:
        pyplot.close(axes.figure)


@pytest.mark.parametrize(("plot", "arguments"), DRAWN)
def test_it_can_be_written_to_a_file(plot, arguments, axes, tmp_path):
    assert plot(*arguments, ax=axes) is axes
    axes.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "no runs"),
        ({"CoOp": []}, "differ in their number of epochs.*CoOp"),
        ({"CoOp": [[]]}, "differ in their number of epochs.*CoOp"),
        (
            {"SAFT": [[0.5]], "CoOp": [[0.5, 0.6], [0.5]]},
            r"differ in their number of epochs \(at CoOp\): got \[1, 2\]",
        ),
    ],
)
def test_ragged_runs_are_refused(axes, runs, message):
    with pytest.raises(DataError, match=message):
        plot_over_epochs(runs, axes)
    assert not axes.get_lines()


# --- ID against OOD ---


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def diamonds(axes):
    """The fine-tuned models by colour, the one in the legend aside."""
    found = [line for line in axes.get_lines() if line.get_marker() == "D" and len(line.get_xydata())]
    return {line.get_color(): line.get_xydata().tolist() for line in found if line.get_xydata().size}


def texts(ticks):
    return [label.get_text() for label in ticks]


def test_curves_go_from_zero_shot_to_fine_tuned_as_fractions_on_logit_axes(axes):
    plot_id_ood(POINTS, axes)
    assert axes.get_xscale() == axes.get_yscale() == "logit"
    full, saft, coop = (line(axes, name) for name in ("full", r"SAFT \$x\$", "CoOp"))
    np.testing.assert_allclose(full.get_xydata(), [[0.6, 0.4], [0.75, 0.45], [0.8, 0.3]])
    np.testing.assert_allclose(saft.get_xydata(), [[0.6, 0.4], [0.7, 0.5]])
    assert full.get_linestyle() == "-" and full.get_marker() == "o"
    expected = {full.get_color(): [[0.8, 0.3]], saft.get_color(): [[0.7, 0.5]], coop.get_color(): [[0.65, 0.42]]}
    assert diamonds(axes) == expected and len(expected) == 3
    star = line(axes, "zero-shot (α = 0)")  # one for all methods
    assert star.get_marker() == "*" and star.get_xydata().tolist() == [[0.6, 0.4]]
    assert axes.get_xlabel() == "in-distribution accuracy (%)" and axes.get_title() == ""


def test_the_legend_names_all_that_is_drawn(axes):
    plot_id_ood(POINTS, axes, baseline=[(0.5, 0.3), (0.7, 0.5)])
    names = ["full", r"SAFT \$x\$", "CoOp", "fine-tuned (α = 1)", "zero-shot (α = 0)", "baseline models"]
    assert texts(axes.get_legend().get_texts()) == [*names, "baseline line", "y = x"]


def test_the_baseline_line_goes_through_the_zero_shot_model_with_slope_1(axes):
    plot_id_ood(POINTS, axes)
    x, y = logit(line(axes, "baseline line").get_xydata().astype(float)).T
    np.testing.assert_allclose(y - x, logit(0.4) - logit(0.6))
    np.testing.assert_allclose(expit(x), axes.get_xlim())


def test_the_baseline_line_goes_through_given_models(axes):
    baseline = [(float(expit(x)), float(expit(2 * x - 1))) for x in (-0.5, 0.5, 1.0)]
    plot_id_ood(POINTS, axes, baseline=baseline)
    x, y = logit(line(axes, "baseline line").get_xydata().astype(float)).T
    np.testing.assert_allclose(y, 2 * x - 1)
    np.testing.assert_allclose(line(axes, "baseline models").get_xydata(), baseline)


def test_without_zero_shot_model_and_baseline_there_is_no_baseline_line(axes):
    plot_id_ood({"CoOp": POINTS["CoOp"]}, axes)
    assert texts(axes.get_legend().get_texts()) == ["CoOp", "fine-tuned (α = 1)", "y = x"] and diamonds(axes)


def test_other_accuracies_are_drawn_without_lines_and_fill_the_view(axes):
    plot_id_ood(POINTS, axes, lines=False)
    names = ["full", r"SAFT \$x\$", "CoOp", "fine-tuned (α = 1)", "zero-shot (α = 0)"]
    assert texts(axes.get_legend().get_texts()) == names
    low, high = axes.get_ylim()
    assert 0.25 < low < 0.3 and 0.5 < high < 0.55


@pytest.mark.parametrize("ood", [0.1, 0.3, 0.55, 0.7, 0.99])
def test_y_equals_x_and_all_points_are_in_view(axes, ood):
    plot_id_ood({"full": [{"alpha": 0, "id": 0.5, "ood": ood}, {"alpha": 1, "id": 0.6, "ood": ood}]}, axes)
    ends = line(axes, "y = x").get_xydata()
    np.testing.assert_array_equal(ends[:, 0], ends[:, 1])
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0.5 < 0.6 < right and low < ood < high
    assert max(left, low) < min(right, high)  # where y = x is inside


def test_ticks_are_percent(axes):
    plot_id_ood(POINTS, axes)
    assert texts(axes.get_xticklabels()) == ["60", "65", "70", "75", "80"]
    np.testing.assert_allclose(axes.get_xticks(), [0.6, 0.65, 0.7, 0.75, 0.8])


@pytest.mark.parametrize(
    ("low", "high"), [(0.001, 0.999), (0.02, 0.97), (0.3, 0.8), (0.6, 0.62), (0.9, 0.9), (0.995, 0.9961), (0, 0)]
)
def test_ticks_are_neither_few_nor_crowded(axes, low, high):
    rows = [{"alpha": 0, "id": low, "ood": low}, {"alpha": 1, "id": high, "ood": high}]
    plot_id_ood({"full": rows}, axes)
    ends, places = logit(axes.get_xlim()), logit(np.array(axes.get_xticks(), dtype=float))
    assert 1 <= len(places) <= 11 and (len(places) >= 3 or low == high == 0)
    assert ends[0] <= places[0] and places[-1] <= ends[1]
    assert not len(places) > 1 or np.diff(places).min() >= 0.099 * (ends[1] - ends[0])


def test_0_and_1_are_drawn_at_ticks_that_say_so(axes):
    rows = [{"alpha": 0, "id": 0.5, "ood": 0.0}, {"alpha": 1, "id": 1.0, "ood": 0.3}]
    plot_id_ood({"full": rows}, axes)
    np.testing.assert_allclose(line(axes, "full").get_xydata(), [[0.5, 0.001], [0.999, 0.3]])
    for ticks, labels, value, text in (
        (axes.get_xticks(), axes.get_xticklabels(), 0.999, "≥ 99.9"),
        (axes.get_yticks(), axes.get_yticklabels(), 0.001, "≤ 0.1"),
    ):
        (place,) = np.flatnonzero(np.isclose(ticks, value))
        assert texts(labels)[place] == text
    axes.figure.canvas.draw()


@pytest.mark.parametrize("methods", [1, 9])
def test_the_legend_covers_no_point(methods, tmp_path):
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = plot_id_ood({f"method number {index}": POINTS["full"] for index in range(methods)}, figure.subplots())
    figure.savefig(tmp_path / "plot.png")
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1 - 1
    assert legend.x1 <= figure.bbox.x1 and legend.y0 >= 0


@pytest.mark.parametrize(
    ("points", "baseline", "message"),
    [
        ({}, (), "no models to draw"),
        ({"full": []}, (), r"a method has no models \(at full\)"),
        ({"full": [{"alpha": 1, "id": 0.5}]}, (), "a model lacks a value.*full.*'alpha', 'id' and 'ood'"),
        ({"full": [{"alpha": 1, "id": 50, "ood": 0.5}]}, (), "no fraction.*id of full.*50.*Divide percent"),
        ({"full": [{"alpha": 2, "id": 0.5, "ood": 0.5}]}, (), "alpha of full.*2"),
        (POINTS, [(0.5, 0.4), (0.5, 0.5)], "no line fits"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(axes, points, baseline, message):
    with pytest.raises(DataError, match=message):
        plot_id_ood(points, axes, baseline)
    assert not axes.get_lines()


# --- reliability ---


def test_bars_are_accuracies_of_bins_by_hand(axes):
    plot_reliability(CONFIDENCES, CORRECT, bins=4, ax=axes)  # bins of 1, 0, 2 and 3 images
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    np.testing.assert_allclose(bars, [(12.5, 0), (62.5, 50), (87.5, 100)])
    (marks,) = axes.collections
    np.testing.assert_allclose([path.vertices[0, 1] for path in marks.get_paths()], [10, 60, 90])
    assert [(text.get_position()[0], text.get_text()) for text in axes.texts] == [
        (12.5, "1"),
        (62.5, "2"),
        (87.5, "3"),
    ]
    error = (0.1 + 2 * 0.1 + 3 * 0.1) / 6
    assert axes.get_legend().get_title().get_text() == f"ECE {100 * error:.1f} %, 6 images"
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 0], [100, 100]]


def test_bars_and_marks_give_the_error_in_the_title(axes):
    generator = np.random.default_rng(0)
    confidences = np.append(generator.beta(2, 1, 2000), [0.0, 1.0, 1.0, 0.2, 0.6])
    correct = generator.random(len(confidences)) < confidences**2
    plot_reliability(confidences, correct, ax=axes)
    counts = np.array([int(text.get_text()) for text in axes.texts])
    heights = np.array([bar.get_height() for bar in axes.patches])
    marks = np.array([path.vertices[0, 1] for path in axes.collections[0].get_paths()])
    assert len(counts) == 15 and counts.sum() == len(correct)
    expected = expected_calibration_error(confidences, correct)
    assert counts @ np.abs(heights - marks) / counts.sum() / 100 == pytest.approx(expected)
    assert f"ECE {100 * expected:.1f} %" in axes.get_legend().get_title().get_text()


@pytest.mark.parametrize("size", [(6.4, 5.2), (3.4, 3.4)])
def test_counts_overlap_neither_each_other_nor_bars_nor_the_legend(size, tmp_path):
    figure = Figure(figsize=size, layout="constrained")
    confidences = np.repeat(np.arange(15) / 15 + 0.03, 4000)
    axes = plot_reliability(confidences, np.ones(len(confidences), dtype=bool), ax=figure.subplots())
    figure.savefig(tmp_path / "plot.png")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert all(box.y0 >= axes.patches[0].get_window_extent().y1 for box in boxes)
    legend = axes.get_legend().get_window_extent()
    assert max(box.y1 for box in boxes) <= legend.y0
    assert axes.get_window_extent().x0 <= legend.x0 and legend.x1 <= axes.get_window_extent().x1


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "message"),
    [
        ([], [], 15, "no list of images"),
        ([0.5], [True, False], 15, "do not fit"),
        ([80.0], [True], 15, "confidence is no fraction.*80.0"),
        ([0.5], [True], 0, "bins is out of range"),
    ],
)
def test_what_has_no_reliability_is_refused(axes, confidences, correct, bins, message):
    with pytest.raises((ConfigError, DataError), match=message):
        plot_reliability(confidences, correct, bins, axes)
    assert not axes.patches
