# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one unit of the base model: its selected entries, and how they get into the base's weights.

The tuned values live inside the base's own weights. The unit remembers the k original values; writing an adapter costs
k scattered stores, and taking it back gives the base bit for bit. Where the base cannot be written (sharded, compiled,
inference tensors), the same numbers are put into a copy of the weight at every forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...errors import ConfigError, NonFiniteError, SelectionError
from ..base import keep_precision
from .config import SAFTConfig
from .kernels import Entries, ResidentAlias, SampledEmbedding, SampledLinear
from .plan import Plan, Stamp, floating_parameters, make_plan, same_bits, set_versions

# Numbers for the version counters of written weights start here, far from what in-place edits of the base count up to.
FIRST_VERSION = 2**20


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
        self._written: Stamp | None = None  # of the values the base shows; None: it shows θ₀
        self._changed = False  # whether its bits differ from those of θ₀
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
        parameters = floating_parameters(self.base_layer).values()
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
        for tensor, values in zip(plan.tensors, plan.effective(self._delta(plan).detach()), strict=True):
            if not values.isfinite().all():
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
        if in_place and not self._trains(adapters):
            return self.base_layer(*args, **kwargs)
        delta = self._delta(plan)  # (entries,)
        if in_place and not kwargs and _is_plain(self.base_layer, nn.Linear):
            return self._linear(plan, delta, *args)
        if in_place and not kwargs and _is_plain(self.base_layer, nn.Embedding):
            weight, padding_idx = self.base_layer.weight, self.base_layer.padding_idx
            return SampledEmbedding.apply(delta, *args, weight, padding_idx, plan.tensors[0].entries)
        return torch.func.functional_call(self.base_layer, self._tensors(plan, delta, in_place), args, kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight as `forward` uses it, with its gradient, for code that reads it instead of calling the unit."""
        adapters = self._shown()
        in_place = self._write(adapters)
        if self.merged or not adapters or (in_place and not self._trains(adapters)):
            return self.base_layer.weight
        plan = self._plan_for(adapters)
        return self._tensors(plan, self._delta(plan), in_place).get("weight", self.base_layer.weight)

    def _trains(self, adapters: tuple[str, ...]) -> bool:
        return torch.is_grad_enabled() and any(self.saft_values[name].requires_grad for name in adapters)

    def _tensors(self, plan: Plan, delta: Tensor, in_place: bool) -> dict[str, Tensor]:
        if not in_place:
            return self._replaced(plan, delta)
        return {t.name: ResidentAlias.apply(t.parameter, delta[t.part], t.entries.positions) for t in plan.tensors}

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
        weights = {}
        for tensor, values in zip(plan.tensors, plan.effective(delta), strict=True):
            weight = self.base_layer.get_parameter(tensor.name)
            weights[tensor.name] = weight.flatten().scatter(0, tensor.entries.positions, values).view_as(weight)
        return weights

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
        if not any(self.saft_values[name].is_meta for name in adapters):  # else they are still being loaded
            self._write(adapters)

    def show_base(self) -> None:
        """Gives the base its own values back until the next forward: weights that are sharded must be θ₀."""
        self._restore()

    def written_values(self) -> list[tuple[Tensor, Tensor]]:
        """The values that stand in the base, each with the copy taken when they were written."""
        if self._written is None or self._plan is None:
            return []
        values = {name: self.saft_values[name] for name in self._plan.adapters}
        known = [name for name, value in values.items() if any(value is tensor for tensor in self._written.tensors)]
        return [(values[name].detach(), self._copies[name]) for name in known]  # others are written at the forward

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
        if not plan.is_writable(self.base_layer):
            return False
        plan = self._plan = plan.with_fresh_originals()
        self._base_versions = tuple(parameter._version for parameter in plan.parameters)
        effective = plan.effective(self._delta(plan).detach())
        if not all(map(same_bits, effective, plan.originals)):  # before the first step θ₀ is what shall be there
            plan.store(effective)
            set_versions(plan.parameters, self._versions_of(stamp))
            self._changed = True
        self._copies = {name: self.saft_values[name].detach().clone() for name in adapters}
        self._written = stamp
        return True

    def _restore(self) -> None:
        """Gives the base its own values back, and its version counters: what autograd saved of θ₀ is valid again."""
        self._written = None
        if not self._changed:
            return
        plan = self._plan
        if plan is None or not plan.is_writable(self.base_layer):
            raise RuntimeError(
                "the base weights were replaced while they held a SAFT adapter. Disable or merge the adapter first, "
                "then shard, offload or replace the weights."
            )
        plan.store(plan.originals)
        set_versions(plan.parameters, self._base_versions)
        self._changed = False

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

    def _plan_for(self, adapters: tuple[str, ...]) -> Plan:
        plan = self._plan
        if plan is not None and torch.compiler.is_compiling():
            return plan  # refresh() has made it
        stamp = Stamp.of([self.saft_indices[name] for name in adapters])
        if plan is None or plan.adapters != adapters or not plan.stamp.matches(stamp):
            self._restore()
            plan = self._plan = make_plan(self.base_layer, {name: self.saft_indices[name] for name in adapters}, stamp)
        return plan

    def _delta(self, plan: Plan) -> Tensor:
        return plan.delta([self.saft_values[name] for name in plan.adapters])

    # --- moving, saving, loading ---------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._restore()
        self._plan = self._last = None

        self.base_layer._apply(fn)
        self.saft_indices._apply(fn)
        self.saft_values._apply(keep_precision(fn))
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
        if self._changed and self._plan is not None and not self.merged:
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
