# SPDX-License-Identifier: Apache-2.0
"""R-Adapter: linear residual adapters behind attention and MLP, averaged over training, that merge into the base."""

from ...peft_types import RobustPeftType, register
from .config import RAdapterConfig
from .layer import RAdapterLayer, averages
from .model import RAdapterModel, slow_averages

__all__ = ["RAdapterConfig", "RAdapterLayer", "RAdapterModel", "averages", "slow_averages"]
register(RobustPeftType.RADAPTER, config_cls=RAdapterConfig, model_cls=RAdapterModel)
