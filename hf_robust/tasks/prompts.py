# SPDX-License-Identifier: Apache-2.0
"""The prompts of classes: tokenised once, and embedded all of them, or those that a training step has drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..encoders.chunks import check_chunk_size
from ..encoders.class_embeds import embed_prompts, mean_over_wordings, prompt_tokens
from ..encoders.dual_encoder import base_model, tower_modules
from .gather import gather_rows, n_ranks, rank
from .sampled_classes import SampledClasses, check_classes_per_step, sample_classes
from .task import Progress


class Prompts(nn.Module):
    """The prompts of classes, in every wording: those of the first class, then those of the second, …

    Args:
        model: a dual encoder, plain or wrapped by PEFT; it is not part of this module.
        processor: its processor.
        class_names: one per class.
        templates: prompts with `{}` in place of the class name.
        chunk_size: prompts of a chunk, whose activations the backward computes anew; None keeps all activations.
        classes_per_step: classes of a training step, see `sample_classes`; None for all.

    Raises:
        ConfigError: `chunk_size` is below 1, `classes_per_step` below 2 or above the number of classes, or what
            `prompt_tokens` raises.
        DataError: what `prompt_tokens` raises.

    Example:
        >>> prompts = Prompts(clip, processor, ["cat", "dog"], ["a photo of a {}.", "a sketch of a {}."])
        >>> prompts.embed(clip).shape, prompts.encode(clip).shape
        (torch.Size([4, 512]), torch.Size([2, 512]))
    """

    input_ids: Tensor  # (classes * wordings, tokens)
    attention_mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        class_names: Sequence[str],
        templates: Sequence[str],
        chunk_size: int | None = None,
        classes_per_step: int | None = None,
    ) -> None:
        super().__init__()
        check_chunk_size(chunk_size, "text_chunk_size")
        check_classes_per_step(classes_per_step, len(class_names))
        self.classes, self.wordings = len(class_names), len(templates)
        self.chunk_size, self.classes_per_step = chunk_size, classes_per_step
        tokens = prompt_tokens(model, processor, class_names, templates)
        mask = tokens.get("attention_mask")
        self.register_buffer("input_ids", tokens["input_ids"], persistent=False)
        self.register_buffer("attention_mask", mask, persistent=False)
        self.lengths = None if mask is None else mask.sum(dim=1).cpu()  # (prompts,), where padding may be cut
        self._kept: tuple[list[int], Tensor, Tensor] | None = None  # the tower's state, its class embeddings

    def draw(
        self, progress: Progress, labels: Tensor | None, shared: bool = False
    ) -> tuple[SampledClasses | None, Tensor | None]:
        """Draws by seed and step, the same in all processes, the classes of a training step and a wording for each.

        Args:
            progress: where the training is.
            labels: `(batch,)`; None for no labels: all classes are there.
            shared: as in `sample_classes`.

        Returns:
            The classes, None for all; and `(classes,)`, on the CPU, which of the prompts stands for each. None for all
            prompts, where there are all classes, with one wording.
        """
        sampled, rows = None, None
        if self.classes_per_step is not None and labels is not None:
            generator = progress.generator("classes")
            sampled = sample_classes(labels, self.classes, self.classes_per_step, generator, shared)
        if self.wordings > 1:
            drawn = torch.randint(self.wordings, (self.classes,), generator=progress.generator("wordings"))
            rows = torch.arange(self.classes) * self.wordings + drawn  # (classes,)
        if sampled is not None:
            rows = sampled.classes if rows is None else rows[sampled.classes]
        return sampled, rows

    def embed(self, model: nn.Module, rows: Tensor | None = None, shared: bool = False) -> Tensor:
        """Embeds prompts, cut to the longest of them where the family allows it.

        Args:
            model: the dual encoder.
            rows: `(drawn,)`, on the CPU: which; None for all.
            shared: whether every process embeds a part and gets the others' with their gradient, so that all must call
                this at the same time. Dropout then draws once for a prompt, not once in every process.

        Returns:
            `(drawn, dim)`, L2-normalised, in float32 or better.
        """
        if shared:
            rows = torch.arange(len(self.input_ids)) if rows is None else rows
            own = self.embed(model, _own_share(rows))  # (share, dim)
            return gather_rows(own, [len(own)] * n_ranks())[: len(rows)]
        if rows is None:
            return embed_prompts(model, self.input_ids, self.attention_mask, self.chunk_size)
        ids, mask = self.input_ids[rows], self.attention_mask  # (drawn, tokens)
        if self.lengths is not None and mask is not None:
            longest = int(self.lengths[rows].max())
            ids, mask = ids[:, :longest], mask[rows, :longest]
        return embed_prompts(model, ids, mask, self.chunk_size)

    def encode(self, model: nn.Module, rows: Tensor | None = None, shared: bool = False) -> Tensor:
        """Embeds classes: the mean over the wordings, or of the wording that was drawn for each.

        Args:
            model: the dual encoder.
            rows: what `draw` returned; None for the mean over all wordings of all classes.
            shared: as in `embed`.

        Returns:
            `(classes, dim)`, L2-normalised, in float32 or better.
        """
        embeds = self.embed(model, rows, shared)  # (prompts, dim)
        return mean_over_wordings(embeds, self.wordings if rows is None else 1)

    def pick(self, embeds: Tensor, rows: Tensor | None) -> Tensor:
        """Returns what `encode` would of embeddings that were kept: θ₀'s, for the wordings of a step.

        Args:
            embeds: `(classes * wordings, dim)`, what `embed` returned for all prompts.
            rows: what `draw` returned.

        Returns:
            `(classes, dim)`, L2-normalised.
        """
        return mean_over_wordings(embeds, self.wordings) if rows is None else mean_over_wordings(embeds[rows], 1)

    def kept(self, model: nn.Module) -> Tensor:
        """Returns the class embeddings, computed anew when the text tower gives others: `(classes, dim)`, detached.

        Args:
            model: the dual encoder.
        """
        with torch.inference_mode(False), torch.no_grad():
            versions, probe = self._tower_state(model)
            if self._kept is None or self._kept[0] != versions or not self._kept[1].equal(probe):
                self._kept = (versions, probe, self.encode(model))
        return self._kept[2]

    def train(self, mode: bool = True) -> Prompts:
        """Sets train or eval mode, as any module; class embeddings that were kept are computed anew."""
        self._kept = None
        return super().train(mode)

    def _tower_state(self, model: nn.Module) -> tuple[list[int], Tensor]:
        """Writes to the tower show in its version counters, switches and scales of adapters in the first prompt."""
        towers = [base_model(model).get_submodule(name) for name in tower_modules(model, "text")]
        versions = [parameter._version for tower in towers for parameter in tower.parameters()]
        mask = self.attention_mask
        return versions, embed_prompts(model, self.input_ids[:1], None if mask is None else mask[:1])


def _own_share(rows: Tensor) -> Tensor:
    """As many as any other process: the last of all is repeated where they do not come out even."""
    size = -(-len(rows) // n_ranks())
    padded = torch.cat([rows, rows[-1:].expand(size * n_ranks() - len(rows))])
    return padded[size * rank() :][:size]
