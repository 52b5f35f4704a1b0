# SPDX-License-Identifier: Apache-2.0
"""Images as a user has them, without labels: paths, addresses, pictures, arrays, a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_dataset import Column
from PIL import Image

from ..errors import DataError
from .columns import IMAGE
from .images import UnopenedImage, load_rgb
from .rows import LabelledImages, images_alone

WEB = ("http://", "https://")
MOST_BYTES = 100 * 2**20  # of a file that is downloaded
PATIENCE = 30  # seconds without a byte
ALLOWED = "paths, http(s) addresses of files, PIL images, uint8 arrays (height, width, 3), or a dataset of images"


@dataclass(frozen=True)
class GivenImage(UnopenedImage):
    """An image that may be an array, or the address of a file, which is downloaded when the image is opened."""

    def open(self) -> Image.Image:
        """Returns the image as upright 8-bit RGB.

        Raises:
            DataError: what `load_rgb` and `download` raise, it is an array and no image, or bytes are none.
        """
        image = self.content
        if isinstance(image, torch.Tensor) and image.numel() == 0:
            raise DataError("image without pixels", where=self.where, got=tuple(image.shape))
        if isinstance(image, Mapping) and not isinstance(image.get("bytes"), bytes | bytearray | None):
            got = type(image["bytes"]).__name__
            raise DataError("image is of an unknown type", where=self.where, got=got, allowed="bytes of a file")
        if isinstance(image, np.ndarray):
            image = _from_array(image, self.where)
        if isinstance(image, str) and image.startswith(WEB):
            image = {"bytes": download(image, self.where), "path": image}
        return load_rgb(image, self.where)


@dataclass(frozen=True, eq=False)
class GivenImages(torch.utils.data.Dataset):
    """Rows of unopened images.

    Args:
        images: one for a row.
    """

    images: Sequence[Any]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {IMAGE: GivenImage(self.images[index], f"image {index}")}


def given_images(images: Any) -> GivenImages | LabelledImages:
    """Returns rows of the images that a user gives; none is opened, and nothing is downloaded.

    Args:
        images: one, or a sequence of them: the path of a file, its address (`http://` or `https://`), a
            `PIL.Image.Image`, an array `(height, width, 3)` or `(height, width)` of uint8, or what else `load_rgb`
            takes; or a `datasets.Dataset`, or a column of one, `dataset["image"]`.

    Raises:
        DataError: it is something else.

    Example:
        >>> [len(given_images(one)) for one in ("a.jpg", ["a.jpg", "b.jpg"], load_dataset("me/photos", split="test"))]
        [1, 2, 300]
    """
    if isinstance(images, Column) and isinstance(images.source, datasets.Dataset):
        images = images.source.select_columns(images.column_name)
    if isinstance(images, datasets.Dataset):
        return images_alone(images, "images") if len(images) else GivenImages([])
    if _is_one(images):
        return GivenImages([images])
    if not isinstance(images, Sequence | np.ndarray | torch.Tensor):
        raise DataError("no images", where="images", got=type(images).__name__, allowed=ALLOWED)
    return GivenImages(images)  # type: ignore[arg-type]  # an array of images is as good as a sequence


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return isinstance(images, str | Path | Image.Image | Mapping)


def _from_array(image: np.ndarray, where: str) -> Image.Image:
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits:
        got, allowed = f"{image.shape} {image.dtype}", "(height, width, 3) or (height, width), uint8"
        raise DataError("array is no image", where=where, got=got, allowed=allowed)
    if image.size == 0:
        raise DataError("image without pixels", where=where, got=image.shape)
    return Image.fromarray(image)


def download(address: str, where: str) -> bytes:
    """Returns the file at an address of the web.

    Args:
        address: it begins with `http://` or `https://`.
        where: which image it is, for messages.

    Raises:
        DataError: it cannot be had, or has more than 100 MiB.

    Example:
        >>> len(download("https://example.org/cat.jpg", "image 0"))
        48120
    """
    import requests  # takes a while, and few need it

    where = f"{where}, {address}"
    content = bytearray()
    try:
        with requests.get(address, stream=True, timeout=PATIENCE) as answer:
            answer.raise_for_status()
            for part in answer.iter_content(2**16):
                content += part
                if len(content) > MOST_BYTES:
                    raise DataError("file is too large", where=where, allowed=f"{MOST_BYTES:,} bytes")
    except (requests.RequestException, ValueError) as error:  # of an address that is none, urllib3's own
        if isinstance(error, DataError):
            raise
        raise DataError(f"image cannot be downloaded ({type(error).__name__}: {error})", where=where) from error
    return bytes(content)
