# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures: accuracies side by side, and the way of WiSE-FT from the zero-shot to the fine-tuned model."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

COLOURS = {
    "zero-shot": "#9aa0a6",
    "full": "#d9822b",
    "full + WiSE-FT": "#f0b27a",
    "full + similarity": "#a0522d",
    "A-CLIP": "#7a5195",
    "SAFT": "#1f6feb",
    "SAFT + WiSE-FT": "#8fc1ff",
}


def draw_comparison(results: dict[str, dict], titles: dict[str, str], path: Path) -> None:
    """Draws the accuracies as groups of bars, one group a test set.

    Args:
        results: by method, with the accuracies by set under `"accuracy"`, fractions.
        titles: of the sets, by name.
        path: where to.
    """
    figure, axes = pyplot.subplots(figsize=(12, 4.8), layout="constrained")
    width = 0.84 / len(results)
    for place, (method, result) in enumerate(results.items()):
        positions = [group + width * (place - (len(results) - 1) / 2) for group in range(len(titles))]
        percent = [100 * result["accuracy"][name] for name in titles]
        bars = axes.bar(positions, percent, width=0.92 * width, color=COLOURS[method], label=method)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(titles)), titles.values())
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Trained on colour drawings: what was gained, and what was kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(results), loc="upper center")
    axes.set_ylim(0, 1.25 * max(100 * v for result in results.values() for v in result["accuracy"].values()))
    figure.savefig(path, dpi=150)


def draw_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws in-distribution against out-of-distribution accuracy over α, on logit axes.

    Args:
        curves: by method, the rows of an α-sweep with `alpha`, `id` and `ood`, fractions; the first is the zero-shot
            model, the last the fine-tuned one.
        path: where to.
    """
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    for method, rows in curves.items():
        points = [(logit(row["id"]), logit(row["ood"])) for row in rows]
        axes.plot(*zip(*points, strict=True), "-o", markersize=4, color=COLOURS[method], label=f"{method}, α = 0 … 1")
        axes.plot(*points[-1], "D", markersize=10, color=COLOURS[method], label=f"{method}, fine-tuned")
    start = next(iter(curves.values()))[0]
    axes.plot(logit(start["id"]), logit(start["ood"]), "*", markersize=20, color="#333333", label="zero-shot")
    values = [row for rows in curves.values() for row in rows]
    _percent_ticks(axes, "x", [row["id"] for row in values])
    _percent_ticks(axes, "y", [row["ood"] for row in values])
    axes.set_xlabel("in-distribution accuracy (%): unseen colour drawings")
    axes.set_ylabel("out-of-distribution accuracy (%): line art and silhouettes")
    axes.set_title("WiSE-FT: from the zero-shot to the fine-tuned weights")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=9, markerscale=0.7, labelspacing=0.8)
    figure.savefig(path, dpi=150)


def logit(share: float) -> float:
    """The logit of a fraction, kept finite."""
    share = min(max(share, 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))


def _percent_ticks(axes: Axes, axis: str, shares: list[float]) -> None:
    low, high = min(shares), max(shares)
    margin = max(0.1 * (high - low), 0.01)
    limits = (low - margin, high + margin)
    step = next(step for step in (1, 2, 5, 10, 20) if 100 * (limits[1] - limits[0]) / step <= 9)
    ticks = range(max(step, math.ceil(100 * limits[0] / step) * step), min(100, math.floor(100 * limits[1]) + 1), step)
    axes.set(**{f"{axis}lim": (logit(limits[0]), logit(limits[1]))})
    axes.set(**{f"{axis}ticks": [logit(tick / 100) for tick in ticks], f"{axis}ticklabels": [str(t) for t in ticks]})
