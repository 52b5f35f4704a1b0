# SPDX-License-Identifier: Apache-2.0
"""The settings that all methods have: which modules of a model are taken, and what a saved adapter says of itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from ..data.text_files import read_json
from ..encoders.preprocessing import TRAINED_WITH
from ..errors import AdapterFileError, ConfigError, DataError
from ..tasks.task import PROCESSOR_FOLDER
from .files import CONFIG_FILE, WEIGHTS_FILE, check_files, check_format

Towers = Literal["both", "vision", "text"]


@dataclass
class RobustConfig(PeftConfig):
    """Settings shared by the methods of this package.

    It may serve any number of adapters, which never change it; PEFT itself writes the name of the base into it.

    Args:
        towers: which towers of a dual encoder, each with its projection; `both` takes every module of any model.
        target_modules: names (or endings) of modules, or one regular expression.
        exclude_modules: the same for modules to leave out.
        layers_to_transform: numbers of the layers to take, as LoRA has it: `[10, 11]` takes what lies in `*.10.*` and
            `*.11.*`, and nothing outside of numbered layers.
        layers_pattern: names of the lists that these numbers count in, such as `"encoder.layers"`; by default all.
        modules_to_save: modules to train in full beside the adapter and to save with it.
        saved: what the file of a saved adapter says of itself; filled when the adapter is saved, not by hand.

    Raises:
        ConfigError: a value is none of the allowed ones.
    """

    towers: Towers = field(default="both", metadata={"help": "Which towers of a dual encoder to train."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to take."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to take, by default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the lists of layers that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full and save."})
    saved: dict[str, Any] | None = field(
        default=None, repr=False, metadata={"help": "What a saved adapter says of itself, filled when it is saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("towers", Towers)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._check_names(name, one_string=name != "modules_to_save")
        layers = self.layers_to_transform
        for number in layers if isinstance(layers, list) else [layers]:
            if layers is not None and (type(number) is not int or number < 0):
                raise ConfigError("layers_to_transform is no list of layers", got=layers, allowed="numbers from 0 on")
        if self.layers_pattern is not None and layers in (None, []):
            raise ConfigError("layers_pattern says where to count layers_to_transform, which is not given")
        if not isinstance(self.saved, dict | None):
            raise ConfigError("saved is not what a saved adapter says of itself", got=self.saved)

    def say_when_saved(self, **values: Any) -> None:
        """Sets fields of the file that `save_pretrained` writes next, which is of one adapter made with the settings.

        Args:
            values: by name.
        """
        self.__dict__["_of_adapter"] = values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the settings, with what is to be said of the adapter that is being saved.

        Args:
            save_directory: the folder.
            kwargs: as for `PeftConfig.save_pretrained`.
        """
        file: Any = copy.copy(self)
        file.__dict__.update(file.__dict__.pop("_of_adapter", {}))
        self.__dict__.pop("_of_adapter", None)
        super(RobustConfig, file).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads the settings in a file, more strictly than PEFT.

        Raises:
            AdapterFileError: it is no JSON of the method's settings, or of a newer format.
            UnsafeFileError: it is no regular file.
        """
        try:
            found = read_json(Path(path_json_file))
        except DataError as error:
            raise AdapterFileError(error.what, where=error.where, got=error.got) from error
        if not isinstance(found, dict) or not isinstance(found.get("saved"), dict | None):
            raise AdapterFileError("file holds no settings", where=str(path_json_file))
        method = found.get("peft_type")
        if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(str(method), object), cls):
            raise AdapterFileError("file holds settings of another method", where=str(path_json_file), got=method)
        check_format(found.get("saved"), str(path_json_file))
        found.pop("runtime_config", None)  # as PEFT does: such settings hold for one run
        return found

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RobustConfig:
        """Reads an adapter's config, and looks whether the adapter beside it is the one that was saved.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hub.
            subfolder: a folder in it.
            kwargs: as for `PeftConfig.from_pretrained`.

        Raises:
            AdapterFileError: the config, or the adapter beside it, is not what was saved.
            UnsafeFileError: a file is no regular file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            folder = _download(cls, str(pretrained_model_name_or_path), subfolder, kwargs)
        tensors = check_files(folder, config.saved, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
        if tensors is not None:
            config.check_weights(tensors, str(folder))
        config.__dict__[TRAINED_WITH] = _image_settings(folder)
        return config

    def check_weights(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Looks whether the tensors in a file are those that the settings tell of."""

    def _check_choice(self, name: str, choices: Any) -> None:
        if getattr(self, name) not in get_args(choices):
            raise ConfigError(f"unknown {name}", got=getattr(self, name), allowed=", ".join(get_args(choices)))

    def _check_names(self, name: str, one_string: bool) -> None:
        value = getattr(self, name)
        if isinstance(value, set | tuple):  # a set has no order, and the saved file shall not depend on hashes
            value = sorted(value)
            setattr(self, name, value)
        if value is None or (one_string and isinstance(value, str) and value):
            return
        if value in ([], ""):
            raise ConfigError(f"{name} is empty", got=value, remedy="Leave it at None, or name modules.")
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise ConfigError(f"{name} is no list of names", got=value)


def _image_settings(folder: Path) -> dict[str, Any] | None:
    """Those of the processor that `RobustTrainer` saves beside an adapter; None where there is none."""
    file = folder / PROCESSOR_FOLDER / "processor_config.json"
    if not file.is_file():
        return None
    try:
        settings = read_json(file)
    except DataError as error:
        raise AdapterFileError(error.what, where=error.where, got=error.got) from error
    found = settings.get("image_processor") if isinstance(settings, dict) else None
    return found if isinstance(found, dict) else None


def _download(config_cls: type[RobustConfig], repo_id: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """The folder that PEFT's own download of the weights, which follows, will find them in."""
    kwargs = config_cls._split_kwargs(kwargs)[0]
    config = Path(hf_hub_download(repo_id, CONFIG_FILE, subfolder=subfolder, **kwargs))
    with suppress(EntryNotFoundError):
        return Path(hf_hub_download(repo_id, WEIGHTS_FILE, subfolder=subfolder, **kwargs)).parent
    return config.parent
