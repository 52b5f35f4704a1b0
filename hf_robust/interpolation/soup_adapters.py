# SPDX-License-Identifier: Apache-2.0
"""The mean of what several adapters of one base change, as an adapter of the same method.

SAFT and SHiRA get the union of the entries; tuned copies (A-CLIP, LN tuning, `modules_to_save`) and R-Adapters of full
rank are averaged, and ranks are laid side by side: the mean of products is not the product of the means.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.shira.layer import ShiraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ..errors import ConfigError, MergeError
from ..tuners.aclip import ACLIPLayer
from ..tuners.config import RobustConfig
from ..tuners.radapter import RAdapterConfig, RAdapterLayer
from ..tuners.saft import SAFTConfig
from ..tuners.saft.edits import show_values
from ..tuners.saft.layer import SAFTLayer, saft_layers
from .arithmetic import check_finite, mean_tensor
from .linear import adapter_layers, adapter_tensors, check_linear

COPIES = ACLIPLayer | LNTuningLayer | ModulesToSaveWrapper  # their linear tensors stand in the place of the base's
METHODS = ("SAFT", "ACLIP", "RADAPTER", "LORA", "SHIRA", "LN_TUNING")  # values of PEFT's PeftType
MERGED = "Merge them, and soup the models."
PLACES = (  # settings that say which tensors of the base an adapter changes
    "peft_type",
    "towers",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "exclude_input_embeddings",
    "train_bias",
    "train_out_proj",
)


@torch.no_grad()
def add_soup(model: PeftModel, names: Sequence[str], adapter_name: str) -> None:
    """Adds an adapter whose Δ is the mean of those of others, and makes it the active one.

    Args:
        model: holds the adapters.
        names: of the adapters, as they stand; they have passed `check_adapters`.
        adapter_name: of the new one.

    Raises:
        ConfigError: SHiRA cannot hold the union of the entries; the model is as it was.
    """
    with trying(model, adapter_name, keep=True):
        if isinstance(model.peft_config[names[0]], LoraConfig):
            _concatenate_ranks(model, names, adapter_name)
        else:
            model.add_adapter(adapter_name, _config(model, names))
            for layer in saft_layers(model):
                _unite_saft(layer, names, adapter_name)
            for layer in _shira_layers(model, names[0]):
                _unite_shira(layer, names, adapter_name)
            for layer in _radapter_layers(model, names[0]):
                _unite_radapter(layer, names, adapter_name)
            _average_copies(model, names, adapter_name)
        model.set_adapter(adapter_name)
        show_values(model)


@contextmanager
def trying(model: PeftModel, adapter_name: str, keep: bool) -> Iterator[None]:
    """Inside the context an adapter may be added; then the model is again as it was: what it has, shows and trains.

    Args:
        model: the model.
        adapter_name: the adapter.
        keep: whether the adapter stays, if there was no error.
    """
    named, active, stays = model.active_adapter, list(model.active_adapters), False
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
        stays = keep
    finally:
        if not stays:
            model.base_model.set_adapter(active)
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            model.active_adapter = named
            for parameter, requires_grad in trains:
                parameter.requires_grad_(requires_grad)


# --- what is refused ---


def check_adapters(model: PeftModel, names: Sequence[str], adapter_name: str) -> None:
    """Refuses adapters whose mean is no adapter.

    Args:
        model: holds the adapters.
        names: of the adapters.
        adapter_name: of the one to add.

    Raises:
        ConfigError, SelectionError, MergeError, NonFiniteError: as `uniform_soup`.
    """
    if not isinstance(model, PeftModel):
        remedy = "Load them: PeftModel.from_pretrained(base, 'runs/a', 'a'), then model.load_adapter('runs/b', 'b')."
        raise ConfigError("model is no PeftModel that holds the adapters", got=type(model).__name__, remedy=remedy)
    for name in (*names, adapter_name):
        if not isinstance(name, str):
            raise ConfigError("no name of an adapter", got=type(name).__name__, allowed="text")
    if adapter_name in model.peft_config:
        remedy = "Choose another name, or delete that adapter first."
        raise ConfigError("the model has an adapter of this name", got=adapter_name, remedy=remedy)
    for name in names:
        if name not in model.peft_config:
            what, allowed = "the model has no adapter of this name", ", ".join(model.peft_config)
            raise ConfigError(
                what, got=name, allowed=allowed, remedy="Load a folder: model.load_adapter(folder, name)."
            )
        method = model.peft_config[name].peft_type.value
        if method not in METHODS:
            what = f"the mean of changes by {method} is not known to be one"
            raise ConfigError(what, where=name, allowed=", ".join(METHODS), remedy=MERGED)
    _check_same_places(model, names)
    for name in names:
        check_linear(model, name)
        _check_lora(model.peft_config[name], name)
        for tensor in adapter_tensors(model, name):
            check_finite(tensor.parameter, tensor.name)


def _check_same_places(model: PeftModel, names: Sequence[str]) -> None:
    first, *others = (_places(model.peft_config[name]) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        different = [place for place in PLACES if first[place] != other[place]]
        if different:
            got = f"{first[different[0]]} and {other[different[0]]}"
            what = f"adapters {names[0]!r} and {name!r} change different tensors of the base"
            raise MergeError(what, where=different[0], got=got, allowed="adapters of one kind")


def _places(config: Any) -> dict[str, Any]:
    settings = config.to_dict()
    found = {place: settings.get(place) for place in PLACES}
    return {place: sorted(value) if isinstance(value, set | list) else value for place, value in found.items()}


def _check_lora(config: Any, name: str) -> None:
    if not isinstance(config, LoraConfig):
        return
    for setting in ("lora_bias", "modules_to_save", "target_parameters"):
        if getattr(config, setting):
            what, remedy = f"PEFT cannot lay the ranks of LoRA with {setting} side by side", MERGED
            raise ConfigError(what, where=name, got=getattr(config, setting), remedy=remedy)


# --- how each method is averaged ---


def _config(model: PeftModel, names: Sequence[str]) -> Any:
    config = copy.copy(model.peft_config[names[0]])
    config.inference_mode = False
    if isinstance(config, RobustConfig):
        config.saved = None
    if isinstance(config, RAdapterConfig):
        ranks = [model.peft_config[name].r for name in names]
        config.r, config.scale = None if None in ranks else sum(ranks), 1.0
    if isinstance(config, SAFTConfig):
        layers = saft_layers(model)
        counts = [sum(len(_saft_positions(layer, some)) for layer in layers) for some in (names, names[:1])]
        config.entry_counts, config.density = None, min(1.0, config.density * counts[0] / counts[1])
    if isinstance(config, ShiraConfig):
        shira = _shira_layers(model, names[0])
        config.r = max(-(-len(_shira_positions(one, names)) // (one.in_features + one.out_features)) for one in shira)
        config.mask_type, config.mask_fn = "soup", None  # anything but "random": the entries come from the soup
        _check_shira_rank(config.r, shira)
    return config


def _saft_positions(layer: SAFTLayer, names: Sequence[str]) -> Tensor:
    """Those of all entries of some adapters, sorted and unique, `(entries,)`."""
    held = [layer.saft_indices[name] for name in names if name in layer.saft_indices]
    return torch.unique(torch.cat(held)) if held else torch.empty(0)


def _unite_saft(layer: SAFTLayer, names: Sequence[str], adapter_name: str) -> None:
    positions = _saft_positions(layer, names)
    layer.allocate(adapter_name, positions)
    layer.has_selected(adapter_name)
    if len(positions):
        soup, held = layer.saft_values[adapter_name], layer.saft_indices
        found = ((held[n], layer.saft_values[n]) if n in held else (positions[:0], soup[:0]) for n in names)
        soup.copy_(mean_tensor(_spread(own, values, positions) for own, values in found))


def _spread(own: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """An adapter's values at the positions of all, zero where it has none, `(positions,)`."""
    places = torch.searchsorted(positions, own)  # (entries,)
    return values.new_zeros(len(positions)).index_add(0, places, values)


