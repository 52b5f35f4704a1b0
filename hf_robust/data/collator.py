# SPDX-License-Identifier: Apache-2.0
"""From dataset rows to model inputs: what a dataset must hold, how an image is opened, how rows become a batch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, ProcessorMixin

from ..errors import DataError

# columns of cached embeddings, see `hf_robust.data.embeds_cache`: beside the images, and in their place
REFERENCE_EMBEDS, IMAGE_EMBEDS = "reference_embeds", "image_embeds"
MAX_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 20


class ImageCollator:
    """Turns a list of `{"image", "label"}` rows into the tensors a `ZeroShotClassifier` takes.

    An image is a `PIL.Image.Image`, the path of a file, or the `{"bytes": ..., "path": ...}` dictionary of
    `datasets.Image(decode=False)`. See `load_rgb` for how it is opened. The column `reference_embeds`,
    where the trainer has cached the pre-trained model's embeddings, becomes a tensor; other columns are ignored.
    Rows with `image_embeds`, see `with_image_embeds`, need no image.

    Args:
        processor: the model's processor, or its image processor alone.

    Example:
        >>> collate = ImageCollator(processor)
        >>> batch = collate([{"image": Image.new("L", (30, 20)), "label": 4}])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([1, 3, 224, 224]), tensor([4]))
    """

    def __init__(self, processor: ProcessorMixin | BaseImageProcessor) -> None:
        self.image_processor = processor if isinstance(processor, BaseImageProcessor) else processor.image_processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches rows.

        Args:
            rows: rows of a dataset.

        Returns:
            `pixel_values` `(batch, channels, height, width)`, or `image_embeds` `(batch, dim)` where the rows have
            them; `labels` `(batch,)` unless no row has one; `reference_embeds` `(batch, dim)` where the rows have
            them; and what else the image processor returns (`pixel_attention_mask` and `spatial_shapes` of SigLIP 2).

        Raises:
            DataError: a row has no image, its image cannot be used, or its label is no integer from 0.
        """
        batch = {} if any(IMAGE_EMBEDS in row for row in rows) else self._images(rows)
        if any("label" in row for row in rows):
            batch["labels"] = torch.tensor([_label(row) for row in rows])  # (batch,)
        for column in (REFERENCE_EMBEDS, IMAGE_EMBEDS):
            if any(column in row for row in rows):
                embeds = [_column(row, column) for row in rows]
                batch[column] = torch.tensor(embeds, dtype=torch.float32)  # (batch, dim)
        return batch

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [load_rgb(_column(row, "image")) for row in rows]
        return dict(self.image_processor(images=images, return_tensors="pt"))


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
    for batch in tqdm(loader, desc=title, disable=title is None):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def load_rgb(image: Image.Image | str | Path | Mapping[str, Any]) -> Image.Image:
    """Opens an image as upright 8-bit RGB.

    The size is checked before anything is decoded. EXIF orientation is applied, 16-bit grey is scaled to 8 bits,
    transparency is dropped (as in CLIP's own preprocessing), and of an animation the first frame is taken.

    Args:
        image: an image, the path of one, or `{"bytes": ..., "path": ...}`.

    Raises:
        DataError: when it is no image, is broken, has more than 50 million pixels, or is more than 20 times as long as
            it is wide (resizing its short side would take gigabytes).

    Example:
        >>> load_rgb(Image.new("LA", (4, 3))).mode
        'RGB'
    """
    opened, where = _open(image)
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise DataError("image is too large", where=where, got=(width, height), allowed="at most 50 million pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError("image is too elongated", where=where, got=(width, height), allowed="sides within 20:1")
    try:
        return _eight_bit(ImageOps.exif_transpose(opened), where).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise for truncated or broken data
        raise DataError(f"image cannot be decoded ({error})", where=where) from error


def _open(image: Image.Image | str | Path | Mapping[str, Any]) -> tuple[Image.Image, str | None]:
    if isinstance(image, Image.Image):
        return image, None
    path: Any = image.get("path") if isinstance(image, Mapping) else image
    content = image.get("bytes") if isinstance(image, Mapping) else None
    if content is None and not isinstance(path, str | Path):
        allowed = 'a PIL image, a path, or {"bytes": ..., "path": ...}'
        raise DataError("image is of an unknown type", got=type(image).__name__, allowed=allowed)
    where = None if path is None else str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `load_rgb` has a lower limit
            return Image.open(io.BytesIO(Path(path).read_bytes() if content is None else content)), where
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image cannot be opened ({error})", where=where) from error


def _eight_bit(image: Image.Image, where: str | None) -> Image.Image:
    if image.mode == "F":
        raise DataError("image of floating-point pixels", where=where, allowed="integer pixels of 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError("image of 32-bit pixels", where=where, allowed="integer pixels of 8 or 16 bits")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))  # 65535 / 257 = 255; `convert` would clip instead


def _column(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"row without `{name}`", got=sorted(row), remedy="Rename the dataset's columns.")
    return row[name]


def _label(row: Mapping[str, Any]) -> int:
    label = _column(row, "label")
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
        raise DataError("label is no class index", got=label, allowed="integers from 0")
    return int(label)


def feature_class_names(dataset: Any) -> list[str] | None:
    """Returns the names of the `label` feature of a `datasets.Dataset`, None where there are none.

    Args:
        dataset: any dataset.
    """
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset) or dataset.features is None:
        return None
    label = dataset.features.get("label")
    return list(label.names) if isinstance(label, datasets.ClassLabel) else None


def check_dataset(dataset: Any, n_classes: int, where: str) -> None:
    """Refuses a dataset that cannot be trained or evaluated on; what a foreign dataset holds, the collator checks.

    Args:
        dataset: any dataset.
        n_classes: number of classes its labels choose from.
        where: the dataset's name, for the message.

    Raises:
        DataError: it is empty, lacks `image` (or `image_embeds`) or `label`, or has a label outside the classes.
    """
    if isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
        return
    if len(dataset) == 0:
        raise DataError("dataset is empty", where=where, got=0, allowed="at least one image")
    if not isinstance(dataset, datasets.Dataset):
        return
    for column in ("label",) if IMAGE_EMBEDS in dataset.column_names else ("image", "label"):
        if column not in dataset.column_names:
            remedy = f"Use dataset.rename_column(..., {column!r})."
            raise DataError(f"no column {column!r}", where=where, got=dataset.column_names, remedy=remedy)
    labels = np.asarray(dataset.with_format(None)["label"][:])  # (images,)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError("labels are no class indices", where=where, got=labels[0], allowed="integers from 0")
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        row, label = int(wrong[0]), int(labels[wrong[0]])
        raise DataError(f"label of row {row} is no class", where=where, got=label, allowed=f"0 to {n_classes - 1}")
