# SPDX-License-Identifier: Apache-2.0
"""What the tuners of this package do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AdapterFileError, ConfigError, HfRobustError, NonFiniteError
from .config import RobustConfig
from .files import FORMAT_VERSION, SEAL, as_seal, digest
from .fingerprint import fingerprint
from .loading import Arrival, base_tensors, check_load, layers_of, named_modules, plain_tensors
from .matching import check_adapter_name

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns what `Module._apply` shall do to trained tensors when it does `fn` to a model: never fewer bits.

    Args:
        fn: moves or casts a tensor.

    Example:
        >>> keep_precision(torch.Tensor.half)(torch.zeros(2)).dtype
        torch.float32
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

    return apply


def check_unquantized(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuses parameters that hold codes in the place of weights, or belong to a model or tower that does.

    Args:
        model: the model; transformers notes the method where it has quantised one.
        parameters: of it, by name; those of quantisation libraries are no plain parameters, or no floats.

    Raises:
        ConfigError: one is quantised.
    """
    noted = {n: vars(m)["quantization_method"] for n, m in model.named_modules() if "quantization_method" in vars(m)}
    for name in sorted(parameters):
        parameter = parameters[name]
        methods = [f"{method}" for part, method in noted.items() if not part or name.startswith(f"{part}.")]
        if methods or type(parameter) is not nn.Parameter or parameter.dtype not in TRAINABLE:
            got = methods[0] if methods else f"{type(parameter).__name__} of {parameter.dtype}"
            remedy = "Load the model unquantised, or leave the module out with exclude_modules."
            raise ConfigError("quantised weights cannot be trained", where=name, got=got, remedy=remedy)


