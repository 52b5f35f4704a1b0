# SPDX-License-Identifier: Apache-2.0
"""A plot of how hard the classes of a task are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .difficulty_report import TaskDifficulty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR, FAR = "#1f6feb", "#d9822b"  # of bars from 0 up and below 0
LABEL_SIZE, LABEL_HEIGHT = 8.0, 10.5  # points: of the letters, and from one name to the next
LONGEST_NAME = 32  # letters
LEAST_HEIGHT, MOST_HEIGHT = 3.0, 12.0  # inches of a new figure


def plot_difficulty(difficulty: TaskDifficulty, ax: Axes | None = None) -> Axes:
    """Draws the silhouettes of the classes as bars, the hardest class on top, and that of the whole task as a line.

    Args:
        difficulty: what `task_difficulty` returned.
        ax: where to draw; None for a new figure, as high as the classes need, up to 12 inches.

    Returns:
        The axes, for a title or a file. Classes without images are left out. Where the names of all classes do not
        fit, only every second, third, … one has its name.

    Example:
        >>> axes = plot_difficulty(task_difficulty(clip, photos, processor=processor))
        >>> axes.figure.savefig("difficulty.png")
    """
    from matplotlib import pyplot  # slow to import

    classes = difficulty.hardest_first()
    inches = min(max(1.2 + len(classes) * LABEL_HEIGHT / 72, LEAST_HEIGHT), MOST_HEIGHT)
    figure, axes = (None, ax) if ax is not None else pyplot.subplots(figsize=(6.4, inches), layout="constrained")
    axes.set_xlabel(f"{difficulty.kind} silhouette\ndashed: the whole task, {difficulty.silhouette:.3f}")
    if figure is not None:
        figure.draw_without_rendering()  # the layout, which says how high the axes are
    step = _step(axes, len(classes))
    thickness = 0.8 if step == 1 else 1.0  # thin gaps would make stripes in the picture
    values = [one.silhouette or 0.0 for one in classes]  # those without a silhouette are not among them
    colours = [NEAR if value >= 0 else FAR for value in values]
    axes.barh(range(len(classes)), values, thickness, linewidth=0, color=colours)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.axvline(difficulty.silhouette, color="#333333", linestyle="--", linewidth=1.2)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    shown = range(0, len(classes), step)
    axes.set_yticks(shown, [drawn_name(classes[index].name) for index in shown], fontsize=LABEL_SIZE)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _step(axes: Axes, n_classes: int) -> int:
    """Every how manieth class has room for its name."""
    points = 72 * axes.get_window_extent().height / axes.figure.dpi
    return max(1, -int(-n_classes * LABEL_HEIGHT // points))


def drawn_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Returns a name as it can be drawn: a long one without its middle.

    Args:
        name: of a class.
        longest: letters.

    Example:
        >>> drawn_name("a name of more than thirty letters, type 1")
        'a name of more t…letters, type 1'
    """
    half = longest // 2  # names that are alike often differ at the end
    cut = name if len(name) <= longest else f"{name[:half]}…{name[-half + 1 :]}"
    return cut.replace("$", r"\$")  # matplotlib would read a formula
