# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes with SAFT, A-CLIP, LoRA, SHiRA, gradient masking and full fine-tuning.

    python examples/benchmarks/train_step.py --rounds 15

A randomly initialised CLIP of ViT-B/32's shapes, contrastive loss, float32. All methods take turns in every round, so
that whatever else the machine does meets them alike. The floor is the least that any method which trains early layers
must do: forward, and the gradients of the activations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_robust import ACLIPConfig, SAFTConfig, select_saft
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians

DENSITY = 0.001


def contrastive_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """CLIP's own loss, the images against the texts of the batch."""
    return model(**batch, return_loss=True).loss


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Random images and texts."""
    ids = torch.randint(1000, 40_000, (size, 77))
    ids[:, -1] = 49_407  # end of text
    return {"pixel_values": torch.randn(size, 3, 224, 224), "input_ids": ids}


def optimizer_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A training step on the parameters that are trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        contrastive_loss(model, batch).backward()
        optimizer.step()

    return step


def floor(base: CLIPModel, batch: dict[str, torch.Tensor]) -> Step:
    """Forward and activation gradients: all is frozen but the smallest first embedding of each tower."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    model.vision_model.embeddings.class_embedding.requires_grad_(True)
    model.text_model.embeddings.position_embedding.requires_grad_(True)
    return lambda: contrastive_loss(model, batch).backward()


def peft_method(base: CLIPModel, batch: dict[str, torch.Tensor], config: PeftConfig) -> Step:
    """A training step of one of PEFT's methods."""
    return optimizer_step(get_peft_model(copy.deepcopy(base), config), batch)


def saft_model(base: CLIPModel) -> nn.Module:
    """Random entries, so that every layer pays; a selection by gradient leaves many layers without any."""
    model = get_peft_model(copy.deepcopy(base), SAFTConfig(density=DENSITY, score="random"))
    select_saft(model)
    return model


def gradient_masking(base: CLIPModel, batch: dict[str, torch.Tensor]) -> Step:
    """SAFT as a mask over full fine-tuning: dense gradients, dense optimizer, what is not selected put back."""
    model = copy.deepcopy(base).train()
    parameters = list(model.parameters())
    masks = [torch.rand_like(parameter) < DENSITY for parameter in parameters]
    originals = [parameter.detach().clone() for parameter in parameters]
    step = optimizer_step(model, batch)

    @torch.no_grad()
    def masked() -> None:
        with torch.enable_grad():
            step()
        for parameter, mask, original in zip(parameters, masks, originals, strict=True):
            parameter.copy_(torch.where(mask, parameter, original))

    return masked


def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A forward in eval mode, without gradients."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(**batch)

    return run


@dataclass
class ScriptArguments:
    """How long a training step takes."""

    rounds: int = 15
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)


def main(arguments: ScriptArguments) -> None:
    """Times training steps and forwards."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    base = CLIPModel(CLIPConfig())  # its defaults are ViT-B/32
    batch = make_batch(arguments.batch_size)
    linear = "all-linear"
    steps = {
        "floor": floor(base, batch),
        "SAFT 0.1 %": optimizer_step(saft_model(base), batch),
        "A-CLIP": peft_method(base, batch, ACLIPConfig()),
        "LoRA r=8": peft_method(base, batch, LoraConfig(r=8, target_modules=linear)),
        "SHiRA r=1": peft_method(base, batch, ShiraConfig(r=1, target_modules=linear)),
        "gradient masking": gradient_masking(base, batch),
        "full fine-tuning": optimizer_step(copy.deepcopy(base), batch),
    }
    print_medians("training step", interleaved_medians(steps, arguments.rounds), "floor")
    adapted = saft_model(base)
    evaluations = {"base": forward(base, batch), "SAFT 0.1 %": forward(adapted, batch)}
    print_medians("forward in eval", interleaved_medians(evaluations, 3 * arguments.rounds), "base")


if __name__ == "__main__":
    run(main, ScriptArguments)
