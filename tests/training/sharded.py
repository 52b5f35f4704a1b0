# SPDX-License-Identifier: Apache-2.0
"""Run by `test_trainer_sharding.py` on two gloo ranks, with FSDP2, and in one process, without."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn

from hf_robust import WiSEFTCallback
from hf_robust.errors import NonFiniteError
from hf_robust.training.trainer import RobustTrainer
from tests.programs import ROOT
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import NAMES, build, entries, weights

SHIPPED = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml").read_text())
FSDP = {"fsdp": True, "fsdp_config": SHIPPED["fsdp_config"]}
SIMILAR = {"losses": {"similarity": {"weight": 2.0, "towers": "both"}}}
SAVING = {"save_strategy": "steps", "save_steps": 2}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_score",
}


class Broken(RobustTrainer):
    """The loss of one rank is not finite in the third step."""

    def loss_terms(self, outputs, inputs):
        terms = super().loss_terms(outputs, inputs)
        bad = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 2
        return {"cross_entropy": terms["cross_entropy"] * (float("nan") if bad else 1.0)}


CLIP, SIGLIP, BOTH = "clip", "siglip", "vision-text-dual-encoder"
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {  # by name: family, method, settings
    "clip full": (CLIP, "full", {**SAVING, **BEST, "eval_dataset": image_dataset(7, NAMES, seed=50)}),
    "clip saft": (CLIP, "saft", SAVING),
    "clip aclip": (CLIP, "aclip", {}),
    "clip radapter": (CLIP, "radapter", SAVING),
    "clip lora": (CLIP, "lora", {}),
    "clip similar": (CLIP, "saft", SIMILAR),
    "siglip full": (SIGLIP, "full", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "siglip saft": (SIGLIP, "saft", {"activation_checkpointing": True}),
    "siglip aclip": (SIGLIP, "aclip", {"cls": Broken}),
    "siglip lora": (SIGLIP, "lora", {"head": "trainable", "head_first_epochs": 2}),
    "siglip similar": (SIGLIP, "full", SIMILAR),
    "both full": (BOTH, "full", {"callbacks": [WiSEFTCallback(0.5)]}),
    "both saft": (BOTH, "saft", {"head": "trainable"}),
    "both aclip": (BOTH, "aclip", {"head": "frozen"}),
    "both lora": (BOTH, "lora", {}),
    "both similar": (BOTH, "lora", SIMILAR),
    "sixteen bits": (CLIP, "full", {"bf16": True, "max_steps": 1}),
}


def force_fsdp() -> None:
    """Accelerate shards on GPUs alone; what it calls runs on CPUs as well."""
    stock = AcceleratorState.__init__

    def forced(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = forced


def without_dropout(model: nn.Module) -> nn.Module:
    """Ranks draw other dropout than one process."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer(folder: Path, name: str, ranks: int, **fsdp: Any) -> RobustTrainer:
    """The trainer of a run; every step sees the same eight images however many ranks there are."""
    family, method, settings = RUNS[name]
    settings = {"train_sampling_strategy": "sequential", "max_steps": 4, "logging_strategy": "steps", **settings}
    settings["per_device_train_batch_size"] = settings.get("per_device_train_batch_size", 4) * 2 // ranks
    model = without_dropout(tiny_model(family).to(torch.float32 if "bf16" in settings else torch.float64))

    def second_is_best(prediction: Any) -> dict[str, float]:
        return {"score": float(built.state.global_step <= 2)}

    if "eval_steps" in settings:
        settings["compute_metrics"] = second_is_best
    settings |= {"train_dataset": image_dataset(16, NAMES), "logging_steps": 1, **fsdp}
    built = build(folder / name, method, family, model, **settings)
    return built


def outcome(trained: RobustTrainer, **how: Any) -> dict[str, Any]:
    """Trains, and returns what came of it."""
    result: dict[str, Any] = {}
    try:
        trained.train(**how)
    except NonFiniteError as error:
        result["error"] = str(error)
    steps = [entry for entry in trained.state.log_history if "grad_norm" in entry]
    logged = [[float(entry["loss"]), float(entry["grad_norm"])] for entry in steps]
    return {**result, "weights": weights(trained), "entries": entries(trained), "logged": logged}


def metrics(trained: RobustTrainer, **sets: Any) -> dict[str, float]:
    return {name: value for name, value in trained.evaluate(**sets).items() if name.endswith(("accuracy", "loss"))}


def main(folder: str) -> None:
    gc.freeze()  # half of the time would go into Accelerate's collections
    force_fsdp()
    found: dict[str, Any] = {}
    for name in RUNS:
        trained = trainer(Path(folder), name, 2, **FSDP)
        rank = trained.args.process_index
        if name == "clip lora" and rank == 1:  # as if it had drawn other first weights
            with torch.no_grad():
                for parameter in trained.model.parameters():
                    parameter.add_(parameter.requires_grad)
        if name == "clip aclip":
            found["zero-shot"] = metrics(trained)
        found[name] = {**outcome(trained), "unsharded": [tuple(replica.shape) for replica in trained.replicas]}
        if name == "clip aclip":
            found["evaluated"] = metrics(trained)
            validation = image_dataset(7, NAMES, seed=50)
            found["alphas"] = trained.wise_ft_sweep(validation, alphas=(0.0, 1.0)).rows
        if "save_steps" in RUNS[name][2]:
            again = trainer(Path(folder), name, 2, **FSDP)
            found[f"{name} resumed"] = outcome(again, resume_from_checkpoint=f"{folder}/{name}/checkpoint-2")
    torch.save(found, f"{folder}/rank{rank}.pt")
