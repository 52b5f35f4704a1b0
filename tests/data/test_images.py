# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_robust.data.images import UnopenedImage, load_rgb
from hf_robust.errors import DataError
from tests.tiny_models import synthetic_picture


def png(image, **settings):
    stream = io.BytesIO()
    image.save(stream, "PNG", **settings)
    return stream.getvalue()


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
    for dtype in (np.uint16, np.int32):  # black, and what can be no 8 bits
        assert load_rgb(Image.fromarray(np.zeros((3, 3), dtype=dtype))).getextrema() == ((0, 0),) * 3
        assert load_rgb(Image.fromarray(np.full((3, 3), 256, dtype=dtype))).getextrema() == ((1, 1),) * 3


def test_exif_orientation_is_applied():
    image = synthetic_picture(0, 3, 20, seed=0).crop((0, 0, 20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    stored = {"bytes": png(image, exif=exif), "path": None}
    assert load_rgb(stored).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(stored["bytes"]))).tobytes()
    assert load_rgb(stored).size == (10, 20)


def grey(value, dtype):
    return Image.fromarray(np.full((3, 3), value, dtype=dtype))


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
    "nothing in it": (lambda: Image.new("RGB", (0, 0)), "without pixels"),
    "no height": (lambda: Image.new("I", (5, 0)), "without pixels"),
    "float": (lambda: Image.new("F", (3, 3)), "^image of floating-point"),
    "8 of 32 bits": (lambda: grey(200, np.int32), r"^image of 16-bit.*values of 8 bits.*\(200, 200\).*8 bits per"),
    "8 of 16 bits": (lambda: grey(255, np.uint16), "values of 8 bits"),
    "8 of 16 bits in a file": (lambda: {"bytes": png(grey(1, np.uint16)), "path": "a.png"}, "values of 8 bits.*a.png"),
    "32 bit": (lambda: grey(70_000, np.int32), r"^image of 32-bit.*70000"),
    "negative": (lambda: grey(-1, np.int32), "32-bit"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_one_data_error(name):
    make, message = BAD_IMAGES[name]
    with pytest.raises(DataError, match=message):
        load_rgb(make())


def test_image_below_the_limits_is_taken():
    assert load_rgb(Image.new("L", (1, 20))).size == (1, 20)


def test_a_tensor_of_bytes_or_of_fractions_is_an_image():
    pixels = torch.from_numpy(np.asarray(synthetic_picture(1, 3, 20, seed=0)).copy()).permute(2, 0, 1)  # (3, 20, 20)
    whole, fractions = load_rgb(pixels), load_rgb(pixels / 255)
    assert whole.tobytes() == fractions.tobytes() == synthetic_picture(1, 3, 20, seed=0).tobytes()
    grey = load_rgb(torch.full((1, 4, 5), 0.5))
    assert grey.size == (5, 4) and grey.getpixel((0, 0)) == (128, 128, 128)


BAD_TENSORS = {
    "channels last": (torch.zeros(20, 20, 3), r"no image.*\(20, 20, 3\)"),
    "normalised": (torch.full((3, 4, 4), -1.5), "no colours.*-1.5.*normalisation to the processor"),
    "not finite": (torch.full((3, 4, 4), torch.nan), "no colours"),
    "integers": (torch.zeros(3, 4, 4, dtype=torch.int64), "no image.*int64"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_another_tensor_is_a_data_error(name):
    tensor, message = BAD_TENSORS[name]
    with pytest.raises(DataError, match=message):
        load_rgb(tensor)


def test_every_error_names_the_row_and_the_file():
    for content in (b"no image", png(Image.new("L", (9, 9)))[:40]):
        with pytest.raises(DataError, match="at photos, row 7, a.jpg"):
            UnopenedImage({"bytes": content, "path": "a.jpg"}, "photos, row 7").open()
    with pytest.raises(DataError, match="too elongated.*at photos, row 7"):
        UnopenedImage(Image.new("L", (1, 99)), "photos, row 7").open()


def test_the_transform_of_a_row_gets_the_opened_image():
    stored = {"bytes": png(Image.new("LA", (6, 4))), "path": None}
    seen = []

    def crop(image):
        seen.append((image.mode, image.size))
        return torch.zeros(3, 2, 2)

    assert UnopenedImage(stored, "row", crop).open().size == (2, 2) and seen == [("RGB", (6, 4))]
