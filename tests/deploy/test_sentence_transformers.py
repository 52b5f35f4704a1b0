# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers embeds images and texts as we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from hf_robust.deploy.modules import merged_copy
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize

from ..tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor

PICTURES = list(image_dataset(5, ["cat", "dog", "owl"])["image"])
TEXTS = ["a cat", "two dogs on a mat", "x"]
FULL_LENGTH = {"padding": "max_length", "max_length": 64, "padding_side": "right", "return_attention_mask": False}
SETTINGS: dict[str, Any] = {
    "clip": None,
    "metaclip_2": None,
    "vision-text-dual-encoder": None,
    "siglip": {"text": FULL_LENGTH},
    "siglip2": {"text": FULL_LENGTH, "image": {"max_num_patches": 6}},  # else its processor takes 256
}


@pytest.mark.parametrize("family", SETTINGS)
def test_the_merged_model_searches(family: str, tmp_path: Path) -> None:
    model, processor = tiny_lora(tiny_model(family), init_lora_weights=False), tiny_processor(family)
    merged_copy(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    module = Transformer(str(tmp_path), processing_kwargs=SETTINGS[family])
    search = SentenceTransformer(modules=[module], device="cpu")
    with torch.no_grad():
        images = image_embeds(model, **processor.image_processor(images=PICTURES, return_tensors="pt"))
        texts = text_embeds(model, **tokenize(processor, TEXTS, model))
    for given, expected in ((PICTURES, images), (TEXTS, texts)):
        found = search.encode(given, batch_size=2, convert_to_tensor=True, normalize_embeddings=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found = search.similarity(search.encode(TEXTS), search.encode(PICTURES))
    torch.testing.assert_close(found, texts @ images.T, rtol=0, atol=1e-5)


def test_a_folder_is_enough_for_clip(tmp_path: Path) -> None:
    tiny_model("clip").save_pretrained(tmp_path)
    tiny_processor("clip").save_pretrained(tmp_path)
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, normalize_embeddings=True)
    with torch.no_grad():
        expected = text_embeds(tiny_model("clip"), **tokenize(tiny_processor("clip"), TEXTS, tiny_model("clip")))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
