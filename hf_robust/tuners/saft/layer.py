# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one unit of the base model: its selected entries, and how they get into the base's weights.

The tuned values live inside the base's own weights. The unit remembers the k original values; writing an adapter costs
k scattered stores, and taking it back gives the base bit for bit. Where the base cannot be written (sharded, compiled,
inference tensors), the same numbers are put into a copy of the weight at every forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...errors import AdapterFileError, ConfigError, NonFiniteError, SelectionError
from .config import SAFTConfig
from .kernels import Entries, ResidentAlias, SampledEmbedding, SampledLinear

# Numbers for the version counters of written weights start here, far from what in-place edits of the base count up to.
FIRST_VERSION = 2**20


@dataclass(frozen=True)
class TensorPlan:
    """Which slice of the unit's entries belongs to one parameter of the base, and the base's values there."""

    name: str
    parameter: nn.Parameter
    entries: Entries
    part: slice
    originals: Tensor


@dataclass(frozen=True)
class Plan:
    """What the active adapters need to be written: their entries joined, parameter by parameter.

    Args:
        adapters: their names.
        tensors: one plan a parameter that holds entries.
        lookups: for several adapters, where each one's entries stand in the joined vector; empty for one adapter.
        size: number of joined entries.
        stamp: the state of the indices this was made from.
    """

    adapters: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    lookups: tuple[Tensor, ...]
    size: int
    stamp: Stamp


