# SPDX-License-Identifier: Apache-2.0
"""What every entrance makes of the dataset that a user gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from hf_robust.data.collator import ImageCollator
from hf_robust.data.images import UnopenedImage
from hf_robust.data.rows import LabelledImages, LabelledStream, labelled_images
from hf_robust.errors import DataError
from tests.tiny_models import image_dataset, synthetic_picture, tiny_processor

NAMES = ["cat", "dog", "owl"]


def labelled(labels, feature=None, image="image", label="label"):
    images = [Image.new("RGB", (4, 4))] * len(labels)
    dataset = Dataset.from_dict({image: images, label: labels})
    return dataset if feature is None else dataset.cast_column(label, feature)


class Pairs(torch.utils.data.Dataset):
    """As torchvision's ImageFolder: pairs, with the names of the classes."""

    classes = NAMES

    def __init__(self, n=6, target_transform=None):
        self.targets, self.target_transform = [index % 3 for index in range(n)], target_transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label = self.targets[index]
        label = label if self.target_transform is None else self.target_transform(label)
        return synthetic_picture(self.targets[index], 3, 20, seed=index), label


def text_labels(dataset):
    return Dataset.from_list([{**row, "label": NAMES[row["label"]]} for row in dataset])


def photos():
    return image_dataset(6, NAMES, size=20)


FORMS = {
    "datasets": lambda: image_dataset(6, NAMES, size=20),
    "renamed": lambda: image_dataset(6, NAMES, size=20).rename_columns({"image": "img", "label": "labels"}),
    "formatted": lambda: image_dataset(6, NAMES, size=20).with_format("torch"),
    "text": lambda: text_labels(image_dataset(6, NAMES, size=20)),
    "transformed": lambda: image_dataset(6, NAMES, size=20).with_transform(lambda rows: rows),
    "stream": lambda: image_dataset(6, NAMES, size=20).to_iterable_dataset(),
    "generated": lambda: IterableDataset.from_generator(lambda: iter(image_dataset(6, NAMES, size=20))),
    "pairs": Pairs,
    "some pairs": lambda: Subset(Pairs(9), range(6)),
    "some rows": lambda: Subset(image_dataset(9, NAMES, size=20), range(6)),
    "joined": lambda: ConcatDataset(
        [Subset(image_dataset(6, NAMES, size=20), part) for part in ([0, 1, 2], [3, 4, 5])]
    ),
    "rows": lambda: [dict(row) for row in image_dataset(6, NAMES, size=20)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_dataset_gives_the_same_batch(form):
    rows = labelled_images(FORMS[form](), "photos")
    found = list(rows) if isinstance(rows, LabelledStream) else rows.__getitems__(list(range(len(rows))))
    assert all(isinstance(row["image"], UnopenedImage) for row in found)
    collate = ImageCollator(tiny_processor("clip"))
    batch, expected = collate(found), collate(list(image_dataset(6, NAMES, size=20)))
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert rows.class_names == (None if form in ("generated", "rows") else NAMES)
    assert labelled_images(rows, "again") is rows


def test_no_image_is_opened_and_errors_name_the_row(tmp_path):
    dataset = Dataset.from_dict({"image": [{"bytes": b"no image", "path": "x/0.png"}] * 3, "label": [0, 1, 2]})
    dataset = dataset.cast_column("image", image_dataset(1, NAMES).features["image"])
    rows = labelled_images(dataset, "photos")
    assert len(rows) == 3 and rows.select([2])[0]["label"] == 2
    with pytest.raises(DataError, match="cannot be opened.*at photos, row 2, .*0.png"):
        ImageCollator(tiny_processor("clip"))([rows.select([2])[0]])


BAD_DATASETS = {
    "empty": (lambda: labelled([0]).select([]), "dataset is empty.*my set"),
    "empty list": (lambda: [], "dataset is empty.*my set"),
    "no image column": (lambda: labelled([0], image="picture"), "no column 'image'.*my set.*picture.*rename_column"),
    "two image columns": (lambda: labelled([0], label="img"), "several columns could be the image.*'image', 'img'"),
    "label negative": (lambda: labelled([0, -1], ClassLabel(names=NAMES)), "row 1 is no class.*got -1"),
    "float": (lambda: labelled([0.0, 1.0]), "no class indices"),
    "one-hot": (lambda: labelled([[0, 1, 0]]), "no class indices"),
    "text missing": (lambda: labelled(["a", None]), "without label.*row 1"),
    "text blank": (lambda: labelled(["a", " "]), "without label.*row 1"),
    "splits": (lambda: DatasetDict(train=labelled([0]), test=labelled([0])), r"several splits.*\['test', 'train'\]"),
    "path": (lambda: "photos", "no dataset.*got 'str'.*imagefolder"),
    "nothing": (lambda: 3, "no dataset.*got 'int'"),
    "other classes": (
        lambda: ConcatDataset([image_dataset(2, NAMES), image_dataset(2, NAMES[::-1])]),
        "other classes",
    ),
    "pixel values": (lambda: labelled([0], image="pixel_values"), "no column 'image'.*must return images"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_dataset_is_one_data_error(name):
    make, message = BAD_DATASETS[name]
    with pytest.raises(DataError, match=message):
        labelled_images(make(), "my set")


def test_a_column_that_is_named_is_the_one():
    dataset = labelled([2, 1, 0]).add_column("category", [0, 1, 2])
    assert labelled_images(dataset, "photos", label_column="category").labels.tolist() == [0, 1, 2]
    assert labelled_images(dataset, "photos").labels.tolist() == [2, 1, 0]
    with pytest.raises(DataError, match="no column 'kind'.*category, image, label"):
        labelled_images(dataset, "photos", label_column="kind")
    renamed = labelled_images(dataset, "photos", label_column="category").to_dataset()
    assert renamed.column_names == ["image", "label"] and renamed["label"][:] == [0, 1, 2]


def test_labels_of_text_take_the_order_of_a_list_that_names_them_all():
    dataset = labelled(["owl", "cat", "Owl "])
    assert labelled_images(dataset, "photos").class_names == ["Owl ", "cat", "owl"]
    rows = labelled_images(labelled(["owl", "cat"]), "photos", order=["owl", "dog", "cat"])
    assert rows.class_names == ["owl", "dog", "cat"] and rows.labels.tolist() == [0, 2]
    with pytest.raises(DataError, match="class_names lack a label of the data.*'cat'.*mapping"):
        labelled_images(labelled(["owl", "cat"]), "photos", order=["owl", "dog"])


def test_a_transform_gets_opened_rows_with_the_names_it_knows():
    dataset, seen = image_dataset(4, NAMES, size=20).rename_column("image", "img"), []

    def turn(rows):
        seen.append((len(rows["img"]), rows["img"][0].mode, sorted(rows)))
        return {"img": [image.rotate(180) for image in rows["img"]], "label": rows["label"]}

    row = labelled_images(dataset.with_transform(turn), "photos")[1]
    assert seen == []
    assert row["image"].open().tobytes() == dataset[1]["img"].rotate(180).tobytes()
    assert seen == [(1, "RGB", ["img", "label"])]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda rows: {"pixel_values": rows["image"], "label": rows["label"]}, "must return images.*collator"),
        (lambda rows: {"image": rows["image"], "label": [1]}, "changes a label.*dataset.map"),
        (lambda rows: {"image": [np.zeros((4, 4, 3))]}, "unknown type.*ndarray"),
    ],
)
def test_a_transform_must_return_images(transform, message):
    row = labelled_images(image_dataset(4, NAMES, size=20).with_transform(transform), "photos")[0]
    with pytest.raises(DataError, match=message):
        row["image"].open()


def test_torch_labels_that_are_transformed_are_read_with_the_row():
    rows = labelled_images(Pairs(target_transform=lambda label: 2 - label), "photos")
    assert (
        rows.labels is None
        and rows.class_names is None
        and [row["label"] for row in rows.__getitems__([0, 1, 2])] == [2, 1, 0]
    )
    assert labelled_images(Subset(Pairs(9), [8, 0]), "photos").shown_labels.tolist() == [2, 0]


def test_torch_rows_with_other_labels_than_targets_are_refused():
    class Turned(Pairs):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], 2 - self.targets[index]

    with pytest.raises(DataError, match="not those of `targets`.*photos"):
        labelled_images(Turned(), "photos")[0]


