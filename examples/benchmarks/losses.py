# SPDX-License-Identifier: Apache-2.0
"""What terms of the loss add to a training step: θ₀'s forwards, with a cache and without, and each term's own cost.

    python examples/benchmarks/losses.py --rounds 15

A randomly initialised CLIP of ViT-B/32's shapes, images against ten class prompts, float32. The steps of one method
share its model and optimizer and take turns in every round, so that whatever else the machine does meets them alike.

A term's own cost is what a step takes longer than one with a term that asks θ₀ for the same and adds nothing, as a
share of the step without terms. StarFT's has in it the texts that the tuned tower embeds, with their gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, ProcessorMixin

from hf_robust import (
    ACLIPConfig,
    ContextLoss,
    FeatureLoss,
    LipsumLoss,
    SAFTConfig,
    SimilarityLoss,
    SpuriosityLoss,
    Term,
    WeightLoss,
    ZeroShotClassifier,
    add_terms,
    select_saft,
    tokenize,
)
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.data.embeds_cache import pretrained_image_embeds
from hf_robust.interpolation.adapters import zero_shot_copy
from hf_robust.losses import BatchReference
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians
from hf_robust.tasks.class_names import ZeroShotClassifierOutput
from hf_robust.tasks.task import Progress, Task
from hf_robust.training.losses import StartingPoint

CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"


class Drift(Term):
    """A second term that wants the same embeddings of θ₀."""

    name, needs = "drift", ("image_embeds",)

    def forward(self, outputs: ZeroShotClassifierOutput, reference: BatchReference) -> Tensor:
        """The mean squared distance of the embeddings."""
        return (outputs.image_embeds - reference.image_embeds).square().sum(dim=-1).mean()


class Asked(Term):
    """Asks θ₀ for what another term asks, and adds nothing."""

    name = "asked"

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term

    def attach(self, task: Task) -> None:
        """Attaches the other term."""
        self.term.attach(task)
        self.layers = self.term.layers

    def needs_for(self, task: Task) -> tuple[str, ...]:
        """What the other term needs."""
        return self.term.needs_for(task)

    def forward(self, outputs: ZeroShotClassifierOutput, reference: BatchReference) -> Tensor:
        """Zero, once θ₀ has answered."""
        task, term = reference.task, self.term
        if "image_embeds" in self.needs_for(task):
            _ = reference.image_embeds
        if self.layers:
            _ = reference.hidden_states
        if isinstance(term, LipsumLoss):
            generator = task.progress.generator(term.name)
            reference.text_embeds(term.random_prompts.draw(term.prompts, term.tokens, generator))
        if isinstance(term, SpuriosityLoss) and isinstance(task, ZeroShotClassifier):
            texts = term.texts(task, reference.inputs["labels"])
            reference.text_embeds(tokenize(task.processor, texts, task.model))
        return outputs.image_embeds.detach().new_zeros(())


OF_REFERENCE: dict[str, tuple[list[Term], bool]] = {  # and whether θ₀'s embeddings are cached
    "without": ([], False),
    "with the cache": ([SimilarityLoss()], True),
    "two terms with the cache": ([SimilarityLoss(), Drift()], True),
    "without cache": ([SimilarityLoss()], False),
    "two terms without cache": ([SimilarityLoss(), Drift()], False),
}
OWN: dict[str, Term] = {
    "similarity loss": SimilarityLoss(),
    "Lipsum-FT": LipsumLoss(),
    "CAR-FT": ContextLoss(),
    "LDIFS": FeatureLoss(),
    "L2-SP": WeightLoss(),
    "StarFT": SpuriosityLoss(),
}


class Steps:
    """Training steps of one model, with one optimizer.

    Args:
        model: what is trained, θ₀ now.
        processor: its processor.
        batch: images and labels.
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin, batch: dict[str, Tensor]) -> None:
        self.model, self.processor, self.batch = model, processor, batch
        self.cached = {**batch, REFERENCE_EMBEDS: pretrained_image_embeds(model, batch)}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        self.starts = zero_shot_copy(model)

    def with_terms(self, terms: Sequence[Term], cached: bool = False) -> Step:
        """A training step with terms."""
        task = ZeroShotClassifier(self.model, self.processor, CLASSES)
        known = None if self.starts is None else {f"model.{name}": start for name, start in self.starts.items()}
        add_terms(task, {term.name: term for term in terms}, cached, StartingPoint(known))
        task.train()
        task.progress = Progress(epochs=2)

        def step() -> None:
            self.optimizer.zero_grad()
            output = task(**(self.cached if cached else self.batch))
            torch.stack([output.loss, *(output.terms or {}).values()]).sum().backward()
            self.optimizer.step()

        return step

    def own(self) -> dict[str, Step]:
        """A step without terms, and for each a step with it and one that asks θ₀ for the same."""
        found = {"without": self.with_terms([])}
        for title, term in OWN.items():
            found |= {title: self.with_terms([term]), f"θ₀ for {title}": self.with_terms([Asked(term)])}
        return found


def print_own(title: str, medians: dict[str, float]) -> None:
    """Prints what each term adds to θ₀'s forwards, in per cent of a step without terms."""
    print(f"\n{title:<24} {'own cost':>8}")
    for name in OWN:
        print(f"{name:<24} {100 * (medians[name] - medians[f'θ₀ for {name}']) / medians['without']:>7.1f}%")


@dataclass
class ScriptArguments:
    """What terms of the loss add to a training step."""

    rounds: int = 15
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)
    small: bool = False  # the demo's CLIP, to see that all of this runs


def adapted(base: nn.Module, config: PeftConfig) -> nn.Module:
    """A copy with an adapter."""
    model = get_peft_model(copy.deepcopy(base), config)
    if isinstance(config, SAFTConfig):
        select_saft(model)
    return model


def main(arguments: ScriptArguments) -> None:
    """Times the steps of full fine-tuning, SAFT and A-CLIP."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    processor = CLIPProcessor.from_pretrained(DEMO)  # its words are among ViT-B/32's 49,408
    text = {"eos_token_id": processor.tokenizer.eos_token_id}
    base = CLIPModel.from_pretrained(DEMO) if arguments.small else CLIPModel(CLIPConfig(text_config=text))
    side, size = base.config.vision_config.image_size, arguments.batch_size
    batch = {"pixel_values": torch.randn(size, 3, side, side), "labels": torch.randint(len(CLASSES), (size,))}
    saft, aclip = (adapted(base, config) for config in (SAFTConfig(density=0.001, score="random"), ACLIPConfig()))
    for title, model in {"full fine-tuning": base, "SAFT 0.1 %": saft, "A-CLIP": aclip}.items():
        steps = Steps(model, processor, batch)
        of_reference = {name: steps.with_terms(*how) for name, how in OF_REFERENCE.items()}
        print_medians(title, interleaved_medians(of_reference, arguments.rounds), "without")
        print_own(title, interleaved_medians(steps.own(), arguments.rounds))


if __name__ == "__main__":
    run(main, ScriptArguments)
