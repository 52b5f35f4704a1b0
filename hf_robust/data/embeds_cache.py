# SPDX-License-Identifier: Apache-2.0
"""The embeddings of the pre-trained model θ₀ for a training set, computed once and kept in a file."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, ProcessorMixin

from ..encoders.dual_encoder import base_model, image_embeds
from ..encoders.pretrained import pretrained_tensors, pretrained_weights
from ..errors import ConfigError, DataError, NonFiniteError
from .collator import ImageCollator, batches_in_order
from .columns import IMAGE, IMAGE_EMBEDS, REFERENCE_EMBEDS
from .publish import stream_sha256
from .rows import LabelledImages, images_alone, labelled_images
from .text_files import check_regular

logger = logging.getLogger(__name__)
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
SHA256 = 32  # bytes of the digest that a file ends with
DEAD = 3600  # seconds without a write; a process that is at work writes after every batch


def with_reference_embeds(
    dataset: Any, model: nn.Module, collator: Any, batch_size: int, workers: int = 0, silent: bool = False
) -> datasets.Dataset:
    """Adds θ₀'s image embeddings to a dataset as the column `reference_embeds`, in float32.

    They come from an Arrow file in `HF_DATASETS_CACHE/hf_robust`, which is memory-mapped, and is written first where
    there is none. Its name stands for θ₀'s vision tower, the image processor, the dataset's fingerprint, size and time
    of image files that it names, and the precision of an autocast around the call. It ends with a digest of what is
    before, and is written anew, with a warning, where that does not fit. Images are not copied.

    Args:
        dataset: a `datasets.Dataset` with a column of images, see `labelled_images`, without transform.
        model: θ₀, or θ₀ with adapters.
        collator: an `ImageCollator`.
        batch_size: images embedded at once; it moves an embedding by no more than rounding.
        workers: processes that open images.
        silent: without a progress bar.

    Returns:
        The dataset, with the same rows in the same order; its images are called `image`, and other columns stay as
        they are, or as `labelled_images` read them.

    Raises:
        ConfigError: images may not look the same every time, so that what is cached would be that of other images.
        DataError: the dataset has a column of that name, or an image cannot be used.
        NonFiniteError: the model gives embeddings that are NaN or infinite.
        UnsafeFileError: something that is no file, a folder for one, has the file's name.

    Example:
        >>> with_reference_embeds(train, clip, ImageCollator(processor), batch_size=64).column_names
        ['image', 'label', 'reference_embeds']
    """
    given = _check_cacheable(dataset, collator)
    dataset = given.to_dataset()
    table = dataset._data  # the rows in the order of the file, of which `dataset` may show some, in its own order
    indices = None if dataset._indices is None else dataset._indices["indices"].to_numpy().astype(np.int64)
    file = _file(_fingerprint(given), dataset, model, collator)
    if not _is_whole(file):
        rows = np.arange(len(table)) if indices is None else np.unique(indices)
        images = datasets.Dataset(table, info=dataset.info, fingerprint=dataset._fingerprint).select_columns(IMAGE)
        device, title = next(model.parameters()).device, None if silent else "Embedding the training set"
        batches = batches_in_order(images.select(rows), collator, batch_size, workers, device, title)
        embeds = (_finite(pretrained_image_embeds(model, batch)) for batch in batches)  # (batch, dim)
        _write(file, _columns(embeds, rows, len(table)))
    whole = datasets.Dataset(table, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint)
    joined = datasets.concatenate_datasets([whole, datasets.Dataset.from_file(str(file))], split=dataset.split, axis=1)
    return joined if indices is None else joined.select(indices)


def with_image_embeds(
    dataset: Any,
    model: nn.Module,
    processor: ProcessorMixin | BaseImageProcessor,
    batch_size: int = 64,
    workers: int = 0,
    silent: bool = False,
) -> datasets.Dataset:
    """Replaces the images of a dataset by their embeddings, for training that leaves the vision tower as it is.

    A learned context, or any adapter of the text tower alone, then trains and is evaluated without the vision tower,
    many times as fast. The embeddings are kept on disk, as those of `with_reference_embeds`, and taken from there the
    next time. Rows can be selected and labels changed afterwards.

    Args:
        dataset: a `datasets.Dataset` with a column of images, see `labelled_images`, without transform.
        model: the dual encoder that will be trained; its adapters have no say.
        processor: its processor, or its image processor.
        batch_size: images embedded at once; it moves an embedding by no more than rounding.
        workers: processes that open images.
        silent: without a progress bar.

    Returns:
        The dataset with a column `image_embeds`, float32, in the place of its images; other columns, of labels, texts
        or whatever there is, stay as they are.

    Raises:
        ConfigError: images may not look the same every time.
        DataError: an image cannot be used.
        NonFiniteError: the model gives embeddings that are NaN or infinite.

    Example:
        >>> with_image_embeds(photos, clip, processor).column_names
        ['label', 'image_embeds']
    """
    how = ImageCollator(processor), batch_size, workers, silent
    embedded = with_reference_embeds(dataset, model, *how)
    return embedded.remove_columns(IMAGE).rename_column(REFERENCE_EMBEDS, IMAGE_EMBEDS)


@torch.no_grad()
def pretrained_image_embeds(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embeds the images of a batch with θ₀, unless they come embedded.

    Args:
        model: θ₀, or θ₀ with adapters.
        inputs: what the data collator returned, on the model's device.

    Returns:
        `(batch, dim)`, L2-normalised, in float32 or better, without gradient.

    Example:
        >>> pretrained_image_embeds(clip, collate(rows)).shape
        torch.Size([2, 512])
    """
    if IMAGE_EMBEDS in inputs:
        return inputs[IMAGE_EMBEDS]
    with pretrained_weights(model):
        return image_embeds(model, **{name: inputs[name] for name in IMAGE_INPUTS if name in inputs})


