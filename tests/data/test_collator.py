# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_robust.data.collator import ImageCollator, OpeningCollator
from hf_robust.errors import DataError
from tests.tiny_models import FAMILIES, image_dataset, synthetic_picture, tiny_processor


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_what_the_image_processor_returns(family):
    rows = [{"image": synthetic_picture(label, 3, 40, seed=label), "label": label, "other": "x"} for label in range(3)]
    batch = ImageCollator(tiny_processor(family))(rows)
    expected = tiny_processor(family).image_processor(images=[row["image"] for row in rows], return_tensors="pt")
    assert batch.keys() == {*expected.keys(), "labels"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["labels"].dtype == torch.int64


def test_without_labels_there_are_none():
    assert ImageCollator(tiny_processor("clip"))([{"image": Image.new("RGB", (9, 9))}]).keys() == {"pixel_values"}


def test_image_processor_alone_is_enough():
    rows = [{"image": Image.new("RGB", (9, 9), "red"), "label": 0}]
    alone = ImageCollator(tiny_processor("clip").image_processor)(rows)
    assert torch.equal(alone["pixel_values"], ImageCollator(tiny_processor("clip"))(rows)["pixel_values"])


@pytest.mark.parametrize("label", [None, -1, 1.0, "cat", True, [0, 1]])
def test_bad_label_is_a_data_error(label):
    rows = [{"image": Image.new("RGB", (9, 9)), "label": 0}, {"image": Image.new("RGB", (9, 9)), "label": label}]
    with pytest.raises(DataError, match="label"):
        ImageCollator(tiny_processor("clip"))(rows)


def test_row_without_image_names_its_columns():
    with pytest.raises(DataError, match="row without `image`.*picture"):
        ImageCollator(tiny_processor("clip"))([{"picture": Image.new("RGB", (9, 9)), "label": 0}])


def test_error_and_batch_come_through_worker_processes():
    collate = pickle.loads(pickle.dumps(ImageCollator(tiny_processor("clip"))))
    rows = image_dataset(4, ["a", "b"])
    (batch,) = DataLoader(rows, batch_size=4, num_workers=1, collate_fn=collate)
    assert torch.equal(batch["pixel_values"], collate([rows[index] for index in range(4)])["pixel_values"])
    with pytest.raises(DataError, match="unknown type"):
        list(DataLoader([{"image": 3}], num_workers=1, collate_fn=collate))


def test_images_are_opened_one_at_a_time(monkeypatch):
    """A batch of large images never is in memory in full size."""
    held, most = [], []

    def opened(image):
        held.append(1)
        most.append(len(held))
        return Image.new("RGB", (9, 9))

    images = tiny_processor("clip").image_processor
    monkeypatch.setattr("hf_robust.data.collator.load_rgb", opened)
    collate = ImageCollator(images)
    collate.image_processor = lambda **inputs: held.clear() or images(**inputs)
    assert collate([{"image": None or "a"} for _ in range(4)])["pixel_values"].shape[0] == 4 and most == [1] * 4


def test_augmentation_changes_images_until_it_is_left_out():
    image, plain = synthetic_picture(0, 3, 40, seed=0), ImageCollator(tiny_processor("clip"))
    rows, flipped = [{"image": image}], [{"image": image.rotate(180)}]
    augment = ImageCollator(tiny_processor("clip"), transform=lambda image: image.rotate(180))
    assert torch.equal(augment(rows)["pixel_values"], plain(flipped)["pixel_values"])
    assert torch.equal(augment.without_transform()(rows)["pixel_values"], plain(rows)["pixel_values"])
    assert plain.without_transform() is plain
    with pytest.raises(DataError, match="unknown type.*dict"):
        ImageCollator(tiny_processor("clip"), transform=lambda image: {"pixel_values": image})(rows)


def test_another_collator_gets_opened_images():
    rows = [{"image": Image.new("LA", (9, 9)), "label": 1}, {"label": 2}]
    (first, second) = OpeningCollator(list)(rows)
    assert first["image"].mode == "RGB" and first["label"] == 1 and second == {"label": 2}
