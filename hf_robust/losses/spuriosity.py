# SPDX-License-Identifier: Apache-2.0
"""StarFT: how images are confused by their surroundings stays as the pre-trained model has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..encoders.chunks import in_chunks
from ..encoders.dual_encoder import base_model, logit_scale, text_embeds, tokenize
from ..encoders.templates import class_prompts
from ..errors import ConfigError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.contrastive import similarities
from ..tasks.flyp import FLYP
from ..tasks.gather import rank
from ..tasks.task import Progress, Task, chunk_size
from .divergence import divergence
from .reference import BatchReference
from .term import Term

TASKS = ("class_names", "flyp")
PHRASES = (  # our own; what may be around a thing, and says nothing of what it is
    "{} in the snow.",
    "{} in the rain.",
    "{} at night.",
    "{} in bright sunshine.",
    "{} beside water.",
    "{} among trees.",
    "{} on a lawn.",
    "{} in a street.",
    "{} in a kitchen.",
    "{} on a wooden table.",
    "{} in front of a brick wall.",
    "{} held in a hand.",
)


class SpuriosityLoss(Term):
    """How far images have moved among texts of other classes in random surroundings: a divergence over the batch.

    StarFT (Kim et al., IJCAI 2025, https://huggingface.co/papers/2505.13232), to be added to FLYP's loss or to the
    cross-entropy of class names. Every image gets a text of its class in surroundings that need not be its own, "a
    photo of a cat in the snow.", drawn by seed and step. How likely an image is to have another's text is what the
    model knows of surroundings, as its class is not that of the text: it shall stay softmax(s₀ V₀ S₀ᵀ), V₀ and S₀ the
    embeddings of images and texts by the pre-trained model; texts of the image's own class are left out. Images and
    texts are compared at the pre-trained scale s₀ on both sides, so the scale is not trained by it. It starts from 0,
    unless the text tower has dropout.

    The weight goes by epochs, r (1 - (e + 1) / E) in epoch e = 0, 1, … of E, so that it is 0 in the last.

    The softmax is over the batch of each rank alone, and of each micro-batch where the loss is by micro-batches: what
    it compares with is likewise, and texts of all ranks would be a second gathering for a term that is a mean anyway.
    The released code has one template; of several one is drawn, as FLYP does. Its phrases were made by a language
    model; ours are our own, a dozen.

    Args:
        weight: r, a finite number from 0.
        phrases: surroundings, `{}` in place of the prompt, which comes without its full stop; None for `PHRASES`.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> args = RobustTrainingArguments("runs/starft", task="flyp")
        >>> surroundings = SpuriosityLoss(phrases=["{} in the fog.", "{} indoors."])
        >>> trainer = RobustTrainer(model, args, losses=[surroundings], ...)
    """

    name, needs = "spuriosity", ("image_embeds", "text_embeds")
    scale: Tensor  # s₀, 0-dim

    def __init__(self, weight: float = 0.5, phrases: Sequence[str] | None = None) -> None:
        super().__init__(weight)
        if phrases is not None:
            _check_phrases(phrases)
        self.phrases = phrases

    def attach(self, task: Task) -> None:
        """Takes the scale of the pre-trained model.

        Args:
            task: the task.

        Raises:
            ConfigError: it is not one of class names whose text tower runs in training.
            DataError: a phrase makes a prompt too long for the text tower.
        """
        if not isinstance(task, ZeroShotClassifier) or task.name not in TASKS:
            what, allowed = "surroundings are of images with one class by name", ", ".join(map(repr, TASKS))
            raise ConfigError(what, where="losses, spuriosity", got=task.name, allowed=allowed)
        if task.head != "live":
            what = "the texts are embedded by the text tower as it is trained"
            raise ConfigError(what, where="head", got=task.head, allowed="'live'")
        tokenizer, prompts = task.processor.tokenizer, class_prompts(task.class_names, task.templates)
        lengths = [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
        longest = prompts[lengths.index(max(lengths))]
        tokenize(task.processor, [surrounded(longest, phrase) for phrase in self.phrases or PHRASES], task.model)
        self.register_buffer("scale", logit_scale(task.model).detach(), persistent=False)

    def start_epoch(self, task: Task, progress: Progress) -> None:
        """Refuses a training of one epoch, in which its weight would be 0 throughout.

        Args:
            task: the task.
            progress: where the training is.

        Raises:
            ConfigError: it is one.
        """
        if progress.epochs < 2:
            what, allowed = "the weight falls to 0 in the last epoch, which is the only one", "2 epochs or more"
            raise ConfigError(what, where="losses, spuriosity", got=progress.epochs, allowed=allowed)

    def weight_at(self, progress: Progress) -> float:
        """Returns r (1 - (e + 1) / E).

        Args:
            progress: where the training is.

        Example:
            >>> SpuriosityLoss(weight=0.5).weight_at(Progress(epoch=0, epochs=10))
            0.45
        """
        return self.weight * (1 - (progress.epoch + 1) / progress.epochs)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor:
        """Returns the divergence, a mean over the images.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.
        """
        task: Any = reference.task
        labels = reference.inputs["labels"]  # (batch,)
        tokens = tokenize(task.processor, self.texts(task, labels), task.model)
        device = base_model(task.model).device
        on_device = [
            None if ids is None else ids.to(device) for ids in map(tokens.get, ("input_ids", "attention_mask"))
        ]
        size = _texts_at_once(task)
        tuned = outputs.image_embeds, in_chunks(partial(text_embeds, task.model), on_device, size)
        start = reference.image_embeds, reference.text_embeds(tokens)
        return spuriosity_divergence(*tuned, *start, labels, self.scale)

    def texts(self, task: ZeroShotClassifier, labels: Tensor) -> list[str]:
        """Draws a text for each image: a prompt of its class in some surroundings.

        Args:
            task: the classifier.
            labels: `(batch,)`.
        """
        phrases, generator = self.phrases or PHRASES, task.progress.generator(f"{self.name} {rank()}")
        drawn = [
            torch.randint(len(of), (len(labels),), generator=generator).tolist() for of in (task.templates, phrases)
        ]
        found = []
        for label, wording, around in zip(labels.tolist(), *drawn, strict=True):
            (prompt,) = class_prompts([task.class_names[label]], [task.templates[wording]])
            found.append(surrounded(prompt, phrases[around]))
        return found


def surrounded(prompt: str, phrase: str) -> str:
    """Returns a prompt in surroundings.

    Args:
        prompt: with or without a full stop.
        phrase: `{}` in place of it.

    Example:
        >>> surrounded("a photo of a cat.", "{} in the snow.")
        'a photo of a cat in the snow.'
    """
    return phrase.replace("{}", prompt.removesuffix("."))


def spuriosity_divergence(
    tuned_images: Tensor,
    tuned_texts: Tensor,
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Returns the mean over images of KL(softmax(s₀ V₀ S₀ᵀ) || softmax(s₀ V Sᵀ)), without texts of an equal label.

    An image whose label the whole batch has is as likely to have any text on both sides, and counts 0.

    Args:
        tuned_images: `(batch, dim)`, V, L2-normalised embeddings by the tuned model.
        tuned_texts: `(batch, dim)`, S, likewise.
        images: `(batch, dim)`, V₀, those of the pre-trained model; get no gradient.
        texts: `(batch, dim)`, S₀, likewise.
        labels: `(batch,)`.
        scale: s₀.

    Returns:
        0-dim, in float32 or better; exactly 0, with a gradient of 0, where all are equal.

    Example:
        >>> eye = torch.eye(3)
        >>> spuriosity_divergence(eye, eye.roll(1, 0), eye, eye, torch.arange(3), scale=1.0)
        tensor(0.1201)
    """
    same = labels[:, None] == labels  # (batch, batch)
    tuned, start = (
        scale * similarities(tuned_images, tuned_texts),
        scale * similarities(images, texts),
    )  # (batch, batch)
    lowest = torch.finfo(tuned.dtype).min
    return divergence(tuned.masked_fill(same, lowest), start.masked_fill(same, lowest))


def _texts_at_once(task: ZeroShotClassifier) -> int | None:
    return chunk_size(task, task.contrastive_chunk_size if isinstance(task, FLYP) else task.prompts.chunk_size)


def _check_phrases(phrases: Any) -> None:
    allowed = "a list of texts with {} in place of the prompt, as '{} in the snow.'"
    several = isinstance(phrases, Sequence) and not isinstance(phrases, str) and len(phrases) > 0
    bad = [one for one in phrases if not isinstance(one, str) or "{}" not in one] if several else phrases
    if not several or bad:
        raise ConfigError("phrases are none", where="losses, spuriosity, phrases", got=bad, allowed=allowed)
