# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one Linear: a tuned copy of its weight and bias, which the forward uses in place of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional as F

from ...encoders.dual_encoder import at_least_float32
from ..base import keep_precision
from ..linear_layer import LinearLayer
from .config import ACLIPConfig


class ACLIPLayer(LinearLayer):
    """A Linear of the base with its tuned copies.

    The copies are float32 or better whatever the base is, and are rounded to its format for the forward. With several
    active adapters the forward uses the base plus what each copy differs from it.

    Args:
        base_layer: the module to wrap.
    """

    adapter_layer_names = tensor_names = ("aclip_weight", "aclip_bias")
    other_param_names = ("aclip_sha256", "expected_files")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer)
        self.aclip_weight = nn.ParameterDict()
        self.aclip_bias = nn.ParameterDict()
        self.aclip_sha256 = BufferDict(persistent=True)

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

    # --- moving, saving, loading ---

    @property
    def seals(self) -> BufferDict:
        """Places for digests of files, by adapter."""
        return self.aclip_sha256

    def is_new(self, adapter_name: str) -> bool:
        """Whether an adapter's copies are the base's tensors."""
        copies: Any = {"weight": self.aclip_weight, "bias": self.aclip_bias}
        mine = {name: copy[adapter_name] for name, copy in copies.items() if adapter_name in copy}
        return all(copy.is_meta or torch.equal(copy, self._start(name).to(copy.dtype)) for name, copy in mine.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.base_layer._apply(fn)
        self._theta0._apply(fn)
        self.aclip_weight._apply(keep_precision(fn))
        self.aclip_bias._apply(keep_precision(fn))
        return self

    def __repr__(self) -> str:
        return "aclip." + super().__repr__()
