# SPDX-License-Identifier: Apache-2.0
"""From class names to class embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import DataError
from .chunks import in_chunks
from .context import check_context
from .dual_encoder import base_model, text_embeds, tokenize
from .preprocessing import warn_of_other_images
from .templates import check_class_names, check_templates, class_prompts

PROMPTS_AT_ONCE = 256  # without gradients; bounds the memory of thousands of prompts


@torch.no_grad()
def class_embeddings(
    model: nn.Module, processor: ProcessorMixin, class_names: Sequence[str], templates: Sequence[str] | str = "single"
) -> Tensor:
    """Embeds class names: the mean over templates of the prompts' embeddings, in eval mode and without gradients.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        processor: its processor.
        class_names: one per class.
        templates: prompts with `{}` in place of the class name, one such prompt, or a key of `TEMPLATES`.

    Returns:
        `(classes, dim)`, L2-normalised, in float32 or better.

    Raises:
        ConfigError: the model is no supported dual encoder, the tokenizer does not fit it, or a template has no `{}`.
        DataError: no class names, an empty or repeated one, one that the tokenizer does not know or cannot tell from
            another, or a prompt that is too long.

    Example:
        >>> class_embeddings(clip, processor, ["cat", "dog"], "photo").shape
        torch.Size([2, 512])
    """
    templates = check_templates(templates)
    prompts = prompt_tokens(model, processor, check_class_names(class_names), templates)
    with evaluating(model):
        return encode_prompts(model, prompts["input_ids"], prompts.get("attention_mask"), len(templates))


def prompt_tokens(
    model: nn.Module, processor: ProcessorMixin, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Tensor]:
    """Tokenises the prompts of all classes, as `tokenize` does, on the model's device.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        processor: its processor.
        class_names: one per class.
        templates: prompts with `{}` in place of the class name.

    Raises:
        ConfigError: the tokenizer does not fit the model.
        DataError: a prompt is too long, the tokenizer does not know a class name or cannot tell it from another, or a
            class name contains a word of a learned context.
    """
    warn_of_other_images(model, processor)
    _check_tokens(processor.tokenizer, class_names)
    prompts = tokenize(processor, class_prompts(class_names, templates), model)
    _check_told_apart(prompts["input_ids"], class_names, len(templates))
    check_context(model, processor, prompts["input_ids"], class_names, templates)
    return {name: tensor.to(base_model(model).device) for name, tensor in prompts.items()}


def _check_tokens(tokenizer: PreTrainedTokenizerBase, class_names: Sequence[str]) -> None:
    """Refuses names of which no word would reach the text tower, or that could end a prompt where they stand."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    for index, name in enumerate(class_names):
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        where = f"class {index}"
        if not cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip():
            remedy = "Give it another name, or take a model whose tokenizer knows its letters."
            raise DataError("the tokenizer knows no part of a class name", where=where, got=name, remedy=remedy)
        if not special.isdisjoint(ids):
            allowed = "names without " + ", ".join(map(repr, tokenizer.all_special_tokens))
            raise DataError("class name has a special token of the tokenizer", where=where, got=name, allowed=allowed)


def _check_told_apart(input_ids: Tensor, class_names: Sequence[str], n_templates: int) -> None:
    """Refuses names that differ as text but not to the text tower: one of them would never be the answer."""
    seen: dict[bytes, int] = {}
    for index, prompts in enumerate(input_ids.unflatten(0, (-1, n_templates))):  # (templates, tokens)
        other = seen.setdefault(prompts.numpy().tobytes(), index)
        if other != index:
            where, got = f"classes {other} and {index}", [class_names[other], class_names[index]]
            remedy = "Give one of them another name; some tokenizers drop accents, or know few letters."
            raise DataError("two class names have the same tokens", where=where, got=got, remedy=remedy)


def encode_prompts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, n_templates: int) -> Tensor:
    """Embeds classes: the mean over their prompts, `(classes, dim)`, L2-normalised, in float32 or better.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        input_ids: `(classes * templates, tokens)`, as `prompt_tokens` returns them.
        attention_mask: `(classes * templates, tokens)` or None, likewise.
        n_templates: number of templates.
    """
    embeds = embed_prompts(model, input_ids, attention_mask)  # (classes * templates, dim)
    return mean_over_wordings(embeds, n_templates)


def mean_over_wordings(embeds: Tensor, n_wordings: int) -> Tensor:
    """Returns class embeddings, `(classes, dim)`, L2-normalised: the mean over the wordings of each class.

    Args:
        embeds: `(classes * wordings, dim)`, those of the first class, then those of the second, …
        n_wordings: of each class.
    """
    return F.normalize(embeds.unflatten(0, (-1, n_wordings)).mean(dim=1), dim=-1)


def embed_prompts(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, chunk_size: int | None = None
) -> Tensor:
    """Embeds tokenised prompts, `(prompts, dim)`; without gradients some at a time.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        input_ids: `(prompts, tokens)`, as `prompt_tokens` returns them.
        attention_mask: `(prompts, tokens)` or None, likewise.
        chunk_size: with gradients, prompts of a chunk, see `in_chunks`; None for all at once.
    """
    size = chunk_size if torch.is_grad_enabled() else PROMPTS_AT_ONCE
    return in_chunks(partial(text_embeds, model), (input_ids, attention_mask), size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode back, which `train()` would not give.

    Args:
        model: any module.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
