# SPDX-License-Identifier: Apache-2.0
"""The state of terms of the loss in a checkpoint: parameters, persistent buffers, and what they have beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError

FILE = "losses.safetensors"  # of a checkpoint; never of a saved model
EXTRA = "_extra_state"  # how PyTorch calls what `get_extra_state` returns


def save_terms(terms: nn.ModuleDict, folder: Path) -> None:
    """Writes the state of terms, where they have any.

    Args:
        terms: those of the task.
        folder: of the checkpoint.

    Raises:
        ConfigError: an extra state is something else than tensors by name.
    """
    tensors = terms_state(terms)
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)


def load_terms(terms: nn.ModuleDict, folder: Path) -> None:
    """Reads back what `save_terms` wrote, in place.

    Args:
        terms: those of the task.
        folder: of the checkpoint.

    Raises:
        AdapterFileError: the checkpoint has the state of other terms, or none.
    """
    file = folder / FILE
    saved = load_file(file) if file.is_file() else {}
    own = {name: tensor.shape for name, tensor in terms.state_dict().items() if isinstance(tensor, Tensor)}
    extras = {f"{path}.{EXTRA}.": module for path, module in stateful(terms)}
    beside = {name for name in saved if f"{name}.".startswith(tuple(extras))}
    rest = {name: tensor for name, tensor in saved.items() if name not in beside}
    wrong = [name for name in {**own, **rest} if name not in own or name not in rest or own[name] != rest[name].shape]
    lacking = [path for path in extras if not any(f"{name}.".startswith(path) for name in beside)]
    if wrong or lacking:
        remedy = "Resume with the losses it was trained with."
        what, got = "checkpoint has the state of other losses", sorted(wrong + lacking)[:3]
        raise AdapterFileError(what, where=str(file), got=got, remedy=remedy)
    terms.load_state_dict(rest, strict=False)  # without what lies beside the tensors
    for path, module in extras.items():
        module.set_extra_state({n.removeprefix(path): tensor for n, tensor in saved.items() if n.startswith(path)})


def stateful(terms: nn.ModuleDict) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of terms that have a state beside their tensors, each with its path.

    Args:
        terms: those of a task.
    """
    for path, module in terms.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:  # as PyTorch asks
            yield path, module


def terms_state(terms: nn.ModuleDict) -> dict[str, Tensor]:
    """Returns the state of terms, all of it as tensors by name.

    Args:
        terms: those of a task.

    Raises:
        ConfigError: an extra state is something else than tensors by name.
    """
    found: dict[str, Tensor] = {name: t for name, t in terms.state_dict().items() if isinstance(t, Tensor)}
    for path, module in stateful(terms):
        state = module.get_extra_state()
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            what, allowed = "the extra state of a loss cannot be saved", "a dictionary of tensors by name"
            raise ConfigError(what, where=path, got=type(state).__name__, allowed=allowed)
        by_name = {f"{path}.{EXTRA}.{name}": tensor for name, tensor in state.items()}
        found |= by_name or {f"{path}.{EXTRA}": torch.zeros(0)}  # an empty state is not the lack of one
    return found
