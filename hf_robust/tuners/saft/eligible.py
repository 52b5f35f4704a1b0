# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model SAFT may select from, and in which units they are wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...dual_encoder import input_embeddings, tower_modules
from ...errors import ConfigError, close_matches
from .config import SAFTConfig
from .layer import SAFTLayer


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
    chosen = _matching(config.target_modules, names, "target_modules") if config.target_modules else names
    if config.exclude_modules:
        chosen = chosen - _matching(config.exclude_modules, names, "exclude_modules")
    if config.modules_to_save:
        chosen = chosen - _matching(config.modules_to_save, names, "modules_to_save")
    if config.towers != "both":
        prefixes = tower_modules(model, config.towers)
        chosen = {name for name in chosen if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    if config.exclude_input_embeddings:
        excluded = {id(p) for module in input_embeddings(model) for p in module.parameters()}
        chosen = {n for n in chosen if id(_parameter(units, n)) not in excluded}
    if not chosen:
        raise ConfigError("no parameter is left to select from", remedy="Widen target_modules, or exclude less.")
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


def _matching(patterns: list[str] | str, names: set[str], argument: str) -> set[str]:
    """The parameters whose own name, or that of a module around them, matches a regex or one of some endings."""
    paths = {name: [".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)] for name in names}
    if isinstance(patterns, str):
        try:
            regex = re.compile(patterns)
        except re.error as error:
            raise ConfigError(f"{argument} is no regular expression: {error}", got=patterns) from error
        found = {name for name in names if any(regex.fullmatch(path) for path in paths[name])}
        wanted = {patterns: found}
    else:
        wanted = {
            pattern: {n for n in names if any(p == pattern or p.endswith(f".{pattern}") for p in paths[n])}
            for pattern in patterns
        }
    for pattern, found in wanted.items():
        if not found:
            known = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            raise ConfigError(
                f"{argument} matches no module", got=pattern, remedy=close_matches(pattern.split(".")[-1], known)
            )
    return set().union(*wanted.values())