@dataclass(frozen=True)
class Stamp:
    """Recognises a state of some tensors: the same objects, not written to since."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Stamp:
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


class SAFTLayer(nn.Module, BaseTunerLayer):
    """A unit of the base with its selected entries.

    A unit is the outermost module that owns a parameter: a Linear, LayerNorm, Embedding, Conv, or a module with bare
    parameters together with all it contains. Entries are flat positions in its floating-point parameters, laid end to
    end in the order of `named_parameters()`.

    Args:
        base_layer: the module to wrap.
    """

    adapter_layer_names = ("saft_values",)
    other_param_names = ("saft_indices", "saft_eligible")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, nn.Embedding) and base_layer.max_norm is not None:
            raise ConfigError(
                "SAFT cannot train an embedding that renormalises itself",
                got=f"max_norm={base_layer.max_norm}",
                remedy="Leave the module out with exclude_modules.",
            )
        self.base_layer: Any = base_layer
        self.saft_values = nn.ParameterDict()
        self.saft_indices = BufferDict(persistent=True)
        # Names of the parameters an adapter may select from; () once it has selected.
        self.saft_eligible: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._plan: Plan | None = None
        self._written: Stamp | None = None  # of the values now in the base; None: the base holds θ₀
        self._copies: dict[str, Tensor] = {}
        self._base_versions: tuple[int, ...] = ()
        self._last: tuple[Stamp, tuple[int, ...], tuple[int, ...]] | None = None
        self._next_version = FIRST_VERSION
        self.register_load_state_dict_post_hook(_refresh_after_load)

    # --- adapters ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SAFTConfig, count: int, eligible: tuple[str, ...]) -> None:
        """Adds an adapter: with room for its `count` entries if it has been selected, else still without entries.

        Args:
            adapter_name: its name.
            config: its config.
            count: number of entries in this unit.
            eligible: the parameters it may select from.
        """
        if config.entry_counts is None:
            self.saft_eligible[adapter_name] = eligible
        else:
            self.allocate(adapter_name, torch.arange(count, device=next(self.base_layer.parameters()).device))

    def allocate(self, adapter_name: str, positions: Tensor) -> None:
        """Gives an adapter its entries, with values of zero.

        Args:
            adapter_name: the adapter.
            positions: flat positions in the unit, sorted and unique, `(entries,)`.
        """
        self.saft_eligible[adapter_name] = ()
        if len(positions) == 0:  # a unit without entries holds no empty tensors: DDP's reducer fails on them
            return
        parameters = self._parameters_of_base().values()
        numel = sum(parameter.numel() for parameter in parameters)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        self.saft_indices[adapter_name] = positions.to(torch.int32 if numel < 2**31 else torch.int64)
        self.saft_values[adapter_name] = nn.Parameter(
            torch.zeros(len(positions), dtype=dtype, device=positions.device)
        )

    def is_unselected(self, adapter_name: str) -> bool:
        """Whether the adapter still has to select its entries."""
        return bool(self.saft_eligible.get(adapter_name))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:  # noqa: D102
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:  # noqa: D102
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the adapters a part of the base, which then is saved with them.

        Args:
            safe_merge: refuse when a merged value is not finite.
            adapter_names: which ones; by default the active ones.

        Raises:
            NonFiniteError: `safe_merge`, and a value is NaN or infinite; nothing is changed then.
        """
        merged = self.merged_adapters + check_adapters_to_merge(self, adapter_names)
        if safe_merge:
            self.check_finite(merged)
        self.merged_adapters = merged
        self.refresh()

    def unmerge(self) -> None:
        """Makes the merged adapters adapters again."""
        self.merged_adapters = []
        self.refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Gives the base back: with the adapters merged, or bit for bit as it was."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self._restore()
        return self.base_layer

    def check_finite(self, adapter_names: list[str]) -> None:
        """Refuses adapters whose values would write NaN or infinity into the base.

        Args:
            adapter_names: the adapters to merge.

        Raises:
            NonFiniteError: one would.
        """
        adapters = tuple(name for name in adapter_names if name in self.saft_values)
        if not adapters:
            return
        plan = self._plan_for(adapters)
        delta = self._delta(plan).detach()
        for tensor in plan.tensors:
            if not Effective.apply(delta[tensor.part], tensor.originals).isfinite().all():
                raise NonFiniteError(
                    "merging would write NaN or infinity into the base", where=tensor.name, got=list(adapters)
                )

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if self._disable_adapters and self.merged:
            self.unmerge()
        adapters = self._shown()
        in_place = self._write(adapters)
        if self.merged or not adapters:
            self._check_forward()
            return self.base_layer(*args, **kwargs)
        plan = self._plan_for(adapters)
        trains = torch.is_grad_enabled() and any(self.saft_values[name].requires_grad for name in adapters)
        if in_place and not trains:
            return self.base_layer(*args, **kwargs)
        delta = self._delta(plan)  # (entries,)
        if not in_place:
            return torch.func.functional_call(self.base_layer, self._replaced(plan, delta), args, kwargs)
        if _is_plain(self.base_layer, nn.Linear):
            return self._linear(plan, delta, *args)
        if _is_plain(self.base_layer, nn.Embedding):
            weight, padding_idx = self.base_layer.weight, self.base_layer.padding_idx
            return SampledEmbedding.apply(delta, *args, weight, padding_idx, plan.tensors[0].entries)
        aliases = {t.name: ResidentAlias.apply(t.parameter, delta[t.part], t.entries.positions) for t in plan.tensors}
        return torch.func.functional_call(self.base_layer, aliases, args, kwargs)

    def _linear(self, plan: Plan, delta: Tensor, inputs: Tensor) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        entries = {tensor.name: tensor.entries for tensor in plan.tensors}
        nothing = torch.empty(0, dtype=torch.int64, device=weight.device)
        biases = entries["bias"].positions if "bias" in entries else nothing
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and inputs.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            inputs, weight = inputs.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        weights = entries.get("weight") or Entries.of(nothing, weight.shape)
        return SampledLinear.apply(inputs, delta, weight, bias, weights, biases)

    def _replaced(self, plan: Plan, delta: Tensor) -> dict[str, Tensor]:
        parameters = dict(self.base_layer.named_parameters())
        return {
            tensor.name: parameters[tensor.name]
            .flatten()
            .scatter(0, tensor.entries.positions, Effective.apply(delta[tensor.part], tensor.originals))
            .view_as(parameters[tensor.name])
            for tensor in plan.tensors
        }

    def _check_forward(self) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        waiting = [name for name in self.active_adapters if self.is_unselected(name)]
        if waiting and self.training and not self.disable_adapters:
            raise SelectionError(
                "the SAFT adapter has not selected its entries yet",
                got=waiting,
                remedy="Call select_saft(model, batches, loss_fn) before training, or train with RobustTrainer.",
            )
        # Checkpointed blocks are run again during the backward; run as θ₀, they would silently give no gradient.
        if self.disable_adapters and self.saft_values and torch._C._current_graph_task_id() != -1:
            if not any(parameter.requires_grad for parameter in self.base_layer.parameters()):
                raise RuntimeError(
                    "a checkpointed block of a SAFT model is recomputed inside disable_adapter(): its gradients would "
                    "be lost. Call backward() after leaving disable_adapter()."
                )

    # --- the base's weights --------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Makes the base hold what the active adapters say; done by itself whenever that may have changed."""
        adapters = self._shown()
        if any(self.saft_values[name].is_meta for name in adapters):
            return  # still being loaded
        if not self._write(adapters):
            self._plan_for(adapters)

    def written_values(self) -> list[tuple[Tensor, Tensor]]:
        """The values that stand in the base, each with the copy taken when they were written."""
        if self._written is None or self._plan is None:
            return []
        return [(self.saft_values[name].detach(), self._copies[name]) for name in self._plan.adapters]

    def rewrite(self) -> None:
        """Writes the values again though their version counters have not moved."""
        self._restore()
        self._last = None
        self.refresh()

    def _shown(self) -> tuple[str, ...]:
        """The adapters whose values the base shall hold now."""
        names = self.merged_adapters or ([] if self._disable_adapters else self.active_adapters)
        return tuple(name for name in names if name in self.saft_values)

    def _write(self, adapters: tuple[str, ...]) -> bool:
        """Makes the base hold θ₀ plus the values of `adapters`; False when the base cannot be written."""
        if torch.compiler.is_compiling():
            return not adapters
        if not adapters:
            self._restore()
            return True
        stamp = self._stamp(adapters)
        if self._written is not None and self._written.matches(stamp):
            return True
        self._restore()
        plan = self._plan_for(adapters)
        if not all(_is_writable(self.base_layer, tensor) for tensor in plan.tensors):
            return False
        plan = self._plan = _with_originals(plan)
        parameters = [tensor.parameter for tensor in plan.tensors]
        self._base_versions = tuple(parameter._version for parameter in parameters)
        delta = self._delta(plan).detach()
        effective = [Effective.apply(delta[tensor.part], tensor.originals) for tensor in plan.tensors]
        if all(map(_same_bits, effective, [tensor.originals for tensor in plan.tensors])):
            return True  # as before the first step: θ₀ already is what shall be there
        _store(plan, effective)
        _set_versions(parameters, self._versions_of(stamp))
        self._copies = {name: self.saft_values[name].detach().clone() for name in adapters}
        self._written = stamp
        return True

    def _restore(self) -> None:
        """Gives the base its own values back, and its version counters: what autograd saved of θ₀ is valid again."""
        if self._written is None:
            return
        plan = self._plan
        if plan is None or not all(_is_writable(self.base_layer, tensor) for tensor in plan.tensors):
            raise RuntimeError(
                "the base weights were replaced while they held a SAFT adapter. Disable or merge the adapter first, "
                "then shard, offload or replace the weights."
            )
        _store(plan, [tensor.originals for tensor in plan.tensors])
        _set_versions([tensor.parameter for tensor in plan.tensors], self._base_versions)
        self._written = None

    def _versions_of(self, stamp: Stamp) -> tuple[int, ...]:
        """The version numbers of this state: those it had when it was last there, else new ones."""
        if self._last is not None:
            last_stamp, last_base, last_versions = self._last
            if last_stamp.matches(stamp) and last_base == self._base_versions:
                return last_versions
        self._next_version += 1
        versions = (self._next_version,) * len(self._base_versions)
        self._last = (stamp, self._base_versions, versions)
        return versions

    def _stamp(self, adapters: tuple[str, ...]) -> Stamp:
        return Stamp.of([tensors[name] for name in adapters for tensors in (self.saft_indices, self.saft_values)])

    # --- plans ---------------------------------------------------------------------------------------------------

    def _parameters_of_base(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.base_layer.named_parameters() if p.is_floating_point()}

    def _plan_for(self, adapters: tuple[str, ...]) -> Plan:
        plan = self._plan
        if plan is not None and torch.compiler.is_compiling():
            return plan  # refresh() has made it
        stamp = Stamp.of([self.saft_indices[name] for name in adapters])
        if plan is None or plan.adapters != adapters or not plan.stamp.matches(stamp):
            self._restore()
            plan = self._plan = self._make_plan(adapters, stamp)
        return plan

    def _make_plan(self, adapters: tuple[str, ...], stamp: Stamp) -> Plan:
        parameters = self._parameters_of_base()
        numel = sum(parameter.numel() for parameter in parameters.values())
        indices = [_validated(self.saft_indices[name], numel) for name in adapters]
        joined, lookup = (
            torch.unique(torch.cat(indices), return_inverse=True) if len(indices) > 1 else (indices[0], None)
        )
        lookups = () if lookup is None else lookup.split([len(index) for index in indices])
        tensors, offset = [], 0
        for name, parameter in parameters.items():
            edges = torch.tensor([offset, offset + parameter.numel()], device=joined.device)
            start, stop = torch.searchsorted(joined, edges).tolist()
            if start < stop:
                entries = Entries.of(joined[start:stop] - offset, parameter.shape)
                originals = parameter.detach().flatten()[entries.positions]
                tensors.append(TensorPlan(name, parameter, entries, slice(start, stop), originals))
            offset += parameter.numel()
        return Plan(adapters, tuple(tensors), tuple(lookups), len(joined), stamp)

    def _delta(self, plan: Plan) -> Tensor:
        """The values of the plan's adapters, added up, `(entries,)`."""
        values = [self.saft_values[name] for name in plan.adapters]
        if not plan.lookups:
            return values[0]
        delta = values[0].new_zeros(plan.size)
        for lookup, value in zip(plan.lookups, values, strict=True):
            delta = delta.index_add(0, lookup, value)
        return delta

    # --- moving, saving, loading ---------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._restore()
        self._plan = self._last = None

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        self.base_layer._apply(fn)
        self.saft_indices._apply(fn)
        self.saft_values._apply(keep_precision)
        if not any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            self.refresh()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or next(self.base_layer.parameters()).device
        if adapter_name in self.saft_values and not self.saft_values[adapter_name].is_meta:
            self.saft_values[adapter_name].data = self.saft_values[adapter_name].data.to(device)
            self.saft_indices[adapter_name] = self.saft_indices[adapter_name].to(device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The unit's tensors; those of the base hold θ₀, unless the adapter is merged."""
        state = super().state_dict(*args, **kwargs)
        if self._written is not None and self._plan is not None and not self.merged:
            for tensor in self._plan.tensors:
                base = tensor.parameter.detach().clone()
                base.view(-1)[tensor.entries.positions] = tensor.originals
                state[f"{kwargs.get('prefix', '')}base_layer.{tensor.name}"] = base
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()  # what is loaded now is θ₀
        self._plan = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base that other code reads from the module it finds here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "saft." + super().__repr__()


def _refresh_after_load(layer: SAFTLayer, incompatible_keys: Any) -> None:
    layer.refresh()


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the kernel instead of the module loses nothing: no subclass, no hooks, no patched forward."""
    if type(module) is not kind or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return False
    special = isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq)
    return not special and not any(parameter.requires_grad for parameter in module.parameters())


def _is_writable(base_layer: nn.Module, tensor: TensorPlan) -> bool:
    """Whether the base still owns the very parameter that was planned for: FSDP and offloading put others there."""
    parameter = tensor.parameter
    usable = parameter.is_contiguous() and not parameter.is_inference()
    return usable and base_layer.get_parameter(tensor.name) is parameter


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))  # −0 is not +0, NaN is NaN


def _with_originals(plan: Plan) -> Plan:
    fresh = [
        replace(tensor, originals=tensor.parameter.detach().flatten()[tensor.entries.positions])
        for tensor in plan.tensors
    ]
    return replace(plan, tensors=tuple(fresh))


@torch.no_grad()
def _store(plan: Plan, values: list[Tensor]) -> None:
    for tensor, value in zip(plan.tensors, values, strict=True):
        tensor.parameter.view(-1)[tensor.entries.positions] = value


def _set_versions(parameters: list[nn.Parameter], versions: tuple[int, ...]) -> None:
    # Autograd refuses to use a saved weight whose counter has moved. After a round trip the bits are the same again,
    # so the counter may say so; torch has no public way to tell it.
    torch._C._autograd._unsafe_set_version_counter(tuple(parameters), versions)


def _validated(indices: Tensor, numel: int) -> Tensor:
    """Indices as int64, once they are known to be safe to use: integers, strictly increasing, in range."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise AdapterFileError("indices have a wrong type", got=str(indices.dtype), allowed="int32 or int64")
    indices = indices.to(torch.int64)
    if indices[0] < 0 or indices[-1] >= numel:
        raise AdapterFileError(
            "an index is outside the module", got=(int(indices[0]), int(indices[-1])), allowed=f"0 to {numel - 1}"
        )
    if not (indices.diff() > 0).all():
        raise AdapterFileError("indices are not strictly increasing", remedy="Save the adapter again.")
    return indices
