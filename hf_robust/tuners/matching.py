# SPDX-License-Identifier: Apache-2.0
"""How users name modules: by a regular expression, or by endings."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError, close_matches


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


def check_patterns(config: Any) -> None:
    """Refuses empty `target_modules` and `exclude_modules` of a config, and sorts sets.

    Args:
        config: a config with these two fields.

    Raises:
        ConfigError: one of them is empty.
    """
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, set | tuple):  # a set has no order, and the saved file shall not depend on hashes
            setattr(config, name, sorted(value))
        if value is not None and len(value) == 0:
            raise ConfigError(f"{name} is empty", got=value, remedy="Leave it at None, or name modules.")
