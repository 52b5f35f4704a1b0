# SPDX-License-Identifier: Apache-2.0
"""Tokens without the model they are for."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

from hf_robust.encoders.dual_encoder import text_embeds, text_tokenizer, tokenize
from hf_robust.errors import ConfigError, DataError
from tests.tiny_models import FAMILIES, tiny_model, tiny_processor

LONG = "very " * 30


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_travels_without_the_model_and_gives_the_same_tokens(family):
    model, processor = tiny_model(family), tiny_processor(family)
    content = pickle.dumps(text_tokenizer(processor, model))
    assert b"torch" not in content  # no weights
    texts = ["a cat", "two dogs at play"]
    found, expected = pickle.loads(content)(texts), tokenize(processor, texts, model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family, legacy_eos", [*((family, False) for family in FAMILIES), ("clip", True)])
def test_a_text_that_is_cut_keeps_the_end_at_which_the_tower_pools(family, legacy_eos):
    model, processor = tiny_model(family, legacy_eos=legacy_eos), tiny_processor(family, legacy_eos=legacy_eos)
    cut = text_tokenizer(processor, model, truncate=True)
    tokens = cut(["a cat", LONG])
    full = processor.tokenizer(LONG)["input_ids"]
    assert tokens["input_ids"].shape == (2, cut.max_length) and len(full) > cut.max_length
    if family != "vision-text-dual-encoder":  # pools at the first token
        assert tokens["input_ids"][1, -1] == full[-1]
    assert tokens["input_ids"][1, : cut.max_length - 1].tolist() == full[: cut.max_length - 1]
    with torch.no_grad():
        short = text_embeds(model, **tokenize(processor, ["a cat"], model))
        torch.testing.assert_close(text_embeds(model, **tokens)[:1], short, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_all_texts_of_a_set_are_looked_at_before_anything_is_trained(family, monkeypatch, caplog):
    monkeypatch.setattr("hf_robust.encoders.tokens.AT_ONCE", 4)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, processor = tiny_model(family), tiny_processor(family)
    processor.tokenizer.deprecation_warnings.clear()  # it warns once
    texts = ["a cat"] * 9 + [f"{LONG} one", "a dog", f"{LONG} two"]
    with pytest.raises(DataError, match=r"2 of 12 texts are longer.*photos.*very.*allowed \d+ tokens.*truncate=True"):
        text_tokenizer(processor, model).check_lengths(texts, "photos")
    with pytest.raises(DataError, match="2 of 12 texts.*photos, first in row 4"):
        text_tokenizer(processor, model).check_lengths(texts, "photos", [0] * 9 + [4, 5, 7])
    text_tokenizer(processor, model).check_lengths(texts[:9], "photos")
    assert not caplog.records  # of transformers, about the length
    text_tokenizer(processor, model, truncate=True).check_lengths(texts, "photos")


def test_what_is_no_dual_encoder_has_no_tokenizer():
    with pytest.raises(ConfigError, match="not a supported dual encoder"):
        text_tokenizer(tiny_processor("clip"), tiny_model("clip").text_model)
