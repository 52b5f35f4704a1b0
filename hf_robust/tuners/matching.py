# SPDX-License-Identifier: Apache-2.0
"""How users name adapters, and modules: by a regular expression, or by endings."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Set
from typing import Any

import regex
from torch import nn

from ..errors import ConfigError, close_matches
from ..tasks.class_names import PROCESSOR_FOLDER

SECONDS, COST = 1.0, 50_000  # for all names together; characters of a pattern with what its braces repeat
COUNT = re.compile(r"\{(\d{0,3})(?:,(\d{0,3}))?\}")
SIMPLER = "Simplify it, or give a list of names."
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # on Windows
ATTRIBUTES = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # what PEFT keeps an adapter's tensors in


def check_adapter_name(name: str) -> None:
    """Refuses names of adapters that cannot be the name of a folder, in which PEFT saves it, and of an attribute.

    Args:
        name: of the adapter.

    Raises:
        ConfigError: the folder could lie elsewhere, be misread, or not be made; or the name is taken.

    Example:
        >>> check_adapter_name("birds_2024")
        >>> check_adapter_name("../birds")
        Traceback (most recent call last):
        hf_robust.errors.ConfigError: adapter's name cannot be used: got '../birds'; allowed 1 to 64 of A-Z, a-z, …
    """
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is None:
        raise ConfigError("adapter's name cannot be used", got=name, allowed="1 to 64 of A-Z, a-z, 0-9, _ and -")
    if name.lower() in DEVICES | {PROCESSOR_FOLDER} or name in ATTRIBUTES:
        what = "adapter's name is taken by Windows, PyTorch or the folder of the processor"
        raise ConfigError(what, got=name, remedy="Choose another one.")


def matching(patterns: list[str] | str, names: set[str], argument: str) -> set[str]:
    """Returns those of some names that, or whose beginnings, match a regular expression or end in one of some names.

    A pattern from a file may be written so that it would take for ever: all of it has a second.

    Args:
        patterns: one regular expression for whole names, or names and endings of names.
        names: dotted names of modules or parameters; the beginnings of a name are the modules around it.
        argument: where the patterns come from, for the message.

    Raises:
        ConfigError: a pattern matches nothing, is no regular expression, or one that takes too long.

    Example:
        >>> matching(["self_attn"], {"layers.0.self_attn.q_proj", "layers.0.fc1"}, "target_modules")
        {'layers.0.self_attn.q_proj'}
    """
    beginnings: dict[str, set[str]] = defaultdict(set)  # of names, each with the names that begin so
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            beginnings[".".join(parts[:count])].add(name)
    if isinstance(patterns, str):
        found = _full_matches(patterns, beginnings.keys(), argument)
        wanted = {patterns: set().union(*(beginnings[path] for path in found))}
    else:
        endings: dict[str, set[str]] = defaultdict(set)
        for path, beginning in beginnings.items():
            parts = path.split(".")
            for first in range(len(parts)):
                endings[".".join(parts[first:])] |= beginning
        wanted = {pattern: endings.get(pattern, set()) for pattern in patterns}
    for pattern, found in wanted.items():
        if not found:
            known = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            remedy = close_matches(pattern.split(".")[-1][:100], known)
            raise ConfigError(f"{argument} matches no module", got=pattern, remedy=remedy)
    return set().union(*wanted.values())


def _full_matches(pattern: str, paths: Set[str], argument: str) -> set[str]:
    compiled, end, found = _compiled(pattern, argument), time.monotonic() + SECONDS, set()
    for path in paths:
        try:
            if compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-6)):
                found.add(path)
        except TimeoutError as error:
            what = f"{argument} takes longer than {SECONDS:g} s to match"
            raise ConfigError(what, got=pattern, remedy=SIMPLER) from error
    return found


def _compiled(pattern: str, argument: str) -> regex.Pattern:
    """Returns a pattern that `re` would take too, in the engine that knows a timeout."""
    if pattern.count("{") != len(COUNT.findall(pattern)):  # in regex, {e<=1} allows errors
        raise ConfigError(f"{argument} has braces that are no count", got=pattern, allowed="{2}, {1,3}, {1,} or {,3}")
    counts = [int(number) for count in COUNT.findall(pattern) for number in count if number]
    if len(pattern) * math.prod(max(count, 1) for count in counts) > COST:  # regex writes repetitions out
        raise ConfigError(f"{argument} is too long or repeats too much", got=pattern, remedy=SIMPLER)
    try:
        re.compile(pattern)
        return regex.compile(pattern, flags=regex.V0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{argument} is no regular expression: {error}", got=pattern) from error


def check_patterns(config: Any) -> None:
    """Refuses empty `target_modules` and `exclude_modules` of a config and what holds no text, and sorts sets.

    Args:
        config: a config with these two fields.

    Raises:
        ConfigError: one of them is empty, or neither text nor names.
    """
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if value is None:
            continue
        if not isinstance(value, str | list | set | tuple) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{name} holds no names", got=value, allowed="a regular expression or a list of names")
        if isinstance(value, set | tuple):  # a set has no order, and the saved file shall not depend on hashes
            setattr(config, name, sorted(value))
        if len(value) == 0:
            raise ConfigError(f"{name} is empty", got=value, remedy="Leave it at None, or name modules.")
