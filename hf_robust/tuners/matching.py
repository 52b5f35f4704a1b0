# SPDX-License-Identifier: Apache-2.0
"""How users name modules: by a regular expression, or by endings."""

from __future__ import annotations

import re

from torch import nn

from ..errors import ConfigError, close_matches
from .config import RobustConfig

# Heads that PEFT adds to modules_to_save by the task_type, each of which a model may lack.
PEFTS_OWN = ("classifier", "score", "qa_outputs")


def matching(patterns: list[str] | str, names: set[str], argument: str) -> set[str]:
    """Returns those of some names that, or whose beginnings, match a regular expression or end in one of some names.

    Args:
        patterns: one regular expression for whole names, or names and endings of names.
        names: dotted names of modules or parameters; the beginnings of a name are the modules around it.
        argument: where the patterns come from, for the message.

    Raises:
        ConfigError: a pattern matches nothing, or is no regular expression.

    Example:
        >>> matching(["self_attn"], {"layers.0.self_attn.q_proj", "layers.0.fc1"}, "target_modules")
        {'layers.0.self_attn.q_proj'}
    """
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


def in_layers(names: set[str], config: RobustConfig) -> set[str]:
    """Returns those of some names that lie in the numbered layers a config asks for, by default all.

    Args:
        names: dotted names of modules or parameters.
        config: has `layers_to_transform` and `layers_pattern`.

    Raises:
        ConfigError: there is no layer of such a number.

    Example:
        >>> in_layers({"layers.0.fc1", "layers.1.fc1", "head"}, ACLIPConfig(layers_to_transform=1))
        {'layers.1.fc1'}
    """
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None or wanted == []:
        return names
    patterns = [patterns] if isinstance(patterns, str) else patterns or [""]
    numbers = {name: _layer(name, patterns) for name in names}
    wanted = [wanted] if isinstance(wanted, int) else wanted
    missing = set(wanted) - set(numbers.values())
    if missing:
        allowed = ", ".join(map(str, sorted(n for n in set(numbers.values()) if n is not None)))
        raise ConfigError("layers_to_transform matches no module", got=sorted(missing), allowed=allowed or "nothing")
    return {name for name, number in numbers.items() if number in wanted}


def _layer(name: str, patterns: list[str]) -> int | None:
    """The number of the innermost layer around a module."""
    parts = name.split(".")
    for place in reversed(range(len(parts) - 1)):
        before = "." + ".".join(parts[:place])
        if parts[place].isdigit() and any(before.endswith(f".{pattern}" if pattern else "") for pattern in patterns):
            return int(parts[place])
    return None


def modules_to_save(model: nn.Module, config: RobustConfig) -> set[str]:
    """Returns the names of the modules that PEFT trains in full for a config: those that end in one of its names.

    Args:
        model: the model without its PEFT wrapper; it may already hold adapters.
        config: has `modules_to_save`.

    Raises:
        ConfigError: a name matches nothing. Those that PEFT adds by itself for a `task_type` need not.
    """
    names = {name for name, _ in model.named_modules()}
    known = {name.removesuffix(".original_module") for name in names}
    found: set[str] = set()
    for wanted in config.modules_to_save or []:
        matched = {name for name in known if name.endswith(wanted)}
        if not matched and not (config.task_type and wanted in PEFTS_OWN):
            remedy = close_matches(wanted, sorted({name.split(".")[-1] for name in known if name}))
            raise ConfigError("modules_to_save matches no module", got=wanted, remedy=remedy)
        found |= matched
    return found


def outside(names: set[str], modules: set[str]) -> set[str]:
    """Returns those of some names that are not, and do not lie in, one of some modules.

    Args:
        names: dotted names of modules or parameters.
        modules: names of modules.
    """
    return {name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in modules)}
