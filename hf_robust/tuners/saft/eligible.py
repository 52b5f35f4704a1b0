# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model SAFT may select from, and in which units they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...encoders.dual_encoder import input_embeddings, is_dual_encoder, tower_modules
from ...errors import ConfigError
from ..matching import matching
from .config import SAFTConfig
from .layer import SAFTLayer

REMEDY = "Widen target_modules, or exclude less; exclude_input_embeddings=True, the default, excludes as well."


def eligible_parameters(model: nn.Module, config: SAFTConfig) -> dict[str, tuple[str, ...]]:
    """The parameters an adapter may select from, by unit.

    A unit is the outermost module that owns a parameter. Parameters of the root itself (a dual encoder's
    `logit_scale`) belong to no module that PEFT can wrap, and are never eligible.

    Args:
        model: the model without its PEFT wrapper; it may already hold SAFT adapters.
        config: what narrows the choice.

    Returns:
        For each unit's name the names of its eligible parameters, relative to the unit.

    Raises:
        ConfigError: a name matches nothing, two modules share a parameter, or nothing is left.
    """
    units = dict(_units(model))
    _refuse_tied(units)
    names = {
        f"{unit}.{name}" for unit, m in units.items() for name, p in m.named_parameters() if p.is_floating_point()
    }
    chosen = matching(config.target_modules, names, "target_modules") if config.target_modules else names
    if config.exclude_modules:
        chosen = chosen - matching(config.exclude_modules, names, "exclude_modules")
    if config.modules_to_save:
        chosen = chosen - matching(config.modules_to_save, names, "modules_to_save")
    if config.towers != "both":
        prefixes = tower_modules(model, config.towers)
        chosen = {name for name in chosen if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    if config.exclude_input_embeddings and is_dual_encoder(model):
        excluded = {id(p) for module in input_embeddings(model) for p in module.parameters()}
        chosen = {n for n in chosen if id(_parameter(units, n)) not in excluded}
    if not chosen:
        raise ConfigError("no parameter is left to select from", remedy=REMEDY)
    found = {
        unit: tuple(name for name, _ in module.named_parameters() if f"{unit}.{name}" in chosen)
        for unit, module in units.items()
    }
    return {unit: parameters for unit, parameters in found.items() if parameters}


def _units(module: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    seen = set() if seen is None else seen
    for name, child in module.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue
        base = child.base_layer if isinstance(child, SAFTLayer) else child
        if id(base) in seen:  # registered at two paths: known by its first
            continue
        seen.add(id(base))
        if any(parameter is not None for parameter in base._parameters.values()):
            yield prefix + name, base
        else:
            yield from _units(base, f"{prefix}{name}.", seen)


def _refuse_tied(units: dict[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for unit, module in units.items():
        for parameter in module.parameters():
            other = owner.setdefault(id(parameter), unit)
            if other != unit:
                raise ConfigError(
                    "two modules share one parameter; SAFT would write it twice",
                    got=[other, unit],
                    remedy="Load the model untied, or leave one of them out with exclude_modules.",
                )


def _parameter(units: dict[str, nn.Module], name: str) -> nn.Parameter:
    unit = next(unit for unit in units if name.startswith(f"{unit}."))
    return units[unit].get_parameter(name.removeprefix(f"{unit}."))
