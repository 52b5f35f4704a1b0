# SPDX-License-Identifier: Apache-2.0
"""Which tensors of an adapter its change Δ to the weights is linear in, and which methods have none.

They are values that begin at zero (LoRA's B, the values of SAFT and SHiRA, F of R-Adapter: its average, which is what
is evaluated, and no parameter), or tuned copies of the base's tensors.
While the adapter's other tensors stay, interpolating these alone scales Δ, without a dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, SelectionError
from ..tuners.aclip import ACLIPLayer
from ..tuners.radapter import RAdapterLayer
from ..tuners.saft.layer import SAFTLayer
from ..tuners.saft.plan import same_bits
from .arithmetic import check_finite, interpolate_tensor
from .files import some

METHODS = ("SAFT", "ACLIP", "RADAPTER", "LORA", "SHIRA", "LN_TUNING")  # values of PEFT's PeftType
INITS = (True, False, "gaussian", "eva", "orthogonal")  # of LoRA; all others change the base's weights
SUPPORTED = "SAFT, A-CLIP, R-Adapter, LoRA, SHiRA, LN tuning, modules_to_save"
UNKNOWN = "its change is not known to be linear in its parameters"


@dataclass(frozen=True)
class Record:
    """What a parameter held before it was set to an α below 1.

    Args:
        parameter: the parameter.
        tuned: its fine-tuned value.
        written: what was written instead. Computed again it could differ, if θ₀ or its device has changed since.
    """

    parameter: Tensor
    tuned: Tensor
    written: Tensor


@dataclass(frozen=True)
class LinearTensor:
    """A parameter that Δ is linear in.

    Its record stands in the attribute `_wise_ft` of the module that owns it: it does not matter through which wrapper
    the model is seen, copies and pickles take it along, and state dicts do not show it.

    Args:
        name: for messages.
        owner: the module that owns it.
        key: its name there.
        zero_shot: its value in θ₀; None for zero.
    """

    name: str
    owner: nn.Module
    key: str
    zero_shot: Tensor | None

    @property
    def parameter(self) -> Tensor:
        """The parameter, or the average of one."""
        held: Any = {**self.owner._parameters, **self.owner._buffers}
        return held[self.key]

    @property
    def start(self) -> Tensor:
        """Its value in θ₀, in its own format."""
        return torch.zeros_like(self.parameter) if self.zero_shot is None else self.zero_shot.to(self.parameter)

    @property
    def record(self) -> Record | None:
        """Its record."""
        return vars(self.owner).get("_wise_ft", {}).get(self.key)

    def is_as_written(self) -> bool:
        """Whether it holds what the last call wrote, or has no record."""
        record, parameter = self.record, self.parameter
        if record is None or record.parameter is not parameter:  # another has taken its place
            return record is None
        return equal_bits(parameter, record.written.to(parameter))  # a cast since has rounded both alike

    def write(self, tuned: Tensor, alpha: float) -> None:
        """Writes the value at α.

        Args:
            tuned: the fine-tuned value; may be the parameter itself.
            alpha: the share of the way, a fraction in [0, 1].
        """
        parameter, start = self.parameter, self.start
        tuned = tuned.detach().to(parameter, copy=tuned is parameter)
        written = interpolate_tensor(start, tuned, alpha)
        if not equal_bits(parameter, written):  # writing the same again would look like a change to autograd
            parameter.copy_(written)
        records = vars(self.owner).setdefault("_wise_ft", {})
        records.pop(self.key, None)
        if alpha != 1 and not equal_bits(start, tuned):
            records[self.key] = Record(parameter, tuned, written)


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of the same shape and dtype are equal bit by bit.

    Args:
        first: any tensor.
        second: the other.
    """
    return same_bits(first.detach().reshape(-1), second.detach().reshape(-1))


# --- which methods ---


def check_linear(model: nn.Module, adapter_name: str | None = None) -> None:
    """Refuses a model with an active adapter whose Δ cannot be scaled.

    Args:
        model: any model.
        adapter_name: the adapter of a `PeftModel` to look at in place of the active ones.

    Raises:
        ConfigError: Δ is not linear in a method's parameters, the method changes θ₀, or adapters are merged.
        SelectionError: a SAFT adapter has no entries yet.
        NonFiniteError: a value of LoRA's A is NaN or infinite.
    """
    for module in model.modules():
        configs = _active_configs(module) if adapter_name is None else _config_of(module, adapter_name)
        for adapter, config in configs.items():
            if config.peft_type not in METHODS:
                raise _refusal(config.peft_type.value, adapter, UNKNOWN)
            if isinstance(config, LoraConfig):
                _check_lora(config, adapter)
    for name, layer in adapter_layers(model).items():
        if layer.merged_adapters:
            remedy = "Call unmerge_adapter() first."
            raise ConfigError("adapters are merged", where=name, got=layer.merged_adapters, remedy=remedy)
        for adapter in _adapters(layer, adapter_name):
            _check_layer(name, layer, adapter)


def _refusal(method: str, where: str, reason: str) -> ConfigError:
    remedy = "If it can be merged: interpolate(zero_shot, model.merge_and_unload(), alpha)."
    return ConfigError(f"WiSE-FT cannot scale {method}: {reason}", where=where, allowed=SUPPORTED, remedy=remedy)


def _active_configs(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, PeftModel | BaseTuner):
        return {name: module.peft_config[name] for name in module.active_adapters}
    if isinstance(module, PreTrainedModel) and module._hf_peft_config_loaded:
        return {name: module.peft_config[name] for name in module.active_adapters()}
    return {}


def _config_of(module: nn.Module, adapter_name: str) -> dict[str, Any]:
    return {adapter_name: module.peft_config[adapter_name]} if isinstance(module, PeftModel) else {}


