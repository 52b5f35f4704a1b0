# SPDX-License-Identifier: Apache-2.0
"""Looking at an adapter's tensors before they go into a model, or when another loader has put them there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AdapterFileError, HfRobustError, NonFiniteError
from .files import PEFT_PREFIX, check_format, check_seal, digest, plain_names
from .fingerprint import check_base

if TYPE_CHECKING:
    from .base import RobustLayer, RobustTuner

Tuner = type["RobustTuner"]


def check_load(
    tuner: Tuner, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], seal: Tensor | None, saved: Any
) -> dict[str, dict[str, Tensor]]:
    """Looks at everything that is about to be loaded; nothing is changed.

    Args:
        tuner: the adapter's method.
        model: the model.
        adapter_name: the adapter.
        state_dict: what PEFT is about to load, without the digest.
        seal: the digest, if there is one.
        saved: what the adapter's config says of its file.

    Returns:
        The adapter's tensors by unit and name.

    Raises:
        AdapterFileError: the tensors are not those that were saved, or do not fit the adapter or the base.
        NonFiniteError: a value is NaN or infinite.
    """
    where, inner = f"adapter {adapter_name}", f".modules_to_save.{adapter_name}."
    plain = {name.replace(inner, "."): tensor for name, tensor in plain_names(state_dict).items()}
    check_format(saved, where)
    check_seal(plain, seal, saved, where)
    _check_whole_modules({n: t for n, t in state_dict.items() if inner in n}, model)
    layers, tensors = layers_of(tuner, model), _by_unit(plain, tuner.prefix)
    others = [n for n in plain_names(state_dict) if inner not in n and n.rpartition(".")[0] not in tensors]
    unknown = sorted(set(tensors) - set(layers)) + others
    if unknown:
        raise AdapterFileError("file holds tensors the adapter does not have", where=where, got=unknown[:3])
    missing = sorted(unit for unit, layer in layers.items() if layer.has_adapter(adapter_name))
    missing = [unit for unit in missing if unit not in tensors]
    if missing:
        raise AdapterFileError(f"file lacks tensors of {len(missing)} modules", where=where, got=missing[:3])
    if saved is not None:
        check_base(saved["base"], base_tensors(tuner, model, model.state_dict()))
    for unit, found in tensors.items():
        layers[unit].check_tensors(adapter_name, found)
    if saved is None and seal is None:
        what = "come without a digest, as from older versions of hf_robust: whether they are whole, and of this base,"
        warnings.warn(f"The tensors of {where} {what} is not known. Save the adapter again.", stacklevel=2)
    return tensors


def plain_tensors(
    tuner: Tuner, model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An adapter's tensors by the names they have in its file, but for PEFT's prefix.

    Args:
        tuner: the adapter's method.
        model: the model.
        adapter_name: the adapter.
        state_dict: of the model.
    """
    found: dict[str, Tensor] = {}
    for name, module in named_modules(model):
        if isinstance(module, tuner.tuner_layer_cls):
            tensors: Any = module.tensors_in(state_dict, f"{name}.").get(adapter_name, {})
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside = {k.removeprefix(f"{name}."): t for k, t in state_dict.items() if k.startswith(f"{name}.")}
            tensors = module.adapter_state_dict(adapter_name, inside)
        else:
            continue
        found.update({f"{name}.{key}".removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()})
    return found


