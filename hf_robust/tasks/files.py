# SPDX-License-Identifier: Apache-2.0
"""The files in which a task is saved beside its dual encoder: which task it is, its settings, its own tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from ..data.tensor_files import read_weights
from ..data.text_files import read_json
from ..errors import AdapterFileError, NonFiniteError
from .task import CONFIG_FILE, WEIGHTS_FILE, Task

ADAPTERS = "adapters"  # in the settings: which were active, where that is not the one in the folder itself
IN_THE_FOLDER = "default"  # PEFT saves adapters of other names in subfolders


def save_head(task: Task, folder: Path) -> None:
    """Writes which task it is, its settings, and the tensors that are its own.

    What terms of the loss were told (OGEN: names of new classes) is written too: it is information that went into the
    model.

    Args:
        task: the task.
        folder: where to.
    """
    settings = {"task": task.name, **task.settings()}
    for term in task.terms.values():
        settings |= term.told()
    active = task.model.active_adapters if isinstance(task.model, PeftModel) else [IN_THE_FOLDER]
    if active != [IN_THE_FOLDER]:
        settings[ADAPTERS] = list(active)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = task.own_tensors()
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def load_head(task: Task, folder: Path) -> None:
    """Reads back what `save_head` wrote, in place; nothing is changed if it does not fit.

    Args:
        task: the same task, of the same settings.
        folder: where from.

    Raises:
        AdapterFileError: the folder is of another task, for other classes or another head, or lacks weights.
        NonFiniteError: a weight is NaN or infinite.
        DataError: the file with the settings is missing or no valid JSON.
    """
    saved = read_settings(folder)
    if saved["task"] != task.name:
        where = str(folder / CONFIG_FILE)
        raise AdapterFileError(
            "checkpoint is of another task", where=where, got=saved["task"], allowed=repr(task.name)
        )
    task.check_settings(saved, str(folder))
    load_own_tensors(task, folder)
    task.take_settings(saved)


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads which task a folder is of, under `task`, and its settings.

    Args:
        folder: of a saved task.

    Raises:
        AdapterFileError: the file holds no settings, or names of classes that are no list, or not one for each class.
        DataError: it is missing or no valid JSON.
        UnsafeFileError: it is no regular file.

    Example:
        >>> read_settings(Path("my-adapter"))["class_names"]
        ['cat', 'dog']
    """
    saved = read_json(folder / CONFIG_FILE)
    if not isinstance(saved, dict):
        where, got = str(folder / CONFIG_FILE), type(saved).__name__
        raise AdapterFileError("file holds no settings of a task", where=where, got=got, allowed="a JSON object")
    _check_names(saved, folder / CONFIG_FILE)
    return {"task": "class_names", **saved}  # the first versions knew no other task


def _check_names(saved: Mapping[str, Any], path: Path) -> None:
    names, data_names = saved.get("class_names", []), saved.get("data_names")
    what, allowed = "settings of the task cannot be used", "a list with one name per class"
    if not isinstance(names, list):
        raise AdapterFileError(what, where=f"{path}, class_names", got=names, allowed=allowed)
    if data_names is None:
        return
    is_list = isinstance(data_names, list) and all(isinstance(name, str) for name in data_names)
    if not is_list or len(data_names) != len(names):
        raise AdapterFileError(what, where=f"{path}, data_names", got=data_names, allowed=allowed)


def load_own_tensors(task: Task, folder: Path) -> None:
    """Reads back the tensors that are a task's own, in place; others in the file are left alone.

    Args:
        task: the task.
        folder: where from.

    Raises:
        AdapterFileError: there are none, or one is missing or has another shape.
        NonFiniteError: a value is NaN or infinite.
        UnsafeFileError: the file is no regular one.
    """
    expected = task.own_tensors()
    if not expected:
        return
    path = folder / WEIGHTS_FILE
    if not path.exists():
        what = "the head that was trained is not there"
        raise AdapterFileError(what, where=str(folder), allowed=WEIGHTS_FILE, remedy="Get the whole folder.")
    found = read_weights(path)
    require_all(sorted(set(expected) - set(found)), folder)
    _check_fit(found, expected, path)
    task.load_state_dict({name: found[name] for name in expected}, strict=False)


def require_all(missing: list[str], folder: Path) -> None:
    """Refuses a folder without all tensors of a model.

    Args:
        missing: their names.
        folder: the folder.

    Raises:
        AdapterFileError: there are any.
    """
    if missing:
        what = f"checkpoint lacks {len(missing)} tensors of the model"
        raise AdapterFileError(what, where=str(folder), got=missing[:3], remedy="Build the model as it was saved.")


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in expected.items():
        where, got = f"{path}, {name}", tuple(found[name].shape)
        if got != tuple(tensor.shape):
            raise AdapterFileError("tensor has a wrong shape", where=where, got=got, allowed=str(tuple(tensor.shape)))
        if not found[name].isfinite().all():
            raise NonFiniteError("values of a head are NaN or infinite", where=where)
