# SPDX-License-Identifier: Apache-2.0
"""Lipsum-FT: its identities, its prompts in every family, and what it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_robust import ImageTextPairs, LipsumLoss, SeveralLabels, SimilarityLoss
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.encoders.dual_encoder import image_embeds, logit_scale, tokenize
from hf_robust.errors import ConfigError
from hf_robust.losses import add_terms
from hf_robust.losses.lipsum import RandomPrompts, lipsum_penalty
from tests.losses.classifiers import batch, check_zero_at_the_start, gradients, move, with_terms
from tests.tiny_models import FAMILIES, tiny_model, tiny_processor


def units(rows, dim=6):
    return torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1)


def test_it_is_the_squared_change_of_the_logits():
    tuned, reference, texts, scale = units(5), units(5), units(7), 13.0
    moved = [[scale * (f - f0) @ t for t in texts] for f, f0 in zip(tuned, reference, strict=True)]
    by_hand = sum(sum(one.item() ** 2 for one in row) / (2 * 7) for row in moved) / 5
    norm = torch.linalg.matrix_norm((tuned - reference) @ texts.T).item()
    value = lipsum_penalty(tuned, reference, texts, scale).item()
    assert value == pytest.approx(by_hand, rel=1e-12)
    assert value == pytest.approx(scale**2 / (2 * 7) * norm**2 / 5, rel=1e-12)


def test_of_an_orthonormal_basis_it_is_the_similarity_loss():
    tuned, reference = units(5), units(5)
    basis, scale = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q, 13.0
    expected = scale**2 / 6 * SimilarityLoss().between(tuned, reference).item()
    assert lipsum_penalty(tuned, reference, basis, scale).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_zero_at_the_start_in_every_family(family):
    check_zero_at_the_start(with_terms(LipsumLoss(prompts=5), family=family), "lipsum", family)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_framed_as_the_processor_frames_texts(family):
    task, processor = with_terms(family=family), tiny_processor(family)
    words = processor.tokenizer("q m", add_special_tokens=False)["input_ids"]
    frame = RandomPrompts.of(task, len(words))
    drawn = frame.draw(400, len(words), torch.Generator().manual_seed(0))
    expected = tokenize(processor, ["q m"], task.model)
    assert frame.before + words + frame.after == expected["input_ids"][0].tolist() and drawn.keys() == expected.keys()
    inside = drawn["input_ids"][:, len(frame.before) :][:, : len(words)]
    ordinary = {*range(len(processor.tokenizer))} - {*processor.tokenizer.all_special_ids}
    assert {*inside.flatten().tolist()} <= ordinary == {*frame.known.tolist()}
    assert all(mask.all() for name, mask in drawn.items() if name == "attention_mask")


def test_prompts_are_drawn_by_seed_and_step():
    task = move(with_terms(LipsumLoss(prompts=3), SimilarityLoss()))
    at = task.progress

    def value(**changes):
        task.progress = dataclasses.replace(at, **changes)
        return task(**batch()).terms["lipsum"].item()

    assert value() == value() == value(epoch=3) and len({value(), value(step=2), value(seed=8)}) == 3


def test_the_scale_is_that_of_the_start_and_is_not_trained():
    task = move(with_terms(LipsumLoss(prompts=5)))
    before = task(**batch()).terms["lipsum"]
    found = gradients(task, before)
    assert "model.logit_scale" not in found and not any("text_model" in name for name in found)
    assert not task.terms.state_dict() and task.terms["lipsum"].scale == logit_scale(tiny_model("clip"))
    with torch.no_grad():
        task.model.logit_scale.add_(1)
    assert task(**batch()).terms["lipsum"].item() == before.item()


def test_cached_embeddings_serve():
    embeds = {REFERENCE_EMBEDS: image_embeds(tiny_model("clip"), batch()["pixel_values"]).detach()}
    live, cached = (move(with_terms(LipsumLoss(prompts=5), cached=one)) for one in (False, True))
    expected = live(**batch()).terms["lipsum"].item()
    assert cached(**batch(), **embeds).terms["lipsum"].item() == pytest.approx(expected, rel=1e-4)


def test_it_is_for_tasks_without_one_class_an_image():
    labels = torch.eye(4, 3)
    task = move(with_terms(LipsumLoss(prompts=5), cls=SeveralLabels))
    assert task(**{**batch(), "labels": labels}).terms["lipsum"] > 0
    pairs = ImageTextPairs(tiny_model("clip"), tiny_processor("clip"))
    add_terms(pairs, {"lipsum": LipsumLoss(prompts=5)})
    texts = tokenize(pairs.processor, ["one", "two", "three", "four"], pairs.model)
    assert move(pairs.train())(batch()["pixel_values"], **texts).terms["lipsum"] > 0


def test_in_autocast_it_is_float32():
    task = move(with_terms(LipsumLoss(prompts=5)))
    exact = task(**batch()).terms["lipsum"]
    with torch.autocast("cpu", torch.bfloat16):
        value = task(**batch()).terms["lipsum"]
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=0.2)


@pytest.mark.parametrize("argument", ["prompts", "tokens"])
@pytest.mark.parametrize("got", [0, 1.5, True])
def test_what_is_no_count_is_refused(argument, got):
    with pytest.raises(ConfigError, match=f"{argument} is no count"):
        LipsumLoss(**{argument: got})


def test_prompts_longer_than_the_text_tower_are_refused():
    assert with_terms(LipsumLoss(tokens=63), family="siglip")
    with pytest.raises(ConfigError, match="longer than the text tower.*lipsum, tokens.*got 64.*1 to 63"):
        with_terms(LipsumLoss(tokens=64), family="siglip")
