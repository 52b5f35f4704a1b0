# SPDX-License-Identifier: Apache-2.0
"""The folder of a saved `PerImageEnsemble`: settings as JSON, embeddings as safetensors, no models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.tensor_files import read_weights
from ..data.text_files import read_json
from ..encoders.class_embeds import evaluating
from ..errors import AdapterFileError, DataError
from ..tasks.class_names import ZeroShotClassifier
from ..tuners.fingerprint import check_base, fingerprint
from .publish import check_output, publish_folder

SETTINGS_FILE, FAILURES_FILE, FAILURES = "ensemble.json", "failures.safetensors", "failures"
FORMAT_VERSION = 1
KINDS: dict[str, Any] = {
    "format_version": int,
    "failures": int,
    "images": int,
    "neighbour": int,
    "fine_tuned_temperature": list,
    "zero_shot_temperature": list,
    "midpoint": int | float,
    "scale": int | float,
    "metric": str,
    "models": dict,
}


def write_ensemble(folder: Path, saved: Mapping[str, Any], failures: Tensor, overwrite: bool) -> None:
    """Writes a folder that is there whole or not at all.

    Args:
        folder: the folder.
        saved: settings, and what `describe_models` returned.
        failures: `(failures, dim)`, float16.
        overwrite: whether the folder may hold something, which is deleted.

    Raises:
        MergeError: the folder is in use, or the disk is full or fails.
    """
    check_output(folder, [], overwrite)
    text = json.dumps({"format_version": FORMAT_VERSION, **saved}, indent=2)
    with publish_folder(folder, overwrite, failures.nbytes + len(text)) as temporary:
        save_file({FAILURES: failures.contiguous()}, temporary / FAILURES_FILE)
        (temporary / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def read_ensemble(folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Returns the settings and, mapped from the disk, the embeddings.

    Args:
        folder: the folder.

    Raises:
        AdapterFileError: a file is missing, damaged, or of a newer format.
        UnsafeFileError: a file is no regular file.
    """
    where = str(folder / SETTINGS_FILE)
    try:
        saved = read_json(folder / SETTINGS_FILE)
    except DataError as error:
        raise AdapterFileError("settings of an ensemble cannot be read", where=where, got=error.what) from error
    wrong = [name for name, kind in KINDS.items() if not isinstance(saved, dict) or not _is(saved.get(name), kind)]
    if wrong:
        raise AdapterFileError("settings of an ensemble are damaged", where=where, got=wrong)
    if saved["format_version"] != FORMAT_VERSION:
        got, remedy = saved["format_version"], "pip install --upgrade hf_robust"
        raise AdapterFileError("unknown format of an ensemble", where=where, got=got, allowed="1", remedy=remedy)
    failures = read_weights(folder / FAILURES_FILE).get(FAILURES)
    _check_failures(failures, saved, folder)
    return saved, failures  # type: ignore[return-value]


def describe_models(classifier: ZeroShotClassifier, zero_shot: nn.Module) -> dict[str, Any]:
    """Returns what the models of an ensemble are recognised by.

    Args:
        classifier: the fine-tuned model.
        zero_shot: the zero-shot model; the classifier's own dual encoder where that has adapters.
    """
    own = zero_shot is classifier.model
    return {
        "class_names": list(classifier.class_names),
        "templates": list(classifier.templates),
        "head": classifier.head,
        "fine_tuned": fingerprint(_tensors(classifier), {}),
        "zero_shot": None if own else fingerprint(_tensors(zero_shot), {}),
    }


def check_models(saved: Mapping[str, Any], classifier: ZeroShotClassifier, zero_shot: nn.Module, where: str) -> None:
    """Refuses other models than those that an ensemble was fitted with.

    Args:
        saved: what `describe_models` returned.
        classifier: the fine-tuned model.
        zero_shot: the zero-shot model.
        where: the folder.

    Raises:
        AdapterFileError: they are others, or have other classes, templates or another head.
    """
    classifier.check_settings(saved, where)
    prompts = list(classifier.class_names), list(classifier.templates)
    if (saved.get("class_names"), saved.get("templates")) != prompts:
        raise AdapterFileError("ensemble was fitted with other prompts", where=where, got=prompts)
    own = zero_shot is classifier.model
    if (saved.get("zero_shot") is None) != own:
        what = "ensemble was fitted with another kind of zero-shot model"
        kind = "the fine-tuned model without its adapters" if own else "a second model"
        raise AdapterFileError(what, where=where, got=kind)
    pairs = [("fine_tuned", classifier)] if own else [("fine_tuned", classifier), ("zero_shot", zero_shot)]
    for name, model in pairs:
        try:
            check_base(saved[name], _tensors(model))
        except (AdapterFileError, KeyError, AttributeError) as error:
            what = f"ensemble was fitted with another {name.replace('_', '-')} model"
            got = error.got if isinstance(error, AdapterFileError) else "no description of it"
            remedy = "Load the model that it was fitted with, at the same alpha, or fit it anew."
            raise AdapterFileError(what, where=where, got=got, remedy=remedy) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    with evaluating(model):  # what waits to be written into the weights is written
        state = model.state_dict()
    return {n: t for n, t in state.items() if t.is_floating_point() and not n.startswith("terms.")}


def _is(value: Any, kind: Any) -> bool:
    if kind is list:
        return isinstance(value, list) and len(value) == 2 and all(_is(one, int | float) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_failures(failures: Tensor | None, saved: Mapping[str, Any], folder: Path) -> None:
    where, n = str(folder / FAILURES_FILE), saved["failures"]
    fits = failures is not None and failures.ndim == 2 and len(failures) == n and failures.dtype == torch.float16
    if not fits or not min(n, 1) <= saved["neighbour"] <= n:
        got = None if failures is None else f"{tuple(failures.shape)}, {failures.dtype}"
        allowed = f"{n} float16 rows, neighbour {saved['neighbour']} among them"
        raise AdapterFileError("embeddings of an ensemble are damaged", where=where, got=got, allowed=allowed)
