# SPDX-License-Identifier: Apache-2.0
"""A-CLIP as a PEFT tuner: wraps the query, key and value projections of attention."""

from __future__ import annotations

from collections import Counter
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...encoders.dual_encoder import family, tower_modules
from ...errors import ConfigError
from ..base import RobustTuner, check_unquantized
from ..matching import in_layers, matching, modules_to_save, outside
from .config import ACLIPConfig
from .layer import ACLIPLayer


class ACLIPModel(RobustTuner):
    """The tuner behind [`ACLIPConfig`].

    A-CLIP: Quantified Task Misalignment to Inform PEFT (Niss, Vogt-Lowell and Tsiligkaridis, 2024,
    https://huggingface.co/papers/2402.09613).

    Args:
        model: the model to adapt.
        peft_config: its config, or a dict of configs by adapter name.
        adapter_name: name of the first adapter.

    Example:
        >>> from hf_robust import ACLIPConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, ACLIPConfig(towers="vision"))  # doctest: +SKIP
        >>> model.print_trainable_parameters()  # doctest: +SKIP
    """

    prefix: str = "aclip_"
    tuner_layer_cls = ACLIPLayer

    def find_targets(self, model: nn.Module, config: ACLIPConfig) -> dict[str, nn.Linear]:
        """Returns the Linear modules whose weights an adapter trains.

        Args:
            model: the model without its PEFT wrapper; it may already hold A-CLIP adapters.
            config: the settings of the adapter to add.

        Raises:
            ConfigError: a name matches nothing, a tower has no projection of a known name, or one is quantised.
        """
        linears = _linears(model)
        chosen = matching(config.target_modules, set(linears), "target_modules") if config.target_modules else None
        if chosen is None:
            chosen = _attention(model, config, set(linears))
        chosen = outside(chosen, modules_to_save(model, config))
        if config.towers != "both":
            chosen = {name for name in chosen if _is_in_tower(name, model, config.towers)}
        chosen = in_layers(chosen, config)
        if config.exclude_modules:
            chosen = chosen - matching(config.exclude_modules, set(linears), "exclude_modules")
        if not chosen:
            raise ConfigError("no module is left to train", remedy="Widen target_modules, or exclude less.")
        check_unquantized(model, {f"{unit}.{n}": p for unit in chosen for n, p in linears[unit].named_parameters()})
        for name in sorted(chosen):
            if type(linears[name]) is not nn.Linear:
                remedy = "Load the model unquantised, or leave the module out with exclude_modules."
                got = type(linears[name]).__name__
                raise ConfigError("A-CLIP trains plain Linear modules", where=name, got=got, remedy=remedy)
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        shared = sorted(name for name in chosen if any(owners[id(p)] > 1 for p in linears[name].parameters()))
        if shared:
            remedy = "Load the model untied, or leave them out with exclude_modules."
            raise ConfigError("A-CLIP cannot train what several modules share", got=shared[:3], remedy=remedy)
        return {name: linears[name] for name in chosen}

    def _create_and_replace(
        self,
        peft_config: ACLIPConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, ACLIPLayer) else ACLIPLayer(target)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            setattr(parent, target_name, layer)


def _linears(model: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The Linear modules by name, outside `modules_to_save`; wrapped ones by the name of their wrapper."""
    found: dict[str, nn.Linear] = {}
    for name, child in model.named_children():
        if isinstance(child, ACLIPLayer):
            found[prefix + name] = child.base_layer
        elif isinstance(child, nn.Linear):
            found[prefix + name] = child
        elif not isinstance(child, AuxiliaryTrainingWrapper):
            found |= _linears(child, f"{prefix}{name}.")
    return found


def _attention(model: nn.Module, config: ACLIPConfig, names: set[str]) -> set[str]:
    """The projections of the model's family, at least one in every tower."""
    row = family(model)
    endings = row.qkv + (row.out_proj if config.train_out_proj else ())
    chosen = {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)}
    for tower in ("vision", "text"):
        if not any(_is_in_tower(name, model, tower) for name in chosen):
            remedy = "Name its query, key and value projections in target_modules."
            what = f"the {tower} tower has no projection of a known name"
            raise ConfigError(what, allowed=", ".join(endings), remedy=remedy)
    return chosen


def _is_in_tower(name: str, model: nn.Module, tower: Any) -> bool:
    return any(name.startswith(f"{prefix}.") or name == prefix for prefix in tower_modules(model, tower))
