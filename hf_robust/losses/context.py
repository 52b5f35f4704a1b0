# SPDX-License-Identifier: Apache-2.0
"""CAR-FT: what images say of the context they are in stays as the pre-trained model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.class_embeds import embed_prompts, prompt_tokens
from ..encoders.dual_encoder import logit_scale
from ..encoders.pretrained import pretrained_weights
from ..encoders.templates import check_templates
from ..errors import ConfigError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.contrastive import similarities
from ..tasks.task import Task
from .divergence import divergence
from .learning import check_images_move
from .reference import BatchReference
from .term import Term


class ContextLoss(Term):
    """How far the distribution of images over contexts has moved: KL(p(x; θ₀) || p(x; θ)), λ times.

    CAR-FT, Context-Aware Robust Fine-Tuning (Mao et al., https://huggingface.co/papers/2211.16175). A context is what
    a template says without its class, "a drawing of", "a blurry photo of": the mean over the task's classes of the
    template's prompts, by the pre-trained text tower. p(x; θ) = softmax_j(s₀⟨f(x), ctx_j⟩). Only the embeddings f of
    images are of the tuned model; contexts and s₀, the pre-trained model's scale, are constants: trained ones could
    make the loss small without holding an image.

    Templates that say nearly the same have nearly parallel contexts, over which every image is spread alike; then the
    loss holds little. Choose templates that differ in what they say of an image, not in how.

    Formula, temperature s₀ and weight 1 are how we remember the paper; its authors' code is not known to us, so choose
    your weight on validation data.

    Args:
        templates: two or more prompts with `{}` in place of the class name, or a key of `TEMPLATES`. They need not be
            those of the task.
        weight: λ at the start of training, a finite number from 0.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> trainer = RobustTrainer(model, args, losses=[ContextLoss("drawings")], ...)
    """

    name, needs = "context", ("image_embeds",)
    contexts: Tensor  # (templates, dim)
    scale: Tensor  # s₀, 0-dim

    def __init__(
        self,
        templates: str | Sequence[str] = "photo",
        weight: float = 1.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__(weight, schedule)
        several = check_templates(templates)
        if len(several) < 2:
            what, allowed = "of one context every image is", "2 templates or more"
            raise ConfigError(what, where="losses, context, templates", got=several, allowed=allowed)
        self.templates = templates

    def attach(self, task: Task) -> None:
        """Embeds the contexts with the pre-trained model, and takes its scale.

        Args:
            task: the task.

        Raises:
            ConfigError: it has no class names, or its vision tower is not trained.
            DataError: a prompt is too long.
        """
        if not isinstance(task, ZeroShotClassifier):
            what = "contexts are means over classes, and the task has no classes by name"
            raise ConfigError(what, where="losses, context", got=task.name, allowed=ZeroShotClassifier.__name__)
        check_images_move(task, self.name)
        templates = check_templates(self.templates)
        prompts = prompt_tokens(task.model, task.processor, task.class_names, templates)
        with torch.no_grad(), pretrained_weights(task.model):
            embeds = embed_prompts(task.model, prompts["input_ids"], prompts.get("attention_mask"))
        self.register_buffer("contexts", context_embeds(embeds, len(templates)), persistent=False)
        self.register_buffer("scale", logit_scale(task.model).detach(), persistent=False)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor:
        """Returns the divergence, a mean over the images.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.
        """
        return context_divergence(outputs.image_embeds, reference.image_embeds, self.contexts, self.scale)


def context_embeds(embeds: Tensor, n_templates: int) -> Tensor:
    """Returns the contexts of templates: ctx_j = unit(mean over classes of their prompts' embeddings).

    Args:
        embeds: `(classes * templates, dim)`, L2-normalised, those of the first class, then those of the second, …
        n_templates: of each class.

    Returns:
        `(templates, dim)`, L2-normalised.
    """
    return F.normalize(embeds.unflatten(0, (-1, n_templates)).mean(dim=0), dim=-1)  # (templates, dim)


def context_divergence(tuned: Tensor, reference: Tensor, contexts: Tensor, scale: Tensor | float) -> Tensor:
    """Returns the mean over images of KL(softmax_j(s₀⟨f₀, ctx_j⟩) || softmax_j(s₀⟨f, ctx_j⟩)).

    Args:
        tuned: `(batch, dim)`, f, L2-normalised embeddings of images.
        reference: `(batch, dim)`, f₀, those of the pre-trained model; gets no gradient.
        contexts: `(contexts, dim)`, L2-normalised.
        scale: s₀.

    Returns:
        0-dim, in float32 or better; exactly 0, with a gradient of 0, where both are equal.

    Example:
        >>> context_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2), scale=1.0)
        tensor(0.4621)
    """
    return divergence(scale * similarities(tuned, contexts), scale * similarities(reference, contexts))
