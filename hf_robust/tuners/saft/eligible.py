# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model SAFT may select from, and in which units they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...encoders.dual_encoder import input_embeddings, is_dual_encoder, tower_modules
from ...errors import ConfigError
from ..base import check_unquantized
from ..matching import in_layers, matching, modules_to_save, outside
from .config import SAFTConfig
from .layer import SAFTLayer

REMEDY = "Widen target_modules, or exclude less; exclude_input_embeddings=True, the default, excludes as well."


def eligible_parameters(model: nn.Module, config: SAFTConfig) -> dict[str, tuple[str, ...]]:
    """The parameters an adapter may select from, by unit.

    A unit is the outermost module that owns a parameter. Parameters of the root itself (a dual encoder's
    `logit_scale`) belong to no module that PEFT can wrap, and are never eligible. A parameter that two modules share
    is left out where one of its names is excluded.

    Args:
        model: the model without its PEFT wrapper; it may already hold SAFT adapters.
        config: what narrows the choice.

    Returns:
        For each unit's name the names of its eligible parameters, relative to the unit.

    Raises:
        ConfigError: a name matches nothing, an eligible parameter is shared, quantised or renormalised, or nothing is
            left.
    """
    units = dict(_units(model))
    parameters = {f"{unit}.{name}": p for unit, module in units.items() for name, p in module.named_parameters()}
    chosen = _chosen(model, config, parameters)
    if not chosen:
        raise ConfigError("no parameter is left to select from", remedy=REMEDY)
    check_unquantized(model, {name: parameters[name] for name in chosen})
    found = {
        unit: tuple(name for name, _ in module.named_parameters() if f"{unit}.{name}" in chosen)
        for unit, module in units.items()
    }
    found = {unit: names for unit, names in found.items() if names}
    _refuse_tied({unit: units[unit] for unit in found}, _owners(model, units), chosen)
    for unit in found:
        _refuse_renormalising(unit, units[unit])
    return found


def _chosen(model: nn.Module, config: SAFTConfig, parameters: dict[str, nn.Parameter]) -> set[str]:
    names = set(parameters)
    chosen = matching(config.target_modules, names, "target_modules") if config.target_modules else names
    heads = modules_to_save(model, config)
    excluded = names - outside(names, heads)
    if config.exclude_modules:
        excluded |= matching(config.exclude_modules, names, "exclude_modules")
    if config.towers != "both":
        prefixes = tower_modules(model, config.towers)
        chosen = {name for name in chosen if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    chosen = in_layers(chosen, config)
    left_out = {id(parameters[name]) for name in excluded}
    left_out |= {id(parameter) for name in heads for parameter in model.get_submodule(name).parameters()}
    if config.exclude_input_embeddings and is_dual_encoder(model):
        left_out |= {id(p) for module in input_embeddings(model) for p in module.parameters()}
    return {name for name in chosen if id(parameters[name]) not in left_out}


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


def _owners(model: nn.Module, units: dict[str, nn.Module]) -> dict[int, list[str]]:
    """The names of the units, and of what cannot be one, that have a parameter, by its id."""
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    owners: dict[int, list[str]] = {id(parameter): ["the model"] for parameter in model.parameters(recurse=False)}
    for unit, module in {**units, **wrapped}.items():
        for parameter in module.parameters():
            owners.setdefault(id(parameter), []).append(unit)
    return owners


def _refuse_tied(taken: dict[str, nn.Module], owners: dict[int, list[str]], chosen: set[str]) -> None:
    for unit, module in taken.items():
        for name, parameter in module.named_parameters():
            if len(owners[id(parameter)]) > 1 and f"{unit}.{name}" in chosen:
                raise ConfigError(
                    "modules share a parameter; SAFT would train it as a part of one of them",
                    got=owners[id(parameter)],
                    remedy="Load the model untied, or leave the parameter out with exclude_modules.",
                )


def _refuse_renormalising(unit: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ConfigError(
            "SAFT cannot train an embedding that renormalises itself",
            where=unit,
            got=f"max_norm={module.max_norm}",
            remedy="Leave the module out with exclude_modules.",
        )
