# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from hf_robust.evaluation.difficulty_plot import plot_difficulty
from hf_robust.evaluation.difficulty_report import ClassDifficulty, TaskDifficulty


def many(n_classes, silhouettes=None):
    values = np.linspace(-0.5, 0.8, n_classes)[::-1] if silhouettes is None else silhouettes
    rows = [
        ClassDifficulty(f"kind {c}", 5, None if v is None else float(v), 0.2, 0.5, 0.0) for c, v in enumerate(values)
    ]
    return TaskDifficulty("centroid", 5 * n_classes, 5 * n_classes, 0.123, 0.2, 0.5, 0.0, tuple(rows))


@pytest.fixture
def axes():
    return Figure(figsize=(6, 5)).subplots()


def names_on(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_bars_are_sorted_with_the_hardest_on_top_and_a_line_for_the_task(axes):
    assert plot_difficulty(many(4, [0.3, -0.2, None, 0.1]), axes) is axes
    assert names_on(axes) == ["kind 1", "kind 3", "kind 0"]  # the class without images is left out
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([-0.2, 0.1, 0.3])
    low, high = axes.get_ylim()
    assert low > high  # the first bar is on top
    zero, task = (line.get_xdata()[0] for line in axes.get_lines())
    assert (zero, task) == (0, 0.123) and axes.get_lines()[1].get_linestyle() == "--"
    assert axes.get_xlabel() == "centroid silhouette\ndashed: the whole task, 0.123" and axes.get_title() == ""
    below, above, _ = (bar.get_facecolor() for bar in axes.patches)
    assert below != above


@pytest.mark.parametrize("n_classes", [1, 2, 20, 60, 200])
def test_names_do_not_overlap(axes, n_classes):
    pyplot.switch_backend("agg")
    own = plot_difficulty(many(n_classes))
    try:
        for drawn in (plot_difficulty(many(n_classes), axes), own):
            drawn.figure.canvas.draw()
            boxes = [label.get_window_extent() for label in drawn.get_yticklabels()]
            tops = sorted((box.y0, box.y1) for box in boxes)
            assert all(one[1] <= other[0] + 0.5 for one, other in zip(tops, tops[1:], strict=False))
            assert len(drawn.patches) == n_classes and names_on(drawn)[0] == f"kind {n_classes - 1}"
            assert all(drawn.figure.bbox.contains(box.x0, box.y0) for box in boxes) or drawn is axes
        assert len(names_on(own)) == n_classes or n_classes == 200
        assert len(names_on(own)) >= 50 or n_classes < 200
    finally:
        pyplot.close(own.figure)


def test_names_that_are_long_or_look_like_formulas_are_drawn_as_text(axes, tmp_path):
    found = many(3, [0.1, 0.2, 0.3])
    names = ["a name of more than thirty letters, type 1", "cash $x_{1$", "x" * 32]
    rows = [
        ClassDifficulty(name, *list(asdict(one).values())[1:]) for name, one in zip(names, found.classes, strict=True)
    ]
    plot_difficulty(TaskDifficulty(**{**vars(found), "classes": tuple(rows)}), axes)
    assert names_on(axes)[0] == "a name of more t…letters, type 1" and names_on(axes)[2] == names[2]
    axes.figure.savefig(tmp_path / "plot.png")  # a formula would be refused here
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