class RobustLayer(nn.Module, BaseTunerLayer):
    """A wrapper around one module of the base.

    `tensor_names` are the attributes that hold its adapters' tensors, each by the adapter's name. The first layer of
    an adapter also has a place for the digest of its file, so that every loader finds one; and it remembers what the
    adapter's config says of a file that has not come yet.
    """

    tensor_names: tuple[str, ...]
    expected_files: dict[str, Arrival]

    @property
    def seals(self) -> BufferDict:
        """Places for digests of files, by adapter; zeros where the file has been looked at."""
        raise NotImplementedError

    def be_first(self, adapter_name: str) -> None:
        """Makes this the first layer of an adapter.

        Args:
            adapter_name: the adapter.
        """
        self.seals[adapter_name] = torch.zeros(8, dtype=torch.int32)

    def train(self, mode: bool = True) -> RobustLayer:  # noqa: D102
        super().train(mode)
        for arrival in list(self.expected_files.values()):
            arrival.check()
        return self

    def check_values(self, tensor: Tensor, name: str) -> None:
        """Refuses tensors that cannot be trained values.

        Args:
            tensor: from a file.
            name: its name, for the message.

        Raises:
            AdapterFileError: it is in no format that values are saved in.
            NonFiniteError: a value is NaN or infinite.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            got, allowed = str(tensor.dtype), "float32 or float64"
            raise AdapterFileError("values have a wrong type", where=name, got=got, allowed=allowed)
        if tensor.is_meta or isinstance(tensor, DTensor):
            return
        base_layer: Any = self.base_layer
        base = next(p.dtype for p in base_layer.parameters() if p.is_floating_point())
        if not tensor.to(base).isfinite().all():
            what = "values of an adapter are NaN or infinite, or too large for the base's format"
            raise NonFiniteError(what, where=name, allowed=str(base))

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the layer has tensors of an adapter, or room for them."""
        return any(adapter_name in getattr(self, name) for name in self.tensor_names)

    def check_tensors(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Looks whether tensors can be those of an adapter; nothing is changed.

        Args:
            adapter_name: the adapter.
            tensors: its tensors here, by the names in `tensor_names`.

        Raises:
            AdapterFileError: they cannot.
        """
        raise NotImplementedError

    def pretrained_parameters(self) -> dict[str, Tensor]:
        """The base's parameters as they were before any adapter, by name."""
        raise NotImplementedError

    def is_new(self, adapter_name: str) -> bool:
        """Whether an adapter has neither been loaded nor trained."""
        raise NotImplementedError

    def changed_entries(self, adapter_name: str) -> dict[str, Tensor]:
        """Positions in the base's parameters that an adapter changes, if it changes some only."""
        return {}

    def tensors_in(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
        """The layer's tensors in a state dict, by adapter and name.

        Args:
            state_dict: of a model.
            prefix: of the layer's names in it.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.tensor_names:
            for adapter in list(getattr(self, name)) + list(self.waiting_adapters()):
                if f"{prefix}{name}.{adapter}" in state_dict:
                    found.setdefault(adapter, {})[name] = state_dict[f"{prefix}{name}.{adapter}"]
        return found

    def waiting_adapters(self) -> list[str]:
        """Names of adapters that have no tensors here yet."""
        return []

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for adapter, tensors in self.tensors_in(state_dict, prefix).items():
            self.check_tensors(adapter, tensors)
            for name, tensor in tensors.items():  # PEFT may assign them as they are, in the format of another base
                own = getattr(self, name)[adapter]
                found = tensor.to(own.dtype)
                if local_metadata.get("assign_to_params_buffers") and not own.is_meta:  # an optimizer may have it
                    with torch.no_grad():
                        found = own.copy_(found)
                state_dict[f"{prefix}{name}.{adapter}"] = found
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


class RobustTuner(BaseTuner):
    """A tuner that finds its modules by itself, merges all of them or none, and loads all of an adapter or nothing.

    A layer of it is a `RobustLayer` and has `check_finite(adapter_names)`.
    """

    target_module_mapping: dict[str, list[str]] = {}
    tuner_layer_cls: Any
    _targets: Mapping[str, Any]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
            if not isinstance(layer, self.tuner_layer_cls):
                got, remedy = type(layer).__name__, "Give each method a model of its own."
                raise ConfigError("the model holds an adapter of another method", got=got, remedy=remedy)
            if adapter_name in layer.seals:  # PEFT would put the new config in the place of the old one
                remedy = "Choose another name, or delete that adapter first."
                raise ConfigError("the model has an adapter of this name", got=adapter_name, remedy=remedy)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def find_targets(self, model: nn.Module, config: Any) -> Mapping[str, Any]:
        """Returns the modules to wrap by name, each with what the tuner needs to know about it.

        Args:
            model: the model without its PEFT wrapper; it may already hold adapters.
            config: the settings of the adapter to add.
        """
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wraps the modules an adapter uses.

        Args:
            model: the model without its PEFT wrapper.
            adapter_name: the adapter to add.
        """
        check_adapter_name(adapter_name)
        config: Any = self.peft_config[adapter_name]
        try:
            self._targets = self.find_targets(model, config)
            self._config = config
            # PEFT would shorten the first list and miss the second; and the user's own may serve other adapters
            self.peft_config[adapter_name] = replace(config, target_modules=None, exclude_modules=None)
            requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            active: list[str] = next((layer.active_adapters[:] for layer in layers_of(type(self), model).values()), [])
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            del self.peft_config[adapter_name]  # which a model that PEFT injected into before shares
            if not self.peft_config:
                vars(model).pop("_hf_peft_config_loaded", None)  # of transformers, which has been set already
            raise
        self.peft_config[adapter_name] = config
        first = next(layer for unit, layer in layers_of(type(self), model).items() if unit in self._targets)
        first.be_first(adapter_name)
        if config.saved is not None:
            first.expected_files[adapter_name] = Arrival(self, adapter_name, config.saved, requires_grad, active)

    def _prepare_adapter_config(self, peft_config: RobustConfig, model_config: dict) -> RobustConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: RobustConfig, key: str) -> bool:
        return key in self._targets

    # --- merging ---

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base; a refused safe merge has merged nothing.

        Args:
            adapter_names: which ones; by default the active ones.
            safe_merge: refuse when a merged value is not finite.

        Raises:
            NonFiniteError: `safe_merge`, and a value is NaN or infinite.
        """
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                layer.check_finite(layer.merged_adapters + (adapter_names or layer.active_adapters))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_finite(adapter_names)
        for layer in layers_of(type(self), self.model).values():
            for arrival in layer.expected_files.values():
                arrival.end()
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)

    # --- saving and loading: every way through PEFT leads here ---

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        sha256 = digest(plain_tensors(cls, model, adapter_name, state_dict))
        layers = layers_of(cls, model).items()
        changed = {f"{unit}.{n}": t for unit, layer in layers for n, t in layer.changed_entries(adapter_name).items()}
        base = fingerprint(base_tensors(cls, model, state_dict), changed)
        saved = {"format_version": FORMAT_VERSION, "sha256": sha256, "base": base}
        config.say_when_saved(saved=saved, **cls.settings_of_adapter(model, adapter_name))
        first, _ = cls._first_layer(model, adapter_name)
        return {**found, f"{first}.{cls.prefix}{SEAL}.{adapter_name}": as_seal(sha256)}

    @classmethod
    def settings_of_adapter(cls, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """What an adapter's saved config has beside the settings it was made with."""
        return {}

    @classmethod
    def _first_layer(cls, model: nn.Module, adapter_name: str) -> tuple[str, RobustLayer]:
        layers = ((name, module) for name, module in named_modules(model) if isinstance(module, cls.tuner_layer_cls))
        return next((name, layer) for name, layer in layers if adapter_name in layer.seals)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        name_of_first, first = cls._first_layer(model, adapter_name)
        found = [name for name in state_dict if name.rpartition(".")[2] == f"{cls.prefix}{SEAL}"]
        seal = state_dict.pop(found[0]) if found else None  # of another first layer, if it is another adapter's file
        arrival = first.expected_files.get(adapter_name)
        saved = None if arrival is None else arrival.saved
        try:
            tensors = check_load(cls, model, adapter_name, state_dict, seal, saved)
        except HfRobustError:
            if arrival is not None and isinstance(model, PeftModel):
                arrival.take_out()
            raise
        cls.make_room(layers_of(cls, model), adapter_name, tensors)
        if arrival is not None:
            arrival.end()
            del first.expected_files[adapter_name]
        state_dict[f"{name_of_first}.{cls.prefix}{SEAL}"] = first.seals[adapter_name]  # or PEFT would miss it
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def make_room(cls, layers: Any, adapter_name: str, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Prepares an adapter for tensors that are about to be loaded and have been checked.

        Args:
            layers: by unit.
            adapter_name: the adapter.
            tensors: by unit and name.
        """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, RobustLayer)}
        found = {name: layer.tensors_in(state_dict, f"{prefix}{name}.") for name, layer in layers.items()}
        for name, adapters in found.items():
            for adapter, tensors in adapters.items():
                layers[name].check_tensors(adapter, tensors)
        for adapter in {adapter for adapters in found.values() for adapter in adapters}:
            for layer in layers.values():
                if adapter in layer.expected_files:  # the tensors of a model are no file
                    layer.expected_files.pop(adapter).end()
            self.make_room(
                layers, adapter, {n: adapters[adapter] for n, adapters in found.items() if adapter in adapters}
            )
        if local_metadata.get("assign_to_params_buffers"):  # they may be mapped from a file, which others may change
            state_dict.update({name: tensor.clone() for name, tensor in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