def _adapters(layer: Any, adapter_name: str | None) -> list[str]:
    return layer.active_adapters if adapter_name is None else [adapter_name]


def _check_lora(config: LoraConfig, adapter: str) -> None:
    if config.init_lora_weights not in INITS:
        init = f"LoRA with init_lora_weights={config.init_lora_weights!r}"
        raise _refusal(init, adapter, "it changes the base's weights, so that θ₀ is lost")
    if config.bias != "none":
        raise _refusal(f"LoRA with bias={config.bias!r}", adapter, "it trains the base's biases, so that θ₀ is lost")
    if config.trainable_token_indices:
        raise _refusal("LoRA with trainable_token_indices", adapter, UNKNOWN)
    if config.ensure_weight_tying:
        raise _refusal("LoRA with ensure_weight_tying", adapter, "one tensor is A in one module and B in another")


def _check_layer(name: str, layer: Any, adapter: str) -> None:
    if isinstance(layer, SAFTLayer) and layer.is_unselected(adapter):
        remedy = "Call select_saft, or train with RobustTrainer."
        raise SelectionError("the SAFT adapter has not selected its entries", got=adapter, remedy=remedy)
    if isinstance(layer, LoraLayer):
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__
            raise _refusal(f"LoRA's variant {variant}", name, "its change is not linear in B")
        for matrices in (layer.lora_A, layer.lora_embedding_A):
            for path, parameter in matrices.named_parameters():
                if path.split(".")[0] == adapter:
                    check_finite(parameter, f"{name} ({adapter}, A)")


# --- which tensors ---


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the modules of a model that hold adapters or `modules_to_save`, by name.

    Args:
        model: any model.
    """
    kinds = BaseTunerLayer | ModulesToSaveWrapper
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def adapter_tensors(model: nn.Module, adapter_name: str | None = None) -> list[LinearTensor]:
    """Returns the tensors that the Δ of a model's active adapters is linear in.

    Args:
        model: a model that passes `check_linear`.
        adapter_name: the adapter to take in place of the active ones.

    Raises:
        ConfigError: a layer's Δ is not known to be linear in its parameters, or buffers have changed in training.
    """
    found: dict[int, LinearTensor] = {}  # by parameter: modules_to_save may be tied
    for name, layer in adapter_layers(model).items():
        for adapter in _adapters(layer, adapter_name):
            if adapter in layer._get_available_adapters():
                for owner, key, start in _of_layer(name, layer, adapter):
                    tensor = LinearTensor(f"{name} ({adapter}, {key})", owner, key, start)
                    found.setdefault(id(tensor.parameter), tensor)
    return list(found.values())


def _of_layer(name: str, layer: Any, adapter: str) -> list[tuple[nn.Module, str, Tensor | None]]:
    """The owner, name and value in θ₀ of every tensor that a layer's Δ is linear in."""
    if isinstance(layer, SAFTLayer):
        return [(layer.saft_values, adapter, None)]
    if isinstance(layer, ShiraLayer):
        return [(layer.shira_weight, adapter, None)]
    if isinstance(layer, ACLIPLayer):
        copies = (layer.aclip_weight, layer.base_layer.weight), (layer.aclip_bias, layer.base_layer.bias)
        return [(owner, adapter, start) for owner, start in copies if adapter in owner]
    if isinstance(layer, RAdapterLayer):  # Δ = σ F W, and σ U D W in low rank
        return [(layer.evaluated("radapter_weight", adapter), adapter, None)]
    if isinstance(layer, LNTuningLayer):
        return _copies(name, layer.ln_tuning_layers[adapter], layer.base_layer)
    if isinstance(layer, ModulesToSaveWrapper):
        return _copies(name, layer.modules_to_save[adapter], layer.original_module)
    if isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer):  # Δ = s B A, and s b with lora_bias
        if adapter in layer.lora_embedding_B:
            return [(layer.lora_embedding_B, adapter, None)]
        return [(owner, key, None) for _, owner, key in owned_parameters(layer.lora_B[adapter])]
    raise _refusal(f"{type(layer).__module__}.{type(layer).__name__}", name, UNKNOWN)


def _copies(name: str, copy: nn.Module, base: nn.Module) -> list[tuple[nn.Module, str, Tensor | None]]:
    if any(isinstance(module, BaseTunerLayer) for module in copy.modules()):
        raise _refusal("modules_to_save around an adapter", name, "its change is a product")
    check_buffers(dict(copy.named_buffers()), dict(base.named_buffers()), name)
    starts = dict(base.named_parameters(remove_duplicate=False))
    return [(owner, key, starts[path]) for path, owner, key in owned_parameters(copy)]


def owned_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields the path of every parameter, the module that owns it and its name there; a tied one once.

    Args:
        module: any module.
    """
    for path, _ in module.named_parameters():
        prefix, _, key = path.rpartition(".")
        yield path, module.get_submodule(prefix), key


def check_buffers(buffers: Mapping[str, Tensor], starts: Mapping[str, Tensor], where: str) -> None:
    """Refuses buffers that training has changed, as the statistics of a BatchNorm.

    Args:
        buffers: as they are now, by name.
        starts: those of θ₀; may lack some.
        where: for the message.

    Raises:
        ConfigError: one has changed.
    """
    changed = [n for n, buffer in buffers.items() if n in starts and not equal_bits(buffer, starts[n].to(buffer))]
    if changed:
        remedy = "Use interpolate(zero_shot, fine_tuned, alpha) on whole models."
        what = "buffers have changed in training, and wise_ft interpolates parameters alone"
        raise ConfigError(what, where=where, got=some(changed), remedy=remedy)
