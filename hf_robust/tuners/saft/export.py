# SPDX-License-Identifier: Apache-2.0
"""A SAFT adapter as a stock PEFT adapter, for people who do not have this package."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import ConfigError, SelectionError
from .layer import SAFTLayer
from .selection import find_selected


def export_shira(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> None:
    """Writes a SAFT adapter as a SHiRA adapter, which `PeftModel.from_pretrained` reads without hf_robust.

    SHiRA (https://huggingface.co/papers/2406.13175) keeps the same number of entries in every layer, `r * (in + out)`:
    layers with fewer are padded with the entry (0, 0) and the value 0.

    Args:
        model: a `PeftModel` with a SAFT adapter, or a module that holds one.
        path: folder for `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: the adapter; by default the active one.

    Raises:
        ConfigError: entries lie outside the weights of `nn.Linear` modules, or are too many for SHiRA; nothing is
            written then.
        SelectionError: the adapter has not selected its entries yet.

    Example:
        >>> config = SAFTConfig(target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["bias"])
        >>> export_shira(model, "adapter-for-everybody")  # doctest: +SKIP
    """
    found, name = find_selected(model, adapter_name)
    config = found[0].saft_configs[name]
    layers = {layer.unit: layer for layer in found if name in layer.saft_values}
    _refuse_others(layers, name, config.modules_to_save)
    rank = _rank(layers, name)
    tensors: dict[str, Tensor] = {}
    for unit, layer in layers.items():
        weight = layer.base_layer.weight
        size = rank * sum(weight.shape)
        positions = layer.saft_indices[name].long()
        indices = torch.zeros(2, size, dtype=torch.int32)
        indices[:, : len(positions)] = torch.stack([positions // weight.shape[1], positions % weight.shape[1]])
        values = torch.zeros(size, dtype=layer.saft_values[name].dtype)
        values[: len(positions)] = layer.saft_values[name].detach()
        tensors[f"base_model.model.{unit}.shira_indices"] = indices
        tensors[f"base_model.model.{unit}.shira_weight"] = values
    shira = ShiraConfig(
        r=rank,
        mask_type="saft",  # anything but "random": the indices come from the file
        target_modules=sorted(layers),
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    shira.save_pretrained(str(path))
    save_file(tensors, str(Path(path) / "adapter_model.safetensors"), metadata={"format": "pt"})


def exports_to_shira(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Whether `export_shira` can write an adapter: a SAFT adapter with all entries in the weights of `nn.Linear`.

    Args:
        model: as in `export_shira`; it may have adapters of other methods, or none.
        adapter_name: likewise.

    Example:
        >>> if exports_to_shira(model):
        ...     export_shira(model, "adapter-for-everybody")
    """
    try:
        found, name = find_selected(model, adapter_name)
        layers = {layer.unit: layer for layer in found if name in layer.saft_values}
        _refuse_others(layers, name, found[0].saft_configs[name].modules_to_save)
        _rank(layers, name)
    except (ConfigError, SelectionError):
        return False
    return True


def _rank(layers: dict[str, SAFTLayer], name: str) -> int:
    """SHiRA's r, by which every layer has room for its entries."""
    rank = max(-(-len(layer.saft_values[name]) // sum(layer.base_layer.weight.shape)) for layer in layers.values())
    for unit, layer in layers.items():
        weight = layer.base_layer.weight
        if (got := rank * sum(weight.shape)) > weight.numel():
            allowed = f"at most {weight.numel()}"
            raise ConfigError("SHiRA needs as many entries in every layer", where=unit, got=got, allowed=allowed)
    return rank


def _refuse_others(layers: dict[str, SAFTLayer], name: str, modules_to_save: list[str] | None) -> None:
    others = list(modules_to_save or [])
    for unit, layer in layers.items():
        weight = layer.base_layer.weight.numel() if type(layer.base_layer) is nn.Linear else 0
        outside = int((layer.saft_indices[name] >= weight).sum())  # behind the weight lies the bias
        if outside:
            others.append(f"{unit} ({outside} entries)")
    if others:
        raise ConfigError(
            "only entries in the weights of Linear modules can be exported",
            got=others[:5] + ([f"(+{len(others) - 5} more)"] if len(others) > 5 else []),
            remedy="Select with target_modules=<the Linear modules> and exclude_modules=['bias'].",
        )
