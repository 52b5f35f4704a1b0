# SPDX-License-Identifier: Apache-2.0
"""The wrapper around one Linear: a linear residual adapter behind it, and the weight that the two are together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ...encoders.dual_encoder import at_least_float32
from ...errors import ConfigError
from ..base import RobustLayer, keep_precision
from ..linear_layer import LinearLayer
from .average import tell_of_steps
from .config import RAdapterConfig

AVERAGE_OF = {
    "radapter_weight": "radapter_average_weight",
    "radapter_down": "radapter_average_down",
    "radapter_scale": "radapter_average_scale",
}


class RAdapterLayer(LinearLayer):
    """A Linear of the base, y = W x + b, with the adapters behind it: y + Σ σ D(F y).

    In training F and σ are used as they are trained, outside of training their averages, as the weight (I + Σ σ F) W
    that merging writes. All are float32 or better whatever the base is. `radapter_weight` holds F, or in low rank U
    beside `radapter_down` D of F = U D.

    Args:
        base_layer: the module to wrap.
    """

    radapter_weight: Any
    radapter_average_weight: Any
    adapter_layer_names = tuple(AVERAGE_OF)
    tensor_names = (*AVERAGE_OF, *AVERAGE_OF.values())
    other_param_names = (*AVERAGE_OF.values(), "radapter_sha256", "expected_files", "configs", "_unheard")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer)
        self.training = base_layer.training  # which decides what the forward uses
        for trained, average in AVERAGE_OF.items():
            setattr(self, trained, nn.ParameterDict())
            setattr(self, average, BufferDict(persistent=True))
        self.radapter_sha256 = BufferDict(persistent=True)
        self.configs: dict[str, RAdapterConfig] = {}
        self._unheard: dict[str, bool] = {}  # that have run in training: as new ones, and no step has been heard of
        tell_of_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tell_of_steps(self)  # a copy has parameters of its own

    def update_layer(self, adapter_name: str, config: RAdapterConfig, generator: torch.Generator) -> None:
        """Adds an adapter that changes nothing yet.

        Args:
            adapter_name: its name.
            config: its config.
            generator: draws the first values of D.
        """
        self.configs[adapter_name] = config
        width, start = self.out_features, at_least_float32(self._start("weight").detach())
        rank = width if config.r is None or config.r >= width else config.r
        scale = start.new_full((1,), config.scale)  # FSDP shards no scalars
        tensors = {"radapter_weight": start.new_zeros(width, rank), "radapter_scale": scale}
        if rank < width:
            down = nn.init.xavier_uniform_(torch.empty(rank, width, device="cpu"), generator=generator)
            tensors["radapter_down"] = down.to(start)
        for name, tensor in tensors.items():
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
            if config.average_decay is not None:
                getattr(self, AVERAGE_OF[name])[adapter_name] = tensor.clone()

    @torch.no_grad()
    def follow(self, stepped: set[int]) -> None:
        """Takes a step of an optimizer into the averages.

        Args:
            stepped: ids of the parameters that it has changed.
        """
        for name, average in AVERAGE_OF.items():
            trained: Any = getattr(self, name)
            for adapter, mean in getattr(self, average).items():
                if id(trained[adapter]) in stepped:
                    decay: Any = self.configs[adapter].average_decay
                    mean.lerp_(_whole(trained[adapter]), 1 - decay)  # m F̃ + (1 - m) F
                    self._unheard[adapter] = False

    def check_followed(self) -> None:
        """Refuses adapters that are trained by what tells PyTorch's hooks of no step: the average would not exist.

        Raises:
            ConfigError: one is.
        """
        for adapter in (name for name, is_unheard in self._unheard.items() if is_unheard):
            weight, mean = self.radapter_weight[adapter], self.radapter_average_weight[adapter]
            if not weight.is_meta and weight.any() and not mean.any():
                what = "an average has not followed the training, which takes its steps outside of torch.optim"
                remedy = "Train without DeepSpeed and with the second FSDP, or set average_decay=None."
                raise ConfigError(what, got=adapter, remedy=remedy)

    def train(self, mode: bool = True) -> RobustLayer:  # noqa: D102
        super().train(mode)
        if not mode:
            self.check_followed()
        return self

    def evaluated(self, name: str, adapter_name: str) -> nn.Module:
        """Returns what holds the tensor of an adapter that counts outside of training.

        Args:
            name: of what is trained.
            adapter_name: the adapter.
        """
        average: Any = getattr(self, AVERAGE_OF[name])
        return average if adapter_name in average else getattr(self, name)

    def effective(self, name: str, adapter_names: list[str]) -> Tensor:
        """Returns (I + Σ σ F) θ₀ of some adapters, rounded to the base's format; θ₀ bit for bit where nothing changes.

        Args:
            name: `"weight"` or `"bias"`.
            adapter_names: the adapters.
        """
        start = self._start(name)
        mine: Any = [adapter for adapter in adapter_names if adapter in self.configs]
        if not mine:
            return start
        with torch.autocast(start.device.type, enabled=False):  # merging knows of none
            tensors = [self.tensors(adapter, evaluated=True) for adapter in mine]
            exact = start.to(torch.promote_types(start.dtype, tensors[0][0].dtype))
            change: Any = sum(_into(*one, exact) for one in tensors)  # Σ σ F θ₀
            return torch.where(change == 0, exact, exact + change).to(start.dtype)  # -0 + 0 would be 0

    def tensors(self, adapter_name: str, evaluated: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns F or U, D in low rank, and σ.

        Args:
            adapter_name: the adapter.
            evaluated: those that count outside of training, in place of those that are trained.
        """
        owners: Any = [self.evaluated(n, adapter_name) if evaluated else getattr(self, n) for n in AVERAGE_OF]
        weight, down, scale = owners
        return weight[adapter_name], down[adapter_name] if adapter_name in down else None, scale[adapter_name]

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(inputs)
        adapters: Any = self.active_adapters
        if not self.training:
            bias = None if self.base_layer.bias is None else self.effective("bias", adapters)
            return F.linear(inputs, self.effective("weight", adapters), bias)
        outputs = tuned = self.base_layer(inputs)  # (batch, …, width)
        for adapter in adapters:
            if adapter in self.configs:
                tuned = self._add_residual(tuned, outputs, adapter)
        return tuned

    def _add_residual(self, tuned: Tensor, outputs: Tensor, adapter_name: str) -> Tensor:
        weight, down, scale = self.tensors(adapter_name, evaluated=False)
        config = self.configs[adapter_name]
        if adapter_name not in self._unheard and not torch.compiler.is_compiling():
            self._unheard[adapter_name] = adapter_name in self.radapter_average_weight and self.is_new(adapter_name)
        if config.drop_path == 0:
            return tuned + _times(weight, down, scale, outputs)
        dim = 0 if config.drop_unit == "sample" else outputs.dim() - 2
        mask = F.dropout(torch.ones(outputs.shape[dim], device="cpu"), config.drop_path)  # the CPU knows how many
        kept = mask.nonzero().squeeze(1).to(outputs.device, non_blocking=True)
        change = _times(weight, down, scale / (1 - config.drop_path), outputs.index_select(dim, kept))
        return tuned.index_add(dim, kept, change)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the adapters a part of the base, which then is saved with them.

        Args:
            safe_merge: refuse when a merged value is not finite.
            adapter_names: which ones; by default the active ones.

        Raises:
            ConfigError: an average has not followed the training.
            NonFiniteError: `safe_merge`, and a value is NaN or infinite; nothing is changed then.
        """
        self.check_followed()
        super().merge(safe_merge, adapter_names)

    # --- moving, saving, loading ---

    @property
    def seals(self) -> BufferDict:
        """Places for digests of files, by adapter."""
        return self.radapter_sha256

    def is_new(self, adapter_name: str) -> bool:
        """Whether an adapter's F is zero."""
        owners: Any = [getattr(self, name) for name in ("radapter_weight", "radapter_average_weight")]
        mine = [owner[adapter_name] for owner in owners if adapter_name in owner]
        return all(tensor.is_meta or not tensor.any() for tensor in mine)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.base_layer._apply(fn)
        self._theta0._apply(fn)
        for trained, average in AVERAGE_OF.items():
            getattr(self, trained)._apply(keep_precision(fn))
            means: Any = getattr(self, average)
            for adapter, mean in list(means.items()):
                moved = keep_precision(fn)(mean)
                if moved.is_meta == mean.is_meta:
                    mean.data = moved  # as parameters do, by which wise_ft knows it again
                else:
                    means[adapter] = moved
        return self

    def __repr__(self) -> str:
        return "radapter." + super().__repr__()


def _times(weight: Tensor, down: Tensor | None, scale: Tensor, rows: Tensor) -> Tensor:
    """σ F of every row; σ goes to the smaller factor, and not to the rows."""
    if down is None:
        return F.linear(rows, (scale * weight).to(rows.dtype))
    return F.linear(F.linear(rows, (scale * down).to(rows.dtype)), weight.to(rows.dtype))


def _into(weight: Tensor, down: Tensor | None, scale: Tensor, start: Tensor) -> Tensor:
    """σ F θ₀ of a weight or bias."""
    if down is None:
        return (scale * weight).to(start.dtype) @ start
    return weight.to(start.dtype) @ ((scale * down).to(start.dtype) @ start)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def averages(model: nn.Module) -> dict[str, Tensor]:
    """Returns what stands for trained tensors outside of training, by its names in `model.named_buffers()`.

    Args:
        model: any model.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RAdapterLayer)}
    found = [(f"{name}.{one}", getattr(layer, one)) for name, layer in layers.items() for one in AVERAGE_OF.values()]
    return {f"{name}.{adapter}": mean for name, means in found for adapter, mean in means.items()}
