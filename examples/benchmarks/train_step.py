# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes with SAFT, A-CLIP, R-Adapter, LoRA, SHiRA, gradient masking and full fine-tuning.

    python examples/benchmarks/train_step.py --rounds 15
    python examples/benchmarks/train_step.py --rounds 30 --batch_size 256 --device cuda --bf16

A randomly initialised CLIP of ViT-B/32's shapes, contrastive loss, float32 without `--bf16`. All methods take turns in
every round, so that whatever else the machine does meets them alike. The floor is the least that any method which
trains early layers must do: forward, and the gradients of the activations. On a GPU the table also has the memory that
a step needs beside the model, and how often it waits for the GPU.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPOutput

from hf_robust import ACLIPConfig, RAdapterConfig, SAFTConfig, select_saft
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians

DENSITY = 0.001
DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Args:
        batch: images and as many texts.
        bf16: whether in an autocast to bfloat16.
    """

    batch: dict[str, Tensor]
    bf16: bool = False

    def outputs(self, model: nn.Module) -> CLIPOutput:
        """With CLIP's own loss, the images against the texts of the batch."""
        with torch.autocast(self.batch["input_ids"].device.type, torch.bfloat16, enabled=self.bf16):
            return model(**self.batch, return_loss=True)


def make_batch(config: CLIPConfig, size: int) -> dict[str, Tensor]:
    """Random images and texts."""
    text, side = config.text_config, config.vision_config.image_size
    ids = torch.randint(1000, text.vocab_size - 1, (size, text.max_position_embeddings))
    ids[:, -1] = text.eos_token_id
    return {"pixel_values": torch.randn(size, 3, side, side), "input_ids": ids}


def optimizer_step(model: nn.Module, work: Work) -> Step:
    """A training step on the parameters that are trainable."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # On a GPU what Trainer takes by default; the CPU's figures in docs/methods are of the optimizer's own default.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=trained[0].is_cuda)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        work.outputs(model).loss.backward()
        optimizer.step()

    return step


def floor(base: CLIPModel, work: Work) -> Step:
    """Forward and activation gradients: all is frozen but the smallest first embedding of each tower."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    model.vision_model.embeddings.class_embedding.requires_grad_(True)
    model.text_model.embeddings.position_embedding.requires_grad_(True)
    return lambda: work.outputs(model).loss.backward()


def peft_method(base: CLIPModel, work: Work, config: PeftConfig) -> Step:
    """A training step of one of PEFT's methods."""
    return optimizer_step(get_peft_model(copy.deepcopy(base), config), work)


def saft_model(base: CLIPModel, density: float = DENSITY) -> nn.Module:
    """Random entries, so that every layer pays; a selection by gradient leaves many layers without any."""
    model = get_peft_model(copy.deepcopy(base), SAFTConfig(density=density, score="random"))
    select_saft(model)
    return model


def gradient_masking(base: CLIPModel, work: Work) -> Step:
    """SAFT as a mask over full fine-tuning: dense gradients, dense optimizer, what is not selected put back."""
    model = copy.deepcopy(base).train()
    parameters = list(model.parameters())
    masks = [torch.rand_like(parameter) < DENSITY for parameter in parameters]
    originals = [parameter.detach().clone() for parameter in parameters]
    step = optimizer_step(model, work)

    @torch.no_grad()
    def masked() -> None:
        with torch.enable_grad():
            step()
        for parameter, mask, original in zip(parameters, masks, originals, strict=True):
            parameter.copy_(torch.where(mask, parameter, original))

    return masked


def forward(model: nn.Module, work: Work) -> Step:
    """A forward in eval mode, without gradients."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        work.outputs(model)

    return run


def to_its_end(step: Step) -> Step:
    """The step, until the GPU has done it."""

    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole


def peak_gb(step: Step) -> str:
    """The memory that a step needs beside the model."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the first makes the optimizer's state, after its own peak
        step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f}"


def waits(step: Step) -> int:
    """How often a step waits for the GPU before its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def compare(title: str, steps: dict[str, Step], rounds: int, on_gpu: bool) -> None:
    """Prints how long the steps take, beside the first of them."""
    more: dict[str, dict[str, object]] = {}
    if on_gpu:
        more["peak GB"] = {name: peak_gb(step) for name, step in steps.items()}
        more["waits"] = {name: waits(step) for name, step in steps.items()}
        steps = {name: to_its_end(step) for name, step in steps.items()}
    print_medians(title, interleaved_medians(steps, rounds), next(iter(steps)), more)


@dataclass
class ScriptArguments:
    """How long a training step takes."""

    rounds: int = 15
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    tf32: bool = False
    small: bool = False  # the demo's CLIP, to see that all of this runs


def main(arguments: ScriptArguments) -> None:
    """Times training steps and forwards."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    base = CLIPModel.from_pretrained(DEMO) if arguments.small else CLIPModel(CLIPConfig())  # its defaults: ViT-B/32
    base.to(arguments.device)
    batch = make_batch(base.config, arguments.batch_size)
    work = Work({name: tensor.to(arguments.device) for name, tensor in batch.items()}, arguments.bf16)
    linear, on_gpu = "all-linear", arguments.device == "cuda"
    steps = {
        "floor": floor(base, work),
        "SAFT 0.1 %": optimizer_step(saft_model(base), work),
        "SAFT 1 %": optimizer_step(saft_model(base, 0.01), work),
        "A-CLIP": peft_method(base, work, ACLIPConfig()),
        "R-Adapter": peft_method(base, work, RAdapterConfig()),
        "R-Adapter r=4": peft_method(base, work, RAdapterConfig(r=4)),
        "LoRA r=8": peft_method(base, work, LoraConfig(r=8, target_modules=linear)),
        "SHiRA r=1": peft_method(base, work, ShiraConfig(r=1, target_modules=linear)),
        "gradient masking": gradient_masking(base, work),
        "full fine-tuning": optimizer_step(copy.deepcopy(base), work),
    }
    compare("training step", steps, arguments.rounds, on_gpu)
    adapted = saft_model(base)
    evaluations = {"base": forward(base, work), "SAFT 0.1 %": forward(adapted, work)}
    compare("forward in eval", evaluations, 3 * arguments.rounds, on_gpu)


if __name__ == "__main__":
    run(main, ScriptArguments)
