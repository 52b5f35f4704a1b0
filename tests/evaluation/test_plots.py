# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from hf_robust.errors import DataError
from hf_robust.evaluation import plot_over_epochs

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


def test_without_axes_there_is_a_new_figure_and_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *args, **kwargs: pytest.fail("shown"))
    pyplot.switch_backend("agg")
    style = dict(matplotlib.rcParams)
    before = pyplot.get_fignums()
    axes = plot_over_epochs(RUNS)
    try:
        assert len(pyplot.get_fignums()) == len(before) + 1 and axes.figure.number not in before
        assert dict(matplotlib.rcParams) == style
    finally:
        pyplot.close(axes.figure)


def test_it_can_be_written_to_a_file(axes, tmp_path):
    plot_over_epochs(RUNS, axes).figure.savefig(tmp_path / "plot.png")
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


def test_missing_matplotlib_is_named(axes, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install hf_robust\[plots\]"):
        plot_over_epochs(RUNS, axes)
