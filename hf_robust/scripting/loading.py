# SPDX-License-Identifier: Apache-2.0
"""What scripts load: data, class names, models, and where to resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from peft import PeftConfig
from rich.console import Console
from transformers import AutoModel, AutoProcessor, ProcessorMixin, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..data.sources import load_source
from ..encoders.dual_encoder import family
from ..errors import ConfigError, DataError, close_matches
from .progress import is_silent


def feature_class_names(dataset: Dataset) -> list[str] | None:
    """Returns the names of the `label` feature of a dataset; None where there are none.

    Args:
        dataset: what `load_images` returned.
    """
    label = dataset.features.get("label")
    return list(label.names) if isinstance(label, ClassLabel) else None


def load_images(
    source: str, where: str, args: Any, class_names: list[str] | None, only_these: bool = False
) -> Dataset:
    """Loads a dataset and gives it the columns `image`, not yet decoded, and `label`; `where` names it in messages."""
    dataset = load_source(source, where)
    for ours, theirs in (("image", args.image_column), ("label", args.label_column)):
        if ours not in dataset.column_names and theirs in dataset.column_names:
            dataset = dataset.rename_column(theirs, ours)
    label = dataset.features.get("label")
    if isinstance(label, ClassLabel):
        return dataset.cast_column("label", ClassLabel(names=[name.replace("_", " ") for name in label.names]))
    if label is not None and label.dtype == "string":
        return number_labels(dataset, source, class_names, only_these)
    return dataset


def number_labels(dataset: Dataset, source: str, class_names: list[str] | None, only_these: bool) -> Dataset:
    """Makes class indices of labels that are text; class names that are known already keep their order."""
    found = set(dataset.unique("label"))
    unknown = sorted(found - set(class_names or found))
    if unknown and only_these:
        remedy = close_matches(unknown[0], class_names or [])
        raise DataError("label is outside the class names", where=source, got=unknown[0], remedy=remedy)
    names = sorted(found) if unknown or class_names is None else class_names
    return dataset.cast_column("label", ClassLabel(names=names))


@contextmanager
def loading_data(training_args: TrainingArguments) -> Iterator[None]:
    """Lets the main process load first, and says on the screen that it does.

    Args:
        training_args: of the training.

    Example:
        >>> with loading_data(training_args):
        ...     train = load_images("photos/train", "train_data", args, None)
    """
    console = Console(stderr=True, quiet=is_silent(training_args))
    with training_args.main_process_first(desc="loading data"), console.status("Loading the data"):
        yield


def read_class_names(file: str | None) -> list[str] | None:
    """Reads class names, one per line, in label order.

    Args:
        file: where they are; None for none.

    Raises:
        ConfigError: it cannot be read.

    Example:
        >>> read_class_names("names.txt")
        ['cat', 'dog']
    """
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file of class names cannot be read", where=file, got=str(error)) from error


def load_model(name: str, dtype: str) -> Any:
    """Loads a dual encoder.

    Args:
        name: folder or id on the Hub.
        dtype: precision of the weights.

    Raises:
        ConfigError: there is none.

    Example:
        >>> load_model("openai/clip-vit-base-patch32", "float32").dtype
        torch.float32
    """
    with _explained("model", name):
        model = AutoModel.from_pretrained(name, dtype=dtype)
    family(model)  # refuses what is no dual encoder
    return model


def load_processor(name: str) -> ProcessorMixin:
    """Loads a model's processor.

    Args:
        name: folder or id on the Hub.

    Raises:
        ConfigError: there is none.

    Example:
        >>> load_processor("openai/clip-vit-base-patch32").tokenizer.model_max_length
        77
    """
    with _explained("processor", name):
        return AutoProcessor.from_pretrained(name)


def load_adapter_config(name: str) -> PeftConfig:
    """Loads the configuration of an adapter.

    Args:
        name: folder or id on the Hub.

    Raises:
        ConfigError: there is none.

    Example:
        >>> load_adapter_config("me/clip-saft").base_model_name_or_path
        'openai/clip-vit-base-patch32'
    """
    with _explained("adapter", name):
        return PeftConfig.from_pretrained(name)


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # of transformers, in many lines
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(f"no {what} can be loaded", where=name, got=reason) from error


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Returns the checkpoint that `resume_from_checkpoint` asks for; None for a training from the start.

    Args:
        training_args: its `resume_from_checkpoint` may be a folder, or `"true"` or `"last"` for the newest in
            `output_dir`.

    Raises:
        ConfigError: there is none.

    Example:
        >>> checkpoint_to_resume(RobustTrainingArguments("runs/saft", resume_from_checkpoint="last"))
        'runs/saft/checkpoint-300'
    """
    wish, output = training_args.resume_from_checkpoint, str(training_args.output_dir)
    if wish is None or str(wish).lower() == "false":
        return None
    if str(wish).lower() not in ("true", "last"):
        folder: str | None = str(wish)
    else:
        folder = get_last_checkpoint(output) if Path(output).is_dir() else None
    if folder is None or not (Path(folder) / TRAINER_STATE_NAME).is_file():
        what = "no checkpoint to resume from"
        raise ConfigError(what, where="resume_from_checkpoint", got=folder or output, allowed="a checkpoint's folder")
    return folder
