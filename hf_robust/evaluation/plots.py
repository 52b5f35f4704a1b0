# SPDX-License-Identifier: Apache-2.0
"""A plot of accuracies over the epochs of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = plot_over_epochs({"CoOp": [[0.61, 0.55], [0.61, 0.57]], "CoOp + OGEN": [[0.61, 0.62], [0.61, 0.6]]})
        >>> axes.figure.savefig("over_epochs.png")
    """
    means_and_deviations = {name: _mean_and_deviation(name, seeds) for name, seeds in runs.items()}
    if not runs:
        raise DataError("no runs to draw", where="runs", got=runs, allowed="at least one method with one seed")
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot_over_epochs needs matplotlib: pip install hf_robust[plots]") from error

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


def _mean_and_deviation(name: str, seeds: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """In percent, `(epochs + 1,)` each."""
    lengths = sorted({len(values) for values in seeds})
    if len(lengths) != 1 or lengths[0] == 0:
        allowed = "one list per seed, all of the same length"
        raise DataError("seeds differ in their number of epochs", where=name, got=lengths, allowed=allowed)
    percent = 100 * np.asarray(seeds, dtype=float)  # (seeds, epochs + 1)
    return percent.mean(axis=0), percent.std(axis=0, ddof=1) if len(percent) > 1 else np.zeros(lengths[0])
