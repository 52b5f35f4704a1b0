# SPDX-License-Identifier: Apache-2.0
"""Learned context prompts: word vectors that are trained in place of hand-written words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import ConfigError, DataError
from .dual_encoder import base_model, input_embeddings, pools_at_largest_id, tokenize

INIT_STD = 0.02  # of a context that starts from no words, as in CoOp


def context_prompt(
    model: nn.Module,
    processor: ProcessorMixin,
    n_tokens: int = 4,
    init: str | None = "a photo of a",
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> tuple[PeftModel, str]:
    """Wraps a dual encoder with word vectors that all classes share and that are trained instead of a prompt's words.

    The unified context of CoOp, "Learning to Prompt for Vision-Language Models" (Zhou et al. 2022, arXiv 2109.01134),
    as a stock PEFT adapter of type TRAINABLE_TOKENS: rare words of the tokenizer's own vocabulary stand for the
    context, and their rows of the text tower's token embedding are what is trained; all else is frozen. So the saved
    adapter loads without this package, and the prompts need only the model's tokenizer and the template. Keep the
    template with the adapter: it belongs to it. In a `ZeroShotClassifier` train it with `head="live"`, since the other
    heads freeze the text tower.

    Args:
        model: a plain dual encoder; its token embedding gets the adapter, its weights stay as they are.
        processor: its processor.
        n_tokens: number of word vectors.
        init: text of exactly `n_tokens` tokens that the context starts from: the class embeddings are then, bit for
            bit, those of the template `init + " {}."`. None: normal with standard deviation 0.02.
        class_names: all names that will be used with the context, also those of other datasets. The words that stand
            for the context do not occur in them; `ZeroShotClassifier` refuses names in which they do.
        seed: of the start without `init`; the global random state is neither used nor changed.

    Returns:
        The wrapped model, and the template, ordinary text such as `"salamanca scandals thyroid nitrate {}."`.

    Raises:
        ConfigError: `n_tokens` is below 1, `init` has another number of tokens, the model is no supported dual
            encoder or has an adapter already, or the tokenizer has no words that can stand for the context.

    Example:
        >>> model, template = context_prompt(clip, processor, class_names=["cat", "dog"])
        >>> classifier = ZeroShotClassifier(model, processor, ["cat", "dog"], template)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['base_model.model.text_model.embeddings.token_embedding.trainable_tokens_delta.default']
    """
    _check_settings(model, n_tokens)
    tokenizer, embedding = processor.tokenizer, cast(nn.Embedding, input_embeddings(model)[1])
    if init is not None:
        _check_init(tokenizer, init, n_tokens)
    context = _context_words(model, tokenizer, n_tokens, _used_ids(tokenizer, init, class_names))
    start = context if init is None else init
    _check_prompts(tokenizer, context, start, class_names)
    target = next(name for name, module in model.named_modules() if module is embedding)
    config = TrainableTokensConfig(target_modules=[target], token_indices=_ids(tokenizer, context))
    wrapped = get_peft_model(model, config)
    vectors = wrapped.get_submodule(f"base_model.model.{target}").trainable_tokens_delta["default"]
    with torch.no_grad():  # (n_tokens, hidden)
        vectors.copy_(_normal(vectors, seed) if init is None else embedding.weight[_ids(tokenizer, init)])
    return wrapped, f"{context} {{}}."


def check_context(
    model: nn.Module,
    processor: ProcessorMixin,
    input_ids: Tensor,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> None:
    """Refuses class names that contain a word of a learned context; such a word would be read with a learned vector.

    Trained tokens are a learned context for the templates that contain all of them; others are the user's own affair.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        processor: its processor.
        input_ids: `(classes * templates, tokens)`, the prompts as `tokenize` returns them.
        class_names: one per class.
        templates: prompts with `{}` in place of the class name.

    Raises:
        DataError: a class name contains a word of the context.
    """
    for ids in _trained_ids(model, processor.tokenizer):
        empty = tokenize(processor, [template.replace("{}", "") for template in templates], model)["input_ids"]
        learned = (empty.unsqueeze(-1) == ids).any(dim=1).all(dim=-1)  # (templates,)
        found = torch.isin(input_ids, ids).sum(dim=-1).unflatten(0, (-1, len(templates)))  # (classes, templates)
        clash = (learned & (found > torch.isin(empty, ids).sum(dim=-1))).any(dim=-1)  # (classes,)
        if clash.any():
            words = ", ".join(repr(processor.tokenizer.decode([index]).strip()) for index in ids.tolist())
            raise DataError(
                "class name contains a word that stands for the learned context",
                got=class_names[int(clash.nonzero()[0])],
                allowed=f"names without the tokens {words}",
                remedy="Pass all class names to context_prompt(..., class_names=...), which then takes other words.",
            )


def _trained_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """The tokens each adapter trains, as far as they can be a context, which has no special tokens."""
    for module in input_embeddings(model)[1].modules():  # LoRA's trainable_token_indices wraps the layer once more
        if isinstance(module, TrainableTokensLayer):
            for ids in module.token_indices.values():
                if set(ids).isdisjoint(tokenizer.all_special_ids):
                    yield torch.tensor(ids)


def _check_settings(model: nn.Module, n_tokens: int) -> None:
    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model has an adapter already",
            got=", ".join(model.peft_config),
            allowed="a plain dual encoder",
            remedy="To learn a context on top of the adapter, wrap model.merge_and_unload(). To train both together, "
            "give the token_indices of a context's config to LoraConfig(trainable_token_indices=...).",
        )
    if n_tokens < 1:
        raise ConfigError("a context needs tokens", where="n_tokens", got=n_tokens, allowed="1 or more")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_init(tokenizer: PreTrainedTokenizerBase, init: str, n_tokens: int) -> None:
    found = len(_ids(tokenizer, init))
    if found != n_tokens:
        raise ConfigError(
            "the text that the context starts from has another number of tokens",
            where="init",
            got=f"{init} ({found} tokens)",
            allowed=f"{n_tokens} tokens",
            remedy=f"Set n_tokens={found}, take another text, or init=None." if found else "Take init=None.",
        )


def _used_ids(tokenizer: PreTrainedTokenizerBase, init: str | None, class_names: Sequence[str]) -> set[int]:
    """Ids that keep their own meaning; a name's first token can differ at the start of a text and after a word."""
    texts = [init or "", *class_names, *(f"a {name}." for name in class_names)]
    return set(tokenizer.all_special_ids).union(*(_ids(tokenizer, text) for text in texts))


