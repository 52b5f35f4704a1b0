# SPDX-License-Identifier: Apache-2.0
"""A picture of the errors of which a model is most sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax
from transformers.trainer_utils import PredictionOutput

from ..data.class_spaces import ClassSpace
from ..data.images import load_rgb
from ..data.rows import LabelledImages, labelled_images
from ..encoders.templates import readable
from ..errors import ConfigError, DataError
from .difficulty_plot import drawn_name
from .plots import BLUE, DARK, ORANGE
from .report import SetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 1.75, 2.2  # inches: width and height of an image with its two lines
COLUMNS, LABEL_SIZE, LONGEST_NAME = 5, 8.5, 20
PIXELS = 320  # of the longer side, more than a cell has at 150 dpi


@dataclass(frozen=True)
class Answers:
    """What a model answered on a set: rows of the dataset, right and given answers and their names, and confidences.

    Args:
        rows: `(images,)`.
        targets: `(images,)`.
        predictions: `(images,)`.
        confidences: `(images,)`, fractions.
        names: of the answers.
    """

    rows: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    names: Sequence[str]

    def errors(self) -> np.ndarray:
        """Returns where the errors are, the most confident one first, `(errors,)`."""
        wrong = np.flatnonzero(self.predictions != self.targets)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")]


def plot_errors(
    dataset: Any,
    found: SetResult | PredictionOutput,
    most: int = 15,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draws the images a model was most confidently wrong about: its answer with the score, and the right one.

    Often these are wrong labels, two classes in one image, or classes whose names say the same.

    Args:
        dataset: the set; images are shown as they are there, before any corruption.
        found: what was found on it: one of the results of `evaluate_suite`, or what `RobustTrainer.predict` returned.
        most: how many images to show at most.
        class_names: for what `predict` returned, the names of the classifier's classes, where it has others than the
            set.

    Returns:
        The figure, for a file. If there is no error it says so.

    Raises:
        ConfigError: `most` is no number from 1.
        DataError: there are other images in the set than answers, no labels, or no names for them.

    Example:
        >>> report = evaluate_suite(model, processor, suite)
        >>> plot_errors(photos, report.sets["photos"]).savefig("errors.png", dpi=150)
        >>> plot_errors(photos, trainer.predict(photos)).savefig("errors.png", dpi=150)
    """
    if type(most) is not int or most < 1:
        raise ConfigError("no number of images", where="most", got=most, allowed="integers from 1")
    images: Any = labelled_images(dataset, "dataset")
    if not isinstance(images, LabelledImages):
        raise DataError("a stream has no numbered rows", where="dataset")
    answers = _of_result(found, images) if isinstance(found, SetResult) else _of_logits(found, images, class_names)
    errors = answers.errors()
    shown = errors[:most]
    from matplotlib import pyplot

    columns = min(COLUMNS, max(len(shown), 2))
    rows = max(-(-len(shown) // columns), 1)
    size = columns * CELL[0], rows * CELL[1] + 0.35
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(_title(found, len(shown), len(errors), len(answers.rows)), fontsize=10, color=DARK)
    pictures = replace(images, numbers=answers.rows[shown])
    for axes in grid.flat:
        axes.set_axis_off()
    for index, axes in zip(range(len(shown)), grid.flat, strict=False):
        _draw(axes, pictures[index]["image"], answers, shown[index])
    return figure


def _of_result(found: SetResult, images: LabelledImages) -> Answers:
    if found.rows.max(initial=-1) >= len(images.rows):
        raise DataError("answers are of another set", got=f"{len(images.rows)} rows", where=found.name)
    return Answers(found.rows, found.targets, found.predictions, found.confidences, found.answers)


def _of_logits(found: PredictionOutput, images: LabelledImages, class_names: Sequence[str] | None) -> Answers:
    logits, targets = np.asarray(found.predictions), np.asarray(found.label_ids)
    if logits.ndim != 2 or targets.ndim != 1:
        got = f"predictions {logits.shape}, labels {targets.shape}"
        raise DataError("no answers to labelled images", got=got, allowed="(images, classes) and (images,)")
    if len(logits) != len(images):
        remedy = "Where images were left out, pass the trainer's own set, as trainer.eval_dataset['id']."
        raise DataError("answers are of another set", got=len(logits), allowed=f"{len(images)} images", remedy=remedy)
    names = _names(images, class_names)
    if logits.shape[1] > len(names):
        remedy = "Pass class_names=trainer.model.class_names."
        raise DataError("classes have no names", got=logits.shape[1], allowed=f"{len(names)} classes", remedy=remedy)
    scores = softmax(logits.astype(np.float64), axis=1)  # (images, classes)
    return Answers(images.numbers, targets, logits.argmax(axis=1), scores.max(axis=1), names)


def _names(images: LabelledImages, class_names: Sequence[str] | None) -> list[str]:
    """In the order of `RobustTrainer.predict`: the set's classes, and then those that it lacks."""
    if images.class_names is None or class_names is None:
        return [readable(name) for name in images.class_names or class_names or ()]
    return ClassSpace(list(class_names)).relate(images.class_names).words


def _title(found: SetResult | PredictionOutput, shown: int, errors: int, images: int) -> str:
    name = f"{drawn_name(found.name)}: " if isinstance(found, SetResult) else ""
    if errors == 0:
        return f"{name}no errors on {images:,} images"
    most = "the only error" if errors == 1 else f"the {shown} most confident of {errors:,} errors"
    return f"{name}{most if shown < errors else most.replace(f'{shown} most confident of ', '')} on {images:,} images"


def _draw(axes: Axes, content: Any, answers: Answers, index: int) -> None:
    image = load_rgb(content)
    image.thumbnail((PIXELS, PIXELS))
    width, height = image.size
    side = max(width, height) / 2
    axes.imshow(image, extent=(-width / 2, width / 2, -height / 2, height / 2))
    axes.set(xlim=(-side, side), ylim=(-side, side))  # all cells are squares, whatever the image
    answer = f"{_name(answers, answers.predictions[index])} {100 * answers.confidences[index]:.0f} %"
    label = f"label: {_name(answers, answers.targets[index])}"
    how: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate(answer, (0.5, 0), (0, -4), color=ORANGE, fontsize=LABEL_SIZE, **how)
    axes.annotate(label, (0.5, 0), (0, -15), color=BLUE, fontsize=LABEL_SIZE, **how)


def _name(answers: Answers, answer: int) -> str:
    return drawn_name(answers.names[answer], LONGEST_NAME)
