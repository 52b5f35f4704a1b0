# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on the CPU: what Accelerate would do on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn

from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import METHODS, NAMES, build, weights

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
FAMILIES = ("clip", "siglip", "vision-text-dual-encoder")
SIMILAR = {"similarity_weight": 2.0, "similarity_towers": "both"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in ("full", "aclip", "saft", "lora")},
    "similar full": ("full", SIMILAR),
    "similar saft": ("saft", SIMILAR),
}
COMMON = {"train_sampling_strategy": "sequential", "max_steps": 4, "logging_strategy": "steps", "logging_steps": 1}


def force_fsdp() -> None:
    """Accelerate shards on GPUs alone; what it calls runs on CPUs as well."""
    stock = AcceleratorState.__init__

    def forced(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = forced


def without_dropout(model: nn.Module) -> nn.Module:
    """Ranks draw other dropout than one process."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer(folder: Any, family: str, kind: str, size: int, **settings: Any) -> Any:
    method, of_kind = KINDS[kind]
    settings = {**COMMON, **of_kind, "per_device_train_batch_size": size, **settings}
    model = without_dropout(tiny_model(family).double())
    return build(folder, method, family, model=model, train_dataset=image_dataset(16, NAMES), **settings)


def result(trained: Any) -> dict[str, Any]:
    logs = [[entry["loss"], entry["grad_norm"]] for entry in trained.state.log_history if "grad_norm" in entry]
    metrics = {name: value for name, value in trained.evaluate().items() if name.endswith(("accuracy", "loss"))}
    return {"weights": weights(trained), "logs": torch.tensor(logs), "metrics": metrics}
