# SPDX-License-Identifier: Apache-2.0
"""What the tuners of this package do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .matching import check_adapter_name


def keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns what `Module._apply` shall do to trained tensors when it does `fn` to a model: never fewer bits.

    Args:
        fn: moves or casts a tensor.

    Example:
        >>> keep_precision(torch.Tensor.half)(torch.zeros(2)).dtype
        torch.float32
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

    return apply


class RobustTuner(BaseTuner):
    """A tuner that finds its modules by itself, and merges all of them or none.

    A layer of it has `check_finite(adapter_names)`.
    """

    target_module_mapping: dict[str, list[str]] = {}
    _targets: Mapping[str, Any]

    def find_targets(self, model: nn.Module, config: Any) -> Mapping[str, Any]:
        """Returns the modules to wrap by name, each with what the tuner needs to know about it.

        Args:
            model: the model without its PEFT wrapper; it may already hold adapters.
            config: the settings of the adapter to add.
        """
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wraps the modules an adapter uses.

        Args:
            model: the model without its PEFT wrapper.
            adapter_name: the adapter to add.
        """
        check_adapter_name(adapter_name)
        config: Any = self.peft_config[adapter_name]
        self._targets = self.find_targets(model, config)
        patterns = config.target_modules, config.exclude_modules
        config.target_modules = config.exclude_modules = None  # PEFT would shorten the first and miss the second
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.target_modules, config.exclude_modules = patterns

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._targets

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base; a refused safe merge has merged nothing.

        Args:
            adapter_names: which ones; by default the active ones.
            safe_merge: refuse when a merged value is not finite.

        Raises:
            NonFiniteError: `safe_merge`, and a value is NaN or infinite.
        """
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                layer.check_finite(layer.merged_adapters + (adapter_names or layer.active_adapters))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_finite(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
