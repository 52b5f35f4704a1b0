# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one Linear whose adapters make another weight and bias of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import AdapterFileError, NonFiniteError
from .base import Arrival, RobustLayer


class LinearLayer(RobustLayer):
    """A Linear of the base with adapters, whose `effective` weight and bias are what merging writes.

    Args:
        base_layer: the module to wrap.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.expected_files: dict[str, Arrival] = {}
        self.merged_adapters: list[str] = []
        self._theta0 = BufferDict(persistent=False)  # the base's own tensors, while adapters are merged into it

    def _start(self, name: str) -> Tensor:
        return self._theta0[name] if name in self._theta0 else getattr(self.base_layer, name)

    def effective(self, name: str, adapter_names: list[str]) -> Tensor:
        """Returns a tensor of the base with some adapters in it, rounded to its format.

        Args:
            name: `"weight"` or `"bias"`.
            adapter_names: the adapters.
        """
        raise NotImplementedError

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

    @torch.no_grad()
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

    def check_tensors(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Looks whether tensors can be those of an adapter; nothing is changed.

        Args:
            adapter_name: the adapter.
            tensors: its tensors, by name.

        Raises:
            AdapterFileError: one is missing, or has a wrong form.
            NonFiniteError: a value is NaN or infinite.
        """
        owners: Any = {name: getattr(self, name) for name in self.tensor_names}
        expected = {name: owner[adapter_name] for name, owner in owners.items() if adapter_name in owner}
        if set(tensors) != set(expected):
            allowed = ", ".join(expected) or "none"
            raise AdapterFileError("an adapter has other tensors", got=sorted(tensors), allowed=allowed)
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                got, allowed = tuple(tensor.shape), str(tuple(expected[name].shape))
                raise AdapterFileError("tensor has a wrong shape", where=name, got=got, allowed=allowed)
            self.check_values(tensor, name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.base_layer.weight.device
        for name in self.tensor_names:
            tensors: Any = getattr(self, name)
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name].data = tensors[adapter_name].data.to(device)
