# SPDX-License-Identifier: Apache-2.0
"""ImageTextPairs by itself: its loss, its chunks, its scale, what it refuses, and retrieval among a whole set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_robust.data.collator import ImageCollator
from hf_robust.data.rows import LabelledImages, labelled_images
from hf_robust.encoders.dual_encoder import base_model, image_embeds, logit_scale, text_embeds, tokenize
from hf_robust.errors import AdapterFileError, ConfigError, DataError
from hf_robust.tasks.pairs import ImageTextPairs
from tests.tiny_models import FAMILIES, synthetic_picture, tiny_batch, tiny_lora, tiny_model, tiny_processor

TEXTS = [["a cat", "a kitten"], ["two dogs"], ["an ox", "a cow", "an ox"], ["two dogs"]]
FLAT = [text for of_row in TEXTS for text in of_row]
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2, 3])
PROCESSOR = tiny_processor("clip")


def pair_rows(texts=TEXTS, name: str = "train_dataset") -> LabelledImages:
    pictures = [synthetic_picture(index, 4, 40, index) for index in range(len(texts))]
    return labelled_images(Dataset.from_dict({"image": pictures, "text": texts}), name, target="text")


def pair_batch(family: str, model) -> dict[str, Tensor]:
    images = {name: t.double() if t.is_floating_point() else t for name, t in tiny_batch(family, len(TEXTS)).items()}
    return {**images, **tokenize(tiny_processor(family), FLAT, model), "image_of_text": OWNERS}


def gradients(task: ImageTextPairs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    task.zero_grad()
    task(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_chunks_as_at_once(family):
    task = ImageTextPairs(tiny_model(family).double(), tiny_processor(family)).train()
    task.model.eval()  # no dropout, which chunks draw otherwise
    batch = pair_batch(family, task.model)
    expected = gradients(task, batch)
    assert {n for n, p in task.named_parameters() if p.requires_grad} == expected.keys()  # as DDP needs it
    assert ("model.logit_bias" in expected) == family.startswith("siglip") == (task.loss == "sigmoid")
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "k_proj.bias" not in name)
    task.contrastive_chunk_size = 3
    found = gradients(task, batch)
    for name, gradient in found.items():
        single = family == "siglip2" and "position_embedding" in name  # which transformers interpolates in float32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-7 if single else 1e-12)


def test_padding_does_not_tell_texts_apart():
    task = ImageTextPairs(tiny_model("clip"), PROCESSOR)
    short, long = tokenize(PROCESSOR, ["an ox"], task.model), tokenize(PROCESSOR, ["an ox", "a kitten"], task.model)
    keys = [task._text_keys(tokens["input_ids"], tokens["attention_mask"]) for tokens in (short, long)]
    assert keys[0][0].equal(keys[1][0]) and not keys[1][0].equal(keys[1][1])


def test_scale_is_capped_where_it_is_trained_and_gets_no_decay():
    task = ImageTextPairs(tiny_model("clip"), PROCESSOR).train()
    scale = task.model.logit_scale
    batch = pair_batch("clip", task.model) | {"pixel_values": tiny_batch("clip", len(TEXTS))["pixel_values"]}
    with torch.no_grad():
        scale.fill_(5.0)
    loss = task(**batch).loss
    assert scale.item() == pytest.approx(math.log(100))
    loss.backward()
    assert scale.grad is not None
    assert task.without_decay() == ["model.logit_scale"]
    frozen = ImageTextPairs(tiny_lora(tiny_model("clip")), PROCESSOR).train()
    with torch.no_grad():
        base_model(frozen.model).logit_scale.fill_(5.0)  # of the pre-trained model
    frozen.after_step()
    assert logit_scale(frozen.model).item() == pytest.approx(math.exp(5))


def test_siglip_under_the_softmax_does_not_train_its_bias():
    task = ImageTextPairs(tiny_model("siglip").double(), tiny_processor("siglip"), loss="softmax").train()
    assert "model.logit_bias" not in gradients(task, pair_batch("siglip", task.model))
    assert task.without_decay() == ["model.logit_scale", "model.logit_bias"]


def test_retrieval_is_among_all_texts_of_a_set_and_by_the_text_tower_as_it_is():
    task = ImageTextPairs(tiny_model("clip"), PROCESSOR).eval()
    rows = pair_rows()
    batch = task.collator(ImageCollator(PROCESSOR))([rows[index] for index in (2, 0, 3, 1)])
    assert batch["rows"].tolist() == [2, 0, 3, 1]
    with torch.no_grad(), task.answering(rows):
        measure = task.measure(rows, whole=False)
        output = task(**batch)
        kept = measure.of_batch(output.image_embeds, batch["rows"])
        parts = [EvalPrediction(kept[part].numpy(), batch["rows"][part].numpy()) for part in (slice(3), slice(3, 4))]
        with pytest.raises(DataError, match="among a whole set.*got 3"):
            task.measure(rows, whole=False)(parts[0])
        assert measure(parts[0], compute_result=False) == {}
        found = measure(parts[1])
    assert output.loss is None and output.text_embeds is None
    with torch.no_grad():
        pixels = ImageCollator(PROCESSOR)([rows[index] for index in range(4)])["pixel_values"]
        images = image_embeds(task.model, pixels)
        similarity = images @ text_embeds(task.model, **tokenize(PROCESSOR, FLAT, task.model)).T  # (images, texts)
    owners = {text: {OWNERS[n].item() for n, one in enumerate(FLAT) if one == text} for text in FLAT}
    image_hits = [image in owners[FLAT[similarity[image].argmax()]] for image in range(4)]
    text_hits = [similarity[:, FLAT.index(text)].argmax().item() in of for text, of in owners.items()]
    assert found["text_to_image_recall@1"] == pytest.approx(np.mean(text_hits))
    assert found["recall@1"] == pytest.approx((found["text_to_image_recall@1"] + found["image_to_text_recall@1"]) / 2)
    assert found["image_to_text_recall@1"] == np.mean(image_hits)
    assert set(task.metrics) == found.keys()
    assert task(**batch).loss > 0, "the set is left with the context"


def test_several_texts_are_all_positives():
    task = ImageTextPairs(tiny_model("clip").double(), PROCESSOR, repeated_texts="negative")
    batch = pair_batch("clip", task.model)
    out = task(**batch)
    logits = logit_scale(task.model) * out.image_embeds @ out.text_embeds.T  # (images, texts)
    own = OWNERS == torch.arange(4)[:, None]
    of_images = -(logits.log_softmax(dim=1) * own / own.sum(dim=1, keepdim=True)).sum(dim=1).mean()
    expected = (of_images + F.cross_entropy(logits.T, OWNERS)) / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=0)
    without = {name: tensor for name, tensor in batch.items() if name != "image_of_text"}
    with pytest.raises(DataError, match="every image needs a text"):
        task(**without | {"input_ids": batch["input_ids"][:3], "attention_mask": batch["attention_mask"][:3]})


def test_sets_that_teach_nothing_or_do_not_fit_are_refused():
    task = ImageTextPairs(tiny_model("clip"), PROCESSOR)
    long = 100 * "a "
    with pytest.raises(DataError, match="2 of 4 texts are longer than the text tower.*train_dataset.*truncate"):
        task.check_rows(pair_rows([["a cat", long], [long], ["an ox"]]))
    ImageTextPairs(tiny_model("clip"), PROCESSOR, truncate=True).check_rows(pair_rows([[long], ["an ox"]]))
    with pytest.raises(DataError, match="all texts are the same.*an ox"):
        task.check_training(pair_rows([["an ox"], ["an ox"]]))
    with pytest.raises(DataError, match="row without text"):
        task.check_rows(pair_rows([["an ox"], [" "]]))
    with pytest.raises(DataError, match="among all texts of a set"):
        task.measure(pair_rows(), whole=False)


def test_wrong_settings_are_refused():
    model = tiny_model("clip")
    for settings in (
        {"loss": "sigmoid"},
        {"loss": "hinge"},
        {"texts": "two"},
        {"contrastive_chunk_size": 0},
        {"repeated_texts": "drop"},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            ImageTextPairs(model, PROCESSOR, **settings)
    with pytest.raises(ConfigError, match="settings of the softmax"):
        ImageTextPairs(tiny_model("siglip"), tiny_processor("siglip"), margin=0.1)
    with pytest.raises(ConfigError, match="images or their embeddings"):
        ImageTextPairs(model, PROCESSOR)(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(AdapterFileError, match="another loss.*sigmoid"):
        ImageTextPairs(model, PROCESSOR).check_settings({"loss": "sigmoid"}, "here")
