# SPDX-License-Identifier: Apache-2.0
"""Plots: accuracies over epochs, in- against out-of-distribution accuracy, and how reliable confidences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from ..errors import DataError
from .classification import expected_calibration_error
from .statistics import LEAST_SHARE, as_fraction, baseline_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

DARK, GREY, BLUE, ORANGE = "#333333", "#8a8f96", "#1f6feb", "#d9822b"
TICK_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # percent
MORE_TICKS = (10, 90, 1, 99, 5, 95, 2, 98, 0.5, 99.5)  # percent: logit axes are wide towards 0 and 100


def plot_over_epochs(
    runs: Mapping[str, Sequence[Sequence[float]]],
    ax: Axes | None = None,
    ylabel: str = "accuracy on new classes (%)",
) -> Axes:
    """Draws accuracies over the epochs: of each method the mean over seeds, in a band of one standard deviation.

    Args:
        runs: by method, one list per seed: accuracies as fractions, first that of the zero-shot model (epoch 0), then
            one per epoch.
        ax: where to draw; None for a new figure.
        ylabel: what the accuracies are.

    Returns:
        The axes, for a title, a file or more lines. The band is that of the sample standard deviation (n - 1); with
        one seed there is none.

    Raises:
        DataError: there are no runs, or seeds of a method have different numbers of epochs.

    Example:
        >>> axes = plot_over_epochs({"CoOp": [[0.61, 0.55], [0.61, 0.57]], "CoOp + OGEN": [[0.61, 0.62], [0.61, 0.6]]})
        >>> axes.figure.savefig("over_epochs.png")
    """
    means_and_deviations = {name: _mean_and_deviation(name, seeds) for name, seeds in runs.items()}
    if not runs:
        raise DataError("no runs to draw", where="runs", got=runs, allowed="at least one method with one seed")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    axes: Axes = pyplot.subplots(layout="constrained")[1] if ax is None else ax
    for name, (mean, deviation) in means_and_deviations.items():
        epochs = np.arange(len(mean))
        (line,) = axes.plot(epochs, mean, marker="o", markersize=3, label=name)
        if len(runs[name]) > 1:
            axes.fill_between(
                epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0
            )
    axes.set_xlabel("epoch (0: zero-shot)")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def plot_id_ood(
    points: Mapping[str, Sequence[Mapping[str, float]]],
    ax: Axes | None = None,
    baseline: Sequence[tuple[float, float]] = (),
    lines: bool = True,
) -> Axes:
    """Draws out-of-distribution against in-distribution accuracy: of each method the way from zero-shot to fine-tuned.

    The axes have logit scale, on which the accuracies of models without robustness of their own lie on a line (Taori
    et al. 2020, arXiv 2007.00644). Zero-shot models are stars, fine-tuned ones diamonds, and the models between them,
    those of WiSE-FT (arXiv 2109.01903), dots on a line.

    Args:
        points: by method, its models, each with `alpha` (0 is zero-shot, 1 is fine-tuned), `id` and `ood`, fractions.
            A method may have its fine-tuned model alone.
        ax: where to draw; None for a new figure.
        baseline: ID and OOD accuracy of each baseline model, for the baseline line, see `baseline_line`; without any,
            the zero-shot models among the points.
        lines: whether to draw the baseline line and y = x, which say nothing where `ood` holds accuracies on other
            tasks or new classes.

    Returns:
        The axes, for a title, a file or more points, as fractions. Accuracies under 0.1 % are drawn at a tick "≤ 0.1",
        those over 99.9 % at "≥ 99.9". There is no baseline line without baseline and zero-shot models. The legend is
        to the right of the axes: make figures of your own with `layout="constrained"`.

    Raises:
        DataError: there are no models, a value is missing or no fraction, or no baseline line fits.

    Example:
        >>> sweep = [{"alpha": 0, "id": 0.63, "ood": 0.49}, {"alpha": 0.5, "id": 0.74, "ood": 0.51}]
        >>> axes = plot_id_ood({"full fine-tuning": sweep + [{"alpha": 1, "id": 0.76, "ood": 0.44}]})
        >>> axes.figure.savefig("id_ood.png")
    """
    curves = {name: _curve(name, rows) for name, rows in points.items()}
    if not curves:
        raise DataError("no models to draw", where="points", got=dict(points), allowed="at least one method")
    models = np.concatenate(list(curves.values()))  # (models, 3)
    zero_shot = np.unique(models[models[:, 0] == 0, 1:], axis=0)  # (zero-shot models, 2)
    line_through = [(float(x), float(y)) for x, y in (baseline or zero_shot)]
    line = baseline_line(line_through) if line_through and lines else None
    from matplotlib import pyplot

    axes: Axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")[1] if ax is None else ax
    axes.set(xscale="logit", yscale="logit")
    for name, curve in curves.items():
        _draw_curve(axes, name, curve)
    axes.plot([], [], "D", color="none", markeredgecolor=DARK, markersize=8, label="fine-tuned (α = 1)")
    if len(zero_shot):
        axes.plot(*_drawn(zero_shot).T, "*", color=DARK, markersize=16, label="zero-shot (α = 0)", zorder=4)
    if baseline:
        axes.plot(*_drawn(np.array(baseline)).T, "x", color=DARK, markersize=5, label="baseline models", zorder=1)
    x_view, y_view = _views(_drawn(np.concatenate([models[:, 1:], np.reshape(baseline, (-1, 2))])), lines)
    if lines:
        _draw_lines(axes, line, x_view, y_view)
    axes.set(xlim=x_view, ylim=y_view)
    _percent_axis(axes.xaxis, x_view)
    _percent_axis(axes.yaxis, y_view)
    axes.set_xlabel("in-distribution accuracy (%)")
    axes.set_ylabel("out-of-distribution accuracy (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return axes


def plot_reliability(confidences: ArrayLike, correct: ArrayLike, bins: int = 15, ax: Axes | None = None) -> Axes:
    """Draws a reliability diagram: the accuracy of the images whose confidence is in the same bin (Guo et al. 2017).

    In a calibrated model bars end at the mark, the mean confidence, which is about the diagonal. Above are the number
    of images in each bin and the expected calibration error (arXiv 1706.04599), see `expected_calibration_error`.

    Args:
        confidences: `(images,)`, the probability of the predicted class, fractions.
        correct: `(images,)`, whether it was the true class.
        bins: their number, from 1.
        ax: where to draw; None for a new figure.

    Returns:
        The axes, for a title or a file, in percent.

    Raises:
        ConfigError: `bins` is no integer from 1.
        DataError: no images, different numbers of them, confidences outside [0, 1], or other values than true and
            false.

    Example:
        >>> confidences, predicted = logits.softmax(dim=1).max(dim=1)
        >>> axes = plot_reliability(confidences, predicted == labels)
        >>> axes.figure.savefig("reliability.png")
    """
    calibration_error = expected_calibration_error(confidences, correct, bins)
    from matplotlib import pyplot

    axes: Axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")[1] if ax is None else ax
    places, counts, confidence, accuracy = _binned(confidences, correct, bins)  # (bins with images,) each
    half = 46 / bins
    axes.bar(places, accuracy, width=2 * half, color=BLUE, label="accuracy")
    axes.hlines(confidence, places - half, places + half, color=ORANGE, linewidth=2.5, label="mean confidence")
    axes.plot([0, 100], [0, 100], "--", color=DARK, linewidth=1)
    for place, count in zip(places, counts, strict=True):  # in a row above all bars, where nothing is drawn
        axes.text(place, 103, str(count), rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0, 100), ylim=(0, 140), xticks=range(0, 101, 20), yticks=range(0, 101, 20))
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_bounds(0, 100)
    title = f"ECE {100 * calibration_error:.1f} %, {counts.sum():,} images"
    axes.legend(frameon=False, loc="upper center", ncols=2, title=title, fontsize=8, columnspacing=1)
    return axes


def _mean_and_deviation(name: str, seeds: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """In percent, `(epochs + 1,)` each."""
    lengths = sorted({len(values) for values in seeds})
    if len(lengths) != 1 or lengths[0] == 0:
        allowed = "one list per seed, all of the same length"
        raise DataError("seeds differ in their number of epochs", where=name, got=lengths, allowed=allowed)
    percent = 100 * np.asarray(seeds, dtype=float)  # (seeds, epochs + 1)
    return percent.mean(axis=0), percent.std(axis=0, ddof=1) if len(percent) > 1 else np.zeros(lengths[0])


def _curve(name: str, rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """α, ID and OOD accuracy of a method's models by α, `(models, 3)`."""
    columns = ("alpha", "id", "ood")
    for row in rows:
        if not row.keys() >= set(columns):
            raise DataError("a model lacks a value", where=name, got=dict(row), allowed="'alpha', 'id' and 'ood'")
        for column in columns:
            as_fraction(row[column], f"{column} of {name}")
    if not rows:
        raise DataError("a method has no models", where=name, allowed="at least one")
    return np.array(sorted([float(row[column]) for column in columns] for row in rows))


