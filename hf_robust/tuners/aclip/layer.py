# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one Linear: a tuned copy of its weight and bias, which the forward uses in place of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from ...encoders.dual_encoder import at_least_float32
from ...errors import AdapterFileError, NonFiniteError
from ..base import Arrival, RobustLayer, keep_precision
from .config import ACLIPConfig


class ACLIPLayer(RobustLayer):
    """A Linear of the base with its tuned copies.

    The copies are float32 or better whatever the base is, and are rounded to its format for the forward. With several
    active adapters the forward uses the base plus what each copy differs from it.

    Args:
        base_layer: the module to wrap.
    """

    adapter_layer_names = tensor_names = ("aclip_weight", "aclip_bias")
    other_param_names = ("aclip_sha256", "expected_files")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.aclip_weight = nn.ParameterDict()
        self.aclip_bias = nn.ParameterDict()
        self.aclip_sha256 = BufferDict(persistent=True)
        self.expected_files: dict[str, Arrival] = {}
        self.merged_adapters: list[str] = []
        self._theta0 = BufferDict(persistent=False)  # the base's own tensors, while adapters are merged into it

    def update_layer(self, adapter_name: str, config: ACLIPConfig) -> None:
        """Adds an adapter: copies of the base's tensors.

        Args:
            adapter_name: its name.
            config: its config.
        """
        self.aclip_weight[adapter_name] = self._copy("weight")
        if config.train_bias and self.base_layer.bias is not None:
            self.aclip_bias[adapter_name] = self._copy("bias")

    def _copy(self, name: str) -> nn.Parameter:
        return nn.Parameter(at_least_float32(self._start(name).detach()).clone())

    def _start(self, name: str) -> Tensor:
        return self._theta0[name] if name in self._theta0 else getattr(self.base_layer, name)

    def effective(self, name: str, adapter_names: list[str]) -> Tensor:
        """Returns θ₀ + Σ Δ of some adapters, rounded to the base's format.

        Args:
            name: `"weight"` or `"bias"`.
            adapter_names: the adapters.
        """
        copies: Any = self.aclip_weight if name == "weight" else self.aclip_bias
        tuned = [copies[adapter] for adapter in adapter_names if adapter in copies]
        start = self._start(name)
        if not tuned:
            return start
        if len(tuned) == 1:
            return tuned[0].to(start.dtype)
        theta0 = start.to(tuned[0].dtype)
        return sum((copy - theta0 for copy in tuned), theta0).to(start.dtype)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(inputs)
        adapters: Any = self.active_adapters
        bias = None if self.base_layer.bias is None else self.effective("bias", adapters)
        return F.linear(inputs, self.effective("weight", adapters), bias)

    def enable_adapters(self, enabled: bool) -> None:  # noqa: D102
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # --- merging ---

    @torch.no_grad()
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
        tensors = {name: self.effective(name, merged) for name, _ in self.base_layer.named_parameters()}
        for name, tensor in tensors.items():
            parameter = getattr(self.base_layer, name)
            if name not in self._theta0:
                self._theta0[name] = parameter.detach().clone()
            parameter.copy_(tensor)
        self.merged_adapters = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Makes the merged adapters adapters again; the base is θ₀ bit for bit."""
        for name in list(self._theta0):
            getattr(self.base_layer, name).copy_(self._theta0[name])
            del self._theta0[name]
        self.merged_adapters = []

    def check_finite(self, adapter_names: list[str]) -> None:
        """Refuses adapters that would write NaN or infinity into the base.

        Args:
            adapter_names: the adapters to merge.

        Raises:
            NonFiniteError: one would.
        """
        for name, _ in self.base_layer.named_parameters():
            if not self.effective(name, adapter_names).isfinite().all():
                what = "merging would write NaN or infinity into the base"
                raise NonFiniteError(what, where=name, got=adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Gives the base back: with the adapters merged, or bit for bit as it was."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self.unmerge()
        return self.base_layer

    # --- moving, saving, loading ---

    def pretrained_parameters(self) -> dict[str, Tensor]:
        """The base's parameters as they were before any adapter, by name."""
        return {name: self._start(name) for name, _ in self.base_layer.named_parameters()}

    @property
    def seals(self) -> BufferDict:
        """Places for digests of files, by adapter."""
        return self.aclip_sha256

    def is_new(self, adapter_name: str) -> bool:
        """Whether an adapter's copies are the base's tensors."""
        copies: Any = {"weight": self.aclip_weight, "bias": self.aclip_bias}
        mine = {name: copy[adapter_name] for name, copy in copies.items() if adapter_name in copy}
        return all(copy.is_meta or torch.equal(copy, self._start(name).to(copy.dtype)) for name, copy in mine.items())

    def check_tensors(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Looks whether tensors can be those of an adapter; nothing is changed.

        Args:
            adapter_name: the adapter.
            tensors: its tensors, by name.

        Raises:
            AdapterFileError: one is missing, or has a wrong form.
            NonFiniteError: a value is NaN or infinite.
        """
        copies: Any = {name: getattr(self, name) for name in self.tensor_names}
        expected: dict[str, Tensor] = {
            name: copy[adapter_name] for name, copy in copies.items() if adapter_name in copy
        }
        if set(tensors) != set(expected):
            allowed = ", ".join(expected) or "none"
            raise AdapterFileError("an adapter has other tensors", got=sorted(tensors), allowed=allowed)
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                got, allowed = tuple(tensor.shape), str(tuple(expected[name].shape))
                raise AdapterFileError("tensor has a wrong shape", where=name, got=got, allowed=allowed)
            self.check_values(tensor, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.base_layer._apply(fn)
        self._theta0._apply(fn)
        self.aclip_weight._apply(keep_precision(fn))
        self.aclip_bias._apply(keep_precision(fn))
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.base_layer.weight.device
        for copies in (self.aclip_weight, self.aclip_bias):
            if adapter_name in copies and not copies[adapter_name].is_meta:
                copies[adapter_name].data = copies[adapter_name].data.to(device)

    def __repr__(self) -> str:
        return "aclip." + super().__repr__()
