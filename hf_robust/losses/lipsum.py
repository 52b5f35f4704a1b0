# SPDX-License-Identifier: Apache-2.0
"""Lipsum-FT: what images say of random texts stays as the pre-trained model has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..encoders.dual_encoder import family, logit_scale, text_tokenizer
from ..errors import ConfigError
from ..tasks.contrastive import similarities
from ..tasks.task import Task
from .learning import check_images_move
from .reference import BatchReference
from .term import Term, check_count

PROBE = "a"  # a text around which a tokenizer puts its special tokens


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts of random tokens, as a text tower takes them.

    Args:
        known: `(vocabulary,)`, the ids that are drawn from, on the CPU.
        before: ids in front of the random ones.
        after: ids behind them, padding included.
        masked: whether the tower is given an attention mask.
    """

    known: Tensor
    before: list[int]
    after: list[int]
    masked: bool

    @classmethod
    def of(cls, task: Task, tokens: int) -> RandomPrompts:
        """Reads off a task's tokenizer what stands around the words of a prompt, and which ids are words.

        CLIP has a beginning and an end, and pools at the end. SigLIP has no beginning, pools at the last position and
        was trained with prompts padded to the full length, so these are.

        Args:
            task: the task.
            tokens: random ones in a prompt.

        Raises:
            ConfigError: a prompt would be longer than the text tower.
        """
        how, tokenizer = text_tokenizer(task.processor, task.model), task.processor.tokenizer
        words: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(PROBE)["input_ids"]
        start = next(place for place in range(len(whole)) if whole[place : place + len(words)] == words)
        before, after = whole[:start], whole[start + len(words) :]
        room = how.max_length - len(before) - len(after)
        if tokens > room:
            what, where = "prompts are longer than the text tower", "losses, lipsum, tokens"
            raise ConfigError(what, where=where, got=tokens, allowed=f"1 to {room}")
        padded = family(task.model).padding == "max_length"
        special = {*tokenizer.all_special_ids}
        known = [one for one in range(min(len(tokenizer), how.vocab_size)) if one not in special]
        after = after + [tokenizer.pad_token_id] * (room - tokens if padded else 0)
        return cls(torch.tensor(known), before, after, masked=not padded)

    def draw(self, prompts: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws prompts, each token uniformly among those that are words.

        Args:
            prompts: how many.
            tokens: random ones in each.
            generator: on the CPU.

        Returns:
            `input_ids` and, where the tower takes one, `attention_mask`, each `(prompts, tokens)`, on the CPU.
        """
        words = self.known[torch.randint(len(self.known), (prompts, tokens), generator=generator)]  # (prompts, tokens)
        around = [torch.tensor(ids, dtype=torch.long).expand(prompts, -1) for ids in (self.before, self.after)]
        input_ids = torch.cat([around[0], words, around[1]], dim=1)  # (prompts, length)
        return {"input_ids": input_ids, **({"attention_mask": torch.ones_like(input_ids)} if self.masked else {})}


class LipsumLoss(Term):
    """How far the logits of images for random texts have moved: 1/(2M) Σ_m (s₀⟨f, t_m⟩ - s₀⟨f₀, t_m⟩)², λ times.

    Lipsum-FT (Nam, Heo and Lee, ICLR 2024, https://huggingface.co/papers/2404.00860). The texts t_m are nonsense: M
    prompts of tokens drawn uniformly among the words of the tokenizer, anew in every step, the same on all ranks, in
    all micro-batches and in a resumed run, embedded by the pre-trained text tower. So the image tower keeps how it
    speaks to language as a whole, not to some classes alone. f and f₀ are the images' embeddings by the tuned and the
    pre-trained model.

    The scale s₀ is the pre-trained model's, a constant: a trained one could make the loss small without holding an
    image. As it stands in the loss squared (10,000 in CLIP), λ hangs on the model; `lipsum_penalty` says how.

    It is for every task that trains the vision tower. Defaults are those of the released code. Our choice where it
    has CLIP alone: special tokens are not drawn, and prompts are padded as the text tower was trained.

    Args:
        prompts: M, in a step.
        tokens: random ones in each prompt.
        weight: λ at the start of training, a finite number from 0.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> trainer = RobustTrainer(model, args, losses=[LipsumLoss()], ...)
    """

    name, needs = "lipsum", ("image_embeds", "text_embeds")
    scale: Tensor  # s₀, 0-dim

    def __init__(
        self,
        prompts: int = 80,
        tokens: int = 8,
        weight: float = 1.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__(weight, schedule)
        check_count("prompts", prompts)
        check_count("tokens", tokens)
        self.prompts, self.tokens = prompts, tokens

    def attach(self, task: Task) -> None:
        """Takes the scale of the pre-trained model, and how its tokenizer makes prompts.

        Args:
            task: the task.

        Raises:
            ConfigError: its vision tower is not trained, or prompts are longer than its text tower.
        """
        check_images_move(task, self.name)
        self.random_prompts = RandomPrompts.of(task, self.tokens)
        self.register_buffer("scale", logit_scale(task.model).detach(), persistent=False)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor:
        """Returns the penalty, a mean over the images.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.
        """
        generator = reference.task.progress.generator(self.name)
        texts = reference.text_embeds(self.random_prompts.draw(self.prompts, self.tokens, generator))  # (prompts, dim)
        return lipsum_penalty(outputs.image_embeds, reference.image_embeds, texts, self.scale)


def lipsum_penalty(tuned: Tensor, reference: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Returns the mean over images of 1/(2M) Σ_m (s₀⟨f - f₀, t_m⟩)² = s₀²/(2M) ‖(f - f₀) Tᵀ‖².

    If the texts were an orthonormal basis it would be s₀²/(2 dim) ‖f - f₀‖², `SimilarityLoss` times s₀²/dim.

    Args:
        tuned: `(batch, dim)`, f, L2-normalised embeddings of images.
        reference: `(batch, dim)`, f₀, those of the pre-trained model; gets no gradient.
        texts: `(prompts, dim)`, T, L2-normalised.
        scale: s₀.

    Returns:
        0-dim, in float32 or better; exactly 0, with a gradient of 0, where both are equal.

    Example:
        >>> lipsum_penalty(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.eye(2), scale=10.0)
        tensor(50.)
    """
    moved = scale * similarities(tuned - reference.detach(), texts)  # (batch, prompts)
    return moved.square().mean() / 2