def is_cacheable(dataset: Any, collator: Any) -> bool:
    """Whether images of a dataset are the same every time, and can be told from those of other datasets.

    Args:
        dataset: any dataset.
        collator: the data collator.
    """
    try:
        _check_cacheable(dataset, collator)
    except (ConfigError, DataError):
        return False
    return True


def _check_cacheable(dataset: Any, collator: Any) -> LabelledImages:
    where, remedy = "cache_reference_embeddings", "Set cache_reference_embeddings=False."
    alone = isinstance(dataset, datasets.Dataset)  # whatever it has beside its images
    rows = images_alone(dataset, "dataset") if alone else labelled_images(dataset, "dataset")
    if not isinstance(rows, LabelledImages) or not isinstance(rows.rows, datasets.Dataset) or rows.columns is None:
        what, got = "dataset has no fingerprint", type(dataset).__name__
        raise ConfigError(what, where=where, got=got, allowed="datasets.Dataset", remedy=remedy)
    if rows.columns.transform is not None:
        what = "images of a dataset with a transform may differ every time"
        raise ConfigError(what, where=where, remedy="Call dataset.reset_format(). Or: " + remedy)
    if type(collator) is not ImageCollator or collator.transform is not None:
        what = "images of another data collator, or with a transform, may differ every time"
        allowed = "ImageCollator without transform"
        raise ConfigError(what, where=where, got=type(collator).__name__, allowed=allowed, remedy=remedy)
    names = rows.rows.column_names
    if IMAGE_EMBEDS in names:
        raise ConfigError("images are embedded already", where=where, got=names, remedy=remedy)
    if REFERENCE_EMBEDS in names:
        remedy = f"Use dataset.remove_columns({REFERENCE_EMBEDS!r})."
        raise DataError("dataset has the column already", where=where, got=REFERENCE_EMBEDS, remedy=remedy)
    return rows


# --- the file ---


