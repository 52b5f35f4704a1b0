# SPDX-License-Identifier: Apache-2.0
"""What terms of the loss add to a training step, with cached reference embeddings and without.

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

from hf_robust import SAFTConfig, SimilarityLoss, Term, add_terms, select_saft
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.data.embeds_cache import pretrained_image_embeds
from hf_robust.encoders.dual_encoder import image_embeds, logit_scale, text_embeds
from hf_robust.losses import BatchReference
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians
from hf_robust.tasks.class_names import ZeroShotClassifierOutput
from hf_robust.tasks.task import Task

CLASSES, TOKENS = 10, 8  # "a photo of a cat."


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Random images and labels."""
    return {"pixel_values": torch.randn(size, 3, 224, 224), "labels": torch.randint(CLASSES, (size,))}


def make_prompts() -> torch.Tensor:
    """Random class prompts, `(classes, tokens)`."""
    ids = torch.randint(1000, 40_000, (CLASSES, TOKENS))
    ids[:, -1] = 49_407  # end of text
    return ids


class Classification(Task):
    """What `ZeroShotClassifier` does with a live head; it would need a tokenizer."""

    loss_name = "cross_entropy"

    def forward(self, **batch: torch.Tensor) -> ZeroShotClassifierOutput:
        """Classifies random images, and adds the terms of the loss."""
        images, classes = image_embeds(self.model, batch["pixel_values"]), text_embeds(self.model, self.prompts)
        loss = F.cross_entropy(logit_scale(self.model) * images @ classes.T, batch["labels"])
        return self.with_terms(ZeroShotClassifierOutput(loss=loss, image_embeds=images), batch)


class Drift(Term):
    """A second term that wants the same embeddings of θ₀."""

    name, needs = "drift", ("image_embeds",)

    def forward(self, outputs: ZeroShotClassifierOutput, reference: BatchReference) -> torch.Tensor:
        """The mean squared distance of the embeddings."""
        return (outputs.image_embeds - reference.image_embeds).square().sum(dim=-1).mean()


TERMS: dict[str, tuple[list[Term], bool]] = {  # and whether θ₀'s embeddings are cached
    "without": ([], False),
    "with the cache": ([SimilarityLoss()], True),
    "two terms with the cache": ([SimilarityLoss(), Drift()], True),
    "without cache": ([SimilarityLoss()], False),
    "two terms without cache": ([SimilarityLoss(), Drift()], False),
}


def training_steps(model: nn.Module, batch: dict[str, torch.Tensor], prompts: torch.Tensor) -> dict[str, Step]:
    """A training step without terms, and with one or two, with the cache and with θ₀'s forward in every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    cached = {**batch, REFERENCE_EMBEDS: pretrained_image_embeds(model, batch)}

    def step_with(terms: list[Term], is_cached: bool) -> Step:
        task = Classification(model, None)
        task.prompts = prompts
        add_terms(task, {term.name: term for term in terms}, is_cached)
        task.train()

        def step() -> None:
            optimizer.zero_grad()
            output = task(**(cached if is_cached else batch))
            torch.stack([output.loss, *(output.terms or {}).values()]).sum().backward()
            optimizer.step()

        return step

    return {name: step_with(*how) for name, how in TERMS.items()}


@dataclass
class ScriptArguments:
    """What terms of the loss add to a training step."""

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
