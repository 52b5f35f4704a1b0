# SPDX-License-Identifier: Apache-2.0
"""What scripts load: data, class names, models, and where to resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from transformers import AutoModel, AutoProcessor, ProcessorMixin, TrainingArguments

from ..data.columns import Target
from ..data.readable import readable_rows
from ..data.rows import LabelledImages, labelled_images
from ..data.sources import load_source
from ..data.text_files import parse_json, read_json, read_text
from ..encoders.dual_encoder import family
from ..errors import ConfigError, DataError
from ..tasks.task import PROCESSOR_FOLDER
from ..training.arguments import RobustTrainingArguments
from ..training.checkpoint import checkpoint_to_resume
from .progress import is_silent

DEFAULT_MODEL = "openai/clip-vit-base-patch32"  # of commands


def load_images(
    source: str,
    where: str,
    args: Any,
    class_names: Any = None,
    target: Target | None = "label",
) -> LabelledImages:
    """Loads one split of a dataset.

    Args:
        source: as in `load_source`.
        where: the setting or the set's name, for messages.
        args: a script's arguments, with `image_column` and `label_column`.
        class_names: what `read_class_names` returned; labels of text take the order of a list that names them all.
        target: what the rows must have beside their images; None for what their columns say.

    Raises:
        DataError: it cannot be read, holds several splits, or lacks a column.

    Example:
        >>> load_images("photos:train", "train_data", args).class_names
        ['cat', 'dog']
    """
    order = class_names if isinstance(class_names, list) else None
    rows = labelled_images(load_source(source, where), where, args.image_column, args.label_column, order, target)
    if not isinstance(rows, LabelledImages):
        raise DataError("a stream has no numbered rows", where=where, got=source)
    return rows


def usable(rows: LabelledImages, training_args: RobustTrainingArguments) -> LabelledImages:
    """Leaves out images that cannot be used, if `on_bad_image="skip"`; every rank calls it at the same time.

    Args:
        rows: what `load_images` returned.
        training_args: of the training.

    Example:
        >>> train = usable(load_images("photos:train", "train_data", args), training_args)
    """
    if training_args.on_bad_image == "raise":
        return rows
    return readable_rows(rows, training_args.dataloader_num_workers, is_silent(training_args))


@contextmanager
def loading_data(training_args: TrainingArguments) -> Iterator[None]:
    """Lets the main process load first, and says on the screen that it does.

    Args:
        training_args: of the training.

    Example:
        >>> with loading_data(training_args):
        ...     train = load_images("photos:train", "train_data", args)
    """
    console = Console(stderr=True, quiet=is_silent(training_args))
    with training_args.main_process_first(desc="loading data"), console.status("Loading the data"):
        yield


def read_class_names(file: str | None) -> list[str] | dict[str, str] | None:
    """Reads class names: one per line, in label order, or a JSON object from the data's names to words.

    Args:
        file: where they are; one that ends in `.json` holds an object. None for none.

    Raises:
        DataError: it cannot be read, or is no JSON.
        UnsafeFileError: it is no regular file.
        ConfigError: its JSON is no object.

    Example:
        >>> read_class_names("names.txt"), read_class_names("names.json")
        (['tench', 'goldfish'], {'n01440764': 'tench', 'n01443537': 'goldfish'})
    """
    if file is None:
        return None
    if not file.endswith(".json"):
        return read_text(Path(file)).splitlines()
    names = read_json(Path(file))
    if not isinstance(names, dict):
        allowed = "an object from the data's names to words; or a file of another name with one name per line"
        raise ConfigError("file of class names holds none", where=file, got=type(names).__name__, allowed=allowed)
    return names


def read_sets(text: str, where: str) -> dict[str, str]:
    """Reads which data is called what, from JSON.

    Args:
        text: an object from names to sources.
        where: the setting, for messages.

    Raises:
        ConfigError: it is none.

    Example:
        >>> read_sets('{"id": "photos:test"}', "eval_data")
        {'id': 'photos:test'}
    """
    try:
        return dict(parse_json(text, where))
    except (ValueError, TypeError) as error:
        raise ConfigError("no sets by name", where=where, got=text, allowed='{"name": "data", …}') from error


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
    """Loads the processor of a model, or the one that was saved with an adapter.

    Args:
        name: folder or id on the Hub; of an adapter, the processor lies in the subfolder `processor`, or beside it, as
            early versions of this package wrote it.

    Raises:
        ConfigError: there is none.

    Example:
        >>> load_processor("openai/clip-vit-base-patch32").tokenizer.model_max_length
        77
    """
    with _explained("processor", name):
        try:
            return AutoProcessor.from_pretrained(name, subfolder=PROCESSOR_FOLDER)
        except (OSError, ValueError):
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
        raise ConfigError(f"no {what} can be loaded ({reason})", where=name) from error


def wish_to_resume(training_args: TrainingArguments) -> str | None:
    """Returns the checkpoint that `resume_from_checkpoint` asks for; None for a training from the start.

    Args:
        training_args: its `resume_from_checkpoint` may be a folder, or `"true"` or `"last"` for the last whole one
            in `output_dir`.

    Raises:
        CheckpointError: there is none, or it is not whole.

    Example:
        >>> wish_to_resume(RobustTrainingArguments("runs/saft", resume_from_checkpoint="last"))
        'runs/saft/checkpoint-300'
    """
    wish = str(training_args.resume_from_checkpoint or "false")
    if wish.lower() == "false":
        return None
    return checkpoint_to_resume(wish.lower() in ("true", "last") or wish, Path(str(training_args.output_dir)))