def _draw_curve(axes: Axes, name: str, curve: np.ndarray) -> None:
    label = name.replace("$", r"\$")  # matplotlib would read a formula
    (drawn,) = axes.plot(*_drawn(curve[:, 1:]).T, "o-", markersize=4, label=label)
    fine_tuned = curve[curve[:, 0] == 1, 1:]
    axes.plot(*_drawn(fine_tuned).T, "D", markersize=8, color=drawn.get_color(), zorder=3)


def _draw_lines(axes: Axes, line: tuple[float, float] | None, x_view: np.ndarray, y_view: np.ndarray) -> None:
    """The baseline line and y = x over all of the view."""
    if line is not None:
        expected = expit(line[0] * logit(x_view) + line[1])
        axes.plot(x_view, expected, "--", color=GREY, linewidth=1.2, label="baseline line", zorder=1)
    both = np.concatenate([x_view, y_view])
    ends = [both.min(), both.max()]
    axes.plot(ends, ends, ":", color=DARK, linewidth=1.2, label="y = x", zorder=1)


def _drawn(shares: np.ndarray) -> np.ndarray:
    """Where accuracies are drawn: 0 and 1 have no place on a logit axis."""
    return np.clip(shares, LEAST_SHARE, 1 - LEAST_SHARE)


def _views(drawn: np.ndarray, lines: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ends of both axes, with room around the points, `(points, 2)`; with lines until y = x is in view."""
    low, high = logit(drawn.min(axis=0)), logit(drawn.max(axis=0))  # (2,)
    margin = np.maximum(0.08 * (high - low), 0.05)
    (x_low, y_low), (x_high, y_high) = low - margin, high + margin
    middle = (x_low + x_high) / 2
    y_view = np.array([min(y_low, middle), max(y_high, middle)] if lines else [y_low, y_high])
    return expit(np.array([x_low, x_high])), expit(y_view)


def _percent_axis(axis: Axis, view: np.ndarray) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = _ticks(*logit(view))
    names = {100 * LEAST_SHARE: f"≤ {100 * LEAST_SHARE:g}", 100 - 100 * LEAST_SHARE: f"≥ {100 - 100 * LEAST_SHARE:g}"}
    axis.set_major_locator(FixedLocator([tick / 100 for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([names.get(tick, f"{tick:g}") for tick in ticks])


def _ticks(low: float, high: float) -> list[float]:
    """Percents between two logits, equally spaced, and more towards 0 and 100; none closer than a tenth."""
    apart = (high - low) / 10
    ends = [100 * LEAST_SHARE, 100 - 100 * LEAST_SHARE]
    for step in TICK_STEPS:
        equal = [round(step * n, 2) for n in range(1, round(100 / step)) if low <= logit(step * n / 100) <= high]
        if not equal or np.diff(logit(np.array(equal) / 100)).min(initial=np.inf) >= apart:
            break
    ticks: list[float] = []
    for tick in (*ends, *equal, *MORE_TICKS):
        place = logit(tick / 100)
        if low <= place <= high and all(abs(place - logit(other / 100)) >= apart for other in ticks):
            ticks.append(tick)
    return sorted(ticks)


def _binned(confidences: ArrayLike, correct: ArrayLike, bins: int) -> tuple[np.ndarray, ...]:
    """Of each bin with images: its middle, their number, mean confidence and accuracy; in percent."""
    values = np.asarray(confidences, dtype=np.float64)
    of_image = np.minimum(np.digitize(values, np.linspace(0, 1, bins + 1)), bins) - 1  # (images,)
    filled, of_image, counts = np.unique(of_image, return_inverse=True, return_counts=True)
    accuracy = np.bincount(of_image, weights=np.asarray(correct, dtype=np.float64)) / counts
    return 100 * (filled + 0.5) / bins, counts, 100 * np.bincount(of_image, weights=values) / counts, 100 * accuracy
