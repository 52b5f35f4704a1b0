# SPDX-License-Identifier: Apache-2.0
"""What it takes to put the values of SAFT adapters into the weights of one unit, and to take them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError, ConfigError
from .kernels import Entries


@dataclass(frozen=True)
class Stamp:
    """Recognises a state of some tensors: the same objects, not written to since."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Stamp:
        """Takes the stamp of `tensors`; inference tensors keep no version."""
        return cls(tuple(tensors), tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors))

    def matches(self, other: Stamp) -> bool:
        """Whether both stamps are of the same tensors in the same state."""
        same_objects = all(mine is theirs for mine, theirs in zip(self.tensors, other.tensors, strict=False))
        return self.versions == other.versions and same_objects


class Effective(torch.autograd.Function):
    """`originals + delta`, rounded once to the base's dtype; a delta of zero leaves the bits (also those of −0)."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, originals: Tensor) -> Tensor:  # noqa: D102
        ctx.dtype = delta.dtype
        return torch.where(delta == 0, originals, (originals.to(delta.dtype) + delta).to(originals.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return grad_output.to(ctx.dtype), None


@dataclass(frozen=True)
class TensorPlan:
    """Which slice of the unit's entries belongs to one parameter of the base, and the base's values there.

    Args:
        name: of the parameter, relative to the base.
        parameter: the parameter as it was when the plan was made.
        entries: its entries.
        part: where they stand in the unit's joined entries.
        originals: θ₀ there, `(entries,)`.
    """

    name: str
    parameter: nn.Parameter
    entries: Entries
    part: slice
    originals: Tensor


@dataclass(frozen=True)
class Plan:
    """The entries of the active adapters, joined, parameter by parameter.

    Args:
        adapters: names of the adapters.
        tensors: one a parameter that holds entries.
        lookups: for several adapters, where each one's entries stand among the joined; empty for one adapter.
        size: number of joined entries.
        stamp: of the indices this was made from.
    """

    adapters: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    lookups: tuple[Tensor, ...]
    size: int
    stamp: Stamp

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold entries."""
        return [tensor.parameter for tensor in self.tensors]

    @property
    def originals(self) -> list[Tensor]:
        """θ₀ at the entries, by parameter."""
        return [tensor.originals for tensor in self.tensors]

    def is_writable(self, base_layer: nn.Module) -> bool:
        """Whether the base still owns the very parameters planned for, and this process alone does.

        FSDP and offloading put others there; `share_memory()` would show one process's adapters to all.

        Raises:
            ConfigError: FSDP1 has put tensors there that are no parameters.
        """
        if getattr(base_layer, "_is_fsdp_managed_module", False):  # a gathered weight looks like one of the base's own
            self._check_owned(base_layer)
            return False
        return all(
            tensor.parameter.is_contiguous()
            and not tensor.parameter.is_inference()
            and not (tensor.parameter.is_cpu and tensor.parameter.is_shared())
            and base_layer.get_parameter(tensor.name) is tensor.parameter
            for tensor in self.tensors
        )

    def versions(self) -> tuple[int, ...]:
        """The version counters of the parameters that hold entries."""
        return tuple(parameter._version for parameter in self.parameters)

    def entries_now(self) -> list[Tensor]:
        """What stands at the entries now, by parameter."""
        return [tensor.parameter.detach().flatten()[tensor.entries.positions] for tensor in self.tensors]

    def _check_owned(self, base_layer: nn.Module) -> None:
        owned = dict(base_layer.named_parameters())
        if not all(isinstance(owned.get(tensor.name), nn.Parameter) for tensor in self.tensors):  # FSDP1: views of one
            what, allowed = "SAFT cannot put its values into weights that are no parameters", "FSDP2"
            remedy = "Use torch.distributed.fsdp.fully_shard, or set fsdp_version: 2 for Accelerate."
            raise ConfigError(what, got="FullyShardedDataParallel", allowed=allowed, remedy=remedy)

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The adapters' values added up, `(size,)`, with their gradient."""
        if not self.lookups:
            return values[0]
        total = values[0].new_zeros(self.size)
        for lookup, value in zip(self.lookups, values, strict=True):
            total = total.index_add(0, lookup, value)
        return total

    def effective(self, delta: Tensor) -> list[Tensor]:
        """θ₀ + delta at the entries, by parameter."""
        return [Effective.apply(delta[tensor.part], tensor.originals) for tensor in self.tensors]

    def with_fresh_originals(self) -> Plan:
        """The same plan with θ₀ read again from the base."""
        fresh = [replace(t, originals=now) for t, now in zip(self.tensors, self.entries_now(), strict=True)]
        return replace(self, tensors=tuple(fresh))

    @torch.no_grad()
    def store(self, values: Sequence[Tensor]) -> None:
        """Writes `values`, by parameter, to the entries of the base."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.parameter.view(-1)[tensor.entries.positions] = value


def make_plan(base_layer: nn.Module, indices: dict[str, Tensor], stamp: Stamp) -> Plan:
    """Joins the entries of adapters and splits them by parameter.

    Args:
        base_layer: the unit, holding θ₀.
        indices: flat positions in the unit, by adapter.
        stamp: of the indices.

    Raises:
        AdapterFileError: indices are no integers, out of range, or not strictly increasing.
    """
    parameters = floating_parameters(base_layer)
    numel = sum(parameter.numel() for parameter in parameters.values())
    checked = [checked_positions(index, numel) for index in indices.values()]
    joined, lookups = checked[0], ()
    if len(checked) > 1:
        joined, lookup = torch.unique(torch.cat(checked), return_inverse=True)
        lookups = lookup.split([len(index) for index in checked])
    tensors, start = [], 0
    for name, positions in by_parameter(base_layer, joined).items():
        parameter, stop = parameters[name], start + len(positions)
        originals = parameter.detach().flatten()[positions]
        entries = Entries.of(positions, parameter.shape)
        tensors.append(TensorPlan(name, parameter, entries, slice(start, stop), originals))
        start = stop
    return Plan(tuple(indices), tuple(tensors), tuple(lookups), len(joined), stamp)


def floating_parameters(base_layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that entries are counted through, in order."""
    return {name: p for name, p in base_layer.named_parameters() if p.is_floating_point()}


