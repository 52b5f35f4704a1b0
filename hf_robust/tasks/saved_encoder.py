# SPDX-License-Identifier: Apache-2.0
"""A dual encoder and its processor as they were saved: an adapter with its base, or a whole model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoProcessor, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.text_files import read_json
from ..encoders.dual_encoder import family
from ..errors import AdapterFileError, ConfigError, HfRobustError, UnsafeFileError
from .files import ADAPTERS, IN_THE_FOLDER, require_all
from .task import CONFIG_FILE, PROCESSOR_FOLDER, WEIGHTS_FILE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# All but the weights of a whole model, of which a repository may hold several
DOWNLOADED = ["*.json", "*.txt", "*.model", "*.jinja", ADAPTER_WEIGHTS, f"*/{ADAPTER_WEIGHTS}", WEIGHTS_FILE]
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class SavedModel:
    """Where a model is.

    Args:
        name: a folder, or an id on the Hub.
        revision: of the Hub; None for a folder.
        folder: the folder, or where the repository's files have been downloaded to, but for those of a whole model.
    """

    name: str
    revision: str | None
    folder: Path

    def adapters(self, settings: Mapping[str, Any]) -> dict[str, Path]:
        """Returns the folders of the adapters that were active, by name; empty for a whole model.

        Args:
            settings: of the task that was saved.

        Raises:
            AdapterFileError: there are several, and it is not said which of them were active; or one is missing.
        """
        found = {path.parent.name: path.parent for path in sorted(self.folder.glob(f"*/{ADAPTER_CONFIG}"))}
        found = {name: path for name, path in found.items() if not name.startswith(PREFIX_CHECKPOINT_DIR)}
        if (self.folder / ADAPTER_CONFIG).exists():
            found = {IN_THE_FOLDER: self.folder, **found}
        elif (self.folder / MODEL_CONFIG).exists() or not found:
            return {}
        active = settings.get(ADAPTERS, [IN_THE_FOLDER] if IN_THE_FOLDER in found else list(found))
        if not isinstance(active, list) or not active or any(name not in [*found] for name in active):
            what, allowed = "an adapter that was active is not there", ", ".join(found)
            raise AdapterFileError(what, where=self.name, got=active, allowed=allowed)
        if len(active) > 1 and ADAPTERS not in settings:
            what, remedy = "several adapters, and it is not known which were active", "Load the folder of one of them."
            raise AdapterFileError(what, where=self.name, got=active, remedy=remedy)
        return {name: found[name] for name in active}


def find_model(name: str | Path, revision: str | None) -> SavedModel:
    """Looks for a folder, else downloads from the Hub what is small.

    Args:
        name: a folder, or an id on the Hub.
        revision: branch, tag or commit of the Hub.

    Raises:
        ConfigError: there is none of this name, it is no name, or a folder was given a revision.
        UnsafeFileError: the folder holds a pipe or a device.
        AdapterFileError: its weights are said to be in files elsewhere, or in pickles.

    Example:
        >>> find_model("my-adapter", None).folder
        PosixPath('my-adapter')
    """
    if not isinstance(name, str | Path):
        raise ConfigError("no name of a model", got=name, allowed="a folder, or an id on the Hub")
    folder = Path(name)
    if os.path.isdir(folder):  # False of a name that is too long, too
        if revision is not None:
            raise ConfigError("a folder has no revisions", where="revision", got=revision)
        found = SavedModel(str(name), None, folder)
    else:
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=DOWNLOADED))
        except (OSError, ValueError) as error:
            what = f"no such folder, and no such model on the Hub ({in_short(error)})"
            raise ConfigError(what, got=str(name)) from error
        found = SavedModel(str(name), revision or "main", folder)
    _check_folder(folder)
    return found


def load_encoder(
    model: SavedModel, adapters: Mapping[str, Path], base: str | Path | None, dtype: str | torch.dtype
) -> tuple[nn.Module, ProcessorMixin]:
    """Loads a dual encoder with its adapters, and its processor.

    Args:
        model: where it is.
        adapters: what `SavedModel.adapters` returned.
        base: folder or id on the Hub of the adapters' base; None for the one that they name.
        dtype: of the weights of a base or a whole model.

    Raises:
        AdapterFileError: the folder holds no model, an adapter does not name its base or does not fit it, or weights
            or the processor are missing.
        ConfigError: the base is not there or no dual encoder, or a base is given for a whole model.
    """
    if not adapters:
        _check_whole(model, base)
        return _whole_model(model, dtype), _processor(model.folder)
    of_base = _base(model, next(iter(adapters.values())), base)
    encoder = _with_adapters(_whole_model(of_base, dtype), adapters)
    return encoder, _processor(_processor_folder(model, of_base))


def check_dtype(dtype: str | torch.dtype) -> None:
    """Refuses what is no precision of weights.

    Args:
        dtype: what the user gave.

    Raises:
        ConfigError: it is none.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise ConfigError("no precision of weights", where="dtype", got=str(dtype), allowed=", ".join(DTYPES))


