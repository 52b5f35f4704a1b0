# SPDX-License-Identifier: Apache-2.0
"""A small model with every kind of module SAFT can hold entries in, and the plainest possible SAFT to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_robust import SAFTConfig, select_saft

DIM = 8


class Patches(nn.Module):
    """Bare parameters beside children, as in the embeddings of a vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(DIM))
        self.convolution = nn.Conv2d(3, DIM, kernel_size=4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.convolution(images).flatten(2).transpose(1, 2)  # (batch, patches, dim)
        return torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)


class Block(nn.Module):
    """A Linear called twice, and attention with a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.twice = nn.Linear(DIM, DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + 2 * self.twice(torch.tanh(2 * self.twice(self.norm(hidden))))
        return hidden + self.attention(hidden, hidden, hidden)[0]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, DIM, padding_idx=0)
        self.patches = Patches()
        self.block = Block()
        self.alias = self.block.twice  # the same module at a second path
        self.head = nn.Linear(DIM, 3, bias=False)
        self.checkpointing: bool | None = None  # None: off; else the value of use_reentrant
        self.positions = nn.Embedding(10, DIM)  # read, not called, as where a vision tower interpolates them

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.cat([self.patches(images), self.tokens(ids)], dim=1) + self.positions.weight
        if self.checkpointing is None or not torch.is_grad_enabled():
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.checkpointing)
        return self.head(self.alias(hidden).mean(1))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))  # the root's own, as logit_scale
        self.tower = Tower()

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.scale * self.tower(images, ids)


def zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Zoo().to(dtype)


def batches(count: int = 3, size: int = 4, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "pixel_values": (0.1 * torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)).to(dtype),
            "ids": torch.randint(0, 11, (size, 5), generator=generator),
            "labels": torch.randint(0, 3, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def tuned(density: float = 0.3, dtype: torch.dtype = torch.float64, **settings: object) -> PeftModel:
    """A zoo with values that are not zero."""
    model = get_peft_model(zoo(dtype), SAFTConfig(density=density, score="random", **settings))
    select_saft(model)
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "saft_values" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def outputs(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    batch = batches(1, dtype=dtype)[0]
    return model(batch["pixel_values"], batch["ids"])


def exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["pixel_values"], batch["ids"]), batch["labels"])


def oracle_masks(model: nn.Module, data: list[dict[str, Tensor]], density: float, root: tuple[str, ...]) -> dict:
    """SAFT's rule, word by word: mean gradient over all images, absolute value, one threshold over all tensors."""
    model = copy.deepcopy(model)
    images = 0
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name not in root}
    for batch in data:
        model.zero_grad()
        exact_loss(model, batch).backward()
        count = len(batch["pixel_values"])
        images += count
        for name in sums:
            sums[name] += model.get_parameter(name).grad * count
    scores = {name: (total / images).abs() for name, total in sums.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.sort(descending=True).values[int(density * len(everything)) - 1]
    return {name: score >= threshold for name, score in scores.items()}


def oracle_train(
    model: nn.Module,
    masks: dict[str, Tensor],
    step_losses: list[Callable[[nn.Module], None]],
    learning_rate: float = 1e-2,
    clip: float | None = None,
) -> nn.Module:
    """Full fine-tuning; the gradient is masked, and after each step what is not selected is put back."""
    model = copy.deepcopy(model)
    original = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in masks], lr=learning_rate, weight_decay=0.0)
    for backward in step_losses:
        optimizer.zero_grad()
        backward(model)
        for name, mask in masks.items():
            model.get_parameter(name).grad *= mask
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([model.get_parameter(name) for name in masks], clip)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = model.get_parameter(name)
                parameter.copy_(torch.where(mask, parameter, original[name]))
    return model
