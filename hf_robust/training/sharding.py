# SPDX-License-Identifier: Apache-2.0
"""Training with FSDP2: weights, gradients and optimizer state are sharded while a model is trained, and only then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from ..losses.state import stateful
from ..tuners.saft.layer import saft_layers
from .replaced import replaced


class ShardingTrainer(Trainer):
    """FSDP2 for a `ZeroShotClassifier`; the base of `RobustTrainer`.

    A sharded copy is trained. The model itself stays whole, on every rank and, where θ₀ is not asked of it in every
    step, in CPU memory; it takes the trained weights when it is evaluated or saved, and at the end. So what is
    evaluated, saved and resumed from is what it is without FSDP, and nothing that reads weights meets shards.
    """

    model: Any
    optimizer: Any
    shards = False  # whether training shards
    whole: Any = None  # the model, while `self.model` is its sharded copy
    replicas: list[nn.Parameter]  # trained parameters of the copy that are not sharded

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator, as in `Trainer`."""
        super().create_accelerator_and_postprocess()
        # What Trainer does with FSDP outside `_prepare_for_training` is for a model that stays sharded.
        self.shards, self.is_fsdp_enabled = self.is_fsdp_enabled, False

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        if not self.shards:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.whole = self.model.to(self.args.device)  # with the weights of the checkpoint
        self.model = self.model_wrapped = _copy_of(self.whole)
        self.optimizer = None  # one of an earlier training has the shards of that
        _say_how_to_shard(self.model, self.accelerator.state.fsdp_plugin)
        with replaced(self, is_fsdp_enabled=True):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.callback_handler.model = self.whole  # a callback may call it on one rank alone
        self._make_room()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.replicas = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
        self.optimizer.optimizer.register_load_state_dict_pre_hook(_shard_state)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward; FSDP averages the gradients of what it shards, so the others are averaged here.

        Args:
            model: the model, as Accelerate wrapped it.
            inputs: a batch.
            num_items_in_batch: as in `Trainer`.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.whole is not None and self.accelerator.sync_gradients:
            for parameter in self.replicas:
                if parameter.grad is not None:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))
        return loss

    def _finalize_training(self, *args: Any) -> Any:
        self.gather_shards()
        self.drop_shards()
        return super()._finalize_training(*args)

    # --- the whole model ---

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside the context `model` is the whole model with the weights of now; all ranks have to enter it."""
        if self.whole is None:
            yield
            return
        self.gather_shards()
        whole, prepared = self.whole.to(self.args.device), list(self.accelerator._models)
        self.accelerator._models.clear()  # else Trainer takes it for prepared, and it would be without autocast
        try:
            with replaced(self, model=whole, model_wrapped=whole, whole=None):
                yield
        finally:
            self.accelerator.unwrap_model(whole, keep_fp32_wrapper=False)
            whole._is_accelerate_prepared = False
            self.accelerator._models[:] = prepared
            self._make_room()

    @torch.no_grad()
    def gather_shards(self) -> None:
        """Gives the whole model the weights of its sharded copy; all ranks have to call it."""
        if self.whole is None:
            return
        for own, trained in zip(self.whole.parameters(), self.model.parameters(), strict=True):
            if trained.requires_grad:
                own.copy_(_full(trained))
        for own, buffer in zip(self.whole.buffers(), self.model.buffers(), strict=True):
            own.copy_(buffer)
        extras = zip(stateful(self.whole.terms), stateful(self.model.terms), strict=True)
        for (_, own), (_, trained) in extras:
            own.set_extra_state(trained.get_extra_state())

    def drop_shards(self) -> None:
        """Goes on with the whole model, as it is."""
        if self.whole is None:
            return
        self.model = self.model_wrapped = self.whole.to(self.args.device)
        self.whole = None
        self.accelerator._models.clear()

    def _make_room(self) -> None:
        if not self.whole.reference.asks(self.whole.model):
            self.whole.to("cpu")

    # --- saving ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, as in `Trainer`; all ranks have to call it.

        Args:
            output_dir: where to; by default `args.output_dir`.
            _internal_call: as in `Trainer`.
        """
        with self.whole_model():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.whole is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        saved = self.optimizer.state_dict()
        saved["state"] = {i: {name: _full(t) for name, t in state.items()} for i, state in saved["state"].items()}
        with replaced(self, optimizer=SimpleNamespace(state_dict=lambda: saved)):
            super()._save_optimizer_and_scheduler(output_dir)


def _copy_of(whole: Any) -> nn.Module:
    """A copy to shard: θ₀ in the base, and what is trained the same on all ranks, as DDP would make it."""
    for layer in saft_layers(whole):
        layer.show_base()
    copied = copy.deepcopy(whole, {id(whole.processor): whole.processor})
    for parameter in copied.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)
    return copied


def _say_how_to_shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Sets what depends on the model: what cannot be sharded, and which layers are gathered one after the other."""
    plugin.ignored_modules = [nn.ParameterList(parameter for parameter in model.parameters() if parameter.dim() == 0)]
    plugin.mixed_precision_policy = None  # `compute_loss` uses autocast, as on one device: the head is in float32
    layers = {type(layer).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m}
    plugin.transformer_cls_names_to_wrap = sorted(layers)


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state of whole parameters as that of an optimizer's shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [i for group in saved["param_groups"] for i in group["params"]]
    by_index = dict(zip(order, parameters, strict=True))
    state = {
        i: {name: _like(by_index[i], tensor) for name, tensor in tensors.items()}
        for i, tensors in saved["state"].items()
    }
    return {**saved, "state": state}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:  # a number of steps
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # all ranks have it
