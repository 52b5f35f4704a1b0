# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures: accuracies side by side, and the way of WiSE-FT from the zero-shot to the fine-tuned model."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

from hf_robust.evaluation import plot_id_ood  # noqa: E402

COLOURS = {
    "zero-shot": "#9aa0a6",
    "full": "#d9822b",
    "full + WiSE-FT": "#f0b27a",
    "full + similarity": "#a0522d",
    "A-CLIP": "#7a5195",
    "context + OGEN": "#2e8b57",
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
    axes.legend(frameon=False, ncols=4, loc="upper center")
    axes.set_ylim(0, 1.3 * max(100 * v for result in results.values() for v in result["accuracy"].values()))
    figure.savefig(path, dpi=150)


def draw_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws in-distribution against out-of-distribution accuracy over α.

    Args:
        curves: by method, the rows of an α-sweep with `alpha`, `id` and `ood`, fractions; the first is the zero-shot
            model, the last the fine-tuned one.
        path: where to.
    """
    figure, axes = pyplot.subplots(figsize=(7.6, 5.2), layout="constrained")
    plot_id_ood(curves, axes)
    axes.set_xlabel("in-distribution accuracy (%): unseen colour drawings")
    axes.set_ylabel("out-of-distribution accuracy (%): line art and silhouettes")
    axes.set_title("WiSE-FT: from the zero-shot to the fine-tuned weights")
    figure.savefig(path, dpi=150)