def _fingerprint(given: LabelledImages) -> str:
    """Of images and their order, whatever is beside them."""
    shown = hashlib.sha256(given.numbers.astype("<i8").tobytes()).hexdigest()
    return f"{given.rows._fingerprint} {given.columns and given.columns.image} {shown}"


def _file(fingerprint: str, dataset: datasets.Dataset, model: nn.Module, collator: ImageCollator) -> Path:
    digest = hashlib.sha256(_named_files(dataset).encode())
    for part in (fingerprint, collator.image_processor.to_json_string(), _precision(model)):
        digest.update(part.encode() + b"\0")
    digest.update(base_model(model).config.to_json_string().encode())  # the activation function, for one
    for name, tensor in pretrained_tensors(model, "vision"):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_robust" / f"reference-{digest.hexdigest()[:32]}.arrow"


def _named_files(dataset: datasets.Dataset) -> str:
    """What tells image files, of which a dataset holds the paths alone, from others of these names."""
    stated = []
    for chunk in dataset._data.column(IMAGE).chunks:
        if pa.types.is_struct(chunk.type):
            alone = pc.if_else(chunk.field("bytes").is_null(), chunk.field("path"), None)
            for path in filter(None, alone.to_pylist()):
                file = os.stat(path) if os.path.exists(path) else None
                stated.append((os.path.abspath(path), file and file.st_size, file and file.st_mtime_ns))
    return repr(stated)


def _precision(model: nn.Module) -> str:
    device = next(model.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as the model"


def _finite(embeds: Tensor) -> np.ndarray:
    if not embeds.isfinite().all():  # the file would give them again after the model has been mended
        raise NonFiniteError("embeddings of images are NaN or infinite", where="pre-trained model")
    return embeds.float().cpu().numpy()


def _columns(embeds: Iterator[np.ndarray], rows: np.ndarray, length: int) -> Iterator[list[np.ndarray | None]]:
    """The column in parts; a row of the file that is not among the sorted `rows` has nothing."""
    done = embedded = 0
    for batch in embeds:
        those = rows[embedded : embedded + len(batch)]
        column: list[np.ndarray | None] = [None] * int(those[-1] + 1 - done)
        for row, embed in zip(those, batch, strict=True):
            column[row - done] = embed
        yield column
        done, embedded = done + len(column), embedded + len(batch)
    yield [None] * (length - done)


def _is_whole(file: Path) -> bool:
    """Whether a file is there as `_write` left it."""
    try:
        check_regular(file)
        with file.open("rb") as stream:
            whole = stream_sha256(stream, os.fstat(stream.fileno()).st_size - SHA256) == stream.read()
        problem = "its content is not that of its digest"
    except FileNotFoundError:
        return False
    except OSError as error:  # of a disk, say
        whole, problem = False, str(error.strerror)
    if not whole:
        logger.warning("The cached embeddings in %s are computed anew: %s", file, problem)
    return whole


def _write(file: Path, columns: Iterator[list[np.ndarray | None]]) -> None:
    """Writes a file that is complete or not there; several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid4().hex}.partial")  # a process's number is its own on one machine alone
    schema = pa.schema({REFERENCE_EMBEDS: pa.list_(pa.float32())})
    try:
        with partial.open("w+b") as stream:
            _remove_dead(file.parent, os.fstat(stream.fileno()).st_mtime)
            with pa.ipc.new_stream(stream, schema) as writer:
                for column in columns:
                    writer.write_batch(pa.record_batch([pa.array(column, pa.list_(pa.float32()))], schema=schema))
                    stream.flush()
            length = stream.tell()
            stream.seek(0)
            digest = stream_sha256(stream, length)
            stream.seek(length)
            stream.write(digest)  # readers of Arrow stop before it
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _remove_dead(folder: Path, now: float) -> None:
    """Removes what processes that were killed have left; `now` is by the clock of the folder's file system."""
    for partial in folder.glob("*.partial"):
        with suppress(OSError):  # another process may have removed it, and a stranger's file may stay
            if partial.stat().st_mtime < now - DEAD:
                partial.unlink()
