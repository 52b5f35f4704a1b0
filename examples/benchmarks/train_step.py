# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes with SAFT, A-CLIP, LoRA, SHiRA, gradient masking and full fine-tuning.

    python examples/benchmarks/train_step.py --rounds 15

A randomly initialised CLIP of ViT-B/32's shapes, contrastive loss, float32. All methods take turns in every round, so
that whatever else the machine does meets them alike. The floor is the least that any method which trains early layers
must do: forward, and the gradients of the activations.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_robust import ACLIPConfig, SAFTConfig, select_saft

DENSITY = 0.001
Step = Callable[[], None]


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


def interleaved_medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """The median seconds of each step, all taking turns in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, medians: dict[str, float], reference: str) -> None:
    """Prints the seconds of each step, and how many times those of the reference they are."""
    print(f"\n{title:<24} {'seconds':>8} {f'x {reference}':>10}")
    for name, seconds in medians.items():
        print(f"{name:<24} {seconds:>8.3f} {seconds / medians[reference]:>10.3f}")


def main() -> None:
    """Times training steps and forwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
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
    report("training step", interleaved_medians(steps, arguments.rounds), "floor")
    adapted = saft_model(base)
    evaluations = {"base": forward(base, batch), "SAFT 0.1 %": forward(adapted, batch)}
    report("forward in eval", interleaved_medians(evaluations, 3 * arguments.rounds), "base")


if __name__ == "__main__":
    main()