def in_short(error: Exception) -> str:
    """Returns the first sentence of what another package says, in one line.

    Args:
        error: what it has raised.
    """
    return " ".join(str(error).split()).partition(". ")[0]


@contextmanager
def _explained(what: str, where: str) -> Iterator[None]:
    """For what PEFT, transformers and the file system raise while a model is loaded."""
    try:
        yield
    except HfRobustError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        UserWarning,
        SafetensorError,
    ) as error:
        raise AdapterFileError(f"{what} ({type(error).__name__}: {in_short(error)})", where=where) from error


def _check_whole(model: SavedModel, base: str | Path | None) -> None:
    if not (model.folder / MODEL_CONFIG).exists():
        checkpoints = ", ".join(sorted(path.name for path in model.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")))
        remedy = f"Give one of its checkpoints: {checkpoints}." if checkpoints else "trainer.save_model() saves one."
        allowed = f"a folder with {ADAPTER_CONFIG} or {MODEL_CONFIG}"
        raise AdapterFileError("there is no model", where=model.name, allowed=allowed, remedy=remedy)
    if base is not None:
        raise ConfigError("a whole model has no base", where="base", got=str(base), remedy="Leave it out.")


def _base(model: SavedModel, adapter: Path, given: str | Path | None) -> SavedModel:
    with _explained("the adapter's settings cannot be read", str(adapter)):
        config = PeftConfig.from_pretrained(str(adapter))
    name = config.base_model_name_or_path if given is None else str(given)
    if not name or not isinstance(name, str):
        what, remedy = "the adapter does not name its base", "Give it: base='openai/clip-vit-base-patch32', say."
        raise AdapterFileError(what, where=model.name, got=name, remedy=remedy)
    of_hub = given is None and not os.path.isdir(name)
    try:
        return find_model(name, config.revision if of_hub else None)
    except ConfigError as error:
        what, remedy = f"the adapter's base: {error.what}", "Give the place where it is now: base=…."
        raise ConfigError(what, where=model.name, got=name, remedy=remedy) from error


def _whole_model(model: SavedModel, dtype: str | torch.dtype) -> Any:
    _check_index(model.folder)
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if model.revision is not None:
        how["revision"] = model.revision
    with _explained("no whole model can be loaded", model.name), torch.random.fork_rng(devices=[]):
        found, report = AutoModel.from_pretrained(model.name, output_loading_info=True, **how)
    family(found)  # refuses what is no dual encoder
    require_all(sorted(report["missing_keys"]), Path(model.name))
    return found


def _with_adapters(base: Any, adapters: Mapping[str, Path]) -> PeftModel:
    (first, folder), *others = adapters.items()
    for path in adapters.values():
        if not (path / ADAPTER_WEIGHTS).is_file():
            what, remedy = "the adapter's tensors are not there", "Pickles are not read: save it as safetensors."
            raise AdapterFileError(what, where=str(path), allowed=ADAPTER_WEIGHTS, remedy=remedy)
    what = "the adapter cannot be loaded on its base"
    with _explained(what, str(folder)), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT would go on with random ones
        model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
        for name, path in others:
            model.load_adapter(str(path), name)
        if others:
            model.base_model.set_adapter(list(adapters))
    return model.requires_grad_(False)


def _processor_folder(model: SavedModel, base: SavedModel) -> Path:
    own = model.folder / PROCESSOR_FOLDER
    if own.is_dir():
        return own
    if not own.exists() and (model.folder / "tokenizer_config.json").exists():  # as early versions wrote it
        return model.folder
    if own.exists() or (model.folder / CONFIG_FILE).exists():  # the base's may make images of another size
        what, allowed = "the adapter's processor is not there", f"a folder {PROCESSOR_FOLDER}"
        raise AdapterFileError(what, where=model.name, allowed=allowed, remedy="Get the whole folder.")
    return base.folder


def _processor(folder: Path) -> ProcessorMixin:
    with _explained("no processor can be loaded", str(folder)):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin):
        what, allowed = "no processor of images and texts", "what AutoProcessor(...).save_pretrained writes"
        raise AdapterFileError(what, where=str(folder), got=type(processor).__name__, allowed=allowed)
    return processor


def _check_folder(folder: Path) -> None:
    """Reading a pipe waits for ever, and a device may never end."""
    for path in [*folder.iterdir(), *folder.glob(f"{PROCESSOR_FOLDER}/*"), *folder.glob(f"*/{ADAPTER_WEIGHTS}")]:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UnsafeFileError("not a regular file", where=str(path))


def _check_index(folder: Path) -> None:
    """Of a file with another ending transformers would unpickle what is in it."""
    index = folder / INDEX
    if not index.exists():
        return
    content = read_json(index)
    if not isinstance(content, dict):
        got = type(content).__name__
        raise AdapterFileError(
            "file does not say where weights are", where=str(index), got=got, allowed="a JSON object"
        )
    weight_map = content.get("weight_map")
    for file in weight_map.values() if isinstance(weight_map, dict) else [weight_map]:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UnsafeFileError("weights are in a file that is not read", where=str(index), got=file)