def test_labels_that_are_hidden_are_none():
    rows = labelled_images(labelled([-1, -1], ClassLabel(names=NAMES)), "photos")
    assert rows.labels is None and rows.columns.label is None and rows.class_names == NAMES


def test_unreadable_rows_of_a_torch_dataset_are_named():
    class Broken(Pairs):
        def __getitem__(self, index):
            raise OSError("image file is truncated")

    with pytest.raises(DataError, match="cannot be read .*truncated.*at photos, row 4"):
        labelled_images(Broken(), "photos")[4]
    with pytest.raises(DataError, match="unknown type.*int"):
        labelled_images([1, 2], "photos")[0]


def test_other_columns_and_rows_without_labels_come_through():
    dataset = image_dataset(3, NAMES).add_column("id", ["x", "y", "z"]).remove_columns("label")
    row = labelled_images(dataset, "photos")[1]
    assert row.keys() == {"image", "id"} and row["id"] == "y"


def test_a_dataset_of_the_rows_copies_no_image():
    chosen = labelled(["owl", "cat", "dog", "owl"]).select([3, 1, 2])
    rows = labelled_images(chosen, "photos").select([1, 2])
    dataset = rows.to_dataset()
    assert dataset["label"][:] == [0, 1] and dataset.features["label"].names == NAMES
    assert dataset._data.nbytes < 2 * chosen._data.nbytes and not dataset.features["image"].decode
    with pytest.raises(DataError, match="not a datasets.Dataset"):
        labelled_images(Pairs(), "photos").to_dataset()


def test_a_stream_passes_on_the_epoch():
    stream = labelled_images(image_dataset(6, NAMES).to_iterable_dataset().shuffle(seed=1, buffer_size=6), "photos")
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([row["label"] for row in stream])
    assert orders[0] == orders[2] != orders[1]
    assert isinstance(labelled_images(image_dataset(2, NAMES), "photos"), LabelledImages)
