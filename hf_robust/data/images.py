# SPDX-License-Identifier: Apache-2.0
"""How an image is opened: one way at every entrance, with limits that hold before memory is spent."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from .text_files import check_regular

MAX_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 20


@dataclass(frozen=True)
class UnopenedImage:
    """The image of a row, opened when it is needed, so that a batch never holds more than one in full size.

    Args:
        content: what `load_rgb` takes.
        where: dataset and row, for messages.
        transform: the dataset's own transform, from the opened image to the one that is used.
    """

    content: Any
    where: str
    transform: Callable[[Image.Image], Any] | None = None

    def open(self) -> Image.Image:
        """Returns the image as upright 8-bit RGB.

        Raises:
            DataError: what `load_rgb` raises, or the transform returns no image.
        """
        image = load_rgb(self.content, self.where)
        return image if self.transform is None else load_rgb(self.transform(image), self.where)


def load_rgb(image: Any, where: str | None = None) -> Image.Image:
    """Opens an image as upright 8-bit RGB.

    The size is checked before anything is decoded. EXIF orientation is applied, 16-bit grey is scaled to 8 bits,
    transparency is dropped (as in CLIP's own preprocessing), and of an animation the first frame is taken.

    Args:
        image: a `PIL.Image.Image`, the path of one, `{"bytes": ..., "path": ...}`, an `UnopenedImage`, or a tensor
            `(channels, height, width)` of 1 or 3 channels, uint8 or fractions in [0, 1], as torchvision's transforms
            return them.
        where: dataset and row, for messages.

    Raises:
        DataError: when it is no image, is broken, has no pixels or more than 50 million, is more than 20 times as long
            as it is wide (resizing its short side would take gigabytes), or has grey values that may mean several
            things (floating-point numbers, or 16 bits with values of 8).

    Example:
        >>> load_rgb(Image.new("LA", (4, 3))).mode
        'RGB'
    """
    if isinstance(image, UnopenedImage):
        return image.open()
    if isinstance(image, torch.Tensor):
        image = _from_tensor(image, where)
    opened, where = _open(image, where)
    width, height = opened.size
    if width * height == 0:
        raise DataError("image without pixels", where=where, got=(width, height))
    if width * height > MAX_PIXELS:
        raise DataError("image is too large", where=where, got=(width, height), allowed="at most 50 million pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError("image is too elongated", where=where, got=(width, height), allowed="sides within 20:1")
    try:
        if isinstance(image, Image.Image):
            return _eight_bit(ImageOps.exif_transpose(opened), where).convert("RGB")
        ImageOps.exif_transpose(opened, in_place=True)  # no copy of an image that is ours
        opened.load()
        upright = _eight_bit(opened, where)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except DataError:  # a ValueError, too
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
    ) as error:  # what Pillow's decoders raise for truncated or broken data
        raise DataError(f"image cannot be decoded ({error})", where=where) from error


def _open(image: Any, where: str | None) -> tuple[Image.Image, str | None]:
    if isinstance(image, Image.Image):
        return image, where
    path: Any = image.get("path") if isinstance(image, Mapping) else image
    content = image.get("bytes") if isinstance(image, Mapping) else None
    if content is None and not isinstance(path, str | Path):
        allowed = 'a PIL image, a path, {"bytes": ..., "path": ...}, or a tensor of shape (3, height, width)'
        raise DataError("image is of an unknown type", where=where, got=type(image).__name__, allowed=allowed)
    where = ", ".join(part for part in (where, None if path is None else str(path)) if part) or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `load_rgb` has a lower limit
            if content is None:
                check_regular(path)
                content = Path(path).read_bytes()
            return Image.open(io.BytesIO(content)), where
    except UnidentifiedImageError as error:  # which shows where in memory the bytes are
        raise DataError("image cannot be opened (no format that Pillow knows)", where=where) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image cannot be opened ({error})", where=where) from error


def _from_tensor(image: torch.Tensor, where: str | None) -> Image.Image:
    allowed = "(1 or 3, height, width), uint8 or fractions in [0, 1]"
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DataError("tensor is no image", where=where, got=tuple(image.shape), allowed=allowed)
    if image.is_floating_point():
        low, high = (value.item() for value in image.aminmax())
        if not (0 <= low and high <= 1):
            remedy = "Leave the normalisation to the processor, which does it after the transform."
            raise DataError("image has values that are no colours", where=where, got=(low, high), remedy=remedy)
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError("tensor is no image", where=where, got=str(image.dtype), allowed=allowed)
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().contiguous().numpy())


def _eight_bit(image: Image.Image, where: str | None) -> Image.Image:
    if image.mode == "F":
        raise DataError("image of floating-point pixels", where=where, allowed="integer pixels of 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        allowed = "integer pixels of 8 or 16 bits"
        raise DataError("image of 32-bit pixels", where=where, got=(low, high), allowed=allowed)
    if 0 < high <= 255:  # a bright picture, or the darkest values of 16 bits, which would all become black
        remedy = "Save it with 8 bits per pixel."
        raise DataError("image of 16-bit pixels has values of 8 bits", where=where, got=(low, high), remedy=remedy)
    return Image.fromarray((pixels / 257).round().astype(np.uint8))  # 65535 / 257 = 255; `convert` would clip instead