def base_tensors(tuner: Tuner, model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point parameters of the base, as they were before any adapter, by name.

    Args:
        tuner: the method.
        model: the model.
        state_dict: of the model.
    """
    found: dict[str, Tensor] = {}
    named = model.named_parameters(remove_duplicate=False)
    parameters = {name.removeprefix("_fsdp_wrapped_module.") for name, _ in named}  # training may move buffers
    of_base = {name: tensor for name, tensor in state_dict.items() if name in parameters}
    for name, tensor in plain_names(of_base).items():
        parts = name.split(".")
        if "modules_to_save" not in parts and not any(part.startswith(tuner.prefix) for part in parts):
            found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    for unit, layer in layers_of(tuner, model).items():
        if layer.merged:
            found.update({f"{unit}.{name}": t for name, t in layer.pretrained_parameters().items()})
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


class Arrival:
    """Waits for the tensors that an adapter's config tells of, where they do not come through PEFT.

    transformers' `load_adapter` puts them in their places by itself; it calls `eval()` afterwards, and at the latest
    they are looked at before the first forward. An adapter that is refused is taken out again.

    Args:
        tuner: the tuner that has put the adapter in.
        adapter_name: the adapter.
        saved: what its config says of its file.
        requires_grad: of the model's parameters before.
        active_adapters: before.
    """

    def __init__(
        self,
        tuner: RobustTuner,
        adapter_name: str,
        saved: dict[str, Any],
        requires_grad: list[tuple[nn.Parameter, bool]],
        active_adapters: list[str],
    ) -> None:
        self.tuner, self.model, self.adapter_name, self.saved = tuner, tuner.model, adapter_name, saved
        self.requires_grad, self.active_adapters = requires_grad, active_adapters
        for child in self.model.children():  # the towers: a user may call one of them, or get_image_features
            child.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called before the forward of each tower."""
        if not torch.compiler.is_compiling():
            self.check(at_forward=True)

    def check(self, at_forward: bool = False) -> None:
        """Looks at the adapter if it has come, and is on.

        Args:
            at_forward: whether the model is about to be used; if nothing has come, the adapter is a new one, that was
                made with the settings of a file.

        Raises:
            AdapterFileError: the tensors are not those of the file, or the base is another one.
            NonFiniteError: a value is NaN or infinite.
        """
        layers = layers_of(type(self.tuner), self.model).values()
        first = next((layer for layer in layers if self.adapter_name in layer.expected_files), None)
        mine = [layer for layer in layers if layer.has_adapter(self.adapter_name)]
        if first is None:  # the adapter has been deleted, or is a new one
            self.end()
        if first is None or any(one.disable_adapters or self.adapter_name not in one.active_adapters for one in mine):
            return
        by_transformers = isinstance(self.model, PreTrainedModel) and self.model._hf_peft_config_loaded
        has_come = by_transformers or not all(layer.is_new(self.adapter_name) for layer in mine)
        if has_come:
            try:
                self._check_arrived(first)
            except HfRobustError:
                self.take_out()
                raise
        if has_come or at_forward:
            self.end()
            del first.expected_files[self.adapter_name]
            first.seals[self.adapter_name].zero_()

    def _check_arrived(self, first: RobustLayer) -> None:
        tuner, where, state_dict = type(self.tuner), f"adapter {self.adapter_name}", self.model.state_dict()
        tensors = plain_tensors(tuner, self.model, self.adapter_name, state_dict)
        missing = [name for name, tensor in tensors.items() if tensor.is_meta]
        if missing:
            raise AdapterFileError(f"file lacks {len(missing)} tensors", where=where, got=missing[:3])
        seal = first.seals[self.adapter_name]
        check_format(self.saved, where)
        narrow = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
        # of a base in float64 transformers has made float64 of all
        as_saved = narrow if self.saved["sha256"] == digest(narrow) else tensors
        check_seal(as_saved, seal if seal.any() else None, self.saved, where)
        check_base(self.saved["base"], base_tensors(tuner, self.model, state_dict))
        for unit, found in _by_unit(tensors, tuner.prefix).items():
            layers_of(tuner, self.model)[unit].check_tensors(self.adapter_name, found)

    def end(self) -> None:
        """Waits no more."""
        for child in self.model.children():
            hooks = child._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]

    def take_out(self) -> None:
        """Takes the adapter out, which was put in to be loaded and could not be."""
        self.end()
        for layer in layers_of(type(self.tuner), self.model).values():
            layer.expected_files.pop(self.adapter_name, None)
        if len(self.tuner.peft_config) > 1:
            self.tuner.delete_adapter(self.adapter_name)
            self.tuner.set_adapter(self.active_adapters)
        else:
            attributes: Any = vars(self.tuner.unload())
            for name in ("peft_config", "_hf_peft_config_loaded"):  # of PEFT and of transformers
                attributes.pop(name, None)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names that their tensors have in a state dict, where FSDP's first version wraps the model."""
    return ((name.removeprefix("_fsdp_wrapped_module."), module) for name, module in model.named_modules())


def layers_of(tuner: Tuner, model: nn.Module) -> dict[str, Any]:
    """A tuner's layers in a model, by their names without PEFT's prefix."""
    named = named_modules(model)
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
