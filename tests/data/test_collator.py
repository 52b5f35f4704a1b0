# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from hf_robust.data.collator import ImageCollator, check_dataset, feature_class_names, load_rgb
from hf_robust.errors import DataError
from tests.tiny_models import FAMILIES, image_dataset, synthetic_picture, tiny_processor


def png(image, **settings):
    stream = io.BytesIO()
    image.save(stream, "PNG", **settings)
    return stream.getvalue()


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


def test_path_bytes_and_image_are_the_same(tmp_path):
    image = synthetic_picture(1, 3, 20, seed=0)
    (tmp_path / "a.png").write_bytes(png(image))
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": png(image), "path": None}]
    sources += [{"bytes": None, "path": str(tmp_path / "a.png")}]
    assert all(load_rgb(source).tobytes() == image.tobytes() for source in sources)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    assert load_rgb(Image.new(mode, (5, 4))).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    grey = np.asarray(load_rgb({"bytes": png(Image.fromarray(levels)), "path": None}))[0, :, 0]
    assert grey.tolist() == [0, 1, 117, 255]


def test_exif_orientation_is_applied():
    image = synthetic_picture(0, 3, 20, seed=0).crop((0, 0, 20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    stored = {"bytes": png(image, exif=exif), "path": None}
    assert load_rgb(stored).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(stored["bytes"]))).tobytes()
    assert load_rgb(stored).size == (10, 20)


def header_of_png(width, height):
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT"]
    sized = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sized)


BAD_IMAGES = {
    "text": (lambda: {"bytes": b"no image", "path": "a.jpg"}, "cannot be opened.*a.jpg"),
    "empty": (lambda: {"bytes": b"", "path": "a.jpg"}, "cannot be opened.*a.jpg"),
    "truncated": (lambda: {"bytes": png(synthetic_picture(0, 3, 40, 0))[:900], "path": "a.png"}, "decoded.*a.png"),
    "no file": (lambda: "nowhere/a.png", "cannot be opened.*nowhere/a.png"),
    "nothing": (lambda: {"bytes": None, "path": None}, "unknown type"),
    "array": (lambda: np.zeros((3, 3, 3)), "unknown type.*ndarray"),
    "elongated": (lambda: Image.new("L", (1, 10_000)), "too elongated.*20:1"),
    "huge": (lambda: {"bytes": header_of_png(10_000, 10_000), "path": None}, "too large.*50 million"),
    "bomb": (lambda: {"bytes": header_of_png(20_000, 20_000), "path": None}, "cannot be opened.*bomb"),
    "float": (lambda: Image.new("F", (3, 3)), "floating-point"),
    "32 bit": (lambda: Image.fromarray(np.full((3, 3), 70_000, dtype=np.int32)), "32-bit"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_one_data_error(name):
    make, message = BAD_IMAGES[name]
    with pytest.raises(DataError, match=message):
        load_rgb(make())


def test_image_below_the_limits_is_taken():
    assert load_rgb(Image.new("L", (1, 20))).size == (1, 20)


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


def labelled(labels, feature=None, image="image", label="label"):
    images = [Image.new("RGB", (4, 4))] * len(labels)
    dataset = Dataset.from_dict({image: images, label: labels})
    return dataset if feature is None else dataset.cast_column(label, feature)


BAD_DATASETS = {
    "empty": (lambda: labelled([0]).select([]), "dataset is empty.*my set"),
    "empty list": (lambda: [], "dataset is empty.*my set"),
    "no image column": (lambda: labelled([0], image="picture"), "no column 'image'.*my set.*picture"),
    "no label column": (lambda: labelled([0], label="class"), "no column 'label'.*my set"),
    "label too large": (lambda: labelled([0, 2, 3]), "row 2 is no class.*my set.*got 3; allowed 0 to 2"),
    "label negative": (lambda: labelled([0, -1]), "row 1 is no class.*got -1"),
    "text": (lambda: labelled(["a", "b"]), "no class indices.*'a'"),
    "float": (lambda: labelled([0.0, 1.0]), "no class indices"),
    "missing": (lambda: labelled([0, None]), "no class indices"),
    "one-hot": (lambda: labelled([[0, 1, 0]]), "no class indices"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_dataset_is_one_data_error(name):
    make, message = BAD_DATASETS[name]
    with pytest.raises(DataError, match=message):
        check_dataset(make(), 3, "my set")


def test_good_dataset_is_accepted_without_decoding():
    dataset = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 3, "label": [0, 1, 2]})
    check_dataset(dataset, 3, "my set")
    check_dataset(dataset.with_transform(lambda rows: 1 / 0), 3, "my set")
    check_dataset([{"image": None, "label": 7}], 3, "rows of another kind are checked when they are batched")


def test_class_names_are_those_of_the_label_feature():
    assert feature_class_names(labelled([0, 1], ClassLabel(names=["a", "b"]))) == ["a", "b"]
    assert feature_class_names(labelled([0, 1])) is None
    assert feature_class_names(Dataset.from_dict({"x": [1]}, features=Features({"x": Value("int64")}))) is None
    assert feature_class_names([{"label": 0}]) is None
    assert feature_class_names(None) is None
