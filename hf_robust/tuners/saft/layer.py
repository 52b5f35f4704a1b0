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
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import AdapterFileError, NonFiniteError, SelectionError
from ..base import Arrival, RobustLayer, keep_precision
from .config import SAFTConfig
from .forward import forward_tuned, tuned_tensors
from .plan import Plan, by_parameter, checked_positions, floating_parameters
from .resident import ResidentValues, see_edits


class SAFTLayer(RobustLayer):
    """A unit of the base with its selected entries.

    A unit is the outermost module that owns a parameter: a Linear, LayerNorm, Embedding, Conv, or a module with bare
    parameters together with all it contains. Entries are flat positions in its floating-point parameters, laid end to
    end in the order of `named_parameters()`.

    Args:
        base_layer: the module to wrap.
        unit: its name in the model.
    """

    adapter_layer_names = ("saft_values",)
    tensor_names = ("saft_indices", "saft_values")
    other_param_names = ("saft_indices", "saft_eligible", "saft_configs", "saft_sha256", "expected_files")

    def __init__(self, base_layer: nn.Module, unit: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.unit = unit
        sized = isinstance(base_layer, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        sizes: Any = _get_in_out_features(base_layer) if sized else (None, None)
        self.in_features, self.out_features = sizes
        self.saft_values = nn.ParameterDict()
        self.saft_indices = BufferDict(persistent=True)
        self.saft_sha256 = BufferDict(persistent=True)
        self.expected_files: dict[str, Arrival] = {}
        self.saft_eligible: dict[str, tuple[str, ...]] = {}  # names of the parameters an adapter may select from
        self.saft_configs: dict[str, SAFTConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.resident = ResidentValues(unit)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    # --- adapters ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SAFTConfig, eligible: tuple[str, ...]) -> None:
        """Adds an adapter, without entries; if its config tells of some, they are still to be loaded.

        Args:
            adapter_name: its name.
            config: its config.
            eligible: the parameters it may select from.
        """
        self.saft_eligible[adapter_name] = eligible
        self.saft_configs[adapter_name] = config
        count = (config.entry_counts or {}).get(self.unit, 0)
        if count:  # without memory: a config may say anything
            self.allocate(adapter_name, torch.empty(count, device="meta"))

    def allocate(self, adapter_name: str, positions: Tensor) -> None:
        """Gives an adapter its entries, with values of zero.

        Args:
            adapter_name: the adapter.
            positions: flat positions in the unit, sorted and unique, `(entries,)`.
        """
        if len(positions) == 0:  # a unit without entries holds no empty tensors: DDP's reducer fails on them
            for tensors in (self.saft_values, self.saft_indices):
                if adapter_name in tensors:
                    del tensors[adapter_name]
            return
        numel = sum(parameter.numel() for parameter in floating_parameters(self.base_layer).values())
        if adapter_name in self.saft_values:
            trains = self.saft_values[adapter_name].requires_grad
        else:
            trains = adapter_name in self.active_adapters and not self.saft_configs[adapter_name].inference_mode
        self.saft_indices[adapter_name] = positions.to(torch.int32 if numel < 2**31 else torch.int64)
        values = torch.zeros(len(positions), dtype=self._values_dtype, device=positions.device)
        self.saft_values[adapter_name] = nn.Parameter(values, requires_grad=trains)

    @property
    def _values_dtype(self) -> torch.dtype:
        parameters = floating_parameters(self.base_layer).values()
        return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32

    def has_entries(self, adapter_name: str) -> bool:
        """Whether an adapter has entries here that are there, and not only announced by its config."""
        return adapter_name in self.saft_values and not self.saft_values[adapter_name].is_meta

    def has_selected(self, adapter_name: str) -> None:
        """Notes that an adapter has its entries, here or elsewhere."""
        self.saft_eligible[adapter_name] = ()

    def is_unselected(self, adapter_name: str) -> bool:
        """Whether an adapter still has to select its entries, or to get them from a file."""
        if adapter_name in self.saft_values:
            return not self.has_entries(adapter_name)
        return bool(self.saft_eligible.get(adapter_name)) and self.saft_configs[adapter_name].entry_counts is None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:  # noqa: D102
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.show_values()

    def enable_adapters(self, enabled: bool) -> None:  # noqa: D102
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self.show_values()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the adapters a part of the base, which then is saved with them.

        Args:
            safe_merge: refuse when a merged value is not finite.
            adapter_names: which ones; by default the active ones.

        Raises:
            NonFiniteError: `safe_merge`, and a value is NaN or infinite; nothing is changed then.
        """
        merged = self.merged_adapters + check_adapters_to_merge(self, adapter_names)
        self.refresh()
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
            self.resident.restore(self.base_layer)
        return self.base_layer

    def check_finite(self, adapter_names: list[str]) -> None:
        """Refuses adapters whose values would write NaN or infinity into the base.

        Args:
            adapter_names: the adapters to merge.

        Raises:
            NonFiniteError: one would.
        """
        adapters = self._with_entries(adapter_names)
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
        return forward_tuned(self.base_layer, plan, self._delta(plan), in_place, args, kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight as `forward` uses it, with its gradient, for code that reads it instead of calling the unit."""
        adapters = self._shown()
        in_place = self._write(adapters)
        if self.merged or not adapters or (in_place and not self._trains(adapters)):
            return self.base_layer.weight
        plan = self._plan_for(adapters)
        tuned = tuned_tensors(self.base_layer, plan, self._delta(plan), in_place)
        return tuned.get("weight", self.base_layer.weight)

    def _trains(self, adapters: tuple[str, ...]) -> bool:
        return torch.is_grad_enabled() and any(self.saft_values[name].requires_grad for name in adapters)

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
        """Makes the base hold what the active adapters say, also where their values were edited as `.data`.

        Done by itself whenever that may have changed, but for the moment between an optimizer's step and what comes
        next: a forward, `train()` or `eval()`.

        Raises:
            BaseWeightsError: weights of the base were changed where they held values.
        """
        see_edits([self.resident])
        self.show_values()

    def show_values(self) -> None:
        """Makes the base hold what the active adapters say, as far as version counters tell of it."""
        if not any(isinstance(parameter, DTensor) for parameter in self.base_layer.parameters()):  # else: sharded
            self._write(self._shown())

    def train(self, mode: bool = True) -> SAFTLayer:  # noqa: D102
        in_training = mode and self.training  # as a Trainer asks for before every step: nothing here waits then
        super().train(mode)
        if in_training:
            self.show_values()
        else:
            self.refresh()
        return self

    def show_base(self) -> None:
        """Gives the base its own values back until the next forward: weights that are sharded must be θ₀."""
        self.resident.restore(self.base_layer)

    def pretrained_parameters(self) -> dict[str, Tensor]:
        """The base's parameters as they were before any adapter, by name."""
        return {**dict(self.base_layer.named_parameters()), **self.resident.pretrained()}

    @property
    def seals(self) -> BufferDict:
        """Places for digests of files, by adapter."""
        return self.saft_sha256

    def changed_entries(self, adapter_name: str) -> dict[str, Tensor]:
        """Positions of an adapter's entries in the base's parameters."""
        if adapter_name not in self.saft_indices:
            return {}
        return by_parameter(self.base_layer, self.saft_indices[adapter_name])

    def is_new(self, adapter_name: str) -> bool:
        """Whether an adapter has no entries yet."""
        return self.is_unselected(adapter_name)

    def waiting_adapters(self) -> list[str]:
        """Names of adapters that have no entries here."""
        return [name for name in self.saft_configs if name not in self.saft_values]

    def _shown(self) -> tuple[str, ...]:
        """The adapters whose values the base shall hold now."""
        return self._with_entries(self.merged_adapters or ([] if self._disable_adapters else self.active_adapters))

    def _with_entries(self, names: list[str]) -> tuple[str, ...]:
        return tuple(name for name in names if self.has_entries(name))

    def _write(self, adapters: tuple[str, ...]) -> bool:
        """Makes the base hold θ₀ plus the values of `adapters`; False when the base cannot be written."""
        return self.resident.write(self.base_layer, self._indices(adapters), [self.saft_values[n] for n in adapters])

    def _indices(self, adapters: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: self.saft_indices[name] for name in adapters}

    def _plan_for(self, adapters: tuple[str, ...]) -> Plan:
        return self.resident.plan_for(self.base_layer, self._indices(adapters))

    def _delta(self, plan: Plan) -> Tensor:
        return plan.delta([self.saft_values[name] for name in plan.adapters])

    # --- moving, saving, loading ---------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.resident.forget(self.base_layer)
        self.base_layer._apply(fn)
        self.saft_indices._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor))
        self.saft_values._apply(lambda tensor: tensor if tensor.is_meta else keep_precision(fn)(tensor))
        if not any(tensor.is_meta for tensor in self.base_layer.parameters()):
            self.refresh()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or next(self.base_layer.parameters()).device
        if self.has_entries(adapter_name):
            self.saft_values[adapter_name].data = self.saft_values[adapter_name].data.to(device)
            self.saft_indices[adapter_name] = self.saft_indices[adapter_name].to(device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The unit's tensors; those of the base hold θ₀, unless the adapter is merged.

        Raises:
            BaseWeightsError: weights of the base were changed where they held values.
        """
        state = super().state_dict(*args, **kwargs)
        if not self.merged:
            self.resident.check_base()
            prefix = f"{kwargs.get('prefix', '')}base_layer."
            state.update({prefix + name: base for name, base in self.resident.pretrained().items()})
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        whole = all(f"{prefix}base_layer.{name}" in state_dict for name, _ in self.base_layer.named_parameters())
        self.resident.forget(self.base_layer, check=not whole)  # what is loaded now is θ₀
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_tensors(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Looks whether tensors can be those of an adapter; nothing is changed.

        Args:
            adapter_name: the adapter.
            tensors: its tensors, by name.

        Raises:
            AdapterFileError: one is missing, has a wrong form, or positions are not what positions can be.
            NonFiniteError: a value is NaN or infinite, or would be in the base's format.
        """
        if set(tensors) != {"saft_indices", "saft_values"}:
            allowed = "saft_indices and saft_values"
            raise AdapterFileError("tensors are missing", where=self.unit, got=sorted(tensors), allowed=allowed)
        indices, values = tensors["saft_indices"], tensors["saft_values"]
        if isinstance(values, DTensor) or indices.is_meta:
            return
        self.check_values(values, self.unit)
        count = values.numel() if self.is_unselected(adapter_name) else 0  # what it has
        if adapter_name in self.saft_values:
            count = len(self.saft_values[adapter_name])
        if indices.shape != values.shape or values.shape != (count,) or count == 0:
            got = f"{tuple(indices.shape)} indices, {tuple(values.shape)} values"
            raise AdapterFileError("numbers of entries differ", where=self.unit, got=got, allowed=f"({count},)")
        checked_positions(indices, sum(p.numel() for p in floating_parameters(self.base_layer).values()))

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


def saft_layers(model: nn.Module) -> list[SAFTLayer]:
    """The wrapped units in a model, each once."""
    return [module for module in model.modules() if isinstance(module, SAFTLayer)]


def _refresh_after_load(layer: SAFTLayer, incompatible_keys: Any) -> None:
    layer.refresh()
