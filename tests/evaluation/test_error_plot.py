# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image
from transformers.trainer_utils import PredictionOutput

from hf_robust.data.readable import readable_rows
from hf_robust.data.rows import labelled_images
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.error_plot import plot_errors
from hf_robust.evaluation.plots import BLUE, ORANGE
from hf_robust.evaluation.report import SetResult
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, build

LONG = "a name of more than thirty letters, type 1"


@pytest.fixture(autouse=True)
def figures():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def result(predictions, confidences, rows=None, answers=NAMES):
    targets = np.arange(len(predictions)) % len(NAMES)
    rows = np.arange(len(predictions)) if rows is None else np.array(rows)
    return SetResult("photos", "id", answers, rows, targets, np.array(predictions), np.array(confidences), "f")


def cells(figure):
    """Of every image its pixels and the two lines, top left first."""
    drawn = [axes for axes in figure.axes if axes.images]
    return [(axes.images[0].get_array(), *(text.get_text() for text in axes.texts)) for axes in drawn]


def colours(size=6):
    """A set whose rows differ in colour."""
    pictures = [Image.new("RGB", (8, 12), (40 * row, 0, 0)) for row in range(size)]
    labels = [row % len(NAMES) for row in range(size)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def test_the_most_confident_error_comes_first_with_its_image():
    figure = plot_errors(colours(), result([0, 2, 1, 0, 0, 0], [0.9, 0.5, 0.7, 0.9, 0.6, 0.7]))
    found = cells(figure)
    assert [lines for _, *lines in found] == [
        ["green 70 %", "label: blue"],  # row 2, and 5 is as sure
        ["red 70 %", "label: blue"],
        ["red 60 %", "label: green"],
        ["blue 50 %", "label: green"],
    ]
    assert [int(pixels[0, 0, 0]) for pixels, *_ in found] == [80, 200, 160, 40]
    assert figure.get_suptitle() == "photos: the 4 errors on 6 images"
    predicted, right = figure.axes[0].texts
    assert (to_rgb(predicted.get_color()), to_rgb(right.get_color())) == (to_rgb(ORANGE), to_rgb(BLUE))


def test_rows_that_were_left_out_are_not_confused_and_most_limits():
    figure = plot_errors(colours(), result([1, 2, 0], [0.5, 0.9, 0.8], rows=[0, 3, 5]), most=2)
    assert [int(pixels[0, 0, 0]) for pixels, *_ in cells(figure)] == [120, 200]
    assert figure.get_suptitle() == "photos: the 2 most confident of 3 errors on 3 images"


@pytest.mark.parametrize(("n_errors", "shape"), [(1, (1, 2)), (5, (1, 5)), (6, (2, 5)), (11, (3, 5))])
def test_the_grid_is_as_large_as_needed(n_errors, shape):
    predictions = [(row + (row < n_errors)) % len(NAMES) for row in range(12)]
    figure = plot_errors(image_dataset(12, NAMES), result(predictions, np.linspace(0.9, 0.5, 12)))
    assert len(cells(figure)) == n_errors and len(figure.axes) == shape[0] * shape[1]
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    figure.canvas.draw()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert all(figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1) for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_without_errors_it_says_so(tmp_path):
    figure = plot_errors(colours(3), result([0, 1, 2], [0.9, 0.9, 0.9]))
    assert cells(figure) == [] and figure.get_suptitle() == "photos: no errors on 3 images"
    figure.savefig(tmp_path / "errors.png")


def test_long_names_are_cut_and_formulas_are_text(tmp_path):
    figure = plot_errors(colours(3), result([1, 1, 1], [0.9] * 3, answers=[LONG, "cash $x_{1$", "c"]))
    (_, predicted, right), _ = cells(figure)
    assert right == "label: a name of …s, type 1" and predicted == r"cash \$x_{1\$ 90 %"
    figure.savefig(tmp_path / "errors.png")  # a formula would be refused here
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_trainer_predicts(tmp_path):
    photos = image_dataset(9, ["blue", "Red"], seed=3)
    trainer = build(tmp_path)
    output = trainer.predict(photos)
    names = ["blue", "red", "green"]  # the set's first, then the one it lacks
    scores = np.exp(output.predictions) / np.exp(output.predictions).sum(1, keepdims=True)
    wrong = [i for i in np.argsort(-scores.max(1)) if scores[i].argmax() != output.label_ids[i]]
    figure = plot_errors(photos, output, class_names=trainer.model.class_names)
    assert [lines for _, *lines in cells(figure)] == [
        [f"{names[scores[i].argmax()]} {100 * scores[i].max():.0f} %", f"label: {names[output.label_ids[i]]}"]
        for i in wrong
    ]
    with pytest.raises(DataError, match="no names.*2 classes.*class_names"):
        plot_errors(photos, output)


def test_images_that_were_skipped_shift_nothing(tmp_path):
    photos = colours(4)
    images = readable_rows(labelled_images(photos, "photos"), silent=True).select([1, 3])
    logits = np.eye(3)[[2, 2]]
    figure = plot_errors(images, PredictionOutput(logits, np.array([1, 0]), None))
    assert [int(pixels[0, 0, 0]) for pixels, *_ in cells(figure)] == [40, 120]
    with pytest.raises(DataError, match=r"another set: got 2.*4 images.*eval_dataset\['id'\]"):
        plot_errors(photos, PredictionOutput(logits, np.array([1, 0]), None))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="most.*0"):
        plot_errors(colours(3), result([0, 0, 0], [0.5] * 3), most=0)
    with pytest.raises(DataError, match="another set.*3 rows"):
        plot_errors(colours(3), result([0, 0], [0.5] * 2, rows=[0, 3]))
    with pytest.raises(DataError, match="no answers to labelled images"):
        plot_errors(colours(3), PredictionOutput(np.eye(3), np.eye(3), None))
    with pytest.raises(DataError, match="stream"):
        plot_errors(colours(3).to_iterable_dataset(), result([0, 0, 0], [0.5] * 3))