def _shira_layers(model: PeftModel, name: str) -> list[Any]:
    layers = adapter_layers(model).values()
    return [layer for layer in layers if isinstance(layer, ShiraLayer) and name in layer.shira_weight]


def _flat(layer: Any, name: str) -> Tensor:
    rows, columns = layer.shira_indices[name].long().to(layer.shira_weight[name].device)
    return rows * layer.in_features + columns  # (entries,)


def _shira_positions(layer: Any, names: Sequence[str]) -> Tensor:
    return torch.unique(torch.cat([_flat(layer, name) for name in names]))


def _check_shira_rank(rank: int, layers: Sequence[Any]) -> None:
    for layer in layers:
        size, limit = rank * (layer.in_features + layer.out_features), layer.in_features * layer.out_features
        if size > limit:
            what = "SHiRA has as many entries in every module, and the soup's are too many for one"
            raise ConfigError(what, got=size, allowed=f"at most {limit}", remedy=MERGED)


def _unite_shira(layer: Any, names: Sequence[str], adapter_name: str) -> None:
    positions = _shira_positions(layer, names)
    found = ((_flat(layer, name), layer.shira_weight[name] * layer.scaling[name]) for name in names)
    mean = mean_tensor(_spread(own, values, positions) for own, values in found)
    soup = layer.shira_weight[adapter_name]
    padding = positions[:1].expand(len(soup) - len(positions))  # SHiRA adds up what stands at one place
    flat = torch.cat([positions, padding])
    layer.shira_indices[adapter_name] = torch.stack([flat // layer.in_features, flat % layer.in_features]).int()
    soup.zero_()[: len(mean)] = mean


def _radapter_layers(model: PeftModel, name: str) -> list[RAdapterLayer]:
    layers = [module for module in model.modules() if isinstance(module, RAdapterLayer)]
    return [layer for layer in layers if name in layer.configs]


def _unite_radapter(layer: RAdapterLayer, names: Sequence[str], adapter_name: str) -> None:
    """Lays the ranks side by side; where they would be as many as the layer is wide, F is the mean of products."""
    for evaluated in (False, True):
        found: Any = [layer.tensors(name, evaluated) for name in names]
        weight, down, scale = layer.tensors(adapter_name, evaluated)
        scale.fill_(1)
        if down is None:
            weight.copy_(mean_tensor(one_scale * _product(one, low) for one, low, one_scale in found))
        else:
            weight.copy_(torch.cat([one for one, _, _ in found], dim=1))
            down.copy_(torch.cat([one_scale / len(names) * low for _, low, one_scale in found]))


def _product(weight: Tensor, down: Tensor | None) -> Tensor:
    return weight if down is None else weight @ down


def _average_copies(model: PeftModel, names: Sequence[str], adapter_name: str) -> None:
    layers = {name for name, layer in adapter_layers(model).items() if isinstance(layer, COPIES)}
    found = (adapter_tensors(model, name) for name in (adapter_name, *names))
    columns = [[tensor for tensor in tensors if tensor.name.partition(" (")[0] in layers] for tensors in found]
    for soup, *tensors in zip(*columns, strict=True):
        soup.parameter.copy_(mean_tensor(tensor.parameter for tensor in tensors))


def _concatenate_ranks(model: PeftModel, names: Sequence[str], adapter_name: str) -> None:
    configs: list[Any] = [model.peft_config[name] for name in names]
    rank = sum(max([config.r, *config.rank_pattern.values()]) for config in configs)  # of the soup, as is its α
    scaling = rank**0.5 if configs[0].use_rslora else 1.0
    weights = [1 / (len(names) * scaling)] * len(names)
    with torch.random.fork_rng(devices=[]):  # PEFT draws A, and then overwrites it
        model.base_model.add_weighted_adapter(list(names), weights, adapter_name, combination_type="cat")