def _id_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids of the context must be below this."""
    config = base_model(model).config.text_config
    limit = min(len(tokenizer), cast(nn.Embedding, input_embeddings(model)[1]).num_embeddings)
    return min(limit, cast(int, tokenizer.eos_token_id)) if pools_at_largest_id(config) else limit


def _context_words(model: nn.Module, tokenizer: PreTrainedTokenizerBase, n_tokens: int, used: set[int]) -> str:
    """Words that are one token each where they stand, from the end of the vocabulary, where the rare ones are."""
    limit = _id_limit(model, tokenizer)
    words: list[str] = []
    ids: list[int] = []
    while len(ids) < n_tokens:
        for index in range(limit - 1, -1, -1):
            word = cast(str, tokenizer.decode([index])).strip()
            plain = word.isascii() and word.isalpha()  # no braces, and no punctuation, which some tokenizers drop
            fresh = index not in used and word not in words
            if plain and fresh and _ids(tokenizer, " ".join([*words, word])) == [*ids, index]:
                break
        else:
            raise ConfigError(
                "the tokenizer has too few words of one token that could stand for the context",
                got=f"{len(ids)} words",
                allowed=f"{n_tokens} words that are in neither init nor class_names",
                remedy="Take a smaller n_tokens, or a model whose tokenizer has whole words.",
            )
        words, ids, used = [*words, word], [*ids, index], used | {index}
    return " ".join(words)


def _check_prompts(tokenizer: PreTrainedTokenizerBase, context: str, start: str, class_names: Sequence[str]) -> None:
    """In a whole prompt the context must be the tokens it is alone, and must leave the name the tokens it had."""
    ids, start_ids = _ids(tokenizer, context), _ids(tokenizer, start)
    for name in ("cat", *class_names):
        expected = _ids(tokenizer, f"{start} {name}.")
        rest = expected[len(ids) :]
        if expected != start_ids + rest or _ids(tokenizer, f"{context} {name}.") != ids + rest:
            raise ConfigError(
                "the tokenizer joins the context and the class name",
                got=f"{context} {name}.",
                remedy="Take another init, or a model whose tokenizer keeps words apart.",
            )


def _normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * INIT_STD
