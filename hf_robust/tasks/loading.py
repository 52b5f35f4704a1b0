# SPDX-License-Identifier: Apache-2.0
"""A task as it was saved: its dual encoder, what was learned around it, its settings."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterFileError, ConfigError, HfRobustError, close_matches
from .choose import TASKS
from .class_names import ZeroShotClassifier
from .files import load_own_tensors, read_settings
from .saved_encoder import SavedModel, check_dtype, find_model, in_short, load_encoder
from .task import CONFIG_FILE, Task


def load_task(
    cls: type[Task],
    name: str | Path,
    base: str | Path | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
    words: Mapping[str, Any],
) -> Task:
    """Loads a task, see `Task.from_pretrained`.

    Args:
        cls: the class that was asked for; `Task` for the one that was trained.
        name: as of `Task.from_pretrained`.
        base: likewise.
        dtype: likewise.
        device: likewise.
        revision: likewise.
        words: class names and templates for a model that was saved without any, by the names of their arguments.

    Returns:
        The task in eval mode.

    Raises:
        ConfigError: as `Task.from_pretrained`.
        AdapterFileError: likewise.
    """
    check_dtype(dtype)
    where = _device(device)
    model = find_model(name, revision)
    settings = _settings(cls, model, words)
    kind = _kind(cls, settings["task"], model)
    encoder, processor = load_encoder(model, model.adapters(settings), base, dtype)
    task = _built(kind, encoder.to(where).eval(), processor, settings, model)
    load_own_tensors(task, model.folder)
    return task.eval()


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, TypeError, AssertionError) as error:  # the last from a PyTorch without CUDA
        raise ConfigError("no device", where="device", got=str(device), remedy=in_short(error)) from error
    if where.type == "meta":
        raise ConfigError("a device that holds no values", where="device", got=str(device))
    return where


def _settings(cls: type[Task], model: SavedModel, words: Mapping[str, Any]) -> dict[str, Any]:
    if (model.folder / CONFIG_FILE).exists():
        if words:
            remedy = "Leave them out; other names can be given to predict(images, class_names=...)."
            raise ConfigError("the model has class names and templates", where=", ".join(words), remedy=remedy)
        return read_settings(model.folder)
    if "class_names" in words and cls.name == ZeroShotClassifier.name:
        return {"task": cls.name, **words}
    what = "it is not said what was trained, nor what the classes are"
    remedy = "RobustTrainer.save_model writes the file. For a model of another program use "
    remedy += "ZeroShotClassifier.from_pretrained(name, class_names=[...]), in a command --class_names."
    raise AdapterFileError(what, where=model.name, allowed=f"a model with {CONFIG_FILE}", remedy=remedy)


def _kind(cls: type[Task], saved: Any, model: SavedModel) -> type[Task]:
    if cls is not Task and cls.name == saved:
        return cls
    if not isinstance(saved, str) or saved not in TASKS:
        where, remedy = f"{model.name}, {CONFIG_FILE}", close_matches(str(saved), list(TASKS))
        raise AdapterFileError("unknown task", where=where, got=saved, remedy=remedy)
    if cls is Task:
        return TASKS[saved]
    right = TASKS[saved].__name__
    what, remedy = f"the model was trained as {right}", f"Use {right}.from_pretrained(...)."
    raise ConfigError(what, where=model.name, got=cls.__name__, allowed=right, remedy=remedy)


def _built(kind: type[Task], encoder: Any, processor: Any, settings: Mapping[str, Any], model: SavedModel) -> Task:
    known = [name for name in signature(kind).parameters if name not in ("model", "processor")]
    where = f"{model.name}, {CONFIG_FILE}"
    try:
        return kind(encoder, processor, **{name: settings[name] for name in known if name in settings})
    except HfRobustError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # values of other types than were written
        raise AdapterFileError("settings of the task cannot be used", where=where, got=in_short(error)) from error
