# SPDX-License-Identifier: Apache-2.0
"""Trained models as ONNX files, which run without PyTorch."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.embeds_cache import IMAGE_INPUTS
from ..data.publish import TEMPORARY, seal, sync
from ..encoders.dual_encoder import logit_bias, logit_scale, text_tokenizer, tokenize
from ..errors import ConfigError, needs_extra
from ..tasks.several_labels import SeveralLabels
from ..tasks.task import Task
from .modules import image_classifier, towers

TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")  # loggers that name what they skip
BLANK = Image.new("RGB", (60, 40))


def to_onnx(task: Task, path: str | Path, parts: Literal["classifier", "towers"] = "classifier") -> None:
    """Writes a trained task as ONNX, with adapters merged, in float32, for batches of any size.

    - `"classifier"`: one file, from `pixel_values` to `logits`: the vision tower, and the class names baked into a
      linear head as the classifier answers now; inside `classifier.classes(names)` it is the head of these names. Its
      metadata, each as JSON, are `class_names`, `activation` (which makes probabilities of logits, `"softmax"` or
      `"sigmoid"`), `image_processor`, and of `SeveralLabels` the `threshold`.
    - `"towers"`: a folder of `image_encoder.onnx` (`pixel_values` to `image_embeds`) and `text_encoder.onnx`
      (`input_ids` and, where the tower uses one, `attention_mask` to `text_embeds`), both to unit vectors, with the
      files of the processor. Metadata of the first: `image_processor`; of the second: `padding`, `max_length`, and
      `logit_scale` and `logit_bias`, by which cosines become logits.

    Images are of the size that the task's processor makes; SigLIP 2's of any shape, with as many patches as its
    processor makes: `pixel_attention_mask` and `spatial_shapes` are inputs, too. The task stays as it is. A file is
    there whole or not at all and takes the place of one of its name. Above 2 GB, ONNX keeps weights in a second file
    beside it.

    Args:
        task: a trained task; for `"classifier"` one with class names.
        path: for `"classifier"` a file that ends in `.onnx`, for `"towers"` a folder.
        parts: `"classifier"` or `"towers"`.

    Raises:
        ConfigError: onnx or onnxscript is not installed, `parts` is unknown, `path` is none of the kind or lies below
            a file, the task has no class names, or its adapters cannot be merged.
        NonFiniteError: a value of the model or its head is NaN or infinite.

    Example:
        >>> to_onnx(classifier, "birds.onnx")
        >>> session = onnxruntime.InferenceSession("birds.onnx")
        >>> session.run(["logits"], {"pixel_values": pixel_values})[0].shape
        (8, 200)
    """
    path = Path(path)
    with needs_extra("onnx"):  # torch.onnx.export needs them
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    if parts == "classifier":
        if path.suffix != ".onnx" or path.is_dir():
            raise ConfigError("no name of an ONNX file", where="path", got=str(path), allowed="a file *.onnx")
        _check_folder(path.parent)
        module, inputs = image_classifier(task), _images(task)
        about = {"class_names": module.class_names, **_about_answers(task), **_about_images(task)}
        with _written_whole(path.parent) as folder:
            _export(module, inputs, "logits", folder / path.name, about)
    elif parts == "towers":
        if path.suffix == ".onnx" or path.is_file():
            raise ConfigError("no name of a folder", where="path", got=str(path), allowed="a folder for two files")
        _check_folder(path)
        _export_towers(task, path)
    else:
        raise ConfigError("unknown parts", where="parts", got=parts, allowed="'classifier', 'towers'")


def _export_towers(task: Task, path: Path) -> None:
    images, texts = towers(task)
    pictures, about_images = _images(task), _about_images(task)
    about, prompts = _about_texts(task), tokenize(task.processor, ["a photo of a cat.", "a photo."], task.model)
    tokens = about["max_length"] if about["padding"] == "longest" else None
    with _written_whole(path) as folder:
        _export(images, pictures, "image_embeds", folder / "image_encoder.onnx", about_images)
        _export(texts, prompts, "text_embeds", folder / "text_encoder.onnx", about, tokens)
        task.processor.save_pretrained(folder)


# --- what the files say about themselves ---


def _about_images(task: Task) -> dict[str, Any]:
    return {"image_processor": json.loads(task.processor.image_processor.to_json_string())}


def _about_answers(task: Task) -> dict[str, Any]:
    if isinstance(task, SeveralLabels):
        return {"activation": "sigmoid", "threshold": task.threshold}
    return {"activation": "softmax"}


def _about_texts(task: Task) -> dict[str, Any]:
    tokenizer, bias = text_tokenizer(task.processor, task.model), logit_bias(task.model)
    return {
        "padding": tokenizer.padding,
        "max_length": tokenizer.max_length,
        "logit_scale": logit_scale(task.model).item(),
        "logit_bias": 0.0 if bias is None else bias.item(),
    }


# --- the export ---


def _images(task: Task) -> dict[str, Tensor]:
    """Two, as a batch of one would be taken for the only size."""
    made: Any = task.processor.image_processor(images=[BLANK, BLANK], return_tensors="pt")
    return {name: made[name] for name in IMAGE_INPUTS if name in made}


@torch.no_grad()
def _export(
    module: nn.Module,
    inputs: dict[str, Tensor],
    output: str,
    path: Path,
    about: Mapping[str, Any],
    tokens: int | None = None,  # at most; None where the second dimension is fixed
) -> None:
    sizes = {0: torch.export.Dim("batch")} | ({} if tokens is None else {1: torch.export.Dim("tokens", max=tokens)})
    shapes = dict.fromkeys(inputs, sizes)
    with _quiet():  # torch.onnx alone would fix a size where it cannot keep it free; torch.export says so
        exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes)
        how: Any = {"dynamic_shapes": shapes, "output_names": [output], "dynamo": True, "verbose": False}
        program: Any = torch.onnx.export(exported, **how)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ConfigError("no folder", where="path", got=str(there), allowed="a folder, or one to be made in another")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder in a folder, whose files go up when all have been written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as name:
        temporary = Path(name)
        temporary.chmod(folder.stat().st_mode & 0o777)  # files become as readable as their folder
        yield temporary
        seal(temporary)
        for file in sorted(temporary.iterdir(), reverse=True):  # weights beside a file before the file
            os.replace(file, folder / file.name)
        sync(folder)
