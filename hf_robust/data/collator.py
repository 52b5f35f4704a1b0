# SPDX-License-Identifier: Apache-2.0
"""From dataset rows to model inputs: how rows become a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, ProcessorMixin

from ..errors import DataError
from .columns import IMAGE, IMAGE_EMBEDS, LABEL, REFERENCE_EMBEDS
from .draws import DRAW, drawing
from .images import UnopenedImage, load_rgb


class ImageCollator:
    """Turns a list of `{"image", "label"}` rows into the tensors a `ZeroShotClassifier` takes.

    An image is a `PIL.Image.Image`, the path of a file, the `{"bytes": ..., "path": ...}` dictionary of
    `datasets.Image(decode=False)`, or a tensor; see `load_rgb` for how it is opened. Images are opened one at a time.
    The column `reference_embeds`, where the trainer has cached the pre-trained model's embeddings, becomes a tensor;
    other columns are ignored. Rows with `image_embeds`, see `with_image_embeds`, need no image.

    Args:
        processor: the model's processor, or its image processor alone.
        transform: augmentation, from an opened RGB `PIL.Image.Image` to another, or to a tensor as torchvision's
            transforms return it; without resizing to the model's size and without normalisation, which the processor
            does. `RobustTrainer` uses it in training alone, and seeds the global generators of Python, numpy and torch
            for every image, by seed, epoch and row: a resumed run sees the same images, with any number of workers or
            ranks. It cannot seed a generator of the transform's own (albumentations, a `torch.Generator`,
            `np.random.default_rng()`) or of an accelerator: let the transform draw from the global ones, or make its
            generator anew from them in every call, as `np.random.default_rng(np.random.randint(2**31))`.

    Example:
        >>> collate = ImageCollator(processor)
        >>> batch = collate([{"image": Image.new("L", (30, 20)), "label": 4}])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([1, 3, 224, 224]), tensor([4]))
        >>> augment = ImageCollator(processor, transform=torchvision.transforms.v2.RandomHorizontalFlip())
    """

    def __init__(
        self,
        processor: ProcessorMixin | BaseImageProcessor,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.image_processor = processor if isinstance(processor, BaseImageProcessor) else processor.image_processor
        self.transform = transform

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches rows.

        Args:
            rows: rows of a dataset.

        Returns:
            `pixel_values` `(batch, channels, height, width)`, or `image_embeds` `(batch, dim)` where the rows have
            them; `labels` `(batch,)` unless no row has one; `reference_embeds` `(batch, dim)` where the rows have
            them; and what else the image processor returns (`pixel_attention_mask` and `spatial_shapes` of SigLIP 2).

        Raises:
            DataError: there are no rows, or one has no image, an image that cannot be used, or a label that is no
                integer from 0.
        """
        batch = self.inputs(rows)
        if any(LABEL in row for row in rows):
            batch["labels"] = torch.tensor([index_of(row, LABEL) for row in rows])  # (batch,)
        return batch

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches the images of rows alone; see `hf_robust.data.target_collators` for what may be beside them.

        Args:
            rows: rows of a dataset.
        """
        if not rows:
            raise DataError("batch without rows", allowed="at least one")
        batch = {} if any(IMAGE_EMBEDS in row for row in rows) else self._images(rows)
        for column in (REFERENCE_EMBEDS, IMAGE_EMBEDS):
            if any(column in row for row in rows):
                embeds = [value_of(row, column) for row in rows]
                batch[column] = torch.tensor(embeds, dtype=torch.float32)  # (batch, dim)
        return batch

    def without_transform(self) -> ImageCollator:
        """Returns a collator that shows images as they are, for evaluation and everything that is computed once."""
        return self if self.transform is None else ImageCollator(self.image_processor)

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        parts = [self._image(row) for row in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _image(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        image = value_of(row, IMAGE)
        with drawing(row, "image"):
            opened = load_rgb(image)
            if self.transform is not None:
                where = image.where if isinstance(image, UnopenedImage) else None
                opened = load_rgb(self.transform(opened), where)
        return dict(self.image_processor(images=[opened], return_tensors="pt"))  # (1, ...) each


class OpeningCollator:
    """Gives another collator rows with opened RGB images, under the limits of `load_rgb`.

    Args:
        collator: the user's.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Opens the images of the rows, and batches them."""
        return self.collator([self._opened(row) for row in rows])

    def _opened(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in row.items() if name != DRAW}
        if IMAGE in row:
            with drawing(row, "image"):
                found[IMAGE] = load_rgb(row[IMAGE])
        return found


def n_images(batch: Mapping[str, Tensor]) -> int:
    """Returns the number of images in a batch of images or of their embeddings.

    Args:
        batch: what the data collator returned.
    """
    return len(batch[IMAGE_EMBEDS] if IMAGE_EMBEDS in batch else batch["pixel_values"])


def batches_in_order(
    dataset: Any,
    collator: Callable[[list[Any]], dict[str, Tensor]],
    batch_size: int,
    workers: int,
    device: torch.device,
    title: str | None,
) -> Iterator[dict[str, Tensor]]:
    """Yields every row of a dataset once, in order.

    Args:
        dataset: rows for the collator.
        collator: makes a batch of rows.
        batch_size: rows in a batch; the last may have fewer.
        workers: processes that open images.
        device: where the tensors go.
        title: of the progress bar; None for no bar.

    Yields:
        Batches, their tensors on the device.

    Example:
        >>> device = torch.device("cpu")
        >>> [len(batch["labels"]) for batch in batches_in_order(photos, ImageCollator(processor), 4, 0, device, None)]
        [4, 4, 1]
    """
    generator = torch.Generator()  # a loader without one draws from the global one
    loader: Any = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collator, generator=generator)
    for batch in tqdm(loader, desc=title, leave=False, disable=title is None):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Returns what a row has in a column.

    Args:
        row: of a dataset.
        name: of the column.

    Raises:
        DataError: it has nothing there.
    """
    if row.get(name) is None:
        raise DataError(f"row without `{name}`", got=sorted(row), remedy="Rename the dataset's columns.")
    return row[name]


def row_place(row: Mapping[str, Any], number: int) -> str:
    """Returns where a row is, for messages: dataset and row, as far as the row knows.

    Args:
        row: of a dataset.
        number: of the row in its batch.
    """
    image = row.get(IMAGE)
    return image.where if isinstance(image, UnopenedImage) else f"row {number} of a batch"


def index_of(row: Mapping[str, Any], name: str) -> int:
    """Returns the index of a class, or of an identity, that a row has in a column.

    Args:
        row: of a dataset.
        name: of the column.

    Raises:
        DataError: it is none.
    """
    index = value_of(row, name)
    index = index.item() if isinstance(index, Tensor) and index.ndim == 0 else index
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
        raise DataError(f"{name} is no class index", got=index, allowed="integers from 0")
    return int(index)