def by_parameter(base_layer: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """Splits sorted positions in a unit into positions in those of its parameters that have some, by name."""
    parameters = floating_parameters(base_layer)
    edges = torch.tensor([0, *(parameter.numel() for parameter in parameters.values())]).cumsum(0)
    bounds = torch.searchsorted(positions.long(), edges.to(positions.device)).tolist()
    parts = zip(parameters, edges.tolist()[:-1], bounds[:-1], bounds[1:], strict=True)
    return {name: positions[start:stop].long() - edge for name, edge, start, stop in parts if start < stop}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit by bit: −0 is not +0, NaN is NaN."""
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def set_versions(parameters: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Sets autograd's version counters.

    Autograd refuses to use a saved weight whose counter has moved. After a round trip the bits are the same again, so
    the counter may say so; torch has no public way to tell it.
    """
    torch._C._autograd._unsafe_set_version_counter(tuple(parameters), tuple(versions))


def checked_positions(indices: Tensor, numel: int) -> Tensor:
    """Positions as int64, once they are known to be safe to use.

    Args:
        indices: positions of entries.
        numel: how many numbers there are to choose from.

    Raises:
        AdapterFileError: they are no integers, out of range, or not strictly increasing.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise AdapterFileError("indices have a wrong type", got=str(indices.dtype), allowed="int32 or int64")
    indices = indices.to(torch.int64)
    if indices[0] < 0 or indices[-1] >= numel:
        got = (int(indices[0]), int(indices[-1]))
        raise AdapterFileError("an index is outside the module", got=got, allowed=f"0 to {numel - 1}")
    if not (indices.diff() > 0).all():
        raise AdapterFileError("indices are not strictly increasing", remedy="Save the adapter again.")
    return indices
