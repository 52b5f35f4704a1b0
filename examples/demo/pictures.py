# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: what every method gained, and what it kept."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

GAINED, LOST, DARK = "#e6f4ea", "#fce8e6", "#333333"
COLOURS = {"full": "#c5221f", "A-CLIP": "#7a5195", "SAFT": "#1f6feb"}  # by the first word of a name
AXES = ("tiles", "filled icons")  # the sets to the right, and upwards
SHOWN = (20, 50, 85, 120, 155, 200, 235, 270)  # places of drawings in a set


def draw_story(rows: dict[str, dict[str, Any]], sets: dict[str, Dataset], path: Path) -> None:
    """Draws an arrow from the zero-shot model, a star, to what every method made of it.

    To the right: accuracy in distribution. Upwards: in another style. Beside the axes are drawings of both.

    Args:
        rows: by name, with the accuracies of every seed by set under `"set_accuracy"`, fractions, and half of the
            95 % interval of their mean under `"set_interval"`; the first is the zero-shot model.
        sets: what `data.load` returns.
        path: where to.
    """
    figure = Figure(figsize=(9.6, 6.4))
    axes = figure.add_axes((0.2, 0.2, 0.76, 0.74))
    points = {name: [100 * mean(row["set_accuracy"][place]) for place in AXES] for name, row in rows.items()}
    (zero_shot, (x, y)), *others = points.items()
    view_x = limits([point[0] for point in points.values()], 0.35)
    view_y = limits([point[1] for point in points.values()], 0.15)
    axes.set(xlim=view_x, ylim=view_y)
    axes.fill_between([x, view_x[1]], y, view_y[1], color=GAINED, zorder=0)
    axes.fill_between([x, view_x[1]], view_y[0], y, color=LOST, zorder=0)
    leftmost = min(others, key=lambda other: other[1][0])[0]
    for name, end in others:
        interval = [100 * rows[name]["set_interval"][place] for place in AXES]
        draw_arrow(axes, name, (x, y), end, interval, left=name == leftmost)
    axes.plot(x, y, "*", color=DARK, markersize=26, zorder=5)
    axes.annotate(zero_shot, (x, y), (-6, -22), textcoords="offset points", ha="center", fontsize=11)
    axes.set_xticks([tick for tick in axes.get_xticks() if view_x[0] <= tick <= 100])
    axes.set_xlabel("gained: accuracy on icons on tiles, what was trained (%)", fontsize=11)
    axes.set_ylabel("kept: accuracy on filled icons, another style (%)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    draw_strip(figure, sets["id"], (0.2, 0.01, 0.76, 0.08), upright=False)
    draw_strip(figure, sets["ood_filled"], (0.01, 0.2, 0.08, 0.74), upright=True)
    figure.savefig(path, dpi=150)


def limits(values: list[float], room: float) -> tuple[float, float]:
    """The ends of an axis, with `room`, a share of its length, above for labels."""
    length = max(values) - min(values)
    return min(values) - 0.15 * length, max(values) + room * length


def draw_arrow(
    axes: Axes, name: str, start: tuple[float, float], end: list[float], interval: list[float], left: bool
) -> None:
    """The way of one method, with the interval of where it ends; WiSE-FT's is broken. Its name may be to the left."""
    colour = next(colour for word, colour in COLOURS.items() if name.startswith(word))
    line = "--" if "WiSE-FT" in name else "-"
    shape = {"arrowstyle": "-|>", "color": colour, "lw": 2.2, "ls": line, "shrinkA": 12, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**shape, "mutation_scale": 18})
    axes.errorbar(*end, interval[1], interval[0], fmt="none", ecolor=colour, alpha=0.35, lw=1.5)
    place, side = ((14, -34), "right") if left else ((8, 4), "left")
    axes.annotate(name, end, place, textcoords="offset points", color=colour, fontsize=11, weight="bold", ha=side)


def draw_strip(figure: Figure, drawings: Dataset, place: tuple[float, ...], upright: bool) -> None:
    """Drawings of a set beside an axis."""
    images = [drawings[row]["image"] for row in SHOWN]
    side = images[0].width
    strip = Image.new("RGB", (side, side * len(images)) if upright else (side * len(images), side), "white")
    for number, image in enumerate(images):
        strip.paste(image, (0, number * side) if upright else (number * side, 0))
    axes = figure.add_axes(place)
    axes.imshow(strip)
    axes.axis("off")
