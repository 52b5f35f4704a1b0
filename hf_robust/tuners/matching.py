# SPDX-License-Identifier: Apache-2.0
"""How users name adapters, and modules: by a regular expression, or by endings."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Set

import regex
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import ConfigError, close_matches
from ..tasks.task import PROCESSOR_FOLDER
from .config import RobustConfig

# Heads that PEFT adds to modules_to_save by the task_type, each of which a model may lack.
PEFTS_OWN = ("classifier", "score", "qa_outputs")
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
    """The number of the outermost layer around a module, as in LoRA."""
    parts = name.split(".")
    for place in range(len(parts) - 1):
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
        ConfigError: a name matches nothing, or what holds an adapter. Those that PEFT adds by itself for a `task_type`
            need not match.
    """
    names = {name for name, _ in model.named_modules()}
    known = {name.removesuffix(".original_module") for name in names}
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found: set[str] = set()
    for wanted in config.modules_to_save or []:
        matched = {name for name in known if name.endswith(wanted)}
        if not matched and not (config.task_type and wanted in PEFTS_OWN):
            last = {name.split(".")[-1] for name in known}
            remedy = close_matches(wanted, sorted(name for name in last if name and not name.isdigit()))
            raise ConfigError("modules_to_save matches no module", got=wanted, remedy=remedy)
        inside = adapted - outside(adapted, matched)
        if inside:
            remedy = "Add the adapter with modules_to_save first, or give it a model of its own."
            raise ConfigError("modules_to_save names what holds another adapter", got=min(inside), remedy=remedy)
        found |= matched
    return found


def outside(names: set[str], modules: set[str]) -> set[str]:
    """Returns those of some names that are not, and do not lie in, one of some modules.

    Args:
        names: dotted names of modules or parameters.
        modules: names of modules.
    """
    return {name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in modules)}
