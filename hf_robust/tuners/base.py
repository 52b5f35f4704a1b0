# SPDX-License-Identifier: Apache-2.0
"""What the tuners of this package do alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AdapterFileError, ConfigError, HfRobustError, NonFiniteError
from .config import RobustConfig
from .files import FORMAT_VERSION, PEFT_PREFIX, SEAL, as_seal, check_format, check_seal, digest, plain_names
from .fingerprint import check_base, fingerprint
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

    def be_first(self, adapter_name: str, arrival: Arrival | None) -> None:
        """Makes this the first layer of an adapter.

        Args:
            adapter_name: the adapter.
            arrival: of the file that its config speaks of; None where it speaks of none.
        """
        self.seals[adapter_name] = torch.zeros(32, dtype=torch.uint8)
        if arrival is not None:
            self.expected_files[adapter_name] = arrival

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
        if not tensor.is_meta and not isinstance(tensor, DTensor) and not tensor.isfinite().all():
            raise NonFiniteError("values of an adapter are NaN or infinite", where=name)

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
            self._required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            del self.peft_config[adapter_name]  # which a model that PEFT injected into before shares
            if not self.peft_config:
                vars(model).pop("_hf_peft_config_loaded", None)  # of transformers, which has been set already
            raise
        self.peft_config[adapter_name] = config
        arrival = None if config.saved is None else Arrival(type(self), model, adapter_name, config.saved)
        first = next(layer for unit, layer in _layers(type(self), model).items() if unit in self._targets)
        first.be_first(adapter_name, arrival)
        for child in model.children():  # the towers: a user may call one of them, or get_image_features
            if arrival is not None:
                child.register_forward_pre_hook(arrival)

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
        model = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)

        for child in model.children():
            hooks = child._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, Arrival)]:
                del hooks[key]
        return model

    # --- saving and loading: every way through PEFT leads here ---

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        sha256 = digest(cls._plain_tensors(model, adapter_name, state_dict))
        layers = _layers(cls, model).items()
        changed = {f"{unit}.{n}": t for unit, layer in layers for n, t in layer.changed_entries(adapter_name).items()}
        base = fingerprint(cls._base_tensors(model, state_dict), changed)
        saved = {"format_version": FORMAT_VERSION, "sha256": sha256, "base": base}
        config.say_when_saved(saved=saved, **cls.settings_of_adapter(model, adapter_name))
        return {**found, cls._seal_key(model, adapter_name): as_seal(sha256)}

    @classmethod
    def settings_of_adapter(cls, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """What an adapter's saved config has beside the settings it was made with."""
        return {}

    @classmethod
    def _seal_key(cls, model: nn.Module, adapter_name: str) -> str:
        layers = ((name, module) for name, module in _named(model) if isinstance(module, cls.tuner_layer_cls))
        first = next(name for name, layer in layers if adapter_name in layer.seals)
        return f"{first}.{cls.prefix}{SEAL}.{adapter_name}"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        key = cls._seal_key(model, adapter_name).removesuffix(f".{adapter_name}")
        found = {name for name in state_dict if name.removeprefix(PEFT_PREFIX) == key.removeprefix(PEFT_PREFIX)}
        seal = state_dict.pop(found.pop()) if found else None
        first = next(layer for layer in _layers(cls, model).values() if adapter_name in layer.seals)
        saved = first.expected_files[adapter_name].saved if adapter_name in first.expected_files else None
        try:
            cls._check_load(model, adapter_name, state_dict, seal, saved)
        except HfRobustError:
            if saved is not None and isinstance(model, PeftModel):
                _take_out(model, adapter_name)
            raise
        first.expected_files.pop(adapter_name, None)
        state_dict[key] = first.seals[adapter_name]  # or PEFT would miss it
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _check_load(
        cls, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], seal: Tensor | None, saved: Any
    ) -> None:
        """Looks at everything that is about to be loaded, then gives an adapter without tensors room for them."""
        where, inner = f"adapter {adapter_name}", f".modules_to_save.{adapter_name}."
        plain = {name.replace(inner, "."): tensor for name, tensor in plain_names(state_dict).items()}
        check_format(saved, where)
        check_seal(plain, seal, saved, where)
        _check_whole_modules({n: t for n, t in state_dict.items() if inner in n}, model)
        layers, tensors = _layers(cls, model), _by_unit(plain, cls.prefix)
        others = [n for n in plain_names(state_dict) if inner not in n and n.rpartition(".")[0] not in tensors]
        unknown = sorted(set(tensors) - set(layers)) + others
        if unknown:
            raise AdapterFileError("file holds tensors the adapter does not have", where=where, got=unknown[:3])
        missing = sorted(unit for unit, layer in layers.items() if layer.has_adapter(adapter_name))
        missing = [unit for unit in missing if unit not in tensors]
        if missing:
            raise AdapterFileError(f"file lacks tensors of {len(missing)} modules", where=where, got=missing[:3])
        if saved is not None:
            check_base(saved["base"], cls._base_tensors(model, model.state_dict()))
        for unit, found in tensors.items():
            layers[unit].check_tensors(adapter_name, found)
        cls.make_room(layers, adapter_name, tensors)

    @classmethod
    def make_room(cls, layers: Any, adapter_name: str, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Prepares an adapter for tensors that are about to be loaded and have been checked.

        Args:
            layers: by unit.
            adapter_name: the adapter.
            tensors: by unit and name.
        """

    @classmethod
    def check_arrived(cls, model: nn.Module, adapter_name: str, saved: Mapping[str, Any], first: RobustLayer) -> None:
        """Looks at an adapter's tensors where they are.

        Args:
            model: the model without its PEFT wrapper.
            adapter_name: the adapter.
            saved: what its config says of its file.
            first: its first layer.

        Raises:
            AdapterFileError: the tensors are not those of the file, or the base is another one.
        """
        where, state_dict = f"adapter {adapter_name}", model.state_dict()
        check_format(saved, where)
        check_seal(cls._plain_tensors(model, adapter_name, state_dict), first.seals[adapter_name], saved, where)
        check_base(saved["base"], cls._base_tensors(model, state_dict))

    @classmethod
    def _plain_tensors(
        cls, model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """An adapter's tensors by the names they have in its file, but for PEFT's prefix."""
        found: dict[str, Tensor] = {}
        for name, module in _named(model):
            if isinstance(module, cls.tuner_layer_cls):
                tensors: Any = module.tensors_in(state_dict, f"{name}.").get(adapter_name, {})
            elif isinstance(module, AuxiliaryTrainingWrapper):
                inside = {k.removeprefix(f"{name}."): t for k, t in state_dict.items() if k.startswith(f"{name}.")}
                tensors = module.adapter_state_dict(adapter_name, inside)
            else:
                continue
            found.update({f"{name}.{key}".removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()})
        return found

    @classmethod
    def _base_tensors(cls, model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The floating-point tensors of the base, as they were before any adapter, by name."""
        layers = _layers(cls, model)
        found: dict[str, Tensor] = {}
        for name, tensor in plain_names(state_dict).items():
            parts = name.split(".")
            if "modules_to_save" not in parts and not any(part.startswith(cls.prefix) for part in parts):
                found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
        for unit, layer in layers.items():
            if layer.merged:
                found.update({f"{unit}.{name}": t for name, t in layer.pretrained_parameters().items()})
        return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, RobustLayer)}
        found = {name: layer.tensors_in(state_dict, f"{prefix}{name}.") for name, layer in layers.items()}
        for name, adapters in found.items():
            for adapter, tensors in adapters.items():
                layers[name].check_tensors(adapter, tensors)
        for adapter in {adapter for adapters in found.values() for adapter in adapters}:
            self.make_room(
                layers, adapter, {n: adapters[adapter] for n, adapters in found.items() if adapter in adapters}
            )
        if local_metadata.get("assign_to_params_buffers"):  # they may be mapped from a file, which others may change
            state_dict.update({name: tensor.clone() for name, tensor in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


class Arrival:
    """Waits for the tensors that an adapter's config tells of, where they do not come through PEFT.

    transformers' `load_adapter` puts them in their places by itself; it calls `eval()` afterwards, and at the latest
    they are looked at before the first forward.

    Args:
        tuner: the adapter's method.
        model: the model without its PEFT wrapper.
        adapter_name: the adapter.
        saved: what its config says of its file.
    """

    def __init__(self, tuner: type[RobustTuner], model: nn.Module, adapter_name: str, saved: dict[str, Any]) -> None:
        self.tuner, self.model, self.adapter_name, self.saved = tuner, model, adapter_name, saved

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called before the forward of each tower."""
        if not torch.compiler.is_compiling():
            self.check(at_forward=True)

    def check(self, at_forward: bool = False) -> None:
        """Looks at the adapter if it has come, and is on.

        Args:
            at_forward: whether the model is about to be used; if nothing has come, the adapter is a new one, that was
                made with the settings of a file.
        """
        layers = _layers(self.tuner, self.model).values()
        first = next((layer for layer in layers if self.adapter_name in layer.expected_files), None)
        mine = [layer for layer in layers if layer.has_adapter(self.adapter_name)]
        if first is None or any(one.disable_adapters or self.adapter_name not in one.active_adapters for one in mine):
            return
        has_come = not all(layer.is_new(self.adapter_name) for layer in mine)
        if has_come:
            self.tuner.check_arrived(self.model, self.adapter_name, self.saved, first)
        if has_come or at_forward:
            del first.expected_files[self.adapter_name]
            first.seals[self.adapter_name].zero_()


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names that their tensors have in a state dict, where FSDP's first version wraps the model."""
    return ((name.removeprefix("_fsdp_wrapped_module."), module) for name, module in model.named_modules())


def _layers(tuner: type[RobustTuner], model: nn.Module) -> dict[str, Any]:
    named = _named(model)
    return {n.removeprefix(PEFT_PREFIX): module for n, module in named if isinstance(module, tuner.tuner_layer_cls)}


def _by_unit(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        unit, _, kind = name.rpartition(".")
        if kind.startswith(prefix):
            found.setdefault(unit, {})[kind] = tensor
    return found


def _check_whole_modules(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Looks at the tensors of `modules_to_save`, which PEFT would load one by one."""
    expected = model.state_dict() if tensors else {}
    for name, tensor in tensors.items():
        allowed = f"{tuple(expected[name].shape)}"
        if tensor.shape != expected[name].shape:
            raise AdapterFileError("tensor has a wrong shape", where=name, got=tuple(tensor.shape), allowed=allowed)
        if not tensor.isfinite().all():
            raise NonFiniteError("values of an adapter are NaN or infinite", where=name)


def _take_out(model: PeftModel, adapter_name: str) -> None:
    """Takes an adapter out that was put in to be loaded, and could not be."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    tuner: Any = model.base_model
    vars(tuner.unload()).pop("peft_config", None)
    for parameter, requires_grad in tuner._required:
        parameter.requires_grad_(requires_grad)
