# SPDX-License-Identifier: Apache-2.0
"""What the similarity loss adds to a training step, with cached reference embeddings and without.

    python examples/benchmarks/similarity.py --rounds 15

A randomly initialised CLIP of ViT-B/32's shapes, images against ten class prompts, float32, the image tower held. The
steps of one method share its model and optimizer and take turns in every round, so that whatever else the machine does
meets them alike.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from hf_robust import SAFTConfig, select_saft
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.data.embeds_cache import pretrained_image_embeds
from hf_robust.encoders.dual_encoder import image_embeds, logit_scale, text_embeds
from hf_robust.losses import SimilarityLoss
from hf_robust.losses.reference import Reference, pretrained_vision
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians
from hf_robust.tasks.class_names import ZeroShotClassifierOutput

CLASSES, TOKENS = 10, 8  # "a photo of a cat."


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Random images and labels."""
    return {"pixel_values": torch.randn(size, 3, 224, 224), "labels": torch.randint(CLASSES, (size,))}


def make_prompts() -> torch.Tensor:
    """Random class prompts, `(classes, tokens)`."""
    ids = torch.randint(1000, 40_000, (CLASSES, TOKENS))
    ids[:, -1] = 49_407  # end of text
    return ids


def classify(model: nn.Module, batch: dict[str, torch.Tensor], prompts: torch.Tensor) -> ZeroShotClassifierOutput:
    """What `ZeroShotClassifier` does with a live head; it would need a tokenizer."""
    images, classes = image_embeds(model, batch["pixel_values"]), text_embeds(model, prompts)
    loss = F.cross_entropy(logit_scale(model) * images @ classes.T, batch["labels"])
    return ZeroShotClassifierOutput(loss=loss, image_embeds=images, class_embeds=classes)


def training_steps(model: nn.Module, batch: dict[str, torch.Tensor], prompts: torch.Tensor) -> dict[str, Step]:
    """A training step without the loss, with the cache, and with θ₀'s forward in every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    vision, similarity = pretrained_vision(model), SimilarityLoss()
    cached = {**batch, REFERENCE_EMBEDS: pretrained_image_embeds(vision, batch)}
    model.train()

    def step(reference: Reference | None, inputs: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        outputs = classify(model, inputs, prompts)
        terms = {} if reference is None else reference.terms(outputs, inputs, progress=0.5)
        torch.stack([outputs.loss, *terms.values()]).sum().backward()
        optimizer.step()

    return {
        "without": lambda: step(None, batch),
        "with the cache": lambda: step(Reference(similarity, None, None), cached),
        "without cache": lambda: step(Reference(similarity, vision, None), batch),
    }


@dataclass
class ScriptArguments:
    """What the similarity loss adds to a training step."""

    rounds: int = 15
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)


def main(arguments: ScriptArguments) -> None:
    """Times the steps of full fine-tuning and of SAFT."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    base = CLIPModel(CLIPConfig())  # its defaults are ViT-B/32
    batch, prompts = make_batch(arguments.batch_size), make_prompts()
    adapted = get_peft_model(copy.deepcopy(base), SAFTConfig(density=0.001, score="random"))
    select_saft(adapted)
    for title, model in {"full fine-tuning": base, "SAFT 0.1 %": adapted}.items():
        medians = interleaved_medians(training_steps(model, batch, prompts), arguments.rounds)
        print_medians(title, medians, "without")


if __name__ == "__main__":
    run(main, ScriptArguments)
