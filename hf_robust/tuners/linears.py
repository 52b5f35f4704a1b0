# SPDX-License-Identifier: Apache-2.0
"""Which Linear modules a method that wraps them takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..encoders.dual_encoder import tower_modules
from ..errors import ConfigError
from .base import RobustLayer, check_unquantized
from .config import RobustConfig
from .matching import in_layers, matching, modules_to_save, outside


def find_linears(
    model: nn.Module, config: RobustConfig, kinds: Mapping[str, tuple[str, ...]], method: str
) -> dict[str, nn.Linear]:
    """Returns the Linear modules that an adapter takes, by name, in the order of the names.

    Args:
        model: the model without its PEFT wrapper; it may already hold adapters of the method.
        config: the settings of the adapter to add.
        kinds: what is taken in the blocks of a dual encoder where the config names no modules: endings of names, by
            what they are; every tower must have some of every kind.
        method: its name, for messages.

    Raises:
        ConfigError: a name matches nothing, a tower has no module of a known name, or one is quantised or shared.
    """
    linears = _linears(model)
    if config.target_modules:
        chosen = matching(config.target_modules, set(linears), "target_modules")
    else:
        chosen = set().union(*(_in_blocks(model, set(linears), kind, kinds[kind]) for kind in kinds))
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
            raise ConfigError(f"{method} trains plain Linear modules", where=name, got=got, remedy=remedy)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = sorted(name for name in chosen if any(owners[id(p)] > 1 for p in linears[name].parameters()))
    if shared:
        remedy = "Load the model untied, or leave them out with exclude_modules."
        raise ConfigError(f"{method} cannot train what several modules share", got=shared[:3], remedy=remedy)
    return {name: linears[name] for name in sorted(chosen)}


def _linears(model: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The Linear modules by name, outside `modules_to_save`; wrapped ones by the name of their wrapper."""
    found: dict[str, nn.Linear] = {}
    for name, child in model.named_children():
        if isinstance(child, RobustLayer):
            found[prefix + name] = child.base_layer  # type: ignore[assignment]
        elif isinstance(child, nn.Linear):
            found[prefix + name] = child
        elif not isinstance(child, AuxiliaryTrainingWrapper):
            found |= _linears(child, f"{prefix}{name}.")
    return found


def _in_blocks(model: nn.Module, names: set[str], kind: str, endings: tuple[str, ...]) -> set[str]:
    """Those with one of some endings that lie in a numbered block, which SigLIP's pooling head is none of."""
    in_blocks = {name for name in names if any(part.isdigit() for part in name.split("."))}
    chosen = {name for name in in_blocks if any(f".{name}".endswith(f".{ending}") for ending in endings)}
    for tower in ("vision", "text"):
        if not any(_is_in_tower(name, model, tower) for name in chosen):
            remedy = f"Name its {kind} in target_modules."
            what = f"the {tower} tower has no projection of a known name"
            raise ConfigError(what, allowed=", ".join(endings), remedy=remedy)
    return chosen


def _is_in_tower(name: str, model: nn.Module, tower: Any) -> bool:
    return any(name.startswith(f"{prefix}.") or name == prefix for prefix in tower_modules(model, tower))
