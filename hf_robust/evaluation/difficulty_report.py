# SPDX-License-Identifier: Apache-2.0
"""What the difficulty of a task is: its figures, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import Literal

Silhouette = Literal["centroid", "joint", "image_only"]
HARDEST = 10  # classes in the text

MEANING: dict[Silhouette, str] = {
    "centroid": "an image is to its own class's text than to the nearest text of another (above 0: classified right)",
    "joint": "an image or text is to the images and text of its own class than to those of the nearest other class",
    "image_only": "an image is to the other images of its class than to those of the nearest other class",
}
VERDICT = {
    True: "the own class is nearer: the zero-shot space separates part of the task, the more the higher the value",
    False: "another class is as near or nearer: the zero-shot space does not separate this task",
}
READING = (
    "Compare values of one model and one kind of silhouette alone: cosines of images and texts lie in a narrow range, "
    "so an easy task can be far below 1. ACS, the mean cosine of an image and the text of its class, leaves the other "
    "classes out, so that classes which are easily confused can have a high one; the margin subtracts the highest "
    "cosine with another class. The paper of A-CLIP (arXiv 2402.09613) found that the silhouette tells difficulty "
    "better than ACS; no thresholds of it are known to us."
)


@dataclass(frozen=True)
class ClassDifficulty:
    """One class of a `TaskDifficulty`; None where the class has no images.

    Args:
        name: of the class.
        images: how many it has.
        silhouette: mean over its points, in [-1, 1]; None also where none of its images was drawn.
        acs: mean cosine of its images and its text.
        accuracy: zero-shot, a fraction.
        margin: mean over its images of the cosine with its text, minus the highest cosine with another class's text.
    """

    name: str
    images: int
    silhouette: float | None
    acs: float | None
    accuracy: float | None
    margin: float | None


@dataclass(frozen=True)
class TaskDifficulty:
    """What `task_difficulty` found; printed as a table of the hardest classes, with an explanation.

    Args:
        kind: `"centroid"`, `"joint"` or `"image_only"`: which silhouette.
        images: how many images there are.
        sampled: how many of them the silhouette is of.
        silhouette: mean over all points, in [-1, 1].
        acs: average cosine similarity of an image and the text of its class.
        accuracy: zero-shot, a fraction of the images.
        margin: mean of the cosine with the own class's text, minus the highest cosine with another's.
        classes: one per class, in the order of the labels.

    Example:
        >>> task = embedding_difficulty(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), ["cat", "dog"])
        >>> print(task)
        Task difficulty in the zero-shot space (centroid silhouette): 2 images, 2 classes
        ...
    """

    kind: Silhouette
    images: int
    sampled: int
    silhouette: float
    acs: float
    accuracy: float
    margin: float
    classes: tuple[ClassDifficulty, ...]

    def __str__(self) -> str:
        title = f"Task difficulty in the zero-shot space ({self.kind} silhouette): "
        title += f"{self.images:,} images, {len(self.classes):,} classes"
        if self.sampled < self.images:
            title += f"\nThe silhouette is that of {self.sampled:,} images drawn from them."
        reading = f"The silhouette, from -1 to 1, says how much nearer {MEANING[self.kind]}. "
        reading += f"On average {VERDICT[self.silhouette > 0]}. {READING}"
        return f"{title}\n\n{self._table()}\n\n{fill(reading, 100)}"

    def hardest_first(self) -> list[ClassDifficulty]:
        """Returns the classes that have a silhouette, the lowest first; equal ones in the order of the labels."""
        pairs = [(one.silhouette, one) for one in self.classes if one.silhouette is not None]
        return [one for _, one in sorted(pairs, key=lambda pair: pair[0])]

    def _table(self) -> str:
        total = ClassDifficulty("all", self.images, self.silhouette, self.acs, self.accuracy, self.margin)
        ordered = self.hardest_first()
        rows = [["class", "images", "silhouette", "ACS", "accuracy", "margin"]]
        rows += [_cells(one) for one in (total, *ordered[:HARDEST])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  " + "  ".join(map(str.rjust, cells, widths)) for cells in rows]
        hidden = {"easier than these": len(ordered[HARDEST:]), "without images": len(self.classes) - len(ordered)}
        notes = [f"  Not shown: {number:,} classes {which}." for which, number in hidden.items() if number]
        return "\n".join(lines + notes)


def _cells(one: ClassDifficulty) -> list[str]:
    cells = ["" if value is None else f"{value:.3f}" for value in (one.silhouette, one.acs, one.margin)]
    accuracy = "" if one.accuracy is None else f"{100 * one.accuracy:.1f} %"
    return [one.name, f"{one.images:,}", *cells[:2], accuracy, cells[2]]
